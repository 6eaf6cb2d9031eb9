"""FedMD's own choices: rounds without a consensus, orders, public rows, limits of its options."""

from dataclasses import replace

import numpy as np
import pytest
from numpy_model import CLASSES, VALUES, NumpyModel, rows_of, sites_of

from polyfed.algorithms import FedMD
from polyfed.core.algorithm import Needs
from polyfed.core.checks_algorithm import play, server_env, work
from polyfed.core.errors import DataError, UsageError
from polyfed.core.message import Message
from polyfed.core.terms import Distill, Match, Own


def requests(algorithm, rounds, problem=CLASSES):
    """The terms of what the client "north" is asked to fit, in order, and the epochs."""
    models = {name: NumpyModel() for name in ("north", "south", "west")}
    play(algorithm, sites_of(models, problem), rounds=rounds)
    return [(request.terms[0], request.epochs) for request in models["north"].log]


def test_first_round_when_there_is_no_consensus_trains_on_own_rows_alone():
    for order in ("last", "paper"):
        assert requests(FedMD(range(9), order=order), 1) == [(Own(), None)]


def test_later_rounds_when_digest_is_last_follow_the_revisit():
    own, lesson = (Own(), 4), (Distill(2.0, 1.0), 3)
    options = {"digest": 3, "revisit": 4}
    assert requests(FedMD(range(9), **options), 3) == [own, own, lesson, own, lesson]
    assert requests(FedMD(range(9), order="paper", **options), 3) == [own, lesson, own, lesson, own]


def test_digest_when_zero_never_asks_for_it():
    assert requests(FedMD(range(9), digest=0), 3) == [(Own(), None)] * 3


def test_regression_when_digested_matches_values():
    assert requests(FedMD(range(9), strength=0.5), 2, VALUES)[-1] == (Match(0.5), 1)


def test_upload_when_made_is_probabilities_by_rows_and_classes():
    played = play(FedMD(range(9)), sites_of(), rounds=2)
    for upload in played.uploads.values():
        soft = upload.trees["soft"]["public"]
        assert list(upload.trees) == ["soft"]
        assert (soft.shape, soft.dtype) == ((9, 3), np.dtype(np.float32))
        assert (soft >= 0).all()


def test_upload_when_logits_are_averaged_is_centred():
    soft = play(FedMD(range(9), average="logits"), sites_of(), rounds=1).uploads["north"].trees["soft"]["public"]
    np.testing.assert_allclose(soft.mean(1), 0, atol=1e-6)


def test_consensus_when_known_pulls_predictions_together():
    def spread(played):
        return np.std([upload.trees["soft"]["public"] for upload in played.uploads.values()], axis=0).mean()

    models = {"north": NumpyModel(3), "south": NumpyModel(6), "west": NumpyModel(0)}
    alone = play(FedMD(range(9), digest=0), sites_of(models), rounds=6)
    together = play(FedMD(range(9), digest=5), sites_of(models), rounds=6)
    assert spread(together) < 0.7 * spread(alone)


def test_public_rows_when_counted_may_be_an_array_a_mapping_or_rows():
    env = server_env(sites_of(), 0)
    for public in (range(9), np.zeros((9, 2)), {"x": np.zeros((9, 2))}, rows_of(9)):
        assert FedMD(public).init(env).numbers == {"public_rows": 9.0}
    assert FedMD().init(replace(env, public=rows_of(9))).numbers == {"public_rows": 9.0}


def test_public_rows_when_there_are_none_says_what_to_write():
    with pytest.raises(UsageError, match=r"FedMD\(public=rows\)"):
        FedMD().init(server_env(sites_of(), 0))


def test_client_when_it_lost_public_rows_is_told():
    algorithm, sites = FedMD(range(12)), sites_of()
    start = play(algorithm, sites, rounds=0)
    with pytest.raises(DataError, match=r"north has 9 public rows after its own pipeline, the server counts 12"):
        work(algorithm, sites["north"], start, server_env(sites, 0, 1))
    with pytest.raises(DataError, match="north has no public rows"):
        work(algorithm, replace(sites["north"], public=None), start, server_env(sites, 0, 1))


def test_client_when_public_rows_carry_labels_never_shows_them_to_the_model():
    sites = {name: replace(site, public=rows_of(9, stream="public")) for name, site in sites_of().items()}
    assert sites["north"].public.target is not None
    plain = play(FedMD(range(9)), sites_of(), rounds=3)
    assert play(FedMD(range(9)), sites, rounds=3).digest == plain.digest
    assert all(request.rows is None or request.rows.target is None for request in sites["north"].model.log)


def test_cohort_when_partial_averages_those_who_took_part():
    algorithm = FedMD(range(9))
    played = play(algorithm, sites_of(), rounds=1, cohort=lambda _: ["north", "west"])
    said = [upload.trees["soft"]["public"] for upload in played.uploads.values()]
    np.testing.assert_allclose(played.state.trees["soft"]["public"], (said[0] + said[1]) / 2, rtol=1e-6)


def test_start_when_a_newcomer_is_evaluated_is_its_first_state():
    played = play(FedMD(range(9)), sites_of(), rounds=1)
    assert FedMD().start(played.state, Message()) == ()
    assert FedMD().start(played.state, played.memories["north"]) == (played.memories["north"].trees["own"],)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"strength": -1.0}, "strength=-1.0"),
        ({"digest": -1}, "digest=-1"),
        ({"revisit": 0}, "revisit=0"),
        ({"order": "first"}, 'order=.first. is unknown; write "last" or "paper"'),
        ({"average": "labels"}, 'write "probabilities" or "logits"'),
        ({"weighting": "rows"}, 'write "uniform", "num_examples", "certainty" or "entropy"'),
    ],
)
def test_option_when_wrong_says_what_to_write(options, words):
    with pytest.raises(UsageError, match=words):
        FedMD(**options)


def test_needs_when_asked_are_predictions_and_distillation():
    assert FedMD().needs == Needs.all("predict", "distill", "public")
