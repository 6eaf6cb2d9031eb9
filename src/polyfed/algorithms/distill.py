"""One student for everybody: the server trains a model of its own on what clients of any model say of public rows."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from polyfed.algorithms.fedmd import FedMD
from polyfed.algorithms.options import at_least
from polyfed.core.aggregate import Aggregate
from polyfed.core.algorithm import Env, Fit, Fitted, Needs, Predict
from polyfed.core.errors import UsageError
from polyfed.core.message import Message, State
from polyfed.core.protocols import Site
from polyfed.core.rows import Problem, Rows
from polyfed.core.tree import Tree
from polyfed.core.work import ask, at_server


@dataclass(frozen=True)
class Distill(FedMD):
    """Clients of any model train, predict public rows, and the server trains one student on their consensus.

    Ensemble distillation (Hinton et al. 2015; Lin et al., NeurIPS 2020; one-shot: Guha et al. 2019): the student learns
    T² · KL(consensus ‖ softmax(z / T)), batch mean, on unlabelled public rows; a regression by squared error. It may be
    of any framework and size, and no client need have a model of its kind. ``rounds=1`` is one-shot; in later rounds
    clients go on training and the student goes on from where it stands.

    With `digest` clients learn in turn, as in `FedMD`: from the consensus, or with ``feedback=True`` from the student, which
    teaches well only once it has learned well (on the digits of `Consensus`, three epochs a round of either: nets at 0.75
    after ten rounds with the consensus, at 0.50 with the student).

    Wire: up as in `FedMD`; down "soft" only where clients digest. State: "soft" (consensus), "student" (its state, which
    never travels), "lesson" (what the student says of the public rows, with `feedback`). Invariants: 26, 42-44, 46-52.

    Attributes:
        public, temperature, weighting, average, sharpen, strength: see `Consensus`.
        student: a wrapped model, such as ``pf.torch(net, epochs=20)``; stays at this machine.
        preprocess: an unfitted transformer of the public rows for the student, as a client's ``preprocess=``.
        epochs: the student's passes over the public rows a round; None is its own setting.
        digest: epochs over the public rows in which a client learns; 0: clients learn nothing from one another.
        feedback: clients digest what the student says, in place of the consensus.
        revisit, order, shared: see `FedMD`.

    >>> Distill(temperature=3.0, feedback=True, digest=2).feedback
    True
    """

    student: Any = field(default=None, metadata={"local": True}, kw_only=True, repr=False, compare=False)
    preprocess: Any = field(default=None, metadata={"local": True}, kw_only=True, repr=False, compare=False)
    epochs: int | None = field(default=None, kw_only=True)
    digest: int = field(default=0, kw_only=True)
    feedback: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, epochs=self.epochs)
        if self.feedback and not self.digest:
            raise UsageError("feedback=True is digested by the clients: say for how many epochs, digest=1")
        if not self.digest:
            object.__setattr__(self, "needs", Needs.all("predict", "public"))

    def init(self, env: Env) -> State:
        site, env_of_student = self._student(env)
        return super().init(env).put(trees={"student": site.model.first(site.train, env_of_student)})

    def broadcast(self, state: State, client: str, env: Env) -> Message:
        """What clients digest, if they do, and the shared part of those who share one."""
        sent, told = state.only("params", "stats"), "lesson" if self.feedback else "soft"
        if self.digest and told in state.trees:
            sent = sent.put(trees={"soft": state.trees[told]})
        return super().broadcast(sent, client, env)

    def lesson(self, message: Message, public: Rows, problem: Problem) -> Fit | None:
        """As in `FedMD`; what the student says is not sharpened again: it has learned what was."""
        return super(Distill, replace(self, sharpen=0.0) if self.feedback else self).lesson(message, public, problem)

    def server_update(self, state: State, aggregate: Aggregate, env: Env) -> State:
        if not aggregate.clients:
            return state
        state = super().server_update(state, aggregate, env)
        site, own = self._student(env)
        lesson = self.teach(state.trees["soft"]["public"], env.problem, site.train, self.epochs)
        fitted: Fitted = ask(site, replace(lesson, start=(state.trees["student"],)), own)
        state = state.put(trees={"student": fitted.state})
        if not self.feedback:
            return state
        outputs = ask(site, Predict(start=(fitted.state,), rows=site.train), own)
        return state.put(trees={"lesson": Tree({"public": self.said(outputs, env.problem)})})

    def _student(self, env: Env) -> tuple[Site, Env]:
        """The student with its public rows, and the env in which it is asked: it has no rows of its own."""
        if "student" not in env.trainers:
            raise UsageError("Distill needs a model to train: pf.Distill(student=pf.torch(net), public=rows)")
        site = env.trainers["student"]
        return site, at_server(site, env)
