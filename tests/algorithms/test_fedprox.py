"""The proximal term."""

import math

import pytest
from numpy_model import NumpyModel, sites_of

from polyfed.algorithms import FedProx
from polyfed.core.algorithm import Needs
from polyfed.core.checks_algorithm import play
from polyfed.core.errors import UsageError
from polyfed.core.terms import Near, Own


def test_mu_when_it_grows_keeps_clients_nearer():
    norms = [
        play(FedProx(mu=mu), sites_of(NumpyModel(epochs=10, lr=0.1)), rounds=1).uploads["west"].trees["params"].norm()
        for mu in (0.0, 0.1, 1.0, 5.0)
    ]
    assert norms == sorted(norms, reverse=True)
    assert norms[-1] < norms[0] / 2


def test_request_when_mu_is_set_is_anchored_at_what_was_sent():
    sites = sites_of()
    model = sites["north"].model
    played = play(FedProx(mu=0.4), sites, rounds=1)
    request = model.log[0]
    assert request.terms == (Own(), Near(0.4))
    assert request.tensors["anchor"] == request.start[-1]
    assert played.round_num == 1


def test_request_when_mu_is_zero_holds_no_term():
    sites = sites_of()
    play(FedProx(mu=0.0), sites, rounds=1)
    assert all(request.terms == (Own(),) and not request.tensors for request in sites["north"].model.log)


def test_anchor_when_shared_in_part_leaves_private_layers_free():
    sites = sites_of()
    play(FedProx(shared="base", mu=1.0), sites, rounds=2)
    assert all(set(request.tensors["anchor"]) == {"base.w", "base.b"} for request in sites["north"].model.log)


@pytest.mark.parametrize("mu", [-0.1, math.nan, math.inf])
def test_mu_when_not_a_size_is_refused(mu):
    with pytest.raises(UsageError, match="at least 0"):
        FedProx(mu=mu)


def test_needs_when_asked_are_parameters_and_terms():
    assert FedProx().needs == Needs.all("params", "terms")
