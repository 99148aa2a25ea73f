"""What `make reproduce` says, asked where nothing is left to compute: every
results file is whole, and a number that differs is seen"""

import importlib
import json
import re
import shutil
from contextlib import contextmanager

import pytest
from test_tree import ROOT, run

from symtele.experiments import reproduce, save_run
from symtele.runtime import draw_cost, fig6, fig6_short, on_cuda, practice

COMMITTED = ROOT / "nbs/results"
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
MODULES = re.search(r"^EXPERIMENTS +\?= (.*)", MAKEFILE, re.M)[1].split()


@pytest.fixture
def recomputed(tmp_path):
    "A folder of results, as if they had been computed there"
    return shutil.copytree(COMMITTED, tmp_path / "results")


@pytest.mark.parametrize("module", MODULES)
def test_results_are_whole(module, recomputed, capsys):
    """Each experiment of each module has its file, made with its settings; what
    is there is told first, what differs last"""
    assert reproduce([module], recomputed, COMMITTED) == 0
    lines = capsys.readouterr().out.splitlines()
    made = importlib.import_module(f"symtele.{module}").experiments
    n = len(made)
    plans, (in_all, *lines) = lines[:n], lines[n:]
    hours = r"\d+\.\d\d core-hours"
    assert re.fullmatch(f"All of it took {hours}", in_all)
    for e, plan, said in zip(made, plans, lines[:-1], strict=True):
        jobs, agrees = len(e.jobs(e.config)), "every number agrees, seconds"
        told = f"{e.name}: {jobs} of {jobs} jobs are there; all took {hours} on "
        assert re.match(told, plan)
        assert said == f"{e.name}: {jobs} jobs, {agrees} and drifts aside"
    assert lines[-1] == f"0 of {n} results differ: none"


def test_every_file_is_made():
    "By an experiment that `make reproduce` runs, or on a GPU, or by its page"
    modules = [importlib.import_module(f"symtele.{name}") for name in MODULES]
    made = {e.name for module in modules for e in module.experiments}
    made |= {"theory"} | {e.name for e in on_cuda}
    assert {p.stem for p in COMMITTED.glob("*.json")} == made


def test_what_a_gpu_made_is_whole_and_names_it():
    "All jobs, with these settings; nothing else names a card"
    for e in on_cuda:
        assert len(e.load(COMMITTED)) == len(e.jobs(e.config))
        assert all(made["card"] for made in e.made(COMMITTED))
    assert not any("card" in made for made in fig6.made(COMMITTED))


@contextmanager
def changing(folder):
    "One of its results files, to be changed within"
    path = folder / "test_functions_sizes.json"
    saved = json.loads(path.read_text(encoding="utf-8"))
    yield saved
    path.write_text(json.dumps(saved), encoding="utf-8")


def test_another_number_is_seen(recomputed, capsys):
    "Control of the test above"
    with changing(recomputed) as saved:
        saved["rows"][0]["end"][0] += 1
    assert reproduce(["test_functions"], recomputed, COMMITTED) == 1
    assert "1 columns differ" in capsys.readouterr().out


def test_unknown_hours_are_not_summed(recomputed, capsys):
    "A file of the committed results that does not say what its rows took"
    with changing(recomputed) as saved:
        del saved["core_seconds"]
    assert reproduce(["test_functions"], COMMITTED, recomputed) == 0
    said = capsys.readouterr().out
    assert "are there; its core-hours are not recorded\n" in said
    assert "All of it took" not in said


def test_quick_tables_and_their_picture(tmp_path):
    "What `python -m symtele.runtime` prints where all is measured, and draws"
    jobs = fig6_short.jobs(fig6_short.config)
    rows = [row for row in fig6.load(COMMITTED) if fig6.job(row) in jobs]
    save_run(tmp_path / "runtime_quick.json", fig6_short.config, rows)
    quick = practice.config | dict(rounds=5)
    save_run(
        tmp_path / "runtime_mnist_quick.json", quick, practice.load(COMMITTED)
    )
    command = "python", "-m", "symtele.runtime", "--into", str(tmp_path)
    printed = run(*command, cwd=tmp_path, package=ROOT)
    assert "Run time in plain runs" in printed and "MNIST" in printed
    left, right = draw_cost(fig6_short.load(tmp_path)).axes
    assert list(left.lines[0].get_xdata()) == [32, 64, 128, 256]
    assert list(right.lines[0].get_xdata()) == [3, 5, 8]
