"""Whose preprocessing is compared: those whose parameters go into one mean, and nobody else."""

from collections import OrderedDict

import numpy as np
import pytest
from sklearn.ensemble import RandomForestClassifier
from sklearn.preprocessing import MinMaxScaler, StandardScaler
from torch import nn

import polyfed as pf
from polyfed.run.client import PreprocessingWarning


def rows(seed):
    x = np.random.default_rng(seed).normal(size=(24, 4)).astype(np.float32)
    return x, (x[:, 0] > 0).astype(np.int64)


PUBLIC = rows(9)[0]


def net(width=3, name="base"):
    return pf.torch(
        lambda: nn.Sequential(OrderedDict({name: nn.Linear(4, width), "head": nn.Linear(width, 2)})), lr=0.1
    )


def said(algorithm, **members):
    """The notes about inputs of a run of one round; `members` are model and preprocessing by name."""
    clients = [
        pf.Client(name, model, data=rows(len(name)), preprocess=step()) for name, (model, step) in members.items()
    ]
    result = pf.simulate(algorithm, clients, rounds=1, seed=0, baselines=(), test=False, evaluate_every=0)
    return [note for note in result.notes if "mean different things" in note]


def test_notes_when_feddf_averages_within_groups_are_of_each_group_alone():
    narrow, wide, forest = net(3), net(5), pf.sklearn(RandomForestClassifier(3))
    algorithm = pf.FedDF(PUBLIC)
    apart = {"a": (narrow, StandardScaler), "bb": (wide, MinMaxScaler), "ccc": (forest, MinMaxScaler)}
    assert said(algorithm, **apart) == []
    with pytest.warns(PreprocessingWarning, match="FedDF averages parameters of clients that preprocess differently"):
        (note,) = said(algorithm, **apart, dddd=(wide, StandardScaler))
    assert "bb: MinMaxScaler" in note and "dddd: StandardScaler" in note
    assert "a: " not in note and "ccc" not in note


def test_notes_when_fedmd_shares_a_part_are_of_those_who_have_it():
    algorithm, other = pf.FedMD(PUBLIC, shared="base"), net(name="body")
    apart = {"a": (net(), StandardScaler), "bb": (other, MinMaxScaler)}
    assert said(algorithm, **apart) == []
    with pytest.warns(PreprocessingWarning, match=r"FedMD averages parameters .* use FedMD without shared="):
        (note,) = said(algorithm, **apart, ccc=(net(), MinMaxScaler))
    assert "a: StandardScaler" in note and "ccc: MinMaxScaler" in note and "bb" not in note
    assert said(pf.FedMD(PUBLIC), **apart, ccc=(net(), MinMaxScaler)) == [], "nothing is averaged"
