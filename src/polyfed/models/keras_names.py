"""Names of a Keras model's variables, and when two models are one architecture.

Keras numbers the layers that it names itself by how many the process has made ("dense_7"). Names here are numbered by
place in the model instead, so that every process and every call of a factory gives the same.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any

from polyfed.models.keras_backend import config_of, library, quiet


def names_of(model: Any) -> dict[str, Any]:
    """Name -> variable of all that is built, in the order of the model's structure."""
    trained = {id(v) for v in model.trainable_variables}
    norm = library().layers.BatchNormalization
    found: dict[str, Any] = {}
    seen: set[int] = set()
    for path, layer in walk(model, ""):
        inner = {id(v) for child in children(layer) for v in child.weights}
        own = [v for v in layer.weights if id(v) not in inner and id(v) not in seen]
        for name, variable in zip(relative([(v.name, "variable") for v in own]), own, strict=True):
            seen.add(id(variable))
            full = f"{path}/{name}" if path else name
            if id(variable) not in trained:
                moment = {"moving_mean": "mean", "moving_variance": "variance"}.get(variable.name)
                is_moment = moment is not None and isinstance(layer, norm)
                full = f"stats:{path}/{moment}" if is_moment else f"buffers:{full}"
            found[full] = variable
    return found


def children(layer: Any) -> list[Any]:
    return list(layer._flatten_layers(include_self=False, recursive=False))  # noqa: SLF001  # no public walk


def walk(layer: Any, path: str, seen: set[int] | None = None) -> Iterator[tuple[str, Any]]:
    """(path, layer) from the model down, each layer once, named by place."""
    seen = set() if seen is None else seen
    seen.add(id(layer))
    yield path, layer
    below = children(layer)
    names = relative([(child.name, type(child).__name__) for child in below])
    for name, child in zip(names, below, strict=True):
        if id(child) not in seen:
            yield from walk(child, f"{path}/{name}" if path else name, seen)


def relative(named: list[tuple[str, str]]) -> list[str]:
    """Names beside one another; a name that Keras numbered itself ("dense_7") is numbered by place instead."""
    counts: dict[str, int] = {}
    used: set[str] = set()
    result = []
    for name, kind in named:
        stem = re.sub(r"_\d+$", "", name)
        if stem.replace("_", "") == kind.lower().replace("_", ""):
            place = counts.get(stem, 0)
            counts[stem] = place + 1
            name = stem if place == 0 else f"{stem}_{place}"  # noqa: PLW2901  # the loop's own, renamed
        while name in used:
            name += "_"  # noqa: PLW2901  # the loop's own, renamed
        used.add(name)
        result.append(name)
    return result


def kind_of(thing: Any) -> str:
    return f"{type(thing).__module__}.{type(thing).__qualname__}"


def is_plain(model: Any) -> bool:
    """Sequential or functional, no subclass of the user's."""
    return isinstance(model, library().Model) and type(model).__module__.startswith("keras.")


def architecture_of(model: Any) -> Any:
    """A digest of the configuration where it says all about the forward pass, else the object itself."""
    if not is_plain(model):
        return model
    names = {layer.name: path or "model" for path, layer in walk(model, "")}
    with quiet():
        config = library().saving.serialize_keras_object(model)
    if foreign(config):
        return model
    text = json.dumps(renamed(config, names), sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def renamed(config: Any, names: Mapping[str, str]) -> Any:
    if isinstance(config, Mapping):
        dropped = ("compile_config", "build_config", "build_input_shape", "shared_object_id")
        return {k: renamed(v, names) for k, v in config.items() if k not in dropped}
    if isinstance(config, (list, tuple)):
        return [renamed(v, names) for v in config]
    return names.get(config, config) if isinstance(config, str) else config


def foreign(config: Any) -> str:
    """The first thing in a configuration that runs code from outside Keras; empty when there is none."""
    if isinstance(config, Mapping):
        name, module = config.get("class_name"), config.get("module")
        registered = config.get("registered_name")
        if name in ("Lambda", "__lambda__", "TorchModuleWrapper", "TFSMLayer", "JaxLayer", "FlaxLayer"):
            return str(name)
        if isinstance(module, str) and module.split(".")[0] not in ("keras", "builtins"):
            return f"{module}.{name}"
        if isinstance(registered, str) and ">" in registered:
            return registered
        return next((said for value in config.values() if (said := foreign(value))), "")
    if isinstance(config, (list, tuple)):
        return next((said for value in config if (said := foreign(value))), "")
    return ""


def origin_of(factory: Callable[[], Any]) -> Hashable:
    """A function that can be imported is known by its name in every process, another one by itself."""
    module, name = getattr(factory, "__module__", None), getattr(factory, "__qualname__", "<")
    return factory if module in (None, "__main__") or "<" in name else f"{module}.{name}"


def token_of(thing: Any) -> Any:
    """Equal for losses, optimizers and metrics that are configured equally."""
    if isinstance(thing, (list, tuple)):
        return tuple(token_of(each) for each in thing)
    if isinstance(thing, Mapping):
        return tuple((name, token_of(each)) for name, each in thing.items())
    if hasattr(thing, "get_config"):
        config = {name: value for name, value in config_of(thing).items() if name != "name"}
        return type(thing), json.dumps(config, sort_keys=True, default=str)
    return thing  # None, a name or a function
