"""The contract of an algorithm and of a robust rule, as checks that anybody can run over their own.

`check_algorithm` runs every check of `ALGORITHM_CHECKS`; each states one promise, returns nothing, and raises
`AssertionError` with a sentence when the promise is broken.

    def test_my_algorithm():
        check_algorithm(Mine(strength=0.5), make_sites)      # make_sites() -> {"north": Site(...), ...}

`play` is the plainest synchronous run there is, a loop without an engine: an oracle for small tests.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from polyfed.core import wire
from polyfed.core.aggregate import DEFAULT_POLICY, Fold, validate, weights_of
from polyfed.core.algorithm import Algorithm, Env, Fit, Predict, Task
from polyfed.core.errors import RefusedError, SpecError
from polyfed.core.manifest import build, manifest_of
from polyfed.core.message import Memory, Message, State
from polyfed.core.protocols import Model, Site
from polyfed.core.tree import Array, Tree
from polyfed.core.work import drive

Sites = Callable[[], Mapping[str, Site]]


@dataclass(frozen=True)
class Played:
    """Where a run of `play` stands after a round.

    Attributes:
        state: the server's.
        memories: client -> what it remembers; without an entry before its first accepted update.
        round_num: rounds done.
        uploads: client -> its accepted update of the last round, as it was folded.
    """

    state: State
    memories: Mapping[str, Memory] = field(default_factory=dict)
    round_num: int = 0
    uploads: Mapping[str, Message] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Digest of state and memories: equal for equal bits."""
        parts = [self.state.digest, *(f"{name} {memory.digest}" for name, memory in sorted(self.memories.items()))]
        return "\n".join(parts)


def play(
    algorithm: Algorithm,
    sites: Mapping[str, Site],
    *,
    rounds: int,
    seed: int = 0,
    cohort: Callable[[int], Iterable[str]] | None = None,
    tamper: Callable[[str, Message], Message] | None = None,
    after: Played | None = None,
    student: Model | None = None,
) -> Played:
    """Runs rounds one after another, a client at a time.

    Args:
        algorithm: what is run.
        sites: all clients, in the order in which they are folded.
        rounds: how many more.
        seed: the run's.
        cohort: round number -> names that take part; everybody by default.
        tamper: (client, upload) -> what arrives in its place; a refused upload leaves that client's memory as it was.
        after: where to go on from.
        student: what the server trains, for an algorithm that has one.
    """
    played = after or Played(algorithm.init(_needed(algorithm, server_env(sites, seed, student=student))))
    for round_num in range(played.round_num + 1, played.round_num + rounds + 1):
        names = list(sites if cohort is None else cohort(round_num))
        env = _needed(algorithm, server_env(sites, seed, round_num, student))
        played = _round(algorithm, sites, replace(played, round_num=round_num), env, names, tamper)
    return played


def server_env(sites: Mapping[str, Site], seed: int, round_num: int = 0, student: Model | None = None) -> Env:
    """What a run hands to the server's hooks: the first state of each group is that of its first client.

    Its trainers are a model of each group and the student, over the first client's public rows.
    """
    first: dict[str, Tree] = {}
    for position, site in enumerate(sites.values()):
        if site.group not in first and "params" in site.model.offers:
            first[site.group] = site.model.first(site.train, client_env(site, seed, 1, position))
    one = next(iter(sites.values()))
    return Env(
        seed=seed,
        problem=one.problem,
        round_num=round_num,
        number=round_num,
        population=len(sites),
        first=first,
        trainers=_trainers(sites, one, student),
    )


def _needed(algorithm: Algorithm, env: Env) -> Env:
    """The env with no more of the first states than a run hands to the server."""
    first = {group: tree.only(algorithm.offered(tree.spec)) for group, tree in env.first.items()}
    return replace(env, first=first, specs={group: tree.spec for group, tree in env.first.items()})


def _trainers(sites: Mapping[str, Site], one: Site, student: Model | None) -> dict[str, Site]:
    if one.public is None:
        return {}
    models: dict[str, Model] = {} if student is None else {"student": student}
    for site in sites.values():
        models.setdefault(site.group, site.model)
    rows = one.public.unlabelled()
    return {name: Site(name, model, one.problem, rows, public=rows, group=name) for name, model in models.items()}


def addressed(env: Env, site: Site) -> Env:
    """The server's env where it makes or checks a message of one client."""
    return replace(env, client=site.name, group=site.group, frozen=site.frozen)


def client_env(site: Site, seed: int, round_num: int, position: int = 0) -> Env:
    """A client's env of one round in which everybody's tasks are counted by rounds."""
    return site.env(seed, Task("train", site.name, round_num, round_num - 1, position=position, number=round_num - 1))


def _round(
    algorithm: Algorithm,
    sites: Mapping[str, Site],
    played: Played,
    env: Env,
    names: list[str],
    tamper: Callable[[str, Message], Message] | None,
) -> Played:
    fold, memories, uploads = Fold(), dict(played.memories), {}
    for position, name in enumerate(names):
        to = addressed(env, sites[name])
        sent, upload, memory = work(algorithm, sites[name], played, env, position)
        try:
            update = validate(tamper(name, upload) if tamper else upload, algorithm.expects(sent, to), name)
            algorithm.check(sent, update, to, DEFAULT_POLICY)
            received = algorithm.receive(sent, update, to)
            weights = weights_of(received, _weigh(algorithm, received), name)
        except RefusedError:
            continue
        fold.add(position, received, weights.__getitem__)
        memories[name], uploads[name] = memory, received
    state = algorithm.server_update(played.state, fold.finish(), env)
    return Played(state, memories, played.round_num, uploads)


def work(
    algorithm: Algorithm, site: Site, played: Played, env: Env, position: int = 0
) -> tuple[Message, Message, Memory]:
    """One client's round: what it is sent, its upload, its next memory."""
    sent = algorithm.broadcast(played.state, site.name, addressed(env, site))
    memory = played.memories.get(site.name, Message())
    own = client_env(site, env.seed, env.round_num, position)
    upload, after = drive(algorithm.client_update(sent, memory, own), site, own)
    return sent, upload, after


def _weigh(algorithm: Algorithm, message: Message) -> Callable[[str], float]:
    return lambda tree: algorithm.weight(message.numbers, 0, tree)


# ---------------------------------------------------------------- promises of an algorithm


@dataclass(frozen=True, eq=False)
class Case:
    """What every check is given.

    Attributes:
        algorithm: under test.
        make: a factory of equal, fresh sites; at least two.
        rounds: how many rounds a check plays.
        seed: the runs'.
        registry: name -> class, for the manifest.
        student: what the server trains, for an algorithm that has one.
    """

    algorithm: Algorithm
    make: Sites
    rounds: int = 3
    seed: int = 0
    registry: Mapping[str, type[Algorithm]] = field(default_factory=dict)
    student: Model | None = None

    def play(self, rounds: int | None = None, *, sites: Mapping[str, Site] | None = None, **more: Any) -> Played:
        rounds = self.rounds if rounds is None else rounds
        more = {"seed": self.seed, "student": self.student} | more
        return play(more.pop("algorithm", self.algorithm), sites or self.make(), rounds=rounds, **more)

    def env(self, round_num: int = 1, site: Site | None = None) -> Env:
        """The server's env; `site`: whose message is made or checked."""
        env = _needed(self.algorithm, server_env(self.make(), self.seed, round_num, self.student))
        return env if site is None else addressed(env, site)


Check = Callable[[Case], None]


def check_algorithm(
    algorithm: Algorithm, make: Sites, *, rounds: int = 3, seed: int = 0, student: Model | None = None
) -> None:
    """Runs every check of `ALGORITHM_CHECKS` over an algorithm.

    Args:
        algorithm: to check.
        make: returns equal, fresh sites by name at every call, at least two, whose models meet the algorithm's needs.
        rounds: how many rounds to play, at least 2.
        seed: of the runs.
        student: what the server trains, for an algorithm that has one.

    Raises:
        AssertionError: a promise does not hold; the sentence says which.
    """
    case = Case(algorithm, make, rounds, seed, {algorithm.name: type(algorithm)}, student)
    for check in ALGORITHM_CHECKS.values():
        check(case)


def needs_are_met(case: Case) -> None:
    """The sites of the check offer what the algorithm needs; else the other checks would say nothing."""
    for site in case.make().values():
        missing = case.algorithm.needs.missing(site.offers)
        assert not missing, f"{site.name} ({site.model.kind}) does not offer {', '.join(sorted(missing))}"


def init_is_a_function(case: Case) -> None:
    """The same env gives the same first state."""
    one, two = case.algorithm.init(case.env(0)), case.algorithm.init(case.env(0))
    assert one.digest == two.digest, "init gives another state the second time"


def broadcast_is_a_function(case: Case) -> None:
    """Broadcasting twice gives the same message, and leaves the state as it was."""
    played = case.play(1)
    before = played.state.digest
    for name, site in case.make().items():
        env = case.env(2, site)
        one = case.algorithm.broadcast(played.state, name, env)
        two = case.algorithm.broadcast(played.state, name, env)
        assert one.digest == two.digest, f"broadcast sends {name} another message the second time"
    assert played.state.digest == before, "broadcast changed the state"


def update_is_expected(case: Case) -> None:
    """In every round each upload holds exactly the trees of `expects`, finite, and weighs something."""
    played = case.play(0)
    for round_num in range(1, case.rounds + 1):
        played = replace(played, round_num=round_num)
        for name, site in case.make().items():
            env = case.env(round_num, site)
            sent, upload, _ = work(case.algorithm, site, played, env)
            try:
                update = validate(upload, case.algorithm.expects(sent, env), name)
                case.algorithm.check(sent, update, env, DEFAULT_POLICY)
                received = case.algorithm.receive(sent, update, env)
                weights_of(received, _weigh(case.algorithm, received), name)
            except RefusedError as error:
                raise AssertionError(f"round {round_num}: the algorithm's own upload is refused: {error}") from error
        played = case.play(1, after=replace(played, round_num=round_num - 1))


def update_is_a_function(case: Case) -> None:
    """The same message, memory and env give the same upload and memory, and message and memory stay as they were."""
    played = case.play(1)
    for name, site in case.make().items():
        env = case.env(2, site)
        sent = case.algorithm.broadcast(played.state, name, env)
        memory = played.memories.get(name, Message())
        before = (sent.digest, memory.digest)
        one = work(case.algorithm, case.make()[name], played, env)
        two = work(case.algorithm, case.make()[name], played, env)
        assert (sent.digest, memory.digest) == before, f"client_update of {name} changed its message or memory"
        assert one[1].digest == two[1].digest, f"client_update of {name} gives another upload the second time"
        assert one[2].digest == two[2].digest, f"client_update of {name} gives another memory the second time"


def requests_are_known(case: Case) -> None:
    """A client's generator yields `Fit` and `Predict` requests and nothing else; it ends with (Message, Memory)."""
    name, site = next(iter(case.make().items()))
    env, own = case.env(1, site), client_env(site, case.seed, 1)
    steps = case.algorithm.client_update(case.algorithm.broadcast(case.play(0).state, name, env), Message(), own)
    answer: Any = None
    while True:
        try:
            request = steps.send(answer)
        except StopIteration as end:
            result = end.value
            break
        assert isinstance(request, (Fit, Predict)), f"client_update yields {request!r}, neither Fit nor Predict"
        rows = site.train if request.rows is None else request.rows
        run = site.model.fit if isinstance(request, Fit) else site.model.predict
        answer = run(request, rows, own)  # type: ignore[arg-type]  # the request decides which of both it is
    fits = isinstance(result, tuple) and len(result) == 2 and all(isinstance(part, Message) for part in result)
    assert fits, f"client_update returns {type(result).__name__}, wanted is (Message, Memory)"


def server_update_is_a_function(case: Case) -> None:
    """The same state and uploads give the same next state, and the state handed in stays as it was."""
    played, env = case.play(1), case.env(1)
    before, digests = played.state.digest, []
    for _ in range(2):
        fold = Fold()
        for position, upload in enumerate(played.uploads.values()):
            fold.add(position, upload, _weigh(case.algorithm, upload))
        digests.append(case.algorithm.server_update(played.state, fold.finish(), env).digest)
    assert digests[0] == digests[1], "server_update gives another state the second time"
    assert played.state.digest == before, "server_update changed the state that it was given"


def nobody_changes_nothing(case: Case) -> None:
    """A round without any accepted update leaves the state as it was, before the first and later."""
    for rounds in (0, 1):
        state = case.play(rounds).state
        after = case.algorithm.server_update(state, Fold().finish(), case.env(rounds + 1))
        assert after.digest == state.digest, f"a round without updates changed the state after {rounds} rounds"


def one_client_is_enough(case: Case) -> None:
    """A federation of one, and a round with one client, run and stay finite."""
    name, site = next(iter(case.make().items()))
    alone = case.play(sites={name: site})
    partly = case.play(cohort=lambda _: [name])
    for played in (alone, partly):
        assert all(tree.is_finite() for tree in played.state.trees.values()), "one client alone makes values not finite"


def refused_is_absent(case: Case) -> None:
    """A client whose uploads are refused leaves state and memories as if it had not been asked."""
    *names, last = case.make()

    def spoil(name: str, upload: Message) -> Message:
        return upload.put(numbers={"num_examples": float("nan")}) if name == last else upload

    refused, absent = case.play(tamper=spoil), case.play(cohort=lambda _: names)
    assert refused.digest == absent.digest, f"a refused update of {last} left a trace in the state or in its memory"


def newcomers_are_served(case: Case) -> None:
    """A client that joins late, with an empty memory, takes part like any other."""
    *names, last = case.make()
    played = case.play(cohort=lambda round_num: names if round_num < case.rounds else [*names, last])
    assert last in played.uploads, f"{last} joined in round {case.rounds} and its update was refused"


def everything_is_data(case: Case) -> None:
    """State, messages and memories survive the wire format bit for bit."""
    played, env = case.play(), case.env(case.rounds + 1)
    sent = {
        f"broadcast to {n}": case.algorithm.broadcast(played.state, n, addressed(env, site))
        for n, site in case.make().items()
    }
    memories = {f"memory of {name}": memory for name, memory in played.memories.items()}
    uploads = {f"upload of {n}": work(case.algorithm, site, played, env)[1] for n, site in case.make().items()}
    for what, message in ({"state": played.state} | sent | memories | uploads).items():
        assert wire.decode(wire.to_bytes(message)).digest == message.digest, f"the {what} is another after the wire"


def resumes_from_data(case: Case) -> None:
    """State and memories are all there is: a run that goes on from their bytes ends with the same bits."""
    half = case.play(case.rounds - 1)
    state = wire.decode(wire.to_bytes(half.state))
    memories = {name: wire.decode(wire.to_bytes(memory)) for name, memory in half.memories.items()}
    rebuilt = build(json.loads(json.dumps(manifest_of(case.algorithm))), case.registry)
    resumed = case.play(1, algorithm=rebuilt, after=replace(half, state=state, memories=memories))
    assert resumed.digest == case.play().digest, "a run that goes on from stored bytes ends with other bits"


def manifest_comes_back(case: Case) -> None:
    """What a manifest announces builds an algorithm that announces the same."""
    said = json.loads(json.dumps(manifest_of(case.algorithm)))
    assert manifest_of(build(said, case.registry)) == manifest_of(case.algorithm), (
        "the manifest builds another algorithm"
    )


def start_makes_a_model(case: Case) -> None:
    """Before, during and after a run `start` gives trees that make a client's model, newcomers included."""
    for rounds in (0, 1, case.rounds):
        played = case.play(rounds)
        for name, site in case.make().items():
            sent = case.algorithm.broadcast(played.state, name, case.env(rounds + 1, site))
            for memory in (Message(), played.memories.get(name, Message())):
                _check_start(case.algorithm.start(sent, memory), site, client_env(site, case.seed, rounds + 1))


def _check_start(start: tuple[Tree, ...], site: Site, env: Env) -> None:
    try:
        outputs = site.model.predict(Predict(start=start), site.train, env)
    except SpecError as error:
        raise AssertionError(f"what start gives does not lie over the first state of {site.name}: {error}") from error
    wanted = (len(site.train), site.problem.outputs)
    assert outputs.shape == wanted, f"{site.name} predicts {outputs.shape} from what start gives, wanted is {wanted}"
    assert np.isfinite(outputs).all(), f"{site.name} predicts values that are not finite from what start gives"


def personalise_is_a_function(case: Case) -> None:
    """`personalise` gives trees that make a model, the same ones the second time, and leaves its arguments alone."""
    for rounds in (0, case.rounds):
        played = case.play(rounds)
        for name, site in case.make().items():
            sent = case.algorithm.broadcast(played.state, name, case.env(rounds + 1, site))
            memory, env = played.memories.get(name, Message()), client_env(site, case.seed, rounds + 1)
            before = (sent.digest, memory.digest)
            one, two = (drive(case.algorithm.personalise(sent, memory, env), site, env) for _ in range(2))
            assert (sent.digest, memory.digest) == before, f"personalise of {name} changed its message or memory"
            assert one == two, f"personalise of {name} gives another model the second time"
            _check_start(one, site, env)


def done_is_a_fact(case: Case) -> None:
    """`done` answers True or False, and the same each time."""
    state = case.play().state
    answers = (case.algorithm.done(state), case.algorithm.done(state))
    assert answers[0] is answers[1], f"done answers {answers}"
    assert isinstance(answers[0], bool), f"done answers {answers[0]!r}, neither True nor False"


ALGORITHM_CHECKS: Mapping[str, Check] = {
    check.__name__: check
    for check in (
        needs_are_met,
        init_is_a_function,
        broadcast_is_a_function,
        update_is_expected,
        update_is_a_function,
        requests_are_known,
        server_update_is_a_function,
        nobody_changes_nothing,
        one_client_is_enough,
        refused_is_absent,
        newcomers_are_served,
        everything_is_data,
        resumes_from_data,
        manifest_comes_back,
        start_makes_a_model,
        personalise_is_a_function,
        done_is_a_fact,
    )
}


# ---------------------------------------------------------------- promises of a robust rule

#: (clients, entries) float32 and (clients,) float64 weights -> (entries,) float32
Rule = Callable[[Array, Array], Array]


def check_aggregator(rule: Rule, *, clients: int = 9, tolerance: float = 1e-5) -> None:
    """Runs every check of a rule that joins updates: any rule, the weighted mean included.

    Args:
        rule: (tile, weights) -> (entries,): tile is (clients, entries) float32, one update a row.
        clients: rows of the tiles that it is tried with; as many as the rule needs.
        tolerance: relative, of the comparisons that are not bitwise.

    Raises:
        AssertionError: a promise does not hold; the sentence says which.
    """
    draw = np.random.Generator(np.random.Philox(key=clients))
    tile = draw.normal(size=(clients, 7)).astype(np.float32)
    weights = draw.uniform(1, 3, clients)
    near = tolerance * float(np.abs(tile).max()) * 10
    kept = (tile.copy(), weights.copy())
    out = rule(tile, weights)
    assert out.shape == (7,), f"the rule returns shape {out.shape}, wanted is {(7,)}"
    assert out.dtype == np.float32, f"the rule returns {out.dtype}, wanted is float32"
    assert np.array_equal(tile, kept[0]), "the rule writes into the updates"
    assert np.array_equal(weights, kept[1]), "the rule writes into the weights"
    assert np.array_equal(out, rule(tile, weights)), "the rule gives another answer the second time"
    same = rule(np.repeat(tile[:1], clients, 0), weights)
    assert np.allclose(same, tile[0], rtol=tolerance, atol=near), "equal updates do not come back as they are"
    order = draw.permutation(clients)
    assert np.allclose(rule(tile[order], weights[order]), out, rtol=tolerance, atol=near), "the order of clients counts"
    shifted = rule(tile + np.float32(2), weights)
    assert np.allclose(shifted, out + 2, rtol=tolerance, atol=3 * near), (
        "updates shifted by 2 do not shift the answer by 2"
    )
    scaled = rule(tile * np.float32(4), weights)
    assert np.allclose(scaled, out * 4, rtol=tolerance, atol=4 * near), "updates times 4 do not make the answer times 4"
    assert np.allclose(rule(tile, weights * 7), out, rtol=tolerance, atol=near), "weights times 7 change the answer"
    inside = (out >= tile.min(0) - near) & (out <= tile.max(0) + near)
    assert inside.all(), "the answer lies outside of all updates"
