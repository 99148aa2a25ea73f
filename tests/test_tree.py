"""What a reader takes on trust about the tree: that the package is the notebooks, that saved pages are clean,
that every file, target and snippet the prose names is real. Whatever rewrites files runs in a copy."""

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
    "Run a command of this environment in `cwd`, importing symtele from the tree `package`; fail with its words"
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
    assert done.returncode == 0, (
        f"{' '.join(map(str, cmd))}\n{(done.stdout + done.stderr)[-4000:]}"
    )
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
    "Someone who reads nbs/ must have read symtele/: neither may be committed without the other"
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


# A slash after a word, tag, dot or base64 character is a URL, a fraction or a picture, not the start of a path.
MACHINE = re.compile(
    r"(?:file://|(?<![\w+/.<]))/(?:root|home|tmp|work|Users|var/folders)\b|[A-Z]:\\Users"
)


def strings(node):
    "Every string in a notebook"
    if isinstance(node, str):
        yield node
    elif isinstance(node, (list, dict)):
        for o in node.values() if isinstance(node, dict) else node:
            yield from strings(o)


def faults(nb):
    "What should not be in a committed notebook, one line each"
    yield from {f"path {m[0]}" for s in strings(nb) for m in MACHINE.finditer(s)}
    code = [c for c in nb["cells"] if c["cell_type"] == "code"]
    outputs = [o for c in code for o in c["outputs"]]
    for o in outputs:
        said = "\n".join(strings(o.get("text", []))) + "\n".join(
            strings(o.get("data", {}).get("text/plain", []))
        )
        if (
            o["output_type"] == "error"
            or "Traceback (most recent call last)" in said
        ):
            yield "traceback"
        if o.get("name") == "stderr" or re.search(r"\w*Warning:", said):
            yield "warning or stderr output"
        if re.search(r"\d%\|", said):
            yield "progress bar"
    shown = [
        c
        for c in code
        if not re.search(r"^#\|\s*hide\b", "".join(c["source"]), re.M)
    ]
    if shown and not outputs:
        yield "never run: no outputs"


def test_notebooks_are_saved_clean():
    "A page shows what the author saw, from one good run, and nothing of the author's machine"
    found = [
        f"{p}: {fault}"
        for p in NOTEBOOKS
        for fault in faults(json.loads((ROOT / p).read_text(encoding="utf-8")))
    ]
    assert NOTEBOOKS and not found, "\n".join(found)


def test_faults_are_seen():
    "Control of the test above, one notebook with every fault"

    def cell(**output):
        return dict(
            cell_type="code", source=["1"], outputs=[output] if output else []
        )

    bad = [
        cell(
            output_type="stream", name="stdout", text=["saved in /home/me/x.json"]
        ),
        cell(output_type="error"),
        cell(output_type="stream", name="stderr", text=[]),
        cell(output_type="display_data", data={"text/plain": ["  0%|   | 0/3"]}),
    ]
    assert set(faults(dict(cells=bad))) == {
        "path /home",
        "traceback",
        "warning or stderr output",
        "progress bar",
    }
    assert list(faults(dict(cells=[cell()]))) == ["never run: no outputs"]
    fine = cell(
        output_type="display_data",
        data={
            "image/png": "iVBO/tmp/w0/home/ab=",
            "text/html": '<a href="https://x.org/home/">',
        },
    )
    assert not list(faults(dict(cells=[fine])))


@pytest.mark.parametrize("page", PROSE)
def test_prose_names_real_things(page):
    "Links into the tree and `make` targets, as written"
    text = (ROOT / page).read_text(encoding="utf-8")
    links = [
        s for s in re.findall(r"\]\(([^)#\s]+)", text) if not re.match(r"\w+:", s)
    ]
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M)
    dead = [s for s in links if s not in tree() and not (ROOT / s).is_dir()]
    dead += [
        f"make {t}"
        for t in re.findall(r"(?:`|^)make ([a-z]+)", text, re.M)
        if t not in targets
    ]
    assert not dead, dead


def workflow_faults(flow, targets):
    "What would fail only after a push, or run with more rights than it needs"
    jobs = flow["jobs"]
    steps = [s for j in jobs.values() for s in j["steps"]]
    said = " ; ".join(s.get("run", "") for s in steps)
    yield from (
        f"no target {t}"
        for t in re.findall(r"\bmake (\w+)", said)
        if t not in targets
    )
    yield from (
        f"never makes {t}" for t in ("test", "docs") if f"make {t}" not in said
    )
    yield from (
        f"not pinned: {s['uses']}"
        for s in steps
        if "uses" in s and not re.fullmatch(r"[\w-]+(/[\w-]+)+@v\d+", s["uses"])
    )
    yield from (
        f"no job {n}"
        for j in jobs.values()
        for n in j.get("needs", [])
        if n not in jobs
    )
    yield from (
        f"{name} may write"
        for name, j in [("every job", flow), *jobs.items()]
        if name != "publish"
        and "write" in str(j.get("permissions", "write" if j is flow else ""))
    )
    if (
        set(jobs["publish"]["needs"]) != {"test", "site"}
        or "github.ref == 'refs/heads/main'" not in jobs["publish"]["if"]
    ):
        yield "publishes what was not tested"
    if [
        s["with"]["path"]
        for s in steps
        if "upload-pages-artifact" in s.get("uses", "")
    ] != [
        yaml.safe_load((ROOT / "_quarto.yml").read_text())["project"][
            "output-dir"
        ]
    ]:
        yield "publishes another folder"


def test_workflow_can_work():
    "It runs elsewhere, after a push: its targets, jobs, versions and rights are looked at here"
    text = (ROOT / ".github/workflows/test.yml").read_text()
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M)

    def flow(s):
        return list(workflow_faults(yaml.safe_load(s), targets))

    assert not flow(text)
    for good, wrong, fault in (
        ("make docs", "make site", "no target site"),
        ("make test", "true", "never makes test"),
        ("checkout@v5", "checkout@main", "not pinned: actions/checkout@main"),
        ("[test, site]", "[site]", "publishes what was not tested"),
        ("path: _docs", "path: docs", "publishes another folder"),
        ("contents: read", "contents: write", "every job may write"),
    ):
        assert good in text and fault in flow(text.replace(good, wrong)), (
            fault
        )  # control


def test_readme_code_runs(tmp_path):
    "The first code a visitor copies: each block by itself, in an empty folder, warnings being errors; the teleport it promises is the one it prints"
    blocks = re.findall(
        r"^```python\n(.*?)^```",
        (ROOT / "README.md").read_text(encoding="utf-8"),
        re.M | re.S,
    )
    said = [
        run("python", "-W", "error", "-c", block, cwd=tmp_path, package=ROOT)
        for block in blocks
    ]
    assert any("'k': 5, 'accepted': True" in s for s in said), said
    assert not list(tmp_path.iterdir())
    with pytest.raises(AssertionError, match="warned"):
        run(
            "python",
            "-W",
            "error",
            "-c",
            'import warnings; warnings.warn("warned")',
            cwd=tmp_path,
            package=ROOT,
        )  # control


def test_files_are_small():
    "A clone stays quick and a diff readable: pictures are compressed, data stays outside"
    large = {p: (ROOT / p).stat().st_size for p in tree() if p != "LICENSE"}
    assert not {p: n for p, n in large.items() if n > 1.5e6}
