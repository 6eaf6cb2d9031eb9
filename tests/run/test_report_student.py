"""The page's section on a student says what the comparison says, no more and no less."""

from __future__ import annotations

import dataclasses
import re

import pytest
from federations import rows, run
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from test_report import Reader

import polyfed as pf
from polyfed.run import report, report_student
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
