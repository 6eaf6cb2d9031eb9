"""A preprocessing that all participants agree on before round 1: fitted together, without a row leaving its site."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import numpy as np

from polyfed import data as tables
from polyfed.algorithms import FedAvg
from polyfed.core.aggregate import Fold
from polyfed.core.algorithm import Env, Task
from polyfed.core.errors import DataError, MissingExtraError, UsageError
from polyfed.core.message import Message, State
from polyfed.core.protocols import Job, Site
from polyfed.core.rows import Problem, Rows
from polyfed.core.tree import Array
from polyfed.core.work import perform
from polyfed.data import Raw
from polyfed.data.table import is_frame
from polyfed.run.client import Client, in_one_order, listed

ROUNDS = 3  # sums about 0, then about the means, then without the first ones' rounding
UNASKED = Problem(None, 1)  # labels have no part in it


def federated_transform(transformer: Any, clients: Iterable[Client], *, seed: int = 0) -> Any:
    """Fits one transformer for a whole federation, from each client's training rows.

    scaler = pf.federated_transform(make_pipeline(SimpleImputer(), StandardScaler()), clients, seed=0)
    clients = [replace(client, preprocess=scaler) for client in clients]
    result = pf.simulate(pf.FedAvg(), clients, seed=0)

    Equals scikit-learn's fit on all training rows together to 1e-10. Each step is `ROUNDS` rounds of `FedAvg` over
    `pf.sklearn(step)`, the same messages and the same fold as in any run, on float64 rows as they are given: a
    client's own `preprocess` is not applied.

    Args:
        transformer: StandardScaler, PCA, SimpleImputer with means, or a pipeline of these.
        clients: the participants; arrays or DataFrames of numbers, with the same columns.
        seed: that of the later run: it decides which rows are test rows, and those have no part in the fit.

    Returns:
        a fitted ``FrozenEstimator`` (scikit-learn's): `fit` changes nothing in it, so that every client that takes it
        as `preprocess` applies the same. ``.estimator`` is the fitted transformer itself.

    Raises:
        UsageError: a transformer that is no function of sums.
        DataError: columns that are no numbers or differ between clients; names the client.
        ClientError: what a client's rows do not allow, such as gaps in PCA.

    Guarantees: no row leaves a client, only means over its rows (see `polyfed.models.sklearn_transformers`): those of
    a single row are that row, and the coordinator of this round sees each client's.
    """
    try:
        from sklearn.frozen import FrozenEstimator
    except ImportError as error:
        raise MissingExtraError("scikit-learn", "sklearn") from error
    by_name = {client.name: client for client in listed(clients)}
    if not by_name:
        raise UsageError("a federation needs at least one client; give a list of pf.Client(name, model, data=...)")
    raws, _ = in_one_order({name: client.read() for name, client in by_name.items()})
    parts = {name: tables.divide(name, raws[name], client.split, seed=seed) for name, client in by_name.items()}
    rows = {name: _numbers(name, raw.take(parts[name].train)) for name, raw in raws.items()}
    _check_columns(raws, rows)
    fitted = []
    for name, step in _steps(transformer):
        made = _fitted(step, rows, seed)
        fitted.append((name, made))
        rows = {client: np.asarray(made.transform(x), np.float64) for client, x in rows.items()}
    columns = _columns(next(iter(raws.values())))
    if columns is not None:
        fitted[0][1].feature_names_in_ = columns
    return FrozenEstimator(fitted[0][1] if not hasattr(transformer, "steps") else type(transformer)(fitted))


def _steps(transformer: Any) -> list[tuple[str, Any]]:
    steps = getattr(transformer, "steps", None)
    return [("", transformer)] if steps is None else [(name, step) for name, step in steps if step != "passthrough"]


def _fitted(step: Any, rows: Mapping[str, Array], seed: int) -> Any:
    """One transformer from `ROUNDS` rounds over every client."""
    from polyfed.models.sklearn import sklearn  # a framework only where it is used

    model, algorithm = sklearn(step), FedAvg()
    if "predict" in model.offers:
        raise UsageError(f"{model.kind} is no transformer; give StandardScaler(), PCA(), or a pipeline of such")
    sites = {name: Site(name, model, UNASKED, Rows({"x": x}, np.zeros(len(x), np.float32))) for name, x in rows.items()}
    site = next(iter(sites.values()))
    env = Env(seed=seed, problem=UNASKED, train=site.train)
    env = Env(seed=seed, problem=UNASKED, first={"": model.first(site.train, env)}, population=len(sites))
    state = algorithm.init(env)
    for number in range(ROUNDS):
        state = _round(algorithm, state, sites, env, number)
    return model.export(state.trees["params"], site.train, env)


def _round(algorithm: FedAvg, state: State, sites: Mapping[str, Site], env: Env, number: int) -> State:
    fold = Fold()
    for position, site in enumerate(sites.values()):
        task = Task("train", site.name, number + 1, number, position=position, number=number)
        reply = perform(
            algorithm, site, Job(task, algorithm.broadcast(state, site.name, env), Message()), seed=env.seed
        )
        if reply.error is not None or reply.message is None:
            raise reply.error or UsageError(f"{site.name} sent nothing")
        fold.add(position, reply.message, partial(algorithm.weight, reply.message.numbers, 0))
    return algorithm.server_update(state, fold.finish(), env)


def _numbers(name: str, raw: Raw) -> Array:
    """(n, columns) float64; NaN where a value is missing."""
    if len(raw.inputs) != 1:
        raise DataError(f"{name}: has the inputs {', '.join(raw.inputs)}; one transformer takes one")
    values = next(iter(raw.inputs.values()))
    try:
        x = values.to_numpy(np.float64, na_value=np.nan) if is_frame(values) else np.asarray(values, np.float64)
    except (ValueError, TypeError) as error:
        raise DataError(f"{name}: a column holds no numbers ({error}); leave it out of data=") from error
    return np.ascontiguousarray(x.reshape(len(x), -1))


def _columns(raw: Raw) -> Array | None:
    values = next(iter(raw.inputs.values()))
    return np.asarray(values.columns, object) if is_frame(values) else None


def _check_columns(raws: Mapping[str, Raw], rows: Mapping[str, Array]) -> None:
    model = next(iter(raws))
    for name in raws:
        one, other = _columns(raws[model]), _columns(raws[name])
        if rows[name].shape[1] != rows[model].shape[1]:
            widths = f"{rows[name].shape[1]} columns, {model} has {rows[model].shape[1]}"
            raise DataError(f"{name}: has {widths}; one transformer takes the same everywhere")
        if one is not None and other is not None and list(one) != list(other):
            odd = next(column for column in other if column not in set(one))
            raise DataError(f"{name}: column {odd!r} is not at {model}; one transformer takes the same everywhere")
