"""A participant as the user states it, and as it is prepared at its own machine."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from polyfed import data as tables
from polyfed.algorithms.fedbabu import FedBABU
from polyfed.algorithms.fedper import HEAD
from polyfed.core.algorithm import Algorithm, Env
from polyfed.core.errors import DataError, MissingExtraError, NeedsError, PolyfedError, SpecError, UsageError
from polyfed.core.message import Memory, Message, State
from polyfed.core.protocols import Model, Site
from polyfed.core.rows import Problem
from polyfed.core.tree import Array, Spec, Tree, is_under, part_of
from polyfed.data import Parts, Prepared, Raw, Split
from polyfed.data.table import is_frame

TaskKind = Literal["classification", "regression"]
#: What a client may agree to besides the usual.
CONSENTS = ("personal", "overlap")
LABELS_UNREAD = "public= holds labels, which nobody reads"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


class PreprocessingWarning(UserWarning):
    """Parameters are averaged between clients whose inputs mean different things."""


@dataclass(frozen=True, eq=False)
class Client:
    """A participant: a name, a model, data.

    Attributes:
        name: unique in the federation: ASCII letters, digits, ``_ . -``, at most 64.
        model: what `pf.torch`, `pf.keras` or `pf.sklearn` made.
        data: (x, y), a dict of arrays, a DataFrame with `target`, a torch Dataset, a tf.data.Dataset, or a function
            that returns one of these.
        target: the column of `data` that is predicted.
        preprocess: an unfitted scikit-learn transformer, or a function of the inputs; fit on this client's training rows.
        split: `pf.Split` (fractions) or `pf.Parts` (row numbers).
        groups, time: column or array: whose row it is, when it was; the split never parts a person or mixes time.
        consents: what this client agrees to besides the usual: "personal" lets its personal part leave it, which
            only ``feedback=`` asks for; "overlap" says that its validation and test rows may equal public rows, because
            equal rows are different cases here (`polyfed.data.overlap`).
        joins_at: the round from which it takes part, from 1: before it, nobody asks it and nothing of it is evaluated.
        away: rounds in which it does not take part; its memory waits for it. Who is away when a run ends is not asked
            about its test rows.
        start: what its model starts from: what `pf.load` or a run returned, or a `Tree` of entries. Of a run, its
            shared part must fit the model as a whole (where each group has one, the group's that fits); a default head,
            and the model by which a client of this name predicted, come along where they fit. Of a tree, entries of the
            same name and shape are taken. The rest starts as usual, and what an algorithm shares comes from the server;
            a note of the result says so.
        freeze: prefixes of parameters that this client never trains ("base"), whatever an algorithm asks. What it sends
            of them does not count in any mean.
    """

    name: str
    model: Model
    data: Any = field(repr=False)
    target: Any = None
    preprocess: Any = field(default=None, repr=False)
    split: Split | Parts = field(default_factory=Split)
    groups: Any = field(default=None, repr=False)
    time: Any = field(default=None, repr=False)
    consents: str | tuple[str, ...] = field(default=(), kw_only=True)
    joins_at: int = field(default=1, kw_only=True)
    away: tuple[int, ...] = field(default=(), kw_only=True)
    start: Any = field(default=None, kw_only=True, repr=False)
    freeze: str | tuple[str, ...] = field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        for name in ("consents", "freeze"):
            given = getattr(self, name)
            object.__setattr__(self, name, (given,) if isinstance(given, str) else tuple(given))
        object.__setattr__(self, "away", tuple(self.away))
        if not NAME.fullmatch(str(self.name)):
            raise UsageError(f"client name {self.name!r}: use ASCII letters, digits, '_', '.', '-', at most 64")
        if not isinstance(self.model, Model):
            raise UsageError(
                f"{self.name}: a {type(self.model).__name__} is not a model of polyfed; "
                "wrap it: pf.torch(module), pf.keras(model) or pf.sklearn(estimator)"
            )
        if not isinstance(self.split, Split | Parts):
            raise UsageError(
                f"{self.name}: split={self.split!r} is a {type(self.split).__name__}; "
                "give fractions, pf.Split(test=0.2), or row numbers, pf.Parts(...)"
            )
        if unknown := [word for word in self.consents if word not in CONSENTS]:
            raise UsageError(f"{self.name}: consents={unknown[0]!r} is unknown; there is {', '.join(CONSENTS)}")
        for name, number in (("joins_at", self.joins_at), *(("away", number) for number in self.away)):
            if type(number) is not int or number < 1:
                raise UsageError(f"{self.name}: {name}={number!r} is no round; rounds are whole numbers from 1")

    def is_present(self, round_num: int) -> bool:
        """Whether it takes part in a round."""
        return round_num >= self.joins_at and round_num not in self.away

    def read(self) -> Raw:
        """The rows, whichever form they are given in; raises `DataError`, also for what a function of the user raises."""
        try:
            return tables.read(self.name, self.data, target=self.target, groups=self.groups, time=self.time)
        except PolyfedError:
            raise
        except Exception as error:
            if not callable(self.data):
                raise
            raise DataError(f"{self.name}: data= could not be read: {type(error).__name__}: {error}") from error


@contextlib.contextmanager
def naming(client: str) -> Iterator[None]:
    """Puts a client's name before a mistake that an adapter found and could not name; its type stays."""
    try:
        yield
    except MissingExtraError:  # is about the machine, and is made from other arguments
        raise
    except UsageError as error:
        if str(error).startswith((f"{client}:", f"{client} ")):
            raise
        raise type(error)(f"{client}: {error}") from error


@contextlib.contextmanager
def naming_groups(groups: Mapping[str, str]) -> Iterator[None]:
    """Puts behind a mistake about groups that do not fit together who is in each of those that it names."""
    try:
        yield
    except SpecError as error:
        named = [
            group for group in dict.fromkeys(groups.values()) if re.search(rf"\b{re.escape(group)}\b(?!-)", str(error))
        ]
        if len(named) < 2:
            raise
        said = [f"{group}: {_few([name for name, its in groups.items() if its == group])}" for group in named]
        raise type(error)(f"{error} ({'; '.join(said)})") from error


@contextlib.contextmanager
def naming_classes(problem: Problem, sites: Mapping[str, Site]) -> Iterator[None]:
    """Puts the classes that one client alone holds behind a mistake about outputs: they are why a width is not as expected."""
    try:
        yield
    except UsageError as error:
        if " classes" not in str(error) or not (alone := held_alone(problem, sites)):
            raise
        said = [f"{name} alone holds {_few(classes)}" for name, classes in alone.items()]
        raise type(error)(f"{error}; {'; '.join(said[:4])}") from error


def held_alone(problem: Problem, sites: Mapping[str, Site]) -> dict[str, list[str]]:
    """Client -> the classes that nobody else's training, validation and test rows hold."""
    holders: dict[int, list[str]] = defaultdict(list)
    for name, site in sites.items():
        targets = [rows.target for rows in (site.train, site.validation, site.test) if rows is not None]
        for number in sorted({int(c) for target in targets if target is not None for c in target.tolist()}):
            holders[number].append(name)
    found: dict[str, list[str]] = defaultdict(list)
    for number, names in holders.items():
        if len(names) == 1 and problem.classes is not None and len(sites) > 1:
            found[names[0]].append(problem.classes[number])
    return dict(found)


@dataclass(frozen=True, eq=False)
class Population:
    """All clients of a simulation, prepared.

    Attributes:
        sites: by name, in the order given.
        prepared: what made each client's rows.
        raws, parts: each client's rows before preprocessing, and which are which.
        public: the raw public rows; None where there are none.
        first: for each group of one architecture, the state that its first client offers.
        notes: sentences for the user.
        given: group -> the state that the job gave to start from (``model=``, ``initial=``); "alone" starts from it too.
        replaced: clients that begin with the server's values where their ``start=`` has others; "alone" begins with those.
    """

    clients: Mapping[str, Client]
    sites: Mapping[str, Site]
    prepared: Mapping[str, Prepared]
    raws: Mapping[str, Raw]
    parts: Mapping[str, Parts]
    problem: Problem
    public: Raw | None
    first: Mapping[str, Tree]
    notes: tuple[str, ...] = ()
    given: Mapping[str, Tree] = field(default_factory=dict)
    replaced: tuple[str, ...] = ()

    @property
    def groups(self) -> dict[str, str]:
        return {name: site.group for name, site in self.sites.items()}


def populate(algorithm: Algorithm, clients: Iterable[Client], *, seed: int, task: TaskKind | None = None) -> Population:
    """Reads, splits and prepares every client's rows, and checks that the algorithm can use every client.

    Raises:
        UsageError: no client, two of one name, ...
        DataError: rows that cannot be used; names the client.
        NeedsError: an algorithm that asks of a client what its model does not offer.
    """
    by_name = _named(clients)
    raws, moved = in_one_order({name: client.read() for name, client in by_name.items()})
    problem = tables.problem_of({name: _target(raw) for name, raw in raws.items()}, task=task)
    parts = {name: tables.divide(name, raws[name], client.split, seed=seed) for name, client in by_name.items()}
    public = public_rows(algorithm, raws, parts)
    is_labelled = public is not None and public.target is not None
    if public is not None:
        public = public.unlabelled()
        _without_target(public, by_name, raws)
        public = ordered_as(next(iter(raws.values())), public)
        is_given = getattr(algorithm, "public", None) is not None
        for name, client in by_name.items():
            tables.check_public_apart(
                name, raws[name], parts[name], public, is_given=is_given, may_overlap="overlap" in client.consents
            )
    prepared = {
        name: tables.prepare(
            name, raws[name], parts[name], problem, preprocess=client.preprocess, public=public, seed=seed
        )
        for name, client in by_name.items()
    }
    groups = _groups(by_name)
    sites = {name: site_of(by_name[name], prepared[name], problem, groups[name], seed) for name in by_name}
    check_needs(algorithm, sites)
    for site in sites.values():
        check_public(site)
        check_frozen(algorithm, site)
    first, given = _first(algorithm, sites, seed)
    notes = [
        note
        for names in averaged_together(algorithm, groups, first)
        for note in _preprocessing_notes(algorithm, {n: raws[n] for n in names}, {n: prepared[n] for n in names})
    ]
    for note in notes:
        warnings.warn(note, PreprocessingWarning, stacklevel=4)
    unused = [*_alike(problem), *_idle_public(algorithm, parts), *_unfit_starts(by_name, sites)]
    unused += [LABELS_UNREAD] * is_labelled
    return Population(by_name, sites, prepared, raws, parts, problem, public, first, (*notes, *moved, *unused), given)


def in_one_order(raws: Mapping[str, Raw]) -> tuple[dict[str, Raw], list[str]]:
    """Every client's DataFrames with the columns in the first client's order, and a note on those that had another.

    Only where the sets of columns are equal: a column means the same everywhere by its name, never by its place.
    """
    model = next(iter(raws.values()))
    ordered = {name: ordered_as(model, raw) for name, raw in raws.items()}
    moved = [name for name, raw in raws.items() if ordered[name] is not raw]
    if not moved:
        return ordered, []
    return ordered, [f"columns of {', '.join(moved)} were put into the order of {next(iter(raws))}"]


def ordered_as(model: Raw, raw: Raw) -> Raw:
    """`raw` itself where nothing has to move."""
    inputs = {key: _frame_as(model.inputs.get(key), value) for key, value in raw.inputs.items()}
    return replace(raw, inputs=inputs) if any(inputs[key] is not raw.inputs[key] for key in inputs) else raw


def _frame_as(model: Any, frame: Any) -> Any:
    if not (is_frame(model) and is_frame(frame)):
        return frame
    wanted, there = list(model.columns), list(frame.columns)
    if wanted == there or set(wanted) != set(there) or len(wanted) != len(there):
        return frame
    return frame[wanted]


def _without_target(public: Raw, clients: Mapping[str, Client], raws: Mapping[str, Raw]) -> None:
    """Public rows have no target: as one more input it would shift or widen what every model sees."""
    inputs = {column for raw in raws.values() for column in raw.columns}
    for client in clients.values():
        targets = [client.target] if isinstance(client.target, str) else list(client.target or ())
        for column in targets:
            if column in public.columns and column not in inputs:
                raise DataError(f"public rows have the target column {column!r}; drop it")


def check_public(site: Site) -> None:
    """Raises `DataError` where a client's model cannot read the public rows: they have other inputs or widths than its own."""
    if site.public is None:
        return
    own = {key: values.shape[1:] for key, values in site.train.inputs.items()}
    given = {key: values.shape[1:] for key, values in site.public.inputs.items()}
    if own != given:
        raise DataError(
            f"{site.name}: public= has rows of {_shapes(given)}, its own rows are of {_shapes(own)}; "
            "give public= rows with the inputs of the clients and without a target"
        )


def _shapes(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{key} {list(shape) or '(one value)'}" for key, shape in shapes.items())


def _target(raw: Raw) -> Array:
    assert raw.target is not None  # `read` refuses labelled data without one
    return raw.target


def listed(clients: Iterable[Client]) -> list[Client]:
    """The clients as a list, also of a generator, which can be read once only."""
    if isinstance(clients, Client) or not isinstance(clients, Iterable):
        raise UsageError(f"clients is a {type(clients).__name__}; give a list of pf.Client(name, model, data=...)")
    return list(clients)


def _named(clients: Iterable[Client]) -> dict[str, Client]:
    clients = listed(clients)
    if not clients:
        raise UsageError("a federation needs at least one client; give a list of pf.Client(name, model, data=...)")
    by_name: dict[str, Client] = {}
    for client in clients:
        if not isinstance(client, Client):
            raise UsageError(f"clients must be pf.Client(...), got a {type(client).__name__}")
        if client.name in by_name:
            raise UsageError(f"two clients are called {client.name!r}; names tell clients apart")
        by_name[client.name] = client
    return by_name


def public_rows(algorithm: Algorithm, raws: Mapping[str, Raw], parts: Mapping[str, Parts]) -> Raw | None:
    """The public rows, raw: those of the algorithm, labels included, or those that the splits set aside, without."""
    given = getattr(algorithm, "public", None)
    aside = [raws[name].take(part.public).unlabelled() for name, part in parts.items() if len(part.public)]
    if given is not None and aside:
        raise UsageError("public= and Split(public=...) both name the public rows; give one of them")
    if given is not None:
        return tables.read_public(given)
    return tables.concat(aside) if aside else None


def site_of(client: Client, prepared: Prepared, problem: Problem, group: str, seed: int) -> Site:
    """A prepared client.

    Raises:
        SpecError: nothing of ``start=`` fits the client's model.
        UsageError: ``freeze=`` names nothing that is trained, or everything.
    """
    site = Site(
        name=client.name,
        model=client.model,
        problem=problem,
        train=prepared.train,
        validation=prepared.validation,
        test=prepared.test,
        public=prepared.public,
        group=group,
        consents=frozenset(client.consents),
    )
    if client.start is None and not client.freeze:
        return site
    with naming(client.name):
        first = site.model.first(site.train, first_env(site, seed))
    return replace(site, begins=_begins(client, first), trains=_trains(client, first), frozen=tuple(client.freeze))


def _begins(client: Client, first: Tree) -> Memory:
    """The memory before the first task: those entries of ``start=`` that fit the model."""
    if client.start is None:
        return Message()
    offered = [client.start] if isinstance(client.start, Tree) else _offered(client, first)
    found: dict[str, Array] = {}
    for tree in offered:
        found |= {name: array for name, array in tree.items() if first.spec.get(name) == tree.spec[name]}
    if not found:
        said = offered[0].spec.difference(first.spec)
        raise SpecError(f"{client.name}: nothing of start= fits its model ({client.model.kind}): {said}")
    return Message({"own": Tree(found)})


def _offered(client: Client, first: Tree) -> list[Tree]:
    """What a run left for a client, each over the ones before: default heads, what is shared, and its own model.

    Its own model is that by which it predicted when the run ended: the algorithm says what lies over what, so that a
    personal model (Ditto, APFL, pFedMe) covers the shared one, and a newer shared part what the client once had of it.
    """
    where = f"{client.name}: start="
    state, kind = _state_of(client.start, where), client.model.kind
    own = [client.start.state_of(client.name)] if client.name in _clients_of(client.start) else []
    fits = {kind: first.spec}
    shared = _shared_of(state, fits) if own else start_of(client.start, where, fits)
    if wrong := _unlike(shared, first.spec):
        said = shared.only(wrong).spec.difference(first.only(wrong).spec)
        raise SpecError(
            f"{client.name}: what start= shares does not fit its model ({kind}): {said}{_what_fits(state, shared, wrong)}"
        )
    heads = [tree for name, tree in state.trees.items() if name.startswith(HEAD)]
    return [*(head for head in heads if not head.spec.keys() - first.spec.keys()), shared, *own]


def _what_fits(state: State, shared: Tree, wrong: Collection[str]) -> str:
    """How to give the parts of which every entry fits; "" where there are none."""
    amiss = {_top(name) for name in wrong}
    fits = list(dict.fromkeys(top for name in shared.part("params") if (top := _top(name)) not in amiss))
    trees = [
        name
        for name, tree in state.trees.items()
        if name.partition(":")[0] == "params" and shared.keys() >= tree.keys()
    ]
    if not fits or not trees:
        return ""
    return f"; {_few(fits)} fit: give start= the Tree pf.load(DIR).state.trees[{trees[0]!r}].under({fits})"


def _top(name: str) -> str:
    """The first element of an entry's path."""
    return (name if part_of(name) == "params" else name.partition(":")[2]).replace("/", ".").partition(".")[0]


def _clients_of(given: Any) -> Collection[str]:
    """Who took part in a run, of its result or what was saved of it; nobody is known of a state alone."""
    population = getattr(given, "population", None)
    return tuple(population.sites if population is not None else getattr(given, "kinds", ()))


def _trains(client: Client, first: Tree) -> tuple[str, ...]:
    """Names of all that ``freeze=`` leaves free, statistics and buffers included; () where it is not given."""
    if not client.freeze:
        return ()
    if "part" not in client.model.offers:
        raise UsageError(f"{client.name} ({client.model.kind}) cannot train a part of itself; leave freeze= out")
    names, said = tuple(first.part("params")), f"{client.name}: freeze={client.freeze!r} names"
    for prefix in client.freeze:
        if not any(is_under(name, (prefix.removeprefix("!"),)) for name in names):
            known = ", ".join(sorted({name.replace("/", ".").partition(".")[0] for name in names})[:8])
            nothing = f"no parameter by {prefix!r}" if len(client.freeze) > 1 else "no parameter"
            raise UsageError(f"{said} {nothing} of its model ({client.model.kind}); it has {known}")
    if all(is_under(name, tuple(client.freeze)) for name in names):
        raise UsageError(
            f"{said} every parameter of its model ({client.model.kind}), so that nothing would train; leave some free"
        )
    moves = (name for name in first if not is_under(name, tuple(client.freeze)))
    return tuple(name if part_of(name) == "params" else name.partition(":")[2] for name in moves)


def start_of(given: Any, where: str, specs: Mapping[str, Spec] | None = None) -> Tree:
    """The entries of a model out of a tree, or the shared ones of a server's state or what has one: a result, saved or not.

    Where each group has parameters of its own (`FedDF`), those that fit the first group of `specs` which any of them fits.
    """
    if isinstance(given, Tree):
        return given
    if not (found := _shared_of(_state_of(given, where), specs or {})):
        raise UsageError(f"{where} holds no shared parameters to start from (its algorithm averaged none)")
    return found


def _state_of(given: Any, where: str) -> State:
    state = given if isinstance(given, Message) else getattr(given, "state", None)
    if not isinstance(state, Message):
        raise UsageError(f"{where} is a {type(given).__name__}; give what pf.load(DIR) returns, a result, or a Tree")
    return state


def _shared_of(state: State, specs: Mapping[str, Spec]) -> Tree:
    """A server optimizer's moments have the names of the parameters: only "params" and "stats" are a model's."""
    parts: dict[str, dict[str, Array]] = defaultdict(dict)
    for name, tree in state.trees.items():
        kind, _, group = name.partition(":")
        if kind in ("params", "stats"):
            parts[group] |= tree
    for wanted, model in specs.items():
        fits = [group for group, part in parts.items() if not _unlike(Tree(part), model)]
        if fits:
            return Tree(parts[wanted if wanted in fits else fits[0]])
    return Tree(next(iter(parts.values()), {}))


def _unlike(part: Tree, model: Spec) -> list[str]:
    """The entries of a part that a model does not have, or has in another shape or dtype."""
    return [name for name in part if model.get(name) != part.spec[name]]


def _groups(clients: Mapping[str, Client]) -> dict[str, str]:
    """Client -> name of its architecture group: the model's kind, numbered where one kind has several architectures."""
    keys: dict[str, list[Any]] = defaultdict(list)
    found: dict[str, str] = {}
    for name, client in clients.items():
        kind, key = client.model.kind, client.model.key
        if key not in keys[kind]:
            keys[kind].append(key)
        number = keys[kind].index(key)
        found[name] = kind if number == 0 else f"{kind}-{number + 1}"
    return found


def check_needs(algorithm: Algorithm, sites: Mapping[str, Site]) -> None:
    """Raises `NeedsError`, one sentence a client, where an algorithm asks for what a client's model does not offer."""
    check_offers(algorithm, {site.name: (site.model.kind, site.offers) for site in sites.values()})


def check_frozen(algorithm: Algorithm, site: Site) -> None:
    """Raises `UsageError` where a client keeps frozen all that an algorithm ever trains at it: its base, of FedBABU."""
    if not isinstance(algorithm, FedBABU) or not site.frozen:
        return
    if not any(is_under(name, tuple(algorithm.shared)) for name in site.trains):
        raise UsageError(
            f"{site.name}: {algorithm.name} trains what is shared, shared={algorithm.shared!r}, and freeze={site.frozen!r} "
            "leaves none of it free; leave freeze= out, or use FedRep, which trains the head too"
        )


def check_offers(algorithm: Algorithm, clients: Mapping[str, tuple[str, frozenset[str]]]) -> None:
    """As `check_needs`; of each client the kind of its model and what it offers."""
    said = [
        f"{name} ({kind}) {_lacks(missing, algorithm)}"
        for name, (kind, offers) in clients.items()
        if (missing := algorithm.needs.missing(offers))
    ]
    if said:
        raise NeedsError("\n".join(said))


_WORDS = {
    "params": "has no parameters to average",
    "predict": "cannot predict",
    "features": "gives no features before its last layer",
    "terms": "cannot follow loss terms by gradient",
    "distill": "cannot learn from soft labels",
    "part": "cannot train a part of itself",
    "sgd": "does not train by plain SGD",
    "iterates": "does not train on from where a step of the server's own puts it",
    "personal": 'has not agreed that its personal part leaves it (pf.Client(..., consents="personal"))',
    "public": "has no public rows: give public=rows, or let clients set some aside with split=pf.Split(public=0.1)",
}


def _lacks(missing: frozenset[str], algorithm: Algorithm) -> str:
    said = " and ".join(_WORDS.get(word, f"does not offer {word!r}") for word in sorted(missing))
    if "params" in missing or "terms" in missing:
        return f"{said}; {algorithm.name} needs that. FedMD, which exchanges predictions on public rows, can use it"
    return f"{said}; {algorithm.name} needs that"


def _first(algorithm: Algorithm, sites: Mapping[str, Site], seed: int) -> tuple[dict[str, Tree], dict[str, Tree]]:
    """For each group the state to start from: the job's own if it gives one, else what its first client offers.

    The second mapping holds what the job gave, for the groups that it fits.
    """
    first: dict[str, Tree] = {}
    for site in sites.values():
        if site.group not in first:
            with naming(site.name), naming_classes(site.problem, sites):
                first[site.group] = site.model.first(site.train, first_env(site, seed))
    given = _given(algorithm, sites, first, seed)
    if given is not None:
        fits = fitting(given, {group: tree.spec for group, tree in first.items()})
        return laid_over(first, given, fits), dict.fromkeys(fits, given)
    return first, {}


def trainers_of(algorithm: Algorithm, population: Population, *, seed: int) -> dict[str, Site]:
    """What a server trains by itself over the public rows, which it reads through the algorithm's own ``preprocess=``.

    "student" where the algorithm has one; and where it has `trains_groups`, each group's architecture: the one of its
    ``models=`` that fits, or else the first client's own model.

    Raises:
        UsageError: there are no public rows to train on, or a student that is no model.
    """
    student = getattr(algorithm, "student", None)
    models = {"student": student} if student is not None else {}
    if not models and not algorithm.trains_groups:
        return {}
    if population.public is None:
        raise UsageError(f"{algorithm.name} trains at the server, on public rows: give public=rows")
    if algorithm.trains_groups:
        from polyfed.run.trainers import matched  # it imports this module

        specs = {group: tree.spec for group, tree in population.first.items()}
        models |= matched(algorithm, specs, population.public, population.problem, seed=seed)
        for site in population.sites.values():
            models.setdefault(site.group, site.model)
    return public_sites(models, algorithm, population.public, population.problem, seed=seed)


def public_sites(
    models: Mapping[str, Any], algorithm: Algorithm, public: Raw, problem: Problem, *, seed: int
) -> dict[str, Site]:
    """Each of the server's own models as a site whose rows are the public ones.

    Raises:
        UsageError, DataError: one that is no model, or that does not take these rows or gives other outputs: names it.
    """
    if wrong := [name for name, model in models.items() if not isinstance(model, Model)]:
        raise UsageError(
            f"{algorithm.name}: {wrong[0]}= must be wrapped like a client's model: pf.torch(module), pf.keras(model), "
            "pf.sklearn(...)"
        )
    preprocess = getattr(algorithm, "preprocess", None)
    rows, _ = tables.prepare_unlabelled(f"the server of {algorithm.name}", public, preprocess=preprocess, seed=seed)
    sites = {name: Site(name, model, problem, rows, public=rows, group=name) for name, model in models.items()}
    for name, site in sites.items():
        with naming(f"the {name} of {algorithm.name}" if name == "student" else f"the server's {name}"):
            site.model.first(rows, first_env(site, seed))
    return sites


def first_env(site: Site, seed: int) -> Env:
    """What a first state may depend on: the run's seed and the shapes, never whose turn it is."""
    return Env(seed=seed, problem=site.problem, public=site.public, train=site.train, group=site.group)


def fitting(given: Tree, specs: Mapping[str, Spec]) -> list[str]:
    """The groups whose models have all entries of a given state, in its shapes; raises `SpecError` where none has."""
    fits = [group for group, spec in specs.items() if all(spec.get(n) == given.spec[n] for n in given)]
    if not fits:
        name, spec = next(iter(specs.items()))
        raise SpecError(f"the state to start from does not fit {name}: {given.spec.difference(spec)}")
    return fits


def laid_over(first: Mapping[str, Tree], given: Tree, fits: Sequence[str]) -> dict[str, Tree]:
    """Each group's first state, or a part of it, with the given one over it where it fits.

    Those that it fits come first, as what is shared begins there.
    """
    return {group: first[group].overlay(given.only(first[group])) for group in fits} | {
        group: tree for group, tree in first.items() if group not in fits
    }


def _given(algorithm: Algorithm, sites: Mapping[str, Site], first: Mapping[str, Tree], seed: int) -> Tree | None:
    initial, model = getattr(algorithm, "initial", None), getattr(algorithm, "model", None)
    if initial is not None:
        return start_of(initial, "initial=", {group: tree.spec for group, tree in first.items()})
    if model is None:
        return None
    if not isinstance(model, Model):
        raise UsageError("model= must be wrapped like a client's: pf.torch(module), pf.keras(model), pf.sklearn(...)")
    site = next(iter(sites.values()))
    return model.first(site.train, first_env(site, seed))


def averaged_together(algorithm: Algorithm, groups: Mapping[str, str], first: Mapping[str, Tree]) -> list[list[str]]:
    """The clients whose parameters go into one mean: all who share any, or those of each group for themselves."""
    shares = {g: any(part_of(name) == "params" for name in algorithm.offered(tree.spec)) for g, tree in first.items()}
    means: dict[str, list[str]] = defaultdict(list)
    for name, group in groups.items():
        if shares[group]:
            means[group if getattr(algorithm, "averages_within_groups", False) else ""].append(name)
    return list(means.values())


def _preprocessing_notes(
    algorithm: Algorithm, raws: Mapping[str, Raw], prepared: Mapping[str, Prepared]
) -> tuple[str, ...]:
    """A sentence where parameters of these clients are averaged although their inputs mean different things."""
    kinds = {name: made.preprocess for name, made in prepared.items()}
    columns = {name: _columns_of(raw) for name, raw in raws.items()}
    features = {name: _features_of(made) for name, made in prepared.items()}
    said = _differing_columns(columns)
    if len(set(kinds.values())) > 1:
        said.append(f"that preprocess differently ({_by_value(kinds)})")
    elif not said:  # other columns or another preprocessing make other features: they are said already
        said = _differing_features({name: found for name, found in features.items() if found})
    end = "their inputs mean different things. Share an equal preprocessing, or use FedMD without shared="
    return tuple(f"{algorithm.name} averages parameters of clients {what}; {end}" for what in said)


def _alike(problem: Problem) -> Iterator[str]:
    """A sentence for classes that differ in spelling alone: most likely they are one."""
    spelled: dict[str, list[str]] = defaultdict(list)
    for name in problem.classes or ():
        spelled["".join(name.split()).casefold()].append(name)
    for names in spelled.values():
        if len(names) > 1:
            yield f"classes {_few(names)} differ in case or spaces alone and count as {len(names)} classes"


def _idle_public(algorithm: Algorithm, parts: Mapping[str, Parts]) -> Iterator[str]:
    """A sentence where clients give up rows that nobody asks for."""
    aside = {name: len(part.public) for name, part in parts.items() if len(part.public)}
    if aside and not any("public" in words for words in algorithm.needs.any_of):
        total = sum(aside.values())
        yield f"{total} rows that {_few(list(aside))} set aside as public train nobody: {algorithm.name} asks for none"


def _unfit_starts(clients: Mapping[str, Client], sites: Mapping[str, Site]) -> Iterator[str]:
    """A sentence for each client that leaves entries of a tree, given as ``start=``, out."""
    for name, client in clients.items():
        taken = sites[name].begins.trees.get("own", Tree())
        if isinstance(client.start, Tree) and (left := [entry for entry in client.start if entry not in taken]):
            yield f"{name}: {_few(left)} of start= are not in its model with that shape and were left out"


def with_replaced_starts(population: Population, algorithm: Algorithm, sent: Mapping[str, Message]) -> Population:
    """A note for each client whose ``start=`` gives way to the server's values; `sent` is what it gets in round 1."""
    replaced, notes = [], []
    for name, message in sent.items():
        site = population.sites[name]
        if not (own := site.begins.trees.get("own", Tree())):
            continue
        begun: dict[str, Array] = {}
        for tree in algorithm.start(message, site.begins):
            begun |= tree
        lost = [
            entry
            for entry in own
            if not np.array_equal(begun[entry], own[entry])  # and not a mixture, as of APFL
            and any(entry in tree and np.array_equal(begun[entry], tree[entry]) for tree in message.trees.values())
        ]
        if lost:
            replaced.append(name)
            kept = ", and freeze= keeps that" * any(site.frozen and is_under(entry, site.frozen) for entry in lost)
            instead = f"; to start everybody from it give {algorithm.name}(initial=...)"
            notes.append(
                f"{name}: the shared part of start= is replaced by the server's{kept}"
                + instead * hasattr(algorithm, "initial")
            )
    return replace(population, replaced=tuple(replaced), notes=(*population.notes, *notes))


def with_used_start(population: Population, algorithm: Algorithm, state: State) -> Population:
    """Of a given start only what is in the server's first state; what becomes of the rest is said in a note."""
    if not population.given:
        return population
    tree = next(iter(population.given.values()))
    used, notes = used_start(algorithm, tree, state, population.first, population.given)
    given = {group: tree.only(used) for group in population.given}
    return replace(population, given=given, notes=(*population.notes, *notes))


def used_start(
    algorithm: Algorithm, given: Tree, state: State, groups: Iterable[str], fits: Collection[str]
) -> tuple[list[str], list[str]]:
    """Names of what a run starts from, of ``model=`` or ``initial=``, and a sentence for each part of it that it does not.

    A client's private part starts at the client, which over a network nobody else can reach.
    """
    used = [name for name in given if any(_has(tree, name, given) for tree in state.trees.values())]
    word, notes = "initial=" if getattr(algorithm, "initial", None) is not None else "model=", []
    if idle := [name for name in given if name not in used and part_of(name) != "buffers"]:
        notes.append(
            f"{_few(idle)} of {word} are not shared by {algorithm.name} and were left out: each client starts with its own; "
            "give them with pf.Client(start=)"
        )
    if others := [group for group in groups if group not in fits]:
        notes.append(f"{word} fits {_few(list(fits))}; {_few(others)} starts as usual")
    return used, notes


def _has(found: Tree, name: str, tree: Tree) -> bool:
    return name in found and np.array_equal(found[name], tree[name])


def _by_value(kinds: Mapping[str, str]) -> str:
    names = defaultdict(list)
    for name, kind in kinds.items():
        names[kind].append(name)
    return "; ".join(f"{', '.join(those)}: {kind}" for kind, those in names.items())


def _columns_of(raw: Raw) -> tuple[str, ...]:
    """The columns of a client's DataFrames, whatever their order; () for arrays, whose columns have no names."""
    return tuple(sorted(f"{c}" for value in raw.inputs.values() if is_frame(value) for c in value.columns))


def _features_of(made: Prepared) -> tuple[str, ...]:
    """The names of what a client's fitted transformers give, in order; () where one of them does not tell."""
    found: list[str] = []
    for key, step in made.fitted.items():
        try:
            found += [f"{key}/{name}" for name in step.get_feature_names_out()]
        except (AttributeError, ValueError, TypeError):  # no transformer, or one that does not know
            return ()
    return tuple(found)


def _differing_columns(columns: Mapping[str, tuple[str, ...]]) -> list[str]:
    known = {name: set(found) for name, found in columns.items() if found}
    if len({frozenset(found) for found in known.values()}) < 2:
        return []
    first, model = next(iter(known.items()))
    return ["with other columns (" + "; ".join(_against(known, first, model)) + ")"]


def _differing_features(features: Mapping[str, tuple[str, ...]]) -> list[str]:
    if len(set(features.values())) < 2:
        return []
    first, model = next(iter(features.items()))
    sets = {name: set(found) for name, found in features.items()}
    said = [*_against(sets, first, set(model))]
    said += [f"{n}: another order than {first}" for n, f in features.items() if f != model and sets[n] == set(model)]
    return ["whose equal preprocessing made other features of their own rows (" + "; ".join(said) + ")"]


def _against(sets: Mapping[str, set[str]], first: str, model: set[str]) -> Iterator[str]:
    """How each client's names differ from those of the first: "south has no 'age', and 'weight' besides"."""
    for name, found in sets.items():
        if found != model:
            lacks, more = (_few(sorted(names)) for names in (model - found, found - model))
            said = [f"has no {lacks}"] * bool(lacks) + [f"has {more} besides"] * bool(more)
            yield f"{name}, beside {first}, {' and '.join(said)}"


def _few(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:4])
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more"


def with_everything(client: Client, raw: Raw, parts: Parts) -> Client:
    """The client as it is when it does not join: the rows that it set aside are its own again, with their labels."""
    return replace(client, data=raw, target=None, groups=None, time=None, split=parts.with_public())
