"""Tables over a network: columns in another order are refused where parameters are averaged, and public rows follow names."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest
from network_sites import Softmax

import polyfed as pf
from polyfed.core.errors import MalformedError, PolyfedError
from polyfed.network import forms
from polyfed.run.columns import digests_of
from polyfed.run.join import introduction
from polyfed.run.serve import Server

NAMES = ("age", "dose", "gene")


def frame(seed, names=NAMES):
    x = np.random.default_rng(seed).normal(size=(24, 3))
    return pd.DataFrame(x, columns=NAMES).assign(sick=(x[:, 0] > 0).astype(int))[[*names, "sick"]]


def client(name, names=NAMES, preprocess=None):
    return pf.Client(name, Softmax(), data=frame(len(name), names), target="sick", preprocess=preprocess)


def served(algorithm, *clients):
    with (
        Server(algorithm, clients=[c.name for c in clients], rounds=1) as server,
        ThreadPoolExecutor(len(clients)) as pool,
    ):
        joined = [pool.submit(pf.join, server.url, c, show=None, patience=10.0) for c in clients]
        try:
            return server.result(60), [one.result(60) for one in joined]
        finally:
            server.stop()


def test_order_when_it_differs_under_averaged_parameters_is_refused_by_name():
    result, _ = served(pf.FedAvg(), client("north"), client("east"))
    assert result.version == 1
    with pytest.raises(
        PolyfedError, match=r"north and east have the same columns in different orders, and FedAvg averages"
    ):
        served(pf.FedAvg(), client("north"), client("east", ("gene", "age", "dose")))


def test_order_when_predictions_are_exchanged_is_each_clients_own_and_the_public_rows_follow_it():
    public, turned = frame(9)[list(NAMES)], ("gene", "age", "dose")
    result, (north, east) = served(pf.FedMD(public), client("north"), client("east", turned))
    assert result.version == 1
    for joined, names in ((north, NAMES), (east, turned)):
        assert np.array_equal(joined.site.public.x, public[list(names)].to_numpy(np.float32))


def test_digests_when_names_or_order_differ_say_so_and_arrays_have_none():
    straight, turned, other = (digests_of(client("a", n).read()) for n in (NAMES, NAMES[::-1], NAMES[:2]))
    assert straight[0] == turned[0] != other[0]
    assert len({straight[1], turned[1], other[1]}) == 3
    array = pf.Client("b", Softmax(), data=(np.zeros((4, 2), np.float32), np.arange(4) % 2))
    assert digests_of(array.read()) == ("", "")
    said = introduction(array, array.read().target, "0" * 64)
    assert forms.parse(forms.Enrolment, forms.write(said)) == said


@pytest.mark.parametrize("columns", ['["",""', '["x","y"]', '["' + "a" * 33 + '",""]', '[""]', "7"])
def test_enrolment_when_its_columns_are_no_digests_is_refused(columns):
    array = pf.Client("b", Softmax(), data=(np.zeros((4, 2), np.float32), np.arange(4) % 2))
    said = forms.write(introduction(array, array.read().target, "0" * 64))
    with pytest.raises(MalformedError):
        forms.parse(forms.Enrolment, said.replace(b'["",""]', columns.encode()))
