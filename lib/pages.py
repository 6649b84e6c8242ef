"""HTML pages: one of everything in a results folder, and what every page here is made with.

    python -m lib.pages results        writes results/index.html

A page is one file with its images inside: it needs no server, no script and no other file. The one
of a results folder shows what lies there, whoever wrote it:

    EXPERIMENT/NAME.json              a summary, shown as the tables of NAME.md, else of its "rows"
    EXPERIMENT/NAME*.png, *.gif       its figures, also in EXPERIMENT/figures/
    EXPERIMENT/RUN/seed<k>/           a run of `lib.runs`, with summaries and figures of its own

What is damaged is named on the page and is no error; nothing but the page is written. Title and
first sentence of an experiment are those of its README, where it is a folder beside `lib`.
"""

import argparse
import base64
import contextlib
import datetime
import io
import json
import math
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import jinja2
import numpy as np
from markupsafe import Markup
from PIL import Image

from lib import runs

TEMPLATE = Path(__file__).with_name("results_page.html.j2")
STYLE = Path(__file__).with_name("page.css")
LARGEST_PNG = 2**20
"""Bytes of a figure; larger ones are halved until they fit."""
LARGEST_GIF = 6 * 2**20
"""Bytes of an animation; larger ones are linked to."""
PIXEL = {"PNG": 0.5, "GIF": 1.0}
"""Of a figure's pixels on the page: those of `lib.plotting` have 160 an inch, animations 90."""
ENVIRONMENT = {
    "commit": "{commit:.10}",
    "uncommitted changes": "{dirty}",
    "device": "{device[count]} × {device[kind]}",
    "processor": "{cpu[model]}, {cpu[cores]} cores",
    "Python": "{python}",
    "packages": "{versions}",
    "system": "{system}",
}
SETTINGS = ("environment", "config", "arguments", "settings", "group", "preset", "seed", "seeds")
"""What is no result in a summary."""
_BAD_IMAGE = (
    OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error,
    Image.DecompressionBombError,
)  # fmt: skip
_BAD_ARRAYS = (
    OSError, ValueError, TypeError, KeyError, IndexError, EOFError, zipfile.BadZipFile, zlib.error
)  # fmt: skip
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


def write_page(results: str | os.PathLike) -> Path:
    """Writes `results/index.html`, whole or not at all, and returns its path. Raises OSError where
    the folder cannot be read or written."""
    results = Path(results)
    results.mkdir(parents=True, exist_ok=True)
    page = results / "index.html"
    # What is no UTF-8, in names of files or in JSON, shows as question marks.
    runs.write_bytes(page, render(TEMPLATE, _Reader(results).contents()).encode(errors="replace"))
    return page


class _Reader:
    """What the template is filled with. Experiments share the numbers of their environments."""

    def __init__(self, results: Path):
        self.results = results
        self.environments: dict[tuple[str, ...], int] = {}
        self.problems: list[str] = []
        """Of the experiment at hand: files that cannot be read, and why."""

    def contents(self) -> dict[str, Any]:
        folders = [path for path in _files(self.results, "*") if path.is_dir()]
        experiments = [self.experiment(folder) for folder in folders]
        return {
            "results": self.results.resolve().as_posix(),
            "written": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
            "experiments": [
                one for one in experiments if one["sections"] or one["runs"] or one["problems"]
            ],
            "environments": Table(
                ["", *ENVIRONMENT],
                [[str(number), *row] for row, number in self.environments.items()],
            ),
            "size": size_of(self.results),
        }

    def experiment(self, folder: Path) -> dict[str, Any]:
        self.problems = []
        sections = self.sections(folder)
        found = []
        for path in _files(folder, "*/seed*"):
            if path.is_dir():
                found.append(self.run(path))
                sections += self.sections(path, f"{path.parent.name}, {path.name}")
        spans = [run["span"] for run in found if run["span"]]
        return {
            "name": folder.name,
            "title": folder.name,
            "sentence": "",
            **_readme(folder.name),
            "problems": self.problems,
            "sections": sections,
            "num_figures": sum(len(section["figures"]) for section in sections),
            "runs": found,
            "unfinished": [run for run in found if not run["finished"]],
            "time": duration(covered(spans)) if spans else "–",
            "size": size_of(folder),
        }

    def sections(self, folder: Path, run: str = "") -> list[dict[str, Any]]:
        """A folder's summaries, each with the figures whose names begin with its own; the others.

        In a run's folder with one summary all figures are that one's.
        """
        found = {}
        for path in _files(folder, "*.json"):
            if path.name not in ("config.json", "env.json"):
                title = f"{run}: {path.stem}" if run else path.stem
                found[path.stem] = {"title": title, "figures": [], **self.summary(path)}
        others = next(iter(found)) if run and len(found) == 1 else ""
        for path in _files(folder, "*.png", "*.gif", "figures/*.png", "figures/*.gif"):
            stem = max(
                (stem for stem in found if path.stem.startswith(stem)), key=len, default=others
            )
            title = f"{run}: figures" if run else "Other figures"
            if figure := self.figure(path):
                empty = {"title": title, "figures": [], "source": None, "blocks": []}
                found.setdefault(stem, empty)["figures"].append(figure)
        return list(found.values())

    def summary(self, path: Path) -> dict[str, Any]:
        document = self.json(path)
        env = document.get("environment")
        try:
            tables = path.with_suffix(".md").read_text(encoding="utf-8")
            blocks = markdown_blocks(tables)
        except FileNotFoundError:
            blocks = summary_blocks(document)
        except (OSError, ValueError) as error:
            self.unreadable(path.with_suffix(".md"), error)
            blocks = summary_blocks(document)
        return {
            "source": self.name(path),
            "link": self.link(path),
            "blocks": blocks,
            **self.made(env),
        }

    def made(self, env: Any) -> dict[str, Any]:
        """When, by what command, in which environment, of an env.json or a summary's."""
        env = env if isinstance(env, dict) else {}
        number = None
        if env:
            words = tuple(_filled(form, env) for form in ENVIRONMENT.values())
            number = self.environments.setdefault(words, len(self.environments) + 1)
        return {
            "environment": number,
            "command": _words(env.get("command", "")),
            "time": _words(env.get("time", "")).partition("+")[0].replace("T", " "),
        }

    def run(self, folder: Path) -> dict[str, Any]:
        run = runs.Run(folder)
        config, env = self.json(folder / "config.json"), self.json(folder / "env.json")
        span = _span(run, env)
        return {
            "name": folder.parent.name,
            "seed": folder.name.removeprefix("seed"),
            "finished": run.finished,
            "steps": self.steps(run),
            "span": span,
            "duration": duration(span[1] - span[0]) if span else "–",
            "config": "\n".join(f"{name}: {_words(value)}" for name, value in flat(config).items()),
            **self.made(env),
        }

    def steps(self, run: runs.Run) -> str:
        """Steps done: the last one recorded, or the checkpoint's."""
        path, name = (run.arrays, "steps") if run.finished else (run.checkpoint, "step")
        try:
            # Opened here, since numpy does not close what it cannot read. Reads that array alone.
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as stored:
                if name in stored.files:
                    return f"{int(np.ravel(stored[name])[-1]):,}"
        except FileNotFoundError:
            pass
        except _BAD_ARRAYS as error:
            self.unreadable(path, error)
        return "–"

    def figure(self, path: Path) -> dict[str, Any] | None:
        """What an image tag needs; no `source` where the file is to be linked to."""
        try:
            content = path.read_bytes()
            with Image.open(io.BytesIO(content)) as image:
                form, (width, height) = image.format, image.size
                image.verify()
            if form not in PIXEL:
                raise ValueError(f"a file of {form}")
            note = ""
            if form == "GIF" and len(content) > LARGEST_GIF:
                note = f"{in_bytes(len(content))}, not in the page"
            elif form == "PNG" and len(content) > LARGEST_PNG:
                note = f"smaller than the file, of {in_bytes(len(content))}"
                content = smaller(content, LARGEST_PNG)
        except _BAD_IMAGE as error:
            self.unreadable(path, error)
            return None
        linked = form == "GIF" and bool(note)
        return {
            "source": None if linked else data_uri(content, form),
            "name": path.name,
            "link": self.link(path),
            "width": round(PIXEL[form] * width),
            "height": round(PIXEL[form] * height),
            "note": note,
        }

    def json(self, path: Path) -> dict[str, Any]:
        """The object in a file; an empty one where there is none or it cannot be read."""
        try:
            found = json.loads(path.read_bytes())
            if not isinstance(found, dict):
                raise ValueError("it holds no JSON object")
            flat(found)  # or it nests deeper than can be shown
            return found
        except FileNotFoundError:
            pass
        except (OSError, ValueError, RecursionError) as error:
            self.unreadable(path, error)
        return {}

    def unreadable(self, path: Path, error: Exception) -> None:
        self.problems.append(f"{self.name(path)}: {' '.join(str(error).split())[:200]}")

    def name(self, path: Path) -> str:
        return path.relative_to(self.results).as_posix()

    def link(self, path: Path) -> str:
        return quote(os.fsencode(self.name(path)))


def _files(folder: Path, *patterns: str) -> list[Path]:
    """What matches and is not hidden, seed2 before seed10."""
    found = (path for pattern in patterns for path in folder.glob(pattern))
    return sorted((path for path in found if not path.name.startswith(".")), key=_natural)


def _natural(path: Path) -> list[tuple[int, str]]:
    parts = re.split(r"([0-9]+)", str(path))
    return [(int(part), "") if i % 2 else (0, part) for i, part in enumerate(parts)]


def _readme(experiment: str) -> dict[str, str]:
    """Title and first sentence."""
    path = Path(__file__).parents[1] / experiment / "README.md"
    if not path.is_file():
        return {}
    title, text = path.read_text(encoding="utf-8").split("\n\n")[:2]
    text = re.sub(r"[*`]", "", " ".join(text.split()))
    return {"title": title.strip("# \n"), "sentence": re.split(r"(?<=[.?!]) ", text)[0]}


def _span(run: runs.Run, env: dict[str, Any]) -> tuple[float, float] | None:
    """Begin and end of a finished run, in seconds since 1970."""
    try:
        began = datetime.datetime.fromisoformat(env["time"]).timestamp()
        ended = run.arrays.stat().st_mtime
    except (KeyError, TypeError, ValueError, OverflowError, OSError):
        return None
    # Times are stored to the second. A file older than its run is a copy without times.
    return (began, max(began, ended)) if ended > began - 1 else None


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of intervals: a run can go on within another."""
    total, end = 0.0, -math.inf
    for low, high in sorted(spans):
        total += max(0.0, high - max(low, end))
        end = max(end, high)
    return total


# Words and tables


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


def size_of(folder: Path) -> str:
    """Of all files in the folder."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # removed meanwhile
            total += path.lstat().st_size
    return in_bytes(total)


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
    found = {}
    for name, value in document.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


def _filled(form: str, env: dict[str, Any]) -> str:
    """A line of `ENVIRONMENT`; a dash where a file does not have what it asks for."""
    plain = {name: _words(value) for name, value in env.items()}
    try:
        return form.format(**plain | {name: env.get(name) for name in ("commit", "device", "cpu")})
    except (KeyError, TypeError, ValueError):
        return "–"


def _words(value: Any) -> str:
    """JSON on one line, without its punctuation where nothing is lost by it."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {_words(item)}" for name, item in value.items())
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
    return f"{name}, mean ± std over {count} {'seeds' if ours else 'values'}"


def _cell(value: Any) -> str:
    """Four digits; the mean ± sample standard deviation of a list; the shape of what is nested."""
    if isinstance(value, bool | str | dict) or value is None:
        return _words(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if numbers := _floats(value):
        if len(numbers) == 1:
            return f"{numbers[0]:.4g}"
        with np.errstate(all="ignore"):  # infinities are shown as such
            return f"{np.mean(numbers):.4g} ± {np.std(numbers, ddof=1):.2g}"
    if value and isinstance(value[0], list | dict):
        shape = []
        while isinstance(value, list) and value:
            shape.append(len(value))
            value = value[0]
        return " × ".join(map(str, shape)) + " values"
    return ", ".join(map(_words, value))


def main() -> None:
    parser = argparse.ArgumentParser(prog="lib.pages", description=write_page.__doc__)
    parser.add_argument("results", nargs="?", default="results", help="the folder of results")
    with runs.one_line_errors():
        print(f"page:    {write_page(parser.parse_args().results)}")


if __name__ == "__main__":
    main()
