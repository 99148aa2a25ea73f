"""What a reader takes on trust about the tree: that the package is the notebooks,
that saved pages are clean, that every file, target and snippet the prose names is
real. Whatever rewrites files runs in a copy."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PROSE = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"]


def tree():
    "Files that are tracked, or would be after `git add .`"
    out = subprocess.run(
        ["git", "ls-files", "-coz", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    return sorted(
        p for p in set(out.stdout.split("\0")) if p and (ROOT / p).is_file()
    )


NOTEBOOKS = [p for p in tree() if p.endswith(".ipynb")]


def copied(to):
    "The tree, copied into a folder; the folder"
    for p in tree():
        (to / p).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / p, to / p)
    return to


@pytest.fixture
def copy(tmp_path):
    return copied(tmp_path)


def run(*cmd, cwd, package):
    """What a command of this environment says, run in `cwd` with symtele from the
    tree `package`; where it fails, that is the error"""
    env = os.environ | {
        "PYTHONPATH": str(package),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    done = subprocess.run(
        [str(Path(sys.executable).parent / cmd[0]), *cmd[1:]],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
    )
    words = (done.stdout + done.stderr)[-4000:]
    assert done.returncode == 0, f"{' '.join(map(str, cmd))}\n{words}"
    return done.stdout


def rewritten(copy):
    "Files that nbdev's export and clean change, add or remove"

    def snapshot():
        return {
            p.relative_to(copy).as_posix(): p.read_bytes()
            for p in copy.rglob("*")
            if p.is_file()
        }

    before = snapshot()
    for cmd in ("nbdev_export", "nbdev_clean"):
        run(cmd, cwd=copy, package=copy)
    after = snapshot()
    return sorted(p for p in before | after if before.get(p) != after.get(p))


def test_package_is_the_export_of_clean_notebooks(copy):
    "Who reads nbs/ has read symtele/: neither may be committed without the other"
    names = rewritten(copy)
    assert not names, (
        f"run nbdev_export and nbdev_clean, then commit {', '.join(names)}"
    )


def test_hand_edit_of_a_module_is_seen(copy):
    "Control of the test above: a line typed into an exported module is named"
    module = next(
        p
        for p in sorted((copy / "symtele").glob("*.py"))
        if not p.name.startswith("_")
    )
    module.write_text(module.read_text() + "\nedited = True\n")
    assert f"symtele/{module.name}" in rewritten(copy)


# A slash after a word, tag, dot or base64 character is a URL, a fraction or a
# picture, not the start of a path.
MACHINE = re.compile(
    r"(?:file://|(?<![\w+/.<]))/(?:root|home|tmp|work|Users|var/folders)\b"
    r"|[A-Z]:\\Users"
)


def strings(node):
    "Every string in a notebook"
    if isinstance(node, str):
        yield node
    elif isinstance(node, list):
        for part in node:
            yield from strings(part)
    elif isinstance(node, dict):
        yield from strings(list(node.values()))


def faults(nb):
    "What should not be in a committed notebook, one line each"
    yield from {f"path {m[0]}" for s in strings(nb) for m in MACHINE.finditer(s)}
    code = [c for c in nb["cells"] if c["cell_type"] == "code"]
    outputs = [o for c in code for o in c["outputs"]]
    for output in outputs:
        yield from output_faults(output)
    if not outputs and not all(hidden(c) for c in code):
        yield "never run: no outputs"


def output_faults(output):
    "What an output should not say"
    printed = "\n".join(strings(output.get("text", [])))
    value = "\n".join(strings(output.get("data", {}).get("text/plain", [])))
    words = printed + value
    failed = output["output_type"] == "error"
    if failed or "Traceback (most recent call last)" in words:
        yield "traceback"
    if output.get("name") == "stderr" or re.search(r"\w*Warning:", words):
        yield "warning or stderr output"
    if re.search(r"\d%\|", words):
        yield "progress bar"


def hidden(cell):
    "Whether a page leaves a cell out"
    return re.search(r"^#\|\s*hide\b", "".join(cell["source"]), re.M) is not None


def test_notebooks_are_saved_clean():
    "A page shows what one good run gave, and nothing of the author's machine"
    found = [
        f"{p}: {fault}"
        for p in NOTEBOOKS
        for fault in faults(json.loads((ROOT / p).read_text(encoding="utf-8")))
    ]
    assert NOTEBOOKS and not found, "\n".join(found)


def test_faults_are_seen():
    "Control of the test above, one notebook with every fault"

    def cell(*outputs):
        return dict(cell_type="code", source=["1"], outputs=list(outputs))

    def stream(name, *text):
        return dict(output_type="stream", name=name, text=list(text))

    def display(**data):
        return dict(output_type="display_data", data=data)

    bad = [
        cell(stream("stdout", "saved in /home/me/x.json")),
        cell(dict(output_type="error")),
        cell(stream("stderr")),
        cell(display(**{"text/plain": ["  0%|   | 0/3"]})),
    ]
    assert set(faults(dict(cells=bad))) == {
        "path /home",
        "traceback",
        "warning or stderr output",
        "progress bar",
    }
    assert list(faults(dict(cells=[cell()]))) == ["never run: no outputs"]
    picture = {"image/png": "iVBO/tmp/w0/home/ab="}
    link = {"text/html": '<a href="https://x.org/home/">'}
    fine = cell(display(**picture, **link))
    assert not list(faults(dict(cells=[fine])))


@pytest.mark.parametrize("page", PROSE)
def test_prose_names_real_things(page):
    "Links into the tree and `make` targets, as written"
    text = (ROOT / page).read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#\s]+)", text)
    inside = [s for s in links if not re.match(r"\w+:", s)]
    dead = [s for s in inside if s not in tree() and not (ROOT / s).is_dir()]
    made = re.findall(r"(?:`|^)make ([a-z]+)", text, re.M)
    dead += [f"make {target}" for target in made if target not in targets()]
    assert not dead, dead


def targets():
    "What `make` can make"
    return re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M)


def workflow_faults(flow):
    "What would fail only after a push, or run with more rights than it needs"
    jobs = flow["jobs"]
    steps = [step for job in jobs.values() for step in job["steps"]]
    commands = " ; ".join(step.get("run", "") for step in steps)
    for target in re.findall(r"\bmake (\w+)", commands):
        if target not in targets():
            yield f"no target {target}"
    for target in ("test", "docs"):
        if f"make {target}" not in commands:
            yield f"never makes {target}"
    for action in [step["uses"] for step in steps if "uses" in step]:
        if not re.fullmatch(r"[\w-]+(/[\w-]+)+@v\d+", action):
            yield f"not pinned: {action}"
    for job in jobs.values():
        for needed in job.get("needs", []):
            if needed not in jobs:
                yield f"no job {needed}"
    yield from rights_faults(flow)
    publish = jobs["publish"]
    tested = set(publish["needs"]) == {"test", "site"}
    if not tested or "github.ref == 'refs/heads/main'" not in publish["if"]:
        yield "publishes what was not tested"
    folders = [
        step["with"]["path"]
        for step in steps
        if "upload-pages-artifact" in step.get("uses", "")
    ]
    site = yaml.safe_load((ROOT / "_quarto.yml").read_text())["project"]
    if folders != [site["output-dir"]]:
        yield "publishes another folder"


def rights_faults(flow):
    "Who may write, and need not; a workflow that does not say may"
    if "write" in str(flow.get("permissions", "write")):
        yield "every job may write"
    for name, job in flow["jobs"].items():
        if name != "publish" and "write" in str(job.get("permissions", "")):
            yield f"{name} may write"


@pytest.fixture
def workflow():
    "It runs elsewhere, after a push: what it names is looked at here"
    return (ROOT / ".github/workflows/test.yml").read_text()


def test_workflow_can_work(workflow):
    "Its targets, jobs, versions and rights"
    assert not list(workflow_faults(yaml.safe_load(workflow)))


def test_workflow_faults_are_seen(workflow):
    "Control of the test above"
    for good, wrong, fault in (
        ("make docs", "make site", "no target site"),
        ("make test", "true", "never makes test"),
        ("checkout@v5", "checkout@main", "not pinned: actions/checkout@main"),
        ("[test, site]", "[site]", "publishes what was not tested"),
        ("path: _docs", "path: docs", "publishes another folder"),
        ("contents: read", "contents: write", "every job may write"),
    ):
        assert good in workflow
        changed = yaml.safe_load(workflow.replace(good, wrong))
        assert fault in workflow_faults(changed), fault


def test_readme_code_runs(tmp_path):
    """The first code a visitor copies: each block by itself, in an empty folder,
    warnings being errors; the teleport it promises is the one it prints"""

    def execute(code):
        strict = ("python", "-W", "error", "-c", code)
        return run(*strict, cwd=tmp_path, package=ROOT)

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    printed = [execute(block) for block in blocks]
    assert any("'k': 5, 'accepted': True" in s for s in printed), printed
    assert not list(tmp_path.iterdir())
    with pytest.raises(AssertionError, match="warned"):  # control
        execute('import warnings; warnings.warn("warned")')


def built(copy):
    "Files of the package as it is installed"
    run("python", "setup.py", "-q", "build", cwd=copy, package=copy)
    return {p.name for p in (copy / "build/lib/symtele").iterdir()}


def test_types_are_installed(copy):
    "A type checker reads annotations of a package only where it is told to"
    modules = {p.name for p in (ROOT / "symtele").glob("*.py")}
    assert built(copy) == modules | {"py.typed"}
    (copy / "symtele/py.typed").unlink()  # control
    shutil.rmtree(copy / "build")
    assert built(copy) == modules


def make(target, copy, programs):
    """What `make` says of a target in a tree, finding only these programs; one of
    them is a Python that does no more than say that it would install"""
    folder = copy / "programs"
    folder.mkdir()
    (folder / "sed").symlink_to(shutil.which("sed"))
    for name, script in programs.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    done = subprocess.run(
        [shutil.which("make"), target, "PYTHON=python3"],
        cwd=copy,
        env={"PATH": str(folder)},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    return done.stdout + done.stderr


INSTALL = {"python3": "echo would install; exit 1"}


def test_docs_ask_for_quarto_first(copy):
    "Six gigabytes are not installed to say in the end that a program is missing"
    output = make("docs", copy, INSTALL)
    assert "make docs needs Quarto" in output
    assert "would install" not in output


def test_docs_with_quarto_install(copy):
    "Control of the test above"
    output = make("docs", copy, INSTALL | {"quarto": ""})
    assert "needs Quarto" not in output
    assert "would install" in output


def test_files_are_small():
    "A clone stays quick, a diff readable: pictures compressed, data outside"
    large = {p: (ROOT / p).stat().st_size for p in tree() if p != "LICENSE"}
    assert not {p: n for p, n in large.items() if n > 1.5e6}
