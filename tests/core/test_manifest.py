"""What a manifest may hold, and what is refused in a sentence."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from polyfed.algorithms import REGISTRY, FedAdam, FedAvg, FedMD, FedProx
from polyfed.core.algorithm import Algorithm
from polyfed.core.errors import LimitError, MalformedError, PeerError, UsageError
from polyfed.core.manifest import MAX_BYTES, MAX_ITEMS, MAX_TEXT, Manifest, build, manifest_of
from polyfed.core.rows import Problem


@dataclass(frozen=True)
class Mine(Algorithm):
    """A user's own algorithm, with every kind of field that may be announced."""

    rate: float = 0.5
    steps: int = 3
    eager: bool = False
    note: str = ""
    limit: float | None = None
    mode: Literal["fast", "slow"] = "fast"
    level: Literal[1, 2] = 1
    widths: tuple[int, ...] = (1, 2)
    pair: tuple[str, float] = ("a", 1.0)
    start: Any = field(default=None, metadata={"local": True}, compare=False)


@dataclass(frozen=True)
class Unfit(Algorithm):
    table: dict = field(default_factory=dict)


MY_REGISTRY = {**REGISTRY, "Mine": Mine}
EXAMPLE = Manifest.of(
    FedProx(mu=0.1, shared="base"),
    Problem(("ill", "healthy"), 2),
    seed=7,
    rounds=20,
    public="ab12",
    specs={"torch": "cd34"},
)


def through_json(manifest):
    return json.loads(json.dumps(manifest))


# ---------------------------------------------------------------- an algorithm as data

#: what cannot be left out
PARTIAL = {name: {"shared": "base"} for name in ("FedBABU", "FedRep")}


@pytest.mark.parametrize("kind", REGISTRY.values(), ids=list(REGISTRY))
def test_algorithm_when_announced_and_built_is_equal(kind):
    algorithm = kind(**PARTIAL.get(kind.__name__, {}))
    assert build(through_json(manifest_of(algorithm)), REGISTRY) == algorithm


@pytest.mark.parametrize(
    "algorithm",
    [
        FedAvg(shared=("base", "encoder.0"), weighting="uniform"),
        FedAdam(lr=1.0, beta1=0.0, tau=0.1),
        FedMD(range(4), temperature=3.0, revisit=2, order="paper", average="logits"),
        Mine(rate=1, limit=2.5, mode="slow", widths=(), pair=("b", 2), start=object()),
    ],
)
def test_algorithm_when_its_parameters_are_set_comes_back_with_them(algorithm):
    built = build(through_json(manifest_of(algorithm)), MY_REGISTRY)
    assert built == algorithm
    assert manifest_of(built) == manifest_of(algorithm)


def test_manifest_when_made_leaves_local_fields_out():
    assert set(manifest_of(FedAvg(initial=object()))["params"]) == {"shared", "weighting"}
    assert "public" not in manifest_of(FedMD([1, 2]))["params"]


def test_manifest_when_whole_numbers_stand_for_floats_gives_floats():
    built = build({"name": "FedProx", "params": {"shared": [], "weighting": "uniform", "mu": 1}}, REGISTRY)
    assert type(built.mu) is float


def test_manifest_when_a_field_cannot_be_announced_says_how_to_mark_it():
    with pytest.raises(UsageError, match=r"Unfit cannot be announced: table .*local"):
        manifest_of(Unfit())
    with pytest.raises(UsageError, match=r"mu is nan, expected a finite number"):
        manifest_of(_broken())
    with pytest.raises(UsageError, match="is not a dataclass"):
        manifest_of(_Plain())


class _Plain(Algorithm):
    pass


def _broken():
    algorithm = FedProx(mu=0.1)
    object.__setattr__(algorithm, "mu", float("nan"))
    return algorithm


def test_build_when_the_name_is_not_registered_lists_what_is():
    with pytest.raises(PeerError, match=r"'os.system' is not allowed here; allowed are APFL, .*, FedAdam, FedAvg, "):
        build({"name": "os.system", "params": {}}, REGISTRY)
    for name in (None, 3, ["FedAvg"], "x" * 10_000):
        with pytest.raises(PeerError, match="is not allowed here"):
            build({"name": name, "params": {}}, REGISTRY)


def mine(**changes):
    said = through_json(manifest_of(Mine()))
    said["params"].update(changes)
    return said


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rate": "0.5"}, r"Mine.rate is '0.5', expected a number"),
        ({"rate": True}, r"Mine.rate is True, expected a number"),
        ({"rate": float("nan")}, "finite"),
        ({"rate": float("inf")}, "finite"),
        ({"rate": None}, "expected a number"),
        ({"steps": 3.0}, r"Mine.steps is 3.0, expected a whole number"),
        ({"steps": True}, "expected a whole number"),
        ({"eager": 1}, "expected true or false"),
        ({"note": 5}, "expected a text"),
        ({"note": "\x1b[2J"}, "cannot be printed"),
        ({"note": "\ud800"}, "cannot be printed"),
        ({"limit": "much"}, "expected a number or null"),
        ({"mode": "medium"}, "expected one of 'fast', 'slow'"),
        ({"mode": ["fast"]}, "expected one of"),
        ({"level": True}, "Mine.level is True, expected one of 1, 2"),
        ({"level": 2.0}, "Mine.level is 2.0, expected one of 1, 2"),
        ({"widths": 3}, "expected a list"),
        ({"widths": [1, "2"]}, r"Mine.widths\[1\]"),
        ({"pair": ["a"]}, "has 1 items, expected 2"),
        ({"pair": {"a": 1}}, "expected a list"),
        ({"depth": 3}, "Mine has no field 'depth'; it has rate, steps"),
        ({"start": 3}, "Mine has no field 'start'"),
        ({"__class__": "x"}, "no field"),
    ],
)
def test_build_when_a_parameter_is_wrong_says_which_and_what_is_wanted(changes, words):
    with pytest.raises(MalformedError, match=words):
        build(mine(**changes), MY_REGISTRY)


@pytest.mark.parametrize(
    "changes", [{"note": "x" * (MAX_TEXT + 1)}, {"widths": [1] * (MAX_ITEMS + 1)}, {"steps": 2**63}, {"rate": 10**400}]
)
def test_build_when_a_parameter_is_too_large_is_refused(changes):
    with pytest.raises(LimitError):
        build(mine(**changes), MY_REGISTRY)


def test_build_when_fields_are_missing_or_no_object_is_given_refuses():
    said = mine()
    del said["params"]["rate"]
    with pytest.raises(MalformedError, match="Mine lacks rate"):
        build(said, MY_REGISTRY)
    for bad in (
        [],
        None,
        {"name": "Mine"},
        {"name": "Mine", "params": []},
        {"name": "Mine", "params": {}, "code": "x"},
    ):
        with pytest.raises(MalformedError):
            build(bad, MY_REGISTRY)


def test_build_when_the_class_refuses_a_value_passes_its_sentence_on():
    with pytest.raises(MalformedError, match=r"FedProx refuses its parameters: mu=-1.0 must be"):
        build({"name": "FedProx", "params": {"shared": [], "weighting": "uniform", "mu": -1.0}}, REGISTRY)


# ---------------------------------------------------------------- a run as data


def test_manifest_when_written_and_read_is_equal():
    assert Manifest.from_json(EXAMPLE.to_json()) == EXAMPLE
    assert Manifest.from_json(EXAMPLE.to_json()).to_json() == EXAMPLE.to_json()
    assert EXAMPLE.build(REGISTRY) == FedProx(mu=0.1, shared="base")
    assert EXAMPLE.problem == Problem(("ill", "healthy"), 2)


def test_manifest_when_of_a_regression_by_an_own_algorithm_round_trips():
    manifest = Manifest.of(Mine(rate=0.25), Problem(None, 2), seed=0, rounds=1)
    assert Manifest.from_json(manifest.to_json()).build(MY_REGISTRY) == Mine(rate=0.25)
    with pytest.raises(PeerError, match="'Mine' is not allowed"):
        manifest.build(REGISTRY)


def test_manifest_when_described_tells_a_person_what_it_asks():
    text = EXAMPLE.describe()
    for fact in (
        "FedProx(",
        "mu=0.1",
        "shared=['base']",
        "at most 20",
        "2 classes (ill, healthy)",
        "ab12",
        "torch: cd34",
    ):
        assert fact in text
    assert "2 values" in Manifest.of(FedAvg(), Problem(None, 2), seed=0, rounds=1).describe()


@pytest.mark.parametrize("classes", [("a", "\ud800"), ("a", "b\n"), ("a", "a"), ("a",)])
def test_manifest_when_no_site_could_read_it_is_not_made(classes):
    with pytest.raises(UsageError, match="the run cannot be announced"):
        Manifest.of(FedAvg(), Problem(classes, 2), seed=0, rounds=1)


def changed(**changes):
    return json.dumps({**json.loads(EXAMPLE.to_json()), **changes}).encode()


def without(name):
    return json.dumps({k: v for k, v in json.loads(EXAMPLE.to_json()).items() if k != name}).encode()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"seed": 1, "seed": 2}', "'seed' twice"),
        (b'{"seed": NaN}', "NaN"),
        (b'{"seed": -Infinity}', "Infinity"),
        (b'{"seed": 1e999}', "not finite"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "not JSON"),
        (b"[]", "expected an object"),
        (b"null", "expected an object"),
        (without("seed"), "lacks seed"),
        (changed(code="print"), "no field 'code'"),
        (changed(rounds=0), "rounds=0"),
        (changed(rounds=2.0), "rounds is 2.0"),
        (changed(seed=True), "seed is True"),
        (changed(classes=["a"]), "1 class names"),
        (changed(classes=["a", "a"]), "different ones"),
        (changed(outputs=0), "outputs=0"),
        (changed(specs={"torch": 1}), "specs.torch"),
        (changed(params=[]), "params is list"),
        (changed(transforms=[1]), r"transforms\[0\]"),
        (changed(format=2), "format 2"),
        (changed(algorithm="a\nb"), "cannot be printed"),
    ],
)
def test_manifest_when_malformed_is_refused_in_a_sentence(data, words):
    with pytest.raises(MalformedError, match=words):
        Manifest.from_json(data)


def test_manifest_when_too_long_is_refused_before_it_is_read():
    with pytest.raises(LimitError, match=str(MAX_BYTES)):
        Manifest.from_json(b" " * (MAX_BYTES + 1))


def test_manifest_when_it_asks_for_transforms_is_refused_by_a_version_without():
    manifest = Manifest.from_json(changed(transforms=[{"name": "Clip", "params": {"norm": 1.0}}]))
    with pytest.raises(PeerError, match="1 transforms"):
        manifest.build(REGISTRY)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@settings(derandomize=True, deadline=None, max_examples=300)
@given(st.sampled_from(sorted(json.loads(EXAMPLE.to_json()))), JSON)
@example("params", {"mu": {"mu": {}}})
def test_manifest_when_any_field_holds_anything_is_read_or_refused(name, value):
    try:
        manifest = Manifest.from_json(changed(**{name: value}))
        algorithm = manifest.build(REGISTRY)
    except PeerError as error:
        assert str(error)
        assert len(str(error)) < 1000
        return
    assert isinstance(algorithm, Algorithm)
    assert isinstance(manifest.specs, Mapping)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(st.binary(max_size=60))
def test_manifest_when_bytes_are_random_is_refused(data):
    with pytest.raises(PeerError):
        Manifest.from_json(data)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(st.integers(0, len(EXAMPLE.to_json()) - 1))
def test_manifest_when_cut_off_is_refused(length):
    with pytest.raises(MalformedError):
        Manifest.from_json(EXAMPLE.to_json()[:length])
