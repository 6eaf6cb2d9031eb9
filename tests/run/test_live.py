from __future__ import annotations

import io

from federations import Spoiled, clients, run
from rich.console import Console

from polyfed.run.live import MOST, Table, sparkline, spelled_bytes


def watched(*, terminal, algorithm=None, members=None, **options):
    out = io.StringIO()
    clock = iter(range(1_000_000))
    console = Console(file=out, force_terminal=terminal, width=120, color_system=None)
    result = run(algorithm, members, watch=Table(console, clock=lambda: float(next(clock))), **options)
    return result, out.getvalue()


def test_without_a_terminal_there_is_one_line_a_round():
    result, said = watched(terminal=False, rounds=3)
    lines = said.splitlines()
    assert lines[0] == "FedAvg: 3 sites, auc on validation rows (north n=9, south n=9, west n=9)"
    values = [f"{name} {result.history[1].metrics[name]['auc']:.3f}" for name in ("north", "south", "west")]
    assert lines[2] == f"round 2/3  {'  '.join(values)}"
    assert len(lines) == 4


def test_in_a_terminal_there_is_a_row_a_site_with_rounds_value_change_and_status():
    result, said = watched(terminal=True, rounds=3)
    last = said[said.rindex("FedAvg") :]
    for name in ("north", "south", "west"):
        row = next(line for line in last.splitlines() if line.strip().startswith(name))
        value = result.history[-1].metrics[name]["auc"]
        change = value - result.history[0].metrics[name]["auc"]
        assert row.split()[1:5] == ["LogisticRegression", "3", f"{value:.3f}", "n=9"]
        assert f"{change:+.3f}" in row
        assert row.split()[-1] == "done"
    assert "round 3 of 3" in last
    assert "since round 1" in last
    assert "auc on n validation rows" in last
    assert spelled_bytes(result.bytes_up + result.bytes_down) in last
    for status in ("training", "trained", "evaluating", "evaluated"):
        assert status in said


def test_a_failed_site_is_shown_as_failed_and_a_refused_one_as_left_out():
    _, said = watched(terminal=True, algorithm=Spoiled(spoil=lambda u: 1 / 0))
    assert "failed: ZeroDivisionError" in said[said.rindex("Spoiled") :]
    _, said = watched(terminal=True, algorithm=Spoiled(spoil=lambda u: u.put(numbers={"num_examples": 0.0})))
    assert "left out: numbers/num_examples" in said
    _, said = watched(terminal=False, algorithm=Spoiled(spoil=lambda u: 1 / 0))
    assert "south left out: ZeroDivisionError: division by zero" in said


def test_a_large_federation_has_a_table_that_fits_a_screen():
    members = clients([f"site{i}" for i in range(MOST + 3)])
    _, said = watched(terminal=True, members=members, rounds=1)
    assert "and 3 more sites" in said
    assert f"site{MOST + 1}" not in said
    _, said = watched(terminal=False, members=members, rounds=1)
    assert f"mean of {MOST + 3} sites" in said


def test_baselines_are_announced_and_not_drawn():
    _, said = watched(terminal=False, baselines=("alone", "pooled"))
    assert "each site trains alone, to compare ..." in said
    assert "Local" not in said


def test_the_library_is_silent_unless_asked(capsys):
    run()
    assert capsys.readouterr() == ("", "")
    run(watch="live")
    assert capsys.readouterr().out.startswith("FedAvg: 3 sites")


def test_what_looks_on_changes_no_bit():
    result, _ = watched(terminal=True)
    assert result.state == run().state


def test_a_sparkline_spans_least_to_greatest_and_keeps_the_newest():
    assert sparkline([0.0, 1.0]) == "▁█"
    assert sparkline([9.0, 0.0, 1.0], width=2) == "▁█"
    assert sparkline([]) == ""
    assert sparkline([float("nan"), 1.0]) == "▄"
