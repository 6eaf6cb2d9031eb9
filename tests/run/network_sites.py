"""Clients of the network tests, made alike in this process and in those that it starts; as a program it joins runs."""

import json
import os
import signal
import sys
from dataclasses import dataclass

import numpy as np

import polyfed as pf
from polyfed.core.algorithm import Fit, Fitted

NAMES = ("c0", "c1", "c2")


def rows(name, count=48):
    rng = np.random.default_rng(sum(name.encode()))
    x = rng.normal(size=(count, 4)).astype(np.float32)
    return x, np.argmax(x[:, :3] + 0.3 * rng.normal(size=(count, 3)), axis=1)


def public():
    return np.random.default_rng(99).normal(size=(18, 4)).astype(np.float32)


class Softmax:
    """A softmax regression in numpy without any global state, so that several may train in threads of one process."""

    kind = "Softmax"
    offers = frozenset({"params", "predict", "terms", "distill"})
    key = ("softmax",)
    settings = {"lr": 0.2}  # noqa: RUF012  # a constant

    def __init__(self, fails=False):
        self.fails = fails

    def first(self, rows, env):
        rng = env.rng("init")
        weight = rng.normal(size=(rows.x.shape[1], env.problem.outputs)).astype(np.float32)
        return pf.Tree({"weight": weight, "bias": np.zeros(env.problem.outputs, np.float32)})

    def fit(self, request, rows, env):
        if self.fails:
            raise RuntimeError("no")
        state = self._state(request, rows, env)
        teacher = request.targets.get("teacher")
        target = np.eye(env.problem.outputs, dtype=np.float32)[rows.target] if teacher is None else teacher
        noise = env.rng("noise").normal(scale=0.01, size=state["weight"].shape).astype(np.float32)
        weight, bias = state["weight"] + noise, state["bias"].copy()
        for _ in range(3):
            error = _softmax(rows.x @ weight + bias) - target
            weight = weight - np.float32(0.2) * (rows.x.T @ error) / np.float32(len(rows))
            bias = bias - np.float32(0.2) * error.mean(0)
        return Fitted(pf.Tree({"weight": weight, "bias": bias}), 3, 0.2, {"loss": float(np.abs(error).mean())})

    def predict(self, request, rows, env):
        rows = rows if request.rows is None else request.rows
        state = self._state(request, rows, env)
        return np.asarray(rows.x @ state["weight"] + state["bias"], np.float32)

    def export(self, state, rows, env):
        return dict(state)

    def _state(self, request, rows, env):
        state = self.first(rows, pf_first_env(env))
        for tree in request.start:
            state = state.overlay(tree)
        return state


def pf_first_env(env):
    from dataclasses import replace

    return replace(env, client="", number=0)


def _softmax(z):
    raised = np.exp(z - z.max(1, keepdims=True))
    return (raised / raised.sum(1, keepdims=True)).astype(np.float32)


def net():
    from torch import nn

    return nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.1), nn.ReLU(), nn.Linear(6, 3))


def model(kind, name):
    if kind == "numpy":
        return Softmax(fails=name == "mallory")
    if kind == "mixed" and name == "c1":
        from sklearn.ensemble import RandomForestClassifier

        return pf.sklearn(RandomForestClassifier(n_estimators=5))
    return pf.torch(net, lr=0.1, optimizer="adam" if name == "c2" else "sgd")


def client(kind, name):
    return pf.Client(name, model(kind, name), rows(name))


def clients(kind, names=NAMES):
    return [client(kind, name) for name in names]


@dataclass(frozen=True)
class Halved(pf.FedAvg):
    """A user's own algorithm: the mean step, taken in part."""

    part: float = 0.5

    def request(self, message, memory):
        return Fit(start=self.start(message, memory), epochs=1)

    def step(self, state, update):
        return {"params": state.trees["params"] + update * self.part}


def die_before(method):
    """SIGKILL of this very process in a later round, before the upload is sent or before its verdict is noted."""
    from polyfed.run import join

    whole = getattr(join._Worker, method)

    def killed(self, receipt, *more):
        if int(receipt.partition(".")[0]) >= 3 and self.memory.pending:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(self, receipt, *more)

    setattr(join._Worker, method, killed)


def serve(port, journal):
    """A server of four rounds; says where it is, and at its end what came of it."""
    result = pf.serve(
        pf.FedMD(public=public()),
        clients=NAMES,
        rounds=4,
        seed=1,
        port=int(port),
        journal=journal,
        started=lambda said: print(said.split()[2].rstrip(","), flush=True),
    )
    print(json.dumps({"state": result.state.digest, "test": result.test, "rounds": len(result.history)}), flush=True)


def main():
    """Joins one run for each line of standard input: url, kind, name, options."""
    for line in sys.stdin:
        url, kind, name, *options = line.split()
        said = dict(option.split("=", 1) for option in options)
        if "die" in said:
            die_before(said["die"])
        joined = pf.join(url, client(kind, name), memory=said.get("memory"), show=None)
        digests = {"memory": joined.memory.digest, "message": joined.message.digest, "state": joined.state.digest}
        print(json.dumps(digests), flush=True)


if __name__ == "__main__":
    serve(*sys.argv[2:]) if sys.argv[1:2] == ["serve"] else main()
