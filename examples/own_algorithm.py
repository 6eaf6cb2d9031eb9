"""An algorithm of your own: state only what is odd about it, check it, run it.

Each client sends the sign of its update, the server steps by a fixed length in the direction
of the majority (signSGD with majority vote, Bernstein et al. 2018). Expect the mean AUC to pass 0.95.
"""

import sys
from dataclasses import dataclass

import numpy as np
from sklearn.datasets import load_breast_cancer
from sklearn.preprocessing import StandardScaler
from torch import nn

import polyfed as pf
from polyfed.algorithms import FedAvg


@dataclass(frozen=True)
class SignVote(FedAvg):
    step_length: float = 0.01

    def upload(self, message, fitted, env):
        sent = super().upload(message, fitted, env)
        return sent.put(trees={"params": sent.trees["params"].map(np.sign)})

    def step(self, state, update):
        return {"params": state.trees["params"] + update.map(np.sign) * self.step_length}


x, y = load_breast_cancer(return_X_y=True)
x = StandardScaler().fit_transform(x).astype("float32")
deal = pf.data.iid(len(y), clients=5, seed=0)


def net():
    return nn.Sequential(nn.Linear(30, 8), nn.ReLU(), nn.Linear(8, 2))


clients = [pf.Client(name, pf.torch(net, lr=0.1), data=(x[rows], y[rows])) for name, rows in deal.items()]
rounds = 2 if "--small" in sys.argv else 15
result = pf.simulate(SignVote(weighting="uniform"), clients, rounds=rounds, seed=0)
print(result.table("auc"))
