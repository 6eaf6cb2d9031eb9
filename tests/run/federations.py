"""Small federations for the tests of `polyfed.run`."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from sklearn.linear_model import LogisticRegression

import polyfed as pf


def rows(seed=0, n=60, width=3):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, width)).astype(np.float32)
    return x, (x[:, 0] + 0.3 * rng.normal(size=n) > 0).astype(np.int64)


def clients(names=("north", "south", "west"), *, model=None, **data):
    make = model or (lambda: pf.sklearn(LogisticRegression()))
    return [pf.Client(name, make(), data=data.get(name, rows(seed))) for seed, name in enumerate(names)]


@dataclass(frozen=True)
class Spoiled(pf.FedAvg):
    """FedAvg in which one client's answer is spoiled."""

    spoil: object = field(default=None, metadata={"local": True}, kw_only=True, compare=False)
    who: str = field(default="south", kw_only=True)

    def client_update(self, message, memory, env):
        update, kept = yield from super().client_update(message, memory, env)
        return (self.spoil(update) if env.client == self.who else update), kept


def run(algorithm=None, members=None, **options):
    return pf.simulate(algorithm or pf.FedAvg(), members or clients(), **{"rounds": 2, "baselines": (), **options})
