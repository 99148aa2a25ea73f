"""Every page as a reader sees it, in a browser, wide and narrow, light and dark:
nothing is cut without a hint or lies over another, everything has words, and
no other host is asked."""

import gzip
import sys
import tarfile
from pathlib import Path

import pytest
from test_tree import NOTEBOOKS

# What is wider than the page and does not say so; what spills out of a cell of a
# table; which blocks lie over the one before; pictures without words or too small
LOOK = """() => {
    const main = document.querySelector("main"), found = [];
    const edge = main.getBoundingClientRect().right + 2;
    const seen = (e) => e.getClientRects().length && e.checkVisibility();
    const tell = (what, e) => found.push(
        `${what}: ${(e.innerText || e.alt || e.tagName).trim().slice(0, 60)}`);
    const boxed = (e) => {
        for (let b = e; b && b !== main; b = b.parentElement)
            if (b.classList.contains("symtele-scrolls"))
                return b.nextElementSibling?.matches(".symtele-hint") &&
                    b.tabIndex === 0;
        return false;
    };
    const innermost = "pre, code, table, td, th, img, figure, math, p, li, " +
        "summary, h1, h2, h3, h4, select, button, .widget-label, details";
    for (const e of main.querySelectorAll(innermost)) {
        if (!seen(e) || e.closest("math") && e.tagName !== "math") continue;
        const box = e.getBoundingClientRect();
        if (box.right > edge && !boxed(e)) tell("beyond the page", e);
        const clips = getComputedStyle(e).overflowX !== "visible";
        if (e.scrollWidth > e.clientWidth + 1 && clips && !boxed(e) &&
            e.clientWidth) tell("cut", e);
        if (/^T[DH]$/.test(e.tagName) && e.scrollWidth > e.clientWidth + 1)
            tell("spills out of its cell", e);
    }
    if (innerWidth > 1000)
        for (const e of main.querySelectorAll("pre.sourceCode, .sourceCode"))
            if (seen(e) && e.scrollWidth > e.clientWidth + 1) tell("cut code", e);
    let last = 0;
    for (const e of main.querySelectorAll(":scope section > *, :scope > *")) {
        if (!seen(e) || e.tagName === "SECTION") continue;
        const box = e.getBoundingClientRect();
        if (box.top < last - 2 && box.height) tell("over what is above", e);
        last = Math.max(last, box.bottom);
    }
    for (const e of [...main.querySelectorAll("img")].filter(seen)) {
        if (!(e.alt.length > 20)) tell("no words", e);
        const figure = e.closest("figure, .symtele-control, .symtele-live");
        if (!figure?.querySelector(".figure-caption")) tell("no caption", e);
    }
    if (document.documentElement.scrollWidth > innerWidth + 1)
        found.push(`the page is ${document.documentElement.scrollWidth} wide`);
    return found;
}"""
WIDTHS = {"wide": 1400, "narrow": 390}
each_page = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: Path(p).stem)


def axe():
    "The source of axe-core, which npm has packed"
    packed = sorted((Path(sys.prefix) / "js").glob("axe-core-*.tgz"))
    if not packed:
        pytest.skip("no axe-core in .venv/js: install npm, then make")
    with tarfile.open(packed[-1]) as archive:
        return archive.extractfile("package/axe.min.js").read().decode()


def settled(page, address):
    "Open a page and wait for its controls"
    page.goto(address, wait_until="load")
    page.wait_for_function(
        "() => [...document.querySelectorAll('.symtele-still')]"
        ".every(e => !e.getClientRects().length)"
    )
    page.wait_for_timeout(100)  # boxes are marked when they have their size


def paint(page, theme):
    "Show a page in one of the two themes"
    page.evaluate(
        f"document.body.className = 'nav-sidebar floating quarto-{theme}'"
    )


SERIOUS = """async () => {
    const done = await axe.run("main", {resultTypes: ["violations"],
        preload: false, rules: {"heading-order": {enabled: true}}});
    return done.violations.filter(v => /serious|critical/.test(v.impact))
        .map(v => `${v.id}: ${v.nodes.map(n => n.html).slice(0, 3).join(" ")}`);
}"""


def weigh(page):
    "What a page will ask for: address -> bytes, and bytes when compressed"
    weights = {}

    def weigh_one(request):
        body = request.response().body()
        weights[request.url] = (len(body), len(gzip.compress(body)))

    page.on("requestfinished", weigh_one)
    return weights


@each_page
def test_page_can_be_read(page, site, path):
    """At both widths and in both themes; axe-core has nothing serious to say;
    HTML and pictures are at most 1.5 MB, what all share 2 MB compressed"""
    found, weights = [], weigh(page)
    page.set_viewport_size({"width": WIDTHS["wide"], "height": 900})
    settled(page, site[path])
    own, _ = weights.pop(site[path])
    shared = sum(small for _, small in weights.values())
    page.add_script_tag(content=axe())
    for theme in ("light", "dark"):
        paint(page, theme)
        found += [f"{theme}: {f}" for f in page.evaluate(SERIOUS)]
    for width, pixels in WIDTHS.items():
        page.set_viewport_size({"width": pixels, "height": 900})
        page.wait_for_timeout(200)  # boxes are marked again
        for theme in ("light", "dark"):
            paint(page, theme)
            found += [f"{width}, {theme}: {f}" for f in page.evaluate(LOOK)]
    assert not found + page.faults, "\n".join(found + page.faults)
    assert own <= 1.5e6, f"{own / 1e6:.2f} MB"
    assert shared <= 2e6, f"{shared / 1e6:.2f} MB, compressed: {[*weights]}"


FAULTS = {  # what stands on a page -> what must be said of it
    "<p><code style='white-space:nowrap!important'>" + "long " * 40: "beyond",
    "<pre class='sourceCode'><code>" + "x = 1; " * 60: "cut code",
    "<table style='width:2em;table-layout:fixed'><td>factorisation": "spills",
    "<p style='margin-bottom:-3em'>One<p>Another over it": "over what",
    "<img alt='short' src='data:image/png;base64,'>": "no words",
}


@pytest.mark.parametrize("markup", FAULTS, ids=FAULTS.get)
def test_faults_are_seen(page, site, markup):
    "Control of the test above"
    page.set_viewport_size({"width": WIDTHS["wide"], "height": 900})
    settled(page, site["nbs/11_whitening.ipynb"])
    assert not page.evaluate(LOOK)
    page.evaluate(
        "m => document.querySelector('main').insertAdjacentHTML('beforeend', m)",
        markup,
    )
    said = page.evaluate(LOOK)
    assert any(FAULTS[markup] in found for found in said), said
