"""Three sites, three frameworks, one federation: they exchange predictions on public rows, never parameters.

Each site has few labelled rows. Expect a table with each site's accuracy alone and federated, after a few seconds.
"""

import sys

from sklearn.datasets import load_digits
from sklearn.ensemble import RandomForestClassifier
from torch import nn

import polyfed as pf

x, y = load_digits(return_X_y=True)
x = (x / 16).astype("float32")
public, x, y = x[:500], x[500:1100], y[500:1100]  # 500 rows that everybody may see, without labels
rows = pf.data.dirichlet(y, clients=3, alpha=1.0, seed=0)  # who holds which of the others


def mlp():
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def net():
    import keras  # here, after polyfed has chosen Keras's backend: torch, unless you chose another

    return keras.Sequential([keras.layers.Dense(48, activation="relu"), keras.layers.Dense(10)])


models = [pf.torch(mlp, lr=0.1, epochs=5), pf.keras(net, lr=0.1, epochs=5), pf.sklearn(RandomForestClassifier(100))]
clients = [
    pf.Client(site, model, data=(x[held], y[held]), split=pf.Split(test=0.5))
    for model, site, held in zip(models, ["north", "south", "west"], rows.values(), strict=True)
]
rounds = 2 if "--small" in sys.argv else 8
result = pf.simulate(pf.FedMD(public=public, digest=3), clients, rounds=rounds, seed=0)
print(result.table())
