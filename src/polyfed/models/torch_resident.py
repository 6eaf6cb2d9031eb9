"""One module a process for all clients of one architecture: a client's state goes in and comes out by one copy a dtype.

Parameters, statistics and buffers of the resident module are views of one flat tensor per dtype, in the order of the
state's spec. Only weights of two-dimensional convolutions in channels_last lie in another order inside their own place.
"""

from __future__ import annotations

import copy
import functools
import inspect
import uuid
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from polyfed.core.errors import DataError, UsageError
from polyfed.core.tree import Array, Entry, Spec, Tree, aligned, is_under, part_of

MemoryFormat = Literal["auto", "contiguous", "channels_last"]
NAMES = {
    torch.float64: "float64",
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.int64: "int64",
    torch.int32: "int32",
    torch.int16: "int16",
    torch.int8: "int8",
    torch.uint64: "uint64",
    torch.uint32: "uint32",
    torch.uint16: "uint16",
    torch.uint8: "uint8",
    torch.bool: "bool",
}
DTYPES = {name: dtype for dtype, name in NAMES.items()}


@functools.cache
def one_thread() -> None:
    """Sets torch to one thread a call, once a process: the number of threads decides bits.

    It also costs more than it gains on the models of a federation: measured, 16 times on two busy cores.
    """
    torch.set_num_threads(1)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Sets torch's global generators for a task and puts them back after it."""
    generators = [torch.default_generator]
    if device.type == "cuda":
        torch.cuda.init()  # type: ignore[no-untyped-call]  # torch gives it no types
        generators.append(torch.cuda.default_generators[device.index or 0])
    before = [generator.get_state() for generator in generators]
    for generator in generators:
        generator.manual_seed(seed)
    try:
        yield
    finally:
        for generator, state in zip(generators, before, strict=True):
            generator.set_state(state)


def host(tensor: Tensor) -> Array:
    """A tensor in main memory as a writable numpy array over the same memory, in the dtype that trees use for it."""
    if tensor.dtype == torch.bfloat16:
        import ml_dtypes

        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def copied(array: Array, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A copy in torch's own storage, which starts on a 64-byte boundary."""
    out = torch.empty(array.shape, dtype=dtype)
    host(out)[...] = array
    return out.to(device)


def views(tree: Tree, device: torch.device) -> dict[str, Tensor]:
    """The entries of a tree as tensors over one copy a dtype."""
    flat = {name: copied(buffer, device, DTYPES[name]) for name, buffer in tree.buffers.items()}
    return {name: flat[d][a:b].view(shape) for name, (d, a, b, shape) in tree.spec.places.items()}


class Joined(nn.Module):
    """A shared and a personal module as one: personal(shared(inputs))."""

    def __init__(self, shared: nn.Module, personal: nn.Module) -> None:
        super().__init__()
        self.shared, self.personal = shared, personal

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return self.personal(self.shared(*inputs, **named))


class Source:
    """Where a module comes from: a template to copy, or a factory to call; with an identity that survives a process.

    Models made from the same module object or factory have the same source, and by it the same resident module.
    """

    def __init__(self, parts: Mapping[str, Any], token: str) -> None:
        self.token = token
        self.parts = {name: part if _is_factory(part) else copy.deepcopy(part) for name, part in parts.items()}
        self.is_factory = any(_is_factory(part) for part in parts.values())
        self.original = tuple(parts.values())  # keeps their ids from being given to others
        self.starts: dict[Hashable, Tree] = {}
        _SOURCES[token] = self

    @classmethod
    def of(cls, parts: Mapping[str, Any]) -> Source:
        """The source of these modules or factories; the same one as long as they are the same objects, unchanged."""
        identity = tuple((name, id(part), "" if _is_factory(part) else repr(part)) for name, part in parts.items())
        known = _IDENTITIES.get(identity)
        if known is None:
            known = _IDENTITIES[identity] = cls(parts, uuid.uuid4().hex)
        return known

    def build(self, number: int) -> nn.Module:
        """A module of these parts, whose factories draw their weights with torch's generator at `number`."""
        with seeded(number, torch.device("cpu")):
            return joined({name: _made(part) for name, part in self.parts.items()})

    @functools.cached_property
    def template(self) -> nn.Module:
        """A module of this kind that nobody trains."""
        return self.build(0)

    def __reduce__(self) -> tuple[Callable[..., Source], tuple[Any, ...]]:
        return _known_or_new, (self.parts, self.token)


_SOURCES: weakref.WeakValueDictionary[str, Source] = weakref.WeakValueDictionary()
_IDENTITIES: weakref.WeakValueDictionary[Hashable, Source] = weakref.WeakValueDictionary()


def _known_or_new(parts: Mapping[str, Any], token: str) -> Source:
    return _SOURCES.get(token) or Source(parts, token)


def _is_factory(part: Any) -> bool:
    return not isinstance(part, nn.Module)


def _made(part: Any) -> nn.Module:
    module = part() if _is_factory(part) else part
    if not isinstance(module, nn.Module):
        raise UsageError(f"{part!r} made a {type(module).__name__}, expected a torch.nn.Module")
    return module


def joined(modules: Mapping[str, nn.Module]) -> nn.Module:
    """One module of one or of two; nothing is copied."""
    return Joined(**modules) if len(modules) > 1 else next(iter(modules.values()))


class Resident:
    """The one module that all clients of an architecture take turns in. Not for several threads at once."""

    def __init__(self, template: nn.Module, slots: Slots, device: torch.device, memory_format: MemoryFormat) -> None:
        one_thread()
        self.module = copy.deepcopy(template).to(device)
        self.device, self.memory_format = device, memory_format
        self.kind = kind_of(template)
        self.params = dict(self.module.named_parameters())
        self._buffers = dict(named_buffers(self.module))
        self._owners = _owners(self.module, self._buffers)
        self.first = state_of(self.module, slots)
        self.spec = self.first.spec
        self.float_dtype = next((p.dtype for p in self.params.values() if p.is_floating_point()), torch.float32)
        self.has_conv = any(isinstance(m, (nn.Conv2d, nn.ConvTranspose2d)) for m in self.module.modules())
        self.channels_last = memory_format == "channels_last" or (memory_format == "auto" and self.has_conv)
        self.settled: set[Hashable] = set()
        self._modes: dict[tuple[str, ...], list[nn.Module]] = {}
        self._mode: tuple[bool, tuple[str, ...]] | None = None
        self._lay_out()

    # -------------------------------------------------------------- state
    def _lay_out(self) -> None:
        """Makes every parameter and buffer a view of the flat tensor of its dtype."""
        self.flat = {d: torch.empty(n, dtype=DTYPES[d], device=self.device) for d, n in self.spec.sizes.items()}
        self._host = {
            d: host(f if f.device.type == "cpu" else torch.empty_like(f, device="cpu")) for d, f in self.flat.items()
        }
        self._turned = [
            (d, a, b, shape)
            for name, (d, a, b, shape) in self.spec.places.items()
            if self.channels_last and len(shape) == 4 and name in self.params
        ]
        self.views = {name: self._view(name) for name in self.spec}
        for name, p in self.params.items():
            p.data = self.views[name]
        self.load(self.first)

    def _view(self, name: str) -> Tensor:
        dtype, start, stop, shape = self.spec.places[name]
        flat = self.flat[dtype][start:stop]
        if (dtype, start, stop, shape) in self._turned:
            out, into, height, width = shape
            return flat.view(out, height, width, into).permute(0, 3, 1, 2)
        return flat.view(shape)

    def load(self, state: Tree) -> None:
        """Puts a state into the module."""
        for name, places in self._owners.items():
            for module, attribute in places:
                setattr(module, attribute, self.views[name])
        for dtype, buffer in state.buffers.items():
            np.copyto(self._host[dtype], buffer)
        for dtype, start, stop, (out, into, height, width) in self._turned:
            given = state.buffers[dtype][start:stop].reshape(out, into, height, width)
            self._host[dtype][start:stop].reshape(out, height, width, into)[...] = given.transpose(0, 2, 3, 1)
        if self.device.type != "cpu":
            for dtype, flat in self.flat.items():
                flat.copy_(torch_view(self._host[dtype]))

    def save(self) -> Tree:
        """The module's state, in a copy."""
        self._gather()
        buffers = {}
        for dtype, flat in self.flat.items():
            buffers[dtype] = aligned(flat.numel(), dtype)
            if self.device.type != "cpu":
                torch_view(self._host[dtype]).copy_(flat)
            np.copyto(buffers[dtype], self._host[dtype])
        for dtype, start, stop, (out, into, height, width) in self._turned:
            held = self._host[dtype][start:stop].reshape(out, height, width, into)
            buffers[dtype][start:stop].reshape(out, into, height, width)[...] = held.transpose(0, 3, 1, 2)
        return Tree.wrap(self.spec, buffers)

    def _gather(self) -> None:
        """Copies back what a user's code assigned instead of writing in place."""
        with torch.no_grad():
            for name, p in self.params.items():
                if p.data_ptr() != self.views[name].data_ptr():
                    self.views[name].copy_(p.data)
                    p.data = self.views[name]
            for name, places in self._owners.items():
                held = getattr(*places[0])
                if held is not None and held is not self.views[name]:
                    self.views[name].copy_(held)

    def export(self, state: Tree) -> nn.Module:
        """A module of its own with this state, in main memory, in the usual memory format, in eval mode."""
        self.load(state)
        self.mode(training=False)
        own: dict[int, Any] = {id(self.views[name]): self.views[name].detach().clone() for name in self._owners}
        module = copy.deepcopy(self.module, own).to("cpu")
        for parameter in module.parameters():
            parameter.data = parameter.data.contiguous()
        return module.eval()

    # -------------------------------------------------------------- modes
    def mode(self, *, training: bool, part: tuple[str, ...] = ()) -> None:
        """Training or evaluation; modules whose whole state lies outside of the part stay in evaluation."""
        if self._mode == (training, part):
            return
        self.module.train(training)
        if training and part:
            if part not in self._modes:
                self._modes[part] = self._frozen(part)
            for module in self._modes[part]:
                module.eval()
        self._mode = training, part

    def forget_mode(self) -> None:
        """To be called after code that may have switched modules itself."""
        self._mode = None

    def _frozen(self, part: tuple[str, ...]) -> list[nn.Module]:
        found = []
        for prefix, module in self.module.named_modules():
            held = [name for name in self.spec if prefix and is_under(name, (prefix,))]
            if held and not any(is_under(name, part) for name in held):
                found.append(module)
        return found

    def trained(self, part: tuple[str, ...]) -> list[str]:
        """Names of the parameters that a part trains; raises `UsageError` when there are none."""
        names = [name for name, p in self.params.items() if p.requires_grad and is_under(name, part)]
        if not names:
            tops = sorted({name.partition(".")[0] for name in self.params})
            raise UsageError(
                f"{self.kind} has no parameters to train under {', '.join(part)}; it has {', '.join(tops)}"
            )
        return names

    @property
    def normalises_batches(self) -> bool:
        """Whether some batch normalisation is in training now: it cannot take a batch of one row."""
        return any(isinstance(m, _BatchNorm) and m.training for m in self.module.modules())

    # -------------------------------------------------------------- inputs
    @functools.cached_property
    def parameters_of_forward(self) -> frozenset[str]:
        module = self.module.shared if isinstance(self.module, Joined) else self.module
        return frozenset(inspect.signature(module.forward).parameters)

    def run(self, inputs: Mapping[str, Tensor]) -> Any:
        """The module on a batch: one input as it is, several by name where forward has those names, else as one dict."""
        if len(inputs) == 1:
            for x in inputs.values():
                return self.module(x)
        if self.parameters_of_forward.issuperset(inputs):
            return self.module(**inputs)
        return self.module(dict(inputs))

    def settle(self, inputs: Mapping[str, Tensor], check: Callable[[Any], None], asked: Hashable) -> bool:
        """Tries the module on two rows of every new shape, before anything trains on it; `asked` stands for the check.

        A module that cannot take its images in channels_last (it flattens with ``view``) is laid out in the usual
        format from then on; True says so, and that inputs have to be made again.

        Raises:
            DataError: the module cannot take rows of this shape; the layer, what it takes and what it got are named.
            UsageError: its outputs are not the problem's.
        """
        shapes = asked, tuple((name, x.shape[1:], x.dtype) for name, x in inputs.items())
        if shapes in self.settled:
            return False
        rows = {name: x[:2].clone() for name, x in inputs.items()}
        raw, error = self._try(rows)
        turned = error is not None and self.channels_last and self.memory_format == "auto"
        if turned:
            self._relay(channels_last=False)
            raw, again = self._try({name: x.contiguous() for name, x in rows.items()})
            if again is not None:
                self._relay(channels_last=True)
            error = again
        if error is not None:
            raise DataError(self._complaint(rows, error)) from error
        check(raw)
        self.settled.add(shapes)
        return turned

    def _relay(self, *, channels_last: bool) -> None:
        self.channels_last = channels_last
        self._lay_out()

    def _try(self, rows: Mapping[str, Tensor]) -> tuple[Any, Exception | None]:
        """What the module makes of rows, in evaluation, or the error that it raises."""
        self.mode(training=False)
        try:
            with torch.no_grad(), seeded(0, self.device):
                return self.run(rows), None
        except (RuntimeError, IndexError, ValueError, TypeError) as error:
            return None, error

    def _complaint(self, rows: Mapping[str, Tensor], error: Exception) -> str:
        """Which layer could not take which shape: the last one entered before the error."""
        entered: list[tuple[str, nn.Module, tuple[int, ...]]] = []

        def note(name: str) -> Callable[[nn.Module, Any], None]:
            return lambda module, args: (
                entered.append((name, module, tuple(getattr(args[0], "shape", ())))) if args else None
            )

        leaves = [(name, m) for name, m in self.module.named_modules() if not any(True for _ in m.children())]
        handles = [module.register_forward_pre_hook(note(name)) for name, module in leaves]
        self._try(rows)
        for handle in handles:
            handle.remove()
        given = ", ".join(f"{name} {list(x.shape[1:])}" for name, x in rows.items())
        start = f"{self.kind} cannot take these rows (shape of a row: {given})"
        if not entered:
            return f"{start}: {error}"
        name, module, shape = entered[-1]
        for attribute in ("in_features", "in_channels", "num_features", "input_size"):
            if (wanted := getattr(module, attribute, None)) is not None:
                axis = -1 if attribute in ("in_features", "input_size") else 1
                got = shape[axis] if len(shape) > 1 else "none"
                return (
                    f"{start}: layer {name or self.kind!r} ({type(module).__name__}) takes {wanted} inputs, got {got}"
                )
        return f"{start}: in layer {name!r} ({type(module).__name__}): {error}"


Slots = Mapping[str, Mapping[str, bool]]  # parameter -> slots of the optimizer that are kept, as in Optimizer.slots


def kind_of(module: nn.Module) -> str:
    """The module's own type name; both of a joined one."""
    if isinstance(module, Joined):
        return f"{type(module.shared).__name__} + {type(module.personal).__name__}"
    return type(module).__name__


def named_buffers(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Statistics first, then all other buffers, by the names that a state has for them; each tensor once.

    What is a statistic is decided by the type of the module that holds it, never by a name.
    """
    stats: list[tuple[str, Tensor]] = []
    for prefix, m in module.named_modules():
        if isinstance(m, _NormBase) and m.running_mean is not None and m.running_var is not None:
            stats += [(f"stats:{prefix}/mean", m.running_mean), (f"stats:{prefix}/variance", m.running_var)]
    seen = {id(tensor) for _, tensor in stats}
    return stats + [(f"buffers:{name}", b) for name, b in module.named_buffers() if id(b) not in seen]


def _owners(module: nn.Module, buffers: Mapping[str, Tensor]) -> dict[str, list[tuple[nn.Module, str]]]:
    """Where each buffer hangs in the module; a shared one in several places."""
    names = {id(tensor): name for name, tensor in buffers.items()}
    found: dict[str, list[tuple[nn.Module, str]]] = {name: [] for name in buffers}
    for m in module.modules():
        for attribute, tensor in m.named_buffers(recurse=False, remove_duplicate=False):
            found[names[id(tensor)]].append((m, attribute))
    return found


def optimizer_memory(params: Mapping[str, Tensor], slots: Slots) -> dict[str, Tensor]:
    """Blank memory of a kept optimizer, by the names it has in a state: it lies under its parameter, and is no parameter."""
    return {
        f"buffers:{name}/{slot}": torch.zeros_like(params[name]).detach()
        if alike
        else torch.zeros((), dtype=torch.int64)
        for name, wanted in slots.items()
        for slot, alike in wanted.items()
    }


def tensors_of(module: nn.Module, slots: Slots) -> dict[str, Tensor]:
    """What a module's state is made of: parameters in module order, statistics, other buffers, kept optimizer memory."""
    params = dict(module.named_parameters())
    kind = kind_of(module)
    if wrong := [name for name in params if part_of(name) != "params"]:
        raise UsageError(f"{kind}: a parameter may not be named {wrong[0]!r}: that prefix marks what is not trained")
    if not params:
        raise UsageError(f"{kind} has no parameters to train")
    if lazy := [name for name, p in params.items() if isinstance(p, nn.UninitializedParameter)]:
        raise UsageError(f"{kind}: {lazy[0]!r} has no size yet; run the module on one batch, or give its sizes")
    tensors: dict[str, Tensor] = params | dict(named_buffers(module)) | optimizer_memory(params, slots)
    if odd := [f"{name!r} is {t.dtype}" for name, t in tensors.items() if t.dtype not in NAMES]:
        raise UsageError(f"{kind}: {odd[0]}, which a state cannot hold")
    return tensors


def spec_of(module: nn.Module, slots: Slots) -> Spec:
    """The spec of a module's states."""
    return Spec({name: Entry(NAMES[t.dtype], tuple(t.shape)) for name, t in tensors_of(module, slots).items()})


def state_of(module: nn.Module, slots: Slots) -> Tree:
    """A module's state as it is now, copied."""
    return Tree({name: host(t.detach().cpu().contiguous()) for name, t in tensors_of(module, slots).items()})


def torch_view(array: Array) -> Tensor:
    """A writable numpy array as a tensor over the same memory."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
