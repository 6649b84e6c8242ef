"""What HTML pages are made with: a template filled in, tables of Markdown and JSON, images within.

A page is one file: it needs no server, no script and no other file.
"""

import base64
import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
from markupsafe import Markup
from PIL import Image

from lib.report.spreads import mean_and_spread

STYLE = Path(__file__).with_name("page.css")
SETTINGS = ("environment", "config", "arguments", "settings", "group", "preset", "seed", "seeds")
"""What is no result in a summary."""
_NUMBER = re.compile(r"[-+−]?[\d.,]+(e[-+]?\d+)?(?!\w)|[-–]?$")


class Table(NamedTuple):
    """Cells as text; rows may be shorter or longer than the heads."""

    heads: list[str]
    rows: list[list[str]]

    @property
    def numeric(self) -> list[bool]:
        """For each column whether everything in it is a number, or blank."""
        width = max(map(len, [self.heads, *self.rows]))
        columns = ([row[i] for row in self.rows if i < len(row)] for i in range(width))
        return [all(_NUMBER.match(cell) for cell in column) for column in columns]


def render(template: Path, values: Mapping[str, Any]) -> str:
    """The template filled in, every value escaped; `style` in it is the pages' common CSS."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    filled = environment.from_string(template.read_text(encoding="utf-8"))
    return filled.render(values, style=Markup(STYLE.read_text(encoding="utf-8")))


def data_uri(content: bytes, form: str) -> str:
    """An image of a form such as "PNG", as an address that holds all of it."""
    return f"data:image/{form.lower()};base64,{base64.b64encode(content).decode()}"


def duration(seconds: float) -> str:
    """Such as 7 s, 2 min 5 s, 1 h 20 min."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    return f"{seconds // 3600:,} h {seconds // 60 % 60} min"


def in_bytes(count: int) -> str:
    """Such as 312 kB or 4.7 MB."""
    return f"{count / 1e3:,.0f} kB" if count < 1e6 else f"{count / 1e6:,.1f} MB"


def smaller(png: bytes, largest: int) -> bytes:
    """The image at a half, a quarter, ... of its sides, the first that has so many bytes."""
    with Image.open(io.BytesIO(png)) as image:
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    while len(png) > largest and min(image.size) > 1:
        image, stream = image.reduce(2), io.BytesIO()
        image.save(stream, "PNG", optimize=True)
        png = stream.getvalue()
    return png


def flat(document: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested objects as one, its names joined by dots."""
    found: dict[str, Any] = {}
    for name, value in document.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


def words(value: Any) -> str:
    """JSON on one line, without its punctuation where nothing is lost by it."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {words(item)}" for name, item in value.items())
    if isinstance(value, list):
        return json.dumps(value, ensure_ascii=False)
    if value is None or isinstance(value, bool):
        return {None: "–", True: "yes", False: "no"}[value]
    return str(value)


def markdown_blocks(text: str) -> list[str | Table]:
    """The paragraphs and tables of a document that has nothing else."""
    blocks: list[str | Table] = []
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        lines = [line.strip() for line in paragraph.splitlines()]
        if len(lines) > 1 and re.fullmatch(r"[|: -]+", lines[1]):
            heads, _, *rows = (
                [cell.strip() for cell in line.removeprefix("|").removesuffix("|").split("|")]
                for line in lines
            )
            blocks.append(Table(heads, rows))
        else:
            blocks.append(" ".join(lines))
    return blocks


def summary_blocks(document: dict[str, Any]) -> list[str | Table]:
    """Tables of a summary that brings none: its "rows", and what else there is beside settings."""
    blocks: list[str | Table] = []
    rows, seeds = document.get("rows"), document.get("seeds")
    rows = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    names = dict.fromkeys(name for row in rows for name in row if name not in SETTINGS)
    columns = {name: [row.get(name) for row in rows] for name in names}
    # Objects in rows are settings, which the runs show.
    columns = {
        name: values
        for name, values in columns.items()
        if not any(isinstance(value, dict) for value in values)
    }
    if columns:
        heads = [_head(name, values, seeds) for name, values in columns.items()]
        cells = [list(map(_cell, values)) for values in columns.values()]
        blocks.append(Table(heads, [list(row) for row in zip(*cells)]))
    rest = {
        name: value
        for name, value in document.items()
        if name not in SETTINGS and not (name == "rows" and columns)
    }
    if rest:
        named = [[_head(name, [value], seeds), _cell(value)] for name, value in flat(rest).items()]
        blocks.append(Table(["", "value"], named))
    return blocks


def _floats(value: Any) -> list[float]:
    """The numbers of a list that has nothing else."""
    found = []
    for item in value if isinstance(value, list) else []:
        number = isinstance(item, int | float) and not isinstance(item, bool)
        if not number and item not in ("NaN", "Infinity", "-Infinity"):
            return []
        try:
            found.append(float(item))
        except OverflowError:  # an integer of hundreds of digits
            return []
    return found


def _head(name: str, values: list[Any], seeds: Any) -> str:
    """A column's name, and what its cells are means of."""
    name = name.replace("_", " ")
    counts = {len(_floats(value)) for value in values} - {0}
    if not counts or max(counts) < 2:
        return name
    ours = isinstance(seeds, list) and counts == {len(seeds)}
    count = f"{min(counts)}" if len(counts) == 1 else f"{min(counts)} to {max(counts)}"
    return f"{name}, mean ± sample std over {count} {'seeds' if ours else 'values'}"


def _cell(value: Any) -> str:
    """Four digits; the mean ± sample standard deviation of a list; the shape of what is nested."""
    if isinstance(value, bool | str | dict) or value is None:
        return words(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if numbers := _floats(value):
        with np.errstate(all="ignore"):  # infinities are shown as such
            return mean_and_spread(numbers, ".4g", ".2g")
    if value and isinstance(value[0], list | dict):
        shape = []
        while isinstance(value, list) and value:
            shape.append(len(value))
            value = value[0]
        return " × ".join(map(str, shape)) + " values"
    return ", ".join(map(words, value))
