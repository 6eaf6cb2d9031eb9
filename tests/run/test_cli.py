from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from typer.testing import CliRunner

import polyfed as pf
from polyfed.run.cli import app
from polyfed.run.demo import interval
from polyfed.run.result import versions

ROOT = Path(__file__).parents[2]
MAIN = [sys.executable, "-c", "from polyfed.run.cli import main; main()"]
HEAD = """
import numpy as np
import polyfed as pf
from sklearn.linear_model import LogisticRegression

def rows(seed):
    x = np.random.default_rng(seed).normal(size=(60, 3)).astype(np.float32)
    return x, (x[:, 0] > 0).astype(int)

clients = [pf.Client(n, pf.sklearn(LogisticRegression()), data=rows(i)) for i, n in enumerate(["north", "south"])]
"""
GOOD = 'def federation():\n    return {"algorithm": pf.FedAvg(), "clients": clients, "rounds": 2}\n'
FAILING = """
from dataclasses import dataclass

@dataclass(frozen=True)
class Odd(pf.FedAvg):
    def client_update(self, message, memory, env):
        if env.client in {who}:
            raise ValueError("the scanner is off")
        return (yield from super().client_update(message, memory, env))

def federation():
    return {{"algorithm": Odd(), "clients": clients, "rounds": 2}}
"""


def written(folder, text):
    path = folder / "federation_file.py"
    path.write_text(textwrap.dedent(HEAD + text))
    return str(path)


def call(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args])


# ---------------------------------------------------------------------------------------------- codes


def test_a_run_that_is_done_prints_its_table_and_ends_with_0(tmp_path):
    done = call("run", written(tmp_path, GOOD))
    assert done.exit_code == 0, done.output
    assert "round 2/2" in done.output
    assert "2 rounds are done" in done.output


def test_a_client_that_fails_is_shown_once_with_its_last_lines_and_ends_with_3(tmp_path):
    done = call("run", written(tmp_path, FAILING.format(who=["south"])))
    assert done.exit_code == 3
    assert "south left out of rounds 1 and 2: ValueError: the scanner is off" in done.output
    assert done.output.count("    ValueError: the scanner is off") == 1
    assert "federation_file.py" in done.output


def test_a_target_that_is_missed_ends_with_3(tmp_path):
    text = GOOD.replace('"rounds": 2', '"rounds": 2, "stop": pf.Target("loss", 1e-9)')
    done = call("run", written(tmp_path, text))
    assert done.exit_code == 3
    assert "not reached: " in done.output


def test_no_quorum_ends_with_1_and_one_message(tmp_path):
    done = call("run", written(tmp_path, FAILING.format(who=["north", "south"])))
    assert done.exit_code == 1
    assert "error: no quorum" in done.output
    assert "south: ValueError: the scanner is off" in done.output
    assert "Traceback" not in done.output


def test_an_error_in_the_users_file_ends_with_1_and_names_the_line(tmp_path):
    done = call("run", written(tmp_path, "oops\n"))
    assert done.exit_code == 1
    assert "error: NameError: name 'oops' is not defined" in done.output
    assert "federation_file.py" in done.output
    assert "Traceback" not in done.output


def test_debug_shows_the_traceback(tmp_path, monkeypatch):
    monkeypatch.setenv("POLYFED_DEBUG", "1")
    done = call("run", written(tmp_path, "oops\n"))
    assert isinstance(done.exception, NameError)
    monkeypatch.delenv("POLYFED_DEBUG")
    monkeypatch.setenv("POLYFED_DEBUG", "")
    assert isinstance(call("--debug", "run", written(tmp_path, "oops\n")).exception, NameError)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = 1\n", "defines no federation()"),
        ("def federation():\n    return 3\n", "returned a int, wanted a dict"),
        ("def federation():\n    return {'algorithm': pf.FedAvg()}\n", "gives no 'clients'"),
        (GOOD.replace('"rounds": 2', '"round": 2'), "gives 'round', which pf.simulate does not take"),
        (GOOD.replace("pf.FedAvg()", "pf.FedAvg"), "algorithm is the class FedAvg"),
        (GOOD.replace("pf.FedAvg()", "pf.FedMD()"), "has no public rows"),
    ],
)
def test_a_file_that_cannot_be_used_ends_with_2_and_says_what_to_write(tmp_path, text, said):
    done = call("run", written(tmp_path, text))
    assert done.exit_code == 2
    assert said in done.output


@pytest.mark.parametrize(
    "words",
    [["fly"], ["run"], ["run", "nowhere.py"], ["demo", "hospital"], ["demo", "hospitals", "--seed", "x"], ["new"], ["--no"],
     ["run", "nowhere.py", "--rounds", "0"], ["demo", "hospitals", "--splits", "0"], ["new", "a b"]],
)  # fmt: skip
def test_words_that_mean_nothing_end_with_2(words):
    done = call(*words)
    assert done.exit_code == 2
    assert done.output.strip()
    assert "Traceback" not in done.output


@pytest.mark.parametrize("command", [["demo", "hospitals"], ["run", "{file}"]])
def test_a_page_that_cannot_be_written_is_refused_before_the_work(tmp_path, command):
    file = written(tmp_path, "raise SystemError('it ran')\n")
    done = call(*[word.format(file=file) for word in command], "--out", Path(file) / "report.html")
    assert done.exit_code == 1
    assert "is a file" in done.output
    assert call(*[word.format(file=file) for word in command], "--out", tmp_path).exit_code == 1


def test_a_folder_that_cannot_be_saved_to_ends_with_1(tmp_path):
    done = call("run", written(tmp_path, GOOD), "--save", Path(written(tmp_path, GOOD)))
    assert done.exit_code == 1
    assert "is a file; save the result to a folder" in done.output
    assert "2 rounds are done" in done.output  # the result was shown first


# ---------------------------------------------------------------------------------------------- what a file may be


def test_a_file_with_main_or_result_runs_too(tmp_path):
    for text in (
        "def main():\n    return pf.simulate(pf.FedAvg(), clients, rounds=2)\n",
        "result = pf.simulate(pf.FedAvg(), clients, rounds=2)\n",
        "def federation():\n    return pf.simulate(pf.FedAvg(), clients, rounds=2)\n",
    ):
        done = call("run", written(tmp_path, text))
        assert done.exit_code == 0, done.output
        assert "round 2/2" in done.output  # the live table is put in from outside
    done = call("run", written(tmp_path, "result = 3\n"), "--rounds", 3)
    assert done.exit_code == 2
    assert "rounds: " in done.output


def test_options_go_before_what_the_file_says_and_the_result_is_saved(tmp_path):
    done = call("run", written(tmp_path, GOOD), "--rounds", 3, "--seed", 5, "--save", tmp_path / "out")
    assert done.exit_code == 0, done.output
    info = pf.load(tmp_path / "out").info
    assert (info["rounds"], info["seed"]) == (3, 5)


def test_a_file_finds_its_neighbours_and_leaves_the_path_as_it_was(tmp_path):
    (tmp_path / "neighbour_of_it.py").write_text("ROUNDS = 1\n")
    before = list(sys.path)
    text = "from neighbour_of_it import ROUNDS\n" + GOOD.replace('"rounds": 2', '"rounds": ROUNDS')
    assert call("run", written(tmp_path, text)).exit_code == 0
    assert sys.path == before


# ---------------------------------------------------------------------------------------------- json


def test_json_is_the_only_thing_on_standard_output(tmp_path):
    noisy = GOOD.replace("    return", "    print('chatter'); import os; os.system('echo more chatter')\n    return")
    done = subprocess.run(
        [*MAIN, "run", written(tmp_path, noisy), "--json"], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert (said["rounds"], said["complete"]) == (2, True)
    assert "chatter" in done.stderr
    assert "more chatter" in done.stderr
    assert "round 2/2" in done.stderr


def test_json_of_a_failure_holds_the_message_and_the_code(tmp_path):
    done = CliRunner().invoke(app, ["run", written(tmp_path, FAILING.format(who=["north", "south"])), "--json"])
    assert done.exit_code == 1
    said = json.loads(done.stdout)
    assert said["code"] == 1
    assert said["error"].startswith("no quorum")
    assert said["result"]["rounds"] == 0


def test_version_and_datasets():
    assert call("version").output == f"polyfed {pf.__version__}\n"
    assert json.loads(call("version", "--json").output)["polyfed"] == pf.__version__
    assert "pf.datasets.heart()" in call("datasets").output
    assert json.loads(call("datasets", "--json").output)["heart"]["clients"]["cleveland"] > 300


def test_the_command_line_starts_without_a_framework():
    code = (
        "import sys; from polyfed.run.cli import app\n"
        "from typer.testing import CliRunner\n"
        "assert CliRunner().invoke(app, ['version']).exit_code == 0\n"
        "print([m for m in ('torch', 'keras', 'sklearn', 'pandas', 'numba') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "[]\n"


def test_the_help_says_what_the_codes_mean():
    for words in (["--help"], ["run", "--help"], ["demo", "hospitals", "--help"]):
        said = " ".join(call(*words).output.split())
        assert "130 interrupted" in said, words


# ---------------------------------------------------------------------------------------------- ctrl-c


WAITING = """
import threading
from dataclasses import dataclass

@dataclass(frozen=True)
class Waits(pf.FedAvg):
    def client_update(self, message, memory, env):
        if env.round_num == 2:
            threading.Event().wait(100)
        return (yield from super().client_update(message, memory, env))

def federation():
    return {"algorithm": Waits(), "clients": clients, "rounds": 5}
"""


@pytest.mark.parametrize("options", [[], ["--executor", "processes"], ["--json"]])
def test_ctrl_c_ends_with_130_and_the_result_so_far(tmp_path, options):
    lines = subprocess.PIPE
    process = subprocess.Popen(
        [*MAIN, "run", written(tmp_path, WAITING), *options], stdout=lines, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    shown = process.stderr if options == ["--json"] else process.stdout
    try:
        assert any("round 1/5" in line for line in shown)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the whole group
        out, errors = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    if options == ["--json"]:
        assert json.loads(out)["interrupted"] is True
    else:
        assert "1 round; interrupted" in out


# ---------------------------------------------------------------------------------------------- new, demo


def test_a_new_project_runs_at_once_and_its_test_passes(tmp_path):
    made = call("new", tmp_path / "care")
    assert made.exit_code == 0, made.output
    assert sorted(p.name for p in (tmp_path / "care").iterdir()) == ["README.md", "federation.py", "test_federation.py"]
    done = call("run", tmp_path / "care" / "federation.py", "--rounds", 1)
    assert done.exit_code == 0, done.output
    assert "RandomForestClassifier" in done.output
    tested = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"],
        cwd=tmp_path / "care", capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert tested.returncode == 0, tested.stdout
    again = call("new", tmp_path / "care")
    assert again.exit_code == 2
    assert "is there already" in again.output
    assert call("new", Path(written(tmp_path, GOOD)) / "care").exit_code == 1


def test_the_demo_shows_both_ways_to_share(tmp_path, monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", os.environ.get("KERAS_BACKEND", "torch"))
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "3")
    done = CliRunner().invoke(
        app, ["demo", "hospitals", "--splits", "1", "--rounds", "1", "--out", str(tmp_path / "report.html"), "--json"]
    )
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert [line["site"] for line in said["sites"]] == ["cleveland", "hungary", "switzerland", "va", "mean"]
    for line in said["sites"]:
        for way in ("rows", "statistics"):
            assert 0.4 < line[way] <= 1.0
            assert line[f"{way} gain"]["mean"] == pytest.approx(line[way] - line["alone"])
            assert line[f"{way} gain"]["low"] is None
    assert said["runs"]["statistics"][0]["clients"]["va"]["rows"]["public"] == 0
    assert said["runs"]["rows"][0]["clients"]["va"]["rows"]["public"] > 0
    assert "no patient's row leaves its site" in done.stderr
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert all(site in page for site in ("cleveland", "hungary", "switzerland", "va"))
    assert "No patient&#39;s row leaves its hospital" in page


def test_an_interval_holds_its_mean_and_is_the_same_again():
    found = interval([0.01, 0.05, -0.02, 0.03], seed=1)
    assert found == interval([0.01, 0.05, -0.02, 0.03], seed=1)
    assert -0.02 <= found.low < found.mean < found.high <= 0.05
    assert str(found) == f"{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"


def test_the_demo_without_a_framework_says_what_to_install():
    code = "import sys; sys.modules['torch'] = None; sys.argv = ['polyfed', 'demo', 'hospitals', '--no-page']\n"
    done = subprocess.run(
        [sys.executable, "-c", code + "from polyfed.run.cli import main; main()"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert 'pip install "polyfed[' in done.stderr
    assert "Traceback" not in done.stderr


def test_version_is_an_option_too():
    done = call("--version")
    assert (done.exit_code, done.output.strip()) == (0, f"polyfed {pf.__version__}")


def test_versions_name_every_installed_framework_of_the_extras():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    frameworks = [
        line for name in ("torch", "keras", "sklearn", "tensorflow", "jax", "boosting") for line in extras[name]
    ]
    names = {re.match(r"[a-z-]+[a-z]", line)[0] for line in frameworks} - {"polyfed", "pandas", "skops"}
    installed = {name: metadata.version(name) for name in names if list(metadata.distributions(name=name))}
    assert {"torch", "keras", "scikit-learn", "jax", "lightgbm", "xgboost-cpu"} <= names
    assert {name: versions().get(name) for name in installed} == installed


def test_a_folder_runs_its_federation(tmp_path):
    Path(written(tmp_path, GOOD)).rename(tmp_path / "federation.py")
    done = call("run", tmp_path)
    assert done.exit_code == 0, done.output
    assert "2 rounds are done" in done.output


BACKEND = """
import importlib.util, os, sys
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name in {gone!r} else real(name, *more)
import polyfed
print(os.environ.get("KERAS_BACKEND"), [n for n in ("torch", "keras", "tensorflow") if n in sys.modules])
"""


@pytest.mark.parametrize(
    ("gone", "given", "file", "chosen"),
    [
        (["tensorflow"], {}, False, "torch"),
        (["tensorflow"], {"KERAS_BACKEND": "jax"}, False, "jax"),
        (["tensorflow"], {}, True, "None"),
        (["tensorflow", "torch"], {}, False, "None"),
    ],
)
def test_the_import_chooses_torch_for_keras_only_where_nobody_else_has(tmp_path, gone, given, file, chosen):
    if file:
        (tmp_path / "keras.json").write_text("{}")
    kept = {name: value for name, value in os.environ.items() if name != "KERAS_BACKEND"}
    done = subprocess.run(
        [sys.executable, "-c", BACKEND.format(gone=gone)],
        capture_output=True, text=True, check=True, timeout=60, env={**kept, "KERAS_HOME": str(tmp_path), **given},
    )  # fmt: skip
    assert done.stdout.strip() == f"{chosen} []"
