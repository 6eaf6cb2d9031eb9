"""The page on a run: what it says is what the numbers say, it loads nothing, and nothing in it is executed."""

from __future__ import annotations

import builtins
import dataclasses
import re
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from polyfed.algorithms import FedMD
from polyfed.core.coordinator import Federation
from polyfed.core.errors import ClientError, MissingExtraError, StorageError
from polyfed.core.history import RoundLog
from polyfed.core.message import Message
from polyfed.core.protocols import Site
from polyfed.core.rows import Problem, Rows
from polyfed.core.stop import Rounds, Target
from polyfed.core.tree import Tree
from polyfed.data import Parts, Raw
from polyfed.run import report
from polyfed.run.client import Population
from polyfed.run.report_comparison import Comparison, Means, Repeats, compare, margin
from polyfed.run.report_plots import axis, ticks
from polyfed.run.result import Result


@dataclasses.dataclass(frozen=True)
class Fake:
    """A model that never trains."""

    kind: str = "Forest"
    settings: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"lr": 0.1, "batch_size": 32})
    key: str = "fake"
    offers: frozenset[str] = frozenset({"predict", "distill"})


def made(
    federated: Mapping[str, float | None],
    alone: Mapping[str, float] | None = None,
    *,
    regression: bool = False,
    cases: Sequence[int] = (20, 30),
    aside: int = 5,
    history: Sequence[RoundLog] | None = None,
    **changes: Any,
) -> Result:
    """A result with these metrics on test rows; the first `cases[0]` test rows are of class 0, and so on."""
    metric = "mae" if regression else "auc"
    problem = Problem(None, 1) if regression else Problem(("healthy", "ill"), 2)
    target = np.repeat(np.arange(len(cases)), cases)
    x, few = np.zeros((sum(cases), 1), np.float32), np.zeros((40, 1), np.float32)
    test = Rows({"x": x}, target.astype(np.float32) if regression else target)
    sites = {name: Site(name, Fake(), problem, Rows({"x": few}), test=test) for name in federated}
    parts = {name: Parts(np.arange(40), public=np.arange(40, 40 + aside)) for name in sites}
    public = Raw({"x": np.zeros((max(aside, 5) * len(sites), 1), np.float32)})
    prepared: Any = {name: SimpleNamespace(preprocess="StandardScaler()") for name in sites}
    population = Population({}, sites, prepared, {}, parts, problem, public, {})
    soft = Tree({"public": np.zeros((len(public.inputs["x"]), 2), np.float32)})
    state = Message({"soft": soft}, {"public_rows": float(len(soft["public"]))})
    names = tuple(sites)
    if history is None:
        history = [
            RoundLog(
                i,
                seconds=float(i),
                cohort=names,
                accepted=names,
                metrics={n: {metric: 0.5 + 0.05 * i} for n in names},
                bytes_up=2000 * len(names),
                bytes_down=1000 * len(names),
            )
            for i in (1, 2, 3)
        ]
    values: dict[str, Any] = {
        "algorithm": FedMD(),
        "population": population,
        "federation": Federation(FedMD(), problem, stop=Rounds(3)),
        "state": state,
        "memories": {},
        "history": history,
        "test": {name: {metric: value} for name, value in federated.items() if value is not None},
        "baselines": {} if alone is None else {"alone": {name: {metric: v} for name, v in alone.items()}},
        "reason": "3 rounds are done",
        "version": 3,
        "seconds": 1.5,
    }
    return Result(**{**values, **changes})


FOUR = {"north": 0.80, "south": 0.70, "east": 0.75, "west": 0.90}


class Reader(HTMLParser):
    """Tags, their attributes, and the text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br", "circle", "path", "rect"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


def headline(result: Result, **intervals: tuple[float, float]) -> str:
    return compare(result, intervals).headline()


# ------------------------------------------------------------------------------------------ headline


def test_headline_when_all_gain_names_the_largest_gain() -> None:
    result = made({name: v + 0.01 + 0.05 * (name == "east") for name, v in FOUR.items()}, FOUR)
    assert headline(result) == "All 4 sites did better together than alone, most at east: AUC +0.060. None did worse."


def test_headline_when_mixed_says_who_lost_most_and_who_stayed() -> None:
    federated = {"north": 0.88, "south": 0.65, "east": 0.7502, "west": 0.89}
    assert headline(made(federated, FOUR)) == (
        "1 of 4 sites did better together than alone, at north: AUC +0.080. "
        "2 did worse, most at south: AUC −0.050. 1 did not change (east)."
    )


def test_headline_when_all_lose_does_not_soften() -> None:
    said = headline(made({name: v - 0.1 for name, v in FOUR.items()}, FOUR))
    assert said.startswith("None of 4 sites did better together than alone. 4 did worse, most at ")
    assert "AUC −0.100." in said


def test_headline_when_an_interval_is_known_shows_it() -> None:
    said = headline(made({name: v + 0.02 for name, v in FOUR.items()}, FOUR), north=(-0.01, 0.05))
    assert "north: AUC +0.020 (90 % interval over repeats −0.010 to +0.050)" in said


def test_headline_of_a_regression_counts_lower_errors_as_gains() -> None:
    result = made({"north": 8.0, "south": 12.5}, {"north": 10.0, "south": 12.0}, regression=True)
    assert headline(result) == (
        "1 of 2 sites did better together than alone, at north: MAE lower by 2.00. 1 did worse, at south: MAE higher by 0.50."
    )
    north = compare(result).lines[0]
    assert north.gain == 2.0
    assert compare(result).signed(north.gain) == "+2.00"


def test_headline_without_baselines_says_that_it_is_not_known() -> None:
    assert headline(made(FOUR)).startswith("Whether joining helped is not known: this run did not work out")
    assert "no site has a result" in headline(made(dict.fromkeys(FOUR)))


def test_headline_when_a_site_has_no_result_names_it() -> None:
    said = headline(made({**FOUR, "west": None}, FOUR))
    assert said.endswith("1 site without a comparison: west.")


@pytest.mark.parametrize(("value", "said"), [(0.9, "did better"), (0.7, "It did worse"), (0.8, "1 did not change")])
def test_headline_of_one_site_when_it_goes_either_way(value: float, said: str) -> None:
    assert said in headline(made({"north": value}, {"north": 0.8}))


def test_headline_when_the_sign_of_gains_is_wrong_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polyfed.core.metrics.is_lower_better", lambda name: name == "auc")
    result = made({name: v - 0.1 for name, v in FOUR.items()}, FOUR)
    with pytest.raises(AssertionError):
        assert "4 did worse" in headline(result)


# ------------------------------------------------------------------------------------------ uncertainty


def test_caution_when_differences_are_within_the_margin_says_chance() -> None:
    said = compare(made({name: v + 0.01 for name, v in FOUR.items()}, FOUR)).caution()
    assert "one division" in said
    assert "Every difference shown here is smaller than that at its site, so chance alone may have made it." in said


def test_caution_when_differences_exceed_the_margin_does_not_say_chance() -> None:
    said = compare(made({"north": 0.95}, {"north": 0.5}, cases=(400, 400))).caution()
    assert "No difference" in said
    assert "chance" not in said


def test_caution_with_intervals_counts_those_off_zero() -> None:
    result = made({name: v + 0.01 for name, v in FOUR.items()}, FOUR)
    said = compare(result, {"north": (0.001, 0.02), "south": (-0.02, 0.03), "east": (-0.03, -0.01)}).caution()
    assert "lies above zero at 1 and below zero at 1 of 3 sites" in said


def test_margin_of_an_auc_agrees_with_a_worked_example() -> None:
    # Hanley and McNeil 1982: AUC .893 on 51 abnormal and 58 normal images has a standard error of .032
    found = margin("auc", 0.893, [58, 51])
    assert found is not None
    assert round(found / 1.6449, 3) == 0.033 or round(found / 1.6449, 3) == 0.032


@pytest.mark.parametrize(
    ("metric", "value", "cases"),
    [("auc", 1.0, [5, 5]), ("auc", 0.8, [0, 5]), ("mae", 0.5, []), ("auc", 0.8, [5, 5, 5])],
)
def test_margin_where_no_formula_holds_is_none(metric: str, value: float, cases: list[int]) -> None:
    assert margin(metric, value, cases) is None


def test_weak_test_set_when_one_class_is_rare_is_warned_of_in_words() -> None:
    page = report.page(made(FOUR, FOUR, cases=(2, 29)))
    assert "fewer than 10 test rows of one class" in Reader(page).text
    assert "2 of class healthy" in page
    assert "fewer than 10" not in report.page(made(FOUR, FOUR))


def test_verdict_when_the_interval_holds_zero_is_not_certain() -> None:
    compared = compare(made({"north": 0.9}, {"north": 0.8}), {"north": (-0.1, 0.2)})
    assert compared.verdict(compared.lines[0]) == "gain, not certain"
    assert _verdict((0.05, 0.2)) == "clear gain"
    assert _verdict((-0.2, -0.1)) == "gain in this run, loss over repeats"


def _verdict(interval: tuple[float, float]) -> str:
    compared = compare(made({"north": 0.9}, {"north": 0.8}), {"north": interval})
    return compared.verdict(compared.lines[0])


@pytest.mark.parametrize(("largest", "digits"), [(0.9, 3), (0.05, 4), (12.5, 2), (1234.0, 0), (0.0, 3)])
def test_digits_follow_the_size_of_the_numbers(largest: float, digits: int) -> None:
    compared = compare(made({"north": largest}, {"north": largest}, regression=True))
    assert isinstance(compared, Comparison)
    assert compared.digits == digits


# ------------------------------------------------------------------------------------------ repeats

OVER_FIVE = Repeats(
    5,
    {
        "north": Means(0.701, 0.702, 0.731, 0.030, (0.010, 0.050)),
        "south": Means(0.604, 0.705, 0.594, -0.010, (-0.020, -0.001)),
        "east": Means(0.611, 0.706, 0.612, 0.001, (-0.004, 0.006)),
        "west": Means(0.811, 0.707, 0.851, 0.040, (0.020, 0.060)),
    },
    Means(0.682, 0.705, 0.697, 0.015, (0.004, 0.026)),
)


def test_comparison_over_repeats_holds_no_number_of_the_one_division() -> None:
    compared = compare(made(dict.fromkeys(FOUR, 0.123), FOUR), repeats=OVER_FIVE)
    assert [line.federated for line in compared.lines] == [0.731, 0.594, 0.612, 0.851]
    assert all(line.margin is None for line in compared.lines)
    for line in compared.lines:
        assert line.gain is not None
        assert line.interval is not None
        assert line.interval[0] <= line.gain <= line.interval[1]
    assert compared.headline() == (
        "On average over 5 divisions of the rows, 3 of 4 sites did better together than alone, most at west: AUC +0.040 "
        "(90 % interval over repeats +0.020 to +0.060). "
        "1 did worse, at south: AUC −0.010 (90 % interval over repeats −0.020 to −0.001)."
    )
    assert compared.caution().endswith("Mean over the sites: AUC +0.015 (+0.004 to +0.026).")
    assert compared.means()["federated"] == 0.697


def test_comparison_over_repeats_when_test_cases_are_few_calls_no_gain_clear() -> None:
    compared = compare(made(FOUR, FOUR, cases=(2, 29)), repeats=OVER_FIVE)
    assert [compared.verdict(line) for line in compared.lines] == ["gain", "loss", "gain, not certain", "gain"]
    assert compared.caution().endswith(
        "Few test rows of one class (under 10) carry the numbers at north, south, east, west: read them with care."
    )


def test_comparison_over_repeats_when_a_site_has_none_says_so_and_does_not_fall_back() -> None:
    compared = compare(made(FOUR, FOUR), repeats=Repeats(2, {"north": Means(0.7, None, 0.8, 0.1)}, Means()))
    assert [line.federated for line in compared.lines] == [0.8, None, None, None]


def test_page_over_repeats_tells_means_of_both_runs_above_and_one_division_below() -> None:
    one, other = made(dict.fromkeys(FOUR, 0.123), FOUR), made(dict.fromkeys(FOUR, 0.234), FOUR)
    again = dataclasses.replace(
        OVER_FIVE, sites={**OVER_FIVE.sites, "south": Means(0.604, 0.705, 0.664, 0.060, (0.055, 0.065))}
    )
    text = Reader(
        report.page(one, label="rows", others={"sums": other}, repeats={"rows": OVER_FIVE, "sums": again})
    ).text
    above, heading, below = text.partition("One of the 5 divisions, round by round")
    assert heading
    assert "seed 0" in below[:200]
    assert "0.123" not in text
    assert "0.234" not in text
    assert above.count("On average over 5 divisions of the rows") == 2
    assert "most at south: AUC +0.060 (90 % interval over repeats +0.055 to +0.065)" in above
    assert "round by round" not in above
    assert below.count("AUC on validation rows, round by round") == 2
    assert "in this run" not in text


def test_curves_of_all_runs_on_a_page_have_equal_axes() -> None:
    low, high = ([RoundLog(k, metrics={n: {"auc": v} for n in FOUR}) for k in (1, 2)] for v in (0.3, 0.9))
    page = report.page(made(FOUR, history=low), label="a", others={"b": made(FOUR, history=high)})
    found = re.findall(r'aria-label="validation of \w+ over 2 rounds">(.*?)</svg>', page)
    marks = {tuple(re.findall(r'text-anchor="end"[^>]*>([\d.]+)</text>', svg)[:-1]) for svg in found}
    assert len(found) == 8
    assert len(marks) == 1


def test_page_without_repeats_speaks_of_no_divisions() -> None:
    assert "One of the" not in Reader(report.page(made(FOUR, FOUR))).text


# ------------------------------------------------------------------------------------------ words


def test_cases_with_words_for_the_classes_use_them() -> None:
    text = Reader(report.page(made(FOUR, FOUR), classes={"healthy": "without disease", "ill": "with disease"})).text
    assert "20 without disease" in text
    assert "30 with disease" in text
    assert "of class" not in text


@pytest.mark.parametrize(
    ("model", "framework", "said"),
    [
        ("Sequential", "PyTorch", "neural network (PyTorch)"),
        ("Sequential", "Keras", "neural network (Keras)"),
        ("LogisticRegression", "scikit-learn", "logistic regression"),
        ("RandomForestClassifier", "scikit-learn", "random forest"),
        ("SVC", "scikit-learn", "SVC"),
    ],
)
def test_model_in_plain_words(model: str, framework: str, said: str) -> None:
    line = compare(made({"north": 0.8})).lines[0]
    assert dataclasses.replace(line, model=model, framework=framework).plain == said


def test_headings_of_tables_and_runs_begin_with_a_capital() -> None:
    page = report.page(made(FOUR, FOUR), label="some rows are shared", others={"none is shared": made(FOUR, FOUR)})
    found = re.findall(r'<(?:h[123]|th scope="col")[^>]*>\s*([^<]+)', page)
    assert len(found) > 20
    assert [word for word in found if word[0].islower()] == []


# ------------------------------------------------------------------------------------------ the page


def test_page_has_every_section_and_balanced_tags() -> None:
    read = Reader(report.page(made({name: v + 0.01 for name, v in FOUR.items()}, FOUR)))
    assert read.open == []
    headings = (
        "What each site gained",
        "What was shared, and what was not",
        "Who was left out",
        "set up",
        "The run",
        "reproduce",
    )
    for heading in headings:
        assert heading in read.text
    figures = [attributes for tag, attributes in read.tags if tag == "svg" and attributes.get("role") == "img"]
    assert len(figures) == 2 + 4
    assert all(figure["aria-label"] for figure in figures)


def test_page_says_whose_rows_were_shared() -> None:
    assert "20 real rows of the sites were shared" in Reader(report.page(made(FOUR, FOUR))).text
    given = Reader(
        report.page(
            made(FOUR, FOUR, aside=0),
            label="made up",
            others={"x": made(FOUR)},
            origins={"made up": "Drawn from sums."},
        )
    )
    assert "No row of any site's own data left it." in given.text
    assert "Drawn from sums." in given.text
    result = made(FOUR, FOUR, aside=0)
    none = dataclasses.replace(result, population=dataclasses.replace(result.population, public=None))
    assert "There were no shared rows." in Reader(report.page(none)).text


def test_page_says_what_travelled() -> None:
    text = Reader(report.page(made(FOUR, FOUR))).text
    assert "site → server predictions for the shared rows soft 20 × 2 numbers (float32) 160 bytes all" in text
    assert "No model parameter left a site" in text
    assert "24.0 kB up (site to server), 12.0 kB down" in text
    assert "on average 2.0 kB up and 1.0 kB down" in text


def test_page_loads_nothing() -> None:
    page = report.page(made(FOUR, FOUR), others={"again": made(FOUR, FOUR)})
    assert "http:" not in page
    assert "https:" not in page
    assert "url(" not in page
    assert "@import" not in page
    for tag, attributes in Reader(page).tags:
        assert tag not in ("script", "link", "img", "iframe", "object", "use", "image")
        assert not {"src", "href", "xlink:href", "srcset"} & attributes.keys()
    assert "default-src 'none'" in page


EVIL = "<script>alert('x')</script>\"><img src=x onerror=alert(1)>{{ 7*7 }}"


def test_page_when_texts_are_hostile_escapes_all_of_them() -> None:
    history = [RoundLog(1, cohort=(EVIL,), left_out={EVIL: EVIL}, metrics={EVIL: {"auc": 0.5}})]
    error = ClientError(EVIL, "ValueError", EVIL, (EVIL,))
    result = made({EVIL: 0.8}, {EVIL: 0.7}, history=history, errors={EVIL: error}, reason=EVIL, notes=(EVIL,))
    problem = Problem((EVIL, "ill"), 2)
    site = dataclasses.replace(result.population.sites[EVIL], model=Fake(EVIL, {EVIL: EVIL}), problem=problem)
    prepared: Any = {EVIL: SimpleNamespace(preprocess=EVIL)}
    raw = Raw({EVIL: np.zeros((5, 1), np.float32)})
    population = dataclasses.replace(
        result.population, sites={EVIL: site}, prepared=prepared, public=raw, problem=problem
    )
    result = dataclasses.replace(result, population=population)
    page = report.page(
        result, title=EVIL, intro=EVIL, label=EVIL, others={EVIL: result, "b": result}, origins={EVIL: EVIL}
    )
    read = Reader(page)
    assert not [tag for tag, _ in read.tags if tag in ("script", "img")]
    assert not [a for _, attributes in read.tags for a in attributes if a.startswith("on")]
    assert read.text.count("alert('x')") > 10
    assert "{{ 7*7 }}" in read.text


def test_page_when_a_short_name_is_hostile_escapes_it_in_the_plots() -> None:
    read = Reader(report.page(made({"<img src=x>": 0.8}, {"<img src=x>": 0.7})))
    assert not [tag for tag, _ in read.tags if tag == "img"]
    labels = [attributes["aria-label"] for tag, attributes in read.tags if tag == "svg" and "aria-label" in attributes]
    assert "validation of <img src=x> over 3 rounds" in labels


def test_page_when_a_name_holds_a_quote_stays_in_its_attribute() -> None:
    read = Reader(report.page(made({'a" onload="x': 0.8}, {'a" onload="x': 0.7})))
    assert not [name for _, attributes in read.tags for name in attributes if name.startswith("on")]


def test_page_when_a_client_failed_shows_rounds_reason_and_last_lines() -> None:
    names = tuple(FOUR)
    history = [
        RoundLog(i, cohort=names, accepted=names[:3], left_out={"west": "failed: ValueError"} if i != 3 else {})
        for i in (1, 2, 3, 4)
    ]
    error = ClientError("west", "ValueError", "no rows left", ("line one", "line two"))
    result = made({**FOUR, "west": None}, FOUR, history=history, errors={"west": error})
    text = Reader(report.page(result)).text
    assert "west 1–2, 4 failed: ValueError" in text
    assert "west: ValueError no rows left line one line two" in text
    assert "failed: ValueError: no rows left" in text


def test_page_when_nobody_was_left_out_says_so() -> None:
    assert "Nobody: every update that was asked for counted" in report.page(made(FOUR, FOUR))


def test_page_when_a_target_was_not_reached_says_so() -> None:
    federation = Federation(FedMD(), Problem(("healthy", "ill"), 2), stop=Rounds(3) | Target("auc", 0.99))
    text = Reader(report.page(made(FOUR, FOUR, federation=federation))).text
    assert "Asked for and not reached: " in text
    assert "0.99" in text


@pytest.mark.parametrize(
    "result",
    [
        made(FOUR),
        made(dict.fromkeys(FOUR)),
        made({"north": 3.0}, {"north": 4.0}, regression=True),
        made(FOUR, history=()),
    ],
    ids=["no baselines", "no tests", "one regression", "no rounds"],
)
def test_page_when_something_is_missing_is_still_whole(result: Result) -> None:
    read = Reader(report.page(result))
    assert read.open == []
    assert "None" not in read.text.replace("None of", "").replace("None did", "").replace("=None", "")


def test_write_twice_when_the_result_is_the_same_gives_the_same_bytes(tmp_path: Any) -> None:
    one = report.write(made(FOUR, FOUR), tmp_path / "a" / "one.html", intervals={"north": (-0.1, 0.1)})
    two = report.write(made(FOUR, FOUR), tmp_path / "two.html", intervals={"north": (-0.1, 0.1)})
    assert one.read_bytes() == two.read_bytes()
    assert one.stat().st_size < 60_000


def test_page_of_a_thousand_clients_is_small_and_shows_both_ends() -> None:
    rng = np.random.default_rng(0)
    alone = {f"c{i:03}": float(v) for i, v in enumerate(rng.uniform(0.6, 0.8, 1000))}
    federated = {name: value + float(rng.normal(0.03, 0.05)) for name, value in alone.items()}
    federated["c500"] = alone["c500"] - 0.5
    alone["c600"], federated["c600"] = 0.6, 0.95
    result = made(federated, alone)
    page = report.page(result)
    assert len(page) < 200_000
    rows = re.findall(r'<th scope="row">(c\d+)</th>', page)
    assert len(rows) == 40
    assert (rows[0], rows[-1]) == ("c500", "c600")
    read = Reader(page)
    assert "There are 1000 sites; the table shows the 20 that lost most and the 20 that gained most" in read.text
    assert "c000, c001, c002" in read.text
    assert len([1 for tag, a in read.tags if tag == "svg" and a.get("role") == "img"]) == 3


@pytest.mark.parametrize("regression", [False, True], ids=["higher is better", "lower is better"])
def test_page_of_many_clients_without_baselines_shows_worst_median_and_best(regression: bool) -> None:
    values = {f"c{i:02}": 0.4 + i / 200 for i in range(60)}
    page = report.page(made(values, regression=regression))
    worst = list(values)[:10] if not regression else list(values)[:-11:-1]
    rows = re.findall(r'<th scope="row">(c\d+)</th>', page)
    assert rows[:10] == worst
    assert "c29" in rows[10:20]
    assert "c30" in rows[10:20]
    assert rows[20:] == (list(values)[50:] if not regression else list(values)[9::-1])
    assert "the 10 worst, 10 about the median and the 10 best, worst first" in Reader(page).text
    assert "0.400" in page


def test_page_of_fifty_clients_has_a_line_and_a_curve_each() -> None:
    names = {f"c{i}": 0.8 for i in range(50)}
    page = report.page(made(names, names))
    assert len(re.findall(r'<th scope="row">c\d+</th>', page)) == 50
    assert page.count('role="img"') == 52


def test_write_where_nothing_can_be_written_names_the_file(tmp_path: Any) -> None:
    with pytest.raises(StorageError, match=r"the report cannot be written to .*: Is a directory"):
        report.write(made(FOUR), tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        report.write(made(FOUR), tmp_path / "file" / "report.html")


def test_write_without_jinja2_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    imported = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "jinja2":
            raise ImportError(name)
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtraError, match=r"polyfed\[report\]"):
        report.write(made(FOUR), tmp_path / "report.html")


# ------------------------------------------------------------------------------------------ axes


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 1.0), (0.61, 0.612), (-3.0, 4.0), (120.0, 9000.0), (0.5, 0.5), (0.0, 0.0)]
)
def test_axis_holds_all_values_with_few_round_ticks(low: float, high: float) -> None:
    first, last, marks = axis(low, high)
    assert first <= low <= high <= last
    assert 2 <= len(marks) <= 12
    assert np.allclose(np.diff(marks), marks[1] - marks[0])


def test_ticks_of_whole_numbers_are_whole() -> None:
    assert ticks(1, 10, 3, whole=True) == [5.0, 10.0]
    assert all(mark == int(mark) for mark in ticks(0, 7, 4, whole=True))
