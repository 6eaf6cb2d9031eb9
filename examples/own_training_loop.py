"""Your own PyTorch training loop inside a federation: the terms, the part, the budget and the seeds still hold.

Expect a table; FedProx's penalty reaches the loop through ``training.loss(batch)``.
"""

import sys

import torch
from sklearn.datasets import load_breast_cancer
from sklearn.preprocessing import StandardScaler
from torch import nn

import polyfed as pf

x, y = load_breast_cancer(return_X_y=True)
x = StandardScaler().fit_transform(x).astype("float32")
deal = pf.data.iid(len(y), clients=3, seed=0)


def net():
    return nn.Sequential(nn.Linear(30, 8), nn.ReLU(), nn.Linear(8, 2))


def my_loop(training):
    for batch in training.batches():
        gradients = torch.autograd.grad(training.loss(batch), list(training.parameters.values()))
        length = torch.sqrt(sum((g * g).sum() for g in gradients))
        with torch.no_grad():
            for parameter, gradient in zip(training.parameters.values(), gradients, strict=True):
                parameter.sub_(training.lr * gradient / (1 + length))  # steps of bounded length


clients = [
    pf.Client(name, pf.torch(net, lr=0.2, epochs=2, train=my_loop), data=(x[rows], y[rows]))
    for name, rows in deal.items()
]
rounds = 2 if "--small" in sys.argv else 8
print(pf.simulate(pf.FedProx(0.1), clients, rounds=rounds, seed=0).table("auc"))
