"""What HTML pages are made with: a template filled in, JSON in words, images within.

A page is one file: it needs no server, no script and no other file.
"""

import base64
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from PIL import Image

STYLE = Path(__file__).with_name("page.css")


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
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


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
    fields: dict[str, Any] = {}
    for name, value in document.items():
        nested = isinstance(value, dict)
        fields |= flat(value, f"{prefix}{name}.") if nested else {prefix + name: value}
    return fields


def words(value: Any) -> str:
    """JSON on one line, without its punctuation where nothing is lost by it."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {words(item)}" for name, item in value.items())
    if isinstance(value, list):
        return json.dumps(value, ensure_ascii=False)
    if value is None or isinstance(value, bool):
        return {None: "–", True: "yes", False: "no"}[value]
    return str(value)
