"""The last step of a build of the site: Quarto runs it when the pages are written
(post-render). What pages would ask of other hosts is put beside them, and the
search finds every public name."""

import json
import os
import re
import sys
import tarfile
from html import unescape
from pathlib import Path

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


def local(
    page: str,  # HTML as Quarto writes it
) -> str:  # Asking nobody else
    "A page with its scripts beside it, and without jQuery, which nothing calls"

    def here(found):
        if found[1] == "jquery":
            return ""
        return f'<script src="{WIDGETS}/{found[1]}.js"></script>'

    return ELSEWHERE.sub(here, page)


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


ENTRY = re.compile(  # of a name: anchor, name, and the first thing said of it
    r'<section id="([^"]+)" class="level4[^"]*">\s*<h4[^>]*>(\w+)</h4>'
    r"(?:(?!<section).)*?<p>(.*?)</p>",
    re.S,
)
FOLDED = re.compile(
    r'<span id="(\w+)" class="symtele-name">'
)  # on a study's page


def names(
    page: str,  # HTML
    href: str,  # Its address in the site
) -> list[dict]:  # As search.json has them
    "A thing to be found for each public name of a page"
    title = unescape(
        re.search("<title>(.*?)( – symtele)?</title>", page, re.S)[1]
    )
    found = [(name, name, "") for name in FOLDED.findall(page)]
    return [
        dict(
            objectID=f"{href}#{anchor}",
            href=f"{href}#{anchor}",
            title=title,
            section=name,
            text=unescape(re.sub("<[^>]*>", "", said)),
            crumbs=[title],
        )
        for anchor, name, said in [*ENTRY.findall(page), *found]
    ]


def finish(
    site: Path,  # Folder of the pages, changed in place
    packed: Path = Path(sys.prefix) / "js",  # Where npm's packages are
):
    "Let pages ask no other host, and let the search find names"
    search, found = site / "search.json", []
    for path in sorted(site.rglob("*.html")):
        page = path.read_text(encoding="utf-8")
        own = local(page)
        if own != page:
            unpack(packed, path.parent / WIDGETS)
        path.write_text(boxed(own), encoding="utf-8")
        found += names(own, path.relative_to(site).as_posix())
    if search.exists():
        known = json.loads(search.read_text(encoding="utf-8"))
        text = json.dumps(known + found, ensure_ascii=False, indent=2)
        search.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    finish(Path(os.environ["QUARTO_PROJECT_OUTPUT_DIR"]))
