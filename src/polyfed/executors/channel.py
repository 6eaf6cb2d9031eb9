"""Frames between a driver and the worker processes that it started itself, over a Unix socket pair.

The frames are pickles, so a channel is never anything else: it does not listen, has no address, and both of its ends
are made by one `socket.socketpair()`.

    frame := header, the size of each buffer, a pickle, the buffers

Trees travel as their flat buffers, outside the pickle. Buffers of more than 128 KiB together do not go through the
socket: they lie in an unnamed file in memory whose descriptor travels with the frame. Nothing has a name, so nothing
can be left behind, whoever dies. Either way they arrive as copies in 64-byte-aligned memory of the receiver's own.

A spec is sent once per channel. A tree that the other side holds already is sent as a reference to it: the caller says
which (`refs`), and which are to be kept for later (`keep`).
"""

from __future__ import annotations

import io
import os
import pickle  # between a driver and its own workers only, see above
import socket
import struct
import tempfile
from collections import deque
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import numpy as np

from polyfed.core.tree import DTYPES, Array, Entry, Spec, Tree, aligned

HEADER = struct.Struct(
    "<QQQII"
)  # bytes of sizes and pickle, of the pickle alone, of inline buffers; buffers; descriptors
IN_SOCKET = 1 << 17  # measured: from about 100 kB a file is quicker than the socket's small buffer
RECEIVED_AT_ONCE = 1 << 18
MAX_DESCRIPTORS = 16
_CLOSE_ON_EXEC = getattr(socket, "MSG_CMSG_CLOEXEC", 0)

Refs = Mapping[int, int]  # id() of a tree -> the number under which the other side knows it


class Channel:
    """One end of a socket pair; blocking or not as its socket is."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._specs: dict[str, Spec] = {}
        self._arrived = bytearray()
        self._descriptors: deque[int] = deque()
        self._leaving: deque[tuple[memoryview, int | None]] = deque()

    def send(self, value: Any, refs: Refs | None = None, keep: Refs | None = None) -> int:
        """Queues `value` and sends what the socket takes; returns the bytes of its frame.

        Raises:
            Exception: whatever pickle raises for `value`; nothing has been sent then.
        """
        pickler = _Pickler(self._specs, refs or {}, keep or {})
        pickler.dump(value)
        self._specs |= pickler.new_specs
        body = pickler.body.getvalue()
        raws = [buffer.raw() for buffer in pickler.buffers]
        sizes = struct.pack(f"<{len(raws)}Q", *map(len, raws))
        total = sum(map(len, raws))
        in_file = total > IN_SOCKET
        header = HEADER.pack(len(sizes) + len(body), len(body), 0 if in_file else total, len(raws), in_file)
        data = b"".join([header, sizes, body] if in_file else [header, sizes, body, *raws])
        self._leaving.append((memoryview(data), _file_of(raws) if in_file else None))
        self.flush()
        return len(data) + total

    def flush(self) -> bool:
        """Sends what is queued; False when the socket would block. What a dead receiver missed is dropped."""
        while self._leaving:
            data, descriptor = self._leaving[0]
            try:
                sent = self.sock.send(data) if descriptor is None else socket.send_fds(self.sock, [data], [descriptor])
            except BlockingIOError:
                return False
            except (BrokenPipeError, ConnectionResetError):
                self._drop_leaving()
                return True
            if descriptor is not None:
                os.close(descriptor)
            if sent == len(data):
                self._leaving.popleft()
            else:
                self._leaving[0] = (data[sent:], None)
        return True

    def fill(self) -> bool:
        """Takes in what has arrived; False when the other end is gone and everything that it sent has been taken in."""
        try:
            data, descriptors, _, _ = socket.recv_fds(self.sock, RECEIVED_AT_ONCE, MAX_DESCRIPTORS, _CLOSE_ON_EXEC)
        except BlockingIOError:
            return True
        except ConnectionResetError:
            return False
        self._arrived += data
        self._descriptors.extend(descriptors)
        return bool(data)

    @property
    def has_frame(self) -> bool:
        """A whole frame has arrived."""
        if len(self._arrived) < HEADER.size:
            return False
        head, _, inline, _, _ = HEADER.unpack_from(self._arrived)
        return bool(len(self._arrived) >= HEADER.size + head + inline)

    def take(self, refs: MutableMapping[int, Tree] | None = None) -> Any:
        """The value of the first frame that has arrived; trees to be kept are added to `refs`."""
        head, pickled, inline, count, in_file = HEADER.unpack_from(self._arrived)
        frame = bytes(memoryview(self._arrived)[HEADER.size : HEADER.size + head + inline])
        del self._arrived[: HEADER.size + len(frame)]
        sizes = struct.unpack_from(f"<{count}Q", frame)
        start = 8 * count + pickled
        buffers = _read_file(self._descriptors.popleft(), sizes) if in_file else _cut(frame, start, sizes)
        unpickler = _Unpickler(io.BytesIO(frame[8 * count : start]), buffers, self._specs, {} if refs is None else refs)
        return unpickler.load()

    def receive(self, refs: MutableMapping[int, Tree] | None = None) -> Any:
        """The next value, waiting for it; raises `EOFError` when the other end is gone."""
        while not self.has_frame:
            if not self.fill():
                raise EOFError
        return self.take(refs)

    def close(self) -> None:
        self._drop_leaving()
        while self._descriptors:
            os.close(self._descriptors.popleft())
        self.sock.close()

    def _drop_leaving(self) -> None:
        for _, descriptor in self._leaving:
            if descriptor is not None:
                os.close(descriptor)
        self._leaving.clear()


class _Pickler(pickle.Pickler):
    """Writes trees and specs as persistent ids; collects buffers beside the pickle."""

    def __init__(self, specs: Mapping[str, Spec], refs: Refs, keep: Refs) -> None:
        self.body = io.BytesIO()
        self.buffers: list[pickle.PickleBuffer] = []
        self.new_specs: dict[str, Spec] = {}
        self._specs, self._refs, self._keep = specs, refs, keep
        super().__init__(self.body, protocol=5, buffer_callback=self.buffers.append)

    def persistent_id(self, value: Any) -> Any:
        kind = type(value)
        if kind is Tree:
            number = self._refs.get(id(value))
            if number is not None:
                return ("held", number)
            flat = [buffer.view(np.uint8) for buffer in value.buffers.values()]
            return ("tree", value.spec, [pickle.PickleBuffer(a.data) for a in flat], self._keep.get(id(value)))
        if kind is Spec:
            digest = value.digest
            if digest in self._specs or digest in self.new_specs:
                return ("spec", digest, None)
            self.new_specs[digest] = value
            return ("spec", digest, [(name, entry.dtype, entry.shape) for name, entry in value.items()])
        return None


class _Unpickler(pickle.Unpickler):
    def __init__(
        self, body: io.BytesIO, buffers: Sequence[Array], specs: dict[str, Spec], refs: MutableMapping[int, Tree]
    ) -> None:
        super().__init__(body, buffers=buffers)
        self._specs, self._refs = specs, refs

    def persistent_load(self, pid: Any) -> Any:
        if pid[0] == "held":
            return self._refs[pid[1]]
        if pid[0] == "spec":
            _, digest, entries = pid
            if digest not in self._specs:
                self._specs[digest] = Spec({name: Entry(dtype, shape) for name, dtype, shape in entries})
            return self._specs[digest]
        _, spec, flat, number = pid
        arrays = zip(spec.sizes, flat, strict=True)
        tree = Tree.wrap(spec, {dtype: np.asarray(a).view(DTYPES[dtype]) for dtype, a in arrays})
        if number is not None:
            self._refs[number] = tree
        return tree


def unnamed_file() -> int:
    """A descriptor of an empty file that has no name: in memory where the system has that, else in the temporary folder."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("polyfed")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def write_all(descriptor: int, data: memoryview | bytes, start: int) -> None:
    """Writes at a position; one call of the system may take less than it is given."""
    view = memoryview(data)
    while view:
        done = os.pwrite(descriptor, view, start)
        view, start = view[done:], start + done


def _file_of(raws: Sequence[memoryview]) -> int:
    descriptor, start = unnamed_file(), 0
    for raw in raws:
        write_all(descriptor, raw, start)
        start += len(raw)
    return descriptor


def _read_file(descriptor: int, sizes: Sequence[int]) -> list[Array]:
    try:
        buffers, start = [], 0
        for size in sizes:
            buffer, done = aligned(size, "uint8"), 0
            while done < size:
                done += os.preadv(descriptor, [buffer.data[done:]], start + done)
            buffers.append(buffer)
            start += size
        return buffers
    finally:
        os.close(descriptor)


def _cut(frame: bytes, start: int, sizes: Sequence[int]) -> list[Array]:
    buffers = []
    for size in sizes:
        buffer = aligned(size, "uint8")
        buffer[:] = np.frombuffer(frame, np.uint8, size, start)
        buffers.append(buffer)
        start += size
    return buffers
