"""What `make reproduce` says, asked where nothing is left to compute: every
results file is whole, and a number that differs is seen"""

import importlib
import json
import re
import shutil

import pytest
from test_tree import ROOT

from symtele.experiments import reproduce

COMMITTED = ROOT / "nbs/results"
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
MODULES = re.search(r"^EXPERIMENTS +\?= (.*)", MAKEFILE, re.M)[1].split()


@pytest.fixture
def recomputed(tmp_path):
    "A folder of results, as if they had been computed there"
    return shutil.copytree(COMMITTED, tmp_path / "results")


@pytest.mark.parametrize("module", MODULES)
def test_results_are_whole(module, recomputed, capsys):
    "Each experiment of each module has its file, made with its settings"
    assert reproduce([module], recomputed, COMMITTED) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines
    assert all("every number agrees" in line for line in lines)


def test_every_file_is_made():
    "By an experiment that `make reproduce` runs; the theory's by its page"
    modules = [importlib.import_module(f"symtele.{name}") for name in MODULES]
    made = {e.name for module in modules for e in module.experiments}
    assert {p.stem for p in COMMITTED.glob("*.json")} == made | {"theory"}


def test_another_number_is_seen(recomputed, capsys):
    "Control of the test above"
    path = recomputed / "test_functions_sizes.json"
    saved = json.loads(path.read_text(encoding="utf-8"))
    saved["rows"][0]["end"][0] += 1
    path.write_text(json.dumps(saved), encoding="utf-8")
    assert reproduce(["test_functions"], recomputed, COMMITTED) == 1
    assert "1 columns differ" in capsys.readouterr().out
