"""Which method takes which model, and what it asks for: `pf.algorithms.table()`, and docs/methods.md, made from the code.

A model's column follows from what the method `needs` and what adapters of that kind offer; the other columns are seen by
playing the method on a stand-in model for two rounds. The tests train every yes and provoke the refusal of every no.

    python -m polyfed.algorithms.methods > docs/methods.md
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from polyfed.core.algorithm import Algorithm, Env, Fit, Fitted, Predict
from polyfed.core.checks_algorithm import play
from polyfed.core.errors import SpecError, UsageError
from polyfed.core.protocols import Site
from polyfed.core.rows import Problem, Rows
from polyfed.core.terms import Own
from polyfed.core.tree import Array, Tree

# ------------------------------------------------------------------------------------------ kinds of model


@dataclass(frozen=True)
class Kind:
    """One column: models that offer the same.

    Attributes:
        title: its heading.
        offers: words of `Needs`, as the adapters of this kind state them.
        parts: a prefix that names a part of such a model; "" where it has no parts.
        normalises: whether such a model can have layers that keep statistics.
    """

    title: str
    offers: frozenset[str]
    parts: str = ""
    normalises: bool = False


_NETWORK = frozenset({"params", "predict", "features", "terms", "distill", "part", "sgd"})
#: What adapters of each kind offer; a test holds it against the adapters.
KINDS: Mapping[str, Kind] = {
    "torch": Kind("PyTorch", _NETWORK, "shared", normalises=True),
    "keras": Kind("Keras", _NETWORK, "shared", normalises=True),
    "linear": Kind("scikit-learn: linear, networks", frozenset({"params", "predict", "distill", "iterates"}), "coef"),
    "bayes": Kind("naive Bayes, LDA, least squares", frozenset({"params", "predict", "distill"})),
    "trees": Kind("forests, boosting, any other", frozenset({"predict", "distill"})),
}

# ------------------------------------------------------------------------------------------ one instance of each method

#: Methods that share a part and have no use without one.
PARTIAL = ("FedBABU", "FedPer", "FedRep")
#: Methods that keep the layers with statistics private, and refuse a federation without one.
NORMALISING = ("FedBN",)


def example(
    method: type[Algorithm], *, public: Any = None, student: Any = None, parts: str = "base", **settings: Any
) -> Algorithm:
    """An instance to look at: with public rows, a student and a shared part where the method has a use for them.

    Args:
        method: one of `REGISTRY`.
        public: rows, given to those that need them.
        student: a model, given to those that teach one.
        parts: the prefix that is shared by those that share a part.
        settings: more arguments.
    """
    fields = getattr(method, "__dataclass_fields__", {})
    given = dict(settings)
    if any("public" in words for words in method.needs.any_of):
        given["public"] = public
    if "student" in fields:
        given["student"] = student
    if method.__name__ in PARTIAL:
        given["shared"] = parts
    return method(**given)


def lacks(algorithm: Algorithm, kind: Kind) -> str:
    """What a kind of model lacks for a method, in a word of `Needs` or two; "" where it takes part."""
    if missing := algorithm.needs.missing(kind.offers | {"public", "personal"}):
        return " and ".join(sorted(missing))
    if algorithm.name in PARTIAL and not kind.parts:
        return "parts"
    return "normalisation layers" if algorithm.name in NORMALISING and not kind.normalises else ""


# ------------------------------------------------------------------------------------------ what a method asks for


@dataclass(frozen=True, eq=False)
class Stand:
    """A stand-in model: a base, a head, statistics; a fit moves everything by a little. Remembers what it was asked."""

    base: int = 2
    head: int = 2
    kind: str = "stand-in"
    offers: frozenset[str] = _NETWORK
    settings: Mapping[str, str | float | int | bool] = field(default_factory=dict)
    asked: list[Fit] = field(default_factory=list)

    @property
    def key(self) -> tuple[int, int]:
        return self.base, self.head

    def first(self, rows: Rows, env: Env) -> Tree:
        del rows
        shapes = {"base.w": (2, self.base), "head.w": (self.head, env.problem.outputs)}
        stats = {"stats:base.norm/mean": (2,), "stats:base.norm/variance": (2,), "base.norm.weight": (2,)}
        return Tree({name: np.ones(shape, np.float32) for name, shape in (shapes | stats).items()})

    def fit(self, request: Fit, rows: Rows, env: Env) -> Fitted:
        if env.client:  # not a model of the server's
            self.asked.append(request)
        state = self.first(rows, env)
        for tree in request.start:
            state = state.overlay(tree)
        return Fitted(state.map(lambda a: a + np.float32(0.125)), steps=1, lr=0.1, metrics={"loss": 1.0})

    def predict(self, request: Predict, rows: Rows, env: Env) -> Array:
        return np.zeros((len(rows if request.rows is None else request.rows), env.problem.outputs), np.float32)

    def export(self, state: Tree, rows: Rows, env: Env) -> Tree:
        del rows, env
        return state


@dataclass(frozen=True)
class Facts:
    """What a method asks of a federation.

    Attributes:
        public: whether it needs public rows, which are never labelled.
        labels: whether clients train on labelled rows of their own.
        shapes: "all": averaged models must be equal; "shared part": that part must; "no": any model beside any other.
        memory: whether a client keeps something between rounds, for a model without buffers.
        linear: whether the server needs weighted sums of the uploads alone, as secure aggregation gives them.
        up: names of the trees that a client sends.
    """

    public: bool
    labels: bool
    shapes: str
    memory: bool
    linear: bool
    up: tuple[str, ...]


def facts_of(method: type[Algorithm]) -> Facts:
    """Plays a method on stand-ins and notes what it did."""
    public = Rows({"x": np.zeros((3, 2), np.float32)})
    algorithm = example(method, public=public, student=Stand(3, 3))
    models = {"north": Stand(), "south": Stand()}
    played = play(algorithm, _sites(models, public), rounds=2, student=Stand(3, 3))
    return Facts(
        public=all("public" in words for words in algorithm.needs.any_of),
        labels=any(
            fit.rows is None and any(isinstance(t, Own) for t in fit.terms) for m in models.values() for fit in m.asked
        ),
        shapes=_shapes(algorithm, public),
        memory=any(memory.trees or memory.numbers for memory in played.memories.values()),
        linear=type(algorithm).receive is Algorithm.receive,
        up=tuple(sorted({_plain(name) for upload in played.uploads.values() for name in upload.trees})),
    )


def _plain(tree: str) -> str:
    """A tree's name without its group: "params:Sequential" is "params"."""
    return tree.partition(":")[0]


def _shapes(algorithm: Algorithm, public: Rows) -> str:
    """Which stand-ins of unequal shapes it takes together."""
    if _plays(algorithm, Stand(3, 3), public):
        return "no"
    return "shared part" if _plays(algorithm, Stand(2, 3), public) else "all"


def _plays(algorithm: Algorithm, other: Stand, public: Rows) -> bool:
    try:
        play(algorithm, _sites({"north": Stand(), "south": other}, public), rounds=2, student=Stand(3, 3))
    except (SpecError, UsageError):
        return False
    return True


def _sites(models: Mapping[str, Stand], public: Rows) -> dict[str, Site]:
    """A site for each stand-in, in groups of equal shape; public rows, of which only some methods make use."""
    problem, rows = Problem(("a", "b"), 2), Rows({"x": np.zeros((4, 2), np.float32)}, np.array([0, 1, 0, 1]))
    return {name: Site(name, m, problem, rows, public=public, group=f"{m.key}") for name, m in models.items()}


# ------------------------------------------------------------------------------------------ the table


def rows() -> list[dict[str, str]]:
    """A row a method: its name, each kind of model ("yes", or "no: " and what is lacking), and what it asks for."""
    from polyfed.algorithms import REGISTRY  # which imports what this file is about

    made = []
    for name, method in sorted(REGISTRY.items(), key=lambda item: item[0].lower()):
        algorithm, facts = example(method), facts_of(method)
        row = {"method": name}
        row |= {kind.title: f"no: {said}" if (said := lacks(algorithm, kind)) else "yes" for kind in KINDS.values()}
        row |= {
            "public rows": _yes(facts.public),
            "labels": _yes(facts.labels),
            "same shapes": facts.shapes,
            "keeps memory": _yes(facts.memory),
            "linear": _yes(facts.linear),
            "sends": ", ".join(facts.up) or "numbers only",
        }
        made.append(row)
    return made


def table() -> str:
    """Method x model x what it asks for, as a Markdown table."""
    found = rows()
    names = list(found[0])
    widths = {name: max(len(name), *(len(row[name]) for row in found)) for name in names}
    lines = [{name: name for name in names}, {name: "-" * widths[name] for name in names}, *found]
    return "\n".join("| " + " | ".join(line[name].ljust(widths[name]) for name in names) + " |" for line in lines)


def _yes(value: bool) -> str:
    return "yes" if value else "no"


PAGE = """\
# Methods

Made from the code by `python -m polyfed.algorithms.methods > docs/methods.md`; also `print(pf.algorithms.table())`.
Every yes under a kind of model is a test that trains such models and improves over their start, every no a test of the
refusal (tests/algorithms/test_methods.py).

{table}

- **A kind of model**: whether a federation of such models can use the method, with what is lacking otherwise, in the words
  of `Algorithm.needs`: "params" (parameters that can be averaged), "terms" (loss terms by gradient), "part" (training a
  part of a model). Models of different kinds in one federation: where "same shapes" is no. Estimators by the table at the
  head of `polyfed.models.sklearn`.
- **public rows**: rows that every client and the server may see, always without labels.
- **labels**: clients train on labelled rows of their own; nothing but the model's answers or parameters leaves them.
- **same shapes**: "all": the models that are averaged are equal; "shared part": the part under `shared=` is, the rest may
  differ; "no": any model stands beside any other. FedMD and FedDF average what is equal besides, if asked.
- **keeps memory**: a client keeps something between rounds; a model with buffers (counters, a kept optimizer) always does.
- **linear**: the server needs weighted sums of the uploads alone, as secure aggregation would give them.
- **sends**: the trees of an upload. "params" are trained minus start, "stats" moments of normalisation layers, "soft"
  predictions on the public rows; sums and counts of examples go beside them.
"""


def page() -> str:
    """The text of docs/methods.md."""
    return PAGE.format(table=table())


if __name__ == "__main__":
    sys.stdout.write(page())
