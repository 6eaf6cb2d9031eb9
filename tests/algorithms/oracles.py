"""The algorithms as their papers' pseudocode says them: plain loops over lists of arrays, nothing of the package.

Each client is (x, y) with one-hot or real y; a model is {"head.w", "head.b"} (softmax regression or linear regression), and
one local step is one full-batch gradient step.
"""

import numpy as np


def softmax(z):
    out = np.zeros_like(z)
    for i, row in enumerate(z):
        shifted = [np.exp(v - max(row)) for v in row]
        out[i] = np.array(shifted) / sum(shifted)
    return out


def forward(w, x):
    return x @ w["head.w"] + w["head.b"]


def gradient(w, x, target, kind="classes", t=1.0):
    """Of mean cross-entropy (at temperature t, times t²) or of mean squared error."""
    z = forward(w, x)
    dz = 2 * (z - target) / z.size if kind == "values" else t * (softmax(z / t) - target) / len(x)
    return {"head.w": x.T @ dz, "head.b": dz.sum(0)}


def descend(w, x, target, steps, lr, *, anchor=None, mu=0.0, kind="classes", t=1.0):
    w = {k: v.copy() for k, v in w.items()}
    for _ in range(steps):
        g = gradient(w, x, target, kind, t)
        for k in w:
            pull = mu * (w[k] - anchor[k]) if anchor is not None else 0.0
            w[k] = w[k] - lr * (g[k] + pull)
    return w


def fedavg(w, clients, rounds, *, epochs, lr, mu=0.0, kind="classes", uniform=False):
    """McMahan et al. 2017, algorithm 1 (full batches): w_{t+1} = Σ_k n_k/n w_k. FedProx's local objective where mu > 0."""
    for _ in range(rounds):
        total = sum(1 if uniform else len(x) for x, _ in clients)
        new = {k: np.zeros_like(v) for k, v in w.items()}
        for x, y in clients:
            local = descend(w, x, y, epochs, lr, anchor=w, mu=mu, kind=kind)
            for k in new:
                new[k] += (1 if uniform else len(x)) / total * local[k]
        w = new
    return w


def fedopt(w, clients, rounds, *, epochs, client_lr, which, lr, beta1, beta2, tau):
    """Reddi et al. 2021, algorithm 2, with weights n_k/n; "momentum" is Hsu et al. 2019."""
    m = {k: np.zeros_like(v) for k, v in w.items()}
    v = {k: np.full_like(a, tau**2) for k, a in w.items()}
    for _ in range(rounds):
        total = sum(len(x) for x, _ in clients)
        delta = {k: np.zeros_like(a) for k, a in w.items()}
        for x, y in clients:
            local = descend(w, x, y, epochs, client_lr)
            for k in w:
                delta[k] += len(x) / total * (local[k] - w[k])
        w = {k: a.copy() for k, a in w.items()}
        for k in w:
            for i in np.ndindex(w[k].shape):
                d = delta[k][i]
                if which == "momentum":
                    m[k][i] = beta1 * m[k][i] + d
                    w[k][i] += lr * m[k][i]
                    continue
                m[k][i] = beta1 * m[k][i] + (1 - beta1) * d
                if which == "adagrad":
                    v[k][i] = v[k][i] + d * d
                elif which == "adam":
                    v[k][i] = beta2 * v[k][i] + (1 - beta2) * d * d
                else:
                    v[k][i] = v[k][i] - (1 - beta2) * d * d * np.sign(v[k][i] - d * d)
                w[k][i] += lr * m[k][i] / (np.sqrt(v[k][i]) + tau)
    return w


def fedmd(models, clients, public, rounds, *, epochs, digest, lr, t=1.0, order="last", logits=False, kind="classes"):
    """Li and Wang 2019, algorithm 1 with Hinton's loss: communicate, aggregate, digest, revisit; or digest last."""
    consensus = None
    for _ in range(rounds):
        said = []
        for k, (x, y) in enumerate(clients):
            if order == "paper" and consensus is not None:
                models[k] = descend(models[k], public, consensus, digest, lr, kind=kind, t=t)
            models[k] = descend(models[k], x, y, epochs, lr, kind=kind)
            z = forward(models[k], public)
            if kind == "values" or logits:
                said.append(z)
            else:
                said.append(softmax(z / t))
            if order == "last" and consensus is not None:
                models[k] = descend(models[k], public, consensus, digest, lr, kind=kind, t=t)
        consensus = sum(said) / len(said)
        if logits and kind == "classes":
            consensus = softmax(consensus / t)
    return models, consensus
