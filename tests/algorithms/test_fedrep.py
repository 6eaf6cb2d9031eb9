"""FedRep's two phases where a client keeps one of them frozen."""

from dataclasses import replace

import numpy as np
from numpy_model import sites_of

from polyfed.algorithms import FedRep
from polyfed.core.checks_algorithm import play


def test_client_when_its_base_is_frozen_trains_its_head_and_stays_in_the_round():
    algorithm, sites = FedRep(shared="base", head_epochs=2), sites_of()
    sites["south"] = replace(sites["south"], trains=("head.w", "head.b"), frozen=("base",))
    start = play(algorithm, sites, rounds=0).state.trees["params"]
    played = play(algorithm, sites, rounds=2)
    assert list(played.uploads) == ["north", "south", "west"]
    assert all((array == 0).all() for array in played.uploads["south"].trees["params"].values())
    one, two = (play(algorithm, sites, rounds=r).memories["south"].trees["own"]["head.w"] for r in (1, 2))
    assert not np.array_equal(one, two)
    without = play(algorithm, {n: s for n, s in sites.items() if n != "south"}, rounds=1).state.trees["params"]
    counted = play(algorithm, sites, rounds=1).state.trees["params"]
    np.testing.assert_allclose(counted["base.w"], without["base.w"], rtol=1e-12)
    assert counted != start
