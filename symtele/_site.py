"""The last step of a build of the site: Quarto runs it when the pages are written
(post-render). What pages would ask of other hosts is put beside them, and the
search finds findings and names instead of code."""

import json
import os
import re
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

from bs4 import BeautifulSoup
from bs4.element import NavigableString, Tag

# What shows widgets: packed file -> what pages need of it
SCRIPTS = {
    "requirejs-*.tgz": r"package/require\.js",
    "jupyter-widgets-html-manager-*.tgz": (
        r"package/dist/(embed-amd\.js|\w+\.woff2)"
    ),
}
WIDGETS = "@jupyter-widgets"  # Beside the pages; fonts are asked for there
ELSEWHERE = re.compile(
    r'<script src="https://[^"]*/(require|jquery|embed-amd)(?:\.min)?\.js[^"]*"'
    r"[^>]*></script>"
)


def self_contained(
    page: str,  # HTML as Quarto writes it
) -> str:  # Asking nobody else
    "A page with its scripts beside it, and without jQuery, which nothing calls"

    def here(found):
        if found[1] == "jquery":
            return ""
        return f'<script src="{WIDGETS}/{found[1]}.js"></script>'

    return ELSEWHERE.sub(here, page)


MODULES = re.compile(
    r'<script src="([^"]*/quarto-html/quarto\.js)" type="module"></script>\s*'
    r'<script src="[^"]*/tabsets\.js" type="module"></script>'
)
IMPORT = 'import * as tabsets from "./tabsets/tabsets.js";'


def join_modules(
    libs: Path,  # Quarto's folder of scripts, changed in place
):
    "Put tabsets.js into quarto.js: browsers load no modules from plain files"
    whole, part = libs / "quarto.js", libs / "tabsets" / "tabsets.js"
    if not part.exists():
        return
    inner = part.read_text(encoding="utf-8").replace(
        "export function", "function"
    )
    joined = f"const tabsets = (() => {{\n{inner}\nreturn {{init}};\n}})();"
    text = whole.read_text(encoding="utf-8").replace(IMPORT, joined)
    whole.write_text(text, encoding="utf-8")


WIDE = re.compile(r"<table\b.*?</table>", re.S)


def boxed(
    page: str,  # HTML
) -> str:
    "A page whose tables stand in boxes that move sideways where they must"
    return WIDE.sub(r'<div class="symtele-wide">\g<0></div>', page)


def unpack(
    packed: Path,  # Folder with the packages that npm packed
    to: Path,  # Folder, made
):
    "Put what shows widgets into the site, and whose it is"
    fonts = to / "html-manager" / "dist"
    fonts.mkdir(parents=True, exist_ok=True)
    lines = []
    for pattern, needed in SCRIPTS.items():
        found = sorted(packed.glob(pattern))
        if not found:
            raise FileNotFoundError(
                f"no {pattern} in {packed}: pages with widgets need it; "
                "install npm, remove .venv/.installed and call make again"
            )
        with tarfile.open(found[-1]) as archive:
            about = json.load(archive.extractfile("package/package.json"))
            lines.append("{name} {version}, {license}".format_map(about))
            for member in archive.getmembers():
                if re.fullmatch(needed, member.name):
                    data = archive.extractfile(member).read()
                    name = Path(member.name).name
                    (to / name).write_bytes(data)
                    if name.endswith(".woff2"):  # looked for at two places
                        (fonts / name).write_bytes(data)
    text = "\n".join([*lines, "Font Awesome 4 in the latter, SIL OFL 1.1", ""])
    (to / "licences.txt").write_text(text, encoding="utf-8")


HEAVY = re.compile(
    r"<script.*?</script>|<pre\b.*?</pre>|data:image/png;base64,[\w+/=]*", re.S
)
SILENT = {"style", "h1", "h2", "h3"}  # No prose, or said elsewhere


@dataclass
class Place:
    "What can be found: a page, a heading or a public name on it"

    anchor: str
    heading: str
    words: list[str]


def read(
    part: Tag,  # Of a page
    places: list[Place],  # Gets what is found in it; the prose is of the last
):
    "Find headings and names, with the prose under each, and no code"
    here = places[-1]
    for child in part.children:
        if isinstance(child, NavigableString):
            here.words.append(child)
            continue
        classes = child.get("class", [])
        if "symtele-name" in classes:
            places.append(Place(f"#{child['id']}", child["data-name"], []))
        elif child.name == "section" and {"level2", "level3"} & set(classes):
            heading = child.find(["h2", "h3"]).get_text().strip()
            places.append(Place(f"#{child['id']}", heading, []))
            read(child, places)
        elif child.name not in SILENT and "code-fold" not in classes:
            inner = [here]
            read(child, inner)
            places += inner[1:]


def findable(
    page: str,  # HTML
    href: str,  # Its address in the site
) -> list[dict]:  # As search.json has them
    "What can be found on a page: itself, its headings, its public names"
    tree = BeautifulSoup(HEAVY.sub("", page), "html.parser")
    main = tree.find("main")
    if main is None:  # leads to another page
        return []
    title = tree.title.get_text().removesuffix(" – symtele")
    places = [Place("", "", [])]
    read(main, places)
    return [
        dict(
            objectID=href + place.anchor,
            href=href + place.anchor,
            title=title,
            section=place.heading,
            text=" ".join("".join(place.words).split()),
            crumbs=[title],
        )
        for place in places
    ]


def finish(
    site: Path,  # Folder of the pages, changed in place
    packed: Path = Path(sys.prefix) / "js",  # Where npm's packages are
):
    "Let pages ask no other host, and let the search find names"
    join_modules(site / "site_libs" / "quarto-html")
    found, widgets = [], set()
    for path in sorted(site.rglob("*.html")):
        page = path.read_text(encoding="utf-8")
        own = self_contained(page)
        if own != page:
            widgets.add(path.parent / WIDGETS)
        written = MODULES.sub(r'<script src="\1" defer></script>', boxed(own))
        path.write_text(written, encoding="utf-8")
        found += findable(own, path.relative_to(site).as_posix())
    for folder in widgets:
        unpack(packed, folder)
    text = json.dumps(found, ensure_ascii=False, indent=1)
    (site / "search.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    finish(Path(os.environ["QUARTO_PROJECT_OUTPUT_DIR"]))
