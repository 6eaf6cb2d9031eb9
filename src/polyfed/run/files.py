"""A result in files that hold no code, and back: `result.save(DIR)`, `pf.load(DIR)`.

    DIR/result.json              settings, metrics, history, and how each model was saved
    DIR/state.polyfed            the server's state
    DIR/memories/CLIENT.polyfed  what a client keeps
    DIR/models/CLIENT.keras      a Keras model
    DIR/models/CLIENT.skops      a scikit-learn estimator: skops' zip; of LightGBM and XGBoost JSON around their own text
    DIR/models/CLIENT.polyfed    any model's state; a PyTorch module is made of it by ``saved.model(CLIENT, into=MyNet())``
    DIR/preprocess/CLIENT-0.skops  a client's fitted preprocessing: ``saved.ensemble()``
    DIR/student.*                the student that the server taught, as a client's model: ``saved.student``

A ``.polyfed`` file is a message as it travels (`polyfed.core.wire`): checked, and nothing in it is ever executed.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyfed.core import wire
from polyfed.core.errors import CorruptError, PeerError, StorageError, UsageError
from polyfed.core.message import Memory, Message, State
from polyfed.core.tree import Tree
from polyfed.run import saved_ensemble
from polyfed.run.client import NAME
from polyfed.run.ensemble import Ensemble, Weights
from polyfed.run.student import STUDENT, student_state

if TYPE_CHECKING:
    from polyfed.run.result import Result

FORMAT = 1
#: framework -> ending of its model files; a framework that is not here keeps the state alone.
ENDINGS = {"keras": ".keras", "sklearn": ".skops", "torch": ".polyfed"}
MAX_JSON = 256 << 20  # bytes of result.json: a million rounds of ten clients


# ---------------------------------------------------------------------------------------------- writing


def save(result: Result, folder: str | os.PathLike[str]) -> Path:
    """Writes a result; an earlier one in the same folder is replaced when the new one is whole.

    Raises:
        StorageError: the folder cannot be written, or holds something that is no saved result.
    """
    folder = Path(folder)
    try:
        _check_free(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            made.chmod(0o755)  # mkdtemp's own is for its user alone
            _write(result, made)
            _put_in_place(made, folder)
        finally:
            shutil.rmtree(made, ignore_errors=True)
    except OSError as error:
        raise StorageError(f"the result cannot be saved to {folder}: {error.strerror or error}") from error
    return folder


def _check_free(folder: Path) -> None:
    if folder.is_dir():
        if any(folder.iterdir()) and not (folder / "result.json").is_file():
            raise StorageError(f"{folder} holds other files; save the result to a folder of its own")
    elif folder.exists():
        raise StorageError(f"{folder} is a file; save the result to a folder")


def _put_in_place(made: Path, folder: Path) -> None:
    if folder.exists():
        before = made.with_name(made.name + "-before")
        folder.rename(before)
        try:
            made.rename(folder)
        except OSError:
            before.rename(folder)
            raise
        shutil.rmtree(before, ignore_errors=True)
    else:
        made.rename(folder)


def _write(result: Result, folder: Path) -> None:
    (folder / "memories").mkdir()
    (folder / "models").mkdir()
    (folder / "state.polyfed").write_bytes(wire.to_bytes(result.state))
    for name, memory in result.memories.items():
        (folder / "memories" / f"{name}.polyfed").write_bytes(wire.to_bytes(memory))
    models, notes = {}, []
    for name in result.population.sites:
        models[name], note = _write_model(result, name, folder / "models")
        notes += [note] if note else []
    said: dict[str, Any] = {"format": FORMAT, "result": result.to_dict(), "models": models, "notes": notes}
    said["ensemble"], lacking = saved_ensemble.write(result, folder)
    notes += lacking
    if result.has_student:
        site, state = student_state(result.algorithm, result.federation, result.state)
        said["student"], note = _write_as(site.model, STUDENT, state, lambda: result.student, folder)
        notes += [note] if note else []
    (folder / "result.json").write_text(json.dumps(said, indent=1, allow_nan=False))


def _write_model(result: Result, name: str, folder: Path) -> tuple[dict[str, str], str]:
    """Writes one client's state, and its model where a safe format takes it; says how, and what could not be done."""
    model = result.population.sites[name].model

    def exported() -> Any:
        try:
            return result.models[name]
        except Exception as error:  # what failed in training, whatever it was, may fail here again
            if name in result.untrained:
                raise UsageError(f"nothing that it trained ever counted ({type(error).__name__}: {error})") from error
            raise

    return _write_as(model, name, result.state_of(name), exported, folder, "models/")


def _write_as(
    model: Any, name: str, state: Tree, exported: Callable[[], Any], folder: Path, place: str = ""
) -> tuple[dict[str, str], str]:
    (folder / f"{name}.polyfed").write_bytes(wire.to_bytes(Message(trees={"state": state})))
    framework = framework_of(model)
    told = {"framework": framework, "kind": model.kind, "file": f"{name}.polyfed"}
    if framework not in _WRITERS:
        return told, ""
    path = folder / (name + ENDINGS[framework])
    try:
        _WRITERS[framework](exported(), path)
    except UsageError as error:
        path.unlink(missing_ok=True)
        return told, f"{name}: {error}; its state is saved in {place}{name}.polyfed"
    return told | {"file": path.name}, ""


def framework_of(model: Any) -> str:
    """The framework of one of our own adapters, as in `ENDINGS`; "" for an adapter of somebody else's."""
    home = type(model).__module__
    return next((name for name in ENDINGS if home.startswith(f"polyfed.models.{name}")), "")


def _write_keras(model: Any, path: Path) -> None:
    from polyfed.models.keras_file import to_file  # a framework only where it is used

    to_file(model, path)


def _write_sklearn(model: Any, path: Path) -> None:
    from polyfed.models.sklearn_file import to_file  # as above

    to_file(model, path)


_WRITERS: Mapping[str, Callable[[Any, Path], None]] = {"keras": _write_keras, "sklearn": _write_sklearn}


# ---------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True, eq=False, repr=False)
class Saved:
    """What `pf.load` read.

    Attributes:
        state: the server's; ``FedAvg(initial=saved)`` goes on from it.
        memories: client -> what it kept.
        info: everything that `Result.to_dict` says.
        kinds: client -> framework and type name of its model.
        notes: which models a safe format could not hold, and why.
        student_kind: framework, type name and file of the student; empty where the algorithm taught none.
        told_ensemble: what the file says of each client's inputs and preprocessing.
    """

    folder: Path
    state: State = field(repr=False)
    memories: Mapping[str, Memory] = field(repr=False)
    info: Mapping[str, Any] = field(repr=False)
    kinds: Mapping[str, Mapping[str, str]]
    notes: tuple[str, ...] = ()
    student_kind: Mapping[str, str] = field(default_factory=dict)
    told_ensemble: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def metrics(self) -> dict[str, dict[str, float]]:
        """Client -> metrics of its own model on its test rows."""
        return {name: dict(told.get("test", {})) for name, told in self.info.get("clients", {}).items()}

    def state_of(self, name: str) -> Tree:
        """The whole state of a client's model."""
        self._told(name)
        return _read_state(self.folder / "models" / f"{name}.polyfed")

    def model(self, name: str, *, into: Any = None) -> Any:
        """A client's model as its framework's own object.

        Args:
            name: the client's.
            into: for a PyTorch model, a module of the same architecture: files hold no code, so you make the module
                and the saved state is put into it.

        Raises:
            UsageError: no such client; `into` is missing, or the model could not be saved in a safe format.
            SpecError: `into` is of another architecture.
        """
        return self._made(name, self._told(name), self.folder / "models", f"saved.model({name!r}, into=MyNet())", into)

    @property
    def student(self) -> Any:
        """The student that the server taught, as its framework's own object, as `Result.student`.

        Raises:
            UsageError: there is none, it could not be saved in a safe format, or it is a PyTorch model: `student_into`.
        """
        return self._student(None)

    def student_into(self, module: Any) -> Any:
        """A student of PyTorch, put into a module of the same architecture; errors as of `model` with ``into=``."""
        return self._student(module)

    def _student(self, into: Any) -> Any:
        if not self.student_kind:
            raise UsageError(f"{self.folder} holds no student; pf.Distill(student=..., public=...) teaches one")
        return self._made("the student", self.student_kind, self.folder, "saved.student_into(MyNet())", into)

    def ensemble(
        self,
        members: Sequence[str] | str | None = None,
        *,
        weights: Weights = "uniform",
        into: Mapping[str, Any] | None = None,
    ) -> Ensemble:
        """The participants as one, of raw rows: as `Result.ensemble`, of what the folder holds.

        Args:
            members: names of clients; by default all but those of whose training nothing ever counted.
            weights: "uniform", or "num_examples".
            into: client -> a module to fill, for those with a PyTorch model.

        Raises:
            UsageError: a member's preprocessing or model has no safe file format, or it needs `into`.
        """
        return saved_ensemble.ensemble_of(self, members, weights, into)

    def __repr__(self) -> str:
        algorithm = self.info.get("algorithm", {})
        name = algorithm.get("name", "a run") if isinstance(algorithm, dict) else "a run"
        rounds, clients = self.info.get("rounds", "?"), len(self.kinds)
        said = f"{rounds} round{'s' * (rounds != 1)}, {clients} client{'s' * (clients != 1)}"
        return f"<Saved {name} in {str(self.folder)!r}: {said}{', a student' if self.student_kind else ''}>"

    def _made(self, who: str, told: Mapping[str, str], folder: Path, call: str, into: Any) -> Any:
        framework, kind = told["framework"], told["kind"]
        path = folder / told["file"]
        if framework == "torch":
            return _torch(who, kind, path, call, into)
        if into is not None:
            raise UsageError(f"{who} is a {framework or kind} model; into= is for PyTorch modules, leave it out")
        if path.suffix == ".polyfed":
            note = next((n for n in self.notes if n.startswith(f"{path.stem}: ")), "")
            raise UsageError(f"{note or f'{who}: a {kind} has no safe file format'}; its entries: {_entries_of(who)}")
        if framework == "keras":
            from polyfed.models.keras_file import from_file  # a framework only where it is used

            return from_file(path)
        from polyfed.models.sklearn_file import from_file as estimator  # as above

        return estimator(path)

    def _told(self, name: str) -> Mapping[str, str]:
        if name not in self.kinds:
            raise UsageError(f"there is no client {name!r} in {self.folder}; there are {', '.join(self.kinds)}")
        return self.kinds[name]

    @cached_property
    def models(self) -> SavedModels:
        """Client -> its model, for those that need nothing else; PyTorch's need `model`, with ``into=``."""
        return SavedModels(self)


def _entries_of(who: str) -> str:
    return 'saved.state.trees["student"]' if who == "the student" else f"saved.state_of({who!r})"


def _torch(who: str, kind: str, path: Path, call: str, into: Any) -> Any:
    if into is None:
        raise UsageError(
            f"{who} is a PyTorch model ({kind}); its code is not in the file, so hand over a module to fill: {call}"
        )
    from polyfed.models.torch_file import into_module  # a framework only where it is used

    if not hasattr(into, "named_parameters"):
        raise UsageError(f"into= is a {type(into).__name__}; give a torch.nn.Module, such as into=MyNet()")
    return into_module(_read_state(path), into)


class SavedModels(Mapping[str, Any]):
    """The models of a folder, each read when it is asked for."""

    def __init__(self, saved: Saved) -> None:
        self._saved = saved
        self._made: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._made:
            self._made[name] = self._saved.model(name)
        return self._made[name]

    def __contains__(self, name: object) -> bool:
        return any(name == known for known in self)

    def __iter__(self) -> Iterator[str]:
        return (name for name, told in self._saved.kinds.items() if not told["file"].endswith(".polyfed"))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def load(folder: str | os.PathLike[str]) -> Saved:
    """Reads what `Result.save` wrote. Nothing in the files is executed; models are read when they are asked for.

    Raises:
        StorageError: there is no saved result here.
        CorruptError: a file is damaged, or of another format.
    """
    folder = Path(folder)
    said = _read_json(folder / "result.json")
    kinds = {name: _checked_kind(folder, name, told) for name, told in said["models"].items()}
    return Saved(
        folder=folder,
        state=_read_message(folder / "state.polyfed"),
        memories={name: _read_message(folder / "memories" / f"{name}.polyfed") for name in kinds},
        info=said["result"],
        kinds=kinds,
        notes=tuple(str(note) for note in said["notes"]),
        told_ensemble=told if isinstance(told := said.get("ensemble"), dict) else {},
        student_kind=_checked_kind(folder, STUDENT, said["student"]) if said.get("student") else {},
    )


def _read_json(path: Path) -> dict[str, Any]:
    data = _bytes(path, MAX_JSON)
    try:
        said = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"{path} is no result: {error}") from error
    if not isinstance(said, dict) or said.get("format") != FORMAT:
        raise CorruptError(f"{path} is no result of format {FORMAT}, which this version reads")
    shapes = (("result", dict), ("models", dict), ("notes", list))
    if wrong := [name for name, kind in shapes if not isinstance(said.get(name), kind)]:
        raise CorruptError(f"{path} has no {wrong[0]!r}")
    return said


def _checked_kind(folder: Path, name: str, told: Any) -> Mapping[str, str]:
    """A client's name becomes part of a path, and a file's name too: both are checked, whoever wrote the JSON."""
    if not NAME.fullmatch(name) or not isinstance(told, dict):
        raise CorruptError(f"{folder}/result.json: {name[:80]!r} names no client")
    found = {key: told.get(key) for key in ("framework", "kind", "file")}
    endings = {".polyfed", ENDINGS.get(str(found["framework"]), ".polyfed")}
    if not all(isinstance(value, str) for value in found.values()) or found["file"] not in {name + e for e in endings}:
        raise CorruptError(f"{folder}/result.json: the model of {name} is described by {str(told)[:200]}")
    return {key: str(value) for key, value in found.items()}


def _read_state(path: Path) -> Tree:
    trees = _read_message(path).trees
    if set(trees) != {"state"}:
        raise CorruptError(f"{path} holds {', '.join(trees) or 'nothing'}, no state")
    return trees["state"]


def _read_message(path: Path) -> Message:
    data = _bytes(path, None)
    try:
        return wire.decode(data, replace(wire.DEFAULT_LIMITS, max_bytes=max(len(data), 1)))
    except PeerError as error:
        raise CorruptError(f"{path} is damaged: {error}") from error


def _bytes(path: Path, most: int | None) -> bytes:
    try:
        if most is not None and path.stat().st_size > most:
            raise CorruptError(f"{path} has {path.stat().st_size} bytes, more than {most}")
        return path.read_bytes()
    except FileNotFoundError:
        with suppress(OSError):
            if not path.parent.is_dir():
                raise StorageError(f"there is no folder {path.parent}") from None
        raise StorageError(f"{path} is missing: this is no folder of result.save(DIR)") from None
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror or error}") from error


__all__ = ["Saved", "SavedModels", "framework_of", "load", "save"]
