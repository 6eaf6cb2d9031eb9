"""The documentation's snippets run as they stand, from the top of a page to its end."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGES = [path for path in sorted(DOCS.glob("*.md")) if "```python" in path.read_text()]


def test_there_are_pages_to_run():
    assert PAGES


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_snippets_of_a_page_run_one_after_another(path, capsys):
    names = {"__name__": path.stem}
    for snippet in re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL):
        exec(compile(snippet, str(path), "exec"), names)  # our own page
    assert capsys.readouterr().out
