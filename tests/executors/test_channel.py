import gc
import os
import socket
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from polyfed.core.message import Message
from polyfed.core.tree import Tree
from polyfed.executors import channel as module
from polyfed.executors.channel import Channel


@pytest.fixture
def ends():
    ours, theirs = map(Channel, socket.socketpair())
    yield ours, theirs
    ours.close()
    theirs.close()


def pass_on(ends, value, sent=None, kept=None, keep=None):
    ends[0].send(value, sent, keep)
    return ends[1].receive(kept)


DTYPES = st.sampled_from([np.float64, np.float32, np.float16, np.int64, np.int8, np.uint16, np.bool_])
ARRAYS = hnp.arrays(DTYPES, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5))
TREES = st.dictionaries(st.text(max_size=6), ARRAYS, max_size=5).map(Tree)
MESSAGES = st.builds(
    Message,
    trees=st.dictionaries(st.text(max_size=6), TREES, max_size=3),
    numbers=st.dictionaries(st.text(max_size=6), st.floats(allow_nan=False), max_size=3),
    text=st.dictionaries(st.text(max_size=6), st.tuples(st.text(max_size=6)), max_size=2),
)


@settings(derandomize=True, max_examples=100, deadline=None)
@given(MESSAGES, st.sampled_from([0, 1 << 20]))
def test_a_message_comes_out_bit_for_bit_through_the_socket_and_through_a_file(message, threshold):
    ours, theirs = map(Channel, socket.socketpair())
    before, module.IN_SOCKET = module.IN_SOCKET, threshold
    try:
        ours.send(message)
        got = theirs.receive()
    finally:
        module.IN_SOCKET = before
        ours.close()
        theirs.close()
    assert got == message
    assert [list(tree) for tree in got.trees.values()] == [list(tree) for tree in message.trees.values()]


@pytest.mark.parametrize("size", [1, 7, 1000, 100_000])
def test_arrays_arrive_aligned_read_only_and_in_memory_of_their_own(ends, size):
    arrays = {"a": np.ones(size, np.float32), "b": np.ones(size, ml_dtypes.bfloat16), "c": np.ones(3, np.int8)}
    tree = Tree(arrays)
    got = pass_on(ends, tree)
    assert got == tree and got["b"].dtype == ml_dtypes.bfloat16
    for dtype, buffer in got.buffers.items():
        assert buffer.ctypes.data % 64 == 0
        assert not buffer.flags.writeable
        assert not np.shares_memory(buffer, tree.buffers[dtype])


def test_a_spec_travels_once(ends):
    first = Tree({f"layer-{i}/weight": np.zeros(1, np.float32) for i in range(200)})
    got = pass_on(ends, first)
    later = ends[0].send(first * 2.0)
    assert later < 2000
    assert ends[1].receive() == first * 2.0
    assert pass_on(ends[::-1], got * 3.0).spec is first.spec


def test_a_kept_tree_is_sent_as_a_reference_the_second_time(ends):
    tree, kept = Tree({"w": np.arange(1000, dtype=np.float32)}), {}
    ends[0].send(tree, keep={id(tree): 5})
    assert ends[1].receive(kept) == tree and kept[5] == tree
    assert ends[0].send([tree, tree], refs={id(tree): 5}) < 200
    again = ends[1].receive(kept)
    assert again[0] is kept[5] and again[1] is kept[5]


def test_a_value_that_cannot_be_pickled_sends_nothing_and_spoils_nothing(ends):
    tree = Tree({"w": np.ones(3, np.float32)})
    with pytest.raises(TypeError):
        ends[0].send([tree, gc.collect, (_ for _ in ())])
    assert pass_on(ends, tree) == tree


def test_frames_that_fill_the_socket_wait_and_then_arrive_in_order(ends):
    ends[0].sock.setblocking(False)
    trees = [Tree({"w": np.full(25_000, i, np.float32)}) for i in range(20)]
    for tree in trees:
        ends[0].send(tree)
    assert not ends[0].flush()
    got = []
    while len(got) < len(trees):
        got.append(ends[1].receive())
        ends[0].flush()
    assert got == trees


def test_a_frame_with_a_file_that_does_not_fit_the_socket_arrives_whole(ends):
    ends[0].sock.setblocking(False)
    value = ("x" * 1_000_000, Tree({"w": np.ones(100_000, np.float32)}))
    ends[0].send(value)
    assert not ends[0].flush()
    while not ends[1].has_frame:
        ends[1].fill()
        ends[0].flush()
    assert ends[1].take() == value


def test_the_end_of_the_other_side_is_told_after_all_it_sent(ends):
    ends[0].send("last")
    ends[0].close()
    assert ends[1].receive() == "last"
    with pytest.raises(EOFError):
        ends[1].receive()


def test_sending_to_a_side_that_is_gone_is_dropped_quietly(ends):
    ends[1].close()
    ends[0].send(Tree({"w": np.zeros(100_000, np.float32)}))
    assert ends[0].flush()


def test_a_file_of_buffers_has_no_name_that_could_be_left_behind():
    descriptor = module.unnamed_file()
    link = str(Path(f"/proc/self/fd/{descriptor}").readlink())
    os.close(descriptor)
    assert link.endswith("(deleted)")


def count_descriptors():
    return len(list(Path("/proc/self/fd").iterdir()))


def test_no_descriptor_stays_open():
    before = count_descriptors()
    for read in (True, False):
        ours, theirs = map(Channel, socket.socketpair())
        for _ in range(3):
            ours.send(Tree({"w": np.zeros(100_000, np.float32)}))
            theirs.fill()
            if read:
                theirs.receive()
        ours.close()
        theirs.close()
    assert count_descriptors() == before
