"""A small model in plain numpy whose gradients are written by hand, so that algorithms are tested without a framework.

tanh layer ("base", left out with hidden=0) and a linear one ("head"); softmax cross-entropy, or mean squared error for a
regression. With statistics=True inputs are normalised by "stats:base/mean" and "stats:base/variance", which a fit sets
to the moments of the rows it is given; a counter "buffers:base/count" counts its steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import count, islice

import numpy as np

from polyfed.core import seed
from polyfed.core.algorithm import Env, Fit, Fitted, Predict
from polyfed.core.protocols import Site
from polyfed.core.rows import Problem, Rows
from polyfed.core.terms import Distill, Match, Near, Own
from polyfed.core.tree import Tree, is_under, part_of

EPS = 1e-5


@dataclass(frozen=True, eq=False)
class NumpyModel:
    hidden: int = 4
    lr: float = 0.3
    epochs: int = 2
    batch_size: int | None = None
    dtype: str = "float64"
    statistics: bool = False
    kind: str = "NumpyModel"
    offers: frozenset[str] = frozenset({"params", "predict", "features", "terms", "distill", "part", "sgd"})
    settings: dict = field(default_factory=dict)
    log: list = field(default_factory=list)  # requests, for tests that look at them

    @property
    def key(self):
        return ("numpy", self.hidden, self.dtype, self.statistics)

    def first(self, rows: Rows, env: Env) -> Tree:
        inputs, outputs, entries = rows.x.shape[1], env.problem.outputs, {}
        r = seed.rng(env.seed, "numpy", "first")
        if self.hidden:
            entries["base.w"] = r.normal(0, inputs**-0.5, (inputs, self.hidden))
            if self.statistics:
                entries |= {"stats:base/mean": np.zeros(inputs), "stats:base/variance": np.ones(inputs)}
            entries["base.b"] = r.normal(0, 0.1, self.hidden)
        entries["head.w"] = r.normal(0, 0.3, (self.hidden or inputs, outputs))
        entries["head.b"] = np.zeros(outputs)
        tree = {name: a.astype(self.dtype) for name, a in entries.items()}
        if self.statistics:
            tree["buffers:base/count"] = np.int64(0)
        return Tree(tree)

    def state_of(self, start, rows, env) -> Tree:
        state = self.first(rows, env)
        for tree in start:
            state = state.overlay(tree)
        return state

    def forward(self, p, x):
        if "stats:base/mean" in p:
            x = (x - p["stats:base/mean"]) / np.sqrt(p["stats:base/variance"] + EPS)
        h = np.tanh(x @ p["base.w"] + p["base.b"]) if self.hidden else x
        return x, h, h @ p["head.w"] + p["head.b"]

    def fit(self, request: Fit, rows: Rows, env: Env) -> Fitted:
        self.log.append(request)
        p = {name: np.array(a) for name, a in self.state_of(request.start, rows, env).items()}
        x = rows.x.astype(self.dtype)
        if self.statistics and is_under("stats:base/mean", request.part):
            p["stats:base/mean"], p["stats:base/variance"] = x.mean(0), x.var(0)
        losses = [self.step(p, request, rows, x, batch, env) for batch in self.plan(request, len(rows), env)]
        if "buffers:base/count" in p and is_under("buffers:base/count", request.part):
            p["buffers:base/count"] = p["buffers:base/count"] + len(losses)
        metrics = {"loss": float(np.mean(losses))} if losses else {}
        return Fitted(Tree(p), len(losses), self.lr, metrics)

    def plan(self, request, n, env):
        """All batches of a fit: so many epochs, or so many steps over as many epochs as they take."""
        if request.steps is None:
            epochs = self.epochs if request.epochs is None else request.epochs
            return [batch for _ in range(epochs) for batch in self.batches(n, env)]
        return list(islice((batch for _ in count() for batch in self.batches(n, env)), request.steps))

    def batches(self, n, env):
        if self.batch_size is None:
            return [np.arange(n)]
        order = env.rng("order").permutation(n)
        return [order[i : i + self.batch_size] for i in range(0, n, self.batch_size)]

    def step(self, p, request, rows, x, batch, env) -> float:
        inputs, h, z = self.forward(p, x[batch])
        target = None if rows.target is None else rows.target[batch]
        loss, dz, pull = 0.0, np.zeros_like(z), {}
        for term in request.terms:
            value, slope, more = gradient_of(term, z, target, request, batch, p, env.problem)
            loss, dz = loss + value, dz + slope
            pull |= more
        grads = {"head.w": h.T @ dz, "head.b": dz.sum(0)}
        if self.hidden:
            da = (dz @ p["head.w"].T) * (1 - h * h)
            grads |= {"base.w": inputs.T @ da, "base.b": da.sum(0)}
        for name, grad in grads.items():
            if is_under(name, request.part):
                p[name] = (p[name] - self.lr * (grad + pull.get(name, 0.0))).astype(self.dtype)
        return loss

    def predict(self, request: Predict, rows: Rows, env: Env):
        p = self.state_of(request.start, rows, env)
        _, h, z = self.forward(p, rows.x.astype(self.dtype))
        return np.asarray(h if request.what == "features" else z, np.float32)

    def export(self, state, rows, env):
        return {name: np.array(a) for name, a in state.items()}


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def gradient_of(term, z, target, request, batch, p, problem):
    """(value, d value / d z, {entry: d value / d entry}) of one term."""
    n = len(z)
    if isinstance(term, Near):
        anchor = request.tensors["anchor"]
        gaps = {name: p[name] - anchor[name] for name in anchor if part_of(name) == "params"}
        value = 0.5 * term.mu * sum(float((g * g).sum()) for g in gaps.values())
        return value, 0.0, {name: term.mu * gap for name, gap in gaps.items()}
    if isinstance(term, Distill):
        t, teacher = term.temperature, request.targets["teacher"][batch]
        q = softmax(z / t)
        value = -term.weight * t * t * float((teacher * np.log(q)).sum(-1).mean())
        return value, term.weight * t * (q * teacher.sum(-1, keepdims=True) - teacher) / n, {}
    if isinstance(term, Match) or not problem.is_classification:
        wanted = request.targets["teacher"][batch] if isinstance(term, Match) else target
        weight = term.weight
        gap = z - np.asarray(wanted, z.dtype).reshape(z.shape)
        return weight * float((gap * gap).mean()), weight * 2 * gap / gap.size, {}
    assert isinstance(term, Own)
    q = softmax(z)
    hot = np.eye(z.shape[1])[target]
    loss = -float(np.log(q[np.arange(n), target]).mean())
    return term.weight * loss, term.weight * (q - hot) / n, {}


# ---------------------------------------------------------------- small federations

CLASSES = Problem(("a", "b", "c"), 3)
VALUES = Problem(None, 2)
SIZES = {"north": 12, "south": 7, "west": 20}


def rows_of(n, problem=CLASSES, *, inputs=5, stream="rows", labelled=True) -> Rows:
    r = np.random.default_rng(seed.integer(7, stream, n))
    x = (r.normal(size=(n, inputs)) * 1.5 + r.normal(size=inputs)).astype(np.float32)
    truth = np.random.default_rng(3).normal(size=(inputs, problem.outputs))
    score = x @ truth + r.normal(size=(n, problem.outputs)) * 0.3
    target = score.argmax(1) if problem.is_classification else score.astype(np.float32)
    return Rows({"x": x}, target if labelled else None)


def sites_of(models=None, problem=CLASSES, sizes=None, num_public=9) -> dict[str, Site]:
    """A site for each name of `sizes`; `models` is one for all, or one for each name."""
    sizes = sizes or SIZES
    public = rows_of(num_public, problem, stream="public", labelled=False)
    out, keys = {}, {}
    for name, n in sizes.items():
        model = models[name] if isinstance(models, dict) else (models or NumpyModel())
        group = f"group {keys.setdefault(model.key, len(keys))}" if isinstance(models, dict) else "all"
        kw = {"train": rows_of(n, problem, stream=name), "validation": rows_of(6, problem, stream=f"{name} v")}
        out[name] = Site(name, model, problem, public=public, group=group, **kw)
    return out
