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


def mean_of(models, weights):
    return {k: sum(a / sum(weights) * m[k] for a, m in zip(weights, models, strict=True)) for k in models[0]}


def step(w, x, y, lr, only=None, scale=1.0):
    g = gradient(w, x, y)
    return {k: v - lr * scale * g[k] if only is None or k in only else v for k, v in w.items()}


def fedrep(w, clients, rounds, *, head_epochs, base_epochs, lr):
    """Collins et al. 2021, algorithm 1, weighted by rows: the bias is the head, the weights are the base."""
    heads = [w["head.b"]] * len(clients)
    base = w["head.w"]
    for _ in range(rounds):
        local = []
        for k, (x, y) in enumerate(clients):
            model = {"head.w": base, "head.b": heads[k]}
            for _ in range(head_epochs):
                model = step(model, x, y, lr, only=("head.b",))
            for _ in range(base_epochs):
                model = step(model, x, y, lr, only=("head.w",))
            heads[k] = model["head.b"]
            local.append({"head.w": model["head.w"]})
        base = mean_of(local, [len(x) for x, _ in clients])["head.w"]
    return base, heads


def fedbabu(w, clients, rounds, *, epochs, fine_tune, lr):
    """Oh et al. 2022, algorithm 1, weighted by rows: the head (the bias) stays; then each client tunes everything."""
    for _ in range(rounds):
        local = []
        for x, y in clients:
            model = w
            for _ in range(epochs):
                model = step(model, x, y, lr, only=("head.w",))
            local.append(model)
        w = mean_of(local, [len(x) for x, _ in clients])
    return w, [descend(w, x, y, fine_tune, lr) for x, y in clients]


def ditto(w, clients, rounds, *, epochs, lr, lam):
    """Li et al. 2021, algorithm 1."""
    own = [w] * len(clients)
    for _ in range(rounds):
        local = [descend(w, x, y, epochs, lr) for x, y in clients]
        own = [descend(v, x, y, epochs, lr, anchor=w, mu=lam) for v, (x, y) in zip(own, clients, strict=True)]
        w = mean_of(local, [len(x) for x, _ in clients])
    return w, own


def apfl(w, clients, rounds, *, epochs, lr, alpha, adaptive):
    """Deng et al. 2020, algorithm 1 with the shared model held while v trains, and one α step a round."""
    own, shares = [w] * len(clients), [alpha] * len(clients)
    for _ in range(rounds):
        for i, (x, y) in enumerate(clients):
            v, a, total = own[i], shares[i], dict.fromkeys(w, 0.0)
            before = v
            for _ in range(epochs):
                g = gradient({k: a * v[k] + (1 - a) * w[k] for k in w}, x, y)
                v = {k: v[k] - lr * a * g[k] for k in w}
                total = {k: total[k] + g[k] / epochs for k in w}
            own[i] = v
            if adaptive:
                slope = sum(((before[k] - w[k]) * total[k]).sum() for k in w)
                shares[i] = min(1.0, max(0.0, a - lr * slope))
        w = mean_of([descend(w, x, y, epochs, lr) for x, y in clients], [1] * len(clients))
    mixed = [{k: a * v[k] + (1 - a) * w[k] for k in w} for a, v in zip(shares, own, strict=True)]
    return w, mixed, shares


def pfedme(w, clients, rounds, *, inner_lr, lr, lam, steps, local_rounds, beta):
    """Dinh et al. 2020, algorithm 1, the inner problem by gradient steps that go on from the last solution."""
    for _ in range(rounds):
        local, own = [], []
        for x, y in clients:
            wi, theta = w, w
            for _ in range(local_rounds):
                theta = descend(theta, x, y, steps, inner_lr, anchor=wi, mu=lam)
                wi = {k: wi[k] - lr * lam * (wi[k] - theta[k]) for k in w}
            local.append(wi)
            own.append(theta)
        mean = mean_of(local, [1] * len(clients))
        w = {k: (1 - beta) * w[k] + beta * mean[k] for k in w}
    return w, own
