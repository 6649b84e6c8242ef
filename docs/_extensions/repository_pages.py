"""Sphinx extension: pages of the repository on the site, and links that stay on it.

    ```{include} ../README.md
    :start-after: "## Sweeps"
    :end-before: "## When"
    :heading-offset: -1
    ```

puts a Markdown file, or a part of it, on a page. A link that leads to a file or a section which
stands on a page leads there. Links to other files of the repository are downloads, and those to
folders are left out. So every page reads well where it lies, too. Notebooks are copied next to
the pages.
"""

import os
import re
import shutil
from dataclasses import dataclass
from functools import cache
from pathlib import Path

DOCS = Path(__file__).parents[1]
REPOSITORY = DOCS.parent
INCLUDE = re.compile(r"(?m)^```\{include\} (\S+)\n((?::[\w-]+: .*\n)*)```$")
OPTION = re.compile(r"(?m)^:([\w-]+): (.*)$")
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\]\([^)]*\))*)\]\((?!https?:)([^)\s]+)\)")


@dataclass(frozen=True)
class Part:
    """A Markdown file of the repository, or what stands between two of its lines."""

    path: Path
    text: str
    is_whole: bool


def part_of(page: Path, match: re.Match[str]) -> Part:
    """What an `include` of the page stands for."""
    path = (page.parent / match[1]).resolve()
    options = {name: value.strip('"') for name, value in OPTION.findall(match[2])}
    text, whole = path.read_text(), not {"start-after", "end-before"} & set(options)
    if "start-after" in options:
        text = text[text.index(options["start-after"]) + len(options["start-after"]) :]
    if "end-before" in options:
        text = text[: text.index(options["end-before"])]
    offset = int(options.get("heading-offset", 0))

    def shifted(heading: re.Match[str]) -> str:
        return "#" * (len(heading[1]) + offset) + " "

    return Part(path, outside_code(lambda text: re.sub(r"(?m)^(#+) ", shifted, text), text), whole)


def outside_code(change, text: str) -> str:
    """`change` of what stands between fenced blocks."""
    result, end = [], 0
    for block in re.finditer(r"(?ms)^```.*?^```$", text):
        result += [change(text[end : block.start()]), block[0]]
        end = block.end()
    return "".join([*result, change(text[end:])])


def slug(heading: str) -> str:
    """The anchor that GitHub, and MyST, give a heading."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").strip().lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


def slugs(text: str) -> list[str]:
    headings: list[str] = []
    outside_code(lambda text: headings.extend(re.findall(r"(?m)^#+ (.+)$", text)) or "", text)
    return [slug(heading) for heading in headings]


@cache
def places() -> dict[tuple[Path, str], Path]:
    """{(file, anchor): page} of all that stands on a page; the anchor "" is the file itself."""
    result: dict[tuple[Path, str], Path] = {}
    for page in sorted(DOCS.rglob("*.md")):
        if "_build" in page.parts:
            continue
        result[page, ""] = page
        for match in INCLUDE.finditer(page.read_text()):
            part = part_of(page, match)
            result |= {(part.path, anchor): page for anchor in slugs(part.text)}
            if part.is_whole:
                result[part.path, ""] = page
    notebooks = REPOSITORY.glob("notebooks/*.ipynb")
    result |= {(path, ""): DOCS / "notebooks" / path.name for path in notebooks}
    return {(REPOSITORY / "README.md", ""): DOCS / "index.md"} | result


def relink(text: str, source: Path, page: Path) -> str:
    """The links of `text`, which stands in `source`, as they must be on the page."""

    def new(match: re.Match[str]) -> str:
        mark, label, link = match.groups()
        label = label if mark else LINK.sub(new, label)
        file, _, anchor = link.partition("#")
        path = (source.parent / file).resolve() if file else source
        place = places().get((path, anchor)) or places().get((path, ""))
        if place:
            known = (path, anchor) in places() or place == path
            end = f"#{anchor}" if anchor and known else ""
            return f"{mark}[{label}]({os.path.relpath(place, page.parent)}{end})"
        if path.is_dir() or not path.exists():
            return f"{mark}[{label}]({link})" if not path.exists() else label
        return f"{mark}[{label}]({os.path.relpath(path, page.parent)})"

    return outside_code(lambda text: LINK.sub(new, text), text)


def expand(app, docname: str, content: list[str]) -> None:
    page = DOCS / f"{docname}.md"
    if not page.exists():
        return

    def included(match: re.Match[str]) -> str:
        part = part_of(page, match)
        app.env.note_dependency(str(part.path))
        return relink(part.text, part.path, page)

    pieces, end = [], 0
    for match in INCLUDE.finditer(content[0]):
        pieces += [relink(content[0][end : match.start()], page, page), included(match)]
        end = match.end()
    content[0] = "".join([*pieces, relink(content[0][end:], page, page)])


def copy_notebooks() -> None:
    notebooks = sorted(REPOSITORY.glob("notebooks/*.ipynb"))
    for copy in DOCS.glob("notebooks/*.ipynb"):
        if copy.name not in {notebook.name for notebook in notebooks}:
            copy.unlink()  # of an earlier name
    for notebook in notebooks:
        copy = DOCS / "notebooks" / notebook.name
        if not copy.exists() or copy.read_bytes() != notebook.read_bytes():
            shutil.copy(notebook, copy)


def setup(app):
    copy_notebooks()
    app.connect("source-read", expand)
    return {"parallel_read_safe": True}
