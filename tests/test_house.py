"""The house itself: what is said of the package is so."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import polyfed
from polyfed.core.round import picture

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "src" / "polyfed").rglob("*.py"))


def test_public_names_are_sorted_and_each_can_be_had():
    assert list(polyfed.__all__) == sorted(polyfed.__all__)
    for name in polyfed.__all__:
        assert getattr(polyfed, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = polyfed.nothing


def test_every_public_name_says_what_it_is():
    undocumented = [name for name in polyfed.__all__ if not (getattr(polyfed, name).__doc__ or "").strip()]
    assert not undocumented


def test_public_functions_and_classes_of_every_file_have_a_docstring_unless_a_contract_gives_it():
    missing = []
    for path in SOURCES:
        tree = ast.parse(path.read_text())
        if not ast.get_docstring(tree) and path.read_text().strip():
            missing.append(str(path.relative_to(ROOT)))
    assert not missing, "files without a line on what they are"


def test_picture_in_architecture_is_the_one_that_the_table_draws():
    assert picture() in (ROOT / "ARCHITECTURE.md").read_text()


def test_example_in_the_readme_is_the_example_file():
    readme = (ROOT / "README.md").read_text()
    shown = re.search(r"```python\n(.*?)```", readme, re.DOTALL).group(1)
    kept = [line for line in (ROOT / "examples" / "first.py").read_text().split('"""')[2].splitlines() if line.strip()]
    kept = [line for line in kept if line != "import sys" and not line.startswith("rounds = 2 if")]
    kept = [line.replace("rounds=rounds", "rounds=8") for line in kept]
    assert [line for line in shown.splitlines() if line.strip()] == kept


def test_readme_in_chinese_has_the_sections_code_and_tables_of_the_readme():
    pages = [(ROOT / name).read_text() for name in ("README.md", "README.zh-CN.md")]
    code = [re.sub(r" *#.*", "", re.search(r"```python\n(.*?)```", page, re.DOTALL).group(1)) for page in pages]
    assert code[0] == code[1]
    printed = [re.findall(r"```\n(accuracy .*?)```", page, re.DOTALL) for page in pages]
    assert printed[0] == printed[1] != []
    english, chinese = (set(re.findall(r"\]\(([^)]+)\)", page)) for page in pages)
    assert english - {"README.zh-CN.md"} == chinese - {"README.md"}


def test_files_of_tests_have_names_of_their_own():
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))


def test_torch_keeps_its_upper_bound():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    torches = [wish for wishes in extras.values() for wish in wishes if wish.startswith("torch")]
    assert torches
    assert all("<" in wish for wish in torches)


def test_nothing_that_meets_strangers_can_reach_an_unpickler():
    """Pickle belongs to executors and their own workers; nobody else names it, evaluates text or executes it."""
    allowed = {"executors"}
    found = []
    for path in SOURCES:
        part = path.relative_to(ROOT / "src" / "polyfed").parts[0]
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name.split(".")[0] for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [(node.module or "").split(".")[0]]
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in {"eval", "exec"}:
                names = [node.func.id]
            bad = set(names) & {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "eval", "exec"}
            if bad and part not in allowed:
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {bad}")
    assert not found


def test_import_takes_no_framework():
    heavy = "torch keras sklearn pandas tensorflow numba aiohttp matplotlib jinja2 typer rich cloudpickle skops scipy"
    code = f"import sys, polyfed; print([m for m in {heavy.split()} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.heavy
def test_table_in_the_readme_is_what_its_example_prints():
    script = [sys.executable, str(ROOT / "examples" / "first.py")]
    printed = subprocess.run(script, capture_output=True, text=True, check=True).stdout
    shown = re.search(r"```\n(accuracy .*?)```", (ROOT / "README.md").read_text(), re.DOTALL).group(1)

    def numbers(text):
        return [float(word) for word in re.findall(r"(?<![\w-])[+-]?\d+\.\d+", text)]

    assert numbers(printed) == pytest.approx(numbers(shown), abs=0.05)
    assert re.sub(r"[\d.+-]+", "", printed) == re.sub(r"[\d.+-]+", "", shown)
