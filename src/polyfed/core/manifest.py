"""How a run is announced: by data. A name selects out of the site's own registry; it never imports, and nothing executes.

What a manifest may hold is closed: the fields of `Manifest`, and for the algorithm the dataclass fields of the class that
the site itself has under that name. A field that is unknown, missing, of another type or beyond its limit is refused in
a sentence; so are duplicate keys, NaN and infinity, which JSON readers let pass.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, Literal, TypeVar, Union

from polyfed.core.algorithm import Algorithm
from polyfed.core.errors import LimitError, MalformedError, PeerError, UsageError
from polyfed.core.rows import Problem

MAX_BYTES = 1 << 20
MAX_TEXT = 1 << 12
MAX_ITEMS = 1 << 14
MAX_INT = 1 << 63
FORMAT = 1

Json = Any  # None, bool, int, float, str, lists and dicts of them
Kind = TypeVar("Kind")


def manifest_of(algorithm: Algorithm) -> dict[str, Json]:
    """An algorithm as data: ``{"name": ..., "params": {field: value}}``, without its local fields.

    Guarantees: ``build(manifest_of(a), registry)`` equals `a` but for its local fields, also after a trip through JSON.

    Raises:
        UsageError: a field is not a number, text, boolean, None, or a tuple of those, and is not marked local.
    """
    params = {}
    for name, hint in _schema(type(algorithm)).items():
        value = getattr(algorithm, name)
        try:
            _checked(value, hint, name)
        except PeerError as error:
            raise UsageError(
                f"{algorithm.name} cannot be announced: {error}; mark the field with "
                'field(metadata={"local": True}) if it stays at this machine'
            ) from error
        params[name] = _plain(value)
    return {"name": algorithm.name, "params": params}


def build(manifest: Mapping[str, Json], registry: Mapping[str, type[Algorithm]]) -> Algorithm:
    """The algorithm that a manifest describes, made by the class that `registry` holds under its name.

    Raises:
        PeerError: the name is not in the registry; the message lists what is.
        MalformedError: a field is unknown, missing or of the wrong type, or the class itself refuses a value.
        LimitError: a text, a list or a number beyond its limit.
    """
    _exactly(manifest, ("name", "params"), "an algorithm's manifest")
    name, params = manifest["name"], manifest["params"]
    if not isinstance(name, str) or name not in registry:
        shown = repr(name)[:80]
        raise PeerError(f"the algorithm {shown} is not allowed here; allowed are {', '.join(sorted(registry))}")
    kind = registry[name]
    schema = _schema(kind)
    _exactly(params, tuple(schema), name)
    values = {key: _checked(params[key], hint, f"{name}.{key}") for key, hint in schema.items()}
    try:
        return kind(**values)
    except (UsageError, ValueError, TypeError) as error:
        raise MalformedError(f"{name} refuses its parameters: {error}") from error


@dataclass(frozen=True)
class Manifest:
    """What a site is told of a run before it takes part: everything that decides what it would do and send.

    Attributes:
        algorithm: name in the site's registry.
        params: the algorithm's parameters, by field.
        seed: the run's.
        rounds: the most rounds that the run may have.
        classes: class names in the order of the outputs; None for a regression.
        outputs: width of a prediction.
        public: digest of the public rows, order included; "" if there are none.
        specs: group of equal models -> digest of the spec of its shared state.
        transforms: what is done to messages, in order, each as name and params; none exist in this version.
        format: version of this schema.
    """

    algorithm: str
    params: Mapping[str, Json]
    seed: int
    rounds: int
    classes: tuple[str, ...] | None
    outputs: int
    public: str = ""
    specs: Mapping[str, str] = field(default_factory=dict)
    transforms: tuple[Mapping[str, Json], ...] = ()
    format: int = FORMAT

    def __post_init__(self) -> None:
        if self.format != FORMAT:
            raise MalformedError(f"the manifest has format {self.format}, this version reads format {FORMAT}")
        if self.rounds < 1 or self.outputs < 1:
            raise MalformedError(
                f"the manifest has rounds={self.rounds} and outputs={self.outputs}; both are at least 1"
            )
        if self.classes is not None and len(set(self.classes)) != self.outputs:
            raise MalformedError(
                f"{len(self.classes)} class names are not {self.outputs} different ones, one an output"
            )

    @classmethod
    def of(
        cls,
        algorithm: Algorithm,
        problem: Problem,
        *,
        seed: int,
        rounds: int,
        public: str = "",
        specs: Mapping[str, str] | None = None,
    ) -> Manifest:
        """The manifest of a run.

        Raises:
            UsageError: no site could read it, such as class names that cannot be printed.
        """
        said, shown = manifest_of(algorithm), dict(specs or {})
        try:
            made = cls(said["name"], said["params"], seed, rounds, problem.classes, problem.outputs, public, shown)
            return cls.from_json(made.to_json())
        except (PeerError, ValueError) as error:
            raise UsageError(f"the run cannot be announced: {error}") from error

    @property
    def problem(self) -> Problem:
        return Problem(self.classes, self.outputs)

    def build(self, registry: Mapping[str, type[Algorithm]]) -> Algorithm:
        """The algorithm, as `build` makes it; refuses transforms, since leaving one out would change what is sent."""
        if self.transforms:
            raise PeerError(f"the run asks for {len(self.transforms)} transforms and this version has none")
        return build({"name": self.algorithm, "params": self.params}, registry)

    def to_json(self) -> bytes:
        """Canonical UTF-8: equal manifests give equal bytes."""
        return to_json(self)

    @classmethod
    def from_json(cls, data: bytes) -> Manifest:
        """Reads what `to_json` wrote.

        Raises:
            MalformedError: not JSON, a duplicate key, or not exactly the fields of a manifest with their types.
            LimitError: longer than 1 MiB, or one of its parts beyond its limit.
        """
        return from_json(cls, data, "the manifest")

    def describe(self) -> str:
        """The manifest for a person, a line a fact."""
        params = ", ".join(f"{name}={value!r}" for name, value in self.params.items())
        asked = f"{self.outputs} classes ({', '.join(self.classes)})" if self.classes else f"{self.outputs} values"
        lines = [
            f"algorithm  {self.algorithm}({params})",
            f"rounds     at most {self.rounds}, seed {self.seed}",
            f"predicts   {asked}",
            f"public     {self.public or 'no public rows'}",
            *(f"model      {group}: {digest}" for group, digest in self.specs.items()),
        ]
        return "\n".join(lines)


def from_json(kind: type[Kind], data: bytes, what: str) -> Kind:
    """A dataclass of plain values from JSON that holds exactly its fields; `what` names the text in messages.

    Raises:
        MalformedError: not JSON, a duplicate key, NaN, or not exactly the fields with their types.
        LimitError: longer than 1 MiB, or one of its parts beyond its limit.
    """
    return from_values(kind, _parsed(data, what), what)


def from_values(kind: type[Kind], values: Json, what: str) -> Kind:
    """As `from_json`, from what a JSON reader made."""
    schema = _hints(kind)
    _exactly(values, tuple(schema), what)
    return kind(**{name: _checked(values[name], hint, name) for name, hint in schema.items()})


def to_json(value: Any) -> bytes:
    """A dataclass of plain values as canonical UTF-8: equal values give equal bytes."""
    values = {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    return json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def _schema(kind: type[Algorithm]) -> dict[str, Any]:
    """Field -> type of an algorithm's announced fields."""
    hints = _hints(kind)
    return {f.name: hints[f.name] for f in _fields(kind) if f.init and not f.metadata.get("local")}


def _hints(kind: type) -> dict[str, Any]:
    try:
        hints = typing.get_type_hints(kind)
    except NameError as error:
        raise UsageError(f"{kind.__name__}: a field's type cannot be found from the class's module: {error}") from error
    return {f.name: hints[f.name] for f in _fields(kind)}


def _fields(kind: Any) -> tuple[dataclasses.Field[Any], ...]:
    if not dataclasses.is_dataclass(kind):
        raise UsageError(f"{kind.__name__} is not a dataclass; write @dataclass(frozen=True) above the class")
    return fields(kind)


def _checked(value: Json, hint: Any, where: str) -> Any:
    """`value` as a value of type `hint`: lists become tuples, whole numbers become floats where a float is meant."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return _one_of(value, inner, where)
    if origin is Literal:
        return _literal(value, inner, where)
    if origin is tuple:
        return _tuple(value, inner, where)
    if origin is Mapping or (isinstance(origin, type) and issubclass(origin, Mapping)):
        return _mapping(value, inner[1], where)
    if hint is Any:
        return _any(value, where)
    return _scalar(value, hint, where)


def _one_of(value: Json, kinds: tuple[Any, ...], where: str) -> Any:
    for kind in kinds:
        try:
            return _checked(value, kind, where)
        except MalformedError:
            continue
    raise MalformedError(f"{where} is {_shown(value)}, expected {' or '.join(map(_name, kinds))}")


def _literal(value: Json, allowed: tuple[Any, ...], where: str) -> Any:
    for known in allowed:
        if type(value) is type(known) and value == known:
            return known
    raise MalformedError(f"{where} is {_shown(value)}, expected one of {', '.join(map(repr, allowed))}")


def _tuple(value: Json, inner: tuple[Any, ...], where: str) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise MalformedError(f"{where} is {_shown(value)}, expected a list")
    _within(len(value), MAX_ITEMS, f"{where} has {len(value)} items")
    kinds = (inner[0],) * len(value) if inner[1:] == (...,) else inner
    if len(kinds) != len(value):
        raise MalformedError(f"{where} has {len(value)} items, expected {len(kinds)}")
    return tuple(_checked(item, kind, f"{where}[{i}]") for i, (item, kind) in enumerate(zip(value, kinds, strict=True)))


def _mapping(value: Json, kind: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise MalformedError(f"{where} is {_shown(value)}, expected an object")
    _within(len(value), MAX_ITEMS, f"{where} has {len(value)} fields")
    return {_scalar(name, str, where): _checked(item, kind, f"{where}.{name[:80]}") for name, item in value.items()}


def _any(value: Json, where: str) -> Json:
    if isinstance(value, Mapping):
        return _mapping(value, Any, where)
    if isinstance(value, (list, tuple)):
        return list(_tuple(value, (Any, ...), where))
    return _scalar(value, type(value), where)


def _scalar(value: Json, kind: Any, where: str) -> Any:
    if kind not in (bool, int, float, str, type(None)):
        raise MalformedError(f"{where} is of type {_name(kind)}, which cannot be announced")
    if kind is float and type(value) is int:
        return float(_whole(value, where))
    if type(value) is not kind:
        raise MalformedError(f"{where} is {_shown(value)}, expected {_name(kind)}")
    if isinstance(value, str):
        _text(value, where)
    elif type(value) is int:
        _whole(value, where)
    elif isinstance(value, float) and not math.isfinite(value):
        raise MalformedError(f"{where} is {value}, expected a finite number")
    return value


def _text(value: str, where: str) -> None:
    _within(len(value), MAX_TEXT, f"{where} has {len(value)} characters")
    if not value.isprintable():  # control characters and lone surrogates: what is printed for a person to judge
        raise MalformedError(f"{where} holds a character that cannot be printed")


def _whole(value: int, where: str) -> int:
    if not -MAX_INT <= value < MAX_INT:
        raise LimitError(f"{where} does not fit 64 bits")
    return value


def _within(got: int, limit: int, what: str) -> None:
    if got > limit:
        raise LimitError(f"{what}, the limit is {limit}")


def _exactly(values: Json, names: tuple[str, ...], what: str) -> None:
    """Refuses anything but an object with these fields."""
    if not isinstance(values, Mapping):
        raise MalformedError(f"{what} is {_shown(values)}, expected an object")
    known = ", ".join(names) or "none"
    if extra := [name for name in values if name not in names]:
        raise MalformedError(f"{what} has no field {_shown(extra[0])}; it has {known}")
    if missing := [name for name in names if name not in values]:
        raise MalformedError(f"{what} lacks {missing[0]}; it has {known}")


def _plain(value: Any) -> Json:
    """Tuples to lists, for JSON."""
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _name(kind: Any) -> str:
    named = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", type(None): "null"}
    if typing.get_origin(kind) is tuple:
        return "a list"
    return named.get(kind) or getattr(kind, "__name__", None) or str(kind)


def _shown(value: Any) -> str:
    text = repr(value) if isinstance(value, (str, int, float, bool, type(None))) else type(value).__name__
    return text if len(text) <= 80 else text[:77] + "..."


def _parsed(data: bytes, what: str) -> Json:
    _within(len(data), MAX_BYTES, f"{what} has {len(data)} bytes")
    try:
        return json.loads(
            bytes(data).decode(),
            object_pairs_hook=partial(_once, what),
            parse_constant=partial(_no_constant, what),
            parse_float=partial(_finite, what),
        )
    except (ValueError, RecursionError) as error:
        raise MalformedError(f"{what} is not JSON: {str(error)[:200]}") from error


def _once(what: str, pairs: Iterable[tuple[str, Json]]) -> dict[str, Json]:
    values: dict[str, Json] = {}
    for name, value in pairs:
        if name in values:
            raise MalformedError(f"{what} has the field {_shown(name)} twice")
        values[name] = value
    return values


def _no_constant(what: str, name: str) -> Json:
    raise MalformedError(f"{what} holds {name}, which is no number")


def _finite(what: str, text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise MalformedError(f"{what} holds {text[:80]}, which is not finite")
    return value
