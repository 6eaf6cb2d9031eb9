"""A message is a value: it never changes, and equal content has an equal digest."""

import dataclasses

import numpy as np
import pytest

from polyfed.core.message import Message
from polyfed.core.tree import Tree


def message() -> Message:
    tree = Tree({"w": np.arange(6, dtype=np.float32).reshape(2, 3), "n": np.array(3, np.int64)})
    return Message({"params": tree, "params#": Tree({"w": np.float32(4)})}, {"loss": 0.5}, {"classes": ("no", "yes")})


def test_put_when_given_parts_adds_and_replaces_without_changing_the_original():
    before = message()
    after = before.put(trees={"soft": Tree()}, numbers={"loss": 0.25, "steps": 7.0}, text={"classes": ("a",)})
    assert before == message()
    assert list(after.trees) == ["params", "params#", "soft"]
    assert after.numbers == {"loss": 0.25, "steps": 7.0}
    assert after.text == {"classes": ("a",)}


def test_put_when_given_nothing_is_equal():
    assert message().put() == message()


def test_only_keeps_the_named_trees_that_there_are_and_all_else():
    message = Message({"a": Tree({"x": 1.0}), "b": Tree({"x": 2.0})}, {"n": 3.0}, {"t": ("u",)})
    assert list(message.only("b", "c", "a").trees) == ["b", "a"]
    assert message.only("b").put(trees={"a": message.trees["a"]}) == message
    assert message.only().numbers == message.numbers


def test_message_when_assigned_to_refuses():
    with pytest.raises(dataclasses.FrozenInstanceError):
        message().numbers = {}


def test_num_bytes_counts_arrays_only():
    assert message().num_bytes == 6 * 4 + 8 + 4
    assert Message().num_bytes == 0


def test_two_messages_never_share_their_defaults():
    assert Message().trees is not Message().trees


CHANGES = {
    "value": lambda m: m.put(trees={"params": m.trees["params"].overlay(Tree({"n": np.array(4, np.int64)}))}),
    "sign of zero": lambda m: m.put(trees={"params": Tree({**m.trees["params"], "w": -m.trees["params"]["w"]})}),
    "tree name": lambda m: Message({"p": m.trees["params"], "params#": m.trees["params#"]}, m.numbers, m.text),
    "extra empty tree": lambda m: m.put(trees={"x": Tree()}),
    "shape": lambda m: m.put(trees={"params": Tree({**m.trees["params"], "w": m.trees["params"]["w"].T})}),
    "number": lambda m: m.put(numbers={"loss": 0.5000001}),
    "number name": lambda m: Message(m.trees, {"Loss": 0.5}, m.text),
    "cut of texts": lambda m: m.put(text={"classes": ("noyes",)}),
    "order of texts": lambda m: m.put(text={"classes": ("yes", "no")}),
    "extra empty text": lambda m: m.put(text={"none": ()}),
}


@pytest.mark.parametrize("what", CHANGES)
def test_digest_when_content_differs_differs(what):
    changed = CHANGES[what](message())
    assert changed.digest != message().digest
    assert changed != message()


def test_digest_when_parts_stand_in_another_order_is_equal():
    m = message().put(numbers={"accuracy": 1.0}, text={"areas": ("a",)})
    other = Message(dict(reversed(m.trees.items())), dict(reversed(m.numbers.items())), dict(reversed(m.text.items())))
    assert other.digest == m.digest
    assert other == m


def test_digest_when_buffers_lie_elsewhere_is_equal():
    tree = Tree({"w": np.arange(5.0)})
    raw = np.zeros(48, np.uint8)
    askew = raw[3:43].view("<f8")
    askew[:] = tree["w"]
    assert Message({"p": Tree.wrap(tree.spec, {"float64": askew})}).digest == Message({"p": tree}).digest


def test_digest_when_pinned_keeps_its_value():
    assert message().digest == "2af80bc2c50ac9f195f31b5163d093458ac3587c4e25bd1cd5e96a1467424c5a"
