"""Server optimizers: state, dtypes, limits of their options."""

import ml_dtypes
import numpy as np
import pytest
from invariants import params
from numpy_model import NumpyModel, sites_of

from polyfed.algorithms import FedAdagrad, FedAdam, FedAvg, FedAvgM, FedYogi
from polyfed.core.aggregate import Fold
from polyfed.core.checks_algorithm import play, server_env
from polyfed.core.errors import UsageError
from polyfed.core.message import Message
from polyfed.core.tree import Tree

ADAPTIVE = [FedAdagrad(), FedAdam(), FedYogi()]


def one_step(algorithm, theta, delta):
    """The state after one round of one client, from a model of one entry."""
    env = server_env(sites_of(), 0)
    object.__setattr__(env, "first", {"g": Tree({"w": theta})})
    state, fold = algorithm.init(env), Fold()
    fold.add(0, Message({"params": Tree({"w": delta})}, {"num_examples": 1.0}), lambda _: 1.0)
    return algorithm.server_update(state, fold.finish(), env)


def test_first_step_when_adam_is_written_out_has_no_correction_and_starts_at_tau_squared():
    algorithm = FedAdam(lr=0.5, beta1=0.9, beta2=0.99, tau=0.01)
    state = one_step(algorithm, np.array([1.0]), np.array([0.2]))
    m = 0.1 * 0.2
    v = 0.99 * 0.01**2 + 0.01 * 0.2**2
    np.testing.assert_allclose(state.trees["params"]["w"], 1.0 + 0.5 * m / (np.sqrt(v) + 0.01), rtol=1e-12)
    np.testing.assert_allclose(state.trees["v"]["w"], v, rtol=1e-12)


def test_first_step_when_yogi_sees_a_small_update_lowers_v():
    tau = 0.5
    state = one_step(FedYogi(lr=0.5, beta2=0.9, tau=tau), np.array([1.0]), np.array([0.2]))
    np.testing.assert_allclose(state.trees["v"]["w"], tau**2 - 0.1 * 0.2**2, rtol=1e-12)


def test_first_step_when_adagrad_adds_the_square():
    state = one_step(FedAdagrad(tau=0.5), np.array([1.0]), np.array([0.2]))
    np.testing.assert_allclose(state.trees["v"]["w"], 0.25 + 0.04, rtol=1e-12)


def test_broadcast_when_made_holds_no_optimizer_state():
    for algorithm in [FedAvgM(), *ADAPTIVE]:
        played = play(algorithm, sites_of(NumpyModel(statistics=True)), rounds=1)
        assert set(algorithm.broadcast(played.state, "north", server_env(sites_of(), 0)).trees) == {"params", "stats"}
        assert "m" in played.state.trees


@pytest.mark.parametrize("dtype", ["float16", ml_dtypes.bfloat16])
def test_moments_when_the_model_is_in_half_precision_are_in_float32(dtype):
    """tau**2 = 1e-6 would be lost in float16, and every step with it."""
    for algorithm in [FedAvgM(lr=0.1), *ADAPTIVE]:
        half = one_step(algorithm, np.ones(3, dtype), np.full(3, 1e-3, dtype))
        single = one_step(algorithm, np.ones(3, np.float32), np.full(3, 1e-3, dtype).astype(np.float32))
        assert all(half.trees[name]["w"].dtype == np.float32 for name in half.trees if name != "params")
        assert half.trees["params"]["w"].dtype == dtype
        np.testing.assert_array_equal(half.trees["params"]["w"], single.trees["params"]["w"].astype(dtype))


def test_statistics_when_an_optimizer_runs_are_fedavgs():
    stats = [
        play(algorithm, sites_of(NumpyModel(statistics=True)), rounds=1).state.trees["stats"]
        for algorithm in [FedAvg(), FedAvgM(), *ADAPTIVE]
    ]
    assert all(tree == stats[0] for tree in stats)
    assert all((tree["stats:base/variance"] > 0).all() for tree in stats)


def test_tau_when_large_makes_small_steps():
    steps = [np.abs(params(FedAdam(tau=tau), rounds=1)["head.b"]).max() for tau in (1e-3, 1e-1, 1e1)]
    assert steps == sorted(steps, reverse=True)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: FedAvgM(lr=0), "lr=0"),
        (lambda: FedAvgM(beta=1.0), "beta=1.0"),
        (lambda: FedAdam(tau=0.0), "tau=0.0"),
        (lambda: FedAdam(beta1=-0.1), "beta1=-0.1"),
        (lambda: FedAdam(beta2=1.0), "beta2=1.0"),
        (lambda: FedYogi(beta2=1.5), "beta2=1.5"),
        (lambda: FedAdagrad(lr=float("nan")), "lr=nan"),
    ],
)
def test_option_when_out_of_range_is_refused(make, words):
    with pytest.raises(UsageError, match=words):
        make()
