"""The hospitals' demo: its page says what its terminal says. The runs themselves are `test_hospitals.py` and `test_cli.py`."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
from test_report import FOUR, Reader, made

from polyfed.run import demo
from polyfed.run.demo import CLASSES, INTRO, MODES, Demo, repeats
from polyfed.run.result import Result


def found(count: int = 3) -> Demo:
    """Both modes over a few divisions; the second division differs much from the first."""
    alone = [{name: v - 0.04 * i for name, v in FOUR.items()} for i in range(count)]
    told = Demo(seed=0)
    for mode, step in (("rows", 0.01), ("statistics", -0.02)):
        told.runs[mode] = [  # type: ignore[index]  # a plain str of a tuple
            made({name: v + step * (i + 1 - (name == "east")) for name, v in values.items()}, values)
            for i, values in enumerate(alone)
        ]
    return told


@pytest.mark.parametrize("mode", list(MODES))
def test_repeats_are_the_numbers_of_the_terminal(mode: demo.Mode) -> None:
    told = found()
    over = repeats(told, mode)
    assert over is not None
    assert over.divisions == 3
    for site in [*told.sites, ""]:
        row, means = told.row(site), over.sites[site] if site else over.overall
        assert means.alone == pytest.approx(row["alone"])
        assert means.federated == pytest.approx(row[mode])
        assert means.gain == pytest.approx(row[f"{mode} gain"].mean)
        assert means.interval == (row[f"{mode} gain"].low, row[f"{mode} gain"].high)


def test_page_leads_with_the_means_of_both_modes(tmp_path: Any) -> None:
    told = found()
    text = Reader(demo._page(told, tmp_path / "report.html").read_text("utf-8")).text
    above = text.partition("One of the 3 divisions, round by round")[0]
    for mode in MODES:
        for site in told.sites:
            gain = told.row(site)[f"{mode} gain"]
            assert f"{gain.mean:+.3f} {gain.low:+.3f} to {gain.high:+.3f}".replace("-", "−") in _zeros(above)
            assert f"{told.row(site)[mode]:.3f}" in above
    assert above.count("On average over 3 divisions of the rows") == 2
    assert "divided into training and test 3 times (seeds 0 to 2)" in above
    assert "[ ]" not in text
    assert demo.ORIGINS["statistics"].split(";")[0] in text


def _zeros(text: str) -> str:
    """As a terminal has them: with a sign."""
    return re.sub(r"(?<![\d.+−])0\.000", "+0.000", text)


def test_page_of_one_division_has_no_means(tmp_path: Any) -> None:
    text = Reader(demo._page(found(1), tmp_path / "report.html").read_text("utf-8")).text
    assert "On average" not in text
    assert "no interval" in text


def test_page_of_an_interrupted_demo_has_what_is_there(tmp_path: Any) -> None:
    told = found()
    told.runs["statistics"] = []
    text = Reader(demo._page(told, tmp_path / "report.html").read_text("utf-8")).text
    assert text.count("On average over 3 divisions of the rows") == 1


def test_intro_says_where_two_patients_went() -> None:
    assert "918" in INTRO
    assert "920; two repeat" in INTRO
    assert set(CLASSES) == {"False", "True"}


def test_run_says_a_line_for_each_other_division(monkeypatch: pytest.MonkeyPatch) -> None:
    told, said = found(), list[str]()

    def one(mode: demo.Mode, seed: int, *_: Any) -> Result:
        return told.runs[mode][seed]

    monkeypatch.setattr(demo, "_one", one)
    monkeypatch.setattr(demo, "os", SimpleNamespace(environ={}))
    demo.run(splits=3, say=said.append)
    assert [line.split(":")[0].strip() for line in said if "division " in line] == [
        "division 2 of 3",
        "division 3 of 3",
    ]
    assert said[-1] == "  division 3 of 3: AUC alone 0.708, some rows shared 0.735, no row shared 0.653"
