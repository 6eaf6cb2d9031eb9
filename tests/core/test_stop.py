"""Stopping rules on written-out histories."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyfed.core.errors import UsageError
from polyfed.core.history import RoundLog
from polyfed.core.stop import (
    Both,
    Converged,
    Diverged,
    Either,
    NoImprovement,
    Rounds,
    Stop,
    Target,
    TimeBudget,
    best_round,
    direction,
)


def logs(*values, metric="loss", client="north", **more):
    return [RoundLog(i, metrics={client: {metric: v}}, **more) for i, v in enumerate(values, 1)]


def first_stop(rule, history):
    """The round after which a run with this rule ends; None if it does not."""
    return next((n for n in range(1, len(history) + 1) if rule(history[:n])), None)


# ---------------------------------------------------------------- single rules


def test_rounds_when_reached_says_so():
    assert first_stop(Rounds(3), logs(1, 1, 1, 1)) == 3
    assert Rounds(3)(logs(1, 1, 1)) == "3 rounds are done"
    assert Rounds(3)([]) is None


def test_time_budget_when_spent_stops_by_the_histories_own_time():
    history = [RoundLog(i, seconds=s) for i, s in enumerate([4.0, 9.9, 10.0, 30.0], 1)]
    assert first_stop(TimeBudget(10), history) == 3
    assert TimeBudget(10)(history[:3]) == "10.0 s have passed, the budget is 10 s"


def test_target_when_higher_is_better_stops_at_or_above():
    history = logs(0.5, 0.84, 0.85, 0.9, metric="auc")
    assert first_stop(Target("auc", 0.85), history) == 3
    assert Target("auc", 0.85)(history[:3]) == "mean auc is 0.85, the target is 0.85"


def test_target_when_lower_is_better_stops_at_or_below():
    assert first_stop(Target("rmse", 2.0), logs(3.0, 2.5, 2.0, metric="rmse")) == 3


def test_target_when_over_says_whose_counts():
    log = RoundLog(1, metrics={"north": {"auc": 0.9}, "south": {"auc": 0.7}, "west": {"accuracy": 0.1}})
    assert Target("auc", 0.8, over="mean")([log])
    assert not Target("auc", 0.8, over="worst")([log])
    assert Target("auc", 0.7, over="worst")([log])
    assert Target("auc", 0.9, over="north")([log])
    assert not Target("auc", 0.8, over="south")([log])
    assert not Target("auc", 0.0, over="west")([log])


def test_target_when_worst_of_a_loss_is_asked_takes_the_largest():
    log = RoundLog(1, metrics={"north": {"loss": 0.1}, "south": {"loss": 0.7}})
    assert not Target("loss", 0.5, over="worst")([log])
    assert Target("loss", 0.7, over="worst")([log])


def test_target_when_mean_counts_every_client_the_same():
    log = RoundLog(
        1,
        metrics={"a": {"auc": 1.0}, "b": {"auc": 0.0}, "c": {"auc": math.nan}},
        num_examples={"a": 999, "b": 1, "c": 1},
    )
    assert Target("auc", 0.5)([log])
    assert not Target("auc", 0.51)([log])


def test_target_when_missed_says_by_how_much():
    history = logs(0.5, 0.8, 0.7, metric="auc")
    assert Target("auc", 0.85).unmet(history) == "target mean auc 0.85 was not reached: best 0.8 at round 2"
    assert Target("auc", 0.7).unmet(history) == ""
    assert "clients report auc" in Target("accuracy", 0.7).unmet(history)
    assert "no validation metric" in Target("accuracy", 0.7).unmet([])
    assert Rounds(2).unmet(history) == ""


def test_no_improvement_when_patience_is_over_stops():
    history = logs(3, 2, 1, 1.5, 1.2, 1.1, 0.5)
    assert first_stop(NoImprovement("loss", 3), history) == 6
    assert first_stop(NoImprovement("loss", 4), history) is None


def test_no_improvement_when_the_gain_is_below_min_delta_does_not_count_it():
    history = logs(0.80, 0.81, 0.82, 0.83, metric="accuracy")
    assert first_stop(NoImprovement("accuracy", 2), history) is None
    assert first_stop(NoImprovement("accuracy", 3, min_delta=0.05), history) == 4
    assert first_stop(NoImprovement("accuracy", 2, min_delta=0.015), history) is None


def test_no_improvement_when_a_round_is_not_measured_passes_it_over():
    history = [*logs(1.0), RoundLog(2), RoundLog(3), RoundLog(4, metrics={"north": {"loss": 2.0}})]
    assert first_stop(NoImprovement("loss", 2), history) is None
    assert first_stop(NoImprovement("loss", 1), history) == 4


def test_no_improvement_when_equal_is_no_gain():
    assert first_stop(NoImprovement("accuracy", 2), logs(0.5, 0.5, 0.5, metric="accuracy")) == 3


def test_converged_when_loss_stays_in_a_band_stops():
    history = logs(9, 5, 1.0, 1.0005, 0.9996, 0.5)
    assert first_stop(Converged(window=3, tolerance=1e-3), history) == 5
    assert first_stop(Converged(window=4, tolerance=1e-3), history) is None


def test_converged_when_steps_are_short_stops():
    history = [
        RoundLog(i, accepted=("a",), update_norm=u, state_norm=2.0) for i, u in enumerate([1, 0.02, 0.02, 0.02], 1)
    ]
    assert first_stop(Converged(on="update_norm", window=3, tolerance=0.01), history) == 4
    assert first_stop(Converged(on="update_norm", window=3, tolerance=0.009), history) is None


def test_converged_when_nobody_took_part_or_nothing_is_shared_goes_on():
    nobody = [RoundLog(i, update_norm=0.0, state_norm=2.0) for i in range(1, 9)]
    nothing = [RoundLog(i, accepted=("a",)) for i in range(1, 9)]
    for history in (nobody, nothing):
        assert first_stop(Converged(on="update_norm", window=3), history) is None


def test_diverged_when_a_value_is_not_finite_stops_and_rolls_back():
    history = [*logs(3, 1, 2), RoundLog(4, metrics={"north": {"loss": math.nan}, "south": {"loss": 1.0}})]
    assert first_stop(Diverged(), history) == 4
    assert Diverged()(history) == "loss of north is nan at round 4"
    assert Diverged().rolls_back_to(history[:3]) is None
    assert Diverged(over="north").rolls_back_to(history) == 2


def test_diverged_when_loss_runs_away_stops_after_patience():
    history = logs(4, 1, 1.9, 2.5, 1.0, 2.5, 2.6)
    assert first_stop(Diverged(factor=2), history) == 4
    assert first_stop(Diverged(factor=2, patience=2), history) == 7
    assert Diverged(factor=2)(history[:4]) == "mean loss is 2.5, more than 2 times its best, 1 at round 2"
    assert Diverged(factor=2).rolls_back_to(history[:4]) == 2


def test_diverged_when_first_values_are_infinite_has_nowhere_to_go_back_to():
    history = logs(math.inf)
    assert Diverged()(history)
    assert Diverged().rolls_back_to(history) is None


def test_no_improvement_when_asked_rolls_back_to_the_best():
    history = logs(3, 1, 2, 2)
    assert NoImprovement("loss", 2).rolls_back_to(history) is None
    assert NoImprovement("loss", 2, roll_back=True).rolls_back_to(history) == 2
    assert NoImprovement("loss", 3, roll_back=True).rolls_back_to(history) is None


# ---------------------------------------------------------------- combined


def test_either_when_one_stops_gives_its_reason():
    rule = Rounds(5) | NoImprovement("loss", 2)
    assert rule(logs(1, 2, 3)) == "mean loss has not improved for 2 rounds: best 1 at round 1"
    assert (Rounds(3) | NoImprovement("loss", 2))(logs(1, 2, 3)).count(";") == 1
    assert rule(logs(3, 2)) is None


def test_both_when_all_stop_gives_all_reasons():
    rule = Rounds(3) & NoImprovement("loss", 1)
    assert first_stop(rule, logs(1, 2, 3)) == 3
    assert rule(logs(1, 2, 3)) == "3 rounds are done and mean loss has not improved for 2 rounds: best 1 at round 1"
    assert rule(logs(3, 2, 1)) is None


def test_combination_when_nested_keeps_its_meaning():
    a, b, c = Rounds(1), Rounds(2), Rounds(3)
    assert (a | b | c) == Either((a, b, c))
    assert (a & b & c) == Both((a, b, c))
    assert ((a | b) & c) == Both((Either((a, b)), c))
    assert first_stop((a & b) | c, logs(1, 1, 1)) == 2
    assert first_stop(Either((a, b), min_rounds=3) | Rounds(9), logs(1, 1, 1)) == 3


def test_combination_when_a_rule_that_does_not_stop_has_no_say_in_rolling_back():
    history = logs(1.0, 5.0)
    assert (Rounds(2) | Diverged(factor=9)).rolls_back_to(history) is None
    assert (Rounds(9) | Diverged(factor=2)).rolls_back_to(history) == 1
    assert (Rounds(9) & Diverged(factor=2)).rolls_back_to(history) is None
    assert (Rounds(2) & Diverged(factor=2)).rolls_back_to(history) == 1


def test_combination_when_targets_are_missed_says_all():
    rule = Rounds(2) | Target("loss", 0.1) | Target("auc", 0.9)
    assert rule.unmet(logs(1.0)).count("target") == 2


# ---------------------------------------------------------------- promises

RULES = [
    Rounds(1),
    TimeBudget(1e-9),
    Target("loss", 1e9),
    NoImprovement("loss", 1),
    Converged(window=2, tolerance=1e9),
    Converged("update_norm", 2, 1e9),
    Diverged(factor=1.0001),
    Rounds(1) | TimeBudget(1e-9),
    Rounds(1) & Target("loss", 1e9),
]
VALUES = st.lists(st.floats(0.01, 100) | st.just(math.nan), min_size=1, max_size=12)


@settings(derandomize=True, deadline=None)
@given(VALUES, st.integers(1, 12))
def test_any_rule_when_before_min_rounds_never_stops(values, minimum):
    history = logs(*values, seconds=1.0, accepted=("north",), update_norm=1.0, state_norm=1.0)
    for rule in RULES:
        waiting = type(rule)(**{**vars(rule), "min_rounds": minimum})
        stopped = first_stop(waiting, history)
        assert stopped is None or stopped >= minimum


@settings(derandomize=True, deadline=None)
@given(VALUES, st.integers(1, 4))
def test_rolling_back_when_done_goes_to_the_best_round(values, patience):
    history = logs(*values)
    finite = [v for v in values if math.isfinite(v)]
    for rule in (Diverged(factor=1.5, patience=patience), NoImprovement("loss", patience, roll_back=True)):
        if (target := rule.rolls_back_to(history)) is not None:
            assert rule(history)
            assert values[target - 1] == min(finite)


@settings(derandomize=True, deadline=None)
@given(VALUES)
def test_reason_when_given_is_a_sentence_and_the_rule_is_pure(values):
    history = logs(*values, seconds=1.0, accepted=("north",), update_norm=1.0, state_norm=1.0)
    for rule in RULES:
        assert rule(history) == rule(list(history))
        assert rule(history) is None or rule(history).strip()


def test_best_round_when_equal_is_the_earliest():
    assert best_round(logs(2, 1, 1), "loss") == 2
    assert best_round(logs(0.2, 0.9, 0.9, metric="auc"), "auc") == 2
    assert best_round(logs(0.2, 0.9, metric="shared/auc"), "shared/auc") == 2
    assert best_round(logs(0.2, 0.9, metric="cost"), "cost", better="lower") == 1


def test_best_round_when_nobody_has_the_metric_says_what_there_is():
    with pytest.raises(UsageError, match="no round has a value of auc over mean; clients report loss"):
        best_round(logs(1.0), "auc")


def test_direction_when_unknown_asks_for_it():
    assert direction("shared/loss") == "lower"
    assert direction("auc") == "higher"
    assert direction("cost", "lower") == "lower"
    with pytest.raises(UsageError, match='"acuracy?'.replace('"', "'") + ".*better="):
        direction("acuracy")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Rounds(0), "rounds=0"),
        (lambda: Rounds(True), "rounds=True"),
        (lambda: TimeBudget(0), "above 0"),
        (lambda: Target("auc", math.nan), "finite"),
        (lambda: Target("acuracy", 0.5), "accuracy"),
        (lambda: NoImprovement("auc", 0), "patience=0"),
        (lambda: NoImprovement("auc", 1, -1), "min_delta=-1"),
        (lambda: Converged(on="params"), "update_norm"),
        (lambda: Converged(window=1), "window=1"),
        (lambda: Diverged("auc"), "lower is better"),
        (lambda: Diverged(factor=1.0), "factor=1.0"),
        (lambda: Diverged(patience=0), "patience=0"),
    ],
)
def test_rule_when_written_wrongly_says_what_to_write(make, words):
    with pytest.raises(UsageError, match=words):
        make()


def test_mistake_when_made_in_a_rule_is_noticed(monkeypatch):
    """min_rounds forgotten: the property above must fail."""
    monkeypatch.setattr(Stop, "__call__", lambda self, history: self.reason(history) if history else None)
    with pytest.raises(AssertionError):
        test_any_rule_when_before_min_rounds_never_stops()


# ---------------------------------------------------------------- rules that could never speak


@pytest.mark.parametrize(
    "rule", [Target("auc", 0.9), NoImprovement("loss", 2), Diverged(), Converged(), Rounds(3) | (Target("auc", 0.9) & Rounds(1))]
)  # fmt: skip
def test_check_when_nothing_is_evaluated_refuses_rules_over_metrics(rule):
    rule.check(["north"], evaluates=True)
    with pytest.raises(UsageError, match="evaluate_every=0 measures none"):
        rule.check(["north"], evaluates=False)


@pytest.mark.parametrize("rule", [Rounds(3), TimeBudget(2.0), Converged("update_norm"), Rounds(3) | TimeBudget(2.0)])
def test_check_when_no_metric_is_read_lets_a_run_without_evaluation_pass(rule):
    rule.check(["north"], evaluates=False)


@pytest.mark.parametrize(
    "make", [lambda over: Target("auc", 0.9, over), lambda over: NoImprovement("loss", 2, over=over)]
)
def test_check_when_over_names_nobody_says_who_is_there(make):
    for over in ("mean", "worst", "north"):
        make(over).check(["north", "south"], evaluates=True)
    make("nroth").check(None, evaluates=True)
    with pytest.raises(UsageError, match=r"over='nroth' is no client; .* one of north, south"):
        (Rounds(9) | make("nroth")).check(["north", "south"], evaluates=True)


def test_one_round_is_said_in_the_singular():
    assert Rounds(1)(logs(1)) == "1 round is done"


# ---------------------------------------------------------------- cost


class Counted(dict):
    """Metrics of a round that count how often all clients are gone through."""

    reads = 0

    def items(self):
        self.reads += 1
        return super().items()


def test_rules_when_the_history_grows_read_a_rounds_metrics_no_more_often():
    rule = NoImprovement("auc", 99, roll_back=True) | Diverged(factor=9.0) | Converged(window=3, tolerance=0.0)
    history = [RoundLog(i, metrics=Counted(a={"loss": 1.0 + i % 7, "auc": 0.5 + i / 99})) for i in range(1, 41)]
    for n in range(1, 41):
        assert rule(history[:n]) is None
        assert rule.keeps(history[:n]) == {best_round(history[:n], "auc"), best_round(history[:n], "loss")}
    assert max(log.metrics.reads for log in history) <= 3, "a round is worked out again in every later round"
    assert history[0] == RoundLog(1, metrics=dict(history[0].metrics)), "what was worked out is no part of the value"
