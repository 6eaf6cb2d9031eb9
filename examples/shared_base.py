"""A shared base and a personal head: only the base travels. The result is saved and loaded without pickle.

Each site numbers its classes in its own way, so one head for all cannot work. Expect the personal heads to end far
above the fully shared model.
"""

import sys
import tempfile

import numpy as np
from sklearn.datasets import load_digits
from torch import nn

import polyfed as pf

x, y = load_digits(return_X_y=True)
x = (x / 16).astype("float32")
deal = pf.data.iid(400, clients=4, seed=0)  # a hundred rows each


def base():
    return nn.Sequential(nn.Linear(64, 48), nn.ReLU())


def head():
    return nn.Linear(48, 10)


def clients():
    made = []
    for number, (name, rows) in enumerate(deal.items()):
        own_numbering = np.random.default_rng(number).permutation(10)
        model = pf.torch(shared=base, personal=head, lr=0.1, epochs=8, batch_size=8)
        made.append(pf.Client(name, model, data=(x[rows], own_numbering[y[rows]])))
    return made


rounds = 2 if "--small" in sys.argv else 10
everything = pf.simulate(pf.FedAvg(), clients(), rounds=rounds, seed=0, baselines=())
personal = pf.simulate(pf.FedAvg(shared="shared"), clients(), rounds=rounds, seed=0)
print("everything shared:\n" + everything.table(), "\n\nshared base, personal head:\n" + personal.table(), sep="")

with tempfile.TemporaryDirectory() as folder:
    personal.save(folder)
    saved = pf.load(folder)
    first = next(iter(deal))
    module = saved.model(first, into=nn.ModuleDict({"shared": base(), "personal": head()}))
    print(f"\n{first}'s model was read back: {type(module).__name__}")
