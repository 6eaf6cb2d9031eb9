"""The same seed gives the same bits, however and by whomever the work is done, and the check can fail."""

import kinds
import matrix
import pytest

CELLS = list(kinds.cells())
PERSONAL = list(kinds.personal_cells())
TOGETHER = kinds.together_cells()
LIGHT = [cell for cell in CELLS if cell[1] == "torch" or cell[1:] == ("sklearn", "mini-batches")]
KERAS = [("FedAvg", "keras", "dropout"), ("FedProx", "keras", "batch norm"), ("FedMD", "keras", "mini-batches")]


def test_bits_when_arrival_workers_and_hash_seed_differ_are_the_same():
    found = matrix.tables(LIGHT + KERAS, {0: ["loop", "shuffled"], 1: ["loop", "processes 3"]})
    assert len(found) == len(LIGHT + KERAS) * 4
    assert matrix.disagreements(found) == []


def test_bits_when_the_algorithm_style_or_framework_differs_differ():
    found = matrix.tables(LIGHT, ["loop"], hash_seeds=(0,))
    doubled = {digest for digest in found.values() if list(found.values()).count(digest) > 1}
    assert not doubled, "two federations that differ have one digest: it does not look at everything"


@pytest.mark.parametrize("mutant", matrix.MUTANTS)
def test_bits_when_the_fold_is_wrong_differ(mutant):
    cell = ("FedAdam", "torch", "mini-batches")  # its moments keep what an addition to the parameters rounds away
    assert matrix.disagreements(matrix.tables([cell], ["loop", mutant], hash_seeds=(0,))) == [cell]


@pytest.mark.parametrize(
    "cell",
    [
        ("FedMD", "torch", "mini-batches"),
        ("FedMD", "sklearn", "mini-batches"),
        pytest.param(("FedMD", "keras", "mini-batches"), marks=pytest.mark.heavy),
        pytest.param(("FedDF", "together", ""), marks=pytest.mark.heavy),
    ],
)
def test_bits_when_workers_are_new_processes_are_the_same(cell):
    assert matrix.disagreements(matrix.tables([cell], ["loop", "new processes"], hash_seeds=(0,))) == []


def test_bits_when_clients_join_over_the_network_are_the_same():
    styles = kinds.STYLES["torch"]
    cells = [(algorithm, "torch", styles[i % len(styles)]) for i, algorithm in enumerate(kinds.ALGORITHMS)]
    assert matrix.disagreements(matrix.tables(cells, ["loop", "network"], hash_seeds=(0,))) == []


@pytest.mark.heavy
@pytest.mark.parametrize("framework", kinds.STYLES)
def test_bits_when_run_in_every_way_are_the_same(framework):
    cells = [cell for cell in CELLS if cell[1] == framework]
    found = matrix.tables(cells, [way for way in matrix.WAYS if way != "new processes"])
    assert matrix.disagreements(found) == []


def test_bits_when_models_are_personal_are_the_same_however_they_are_run():
    cells = [cell for cell in PERSONAL if cell[1] == "torch"]
    found = matrix.tables(cells, {0: ["loop", "shuffled"], 1: ["processes 2"]})
    assert len(set(found.values())) == len(cells)
    assert matrix.disagreements(found) == []


@pytest.mark.heavy
def test_bits_when_models_are_personal_and_clients_join_over_the_network_are_the_same():
    cells = [cell for cell in PERSONAL if cell[1] == "torch"]
    assert matrix.disagreements(matrix.tables(cells, ["loop", "network"], hash_seeds=(0,))) == []


def test_bits_when_models_of_several_kinds_learn_together_are_the_same_however_they_are_run():
    found = matrix.tables(TOGETHER, {0: ["loop", "shuffled"], 1: ["processes 2"]})
    assert len(set(found.values())) == len(TOGETHER)
    assert matrix.disagreements(found) == []


def test_bits_when_a_server_folds_its_teachers_as_they_come_differ():
    cells = [("Distill", "together", ""), ("FedDF", "together", "")]
    assert matrix.disagreements(matrix.tables(cells, ["loop", "arrival order"], hash_seeds=(0,))) == cells


@pytest.mark.heavy
def test_bits_when_models_of_several_kinds_learn_together_are_the_same_in_every_way():
    found = matrix.tables(TOGETHER, {0: ["loop", "processes 1", "network"], 1: ["processes 3", "network"]})
    assert matrix.disagreements(found) == []


@pytest.mark.heavy
def test_bits_when_models_are_personal_in_keras_are_the_same_in_every_way():
    cells = [cell for cell in PERSONAL if cell[1] == "keras"]
    assert matrix.disagreements(matrix.tables(cells, ["loop", "processes 2", "network"], hash_seeds=(0,))) == []
