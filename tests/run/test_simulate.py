from __future__ import annotations

import json

import numpy as np
import pytest
from federations import clients, rows, run
from sklearn.datasets import load_diabetes
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LinearRegression, SGDClassifier
from torch import nn

import polyfed as pf
from polyfed.core.message import Message
from polyfed.run.client import PreprocessingWarning


def sgd():
    return pf.sklearn(SGDClassifier(loss="log_loss"), epochs=2)


def bits(result):
    return {
        "state": result.state.digest,
        "memories": {name: memory.digest for name, memory in result.memories.items()},
        "test": {name: dict(metrics) for name, metrics in result.test.items()},
        "metrics": [log.metrics for log in result.history],
    }


def mixed():
    split = pf.Split(public=0.2)
    return [
        pf.Client("net", pf.torch(lambda: nn.Linear(3, 2)), data=rows(0), split=split),
        pf.Client("forest", pf.sklearn(RandomForestClassifier(5)), data=rows(1), split=split),
        pf.Client("linear", sgd(), data=rows(2), split=split),
    ]


# ---------------------------------------------------------------------------------------------- the open loop


def test_the_open_loop_gives_the_bits_of_simulate():
    members = clients(model=sgd)
    loop = pf.rounds(pf.FedAvg(), members, rounds=3)
    numbers = []
    for round_ in loop:
        jobs = round_.send()
        assert tuple(job.task.client for job in jobs) == round_.cohort == ("north", "south", "west")
        for reply in round_.train(jobs):
            round_.collect(reply)
        numbers.append(round_.update().round_num)
    assert numbers == [1, 2, 3]
    assert bits(loop.result) == bits(run(members=members, rounds=3))


def test_a_round_does_the_steps_that_are_left_out():
    members = clients(model=sgd)
    loop = pf.rounds(pf.FedAvg(), members, rounds=3)
    for round_ in loop:
        if round_.number == 2:
            for reply in round_.train(round_.send()):
                round_.collect(reply)
    assert bits(loop.result) == bits(run(members=members, rounds=3))


def test_a_loop_that_is_left_ends_with_the_result_so_far():
    loop = pf.rounds(pf.FedAvg(), clients(model=sgd), rounds=5)
    for round_ in loop:
        if round_.update().round_num == 2:
            break
    result = loop.result
    assert (len(result.history), result.version, result.reason) == (2, 2, "the loop was left")
    assert result.state.digest == run(members=clients(model=sgd), rounds=2).state.digest


def test_replies_that_are_collected_in_another_order_give_the_same_bits():
    members = mixed()
    loop = pf.rounds(pf.FedMD(), members, rounds=2)
    for round_ in loop:
        for reply in reversed(list(round_.train(round_.send()))):
            round_.collect(reply)
    assert bits(loop.result) == bits(run(pf.FedMD(), members))


# ---------------------------------------------------------------------------------------------- who, where, how often


def test_processes_give_the_bits_of_the_loop():
    here = bits(run(pf.FedMD(), mixed()))
    there = bits(run(pf.FedMD(), mixed(), executor="processes", workers=2))
    assert here == there


def test_a_cohort_is_drawn_and_the_others_keep_what_they_have():
    names = ("a", "b", "c", "d")
    result = run(members=clients(names, model=sgd), cohort_size=2, rounds=4)
    cohorts = [log.cohort for log in result.history]
    assert all(len(cohort) == 2 and log.accepted == cohort for cohort, log in zip(cohorts, result.history, strict=True))
    assert len(set(cohorts)) > 1
    assert result.is_complete
    assert set(result.history[0].metrics) == set(names)


def test_another_seed_gives_other_bits_and_the_same_seed_the_same():
    assert bits(run(members=clients(model=sgd), seed=1)) == bits(run(members=clients(model=sgd), seed=1))
    assert bits(run(members=clients(model=sgd), seed=1)) != bits(run(members=clients(model=sgd), seed=2))


def test_without_evaluation_nothing_is_logged_but_the_test_rows_are_read():
    result = run(evaluate_every=0)
    assert all(not log.metrics for log in result.history)
    assert set(result.test) == {"north", "south", "west"}
    assert not run(test=False).test


def test_different_preprocessing_under_averaging_is_warned_of_with_the_sites_named():
    from sklearn.preprocessing import MinMaxScaler, StandardScaler

    members = [
        pf.Client(name, sgd(), data=rows(i), preprocess=step)
        for i, (name, step) in enumerate({"north": StandardScaler(), "south": MinMaxScaler()}.items())
    ]
    with pytest.warns(PreprocessingWarning, match="north: StandardScaler.*south: MinMaxScaler"):
        result = run(members=members)
    assert any("preprocess differently" in note for note in result.notes)


# ---------------------------------------------------------------------------------------------- stopping


class Worse(pf.FedAvg):
    """Gets worse from round 3 on: the server turns its parameters round."""

    def server_update(self, state, aggregate, env):
        after = super().server_update(state, aggregate, env)
        return after.put(trees={"params": after.trees["params"] * -1.0}) if env.round_num >= 3 else after


def test_no_improvement_rolls_back_to_the_best_round_state_and_memories():
    members = clients(
        model=lambda: pf.torch(lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)))
    )
    stop = pf.NoImprovement("loss", patience=2, roll_back=True)
    result = run(Worse(), members, rounds=10, stop=stop)
    losses = [np.mean([m["loss"] for m in log.metrics.values()]) for log in result.history]
    best = int(np.argmin(losses)) + 1
    assert result.version == best < len(result.history)
    fresh = run(Worse(), members, rounds=best)
    assert result.state.digest == fresh.state.digest
    assert {n: m.digest for n, m in result.memories.items()} == {n: m.digest for n, m in fresh.memories.items()}
    assert result.test == fresh.test


def test_a_target_ends_the_run_when_it_is_reached_and_is_said_when_it_is_not():
    reached = run(rounds=5, stop=pf.Target("accuracy", 0.6))
    assert len(reached.history) == 1
    assert "the target is 0.6" in reached.reason
    assert reached.is_complete
    missed = run(rounds=2, stop=pf.Target("loss", 1e-9))
    assert missed.unmet
    assert not missed.is_complete
    assert f"not reached: {missed.unmet}" in missed.table()


def test_a_rollback_after_a_resume_finds_the_memories_in_their_files(tmp_path):
    members = clients(
        model=lambda: pf.torch(lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)))
    )
    options = {
        "rounds": 10,
        "stop": pf.NoImprovement("loss", patience=2, roll_back=True),
        "checkpoint": tmp_path / "run",
    }
    loop = pf.rounds(Worse(), members, **options)
    rounds = iter(loop)
    for _ in range(4):  # three rounds done, the fourth under way; then the process is gone
        next(rounds)
    loop.run.driver.coordinator.journal.close()
    result = run(Worse(), members, **options)
    whole = run(Worse(), members, **{**options, "checkpoint": None})
    assert result.version < len(result.history)
    assert bits(result) == bits(whole)
    loop.run.driver.interrupt = lambda *_: None  # its journal is closed; let the abandoned loop go quietly


# ---------------------------------------------------------------------------------------------- interruption


class Stopped(pf.FedAvg):
    """Ctrl-C while the second round is under way, after one client's update was accepted."""

    def client_update(self, message, memory, env):
        if env.round_num == 2 and env.client == "south":
            raise KeyboardInterrupt
        return (yield from super().client_update(message, memory, env))


def test_ctrl_c_ends_with_the_last_whole_round():
    members = clients(
        model=lambda: pf.torch(lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)))
    )
    result = pf.simulate(Stopped(), members, rounds=5)
    whole = run(members=members, rounds=1)
    assert (result.interrupted, result.reason, result.version, result.baselines) == (True, "interrupted", 1, {})
    assert not result.is_complete
    assert result.state.digest == whole.state.digest
    assert {n: m.digest for n, m in result.memories.items()} == {n: m.digest for n, m in whole.memories.items()}
    assert result.to_dict()["interrupted"] is True
    assert "validation rows" in result.table()
    assert result.rows()[0]["validation"] == result.history[0].metrics["north"]["auc"]


def test_ctrl_c_with_a_checkpoint_is_said_and_the_same_call_goes_on(tmp_path, monkeypatch):
    turns = []
    fit = type(sgd()).fit

    def tired(self, *args):
        turns.append(1)
        if len(turns) == 5:  # in round 2
            raise KeyboardInterrupt
        return fit(self, *args)

    monkeypatch.setattr(type(sgd()), "fit", tired)
    options = {"members": clients(model=sgd), "rounds": 3, "checkpoint": tmp_path / "run"}
    first = run(**options)
    assert (first.interrupted, first.reason, first.version) == (True, "interrupted", 1)
    assert bits(run(**options)) == bits(run(members=clients(model=sgd), rounds=3))


def test_ctrl_c_in_the_first_round_ends_with_the_start():
    class AtOnce(pf.FedAvg):
        def client_update(self, message, memory, env):
            if env.client == "south":
                raise KeyboardInterrupt
            return (yield from super().client_update(message, memory, env))

    result = pf.simulate(AtOnce(), clients(), rounds=5)
    assert (result.interrupted, result.version, len(result.history)) == (True, 0, 0)
    assert all(memory == Message() for memory in result.memories.values())
    assert result.table()


def test_ctrl_c_while_the_baselines_are_worked_out_keeps_the_federation():
    class Slow(pf.FedAvg):
        pass

    tired = pf.sklearn(SGDClassifier(loss="log_loss"))
    fits = []
    fit = type(tired).fit

    def counting(self, *args):
        fits.append(1)
        if len(fits) > 6:
            raise KeyboardInterrupt
        return fit(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(tired), "fit", counting)
        result = pf.simulate(Slow(), clients(model=sgd), rounds=2)
    assert result.interrupted
    assert result.reason == "2 rounds are done"
    assert set(result.test) == {"north", "south", "west"}
    assert result.baselines == {}


# ---------------------------------------------------------------------------------------------- results


def test_models_are_the_frameworks_own_and_predict_what_was_measured():
    members = clients(model=lambda: pf.sklearn(SGDClassifier(loss="log_loss"), epochs=5))
    result = run(members=members)
    for name in ("north", "south"):
        rows_ = result.population.sites[name].test
        right = np.mean(result.models[name].predict(rows_.x) == rows_.target)
        assert right == pytest.approx(result.test[name]["accuracy"])
    assert type(result.model) is SGDClassifier
    assert np.array_equal(result.model.coef_, result.models["north"].coef_)
    with pytest.raises(pf.errors.UsageError, match="there is no client 'nobody'"):
        result.models["nobody"]


def test_an_algorithm_that_shares_no_whole_model_says_whose_to_take():
    result = run(pf.FedMD(), mixed())
    with pytest.raises(pf.errors.UsageError, match=r"result.models\['net'\]"):
        _ = result.model


def test_a_linear_regression_is_measured_by_its_errors_and_equals_the_pooled_one():
    data = load_diabetes()
    parts = np.array_split(np.random.default_rng(0).permutation(len(data.target)), 3)
    members = [
        pf.Client(f"site{i}", pf.sklearn(LinearRegression()), data=(data.data[at], data.target[at]))
        for i, at in enumerate(parts)
    ]
    result = run(members=members, baselines=("alone", "pooled"))
    assert result.metric == "mae"
    for name, metrics in result.test.items():  # averaged moments are the moments of all rows
        assert metrics["mae"] == pytest.approx(result.baselines["pooled"][name]["mae"], rel=1e-4)
        assert metrics["r2"] > 0.1
    assert "lower is better" in result.table()
    row = result.rows()[0]
    assert row["difference"] == row["federated"] - row["alone"]


def test_whole_numbers_are_values_when_it_is_said():
    x, _ = rows(0)
    visits = np.arange(len(x)) % 7
    result = run(members=[pf.Client("a", pf.sklearn(LinearRegression()), data=(x, visits))], task="regression")
    assert result.metric == "mae"


def test_baselines_alone_has_the_public_rows_back_and_pooled_has_everybodys():
    members = mixed()
    result = run(pf.FedMD(), members, baselines=("alone", "pooled"))
    assert set(result.baselines) == {"alone", "pooled"}
    assert not result.notes
    for name in ("net", "forest", "linear"):
        assert set(result.baselines["pooled"][name]) == set(result.test[name])
    # Alone by hand: the same model, all labelled rows that are neither validation nor test.
    part = result.population.parts["linear"]
    alone = pf.Client("linear", sgd(), data=rows(2), split=part.with_public())
    by_hand = run(pf.Local(), [alone], rounds=2)
    assert by_hand.test["linear"] == result.baselines["alone"]["linear"]


def test_the_table_has_a_row_a_client_and_their_mean():
    result = run(pf.FedMD(), mixed(), baselines=("alone", "pooled"))
    lines = result.table().splitlines()
    assert lines[0].split() == ["auc", "model", "rows", "alone", "pooled", "federated", "difference"]
    assert [line.split()[0] for line in lines[2:6]] == ["net", "forest", "linear", "mean"]
    assert lines[3].split()[1] == "RandomForestClassifier"
    values = [row["federated"] for row in result.rows()]
    assert lines[5].split()[-2] == f"{sum(values) / 3:.3f}"
    assert "auc on each client's test rows (higher is better); 2 rounds; 2 rounds are done" in lines
    assert "accuracy" in result.table("accuracy")


def test_to_dict_is_json_and_holds_what_a_machine_wants():
    result = run(pf.FedMD(), mixed(), baselines=("alone",))
    said = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert said["algorithm"]["name"] == "FedMD"
    assert said["complete"] is True
    assert said["clients"]["forest"]["rows"]["public"] == len(result.population.parts["forest"].public) > 0
    assert len(said["history"]) == said["rounds"] == 2
    assert said["bytes_up"] == sum(log["bytes_up"] for log in said["history"]) > 0
    assert said["versions"]["polyfed"] == pf.__version__


def test_model_or_initial_starts_where_it_says():
    start = nn.Linear(3, 2)
    members = clients(model=lambda: pf.torch(lambda: nn.Linear(3, 2)))
    loop = pf.rounds(pf.FedAvg(model=pf.torch(start)), members, rounds=1)
    state = next(iter(loop)).state
    assert np.array_equal(state.trees["params"]["weight"], start.weight.detach().numpy())
    with pytest.raises(pf.errors.UsageError, match="takes 5 inputs, got 3"):
        run(pf.FedAvg(model=pf.torch(nn.Linear(5, 2))), members)
    with pytest.raises(pf.errors.SpecError, match="does not fit"):
        run(pf.FedAvg(initial=pf.Tree({"weight": np.zeros((2, 5), np.float32)})), members)
    with pytest.raises(pf.errors.UsageError, match="model= must be wrapped"):
        run(pf.FedAvg(model=start), members)
