"""Trains everybody alone and together, and scores all of them on the hours that nobody has seen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import crossing
import numpy as np
import torch
from networks import NETWORKS, ParkMLP, two_outputs
from places import CITIES, Place
from sklearn.linear_model import Ridge

import polyfed as pf
from polyfed.core.metrics import auc


@dataclass(frozen=True)
class Settings:
    """How everybody trains; chosen on validation rows.

    Attributes:
        rounds: of one epoch, after each of which the base is averaged.
        finish: further epochs, each participant by itself; alone there are as many.
        joins_at: the newcomers' first round; from then on no head travels.
        lr, finish_lr: Adam's, in the rounds and after them.
        newcomer_lr: a newcomer's in both: it starts from a base and a head that are good already.
    """

    rounds: int = 25
    finish: int = 15
    joins_at: int = 21
    lr: float = 0.003
    finish_lr: float = 0.001
    newcomer_lr: float = 0.0003
    executor: str = "processes"


QUICK = Settings(rounds=3, finish=1, joins_at=3, executor="loop")
Forecasts = dict[str, np.ndarray]  # participant -> (test rows, 2): flow in standard deviations, logit of "congested"


# ------------------------------------------------------------------------------------------ training


def client(name: str, place: Place, *, lr: float, batch_size: int | None = None, **more) -> pf.Client:
    model = pf.torch(
        NETWORKS.get(place.name, ParkMLP),
        loss=two_outputs,
        optimizer="adam",
        lr=lr,
        batch_size=batch_size or (64 if place.name in CITIES else 32),
        keep_optimizer=True,
    )
    return pf.Client(name, model, data=(dict(place.inputs), place.target), split=place.parts, **more)


def train(algorithm: pf.Algorithm, clients: Iterable[pf.Client], rounds: int, seed: int, executor: str) -> pf.Result:
    # "test" and "evaluate" are off: the package's metrics would mix the two outputs, so they are scored here
    return pf.simulate(
        algorithm,
        clients,
        rounds=rounds,
        seed=seed,
        task="regression",
        evaluate_every=0,
        test=False,
        baselines=(),
        executor=executor,
    )


def alone(places: Mapping[str, Place], few: Mapping[str, Place], seed: int, settings: Settings) -> Forecasts:
    """Each by itself on all of its training rows; "NAME.quarter" are the newcomers by themselves on a quarter."""

    def clients(lr: float) -> list[pf.Client]:
        quarters = [client(f"{name}.quarter", place, lr=lr, batch_size=16) for name, place in few.items()]
        return [*(client(name, place, lr=lr) for name, place in places.items()), *quarters]

    begun = train(pf.Local(), clients(settings.lr), settings.rounds, seed, settings.executor)
    own = [replace(each, start=begun) for each in clients(settings.finish_lr)]
    done = train(pf.Local(), own, settings.finish, seed, settings.executor)
    return forecasts(done, {**places, **{f"{name}.quarter": place for name, place in few.items()}})


def together(places: Mapping[str, Place], few: Mapping[str, Place], seed: int, settings: Settings) -> Forecasts:
    """A shared base under personal parts, then everybody for itself; the newcomers join late, with a quarter."""

    def clients(lr: float) -> list[pf.Client]:
        old = [client(n, place, lr=lr, consents="personal") for n, place in places.items() if n not in few]
        late = [
            client(
                name,
                place,
                lr=settings.newcomer_lr,
                batch_size=16,
                consents="personal",
                joins_at=settings.joins_at,
                freeze="base",
            )
            for name, place in few.items()
        ]
        return [*old, *late]

    algorithm = pf.FedPer(
        shared="base", weighting="uniform", feedback="mean", feedback_rounds=max(settings.joins_at - 1, 1)
    )
    shared = train(algorithm, clients(settings.lr), settings.rounds, seed, settings.executor)
    own = [replace(each, start=shared, joins_at=1) for each in clients(settings.finish_lr)]
    done = train(pf.Local(), own, settings.finish, seed, settings.executor)
    return forecasts(done, {**places, **few})


def forecasts(result: pf.Result, places: Mapping[str, Place]) -> Forecasts:
    """What each participant's model, an ordinary torch module, says of its test rows."""
    found = {}
    for name in result.population.sites:
        place = places[name]
        rows = {key: torch.from_numpy(a[place.parts.test]).float() for key, a in place.inputs.items()}
        with torch.no_grad():
            found[name] = result.models[name](**rows).numpy()
    return found


# ------------------------------------------------------------------------------------------ scores


def error(forecast: np.ndarray, place: Place, whole: Place | None = None) -> float:
    """MAE of the flow on the test rows; of a quarter's model too in the deviations of the `whole` training part."""
    gap = float(np.abs(forecast - place.target[place.parts.test, 0]).mean())
    return gap if whole is None else gap * place.scale[1] / whole.scale[1]


def naive(place: Place) -> dict[str, float]:
    """MAE of the last value, of the value a week before, and of ridge regression on the whole week."""
    train, held, test = place.parts.train, place.parts.validation, place.parts.test
    flow = place.target[:, 0]
    fits = [Ridge(alpha).fit(place.linear[train], flow[train]) for alpha in (1.0, 10.0, 100.0, 1000.0)]
    ridge = min(fits, key=lambda fit: np.abs(fit.predict(place.linear[held]) - flow[held]).mean())
    said = {"last": place.last[test], "week": place.week[test], "ridge": ridge.predict(place.linear[test])}
    return {name: error(forecast, place) for name, forecast in said.items()}


def congested(forecast: np.ndarray, place: Place) -> float:
    """AUC of the second output on the test rows; NaN where they hold one class."""
    truth = place.target[place.parts.test, 1]
    return auc(forecast[:, 1], truth) if 0 < truth.mean() < 1 else float("nan")


#: Share of the saturation flow that the 99th percentile of a road's training hours needs.
LOAD = 0.45


def signal(places: Mapping[str, Place], ways: Mapping[str, Forecasts], seed: int) -> dict[str, float]:
    """Mean delay at a crossing of Minneapolis's road and San Francisco's, for each way to believe in flows.

    The records are of other years: their hours meet by hour of the week. "fixed" is the one division of the green that
    has the least delay in the training hours; "true flows" knows what comes.
    """
    roads = [places["minneapolis"], places["san_francisco"]]
    tops = [np.quantile(road.in_units(road.target[road.parts.train, 0]), 0.99) for road in roads]

    def flows(part: str, deviations: Iterable[np.ndarray]) -> np.ndarray:
        """(hours, 2) vehicles a second, of values in standard deviations for all rows of a part."""
        steps = [road.step[getattr(road.parts, part)] for road in roads]
        weeks = 168 * ((steps[0][0] - steps[1][0]) // 168)
        _, *at = np.intersect1d(steps[0], steps[1] + weeks, return_indices=True)
        values = [road.in_units(given)[rows] for road, given, rows in zip(roads, deviations, at, strict=True)]
        return LOAD * crossing.SATURATION * np.stack([v / top for v, top in zip(values, tops, strict=True)], axis=-1)

    past = flows("train", (road.target[road.parts.train, 0] for road in roads))
    true = flows("test", (road.target[road.parts.test, 0] for road in roads))
    shares = {f"{share:.2f}": np.array([share, 1 - share]) for share in np.arange(0.2, 0.81, 0.05)}
    tried = crossing.delays(past, {name: np.tile(share, (len(past), 1)) for name, share in shares.items()}, seed)
    believed = {"fixed": np.tile(shares[min(tried, key=tried.__getitem__)], (len(true), 1))}
    believed["last value"] = flows("test", (road.last[road.parts.test] for road in roads))
    for way, said in ways.items():
        believed[way] = flows("test", (said[road.name][:, 0] for road in roads))
    return crossing.delays(true, {**believed, "true flows": true}, seed)
