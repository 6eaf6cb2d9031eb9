"""What came of a run: metrics of every client, its models, a table, a page, and files that hold no code."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyfed.core import metrics as scores
from polyfed.core.algorithm import Algorithm, Env, Task
from polyfed.core.coordinator import Federation
from polyfed.core.errors import ClientError, UsageError
from polyfed.core.history import RoundLog
from polyfed.core.message import Memory, Message, State
from polyfed.core.protocols import Site
from polyfed.core.rows import Problem
from polyfed.core.tree import Tree
from polyfed.core.work import personal
from polyfed.run.client import Population, first_env
from polyfed.run.driver import Driver
from polyfed.run.text import aligned

if TYPE_CHECKING:
    from polyfed.run.ensemble import Ensemble, Weights
    from polyfed.run.student import Standings

Metrics = Mapping[str, Mapping[str, float]]


class Models(Mapping[str, Any]):
    """Each client's model as its framework's own object, made when it is asked for."""

    def __init__(self, result: Result) -> None:
        self._result = result
        self._made: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._made:
            result = self._result
            site, state = result.site(name), result.state_of(name)
            self._made[name] = site.model.export(state, site.train, first_env(site, result.seed))
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._result.population.sites)

    def __len__(self) -> int:
        return len(self._result.population.sites)


@dataclass(frozen=True, eq=False, repr=False)
class Result:
    """What came of a run.

    Attributes:
        state: the algorithm's state that the run ended with.
        memories: client -> what it keeps (personal layers, whole private models, ...).
        history: round by round, validation rows only.
        test: client -> metrics of its own model on its test rows, read once.
        baselines: "alone", "pooled" -> client -> metrics on the same test rows.
        reason: why the run ended, in words; `unmet` says what was asked for and not reached.
        errors: client -> what its own code raised, the newest.
        version: how many rounds the state has seen; fewer than `history` after a roll-back.
        notes: sentences for the user.
        interrupted: whether Ctrl-C ended it: this is the result so far, and the test rows were not read.
        alone: the run behind the baseline "alone"; kept only where a student is set against what each reaches alone.
    """

    algorithm: Algorithm
    population: Population = field(repr=False)
    federation: Federation = field(repr=False)
    state: State = field(repr=False)
    memories: Mapping[str, Memory] = field(repr=False)
    history: Sequence[RoundLog] = field(repr=False)
    test: Metrics
    baselines: Mapping[str, Metrics]
    reason: str
    version: int
    seconds: float
    errors: Mapping[str, ClientError] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    interrupted: bool = False
    alone: Result | None = field(default=None, repr=False)

    @classmethod
    def of(
        cls,
        algorithm: Algorithm,
        population: Population,
        driver: Driver,
        baselines: Mapping[str, Metrics],
        *,
        notes: Sequence[str] = (),
        interrupted: bool = False,
        alone: Result | None = None,
    ) -> Result:
        coordinator = driver.coordinator
        history = tuple(coordinator.history)
        test = {
            client: {name: value for name, value in numbers.items() if name != "num_examples"}
            for client, numbers in coordinator.tested.items()
            if numbers.get("num_examples")
        }
        return cls(
            algorithm=algorithm,
            population=population,
            federation=coordinator.federation,
            state=coordinator.final,
            memories={name: memory.current for name, memory in driver.memories.items()},
            history=history,
            test=test,
            baselines=dict(baselines),
            reason="still running" if driver.finish is None else driver.finish.reason,
            version=coordinator.state.version,
            seconds=driver.now,
            errors=dict(driver.errors),
            notes=(*population.notes, *notes),
            interrupted=interrupted,
            alone=alone,
        )

    # ------------------------------------------------------------------------------------------ models

    @property
    def seed(self) -> int:
        return self.federation.rules.seed

    def starts(self, name: str) -> tuple[Tree, ...]:
        """The trees that, laid over a client's first state, make its model, personalised as for its last evaluation."""
        site, version = self.site(name), self.version
        message = self.algorithm.broadcast(self.state, name, self._server_env(site))
        env = site.env(self.seed, Task("evaluate", name, version, version, number=version))
        return personal(self.algorithm, message, self.memories.get(name, Message()), site, env)

    def site(self, name: str) -> Site:
        """A client as it was prepared; raises `UsageError` for a name that is not there."""
        if name not in self.population.sites:
            raise UsageError(f"there is no client {name!r}; there are {', '.join(self.population.sites)}")
        return self.population.sites[name]

    def _server_env(self, site: Site) -> Env:
        return self.federation.env(self.version, len(self.population.sites), site.name)

    def state_of(self, name: str) -> Tree:
        """The whole state of a client's model: what it keeps over what is shared over its first state."""
        site = self.site(name)
        state = site.model.first(site.train, first_env(site, self.seed))
        for tree in self.starts(name):
            state = state.overlay(tree)
        return state

    @cached_property
    def models(self) -> Models:
        """Client -> an ordinary torch, Keras or scikit-learn object that predicts by itself."""
        return Models(self)

    @cached_property
    def model(self) -> Any:
        """The shared model as its framework's own object: the server's state over the first client's start.

        Raises:
            UsageError: the algorithm shares no parameters, or only a part of a model.
        """
        name, site = next(iter(self.population.sites.items()))
        message = self.algorithm.broadcast(self.state, name, self._server_env(site))
        shared = self.algorithm.start(message, Message())
        covered = {entry for tree in shared for entry in tree}
        if not covered:
            raise UsageError(
                f"{self.algorithm.name} has no whole model that all share (each client keeps its own); "
                f"take one client's: result.models[{name!r}]"
            )
        first = site.model.first(site.train, first_env(site, self.seed))
        if missing := [entry for entry in first.part("params") if entry not in covered]:
            raise UsageError(
                f"{self.algorithm.name} has no whole model that all share ({missing[0]} stays with each client); "
                f"take one client's: result.models[{name!r}]"
            )
        for tree in shared:
            first = first.overlay(tree)
        return site.model.export(first, site.train, first_env(site, self.seed))

    @cached_property
    def student(self) -> Any:
        """The model that the server taught (`Distill`), as its framework's own object that predicts by itself.

        It takes rows as the algorithm's ``preprocess=`` makes them of raw ones; without one, raw rows. To ask it with raw
        rows always: ``result.ensemble("student").predict(x)``.

        Raises:
            UsageError: the algorithm teaches no student.
        """
        from polyfed.run.student import student_of  # only where a student is asked for

        return student_of(self.algorithm, self.federation, self.state)

    def ensemble(self, members: Sequence[str] | str | None = None, *, weights: Weights = "uniform") -> Ensemble:
        """The participants as one: a joint opinion on raw rows, with each participant's vote.

        Args:
            members: names of clients; by default all but those of `untrained`. "student" is the model that the server
                taught, unless a client is called so: ``result.ensemble("student").predict(x)`` asks it with raw rows,
                through the algorithm's ``preprocess=``.
            weights: "uniform", or "num_examples": by training rows.

        >>> # together = result.ensemble()
        >>> # together.predict(x), together.predict_proba(x)   # what they say together
        >>> # together.votes(x)["north"]                        # what one of them says
        >>> # print(together.explain(x[:1]))                    # one case, as a table
        """
        from polyfed.run.ensemble import ensemble_of  # only where one is asked for

        return ensemble_of(self, members, weights)

    def comparison(self, metric: str | None = None) -> Standings:
        """Each participant on its own test rows and on everyone's, alone and after the run; their ensemble; the student.

        Only a simulation can do this: it has everybody's rows. Print it, or read its `rows`.

        Args:
            metric: that of `table` by default.

        Raises:
            UsageError: the run did not read its test rows, or the metric is unknown.
        """
        metric = metric or self.metric
        if metric not in self._compared:
            from polyfed.run.student import standings_of  # only where a comparison is asked for

            self._compared[metric] = standings_of(self, metric)
        return self._compared[metric]

    @cached_property
    def _compared(self) -> dict[str, Standings]:
        return {}

    @property
    def has_student(self) -> bool:
        """Whether `student` is there."""
        return "student" in self.federation.trainers and "student" in self.state.trees

    @cached_property
    def only_student_learns(self) -> bool:
        """Whether there is a student, and the server sends its clients nothing: each of them learns by itself."""
        if not self.has_student:
            return False
        sites = self.population.sites.items()
        sent = (self.algorithm.broadcast(self.state, name, self._server_env(site)) for name, site in sites)
        return not any(message.trees for message in sent)

    @cached_property
    def untrained(self) -> tuple[str, ...]:
        """Clients that were asked to train, and nothing of it ever counted: each time they failed or were refused."""
        counted = {name for log in self.history for name in log.accepted if name not in log.left_out}
        return tuple(name for name in self.population.sites if name in self.left_out and name not in counted)

    # ------------------------------------------------------------------------------------------ numbers

    @property
    def metric(self) -> str:
        """The metric that tables show unless told otherwise."""
        return metric_of(self.population.problem)

    @property
    def unmet(self) -> str:
        """What the stopping rules asked for and the run did not reach; "" if nothing."""
        return self.federation.stop.unmet(self.history)

    @property
    def rolled_back_to(self) -> int | None:
        """The round whose state this is, where a stopping rule went back to it; None without a roll-back."""
        return self.version if self.history and self.version < len(self.history) else None

    @property
    def left_out(self) -> dict[str, dict[int, str]]:
        """Client -> round -> why its update did not count: it failed, was refused, or came too late."""
        found: dict[str, dict[int, str]] = {}
        for log in self.history:
            for name, reason in log.left_out.items():
                found.setdefault(name, {})[log.round_num] = reason
        return found

    @property
    def is_complete(self) -> bool:
        """Whether everybody took part in every round and nothing that was asked for is missing."""
        return not (self.left_out or self.errors or self.unmet or self.interrupted)

    def _said(self) -> list[str]:
        """What a reader of the table has to know besides its numbers, a sentence each."""
        said = [f"not reached: {self.unmet}"] if self.unmet else []
        if self.rolled_back_to is not None:
            said.append(f"the models are those of round {self.rolled_back_to}")
        for name, rounds in self.left_out.items():
            last = max(rounds)
            said.append(f"{name} left out of {_rounds(rounds, len(self.history))}: {rounds[last]}")
        failed = [error for name, error in self.errors.items() if name not in self.left_out]
        said += [f"{error.client} failed: {error.kind}: {error.message}" for error in failed]
        return said + [f"{name} {told}" for name, told in self.presence.items()] + list(self.notes)

    @property
    def presence(self) -> dict[str, str]:
        """Client -> when it came and went, in words that follow its name; without an entry for one that was always there."""
        found = {}
        last = len(self.history)
        for name, client in self.population.clients.items():
            told = []
            if client.joins_at > max(last, 1):
                told.append(f"was to join at round {client.joins_at}, after the run's last")
            elif client.joins_at > 1:
                told.append(f"joined at round {client.joins_at}")
            away = {number: "" for number in client.away if client.joins_at < number <= last}
            told += [f"was away in {_rounds(away, last)}"] if away else []
            if told:
                found[name] = " and ".join(told)
        return found

    @property
    def bytes_up(self) -> int:
        return sum(log.bytes_up for log in self.history)

    @property
    def bytes_down(self) -> int:
        return sum(log.bytes_down for log in self.history)

    def rows(self, metric: str | None = None) -> list[dict[str, Any]]:
        """One row a client: name, model, rows, "alone", "pooled", "federated", "difference" (federated minus alone)."""
        metric = metric or self.metric
        found = []
        for name, site in self.population.sites.items():
            row: dict[str, Any] = {"client": name, "model": site.model.kind, "rows": len(site.train)}
            for baseline, values in self.baselines.items():
                row[baseline] = values.get(name, {}).get(metric)
            row["federated"] = self.test.get(name, {}).get(metric)
            if not self.test:
                row["validation"] = self._validation(name, metric)
            row["test rows"] = len(site.test) if site.test is not None else 0
            if row.get("alone") is not None and row["federated"] is not None:
                row["difference"] = row["federated"] - row["alone"]
            found.append(row)
        return found

    def _validation(self, name: str, metric: str) -> float | None:
        """A client's newest value on its validation rows, up to the version that the run ended with."""
        seen = [log.metrics[name] for log in self.history[: self.version] if name in log.metrics]
        return seen[-1].get(metric) if seen else None

    def table(self, metric: str | None = None) -> str:
        """Each client: alone, federated, difference; then their mean. For a metric on the test rows."""
        metric = metric or self.metric
        rows = self.rows(metric)
        known = ("alone", "pooled", "federated", "difference", "validation")
        columns = [c for c in known if any(row.get(c) is not None for row in rows)]
        names = ["client", "model", "rows", *columns]
        shown = _shown(rows)
        lines = [[_cell(row.get(name), name) for name in names] for row in shown]
        mean = {name: _mean([row.get(name) for row in rows]) for name in columns}
        if len(rows) > 1:
            lines.append(["mean", "", "", *(_cell(mean[name], name) for name in columns)])
        heads = [metric if name == "client" else name for name in names]
        better = "lower is better" if scores.is_lower_better(metric) else "higher is better"
        on = "test" if self.test else "validation"
        ran = f"{len(self.history)} round{'s' * (len(self.history) != 1)}"
        notes = [f"{metric} on each client's {on} rows ({better}); {ran}; {self.reason}"]
        if self.only_student_learns:
            notes.append("what the run made is the student: the clients learn nothing from one another here")
        if len(shown) < len(rows):
            ends = f"the {SHOWN_OF_MANY} lowest and the {SHOWN_OF_MANY} highest"
            notes.insert(0, f"{ends} of {len(rows)} clients; {len(rows) - len(shown)} are left out of this print")
        return "\n".join(
            [*aligned([heads, [], *lines]), "", *notes, *self._undefined(metric), *self._of_student(), *self._said()]
        )

    def _of_student(self) -> list[str]:
        """What the student reaches beside its teachers, where there is one and test rows were read."""
        if not (self.has_student and self.test):
            return []
        if not (said := self.comparison().sentence()):
            return []
        return [said, "result.comparison() tells it for each participant"]

    def _undefined(self, metric: str) -> list[str]:
        """Which clients' test rows leave the metric without a value, and over how many the mean is."""
        without = [name for name, values in self.test.items() if values and metric not in values]
        if not without or len(without) == len(self.test):
            return []
        why = ", its test rows hold one class" if metric == "auc" and len(without) == 1 else ""
        over = f"the mean is over {len(self.test) - len(without)} of {len(self.test)} sites"
        return [f"{', '.join(without[:SHOWN_OF_MANY])}: {metric} is undefined{why}; {over}"]

    def __repr__(self) -> str:
        rounds = f"{len(self.history)} round{'s' * (len(self.history) != 1)}"
        clients = f"{len(self.population.sites)} client{'s' * (len(self.population.sites) != 1)}"
        return f"<Result of {self.algorithm.name}: {rounds}, {clients}>"

    def to_dict(self) -> dict[str, Any]:
        """Everything a machine wants: settings, versions, metrics, history; no arrays."""
        from dataclasses import asdict  # only here

        from polyfed.core.manifest import manifest_of  # only here

        return {
            "algorithm": manifest_of(self.algorithm),
            "seed": self.seed,
            "reason": self.reason,
            "unmet": self.unmet,
            "rounds": len(self.history),
            "version": self.version,
            "rolled_back_to": self.rolled_back_to,
            "metric": self.metric,
            "clients": {
                name: {
                    "model": site.model.kind,
                    "settings": dict(site.model.settings),
                    "preprocess": self.population.prepared[name].preprocess,
                    "rows": {
                        "train": len(site.train),
                        "validation": 0 if site.validation is None else len(site.validation),
                        "test": 0 if site.test is None else len(site.test),
                        "public": len(self.population.parts[name].public),
                    },
                    "test": dict(self.test.get(name, {})),
                    **{b: dict(values.get(name, {})) for b, values in self.baselines.items()},
                }
                for name, site in self.population.sites.items()
            },
            "history": [asdict(log) for log in self.history],
            "bytes_up": self.bytes_up,
            "bytes_down": self.bytes_down,
            "seconds": self.seconds,
            "errors": {name: str(error) for name, error in self.errors.items()},
            "left_out": {name: {str(k): v for k, v in rounds.items()} for name, rounds in self.left_out.items()},
            "interrupted": self.interrupted,
            "presence": self.presence,
            "comparison": self.comparison().rows() if self.has_student and self.test else [],
            "complete": self.is_complete,
            "notes": list(self.notes),
            "versions": versions(),
        }

    def report(self, path: str | Path, *, title: str = "") -> Path:
        """Writes one self-contained page with plots; needs the extra "report"."""
        from polyfed.run.report import write  # jinja2 only when a page is asked for

        return write(self, Path(path), title=title)

    def save(self, folder: str | Path) -> Path:
        """Writes the state, the memories, the models and the numbers as files without code; `pf.load` reads them."""
        from polyfed.run.files import save  # frameworks are imported where a model is written

        return save(self, Path(folder))


#: Above so many clients a table shows the ends only: so many of the worst, and of the best.
MANY, SHOWN_OF_MANY = 30, 10


def _shown(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """All rows of few clients; of many those that gain least and most (or have the least and most), in their order."""
    if len(rows) <= MANY:
        return list(rows)
    key = next(
        (k for k in ("difference", "federated", "validation") if any(r.get(k) is not None for r in rows)), "rows"
    )
    order = sorted((i for i, row in enumerate(rows) if row.get(key) is not None), key=lambda i: rows[i][key])
    return [rows[i] for i in sorted({*order[:SHOWN_OF_MANY], *order[-SHOWN_OF_MANY:]})]


def metric_of(problem: Problem) -> str:
    """AUC for two classes, accuracy for more, mean absolute error for values."""
    if not problem.is_classification:
        return "mae"
    return "auc" if problem.outputs == 2 else "accuracy"


def _rounds(rounds: Mapping[int, str], of: int) -> str:
    """Which rounds, in words: "round 3", "rounds 1, 2 and 5", "7 of 20 rounds".

    >>> _rounds({1: "", 2: "", 5: ""}, 9), _rounds({3: ""}, 9)
    ('rounds 1, 2 and 5', 'round 3')
    """
    numbers = [str(number) for number in sorted(rounds)]
    if len(numbers) > 3:
        return f"{len(numbers)} of {of} rounds"
    return f"round {numbers[0]}" if len(numbers) == 1 else f"rounds {', '.join(numbers[:-1])} and {numbers[-1]}"


def versions() -> dict[str, str]:
    """Versions of everything that decides bits."""
    names = "polyfed numpy torch keras scikit-learn tensorflow-cpu tensorflow jax jaxlib lightgbm xgboost-cpu xgboost"
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for name in names.split():
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _cell(value: Any, column: str) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:+.3f}" if column == "difference" else f"{value:.3f}"
    return str(value)
