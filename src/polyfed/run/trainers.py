"""What a server trains by itself, over the public rows: a student, or a model of each group of clients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from polyfed.core.algorithm import Algorithm
from polyfed.core.errors import UsageError
from polyfed.core.protocols import Model, Site
from polyfed.core.rows import Problem
from polyfed.core.tree import Spec, part_of
from polyfed.data import Raw
from polyfed.run.client import first_env, public_sites


def matched(
    algorithm: Algorithm,
    specs: Mapping[str, Spec],
    public: Raw,
    problem: Problem,
    *,
    seed: int,
    others_may_come: bool = False,
) -> dict[str, Model]:
    """Group -> the model of the algorithm's ``models=`` whose parameters and statistics have its names and shapes.

    `specs` is that of each group's whole first state; with `others_may_come` a model may wait for a group.

    Raises:
        UsageError: one of `models` is no model, or fits no group.
    """
    given = _models(algorithm)
    found: dict[str, Model] = {}
    for name, site in public_sites(given, algorithm, public, problem, seed=seed).items() if given else ():
        spec = _trained(site.model.first(site.train, first_env(site, seed)).spec)
        fits = [group for group, whole in specs.items() if _trained(whole) == spec]
        if not fits and not others_may_come:
            group, whole = next(iter(specs.items()))
            raise UsageError(
                f"{algorithm.name}: {name} ({site.model.kind}) fits no group of clients: {group}: "
                f"{spec.difference(_trained(whole))}"
            )
        for group in fits:
            found.setdefault(group, site.model)
    return found


def _models(algorithm: Algorithm) -> dict[str, Any]:
    given = getattr(algorithm, "models", ())
    return {f"models[{i}]": model for i, model in enumerate([given] if isinstance(given, Model) else given)}


def given_to_train(algorithm: Algorithm) -> dict[str, Model]:
    """What the job hands the server to train, by the argument's name: ``student=`` and ``models=``."""
    given = {"student": getattr(algorithm, "student", None), **_models(algorithm)}
    return {name: model for name, model in given.items() if isinstance(model, Model)}


def _trained(state: Spec) -> Spec:
    """Without buffers, which belong to an optimizer: the server's may be another one."""
    return state.select(lambda name: part_of(name) != "buffers")


def trainers_at_server(
    algorithm: Algorithm,
    specs: Mapping[str, Spec],
    learners: Mapping[str, str],
    public: Raw | None,
    problem: Problem,
    *,
    seed: int,
    others_may_come: bool = False,
) -> dict[str, Site]:
    """As `client.trainers_of`, at a server over the network, which has no client's model.

    `specs` is that of each group's whole first state, `learners` names one client of each group whose models learn by
    gradient; with `others_may_come` a model in ``models=`` may wait for a group.

    Raises:
        UsageError: a group that learns has no model in ``models=``.
    """
    student = getattr(algorithm, "student", None)
    models = {} if student is None else {"student": student}
    if public is None or not (models or algorithm.trains_groups):
        return {}
    if algorithm.trains_groups:
        models |= matched(algorithm, specs, public, problem, seed=seed, others_may_come=others_may_come)
    for group, client in learners.items() if algorithm.trains_groups else ():
        if group not in models:
            raise UsageError(
                f"{algorithm.name} trains a model like {client}'s ({group}) and a server over the network has none: "
                f"give {algorithm.name}(models=[...]) with one of its architecture"
            )
    return public_sites(models, algorithm, public, problem, seed=seed) if models else {}


def check_trainers(algorithm: Algorithm) -> None:
    """What can be said before anybody dials in; raises `UsageError` for a student or public rows that are missing."""
    has_student, student = hasattr(algorithm, "student"), getattr(algorithm, "student", None)
    if has_student and student is None:
        raise UsageError(f"{algorithm.name} needs a model to train: give student=, such as student=pf.torch(net)")
    if (has_student or algorithm.trains_groups) and getattr(algorithm, "public", None) is None:
        raise UsageError(f"{algorithm.name} trains at the server, on public rows: give public=rows")
