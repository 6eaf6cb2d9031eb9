"""What a server trains by itself is asked in the same surroundings by every method, whatever drives the run."""

from dataclasses import replace

import pytest
from numpy_model import NumpyModel, sites_of

import polyfed as pf
from polyfed.core.checks_algorithm import play

SEEN = []


class Seeing(NumpyModel):
    """Notes in which surroundings the server asks it."""

    def fit(self, request, rows, env):
        if not env.client:
            SEEN.append((request, env))
        return super().fit(request, rows, env)


@pytest.mark.parametrize(
    "algorithm",
    [pf.FedDF(range(9)), pf.FedPer(feedback="distill", public=range(9)), pf.Distill(range(9), student=Seeing())],
    ids=lambda algorithm: algorithm.name,
)
def test_trainer_when_asked_has_the_servers_public_rows_and_none_of_its_own(algorithm):
    SEEN.clear()
    sites = {n: replace(s, consents=frozenset({"personal"})) for n, s in sites_of(Seeing()).items()}
    play(algorithm, sites, rounds=1, student=getattr(algorithm, "student", None))
    assert SEEN
    for request, env in SEEN:
        assert env.public is request.rows
        assert env.train is None
        assert env.group in {site.group for site in sites.values()} | {"student"}
