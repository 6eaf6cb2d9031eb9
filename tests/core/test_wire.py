"""The codec: bit-exact both ways, one form for each message, and hostile bytes cost nothing and never crash."""

import json
import pickle
import re
import tracemalloc
import zlib
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from polyfed.core import wire
from polyfed.core.errors import LimitError, MalformedError, PeerError, UsageError
from polyfed.core.message import Message
from polyfed.core.tree import DTYPES, Entry, Spec, Tree
from polyfed.core.wire import Limits, check_name, decode, encode, header_size, peek, to_bytes

deterministic = settings(derandomize=True, deadline=None, max_examples=60)


def small() -> Message:
    """One of everything, about a kilobyte."""
    params = Tree(
        {
            "base.0.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
            "stats:bn1/mean": np.array([0.5, np.nan]),
            "mask": np.array([True, False, True]),
        }
    )
    return Message(
        {"params": params, "params#": Tree({"base.0.weight": np.float32(4)}), "none": Tree()},
        {"loss": -0.0, "num_examples": 303.0},
        {"classes": ("no", "ja, natürlich", ""), "empty": ()},
    )


def body_of(dtype: str) -> st.SearchStrategy[np.ndarray]:
    """Arrays of any bytes at all: NaNs with payloads, denormals, -0.0."""
    item = DTYPES[dtype].itemsize
    shapes = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)
    top = 1 if dtype == "bool" else 255

    def filled(shape: tuple[int, ...], data: st.DrawFn) -> np.ndarray:
        raw = data(hnp.arrays(np.uint8, int(np.prod(shape)) * item, elements=st.integers(0, top)))
        return raw.view(DTYPES[dtype]).reshape(shape)

    return st.composite(lambda draw: filled(draw(shapes), draw))()


entry_names = st.from_regex(
    re.compile(r"(stats:|buffers:)?[a-zA-Z_][a-z0-9_.#@-]{0,6}(/[a-z0-9]{1,4})?", re.ASCII), fullmatch=True
)
entry_names = entry_names.filter(lambda name: ".." not in name)
tree_names = st.from_regex(re.compile(r"[a-z]{1,5}[#@]?", re.ASCII), fullmatch=True)
texts = st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "S")), max_size=6).filter(
    lambda text: wire.unicodedata.is_normalized("NFC", text)
)
trees = st.dictionaries(entry_names, st.sampled_from(list(DTYPES)).flatmap(body_of), max_size=4).map(Tree)
messages = st.builds(
    Message,
    st.dictionaries(tree_names, trees, max_size=3),
    st.dictionaries(entry_names, st.floats(allow_nan=False, allow_infinity=False), max_size=3),
    st.dictionaries(entry_names, st.lists(texts, max_size=3).map(tuple), max_size=2),
)


# Forging: a header with any text in place of the true one, and with checksums that fit, so that the rule itself is reached


def forged(message: Message, *changes: tuple[str, str], body: bytes | None = None) -> bytes:
    data = to_bytes(message)
    start = header_size(data)
    text = data[8:start].decode().rstrip(" ")
    for old, new in changes:
        assert text.count(old) == 1, (old, text)
        text = text.replace(old, new)
    return framed(text, data[start:] if body is None else body)


def framed(text: str, body: bytes = b"") -> bytes:
    found = re.search(r'(?<="crc32":")[0-9a-f]*', text)
    assert found
    sums = "".join(f"{zlib.crc32(body[at : at + wire.CHUNK]):08x}" for at in range(0, len(body), wire.CHUNK))
    before, after = text[: found.start()], text[found.end() :]
    after += " " * (-(16 + len(before) + len(sums) + len(after)) % 64)
    header = f"{before}{zlib.crc32((before + after).encode('latin-1')):08x}{sums}{after}".encode("latin-1")
    return len(header).to_bytes(8, "little") + header + body


def header(entries: str = "", fields: str = "", trees: str = "p") -> str:
    return f'{{"__metadata__":{{"polyfed":"1","trees":"{trees}"{fields},"crc32":""}}{entries}}}'


def one(shape: str = "[2]", offsets: str = "[0,8]", dtype: str = "F32", name: str = "p/w") -> str:
    return f',"{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}'


def refusal(data: bytes, limits: Limits = wire.DEFAULT_LIMITS) -> PeerError:
    """The error, after a check that it came without memory for what was only declared."""
    tracemalloc.start()
    try:
        with pytest.raises(PeerError) as caught:
            decode(data, limits)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500
    return caught.value


def test_forged_when_nothing_is_changed_is_the_message():
    """The negative control of every test that forges."""
    assert forged(small()) == to_bytes(small())
    data = framed(header(one()), bytes(8))
    assert decode(data) == Message({"p": Tree({"w": np.zeros(2, np.float32)})})


# Round trip


@deterministic
@given(messages)
def test_decode_when_encoded_gives_the_same_bits_order_and_bytes(message):
    data = to_bytes(message)
    back = decode(data)
    assert back == message
    assert back.digest == message.digest
    assert [list(part) for part in (back.trees, back.numbers, back.text)] == [
        list(part) for part in (message.trees, message.numbers, message.text)
    ]
    assert [repr(n) for n in back.numbers.values()] == [repr(float(n)) for n in message.numbers.values()]
    assert to_bytes(back) == data
    assert wire.size(message) == len(data)


@pytest.mark.parametrize("dtype", DTYPES)
@settings(deterministic, max_examples=15)
@given(data=st.data())
def test_decode_when_one_dtype_travels_gives_its_bits(dtype, data):
    array = data.draw(body_of(dtype))
    back = decode(to_bytes(Message({"p": Tree({"w": array})}))).trees["p"]["w"]
    assert (back.dtype, back.shape, back.tobytes()) == (array.dtype, array.shape, array.tobytes())


def test_decode_when_the_message_is_empty_is_empty():
    assert decode(to_bytes(Message())) == Message()
    assert decode(to_bytes(Message({"p": Tree(), "q": Tree({"w": np.zeros((0, 3))})}))).trees["q"]["w"].shape == (0, 3)


def test_size_when_a_message_cannot_be_sent_refuses_as_encode_does():
    for message in (Message(numbers={"a": float("inf")}), Message({"a b/": Tree()}), Message(text={"a": ("\x00",)})):
        for function in (wire.size, wire.encode):
            with pytest.raises(UsageError, match="this message cannot be sent"):
                function(message)


def test_decode_when_the_body_has_many_chunks_checks_each(monkeypatch):
    monkeypatch.setattr(wire, "CHUNK", 64)
    message = Message(
        {"p": Tree({"a": np.arange(37.0), "b": np.arange(11, dtype=np.int8)}), "q": Tree({"c": np.arange(50.0)})}
    )
    data = bytearray(to_bytes(message))
    assert len(peek(data).checksums) == -(-message.num_bytes // 64)
    assert decode(data) == message
    monkeypatch.setattr(wire, "_SIZES", {})
    assert wire.size(message) == len(data)
    data[header_size(data) + 64 * 7] ^= 1
    with pytest.raises(MalformedError, match="chunk 7 of the body has crc32"):
        decode(data)


@deterministic
@given(st.lists(st.binary(max_size=20), max_size=8))
def test_checksums_when_the_body_comes_in_pieces_do_not_depend_on_the_cuts(pieces):
    body = b"".join(pieces)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wire, "CHUNK", 8)
        wanted = tuple(zlib.crc32(body[at : at + 8]) for at in range(0, len(body), 8))
        assert wire._checksums([memoryview(piece) for piece in pieces]) == wanted


def test_numbers_when_numpy_or_int_become_the_same_float64():
    sent = Message(numbers={"a": 3, "b": np.float32(0.1), "c": np.int64(2**53), "d": True, "e": 5e-324, "f": 1e22})
    assert decode(to_bytes(sent)).numbers == {
        "a": 3.0, "b": float(np.float32(0.1)), "c": 2.0**53, "d": 1.0, "e": 5e-324, "f": 1e22,
    }  # fmt: skip


def test_arrays_that_are_not_finite_pass_the_codec():
    message = Message({"p": Tree({"w": np.array([np.nan, np.inf, -np.inf, -0.0])})})
    assert decode(to_bytes(message)) == message


def test_layout_when_read_as_safetensors_is_one():
    """The rules of that library's reader, restated: sorted by offset there is no hole, and every size fits."""
    data = to_bytes(small())
    length = int.from_bytes(data[:8], "little")
    declared = json.loads(data[8 : 8 + length])
    metadata = declared.pop("__metadata__")
    assert all(isinstance(value, str) for value in metadata.values())
    bits = {"F64": 8, "F32": 4, "BOOL": 1}
    at = 0
    for name, info in sorted(declared.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = info["data_offsets"]
        assert begin == at
        assert end - begin == int(np.prod(info["shape"])) * bits[info["dtype"]], name
        at = end
    assert 8 + length + at == len(data)
    begin, end = declared["params#/base.0.weight"]["data_offsets"]
    assert np.frombuffer(data[8 + length + begin : 8 + length + end], "<f4") == 4


def test_bytes_when_pinned_keep_their_form():
    message = Message({"p": Tree({"w": np.array([1, 2], np.int16)})}, {"n": 1}, {"t": ("ä",)})
    assert (
        to_bytes(message)
        == b'\xb8\x00\x00\x00\x00\x00\x00\x00{"__metadata__":{"polyfed":"1","trees":"p","number/n":"1.0","text/t":"\\u00e4\\n","crc32":"57b98f7babcedafb"},"p/w":{"dtype":"I16","shape":[2],"data_offsets":[0,4]}}                     \x01\x00\x02\x00'
    )


# No copies


def test_encode_when_called_copies_no_buffer():
    message = small()
    pieces = [np.frombuffer(piece, np.uint8) for piece in encode(message)[1:]]
    buffers = [buffer for tree in message.trees.values() for buffer in tree.buffers.values()]
    assert len(pieces) == len(buffers) == 4
    assert all(any(np.shares_memory(piece, buffer) for piece in pieces) for buffer in buffers)


def test_encode_and_decode_when_measured_take_memory_for_the_header_only():
    message = Message({"p": Tree({"w": np.zeros(3_000_000, np.float32)})})
    data = to_bytes(message)
    tracemalloc.start()
    encode(message)
    decode(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000


def test_decode_when_aligned_gives_read_only_views_of_what_was_received():
    message = Message(
        {"a": Tree({"m": np.array([True]), "w": np.arange(3.0)}), "b": Tree({"i": np.arange(5, dtype=np.int16)})}
    )
    raw = bytearray(to_bytes(message))
    for data in (raw, bytes(raw), memoryview(raw)):
        back = decode(data)
        arrays = [array for tree in back.trees.values() for array in tree.values()]
        assert all(np.shares_memory(array, np.frombuffer(data, np.uint8)) for array in arrays)
        assert not any(array.flags.writeable for array in arrays)
        assert all(array.flags.aligned for array in arrays)


@pytest.mark.parametrize("shift", range(1, 9))
def test_decode_when_misaligned_is_equal_and_aligned(shift):
    raw = bytes(shift) + to_bytes(small())
    back = decode(memoryview(raw)[shift:])
    assert back == small()
    assert all(array.flags.aligned for tree in back.trees.values() for array in tree.values())


# Damage


def test_decode_when_cut_at_any_byte_refuses():
    data = to_bytes(small())
    for length in range(len(data)):
        with pytest.raises(MalformedError, match=r"cut off|bytes are here"):
            decode(data[:length])


def test_decode_when_any_bit_of_any_byte_flips_refuses():
    data = to_bytes(small())
    for at in range(len(data)):
        for mask in (1, 2, 4, 8, 16, 32, 64, 128, 255):
            flipped = bytearray(data)
            flipped[at] ^= mask
            with pytest.raises(PeerError):
                decode(flipped)


@pytest.mark.parametrize("tail", [b"\0", b" ", b"\n", bytes(64)])
def test_decode_when_bytes_follow_refuses(tail):
    with pytest.raises(MalformedError, match="the header declares"):
        decode(to_bytes(small()) + tail)


@settings(deterministic, max_examples=300)
@given(st.binary(max_size=300))
def test_decode_when_bytes_are_random_refuses(data):
    with pytest.raises(PeerError):
        decode(data)


@settings(deterministic, max_examples=300)
@given(st.binary(max_size=200), st.integers(0, 5))
def test_decode_when_random_bytes_follow_a_true_length_refuses(data, rows):
    length = 64 * rows + 56
    with pytest.raises(PeerError):
        decode(length.to_bytes(8, "little") + data.ljust(length)[:length])


FOREIGN = {
    "pickle": (pickle.dumps([1, 2, 3] * 10), "a pickle"),
    "old pickle": (pickle.dumps([1, 2, 3] * 10, protocol=0), "header"),
    "npy": (b"\x93NUMPY\x01\x00v\x00{'descr': '|O', 'fortran_order': False, 'shape': (4398046511104,), }", "npy"),
    "zip": (b"PK\x03\x04\x14\x00\x00\x00\x08\x00" + bytes(90), "zip"),
    "gzip": (b"\x1f\x8b\x08\x00\x00\x00\x00\x00" + bytes(90), "gzip"),
    "zstd": (b"\x28\xb5\x2f\xfd\x00\x58\x00\x00" + bytes(90), "zstandard"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(90), "HDF5"),
    "json": (b'{"__metadata__":{"polyfed":"1"}}' + bytes(90), "header"),
    "http": (b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", "header"),
    "empty": (b"", "cut off after 0 bytes"),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_decode_when_the_bytes_are_of_another_format_says_so(what, monkeypatch):
    def never(*_):
        raise AssertionError("an unpickler was called")

    data, sentence = FOREIGN[what]
    monkeypatch.setattr(pickle, "loads", never)
    monkeypatch.setattr(pickle, "Unpickler", never)
    assert sentence in str(refusal(data))


# Declarations: header is otherwise sound and its checksum fits


LIE = {
    "huge array": (header(one(f"[{10**12}]", f"[0,{4 * 10**12}]")), LimitError, "4000000000000 bytes of p/w"),
    "overflow": (header(one(f"[{2**40},{2**40}]", "[0,8]")), LimitError, f"{2**82} bytes of p/w"),
    "wrap to 8": (header(one(f"[{2**62},4]", "[0,0]")), LimitError, "bytes of p/w"),
    "zero times huge": (header(one(f"[0,{2**62},{2**62}]", "[0,0]")), LimitError, "bytes of p/w"),
    "many large": (header("".join(one(f"[{2**29}]", "[0,0]", name=f"p/w{i}") for i in range(9))), LimitError, "bytes"),
    "huge int": (header(one(f"[{10**400}]")), MalformedError, "is no size"),
    "negative": (header(one("[-2]")), MalformedError, "'-2' is no size"),
    "two negatives": (header(one("[-2,-1]")), MalformedError, "'-2' is no size"),
    "float size": (header(one("[2.0]")), MalformedError, "'2.0' is no size"),
    "exponent": (header(one("[2e0]")), MalformedError, "'2e0' is no size"),
    "leading zero": (header(one("[02]")), MalformedError, "'02' is no size"),
    "NaN size": (header(one("[NaN]")), MalformedError, "'NaN' is no size"),
    "missing size": (header(one("[2,]")), MalformedError, "'' is no size"),
    "nested size": (header(one("[[2]]")), MalformedError, "expected the description of an array"),
    "null shape": (header(one("null")), MalformedError, "expected the description of an array"),
    "text shape": (header(one('["2"]')), MalformedError, "expected the description of an array"),
    "superscript digit": (header(one("[\xb2]")), MalformedError, "not ASCII"),
    "many dims": (header(one(f"[{','.join('1' * 9)}]", "[0,4]")), LimitError, "9 dimensions of p/w"),
    "a million dims": (header(one(f"[{'1,' * 50_000}1]", "[0,4]")), LimitError, "50001 dimensions of p/w"),
    "hole before": (header(one(offsets="[4,12]")), MalformedError, "declared at [4, 12], its place is [0, 8]"),
    "overlap": (header(one() + one(name="p/v")), MalformedError, "p/v is declared at [0, 8], its place is [8, 16]"),
    "hole between": (header(one() + one(offsets="[9,17]", name="p/v")), MalformedError, "its place is [8, 16]"),
    "order": (header(one(offsets="[8,16]") + one(name="p/v")), MalformedError, "its place is [0, 8]"),
    "end before begin": (header(one(offsets="[8,0]")), MalformedError, "its place is [0, 8]"),
    "too short": (header(one(offsets="[0,4]")), MalformedError, "its place is [0, 8]"),
    "negative offset": (header(one(offsets="[-8,0]")), MalformedError, "'-8' is no size"),
    "three offsets": (header(one(offsets="[0,8,8]")), MalformedError, "expected two"),
    "no offsets": (header(one(offsets="[]")), MalformedError, "expected two"),
    "unknown dtype": (header(one(dtype="F8_E4M3")), MalformedError, "p/w: unknown dtype 'F8_E4M3'; known are F64"),
    "object dtype": (header(one(dtype="O")), MalformedError, "unknown dtype"),
    "lower case dtype": (header(one(dtype="f32")), MalformedError, "unknown dtype"),
    "entry twice": (header(one() + one(offsets="[8,16]")), MalformedError, "p/w is there twice"),
    "unknown tree": (header(one(name="q/w")), MalformedError, "'q'/'w' belongs to no tree"),
    "no tree": (header(one(name="w")), MalformedError, "expected the description of an array"),
    "trees take turns": (
        header(
            one("[0]", "[0,0]", name="a/x") + one("[0]", "[0,0]", name="b/x") + one("[0]", "[0,0]", name="a/y"),
            trees="a/b",
        ),
        MalformedError,
        "b/x stands where a/y is due",
    ),
    "tree twice": (header(trees="p/p"), MalformedError, "a tree is named twice"),
    "empty tree name": (header(trees="p//q"), MalformedError, "'' is no name"),
    "body missing": (header(one()), MalformedError, "expected 16 hexadecimal digits"),
    "unknown field": (header(fields=',"pickle":"x"'), MalformedError, "unknown or misplaced metadata field 'pickle'"),
    "number after text": (header(fields=',"text/t":"","number/n":"1.0"'), MalformedError, "misplaced metadata field"),
    "number twice": (header(fields=',"number/n":"1.0","number/n":"2.0"'), MalformedError, "number n is there twice"),
    "text twice": (header(fields=',"text/n":"","text/n":""'), MalformedError, "text n is there twice"),
    "field not a string": (header(fields=',"number/n":1.0'), MalformedError, "expected a string"),
    "nested field": (header(fields=f',"number/n":{"[" * 200_000}'), MalformedError, "expected a string"),
    "nested objects": (header(fields=',"a":' + '{"a":' * 50_000), MalformedError, "unknown or misplaced"),
    "other spelling": (
        header(fields=',"text/t":"\\u0061\\n"'),
        MalformedError,
        "expected a string in its plain spelling",
    ),
    "bad escape": (header(fields=',"text/t":"\\x"'), MalformedError, "expected a string in its plain spelling"),
    "open string": ('{"__metadata__":{"polyfed":"1","trees":"p', MalformedError, "expected a string"),
    "no comma": (header(fields='"text/t":""'), MalformedError, "expected ','"),
    "space in JSON": (header(entries=" "), MalformedError, "character"),
    "entry has more": (header(one(dtype='F32","evil":"x')), MalformedError, "expected the description of an array"),
    "trailing JSON": (header() + "{}", MalformedError, "less than 64 spaces and the header's end"),
    "wide padding": (header() + " " * 64, MalformedError, "less than 64 spaces and the header's end"),
    "version 2": (
        '{"__metadata__":{"polyfed":"2","crc32":""}}',
        MalformedError,
        "format version '2'; this program reads",
    ),
    "version int": ('{"__metadata__":{"polyfed":1,"crc32":""}}', MalformedError, "the header begins with"),
    "safetensors only": ('{"__metadata__":{"format":"pt","crc32":""}}', MalformedError, "the header begins with"),
    "array": ('["crc32":""]', MalformedError, "the header begins with"),
}


@pytest.mark.parametrize("lie", LIE)
def test_decode_when_a_declaration_lies_refuses_without_taking_memory(lie):
    text, error, sentence = LIE[lie]
    if '"crc32":""' in text:
        data = framed(text)
    else:
        text = text.ljust(-(-(len(text) + 8) // 64) * 64 - 8)
        data = len(text).to_bytes(8, "little") + text.encode()
    caught = refusal(data)
    assert type(caught) is error
    assert sentence in str(caught)


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 2**32, (4 << 20) + 1])
def test_decode_when_the_header_is_declared_huge_refuses(length):
    assert "bytes of header" in str(refusal(length.to_bytes(8, "little") + bytes(100)))


@pytest.mark.parametrize("spaces", [-1, 1, 8, 63, 64, 65, 128])
def test_decode_when_the_header_is_padded_otherwise_refuses(spaces):
    """Each would be a second form of the message, with a checksum that fits."""
    before = '{"__metadata__":{"polyfed":"1","trees":"","crc32":"'
    right = -(16 + len(before) + 3) % 64
    assert right > 0
    after = '"}}' + " " * (right + spaces)
    text = f"{before}{zlib.crc32((before + after).encode()):08x}{after}"
    caught = refusal(len(text).to_bytes(8, "little") + text.encode())
    assert re.search(r"messages pad theirs until|less than 64 spaces", str(caught))


def test_decode_when_a_full_header_is_padded_by_another_64_refuses():
    for length in range(64):
        data = to_bytes(Message(numbers={"n" * (length + 1): 1.0}))
        if data.endswith(b"}"):
            break
    cut = data.index(b'"crc32":"') + 9
    before, after = data[8:cut], data[cut + 8 :] + b" " * 64
    header = before + f"{zlib.crc32(before + after):08x}".encode() + after
    assert "less than 64 spaces" in str(refusal(len(header).to_bytes(8, "little") + header))


def test_decode_when_more_bytes_came_than_allowed_refuses_before_reading_them():
    assert isinstance(refusal(bytes(101), Limits(max_bytes=100)), LimitError)


def test_decode_when_the_checksum_list_is_no_hexadecimal_or_of_another_length_refuses():
    data = to_bytes(small())
    sums = re.search(rb'(?<="crc32":")[0-9a-f]*', data)[0]
    for wrong in (sums.upper().replace(b"0", b"A", 1), b"g" * 16, b"-1234567" * 2):
        assert "checksums" in str(refusal(data.replace(sums, wrong)))
    text = data[8 : header_size(data)].decode().rstrip(" ")
    grown = text.replace(sums.decode(), sums.decode() + "00000000")
    grown = grown.ljust(-(-(len(grown) + 8) // 64) * 64 - 8)
    caught = refusal(len(grown).to_bytes(8, "little") + grown.encode() + data[header_size(data) :])
    assert isinstance(caught, MalformedError)


def test_decode_when_a_boolean_is_no_boolean_refuses():
    message = Message({"p": Tree({"m": np.array([True, False])})})
    assert "a boolean array holds the byte 2" in str(refusal(forged(message, body=b"\x01\x02")))


@pytest.mark.parametrize("number", ["nan", "NaN", "inf", "Infinity", "-Infinity", "1e999", "1", "1.", "01.0", "+1.0", "1.0 ",
                                    "1_0.0", "0x1p3", "", "1e1", "1.0000000000000000000001", "9" * 400, "1E+22", "\u0661.0"])  # fmt: skip
def test_decode_when_a_number_is_not_a_finite_float64_in_its_form_refuses(number):
    written = json.dumps(number)
    caught = refusal(framed(header(fields=f',"number/n":{written}')))
    assert "expected a finite float64 in its shortest form" in str(caught)


@pytest.mark.parametrize(
    "text",
    ["a\u0300", "\x00", "\x1b[31m", "\u202e", "\u2066", "\u200e", "\ufeff", "\u2028", "\x7f", "\x85", "\ud800", "\t"],
)
def test_text_when_it_holds_what_no_person_wrote_is_refused_on_both_sides(text):
    with pytest.raises(UsageError, match="this message cannot be sent: text classes"):
        encode(Message(text={"classes": ("ok", text)}))
    assert "text classes" in str(refusal(framed(header(fields=f',"text/classes":{json.dumps(text + chr(10))}'))))


def test_text_when_it_is_a_word_of_any_script_passes():
    words = ("Größe", "نمی\u200cخواهم", "心臓", "👩\u200d⚕️", "a b", "", "<script>", "'; --")
    assert decode(to_bytes(Message(text={"t": words}))).text["t"] == words


def test_text_when_its_last_string_does_not_end_is_refused():
    assert "does not end its last string" in str(refusal(framed(header(fields=',"text/t":"a\\nb"'))))


# Names


GOOD = ["base.0.weight", "dense/kernel", "stats:bn1/mean", "buffers:bn1/count", "params@cnn", "x#", "_", "0", "a-b", "a,b=(1)[2]",
        "resting bp", "a.", "a+b"]  # fmt: skip
BAD = ["", " ", "a ", " a", "/", "/a", "a/", "a//b", "..", "../a", "a/../b", "a..b", ".", "./a", ".hidden", "-rf", "a/-b", "a\\b", "C:\\x",
       "a\0b", "a\nb", "a\tb", "\x7f", "ä", "а", "a\u202eb", "a'b", 'a"b', "a<b", "a$b", "a;b", "a`b", "a|b", "a*b", "a?b", "~a", "%41",
       "\ud800", "a\n", "＿"]  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_check_name_when_good_gives_it_back_and_it_travels(name):
    assert check_name(name) == name
    message = Message({"p": Tree({name: np.ones(1)})}, {name: 1.0}, {name: ("a",)})
    assert decode(to_bytes(message)) == message


@pytest.mark.parametrize("name", BAD)
def test_check_name_when_hostile_is_refused_everywhere(name):
    with pytest.raises(MalformedError, match="is no name") as caught:
        check_name(name)
    assert str(caught.value).isascii()
    for message in (
        Message({name: Tree()}),
        Message({"p": Tree({name: np.ones(1)})}),
        Message(numbers={name: 1.0}),
        Message(text={name: ()}),
    ):
        with pytest.raises(UsageError, match="is no name"):
            encode(message)
    if name.isascii():
        spelt = json.dumps(name)[1:-1]
        for text in (
            header(trees=spelt) if name else header(trees="/"),
            header(one(name=f"p/{spelt}")),
            header(fields=f',"number/{spelt}":"1.0"'),
            header(fields=f',"text/{spelt}":""'),
        ):
            refusal(framed(text))


def test_tree_name_when_it_holds_a_slash_is_refused():
    with pytest.raises(UsageError, match="'a/b' is no name of a tree"):
        encode(Message({"a/b": Tree()}))


def test_check_name_when_long_takes_linear_time():
    assert check_name("a" * 200_000)
    with pytest.raises(MalformedError):
        check_name("a " * 100_000)
    with pytest.raises(MalformedError):
        check_name("a/" * 100_000)


# Own mistakes


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        (Message(numbers={"loss": float("nan")}), "number loss is nan; numbers are finite"),
        (Message(numbers={"loss": np.float32("inf")}), "number loss is inf"),
        (Message(numbers={"n": 2**53 + 1}), "which float64 does not hold exactly"),
        (Message(numbers={"n": 10**5000}), "number n is inf"),
        (Message(numbers={"n": "1.0"}), "number n is of type str"),
        (Message(numbers={"n": np.ones(1)}), "number n is of type ndarray"),
        (Message(numbers={"n": 1j}), "number n is of type complex"),
        (Message(text={"t": "abc"}), "text t is one string, expected a tuple"),
        (Message(text={"t": (1,)}), "text t holds a int"),
        (Message({"p": Tree({"m": np.array([2], np.uint8).view(bool)})}), "boolean array holds the byte 2"),
    ],
)
def test_encode_when_decode_would_refuse_refuses(message, sentence):
    with pytest.raises(UsageError, match=sentence):
        encode(message)


# Limits


AT = {
    "max_trees": 3,
    "max_entries": 4,
    "max_dims": 2,
    "max_name_chars": 14,
    "max_numbers": 2,
    "max_texts": 4,
    "max_text_chars": 15,
}


def test_limits_when_just_met_pass_and_when_one_lower_refuse():
    data = to_bytes(small())
    at = Limits(**AT, max_bytes=len(data), max_header_bytes=header_size(data) - 8)
    assert decode(data, at) == small()
    for name in Limits.__slots__:
        tighter = replace(at, **{name: getattr(at, name) - 1})
        caught = refusal(data, tighter)
        assert isinstance(caught, LimitError), name
        assert str(caught).endswith(f"at most {getattr(tighter, name)} are allowed (Limits.{name})")


def test_limits_when_many_entries_are_declared_stop_at_the_limit():
    entries = "".join(one("[0]", "[0,0]", name=f"p/{i}") for i in range(30_000))
    data = framed(header(entries))
    with pytest.raises(LimitError, match=r"20001 arrays or more, at most 20000"):
        decode(data)
    with pytest.raises(LimitError, match=r"101 arrays or more, at most 100"):
        decode(data, Limits(max_entries=100))


def test_limits_when_there_are_very_many_empty_texts_take_linear_time():
    fields = "".join(f',"text/{i}":""' for i in range(20_000))
    with pytest.raises(LimitError, match="16385 texts or more"):
        decode(framed(header(fields=fields)))


def test_limits_when_texts_add_up_refuse():
    data = to_bytes(Message(text={"a": ("xx",), "b": ("yy", "z")}))
    assert "5 characters of text or more" in str(refusal(data, Limits(max_text_chars=4)))
    assert "3 texts or more" in str(refusal(data, Limits(max_texts=2)))


def test_limits_when_numpy_cannot_follow_refuse():
    for shape in (f"[0,{2**62},{2**62}]", f"[0,{2**63 - 1}]"):
        assert "bytes of p/w" in str(refusal(framed(header(one(shape, "[0,0]"))), Limits(max_bytes=2**200)))
    with pytest.raises(UsageError, match="numpy has arrays of at most 64 dimensions"):
        Limits(max_dims=65)
    deep = Message({"p": Tree({"w": np.ones((1,) * 64)})})
    assert decode(to_bytes(deep), Limits(max_dims=64)) == deep


# Peek


def test_peek_when_the_body_is_not_there_yet_declares_everything():
    message = small()
    data = to_bytes(message)
    start = header_size(data[:8])
    seen = peek(data[:start])
    assert (seen.start, seen.size, seen.body) == (start, len(data), message.num_bytes)
    assert seen.specs == {name: tree.spec for name, tree in message.trees.items()}
    assert (seen.numbers, seen.text) == (message.numbers, message.text)
    assert seen.checksums == (zlib.crc32(data[start:]),)
    assert peek(data) == seen
    assert start % 64 == 0


def test_peek_when_cut_within_the_header_refuses():
    data = to_bytes(small())
    for length in range(header_size(data)):
        with pytest.raises(MalformedError, match="cut off"):
            peek(data[:length])


def test_peek_when_the_declared_size_is_beyond_the_limit_refuses_before_the_body():
    data = to_bytes(small())
    with pytest.raises(LimitError, match=f"{len(data)} bytes, at most {len(data) - 1} are allowed"):
        peek(data[: header_size(data)], Limits(max_bytes=len(data) - 1))
    spec = Spec({"w": Entry("float32", (2**28,))})
    text = header(one(f"[{2**28}]", f"[0,{2**30}]"))
    sums = "0" * 8 * (2**30 // wire.CHUNK)
    text = text.replace('"crc32":""', f'"crc32":"{sums}"')
    with pytest.raises(LimitError, match=rf"{spec.num_bytes} bytes of p/w, at most 1000000 are allowed"):
        peek(framed(text), Limits(max_bytes=1_000_000))


# Mutants: with a rule taken away, the test that guards it fails


def test_mutant_when_offsets_are_not_compared_is_noticed(monkeypatch):
    monkeypatch.setattr(wire, "_check_places", lambda specs, declared: None)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        test_decode_when_a_declaration_lies_refuses_without_taking_memory("overlap")


def test_mutant_when_the_header_has_no_checksum_is_noticed(monkeypatch):
    monkeypatch.setattr(wire, "_header_sum", lambda before, after: 0)
    with pytest.raises(pytest.fail.Exception):
        test_decode_when_any_bit_of_any_byte_flips_refuses()


def test_mutant_when_zeros_hide_a_huge_shape_is_noticed(monkeypatch):
    monkeypatch.setattr(wire.math, "prod", lambda sizes: 1)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        test_decode_when_a_declaration_lies_refuses_without_taking_memory("zero times huge")


def test_mutant_when_memory_is_taken_first_is_noticed(monkeypatch):
    check = wire._check_places

    def greedy(specs, declared):
        np.empty(1 << 22, np.uint8)
        check(specs, declared)

    monkeypatch.setattr(wire, "_check_places", greedy)
    with pytest.raises(AssertionError):
        test_decode_when_a_declaration_lies_refuses_without_taking_memory("overlap")
