"""Coverage-guided fuzzing of `polyfed.core.wire.decode`, with the checksums made to fit so that the rules behind them are reached.

Run it:      python tests/fuzz/fuzz_wire.py -max_total_time=120
Keep finds:  python tests/fuzz/fuzz_wire.py -merge=1 tests/fuzz/corpus/wire FOLDER_THAT_IT_NAMED
Start over:  python tests/fuzz/fuzz_wire.py --seeds

`test_fuzz_wire.py` replays the corpus without atheris.
"""

import importlib
import re
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np

from polyfed.core import wire
from polyfed.core.errors import PeerError
from polyfed.core.message import Message
from polyfed.core.tree import DTYPES, Tree

CORPUS = Path(__file__).parent / "corpus" / "wire"
WORDS = Path(__file__).parent / "wire.dict"
#: Small enough that a fuzzer can reach each limit within its few kilobytes.
LIMITS = wire.Limits(
    max_bytes=1 << 16, max_header_bytes=1 << 13, max_trees=4, max_entries=20, max_dims=4, max_name_chars=40,
    max_numbers=4, max_texts=6, max_text_chars=64,
)  # fmt: skip


def check(data: bytes) -> str:
    """The property; returns what happened, for the test that the corpus reaches everything."""
    try:
        header = wire.peek(data, LIMITS)
    except PeerError as error:
        assert str(error).isprintable()
        assert len(str(error)) < 600
        header = None
    try:
        message = wire.decode(data, LIMITS)
    except PeerError as error:
        assert str(error).isprintable()
        assert len(str(error)) < 600
        return type(error).__name__
    assert header is not None
    assert header.size == len(data)
    again = wire.to_bytes(message)
    assert again == data, "a second form of the same message was accepted"
    assert wire.decode(again, LIMITS).digest == message.digest
    for tree in message.trees.values():
        assert [array.shape for array in tree.values()] == [entry.shape for entry in tree.spec.values()]
    return "Message"


def mended(data: bytes) -> bytes:
    """The same bytes with padding, length and checksums that fit, if there is a list of checksums to fill."""
    found = re.search(rb'(?<="crc32":")[0-9a-f]*', data[8:])
    end = data.find(b"\n", 8)
    if not found or end < 8 + found.end():
        return data
    before, after, body = data[8 : 8 + found.start()], data[8 + found.end() : end].rstrip(b" "), data[end + 1 :]
    sums = "".join(f"{zlib.crc32(body[at : at + wire.CHUNK]):08x}" for at in range(0, len(body), wire.CHUNK)).encode()
    after += b" " * (-(16 + len(before) + len(sums) + len(after)) % 64)
    text = before + f"{zlib.crc32(before + after):08x}".encode() + sums + after
    return len(text).to_bytes(8, "little") + text + body


def target(data: bytes) -> None:
    """Inputs are fuzzed with a line feed between header and body, where the mender finds it (no header holds one)."""
    check(data)
    check(mended(data))


def parted(message: Message) -> bytes:
    data = wire.to_bytes(message)
    start = wire.header_size(data)
    return data[:start].rstrip(b" ") + b"\n" + data[start:]


def seeds() -> dict[str, bytes]:
    """Messages of each kind, whole and parted for the mender, and beginnings of other formats."""
    every = Tree(
        {
            f"{d}/{i}": np.ones(shape).astype(DTYPES[d])
            for i, (d, shape) in enumerate(zip(DTYPES, [(), (2,), (0, 3), (1, 2)] * 4, strict=False))
        }
    )
    whole = {
        "empty": Message(),
        "dtypes": Message({"params": every}),
        "trees": Message(
            {"a": Tree({"w": np.ones(3, np.float32), "n": np.array(1)}), "a#": Tree({"w": np.float32(1)}), "e": Tree()}
        ),
        "numbers": Message(numbers={"loss": -0.0, "n": 1e22, "x": 5e-324}),
        "texts": Message(text={"classes": ("no", "", "ä\u200dß"), "none": ()}),
        "all": Message({"p": Tree({"stats:bn/mean": np.zeros((2, 2))})}, {"n": 3.0}, {"t": ("a",)}),
        "many trees": Message({f"t{i}": Tree() for i in range(LIMITS.max_trees + 1)}),
        "many dims": Message({"p": Tree({"w": np.ones((1,) * (LIMITS.max_dims + 1))})}),
        "long text": Message(text={"t": ("a" * (LIMITS.max_text_chars + 1),)}),
        "bool": Message({"p": Tree({"m": np.array([True, False])})}),
    }
    other = {
        "pickle": b"\x80\x05\x95" + bytes(20),
        "npy": b"\x93NUMPY\x01\x00" + bytes(20),
        "zip": b"PK\x03\x04" + bytes(20),
        "none": b"",
    }
    return (
        {f"seed-{name.replace(' ', '-')}": wire.to_bytes(message) for name, message in whole.items()}
        | {f"seed-{name.replace(' ', '-')}-parted": parted(message) for name, message in whole.items()}
        | {f"seed-{name}": data for name, data in other.items()}
    )


def main() -> None:
    if "--seeds" in sys.argv:
        for name, data in seeds().items():
            (CORPUS / name).write_bytes(data)
        return
    import atheris

    with atheris.instrument_imports(include=["polyfed.core.wire"]):
        importlib.reload(wire)
    options = [argument for argument in sys.argv[1:] if argument.startswith("-")]
    folders = [argument for argument in sys.argv[1:] if not argument.startswith("-")]
    found = tempfile.mkdtemp(prefix="fuzz_wire_")
    print(f"new inputs go to {folders[0] if folders else found}, crashes to {found}")
    program = f"{sys.executable} {__file__}"  # libFuzzer starts this again, through a shell, to merge
    fixed = ["-max_len=4096", "-timeout=5", f"-artifact_prefix={found}/", f"-dict={WORDS}"]
    atheris.Setup([program, *fixed, *options, *(folders or [found, str(CORPUS)])], target)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
