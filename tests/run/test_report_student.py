"""The page's section on a student says what the comparison says, no more and no less."""

from __future__ import annotations

import dataclasses
import re

import pytest
from federations import rows, run
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from test_report import Reader
from torch import nn

import polyfed as pf
from polyfed.run import report, report_student
from polyfed.run import report_facts as facts
from polyfed.run.report_comparison import compare
from polyfed.run.student import Score, Standing, Standings

HEADING = "The student, its teachers, and their ensemble"


def of(algorithm, **changes):
    models = [pf.sklearn(LogisticRegression()), pf.sklearn(RandomForestClassifier(5))]
    given = {"split": pf.Split(test=0.4)} | changes
    clients = [pf.Client(f"site{i}", model, data=rows(i), **given) for i, model in enumerate(models)]
    return run(algorithm, clients, baselines=None, rounds=3)


@pytest.fixture(scope="module")
def result():
    return of(pf.Distill(public=rows(30, n=80)[0], student=pf.sklearn(LogisticRegression())))


def test_every_number_stands_on_the_page_and_the_page_is_whole(result):
    page = report.page(result)
    text = Reader(page).text
    assert HEADING in text
    found = result.comparison()
    section = text[text.index(HEADING) : text.index("What was shared")]
    for line in found.lines:
        for value in (line.own, line.own_alone, line.all.value, line.all_alone.value):
            assert f"{value:.3f}" in section
    for score in (found.ensemble, found.student):
        assert f"{score.value:.3f}" in section
    assert "logistic regression" in section
    assert "random forest" in section
    assert page == report.page(result)
    assert not re.search(r"(src|href)=", page)


def test_without_a_student_or_without_test_rows_there_is_no_section(result):
    assert HEADING not in report.page(of(pf.Local()))
    untested = dataclasses.replace(result, test={}, baselines={})
    assert HEADING not in report.page(untested)


def test_where_clients_learn_nothing_the_page_leads_with_the_student(result):
    text = Reader(report.page(result)).text
    found = result.comparison()
    assert found.metric == "auc"
    head = text[: text.index(HEADING)]
    assert report_student.headline(found) in head
    assert "learn nothing from one another" in head
    assert "There is no interval for AUC" in text
    for wrong in ("did better together", "did not change", "What each site gained", "gain over alone", "chance"):
        assert wrong not in text
    learning = of(pf.Distill(public=rows(30, n=80)[0], student=pf.sklearn(LogisticRegression()), digest=1))
    text = Reader(report.page(learning)).text
    assert "What each site gained" in text
    assert "learn nothing from one another" not in text
    both = Reader(report.page(result, label="taught", others={"digested": learning})).text
    assert "What each site gained" in both
    assert "learn nothing from one another" in both


def two_layers():
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def test_a_single_evaluation_is_no_curve():
    one = run(pf.FedAvg(), [pf.Client("a", pf.sklearn(LogisticRegression()), data=rows(0))], rounds=1)
    assert "round by round" not in Reader(report.page(one)).text


def test_the_counts_of_trained_entries_are_called_so():
    members = [pf.Client(n, pf.torch(two_layers), data=rows(0), freeze=f) for n, f in (("north", ()), ("west", "0"))]
    frozen = run(pf.FedAvg(), members, rounds=1)
    counts = [parcel for parcel in facts.shared(frozen).parcels if parcel.tree == "params#"]
    assert {(parcel.way, parcel.what) for parcel in counts} == {("site → server", "counts of the entries it trained")}
    assert "counts of the entries it trained" in Reader(report.page(frozen)).text


def test_of_very_many_teachers_the_means_alone_are_told(result):
    told = report_student.section(result, compare(result), most=1)
    assert (told.figure, told.rows, told.left_away) == ("", [], 2)
    assert told.mean.all == f"{result.comparison().mean('all'):.3f}"


def standings(gains, ensemble):
    lines = [Standing(f"site{i}", "Forest", None, None, Score(), Score(0.5, 10, gain)) for i, gain in enumerate(gains)]
    return Standings("accuracy", 10, lines, ensemble, Score(0.6, 10))


@pytest.mark.parametrize(
    ("gains", "interval", "said"),
    [
        ((0.1, 0.2), (0.01, 0.05), ("better than all 2 teachers", "which is worse beyond")),
        ((0.1, -0.2), (-0.05, 0.05), ("better than 1 of its 2 teachers", "leave open")),
        ((-0.1, -0.2), (-0.05, -0.01), ("better than none of its 2 teachers", "which is better beyond")),
        ((0.1,), None, ("better than its one teacher", "ensemble reaches 0.580.")),
    ],
)
def test_the_headline_is_never_kinder_than_the_numbers(gains, interval, said):
    gain = 0.02 if interval is None else sum(interval) / 2
    text = report_student.headline(standings(gains, Score(0.58, 10, gain, interval)))
    assert all(words in text for words in said), text


def test_who_came_late_is_told_and_not_called_never_asked():
    clients = [pf.Client("early", pf.sklearn(LogisticRegression()), data=rows(0))]
    clients += [
        pf.Client(f"late{at}", pf.sklearn(LogisticRegression()), data=rows(at), joins_at=at) for at in (2, 9)
    ]  # fmt: skip
    text = Reader(report.page(run(pf.FedAvg(), clients))).text
    assert "late2 joined at round 2; late9 was to join at round 9, after the run's last." in text
    assert "Never asked" not in text
