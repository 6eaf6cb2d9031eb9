"""Every step of a round in your own hands; the same bits as `pf.simulate` with the same arguments.

Expect one line a round, and at the end that both ways gave the same model.
"""

import sys

from sklearn.datasets import load_breast_cancer
from sklearn.preprocessing import StandardScaler
from torch import nn

import polyfed as pf

x, y = load_breast_cancer(return_X_y=True)
x = StandardScaler().fit_transform(x).astype("float32")


def net():
    return nn.Sequential(nn.Linear(30, 8), nn.ReLU(), nn.Linear(8, 2))


def clients():
    deal = pf.data.quantity_skew(len(y), clients=4, seed=1)
    return [pf.Client(name, pf.torch(net, lr=0.1), data=(x[rows], y[rows])) for name, rows in deal.items()]


rounds = 2 if "--small" in sys.argv else 5
loop = pf.rounds(pf.FedAvg(), clients(), rounds=rounds, seed=0)  # initialise
for round_ in loop:  # repeat
    jobs = round_.send()  # a message for each client of the cohort
    for reply in round_.train(jobs):  # at the clients
        round_.collect(reply)  # checked, then accepted or refused
    log = round_.update()  # aggregate, update, evaluate, ask whether to stop
    scores = " ".join(f"{name} {values['accuracy']:.3f}" for name, values in log.metrics.items())
    print(f"round {log.round_num}: {len(log.accepted)} updates, step {log.update_norm:.3f}, accuracy: {scores}")

same = pf.simulate(pf.FedAvg(), clients(), rounds=rounds, seed=0, baselines=())
assert loop.result.state.digest == same.state.digest
print("simulate gives the same model, bit for bit")
