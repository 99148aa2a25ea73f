"""What only a browser can tell: controls recompute a run in JupyterLab, and on a
page without a kernel they switch pictures. Needs Chromium, playwright and, for
the page, the two scripts that `make` puts into .venv/js; each test that lacks
something says what."""

import json
import math
import os
import secrets
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
import reader
from conftest import LIMIT
from test_tree import NOTEBOOKS, ROOT


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
        "all => all.filter(i => i.getClientRects().length)"
        ".map(i => i.src.slice(-200))"
    )


def press(page, control, box, *keys):
    "Press keys on a control and wait for another picture"
    before = shown(box)
    control.focus()
    for key in keys:
        page.keyboard.press(key)

    def changed():
        return shown(box) not in ([], before)

    until(page, changed, f"another picture after {keys}")
    assert len(shown(box)) == 1


def controls(path):
    "Names of the controls that work without a kernel, as saved in a notebook"
    metadata = json.loads((ROOT / path).read_text(encoding="utf-8"))["metadata"]
    saved = metadata.get("widgets", {}).get(reader.WIDGETS, {}).get("state", {})
    names = []
    for model in saved.values():
        classes = list(model["state"].get("_dom_classes", []))
        if "symtele-control" in classes:
            classes.remove("symtele-control")
            names.append(classes[0])
    return names


PAGES = [path for path in NOTEBOOKS if controls(path)]
each_page = pytest.mark.parametrize("path", PAGES)


# Where a control stands, and its last place: of a list, a slider, or buttons
PLACE = """e => {
    if (e.matches('select')) return [e.selectedIndex, e.options.length - 1];
    if (e.matches('.noUi-handle')) return [+e.ariaValueNow, +e.ariaValueMax];
    const buttons = [...e.children];
    return [buttons.findIndex(b => b.matches('.mod-active')), buttons.length - 1];
}"""


def settings(page, box, knob):
    """Stop at every setting of a control, moved by keyboard from the first to the
    last; each must change the picture"""

    def place():
        return knob.evaluate(PLACE)

    buttons = knob.locator("button")
    if buttons.count():
        for i in range(buttons.count()):
            if place()[0] != i:
                press(page, buttons.nth(i), box, "Enter")
            yield i
        return
    is_list = knob.evaluate("e => e.matches('select')")
    if place()[0]:
        press(page, knob, box, "Home")
    yield 0
    while place()[0] < place()[1]:
        press(page, knob, box, "ArrowDown" if is_list else "ArrowRight")
        yield place()[0]


def walk(page, box, knobs):
    "Pictures at every setting of the first control, and there of the next"
    if not knobs:
        return shown(box)
    found = []
    for _ in settings(page, box, knobs[0]):
        found += walk(page, box, knobs[1:])
    return found


KNOBS = ".noUi-handle, select, .widget-toggle-buttons > div:not(.widget-label)"


def drive(page, names):
    "Move every control of a page through all its settings"
    for name in names:
        drive_one(page, name)


def drive_one(page, name):
    "Move one control through all its settings"
    box = page.locator(f".symtele-control.{name}")
    until(page, lambda: len(shown(box)) == 1, f"one picture of {name}")
    still = page.locator(name.replace("symtele-", ".symtele-still-"))
    assert not still.is_visible(), f"{name}: the still picture is in the way"
    caption = box.locator(".figure-caption").inner_text()
    assert len(caption) > 40, f"{name} says nothing"
    knobs = box.locator(KNOBS).all()
    lasts = [knob.evaluate(PLACE)[1] for knob in knobs]
    assert knobs and all(n > 0 for n in lasts)
    pictures = walk(page, box, knobs)
    wanted = math.prod(n + 1 for n in lasts)
    whole = len(set(pictures)) == len(pictures) == wanted
    assert whole, f"{name}: pictures are missing or the same"
    play = box.locator(".widget-play button")
    if play.count():
        press(page, knobs[-1], box, "Home")
        press(page, play.first, box, "Enter")


def test_pages_with_controls():
    "Home, test functions, MLP, schedules: whoever loses theirs is noticed"
    assert len(PAGES) >= 4, PAGES


@each_page
def test_page_without_kernel(page, site, path):
    """The committed pictures, switched by jslink alone; what needs a kernel is
    not to be seen, and it is said where it can be had"""
    page.goto(site[path])
    drive(page, controls(path))
    assert not page.locator(".symtele-live").filter(visible=True).count()
    if "symtele-live" in (ROOT / path).read_text(encoding="utf-8"):
        note = page.locator(".symtele-needs-kernel")
        assert "Jupyter" in note.inner_text() and note.is_visible()
    pictures = page.locator(".symtele-control img, .symtele-still img")
    lengths = pictures.evaluate_all("all => all.map(i => i.alt.length)")
    assert all(n > 20 for n in lengths)
    assert not page.faults, page.faults


def test_broken_link_is_seen(page, processed, serve, tmp_path, monkeypatch):
    "Control of the test above: without its last link a control stays where it is"
    monkeypatch.setitem(globals(), "LIMIT", 3_000)
    nb = json.loads(json.dumps(processed[PAGES[0]]))
    state = nb["metadata"]["widgets"][reader.WIDGETS]["state"]
    linked = [k for k, m in state.items() if m["model_name"] == "LinkModel"]
    del state[linked[-1]]
    built = reader.build({PAGES[0]: nb}, tmp_path / "docs")[PAGES[0]]
    page.goto(f"{serve(built.parent)}/{built.name}")
    with pytest.raises(AssertionError, match="another picture after"):
        drive(page, controls(PAGES[0]))


@each_page
def test_controls_say_what_they_are(page, site, path):
    """A slider has a name and speaks its setting, not the number of it; buttons
    have names; what the mouse moves, changes the picture"""
    page.goto(site[path])
    for name in controls(path):
        box = page.locator(f".symtele-control.{name}")
        until(page, lambda b=box: len(shown(b)) == 1, f"one picture of {name}")
        for slider in box.locator(".widget-slider").all():
            handle = slider.locator(".noUi-handle")
            label = slider.locator(".widget-label").inner_text()
            assert handle.get_attribute("aria-label") == label
            drag(page, box, slider)
            told = slider.locator(".widget-readout").inner_text()
            until(
                page,
                lambda h=handle, t=told: h.get_attribute("aria-valuetext") == t,
                f"{label} says {told}",
            )
        for button in box.locator("button").all():
            named = button.get_attribute("aria-label") or button.inner_text()
            assert named.strip(), f"{name}: a button without a name"


def drag(page, box, slider):
    "Move a slider by mouse to its far end and wait for another picture"
    before = shown(box)
    slider.scroll_into_view_if_needed()
    track = slider.locator(".noUi-target").bounding_box()
    handle = slider.locator(".noUi-handle").bounding_box()
    x = handle["x"] + handle["width"] / 2
    y = handle["y"] + handle["height"] / 2
    left = x - track["x"] > track["width"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(track["x"] + (2 if left else track["width"] - 2), y, steps=5)
    page.mouse.up()
    until(page, lambda: shown(box) not in ([], before), "a picture after a drag")


@pytest.fixture(scope="module")
def plain(open_browser):
    "Chromium that runs no scripts"
    context = open_browser(java_script_enabled=False)
    yield context
    context.close()


@each_page
def test_page_without_scripts(plain, site, path):
    """Where no script runs, a still picture of each control is there, and says
    what to look for"""
    page = plain.new_page()
    page.goto(site[path])
    for name in controls(path):
        still = page.locator(name.replace("symtele-", ".symtele-still-"))
        picture = still.locator("img")
        assert picture.is_visible(), name
        assert picture.bounding_box()["width"] > 250, name
        assert len(picture.get_attribute("alt")) > 20, name
        assert len(still.locator(".figure-caption").inner_text()) > 40, name
    page.close()


def test_picture_opens_in_its_own_size(page, site):
    "On a phone, by a button that keyboards reach; Escape closes it"
    page.set_viewport_size({"width": 390, "height": 844})
    page.goto(site["nbs/21_figures.ipynb"])
    button = page.locator(".symtele-figure .symtele-enlarge").first
    small = page.locator(".symtele-figure img").first.bounding_box()["width"]
    button.focus()
    page.keyboard.press("Enter")
    picture = page.locator("dialog img")
    until(page, picture.is_visible, "the picture")
    assert picture.bounding_box()["width"] > 1.5 * small
    page.keyboard.press("Escape")
    assert not picture.is_visible()


LIVE = dict(
    cells=[
        dict(
            cell_type="code",
            id="a",
            metadata={},
            source="from symtele.schedules import *\nexplorer()",
            execution_count=None,
            outputs=[],
        )
    ],
    metadata=dict(
        kernelspec=dict(name="python3", display_name="python3", language="python")
    ),
    nbformat=4,
    nbformat_minor=5,
)
OWN_FOLDERS = (
    "JUPYTER_CONFIG_DIR",
    "JUPYTER_DATA_DIR",
    "JUPYTER_RUNTIME_DIR",
    "IPYTHONDIR",
    "JUPYTERLAB_SETTINGS_DIR",
    "JUPYTERLAB_WORKSPACES_DIR",
)
QUIET_LAB = [
    "--no-browser",
    "--allow-root",
    "--expose-app-in-browser",
    "--ServerApp.port_retries=0",
    "--LabApp.news_url=None",
    "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
]


def free_port():
    "A port that nobody listens at"
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """Address of a JupyterLab that shows a notebook with the explorer, and
    nothing else of this user's"""
    folder = tmp_path_factory.mktemp("lab")
    (folder / "live.ipynb").write_text(json.dumps(LIVE))
    token, port = secrets.token_hex(16), free_port()
    address = f"http://127.0.0.1:{port}"
    own = {name: str(folder / name) for name in OWN_FOLDERS}
    env = os.environ | own | {"PYTHONPATH": str(ROOT)}
    env.pop("MPLBACKEND", None)
    command = [sys.executable, "-m", "jupyterlab", *QUIET_LAB]
    command += ["--ip=127.0.0.1", f"--port={port}"]
    command += [f"--IdentityProvider.token={token}"]
    with open(folder / "log", "w") as log:
        server = subprocess.Popen(
            command, cwd=folder, env=env, stdout=log, stderr=subprocess.STDOUT
        )
    try:
        for _ in range(LIMIT // 200):
            assert server.poll() is None, (folder / "log").read_text()[-2000:]
            try:
                urllib.request.urlopen(f"{address}/api?token={token}", timeout=2)
                break
            except OSError:
                time.sleep(0.2)
        yield f"{address}/lab/tree/live.ipynb?token={token}&reset"
    finally:
        server.terminate()
        server.wait(30)


KERNEL = "window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel"


class Explorer:
    "The panel of controls in a page of JupyterLab"

    def __init__(self, page):
        self.page, self.panel = page, page.locator(".symtele-explorer")

    def row(self, label):
        "The control of that name"
        named = self.page.get_by_text(label, exact=True)
        return self.panel.locator(".jupyter-widgets").filter(has=named).last

    def press(self, control, *keys):
        "Press keys on a control and wait for another picture"
        press(self.page, control, self.panel, *keys)

    def slide(self, label, key):
        "Press a key on a slider"
        self.press(self.row(label).locator(".noUi-handle"), key)

    def pick(self, label, *keys):
        "Choose from a list; a closed one would leave the arrows to the notebook"
        self.press(self.row(label).locator("select"), "Space", *keys, "Enter")

    def says(self, words):
        "Wait for a sentence under the picture"
        status = self.panel.locator("[role=status]")
        until(self.page, lambda: words in status.inner_text(), words)

    def code(self, words):
        "Wait for code that reproduces the run"
        area = self.panel.locator("textarea")
        until(self.page, lambda: words in area.input_value(), words)


def test_live_explorer(page, lab):
    """A dropdown, sliders and toggles, moved from the keyboard, each answered by
    Python with another picture; and a setting that cannot be, in words"""
    page.goto(lab)
    page.wait_for_selector(".jp-Notebook .jp-Cell")
    page.wait_for_function(f"() => {KERNEL}?.status == 'idle'", timeout=LIMIT)
    page.evaluate(
        "() => window.jupyterapp.commands.execute('notebook:run-all-cells')"
    )
    explorer = Explorer(page)
    until(page, lambda: len(shown(explorer.panel)) == 1, "the first picture")
    explorer.slide("interval", "ArrowRight")
    explorer.code("every(6, start=0)")
    explorer.press(explorer.row("climb").locator("button").first, "Enter")
    explorer.code("objective=grad_norm")
    explorer.pick("problem", "ArrowDown")
    explorer.code("booth_problem()")
    explorer.slide("angles", "Home")
    explorer.code("GreatCircle(n=3")
    explorer.pick("search", "End")
    explorer.code("Random(norm=0.5)")
    readout = explorer.row("norm").locator(".widget-readout")
    assert readout.inner_text() == "0.5"
    explorer.slide("learning rate", "End")
    explorer.says("It diverged at step")
    explorer.pick("problem", "ArrowDown", "ArrowDown")
    explorer.code("regression_problem()")
    explorer.pick("search", "Home")
    explorer.says("GreatCircle searches rotations")
    faults = [f for f in page.faults if "127.0.0.1" not in f]
    assert not faults, faults
