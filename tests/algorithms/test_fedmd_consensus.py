"""What clients' predictions on public rows come to: weights, sharpening, and what is refused."""

from dataclasses import replace

import numpy as np
import pytest
from numpy_model import CLASSES, VALUES, NumpyModel, rows_of, sites_of
from scipy.special import softmax
from scipy.stats import entropy
from sklearn.compose import TransformedTargetRegressor
from sklearn.linear_model import LinearRegression, Perceptron, RidgeClassifier
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC

from polyfed.algorithms import FedMD
from polyfed.algorithms.consensus import Consensus, certainty, sharpened, softened
from polyfed.core.aggregate import Fold, validate
from polyfed.core.algorithm import Env, Predict
from polyfed.core.checks_algorithm import check_algorithm, client_env, play, server_env, work
from polyfed.core.errors import DataError, UsageError
from polyfed.core.message import Message
from polyfed.core.tree import Tree
from polyfed.models.sklearn import sklearn

WEIGHTINGS = ("uniform", "num_examples", "certainty", "entropy")
ROWS = range(9)


def outputs(seed=0, *, scale=2.0, rows=9, classes=3):
    return np.random.default_rng(seed).normal(0, scale, (rows, classes)).astype(np.float32)


def agreed(algorithm, said, sizes=None, *, change=lambda name, upload: upload):
    """The consensus of clients who give these outputs, as a round makes it."""
    fold, classes = Fold(), said[0].shape[1]
    problem = replace(CLASSES, classes=tuple("abcdefgh"[:classes]), outputs=classes)
    env = Env(seed=0, problem=problem, client="north")
    for position, z in enumerate(said):
        soft, numbers = algorithm.soft(z, env)
        upload = Message({"soft": soft}, {"num_examples": float((sizes or [1] * len(said))[position])} | numbers)
        expected = {"soft": algorithm.soft_spec(len(z), problem)}
        upload = validate(change(position, upload), expected, f"client {position}")
        fold.add(position, upload, lambda tree, numbers=upload.numbers: algorithm.weight(numbers, 0, tree))
    return algorithm.consensus(fold.finish())["public"]


def by_definition(algorithm, said, sizes):
    """The same from the docstring's formulas, in float64 and without a fold."""
    p = np.stack([softmax(np.float64(z), -1) for z in said])
    sure = np.exp(-entropy(p, axis=-1))
    weights = {
        "uniform": np.ones(len(said)),
        "num_examples": np.float64(sizes),
        "certainty": sure.mean(1),
        "entropy": sure,
    }[algorithm.weighting]
    weights = weights.reshape(len(said), -1, 1)
    if algorithm.average == "logits":
        each = np.stack([np.float64(z) - z.mean(-1, keepdims=True) for z in said])
    else:
        each = softmax(np.stack([np.float64(z) for z in said]) / algorithm.temperature, -1)
    return (weights * each).sum(0) / np.broadcast_to(weights, (len(said), each.shape[1], 1)).sum(0)


# ---------------------------------------------------------------- weights


@pytest.mark.parametrize("average", ["probabilities", "logits"])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_consensus_when_weighted_equals_the_formula(weighting, average):
    algorithm = FedMD(ROWS, weighting=weighting, average=average, temperature=3.0)
    said, sizes = [outputs(0, scale=0.3), outputs(1), outputs(2, scale=6.0)], [3, 7, 5]
    np.testing.assert_allclose(
        agreed(algorithm, said, sizes), by_definition(algorithm, said, sizes), rtol=2e-5, atol=1e-6
    )


def test_weights_when_compared_are_different_policies():
    said, sizes = [outputs(0, scale=0.3), outputs(1), outputs(2, scale=6.0)], [3, 7, 5]
    found = [agreed(FedMD(ROWS, weighting=weighting), said, sizes) for weighting in WEIGHTINGS]
    assert all(np.abs(found[i] - found[j]).max() > 0.01 for i in range(4) for j in range(i))


@pytest.mark.parametrize("weighting", ["certainty", "entropy"])
def test_consensus_when_all_are_equally_certain_is_uniform(weighting):
    z = outputs()
    said = [z, z[:, [1, 2, 0]], z[:, [2, 0, 1]] + 5.0]  # other classes, another zero, the same certainty
    np.testing.assert_allclose(
        agreed(FedMD(ROWS, weighting=weighting), said), agreed(FedMD(ROWS), said), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_consensus_when_everybody_is_there_twice_is_the_same(weighting):
    algorithm, said = FedMD(ROWS, weighting=weighting), [outputs(0, scale=0.3), outputs(1)]
    np.testing.assert_allclose(agreed(algorithm, said * 2, [3, 7] * 2), agreed(algorithm, said, [3, 7]), rtol=1e-5)


@pytest.mark.parametrize("options", [{"weighting": w} for w in WEIGHTINGS] + [{"sharpen": 0.4}, {"average": "logits"}])
def test_consensus_when_classes_are_renamed_is_renamed(options):
    algorithm, said, order = FedMD(ROWS, **options), [outputs(0, scale=0.3), outputs(1)], [2, 0, 1]
    teacher = lambda said: algorithm.teacher(agreed(algorithm, said), CLASSES)  # noqa: E731  # used twice, here
    np.testing.assert_allclose(teacher([z[:, order] for z in said]), teacher(said)[:, order], rtol=1e-5, atol=1e-7)


def test_entropy_weight_when_one_client_knows_and_the_other_guesses_follows_the_one_on_each_row():
    knows, guesses = [20.0, 0.0, 0.0], [0.0, 0.1, 0.0]
    said = [np.float32([knows, guesses]), np.float32([guesses, [0.0, 0.0, 20.0]])]
    found = agreed(FedMD(ROWS, weighting="entropy", temperature=1.0), said)
    even = agreed(FedMD(ROWS, weighting="certainty", temperature=1.0), said)
    np.testing.assert_allclose([found[0, 0], found[1, 2]], (1 + 1 / 9) / (4 / 3), atol=0.01)  # weights 1 and 1/3
    np.testing.assert_allclose([even[0, 0], even[1, 2]], 2 / 3, atol=0.01)


def test_certainty_when_measured_is_one_over_the_classes_that_a_model_wavers_between():
    z = np.array([[0, 0, 0, 0], [9, 9, -99, -99], [99, 0, 0, 0], [1e4, 0, 0, -1e4]], np.float32)
    np.testing.assert_allclose(certainty(z), [1 / 4, 1 / 2, 1, 1], rtol=1e-6)


def test_certainty_when_claimed_above_one_counts_as_one():
    algorithm, said = FedMD(ROWS, weighting="certainty"), [outputs(0), outputs(1)]
    boast = lambda i, upload: upload.put(numbers={"certainty": 1e9 if i else 1.0})  # noqa: E731  # one use
    np.testing.assert_allclose(agreed(algorithm, said, change=boast), agreed(FedMD(ROWS), said), rtol=1e-6)


@pytest.mark.parametrize(("average", "blank"), [("probabilities", 1 / 3), ("logits", 0.0)])
def test_entropy_weight_when_nobody_gives_any_leaves_the_row_undecided(average, blank):
    algorithm = FedMD(ROWS, weighting="entropy", average=average)

    def refuse(_, upload):
        soft = upload.trees["soft"]
        silent = {name: np.where(np.arange(9)[:, None] < 4, np.float32(0), soft[name]) for name in soft}
        return upload.put({"soft": Tree(silent)})

    found = agreed(algorithm, [outputs(0), outputs(1)], change=refuse)
    np.testing.assert_array_equal(found[:4], np.float32(blank))
    assert np.isfinite(found).all()


@pytest.mark.parametrize("weighting", ["certainty", "entropy"])
def test_round_when_weighted_by_certainty_keeps_the_contract(weighting):
    models = {"north": NumpyModel(3), "south": NumpyModel(6, lr=0.1), "west": NumpyModel(0, dtype="float32")}
    check_algorithm(FedMD(ROWS, weighting=weighting, sharpen=0.5), lambda: sites_of(models))


def test_round_when_weighted_by_entropy_sends_sums_alone():
    """What arrives is w p and w: the consensus is a quotient of two sums, which a masked sum could be."""
    played = play(FedMD(ROWS, weighting="entropy"), sites_of(), rounds=1)
    uploads = [upload.trees["soft"] for upload in played.uploads.values()]
    quotient = sum(tree["public"] for tree in uploads) / sum(tree["weight"] for tree in uploads)
    np.testing.assert_allclose(played.state.trees["soft"]["public"], quotient, rtol=1e-6)
    assert list(played.state.trees["soft"]) == ["public"]


# ---------------------------------------------------------------- sharpening


def test_sharpening_when_one_changes_nothing_and_when_small_names_the_most_likely_class():
    p = softened(outputs(), 1.0)
    np.testing.assert_allclose(sharpened(p, 1.0), p, rtol=1e-6)
    np.testing.assert_allclose(sharpened(p, 0.5), p**2 / (p**2).sum(-1, keepdims=True), rtol=1e-5)
    np.testing.assert_allclose(sharpened(p, 1e-3), np.eye(3)[p.argmax(-1)], atol=1e-6)


def test_sharpening_when_below_one_lowers_the_entropy_of_every_row_and_keeps_zeros():
    p = softened(outputs(), 1.0)
    assert (entropy(sharpened(p, 0.7), axis=-1) < entropy(p, axis=-1)).all()
    wide = np.pad(p, ((0, 0), (0, 2)))
    np.testing.assert_array_equal(sharpened(wide, 0.5)[:, 3:], 0)
    np.testing.assert_array_equal(sharpened(wide, 0.5)[:, :3], sharpened(p, 0.5))


def test_sharpening_when_nearly_uniform_equals_that_of_ds_fl_at_a_tenth_of_the_classes():
    classes = 5
    p = 1 / classes + 1e-3 * outputs(classes=classes)
    p /= p.sum(-1, keepdims=True)
    np.testing.assert_allclose(sharpened(p, 0.1 * classes), softmax(p / 0.1, -1), rtol=1e-3)


def test_sharpening_when_on_is_learned_and_when_off_is_not_there():
    consensus = softened(outputs(), 2.0)
    assert FedMD(ROWS).teacher(consensus, CLASSES) is consensus
    np.testing.assert_array_equal(FedMD(ROWS, sharpen=0.5).teacher(consensus, CLASSES), sharpened(consensus, 0.5))
    logits = FedMD(ROWS, average="logits", sharpen=0.5, temperature=4.0)
    np.testing.assert_array_equal(logits.teacher(outputs(), CLASSES), softened(outputs(), 2.0))


def test_run_when_sharpened_leaves_surer_models():
    def sure(sharpen):
        played = play(FedMD(ROWS, sharpen=sharpen, digest=10), sites_of(), rounds=4)
        return certainty(np.log(played.state.trees["soft"]["public"])).mean()

    assert sure(0.3) > sure(0.0) + 0.02


# ---------------------------------------------------------------- regressions


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weighting": "entropy"}, r'FedMD\(weighting="entropy"\).*Write weighting="uniform" or "num_examples"'),
        ({"weighting": "certainty"}, r'weighting="certainty"'),
        ({"sharpen": 0.1}, r"FedMD\(sharpen=0.1\) sharpens probabilities; a regression has none"),
    ],
)
def test_regression_when_asked_how_sure_it_is_says_what_to_write(options, words):
    with pytest.raises(UsageError, match=words):
        FedMD(ROWS, **options).init(server_env(sites_of(problem=VALUES), 0))


def test_regression_when_a_client_standardises_its_targets_exchanges_values_in_their_own_units():
    """North's targets are 1000 times wider and shifted; each estimator standardises by its own mean and spread."""
    one = replace(VALUES, outputs=1)
    r, slope = np.random.default_rng(0), np.float32([300.0, -100.0, 50.0, 0.0, 10.0])
    sites = sites_of(sklearn(TransformedTargetRegressor(LinearRegression(), transformer=StandardScaler())), one)
    for name, site in sites.items():
        x = (r.normal(size=(30, 5)) + (name == "north")).astype(np.float32)
        target = (x @ slope + 1000.0).astype(np.float32)
        sites[name] = replace(site, train=replace(site.train, inputs={"x": x}, target=target))
    played = play(FedMD(ROWS, digest=1), sites, rounds=1)
    truth = sites["north"].public.x @ slope + 1000.0
    np.testing.assert_allclose(played.state.trees["soft"]["public"][:, 0], truth, rtol=1e-3)


# ---------------------------------------------------------------- logits, probabilities, labels


class Normalised(NumpyModel):
    """A model that ends in a softmax, and that no adapter looked at."""

    def predict(self, request, rows, env):
        return np.asarray(softmax(super().predict(request, rows, env), -1), np.float32)


def test_client_when_its_model_ends_in_softmax_is_refused_by_name():
    sites = sites_of({"north": Normalised(), "south": NumpyModel()}, sizes={"north": 12, "south": 7})
    algorithm = FedMD(ROWS)
    start = play(algorithm, sites, rounds=0)
    with pytest.raises(UsageError, match=r"north gives probabilities .* where logits are due.*Take the softmax off"):
        work(algorithm, sites["north"], start, server_env(sites, 0, 1))


@pytest.mark.parametrize(
    "z",
    [np.zeros((4, 3)), np.log(softened(outputs(), 1.0)), np.eye(3) * 2, np.eye(3) - 1e-3, outputs(), np.ones((2, 3))],
)
def test_logits_when_they_are_some_pass(z):
    FedMD(ROWS).soft(np.float32(z), Env(seed=0, problem=CLASSES, client="north"))


def test_probabilities_when_half_a_thousandth_off_are_still_seen():
    env = Env(seed=0, problem=CLASSES, client="north")
    with pytest.raises(UsageError, match="north gives probabilities"):
        FedMD(ROWS).soft(softened(outputs(), 1.0) * np.float32(1 + 5e-5), env)
    FedMD(ROWS).soft(softened(outputs(), 1.0), replace(env, problem=replace(VALUES, outputs=3)))  # values may be so


@pytest.mark.parametrize("estimator", [LinearSVC(), RidgeClassifier(), Perceptron()])
def test_teacher_when_it_outputs_labels_only_speaks_through_its_decision_function(estimator):
    """No estimator of these has probabilities: the softmax of the margins stands for them, as the adapter documents."""
    site = sites_of(sklearn(estimator), sizes={"north": 40})["north"]
    env = client_env(site, 0, 1)
    steps = FedMD(ROWS).client_update(Message(numbers={"public_rows": 9.0}), Message(), env)
    fitted = site.model.fit(next(steps), site.train, env)
    z = site.model.predict(Predict(start=(fitted.state,), rows=site.public), site.public, env)
    p = softened(z, 1.0)
    assert ((p > 1e-5) & (p < 1 - 1e-5)).any(), "every answer is a bare label"


def test_option_when_sharpen_is_negative_says_so():
    with pytest.raises(UsageError, match=r"sharpen=-1.0 must be a number above 0, or 0 for none"):
        FedMD(sharpen=-1.0)


def test_base_when_public_rows_are_missing_names_the_method():
    class Mine(Consensus):
        pass

    with pytest.raises(UsageError, match=r"Mine needs public rows .*: Mine\(public=rows\)"):
        Mine().counted(server_env(sites_of(), 0))
    site = sites_of()["north"]
    with pytest.raises(DataError, match="north has no public rows; FedMD asks"):
        work(
            FedMD(ROWS), replace(site, public=None), play(FedMD(ROWS), sites_of(), rounds=0), server_env(sites_of(), 0)
        )
    assert rows_of(9).target is not None
