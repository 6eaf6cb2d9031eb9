"""The digits showcase: what its table leaves out."""

import importlib.util
import sys
from pathlib import Path

PATH = Path(__file__).parents[2] / "examples" / "digits" / "run.py"


def test_a_mean_over_other_sites_is_not_set_beside_the_rest(capsys, monkeypatch):
    spec = importlib.util.spec_from_file_location("digits_showcase", PATH)
    assert spec is not None
    assert spec.loader is not None
    digits = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, digits)  # dataclasses look their module up
    spec.loader.exec_module(digits)
    alone = {name: 0.5 + 0.1 * i for i, name in enumerate(digits.SITES)}
    head = {name: alone[name] + 0.125 for name in digits.SAME_HEAD}
    digits.show({"alone": alone, "LG-FedAvg": head})
    lines = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()}
    assert lines["mean"] == ["mean", "0.750", "-"]
    assert lines["above"] == ["above", "alone", "+0.000", "+0.125"]
