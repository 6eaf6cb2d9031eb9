import os
import sys
import threading
import types

import numpy as np
import pytest

from polyfed.core.checks_executor import SEED, ToyAlgorithm, ToyModel, toy_sites
from polyfed.core.errors import UsageError
from polyfed.core.protocols import Site
from polyfed.core.rows import Rows
from polyfed.executors.payload import can_be_imported, load, pack


def through(algorithm, sites, seed=SEED):
    descriptor = pack(algorithm, sites, seed)
    try:
        return load(descriptor)
    finally:
        os.close(descriptor)


def test_sites_come_out_as_they_went_in_with_aligned_writeable_rows():
    sites = toy_sites(["a", "b"])
    algorithm, got, seed = through(ToyAlgorithm(broken=("a",)), sites)
    assert (algorithm, seed, list(got)) == (ToyAlgorithm(broken=("a",)), SEED, ["a", "b"])
    for name, site in sites.items():
        assert np.array_equal(got[name].train.x, site.train.x) and got[name].train.x.dtype == site.train.x.dtype
        assert got[name].train.x.ctypes.data % 64 == 0 and got[name].train.x.flags.writeable
        got[name].train.x[:] = 0
        assert site.train.x.any()


def test_rows_shared_by_all_clients_are_in_memory_once():
    public = Rows({"x": np.zeros((1000, 3), np.float32)})
    sites = {name: Site(name, ToyModel(), s.problem, s.train, public=public) for name, s in toy_sites("abc").items()}
    _, got, _ = through(ToyAlgorithm(), sites)
    assert got["a"].public is got["b"].public is got["c"].public


def test_a_model_that_cannot_be_sent_is_named_with_what_to_do():
    sites = toy_sites(["a", "b"])
    sites["b"].model.lock = threading.Lock()
    with pytest.raises(UsageError, match=r"client 'b': its model \(toy\).*lock.*Loop\(\)"):
        pack(ToyAlgorithm(), sites, SEED)


def test_rows_and_algorithms_that_cannot_be_sent_are_named():
    sites = toy_sites(["a"])
    sites["a"].train.inputs["x"] = np.array([threading.Lock()] * len(sites["a"].train), object)
    with pytest.raises(UsageError, match="client 'a': its training rows"):
        pack(ToyAlgorithm(), sites, SEED)
    algorithm = ToyAlgorithm(broken=(threading.Lock(),))
    with pytest.raises(UsageError, match="algorithm ToyAlgorithm"):
        pack(algorithm, toy_sites(["a"]), SEED)


def test_a_class_of_a_module_that_no_other_process_can_import_travels_by_value(monkeypatch):
    module = types.ModuleType("made_on_the_fly")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec("from polyfed.core.checks_executor import ToyModel\nclass Own(ToyModel):\n    tag = 'mine'\n", module.__dict__)
    sites = toy_sites(["a"])
    site = Site("a", module.Own(), sites["a"].problem, sites["a"].train)
    descriptor = pack(ToyAlgorithm(), {"a": site}, SEED)
    monkeypatch.delitem(sys.modules, module.__name__)
    _, got, _ = load(descriptor)
    os.close(descriptor)
    assert got["a"].model.tag == "mine"


def test_can_be_imported_tells_modules_apart(monkeypatch, tmp_path):
    import numpy.linalg

    assert can_be_imported("numpy.linalg", numpy.linalg)
    assert can_be_imported("sys", sys)
    other = types.ModuleType("json5000")
    assert not can_be_imported("json5000", other)
    (tmp_path / "twin.py").write_text("")
    twin = types.ModuleType("twin")
    twin.__file__ = "/elsewhere/twin.py"
    monkeypatch.setitem(sys.modules, "twin", twin)
    monkeypatch.syspath_prepend(tmp_path)
    assert not can_be_imported("twin", twin)
