"""What a server over the network trains by itself belongs to its run: a journal is not taken up with another student."""

import json

import pytest
from network_sites import client, public
from torch import nn

import polyfed as pf
from polyfed.core.errors import StorageError
from polyfed.run.serve import Server


def student(epochs):
    return pf.torch(lambda: nn.Linear(public().shape[1], 3), lr=0.1, epochs=epochs)


def test_journal_when_the_student_differs_is_that_of_another_run(tmp_path):
    def server(epochs):
        return Server(
            pf.Distill(public(), student=student(epochs)),
            clients=["c0"],
            rounds=1,
            journal=tmp_path,
        )

    with server(1) as first:
        pf.join(first.url, client("torch", "c0"), show=None, patience=5.0)
        assert first.result(60).version == 1
    said = json.loads((tmp_path / "run.json").read_text())["run"]["trainers"]
    assert said["student"][1]["epochs"] == 1
    with pytest.raises(StorageError, match="holds the journal of another run"), server(2):
        pass
    with server(1) as again:
        assert again.url
