"""What only a browser can tell: controls recompute a run in JupyterLab, and on a page without a kernel they switch pictures.
Needs Chromium, playwright and, for the page, the two scripts that `make` puts into .venv/js; each test that lacks something says what."""

import functools
import http.server
import io
import json
import math
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tarfile
import threading
import time
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = (
    shutil.which("chromium")
    or shutil.which("chromium-browser")
    or shutil.which("google-chrome")
)
SCRIPTS = {  # packed file -> what the page loads from it, by ending
    "requirejs-*.tgz": ["require.js"],
    "jupyter-widgets-html-manager-*.tgz": [
        "dist/embed-amd.js",
        ".woff2",
        ".woff",
        ".ttf",
    ],
}
LIMIT = 60_000  # milliseconds; the machine may be busy

if not CHROMIUM:
    pytest.skip("no Chromium: apt-get install chromium", allow_module_level=True)
sync_api = pytest.importorskip(
    "playwright.sync_api", reason="no playwright: pip install playwright"
)


@pytest.fixture(scope="module")
def open_browser(tmp_path_factory):
    "Opens Chromium, with nothing of its own to ask the network"
    quiet = [
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
    ]
    with sync_api.sync_playwright() as p:

        def launch(**settings):
            context = p.chromium.launch_persistent_context(
                tmp_path_factory.mktemp("profile"),
                executable_path=CHROMIUM,
                args=quiet,
                viewport={"width": 1300, "height": 1000},
                **settings,
            )
            context.set_default_timeout(LIMIT)
            return context

        yield launch


@pytest.fixture(scope="module")
def browser(open_browser):
    context = open_browser()
    yield context
    context.close()


@pytest.fixture
def page(browser):
    "A tab, and in `page.faults` what its scripts complained of and whom it asked outside this machine"
    page = browser.new_page()
    page.faults = []
    page.on(
        "console",
        lambda m: page.faults.append(m.text) if m.type == "error" else None,
    )
    page.on("pageerror", lambda e: page.faults.append(str(e)))
    page.on(
        "request",
        lambda r: (
            None
            if r.url.startswith(("http://127.0.0.1", "data:", "blob:"))
            else page.faults.append(r.url)
        ),
    )
    yield page
    page.close()


def until(page, seen, what):
    "Wait for `seen()` to be true"
    for _ in range(LIMIT // 100):
        if seen():
            return
        page.wait_for_timeout(100)
    raise AssertionError(f"{what}: not seen within {LIMIT // 1000} s")


def shown(box):
    "The pictures in `box` that are visible, by the ends of their data"
    return box.locator("img").evaluate_all(
        "l => l.filter(i => i.getClientRects().length).map(i => i.src.slice(-200))"
    )


def press(page, control, box, *keys):
    "Press keys on a control and wait for another picture"
    before = shown(box)
    control.focus()
    for key in keys:
        page.keyboard.press(key)
    until(
        page,
        lambda: shown(box) not in ([], before),
        f"another picture after {keys}",
    )
    assert len(shown(box)) == 1


def controls(notebook):
    "Names of the controls that work without a kernel, as saved in a notebook"
    saved = (
        json.loads(notebook.read_text(encoding="utf-8"))["metadata"]
        .get("widgets", {})
        .get("application/vnd.jupyter.widget-state+json", {})
    )
    classes = [
        m["state"].get("_dom_classes", [])
        for m in saved.get("state", {}).values()
    ]
    return [
        next(c for c in l if c != "symtele-control")
        for l in classes
        if "symtele-control" in l
    ]


PAGES = [p for p in sorted((ROOT / "nbs").glob("[!_]*.ipynb")) if controls(p)]
each_page = pytest.mark.parametrize("notebook", PAGES, ids=lambda p: p.stem)


@pytest.fixture(scope="module")
def static(tmp_path_factory):
    "Makes a notebook, as committed or given as text, a page served with its scripts; its address"
    folder = tmp_path_factory.mktemp("page")
    for pattern, endings in SCRIPTS.items():
        found = sorted((Path(sys.prefix) / "js").glob(pattern))
        if not found:
            pytest.skip(f"no {pattern} in .venv/js: install npm, then make")
        with tarfile.open(found[-1]) as t:
            for m in t.getmembers():
                if not m.name.endswith(tuple(endings)):
                    continue
                for place in (
                    "@jupyter-widgets/html-manager/dist",
                    "@jupyter-widgets",
                ):  # fonts are asked for at both
                    (folder / place).mkdir(parents=True, exist_ok=True)
                    (folder / place / Path(m.name).name).write_bytes(
                        t.extractfile(m).read()
                    )
    from nbconvert import HTMLExporter

    own = HTMLExporter(
        require_js_url="@jupyter-widgets/require.js",
        widget_renderer_url="@jupyter-widgets/html-manager/dist/embed-amd.js",
        mathjax_url="",
        jquery_url="",
        mermaid_js_url="",
    )
    (folder / "favicon.ico").touch()  # browsers ask

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=folder)
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def serve(notebook, text=None):
        name = f"{notebook.stem}{'-changed' if text else ''}.html"
        if not (folder / name).exists():
            (folder / name).write_text(
                own.from_file(
                    io.StringIO(text or notebook.read_text(encoding="utf-8"))
                )[0],
                encoding="utf-8",
            )
        return f"http://127.0.0.1:{server.server_port}/{name}"

    yield serve
    server.shutdown()


PLACE = """e => e.matches('select') ? [e.selectedIndex, e.options.length-1] : e.matches('.noUi-handle') ? [+e.ariaValueNow, +e.ariaValueMax] :
    [[...e.children].findIndex(b => b.matches('.mod-active')), e.children.length-1]"""


def settings(page, box, knob):
    "Stop at every setting of a control, moved by keyboard from the first to the last; each must change the picture"

    def place():
        return knob.evaluate(PLACE)

    buttons = knob.locator("button")
    if buttons.count():
        for i in range(buttons.count()):
            if place()[0] != i:
                press(page, buttons.nth(i), box, "Enter")
            yield i
        return
    if place()[0]:
        press(page, knob, box, "Home")
    yield 0
    while place()[0] < place()[1]:
        press(
            page,
            knob,
            box,
            "ArrowDown"
            if knob.evaluate("e => e.matches('select')")
            else "ArrowRight",
        )
        yield place()[0]


def walk(page, box, knobs):
    "Pictures at every setting of the first control, and there of the next"
    if not knobs:
        return shown(box)
    return [
        p
        for _ in settings(page, box, knobs[0])
        for p in walk(page, box, knobs[1:])
    ]


def drive(page, names):
    "Move every control of a page through all its settings"
    for name in names:
        box = page.locator(f".symtele-control.{name}")
        until(page, lambda: len(shown(box)) == 1, f"one picture of {name}")
        assert not page.locator(
            name.replace("symtele-", ".symtele-still-")
        ).is_visible(), f"{name}: the still picture is in the way"
        assert len(box.locator(".figure-caption").inner_text()) > 40, (
            f"{name} says nothing"
        )
        knobs = [
            k
            for k in box.locator(
                ".noUi-handle, select, .widget-toggle-buttons > div:not(.widget-label)"
            ).all()
        ]
        lasts = [k.evaluate(PLACE)[1] for k in knobs]
        assert knobs and all(n > 0 for n in lasts)
        seen = walk(page, box, knobs)
        assert len(set(seen)) == len(seen) == math.prod(n + 1 for n in lasts), (
            f"{name}: pictures are missing or the same"
        )
        if (play := box.locator(".widget-play button")).count():
            press(page, knobs[-1], box, "Home")
            press(page, play.first, box, "Enter")


def test_pages_with_controls():
    "Home, test functions, MLP, schedules: a page that lost its controls is noticed"
    assert len(PAGES) >= 4, PAGES


@each_page
def test_page_without_kernel(page, static, notebook):
    "The committed pictures, switched by jslink alone"
    page.goto(static(notebook))
    drive(page, controls(notebook))
    if "symtele-explorer" in notebook.read_text(
        encoding="utf-8"
    ):  # dead without a kernel, and still there to be seen
        panel = page.locator(".symtele-explorer")
        until(page, lambda: len(shown(panel)) == 1, "one picture of the explorer")
    pictures = page.locator(
        ".symtele-control img, .symtele-still img, .symtele-explorer img"
    )
    assert all(
        n > 20 for n in pictures.evaluate_all("l => l.map(i => i.alt.length)")
    )
    assert not page.faults, page.faults


def test_broken_link_is_seen(page, static, monkeypatch):
    "Control of the test above: without its last link a control stays where it is"
    monkeypatch.setitem(globals(), "LIMIT", 3_000)
    nb = json.loads(PAGES[0].read_text(encoding="utf-8"))
    state = nb["metadata"]["widgets"][
        "application/vnd.jupyter.widget-state+json"
    ]["state"]
    last = [k for k, m in state.items() if m["model_name"] == "LinkModel"][-1]
    del state[last]
    page.goto(static(PAGES[0], json.dumps(nb)))
    with pytest.raises(AssertionError, match="another picture after"):
        drive(page, controls(PAGES[0]))


@pytest.fixture(scope="module")
def plain(open_browser):
    "Chromium that runs no scripts"
    context = open_browser(java_script_enabled=False)
    yield context
    context.close()


@each_page
def test_page_without_scripts(plain, static, notebook):
    "Where no script runs, a still picture of each control is there, and says what to look for"
    page = plain.new_page()
    page.goto(static(notebook))
    for name in controls(notebook):
        still = page.locator(name.replace("symtele-", ".symtele-still-"))
        picture = still.locator("img")
        assert (
            picture.is_visible()
            and picture.bounding_box()["width"] > 250
            and len(picture.get_attribute("alt")) > 20
        ), name
        assert len(still.locator(".figure-caption").inner_text()) > 40, name
    page.close()


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "Address of a JupyterLab that shows a notebook with the explorer, and nothing else of this user's"
    folder = tmp_path_factory.mktemp("lab")
    token = secrets.token_hex(16)
    cell = dict(
        cell_type="code",
        id="a",
        metadata={},
        source="from symtele.schedules import *\nexplorer()",
        execution_count=None,
        outputs=[],
    )
    kernel = dict(
        kernelspec=dict(name="python3", display_name="python3", language="python")
    )
    (folder / "live.ipynb").write_text(
        json.dumps(
            dict(cells=[cell], metadata=kernel, nbformat=4, nbformat_minor=5)
        )
    )
    own = (
        "JUPYTER_CONFIG_DIR",
        "JUPYTER_DATA_DIR",
        "JUPYTER_RUNTIME_DIR",
        "IPYTHONDIR",
        "JUPYTERLAB_SETTINGS_DIR",
        "JUPYTERLAB_WORKSPACES_DIR",
    )
    env = (
        os.environ | {k: str(folder / k) for k in own} | {"PYTHONPATH": str(ROOT)}
    )
    env.pop("MPLBACKEND", None)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    quiet = [
        "--no-browser",
        "--allow-root",
        "--expose-app-in-browser",
        "--ServerApp.port_retries=0",
        "--LabApp.news_url=None",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
    ]
    with open(folder / "log", "w") as log:
        server = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "jupyterlab",
                "--ip=127.0.0.1",
                f"--port={port}",
                f"--IdentityProvider.token={token}",
                *quiet,
            ],
            cwd=folder,
            env=env,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        for _ in range(LIMIT // 200):
            assert server.poll() is None, (folder / "log").read_text()[-2000:]
            try:
                urllib.request.urlopen(
                    f"http://127.0.0.1:{port}/api?token={token}", timeout=2
                )
                break
            except OSError:
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/lab/tree/live.ipynb?token={token}&reset"
    finally:
        server.terminate()
        server.wait(30)


IDLE = "() => window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status == 'idle'"


def test_live_explorer(page, lab):
    "A dropdown, sliders and toggles, moved from the keyboard, each answered by Python with another picture; and a setting that cannot be, in words"
    page.goto(lab)
    page.wait_for_selector(".jp-Notebook .jp-Cell")
    page.wait_for_function(IDLE, timeout=LIMIT)
    page.evaluate(
        "() => window.jupyterapp.commands.execute('notebook:run-all-cells')"
    )
    panel = page.locator(".symtele-explorer")
    until(page, lambda: len(shown(panel)) == 1, "the first picture")

    def row(label):
        return (
            panel.locator(".jupyter-widgets")
            .filter(has=page.get_by_text(label, exact=True))
            .last
        )

    def says(words):
        return until(
            page,
            lambda: words in panel.locator("[role=status]").inner_text(),
            words,
        )

    def code(words):
        return until(
            page, lambda: words in panel.locator("textarea").input_value(), words
        )

    def pick(label, *keys):
        return (
            row(label).locator("select"),
            panel,
            "Space",
            *keys,
            "Enter",
        )  # a closed list would leave the arrows to the notebook

    press(page, row("interval").locator(".noUi-handle"), panel, "ArrowRight")
    code("every(6, start=0)")
    press(page, row("climb").locator("button").first, panel, "Enter")
    code("objective=grad_norm")
    press(page, *pick("problem", "ArrowDown"))
    code("booth_problem()")
    press(page, row("angles").locator(".noUi-handle"), panel, "Home")
    code("GreatCircle(n=3")
    press(page, *pick("search", "End"))
    code("Random(norm=0.5)")
    assert row("norm").locator(".widget-readout").inner_text() == "0.5"
    press(page, row("learning rate").locator(".noUi-handle"), panel, "End")
    says("It diverged at step")
    press(page, *pick("problem", "ArrowDown", "ArrowDown"))
    code("regression_problem()")
    press(page, *pick("search", "Home"))
    says("GreatCircle searches rotations")
    faults = [f for f in page.faults if "127.0.0.1" not in f]
    assert not faults, faults
