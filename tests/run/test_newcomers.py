"""Clients that come late, go away and come back; whose base is frozen; and who start from a run that has ended."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest

import polyfed as pf
from polyfed.core.errors import NeedsError, SpecError, UsageError
from polyfed.core.message import Message
from polyfed.storage.journal import FileJournal

sys.path.insert(0, str(Path(__file__).parents[1] / "algorithms"))
from numpy_model import NumpyModel, rows_of

NAMES = ("north", "south", "west")


def client(name, model=None, n=30, **more):
    rows = rows_of(n, stream=name)
    return pf.Client(name, model or NumpyModel(), (rows.x, rows.target), split=pf.Split(0.2, 0.2), **more)


def clients(**more):
    """Three clients; `more`: name -> what is special about it."""
    return [client(name, **more.get(name, {})) for name in NAMES]


def run(members, algorithm=None, **options):
    algorithm = algorithm or pf.FedAvg(shared="base")
    return pf.simulate(algorithm, members, **{"rounds": 5, "seed": 1, "baselines": (), **options})


def digest(result):
    return [result.state.digest, *(m.digest for m in result.memories.values()), result.test]


LATE = {"west": {"joins_at": 3}}
#: north is there all the time, south leaves and returns, west comes late and is away at the end
COMING = {"south": {"away": (2, 3)}, "west": {"joins_at": 3, "away": (5,)}}


# ---------------------------------------------------------------- who takes part when


def test_newcomer_when_it_joins_is_asked_from_then_on_and_not_evaluated_before():
    result = run(clients(**LATE))
    assert [log.cohort for log in result.history] == [NAMES[:2]] * 2 + [NAMES] * 3
    assert [set(log.metrics) for log in result.history] == [set(NAMES[:2])] * 2 + [set(NAMES)] * 3
    assert set(result.test) == set(NAMES)
    assert result.notes == ()


def test_newcomer_when_it_joins_receives_the_shared_base_bit_for_bit_and_nothing_else():
    loop = pf.rounds(pf.FedAvg(shared="base"), clients(**LATE), rounds=3, seed=1)
    for round_ in loop:
        base, jobs = round_.state.trees["params"], round_.send()
        for reply in round_.train(jobs):
            round_.collect(reply)
    (job,) = [job for job in jobs if job.task.client == "west"]
    assert job.message.trees["params"] == base
    assert set(base) == {"base.w", "base.b"}
    assert job.memory == Message()
    first = loop.run.population.first["NumpyModel"]
    assert base != first.only(base), "a newcomer starts from the base as it is, not from the first one"


def test_leaver_when_it_returns_finds_its_memory_as_it_was():
    loop = pf.rounds(pf.FedAvg(shared="base"), clients(south={"away": (2, 3)}), rounds=4, seed=1)
    memories, sent = [], {}
    for round_ in loop:
        jobs = round_.send()
        sent[round_.number] = {job.task.client: job for job in jobs}
        for reply in round_.train(jobs):
            round_.collect(reply)
        round_.update()
        memories.append(loop.run.driver.memories["south"].current)
    assert [sorted(found) for found in sent.values()] == [
        list(NAMES),
        ["north", "west"],
        ["north", "west"],
        list(NAMES),
    ]
    assert memories[0] == memories[1] == memories[2] == sent[4]["south"].memory != memories[3]
    assert sent[4]["south"].task.number == 1, "its own tasks are counted, not the rounds"


def test_group_when_its_first_client_joins_later_starts_as_that_client_does():
    """Its parameters differ in shape from those of the clients that are there from the start."""
    models = {"west": {"model": NumpyModel(hidden=7), "joins_at": 3}}
    alone = run(clients(west={"model": NumpyModel(hidden=7), "joins_at": 1}), pf.Local(), rounds=3)
    late = run(clients(**models), pf.Local())
    assert late.state_of("west") == alone.state_of("west"), "three rounds are three rounds"
    with pytest.raises(SpecError, match="cannot average NumpyModel-2 with NumpyModel"):
        run(clients(**models))


@pytest.mark.parametrize(
    "options", [{"cohort_size": 2}, {"schedule": pf.Sync(pf.Available(None, lambda r: NAMES[r > 3 :]))}]
)
def test_cohort_when_it_is_chosen_is_chosen_from_those_who_are_there(options):
    result = run(clients(**COMING, north={"away": (3,)}), **options)
    for log in result.history:
        there = {c.name for c in clients(**COMING, north={"away": (3,)}) if c.is_present(log.round_num)}
        assert set(log.cohort) <= there
        assert set(log.metrics) == there


def test_asynchronous_round_when_clients_come_and_go_asks_those_who_are_there():
    result = run(clients(**COMING), pf.FedAvg(), schedule=pf.Buffered(concurrency=2, goal=2))
    for log in result.history:
        there = {c.name for c in clients(**COMING) if c.is_present(log.round_num)}
        assert set(log.cohort) <= there  # what came in before its client left may still be accepted
        assert set(log.metrics) <= there
    assert len(result.history) == 5


@pytest.mark.parametrize(
    ("special", "options", "said"),
    [
        (
            {key: {"joins_at": 2} for key in NAMES},
            {},
            r"round 1 needs 1 of the clients and 0 take part: north joins at 2.*; let at least one have joins_at=1$",
        ),
        ({key: {"away": (4,)} for key in NAMES}, {}, r"round 4 .* 0 take part: north is away, south is away"),
        (COMING, {"schedule": pf.Sync(minimum=2)}, r"round 2 needs 2 of the clients and 1 take part: south is away"),
    ],
)
def test_round_when_too_few_would_be_there_is_refused_before_the_first(special, options, said):
    with pytest.raises(UsageError, match=said):
        run(clients(**special), **options)


def test_round_when_nobody_would_be_there_after_the_last_one_does_not_matter():
    assert len(run(clients(**{key: {"away": (6,)} for key in NAMES})).history) == 5


@pytest.mark.parametrize(("field", "value"), [("joins_at", 0), ("joins_at", 1.5), ("away", (0,)), ("away", ("3",))])
def test_round_when_it_is_none_is_refused_with_the_clients_name(field, value):
    with pytest.raises(UsageError, match=rf"north: {field}=.* is no round"):
        client("north", **{field: value})


# ---------------------------------------------------------------- what is said of them at the end


def test_test_rows_when_a_client_is_away_at_the_end_are_not_read_and_that_is_said():
    result = run(clients(**COMING), baselines=None)
    assert set(result.test) == set(result.baselines["alone"]) == {"north", "south"}
    assert result.notes == ("west was away when the run ended, in round 5: its test rows were not read",)
    assert result.notes[0] in result.table()
    (row,) = [line for line in result.table().splitlines() if line.startswith("west  ")]
    assert row.split() == ["west", "NumpyModel", "18", "-", "-", "-"]
    assert result.models["west"]["head.w"].shape == (4, 3), "its model is there all the same"


def test_client_when_it_joins_after_the_end_never_takes_part_and_that_is_said():
    result = run(clients(west={"joins_at": 9}))
    assert "west was to join at round 9, after the run's last" in result.table()
    assert result.memories["west"] == Message()
    newcomers = result.algorithm.broadcast(result.state, "west", result.federation.env(5, 3, "west")).trees["params"]
    assert result.state_of("west").only(newcomers) == newcomers


def test_baseline_when_a_client_comes_late_trains_it_in_as_many_rounds():
    late = run(clients(**LATE), baselines=("alone",), rounds=4)
    short = run(clients(), pf.Local(), rounds=2)
    assert late.baselines["alone"]["west"] == short.test["west"]


def test_report_when_clients_come_and_go_is_written_and_says_who_was_away(tmp_path):
    page = run(clients(**COMING), baselines=None).report(tmp_path / "report.html").read_text()
    assert "west was away when the run ended" in page
    assert "nan" not in page.lower().replace("governance", "")


# ---------------------------------------------------------------- the same bits


def test_bits_when_clients_come_and_go_are_those_of_the_loop_in_processes():
    assert digest(run(clients(**COMING), executor="processes", workers=2)) == digest(run(clients(**COMING)))


class _StopError(Exception):
    pass


def test_run_when_it_is_killed_after_any_record_goes_on_with_the_same_bits(tmp_path, monkeypatch):
    """Among them the moments between a client's coming and the round for which it comes."""
    coming, options = {"south": {"away": (2,)}, "west": {"joins_at": 2}}, {"rounds": 3, "evaluate_every": 2}
    whole, append = digest(run(clients(**coming), **options)), FileJournal.append
    monkeypatch.setattr(os, "fsync", lambda _: None)  # nothing but this process dies here

    def killed_at(limit):
        done = 0

        def appended(self, records):
            nonlocal done
            append(self, records)
            done += 1
            if done == limit:
                raise _StopError

        return appended

    for limit in range(1, 100):
        folder = tmp_path / str(limit)
        monkeypatch.setattr(FileJournal, "append", killed_at(limit))
        try:
            run(clients(**coming), checkpoint=folder, **options)
            break
        except _StopError:
            monkeypatch.setattr(FileJournal, "append", append)
            assert digest(run(clients(**coming), checkpoint=folder, **options)) == whole, limit
    assert limit > 15, "the run has been killed everywhere"


def test_checkpoint_when_clients_come_at_other_rounds_is_another_runs(tmp_path):
    run(clients(**COMING), checkpoint=tmp_path)
    with pytest.raises(pf.errors.StorageError, match="when clients take part"):
        run(clients(**LATE), checkpoint=tmp_path)


def test_memory_when_the_run_rolls_back_to_before_a_client_came_is_empty():
    stop = pf.NoImprovement("loss", patience=2, better="higher", roll_back=True)  # the best is the first
    result = run(clients(west={"joins_at": 2}), stop=stop, rounds=9)
    assert result.version == 1
    assert result.memories["west"] == Message()
    assert result.memories["south"] != Message()


# ---------------------------------------------------------------- a frozen base


def statistics():
    return {name: {"model": NumpyModel(statistics=True, batch_size=5, dtype="float32", lr=0.1)} for name in NAMES}


@pytest.mark.parametrize("special", [{}, statistics()])
@pytest.mark.parametrize(
    "algorithm", [pf.FedAvg(shared="base"), pf.FedAdam(shared="base", lr=0.05), pf.FedPer(every=2)]
)
def test_base_when_a_client_keeps_it_frozen_goes_as_if_that_client_were_not_there(algorithm, special):
    frozen = special | {"west": special.get("west", {}) | {"freeze": "base"}}
    with_it, without = run(clients(**frozen), algorithm), run(clients(**special)[:2], algorithm)
    assert with_it.state.digest == without.state.digest
    own = with_it.memories["west"].trees["own"]
    assert own["head.w"].shape == (4, 3)
    first = with_it.population.first["NumpyModel"]
    assert own["head.w"].tobytes() != first["head.w"].tobytes(), "its head trains"


def test_base_when_a_part_of_it_is_frozen_counts_for_the_rest():
    whole, part = run(clients(), rounds=1), run(clients(west={"freeze": "base.w"}), rounds=1)
    two = run(clients()[:2], rounds=1)
    params = [result.state.trees["params"] for result in (whole, part, two)]
    assert np.array_equal(params[1]["base.w"], params[2]["base.w"])
    assert not np.array_equal(params[1]["base.b"], params[2]["base.b"]), "west's bias counts"


def test_base_when_everybody_keeps_it_frozen_stays_as_it_was():
    special = {name: entry | {"freeze": "base"} for name, entry in statistics().items()}
    result = run(clients(**special))
    first = result.population.first["NumpyModel"]
    for tree in result.state.trees.values():
        assert first.only(tree) == tree


def test_base_when_a_frozen_client_pulled_the_mean_would_be_noticed(monkeypatch):
    """A mutant: counts of one for everybody."""
    from polyfed.algorithms import fedavg

    counts = fedavg.counts_of
    monkeypatch.setattr(fedavg, "counts_of", lambda spec, frozen: counts(spec, ("nothing",)))  # the mistake
    with pytest.raises(AssertionError):
        test_base_when_a_client_keeps_it_frozen_goes_as_if_that_client_were_not_there(pf.FedAvg(shared="base"), {})


# ---------------------------------------------------------------- after a run has ended


def torch_net(width=6):
    from collections import OrderedDict

    from torch import nn

    def net():
        base = nn.Sequential(nn.Linear(5, width), nn.ReLU())
        return nn.Sequential(OrderedDict(base=base, head=nn.Linear(width, 3)))

    return pf.torch(net, lr=0.1)


def keras_net(width=6):
    def net():
        import keras

        layers = keras.layers
        return keras.Sequential(
            [layers.Input((5,)), layers.Dense(width, "relu", name="base"), layers.Dense(3, name="head")]
        )

    return pf.keras(net, lr=0.1)


NETS = {"torch": torch_net, "keras": keras_net}
FED = {"feedback": "mean", "shared": "base"}


@pytest.fixture(scope="module", params=NETS)
def ended(request, tmp_path_factory):
    """A framework's name, a run that has ended, and the same read from its files."""
    made = NETS[request.param]
    members = [client(name, made(), consents="personal") for name in NAMES[:2]]
    result = run(members, pf.FedPer(**FED), rounds=2)
    folder = result.save(tmp_path_factory.mktemp("ended") / request.param)
    return made, result, pf.load(folder)


def test_newcomer_when_it_starts_from_a_saved_run_begins_with_its_base_and_its_default_head(ended):
    made, result, saved = ended
    (head,) = [tree for name, tree in saved.state.trees.items() if name.startswith("head.")]
    alone = run([client("east", made(), start=saved)], pf.Local(epochs=0), rounds=1)
    begun = alone.population.sites["east"].begins.trees["own"]
    assert begun.only(head) == head
    assert begun.only(saved.state.trees["params"]) == result.state.trees["params"]
    again = run([client("east", made(), start=result)], pf.Local(), rounds=3)
    frozen = run([client("east", made(), start=saved, freeze="base")], pf.Local(), rounds=3)
    fresh = run([client("east", made())], pf.Local(), rounds=3)
    base = result.state.trees["params"]
    assert frozen.state_of("east").only(base) == base
    assert again.state_of("east").only(base) != base
    assert len({r.state_of("east").digest for r in (again, frozen, fresh)}) == 3


def test_newcomer_when_it_joins_others_from_a_saved_run_trains_under_the_shared_base(ended):
    made, _, saved = ended
    members = [client(name, made(), start=saved, consents="personal") for name in ("east", "far")]
    loop = pf.rounds(pf.FedPer(**FED, initial=saved), members, rounds=1, seed=1)
    for round_ in loop:
        assert round_.state.trees["params"] == saved.state.trees["params"]


def test_client_when_it_was_in_the_saved_run_takes_its_personal_part_as_well(ended):
    made, result, saved = ended
    own = result.memories["north"].trees["own"]
    (site,) = run([client("north", made(), start=saved)], pf.Local(), rounds=1).population.sites.values()
    for name in own:
        assert np.array_equal(site.begins.trees["own"][name], own[name])


def test_base_when_it_does_not_fit_is_refused_with_client_and_entry(ended):
    made, _, saved = ended
    (entry, *_) = saved.state.trees["params"]
    with pytest.raises(SpecError, match=rf"east: what start= shares does not fit its model .*{entry} is float32"):
        run([client("east", made(width=9), start=saved)], pf.Local())


def test_start_when_a_tree_of_some_entries_takes_those_and_leaves_the_rest(ended):
    made, _, saved = ended
    base = saved.state.trees["params"]
    (name, *_) = base
    site = run([client("east", made(), start=base.only([name]))], pf.Local(), rounds=1).population.sites["east"]
    assert list(site.begins.trees["own"]) == [name]
    with pytest.raises(SpecError, match="east: nothing of start= fits"):
        run([client("east", made(width=9), start=base.only([name]))], pf.Local())


def test_start_when_the_run_averaged_nothing_is_its_own_clients_alone():
    alone = run(clients(), pf.Local(), rounds=1)
    site = run([client("north", start=alone)], pf.Local(), rounds=1).population.sites["north"]
    assert site.begins.trees["own"] == alone.memories["north"].trees["own"]
    with pytest.raises(UsageError, match="east: start= holds no shared parameters"):
        run([client("east", start=alone)], pf.Local())
    with pytest.raises(UsageError, match="north: start= is a int"):
        run([client("north", start=3)], pf.Local())


# ---------------------------------------------------------------- consent


@pytest.mark.parametrize("feedback", ["mean", "distill"])
def test_personal_part_when_its_client_has_not_agreed_is_not_asked_for(feedback):
    public = rows_of(9, stream="public", labelled=False).x
    members = clients(**{name: {"consents": "personal"} for name in NAMES[:2]})
    with pytest.raises(
        NeedsError, match=r'west \(NumpyModel\) has not agreed .*consents="personal".*FedPer needs that'
    ):
        run(members, pf.FedPer(feedback=feedback, public=public))
    assert run([*members[:2], client("west", consents="personal")], pf.FedPer(feedback=feedback, public=public))
    assert run(members, pf.FedPer(every=2)), "without feedback nothing personal leaves"
