"""An ensemble of what a folder holds: each client's fitted preprocessing beside its model, in files without code.

    DIR/preprocess/CLIENT-0.skops    the fitted transformer of a client's first input, and so on

What stays unsaved, and is said: preprocessing by a user's own function or class, since files hold no code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np

from polyfed.core.algorithm import Env, Predict
from polyfed.core.errors import CorruptError, UsageError
from polyfed.core.rows import Problem
from polyfed.core.tree import Array
from polyfed.data import Raw
from polyfed.data.prepare import Prepared
from polyfed.run.ensemble import Ensemble, Member, Weights, names_of, said, wants_of

if TYPE_CHECKING:
    from polyfed.run.files import Saved
    from polyfed.run.result import Result

PREPROCESS = "preprocess"


def write(result: Result, folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Writes every client's fitted preprocessing; what result.json says of it, and notes on what could not be."""
    (folder / PREPROCESS).mkdir()
    members, notes = {}, []
    for name, prepared in result.population.prepared.items():
        steps, note = _write_steps(name, getattr(prepared, "fitted", {}), folder / PREPROCESS)
        notes += [note] if note else []
        site, wants = result.population.sites[name], wants_of(result.population.raws[name])
        members[name] = {
            "num_examples": len(site.train),
            "wants": {key: list(wanted) for key, wanted in wants.items()},
            "steps": steps,
        }
    problem = result.population.problem
    classes = None if problem.classes is None else list(problem.classes)
    told = {"classes": classes, "outputs": problem.outputs, "members": members, "untrained": list(result.untrained)}
    return told, notes


def _write_steps(name: str, fitted: Mapping[str, Any], folder: Path) -> tuple[dict[str, str] | None, str]:
    """Input -> file, "" for an input that passes as it is; None, and why, where one has no safe form."""
    steps: dict[str, str] = {}
    for number, (key, step) in enumerate(fitted.items()):
        if step is None:
            steps[key] = ""
            continue
        steps[key] = f"{name}-{number}.skops"
        try:
            _write_step(step, folder / steps[key])
        except UsageError as error:
            return None, f"preprocessing of {name}: {error}; an ensemble of the saved files has to leave it out"
    return steps, ""


def _write_step(step: Any, path: Path) -> None:
    if not hasattr(step, "transform"):
        raise UsageError(f"{getattr(step, '__qualname__', type(step).__name__)} is a function, and files hold no code")
    from polyfed.models.sklearn_file import to_file  # scikit-learn only where a transformer is written

    try:
        to_file(step, path)
    except UsageError:
        raise
    except Exception as error:  # a user's own transformer may hold anything; its result must not be lost
        raise UsageError(f"this {type(step).__name__} has no safe file format ({type(error).__name__})") from error


# ------------------------------------------------------------------------------------------ reading


def ensemble_of(
    saved: Saved, members: Sequence[str] | str | None, weights: Weights, into: Mapping[str, Any] | None
) -> Ensemble:
    """See `Saved.ensemble`."""
    told = saved.told_ensemble
    if not told:
        raise UsageError(f"{saved.folder} was saved without preprocessing; save the result again with this version")
    problem = _problem(saved.folder, told)
    untrained = _untrained(saved.folder, told) if members is None else ()
    if members is None:
        members = [name for name in told["members"] if name not in untrained]
    names = [members] if isinstance(members, str) else list(members)
    if unknown := [name for name in [*names, *(into or {})] if name not in told["members"]]:
        raise UsageError(f"there is no client {unknown[0]!r} in {saved.folder}; there are {', '.join(told['members'])}")
    found = {n: _member(saved, n, problem, told["members"][n], into or {}) for n in names}
    return Ensemble(problem, found, weights, untrained)


def _untrained(folder: Path, told: Mapping[str, Any]) -> tuple[str, ...]:
    names = told.get("untrained", [])  # not in files of earlier versions
    if not isinstance(names, list) or not all(name in told["members"] for name in map(str, names)):
        raise CorruptError(f"{folder}/result.json: {str(names)[:200]} names no clients")
    return tuple(map(str, names))


def _problem(folder: Path, told: Mapping[str, Any]) -> Problem:
    classes, outputs = told.get("classes"), told.get("outputs")
    if not _counts(outputs) or not isinstance(told.get("members"), dict):
        raise CorruptError(f"{folder}/result.json does not say what was predicted")
    if classes is None:
        return Problem(None, outputs)
    names = [str(name) for name in classes] if isinstance(classes, list) else []
    if len(names) != outputs or len(set(names)) != outputs:
        raise CorruptError(f"{folder}/result.json: {outputs} different classes are due, not {str(classes)[:200]}")
    return Problem(tuple(names), outputs)


def _counts(value: object) -> TypeGuard[int]:
    """Whether it is a whole number of at least 1, as JSON has it."""
    return type(value) is int and value >= 1


def _member(saved: Saved, name: str, problem: Problem, told: Any, into: Mapping[str, Any]) -> Member:
    wants, steps = _wants(saved.folder, name, told), told.get("steps")
    if steps is None:
        notes = (note for note in saved.notes if note.startswith(f"preprocessing of {name}: "))
        raise UsageError(f"{next(notes, f'the preprocessing of {name} was not saved')}: name the others in members=")
    prepared = Prepared(None, None, None, None, _fitted(saved.folder, name, steps), "")  # type: ignore[arg-type]  # no rows: only `apply` is asked
    model, kind = saved.model(name, into=into.get(name)), saved.kinds[name]
    predict = _PREDICT[kind["framework"]]

    def ask(raw: Raw) -> Array:
        return predict(model, prepared.apply(name, raw), problem)

    return Member(name, kind["kind"], int(told["num_examples"]), wants, ask)


def _wants(folder: Path, name: str, told: Any) -> dict[str, tuple[str, ...] | tuple[int, ...]]:
    """Of each input the columns or the shape, as they were written; a name becomes no path here."""
    wants = told.get("wants") if isinstance(told, dict) else None
    if isinstance(told, dict) and not _counts(told.get("num_examples")):
        raise CorruptError(f"{folder}/result.json: {name} has {str(told.get('num_examples'))[:80]!r} rows to count by")
    if not isinstance(wants, dict) or not all(
        isinstance(w, list) and (all(isinstance(v, str) for v in w) or all(isinstance(v, int) for v in w))
        for w in wants.values()
    ):
        raise CorruptError(f"{folder}/result.json does not say what {name} reads")
    return {str(key): tuple(wanted) for key, wanted in wants.items()}


def _fitted(folder: Path, name: str, steps: Any) -> dict[str, Any]:
    allowed = {f"{name}-{number}.skops" for number in range(len(steps))} | {""} if isinstance(steps, dict) else set()
    if not isinstance(steps, dict) or not all(isinstance(s, str) and s in allowed for s in steps.values()):
        raise CorruptError(f"{folder}/result.json: the preprocessing of {name} is described by {str(steps)[:200]}")
    return {key: _read_step(folder / PREPROCESS / file) if file else None for key, file in steps.items()}


def _read_step(path: Path) -> Any:
    from polyfed.models.sklearn_file import from_file  # scikit-learn only where a transformer is read

    if not path.is_file():
        raise CorruptError(f"{path} is missing")
    return from_file(path)


# ------------------------------------------------------------------------------------------ asking


def _torch(module: Any, rows: Any, problem: Problem) -> Array:
    from polyfed.models.torch import torch as wrap  # a framework only where it is used

    return _through(wrap(module), rows, problem)


def _keras(model: Any, rows: Any, problem: Problem) -> Array:
    from polyfed.models.keras import keras as wrap  # as above

    return _through(wrap(model), rows, problem)


def _through(model: Any, rows: Any, problem: Problem) -> Array:
    """A model's own start is what was loaded into it."""
    return said(model.predict(Predict(), rows, Env(seed=0, problem=problem, train=rows)), problem)


def _sklearn(estimator: Any, rows: Any, problem: Problem) -> Array:
    """As `SklearnModel.predict`: classes by name, none below its floor."""
    from polyfed.models.sklearn_estimator import FLOOR, probabilities  # as above
    from polyfed.models.sklearn_rows import matrix  # as above

    x = matrix(rows)
    if problem.is_classification != hasattr(estimator, "classes_"):
        raise CorruptError(f"result.json has {problem}, and this {type(estimator).__name__} predicts something else")
    if not problem.is_classification:
        return said(estimator.predict(x), problem)
    place = {name: number for number, name in enumerate(names_of(problem).tolist())}
    full, names = np.zeros((len(x), problem.outputs)), np.asarray(estimator.classes_).tolist()
    if not set(names) <= set(place):
        raise CorruptError(f"result.json has the classes {str(list(place))[:80]}, the estimator {str(names)[:80]}")
    full[:, [place[name] for name in names]] = probabilities(estimator, x)
    full = np.maximum(np.nan_to_num(full), FLOOR)
    return np.asarray(full / full.sum(axis=1, keepdims=True))


_PREDICT = {"torch": _torch, "keras": _keras, "sklearn": _sklearn}
