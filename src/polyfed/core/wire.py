"""A `Message` as bytes and back: the safetensors layout, in exactly one form for each message.

    8 bytes   length of the header, little-endian
    header    JSON in ASCII, padded with spaces until the body starts at a multiple of 64
    body      raw little-endian arrays, without holes, largest element size first

The safetensors library reads such a file: an array's key is "<tree>/<entry>", everything else is text under
``__metadata__``. This reader takes less than JSON, namely what `encode` writes and nothing else: no spare white space,
no second spelling of a name or a number. So whatever decodes, encodes to the same bytes again.

Nothing is executed, and nothing is allocated for a size that is only declared: `header_size` and `peek` judge a message
by its first bytes. Each 4 MiB of body and the header have a crc32, against accidents; it is no signature.
NaN and infinity inside an array pass, since only the round can say whose they are; in `numbers` they do not.
"""

from __future__ import annotations

import json
import math
import re
import sys
import unicodedata
import zlib
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from numbers import Real
from typing import Final

import numpy as np

from polyfed.core.errors import LimitError, MalformedError, UsageError
from polyfed.core.message import Message
from polyfed.core.tree import DTYPES, Array, Entry, Spec, Tree, aligned

VERSION: Final = 1
#: Bytes of body under one checksum.
CHUNK: Final = 4 << 20

_CODES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
}
_DTYPE_OF = {code: dtype for dtype, code in _CODES.items()}

_SEGMENT = r"[A-Za-z0-9_](?:[A-Za-z0-9_.:@#+=,()\[\] -]*[A-Za-z0-9_.:@#+=,()\[\]-])?"
_NAME = re.compile(rf"{_SEGMENT}(?:/{_SEGMENT})*")
_SIZE = re.compile(r"0|[1-9][0-9]{0,18}")
_HEX = re.compile(r"[0-9a-f]+")
_KEY = re.compile(r'"([^"\\]*)":')
_ENTRY = re.compile(
    r',"([^"\\/]*)/([^"\\]*)":\{"dtype":"([^"\\]*)","shape":\[([^\]"]*)\],"data_offsets":\[([^\]"]*)\]\}'
)
_MAGIC = '{"__metadata__":{"polyfed":"'
_JOINERS = "\u200c\u200d"  # the two format characters that words and emoji are spelt with
# None is the beginning of a message: the length of a padded header leaves 56 when divided by 64.
_BEGINNINGS = {
    b"PK": "a zip archive (torch.save, .npz or .keras)",
    **{bytes([0x80, protocol]): "a pickle" for protocol in range(2, 6)},
    b"\x93N": "a .npy file",
    b"\x89H": "an HDF5 file",
    b"\x1f\x8b": "gzip",
    b"\x28\xb5": "zstandard",
}


@dataclass(frozen=True, slots=True)
class Limits:
    """What a reader accepts at most; each is checked before memory is taken for what it bounds.

    Attributes:
        max_bytes: the whole message.
        max_header_bytes: the JSON header.
        max_trees: trees.
        max_entries: arrays in all trees together.
        max_dims: dimensions of one array; numpy's own limit is 64.
        max_name_chars: characters of a tree's, an entry's, a number's or a text's name.
        max_numbers: numbers.
        max_texts: strings in all texts together; a text without strings counts as one.
        max_text_chars: characters in all texts together.
    """

    max_bytes: int = 4 << 30
    max_header_bytes: int = 4 << 20
    max_trees: int = 256
    max_entries: int = 20_000
    max_dims: int = 8
    max_name_chars: int = 256
    max_numbers: int = 4096
    max_texts: int = 16_384
    max_text_chars: int = 1 << 18

    def __post_init__(self) -> None:
        if self.max_dims > 64:
            raise UsageError(f"Limits(max_dims={self.max_dims}): numpy has arrays of at most 64 dimensions")


DEFAULT_LIMITS: Final = Limits()


@dataclass(frozen=True, slots=True)
class Header:
    """What a message says about itself, before its body is there.

    Attributes:
        start: bytes before the body.
        specs: names, dtypes and shapes of each tree.
        numbers: as in `Message`.
        text: as in `Message`.
        checksums: crc32 of each `CHUNK` bytes of body; the last chunk may be shorter.
    """

    start: int
    specs: Mapping[str, Spec]
    numbers: Mapping[str, float] = field(default_factory=dict)
    text: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    checksums: tuple[int, ...] = ()

    @property
    def body(self) -> int:
        """Bytes of the body."""
        return sum(spec.num_bytes for spec in self.specs.values())

    @property
    def size(self) -> int:
        """Bytes of the whole message."""
        return self.start + self.body


def check_name(name: str) -> str:
    """The name itself, if it can travel: letters, digits, ``_ . : @ # + = , ( ) [ ] -``, inner spaces, ``/`` between parts.

    >>> check_name("stats:bn1/mean")
    'stats:bn1/mean'

    Raises:
        MalformedError: it is empty, holds another character or "..", or a part begins with something else than a letter,
            a digit or an underscore.
    """
    if ".." in name or not _NAME.fullmatch(name):
        raise MalformedError(
            f"{_quoted(name)} is no name; names are made of ASCII letters, digits and _ . : @ # + = , ( ) [ ] -, with single "
            "slashes between parts that begin with a letter, a digit or an underscore"
        )
    return name


def encode(message: Message) -> list[memoryview | bytes]:
    """The message's bytes in pieces: the header, then one view of each buffer of each tree, without a copy.

    Raises:
        UsageError: the message holds what `decode` would refuse whatever its limits: a name outside the grammar of
            `check_name`, a number that is not finite, a text with control characters.
    """
    try:
        specs = {_checked_tree(name): tree.spec for name, tree in message.trees.items()}
        blocks = list(_blocks(specs))
        buffers = [message.trees[tree].buffers[dtype].view(np.uint8) for tree, dtype, _, _ in blocks]
        for (tree, dtype, _, _), buffer in zip(blocks, buffers, strict=True):
            _check_values(tree, dtype, buffer)
        views = [buffer.data for buffer in buffers if buffer.size]
        fields = {"trees": "/".join(specs)} | _number_fields(message.numbers) | _text_fields(message.text)
        return [_header(fields, specs, _checksums(views)), *views]
    except MalformedError as error:
        raise UsageError(f"this message cannot be sent: {error}") from None


def size(message: Message) -> int:
    """Bytes that `encode` would make, without looking at the arrays: a fraction of its time.

    Raises:
        UsageError: as `encode`, but for the values in boolean arrays.
    """
    try:
        key = tuple((name, tree.spec.digest) for name, tree in message.trees.items())
        if key not in _SIZES:
            if len(_SIZES) >= _KNOWN_SIZES:
                _SIZES.clear()
            _SIZES[key] = _lengths({_checked_tree(name): tree.spec for name, tree in message.trees.items()})
        header, body = _SIZES[key]
        for name, value in message.numbers.items():
            header += _NUMBER + len(check_name(name)) + len(repr(_exact(name, value)))
        for field_name, text in _text_fields(message.text).items():
            header += _FIELD + len(field_name) + len(json.dumps(text)) - len('""')
        return header + -header % 64 + body
    except MalformedError as error:
        raise UsageError(f"this message cannot be sent: {error}") from None


def to_bytes(message: Message) -> bytes:
    """The message as one object: one copy. `encode` has none."""
    return b"".join(encode(message))


def decode(data: bytes | bytearray | memoryview, limits: Limits = DEFAULT_LIMITS) -> Message:
    """The message in these bytes.

    Its arrays are read-only views of `data`, which must no longer be written to. The body starts at a multiple of 64 and
    is laid out by falling element size, so this holds whenever `data` itself starts at a multiple of 8; where it does
    not, the buffers that lie askew are copied once.

    Raises:
        MalformedError: `data` is no message, is cut off or was changed on its way.
        LimitError: it is larger in some respect than `limits` allow.
    """
    view = memoryview(data).cast("B")
    if len(view) > limits.max_bytes:
        raise _beyond(len(view), "bytes", "max_bytes", limits.max_bytes)
    header = peek(view, limits)
    if len(view) != header.size:
        raise MalformedError(f"{len(view)} bytes are here, the header declares {header.size}")
    body = view[header.start :]
    for index, (got, wanted) in enumerate(zip(_checksums([body]), header.checksums, strict=True)):
        if got != wanted:
            raise MalformedError(f"chunk {index} of the body has crc32 {got:08x}, the header says {wanted:08x}")
    return Message(_trees(header.specs, np.frombuffer(body, np.uint8)), header.numbers, header.text)


def header_size(prefix: bytes | bytearray | memoryview, limits: Limits = DEFAULT_LIMITS) -> int:
    """How many bytes `peek` needs, from the first 8 (more are not looked at).

    Raises:
        MalformedError: fewer than 8 bytes, or a length that no message has.
        LimitError: a longer header than `limits` allow.
    """
    first = bytes(memoryview(prefix)[:8])
    if len(first) < 8:
        raise MalformedError(f"cut off after {len(first)} bytes; a message begins with 8 bytes of length")
    for magic, what in _BEGINNINGS.items():
        if first.startswith(magic):
            raise MalformedError(f"this is {what}, no message; such files are never read")
    length = int.from_bytes(first, "little")
    if length > limits.max_header_bytes:
        raise _beyond(length, "bytes of header", "max_header_bytes", limits.max_header_bytes)
    if (length + 8) % 64:
        raise MalformedError(
            f"a header of {length} bytes; messages pad theirs until the body starts at a multiple of 64"
        )
    return length + 8


def peek(prefix: bytes | bytearray | memoryview, limits: Limits = DEFAULT_LIMITS) -> Header:
    """What a message declares, from its first `header_size` bytes, so that an upload is refused before its body comes.

    Raises:
        MalformedError: this is not the beginning of a message.
        LimitError: what is declared is larger than `limits` allow.
    """
    view = memoryview(prefix).cast("B")
    start = header_size(view, limits)
    if len(view) < start:
        raise MalformedError(f"cut off after {len(view)} bytes, within the header of {start}")
    raw = bytes(view[8:start])
    if not raw.isascii():
        raise MalformedError("the header holds bytes that are not ASCII")
    return _Reader(raw.decode("ascii"), limits).header()


def digest(message: Message) -> str:
    """Hex digest of the content: of names, values, dtypes and shapes, whatever the order or place of trees in memory.

    >>> digest(Message(numbers={"a": 1, "b": 2})) == digest(Message(numbers={"b": 2.0, "a": 1.0}))
    True
    """
    content = (
        sorted((name, tree.digest) for name, tree in message.trees.items()),
        sorted((name, repr(float(value))) for name, value in message.numbers.items()),
        sorted((name, list(strings)) for name, strings in message.text.items()),
    )
    return blake2b(json.dumps(content).encode(), digest_size=32).hexdigest()


# Layout, shared by both directions


def _blocks(specs: Mapping[str, Spec]) -> Iterator[tuple[str, str, int, int]]:
    """Tree, dtype, first byte and end of each buffer in the body: by falling element size, else in the order given."""
    pairs = [(tree, dtype) for tree, spec in specs.items() for dtype in spec.sizes]
    at = 0
    for tree, dtype in sorted(pairs, key=lambda pair: -DTYPES[pair[1]].itemsize):
        end = at + specs[tree].sizes[dtype] * DTYPES[dtype].itemsize
        yield tree, dtype, at, end
        at = end


def _offsets(specs: Mapping[str, Spec]) -> Iterator[tuple[str, str, Entry, int, int]]:
    """Tree, name, entry, first byte and end of every array, in the header's order."""
    begins = {(tree, dtype): begin for tree, dtype, begin, _ in _blocks(specs)}
    for tree, spec in specs.items():
        for name, (dtype, start, stop, _) in spec.places.items():
            begin, item = begins[tree, dtype], DTYPES[dtype].itemsize
            yield tree, name, spec[name], begin + start * item, begin + stop * item


def _checksums(pieces: Iterable[memoryview]) -> tuple[int, ...]:
    """crc32 of every `CHUNK` bytes of the pieces laid end to end."""
    sums: list[int] = []
    room = 0
    for piece in pieces:
        at = 0
        while at < len(piece):
            if not room:
                sums.append(0)
                room = CHUNK
            part = piece[at : at + room]
            sums[-1] = zlib.crc32(part, sums[-1])
            at, room = at + len(part), room - len(part)
    return tuple(sums)


def _check_values(tree: str, dtype: str, raw: Array) -> None:
    """Of all bytes only those of booleans can be wrong: numpy reads anything but 0 and 1 in more than one way."""
    if dtype == "bool" and raw.size and raw.max() > 1:
        raise MalformedError(f"{tree}: a boolean array holds the byte {raw.max()}, expected 0 or 1")


def _checked_tree(name: str) -> str:
    if "/" in check_name(name):
        raise MalformedError(f"{_quoted(name)} is no name of a tree: a slash separates tree and entry")
    return name


# Writing


def _header(fields: Mapping[str, str], specs: Mapping[str, Spec], sums: Sequence[int]) -> bytes:
    before = f'{_MAGIC}{VERSION}"' + "".join(f',"{key}":{json.dumps(value)}' for key, value in fields.items())
    before += ',"crc32":"'
    entries = "".join(
        f',"{tree}/{check_name(name)}":{{"dtype":"{_CODES[entry.dtype]}","shape":[{",".join(map(str, entry.shape))}],'
        f'"data_offsets":[{begin},{end}]}}'
        for tree, name, entry, begin, end in _offsets(specs)
    )
    after = f'"}}{entries}}}'
    hexed = "".join(f"{value:08x}" for value in sums)
    after += " " * (-(16 + len(before) + len(hexed) + len(after)) % 64)
    whole = f"{before}{_header_sum(before, after):08x}{hexed}{after}".encode("ascii")
    return len(whole).to_bytes(8, "little") + whole


#: Bytes that a field adds to the header beside its key and value, and a number beside its name and digits.
_FIELD = len(',"":""')
_NUMBER = _FIELD + len("number/")
_KNOWN_SIZES = 64
_SIZES: dict[tuple[tuple[str, str], ...], tuple[int, int]] = {}


def _lengths(specs: Mapping[str, Spec]) -> tuple[int, int]:
    """Bytes of a header without numbers, texts and padding, and of the body."""
    body = sum(spec.num_bytes for spec in specs.values())
    header = _header({"trees": "/".join(specs)}, specs, [0] * -(-body // CHUNK)).rstrip(b" ")
    return len(header), body


def _header_sum(before: str, after: str) -> int:
    """crc32 of the header without its list of checksums."""
    return zlib.crc32(after.encode("ascii"), zlib.crc32(before.encode("ascii")))


def _number_fields(numbers: Mapping[str, float]) -> dict[str, str]:
    return {f"number/{check_name(name)}": repr(_exact(name, value)) for name, value in numbers.items()}


def _exact(name: str, value: object) -> float:
    if not isinstance(value, Real):
        raise MalformedError(f"number {name} is of type {type(value).__name__}; write float(...)")
    try:
        exact = float(value)
    except OverflowError:
        exact = math.inf
    if not math.isfinite(exact):
        raise MalformedError(f"number {name} is {exact}; numbers are finite")
    if exact != value:
        raise MalformedError(f"number {name} is {value}, which float64 does not hold exactly")
    return exact


def _text_fields(text: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Each string ends in a line feed, which none can hold: () is "", ("",) is one line feed."""
    for name, strings in text.items():
        if isinstance(strings, str):
            raise MalformedError(f"text {name} is one string, expected a tuple of them")
        for string in strings:
            _check_string(name, string)
    return {f"text/{check_name(name)}": "".join(f"{s}\n" for s in strings) for name, strings in text.items()}


def _check_string(name: str, string: object) -> None:
    if not isinstance(string, str):
        raise MalformedError(f"text {name} holds a {type(string).__name__}, expected strings")
    if not unicodedata.is_normalized("NFC", string):
        raise MalformedError(f"text {name}: {_quoted(string)} is not in Unicode form NFC")
    if string.isprintable():
        return
    for char in string:
        if unicodedata.category(char) in {"Cc", "Cf", "Cs", "Zl", "Zp"} and char not in _JOINERS:
            raise MalformedError(f"text {name} holds the control or direction character U+{ord(char):04X}")


# Reading


class _Reader:
    """Reads one header from left to right; whatever `_header` would not have written ends it."""

    def __init__(self, text: str, limits: Limits) -> None:
        self.text, self.limits = text, limits
        self.at = self.strings = self.chars = 0

    def header(self) -> Header:
        self._version()
        self._take(',"trees":')
        trees = self._tree_names()
        numbers, text = self._fields()
        cut = self.at + 1
        sums = self._string()
        before, after = self.text[:cut], self.text[self.at - 1 :]
        self._take("}")
        specs = self._specs(trees)
        self._take("}")
        padding = self.text[self.at :]
        if len(padding) >= 64 or padding.strip(" "):
            raise self._unexpected("less than 64 spaces and the header's end")
        body = sum(spec.num_bytes for spec in specs.values())
        if len(self.text) + 8 + body > self.limits.max_bytes:
            raise _beyond(len(self.text) + 8 + body, "bytes", "max_bytes", self.limits.max_bytes)
        checksums = _parsed_sums(sums, 1 - (-body // CHUNK))
        if checksums[0] != _header_sum(before, after):
            raise MalformedError("the header does not fit its checksum")
        return Header(len(self.text) + 8, specs, numbers, text, checksums[1:])

    def _version(self) -> None:
        if not self.text.startswith(_MAGIC):
            raise MalformedError(f"the header begins with {_quoted(self.text)}; a message's begins with {_MAGIC}")
        self.at = len(_MAGIC) - 1
        version = self._string()
        if version != str(VERSION):
            raise MalformedError(f"format version {_quoted(version)}; this program reads version {VERSION}")

    def _tree_names(self) -> list[str]:
        listed = self._string()
        count = listed.count("/") + 1 if listed else 0
        if count > self.limits.max_trees:
            raise _beyond(count, "trees", "max_trees", self.limits.max_trees)
        names = listed.split("/") if listed else []
        for name in names:
            self._name(name)
        if len(set(names)) < count:
            raise MalformedError(f"a tree is named twice in {_quoted(listed)}")
        return names

    def _fields(self) -> tuple[dict[str, float], dict[str, tuple[str, ...]]]:
        numbers: dict[str, float] = {}
        text: dict[str, tuple[str, ...]] = {}
        self._take(",")
        while (key := self._key()) != "crc32":
            kind, _, name = key.partition("/")
            if kind not in {"number", "text"} or (kind == "number" and text):
                raise MalformedError(f"unknown or misplaced metadata field {_quoted(key)}")
            if self._name(name) in (numbers if kind == "number" else text):
                raise MalformedError(f"{kind} {name} is there twice")
            if kind == "number":
                self._number(name, numbers)
            else:
                self._strings(name, text)
            self._take(",")
        return numbers, text

    def _number(self, name: str, numbers: dict[str, float]) -> None:
        if len(numbers) >= self.limits.max_numbers:
            raise _beyond(len(numbers) + 1, "numbers or more", "max_numbers", self.limits.max_numbers)
        written = self._string()
        try:
            value = float(written) if len(written) < 32 else math.nan
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or repr(value) != written:
            raise MalformedError(f"number {name} is {_quoted(written)}, expected a finite float64 in its shortest form")
        numbers[name] = value

    def _strings(self, name: str, text: dict[str, tuple[str, ...]]) -> None:
        joined = self._string()
        self.strings += max(joined.count("\n"), 1)  # an empty text counts as one: it takes memory too
        self.chars += len(joined) - joined.count("\n")
        if self.strings > self.limits.max_texts:
            raise _beyond(self.strings, "texts or more", "max_texts", self.limits.max_texts)
        if self.chars > self.limits.max_text_chars:
            raise _beyond(self.chars, "characters of text or more", "max_text_chars", self.limits.max_text_chars)
        if joined and not joined.endswith("\n"):
            raise MalformedError(f"text {name} does not end its last string")
        strings = tuple(joined.split("\n")[:-1])
        for string in strings:
            _check_string(name, string)
        text[name] = strings

    def _specs(self, trees: list[str]) -> dict[str, Spec]:
        entries: dict[str, dict[str, Entry]] = {tree: {} for tree in trees}
        declared: list[tuple[str, str, tuple[int, ...]]] = []
        total = 0
        while self.text.startswith(",", self.at):
            if len(declared) >= self.limits.max_entries:
                raise _beyond(len(declared) + 1, "arrays or more", "max_entries", self.limits.max_entries)
            tree, name, entry, offsets = self._entry(entries)
            if name in entries[tree]:
                raise MalformedError(f"{tree}/{name} is there twice")
            total += entry.num_bytes
            if total > self.limits.max_bytes:
                raise _beyond(total, "bytes or more", "max_bytes", self.limits.max_bytes)
            entries[tree][name] = entry
            declared.append((tree, name, offsets))
        specs = {tree: Spec(named) for tree, named in entries.items()}
        _check_places(specs, declared)
        return specs

    def _entry(self, trees: Container[str]) -> tuple[str, str, Entry, tuple[int, ...]]:
        found = _ENTRY.match(self.text, self.at)
        if not found:
            raise self._unexpected("the description of an array")
        self.at = found.end()
        tree, name, code, shape, offsets = found.groups()
        if tree not in trees:
            raise MalformedError(f"{_quoted(tree)}/{_quoted(name)} belongs to no tree of this message")
        where = f"{tree}/{self._name(name)}"
        if code not in _DTYPE_OF:
            raise MalformedError(f"{where}: unknown dtype {_quoted(code)}; known are {', '.join(_DTYPE_OF)}")
        entry = Entry(_DTYPE_OF[code], self._shape(where, shape, DTYPES[_DTYPE_OF[code]].itemsize))
        if offsets.count(",") != 1:
            raise MalformedError(f"{where}: data_offsets are {_quoted(offsets)}, expected two")
        return tree, name, entry, _sizes(where, offsets)

    def _shape(self, where: str, written: str, item: int) -> tuple[int, ...]:
        count = written.count(",") + 1 if written else 0
        if count > self.limits.max_dims:
            raise _beyond(count, f"dimensions of {where}", "max_dims", self.limits.max_dims)
        shape = _sizes(where, written)
        # numpy bounds the product of all sizes but the zeros: (0, 2**62, 2**62) holds nothing and still cannot exist.
        extent = item * math.prod(max(size, 1) for size in shape)
        if extent > min(self.limits.max_bytes, sys.maxsize):
            raise _beyond(extent, f"bytes of {where}", "max_bytes", self.limits.max_bytes)
        return shape

    def _name(self, name: str) -> str:
        if len(name) > self.limits.max_name_chars:
            raise _beyond(len(name), "characters of a name", "max_name_chars", self.limits.max_name_chars)
        return check_name(name)

    def _key(self) -> str:
        found = _KEY.match(self.text, self.at)
        if not found:
            raise self._unexpected("a metadata field")
        self.at = found.end()
        return found[1]

    def _string(self) -> str:
        """The JSON string here, spelt as `json.dumps` spells it."""
        begin = self.at
        try:
            value, self.at = (
                _STRINGS.raw_decode(self.text, begin) if self.text.startswith('"', begin) else (None, begin)
            )
        except ValueError:
            value = None
        if not isinstance(value, str) or json.dumps(value) != self.text[begin : self.at]:
            raise self._unexpected("a string in its plain spelling")
        return value

    def _take(self, literal: str) -> None:
        if not self.text.startswith(literal, self.at):
            raise self._unexpected(_quoted(literal))
        self.at += len(literal)

    def _unexpected(self, wanted: str) -> MalformedError:
        here = _quoted(self.text[self.at : self.at + 40])
        return MalformedError(f"character {self.at} of the header: expected {wanted}, got {here}")


_STRINGS = json.JSONDecoder()


def _sizes(where: str, written: str) -> tuple[int, ...]:
    parts = written.split(",") if written else []
    for part in parts:
        if not _SIZE.fullmatch(part):
            raise MalformedError(f"{where}: {_quoted(part)} is no size; sizes are 0 to 10**19 in plain digits")
    return tuple(map(int, parts))


def _parsed_sums(written: str, count: int) -> tuple[int, ...]:
    if len(written) != 8 * count or not _HEX.fullmatch(written):
        raise MalformedError(
            f"checksums {_quoted(written)}, expected {8 * count} hexadecimal digits: 8 for the header and for each chunk"
        )
    return tuple(int(written[at : at + 8], 16) for at in range(0, len(written), 8))


def _check_places(specs: Mapping[str, Spec], declared: list[tuple[str, str, tuple[int, ...]]]) -> None:
    """There is one order and one layout, without holes or overlaps, so what is declared must be that one."""
    for (tree, name, _, begin, end), (got_tree, got_name, got) in zip(_offsets(specs), declared, strict=True):
        if (tree, name) != (got_tree, got_name):
            raise MalformedError(
                f"{got_tree}/{got_name} stands where {tree}/{name} is due: trees come one after another"
            )
        if got != (begin, end):
            raise MalformedError(f"{tree}/{name} is declared at {list(got)}, its place is [{begin}, {end}]")


def _trees(specs: Mapping[str, Spec], body: Array) -> dict[str, Tree]:
    buffers: dict[str, dict[str, Array]] = {tree: {} for tree in specs}
    for tree, dtype, begin, end in _blocks(specs):
        _check_values(tree, dtype, body[begin:end])
        buffers[tree][dtype] = _placed(body[begin:end], dtype)
    return {tree: Tree.wrap(spec, buffers[tree]) for tree, spec in specs.items()}


def _placed(raw: Array, dtype: str) -> Array:
    """The bytes as an array of this dtype: a view where they lie on a multiple of the element size, else a copy."""
    item = DTYPES[dtype].itemsize
    if raw.ctypes.data % item == 0:
        return raw.view(DTYPES[dtype])
    out = aligned(raw.size // item, dtype)
    out.view(np.uint8)[:] = raw
    return out


def _beyond(got: int, what: str, limit: str, allowed: int) -> LimitError:
    return LimitError(f"{got} {what}, at most {allowed} are allowed (Limits.{limit})")


def _quoted(text: str) -> str:
    """At most 60 characters of foreign text in ASCII, safe to print and to log."""
    return ascii(text if len(text) <= 60 else f"{text[:60]}...")
