"""One HTML page of everything in a results folder.

    python -m lib.report.page results                             writes results/index.html
    python -m lib.report.page results --cards docs/cards.json     with summary cards at the top

It shows what lies there, whoever wrote it:

    EXPERIMENT/NAME.json              a summary, of which its "tables" are shown
    EXPERIMENT/NAME*.png, *.gif       its figures, also in EXPERIMENT/figures/
    EXPERIMENT/RUN/seed<k>/           a run of `lib.runs`, with summaries and figures of its own

What is damaged is named on the page and is no error; nothing but the page is written.
"""

import argparse
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
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from PIL import Image

from lib import runs
from lib.report import _html as html
from lib.report._html import words
from lib.report.tables import Table
from lib.runs import console
from lib.runs.files import make_folder, write_bytes

TEMPLATE = Path(__file__).with_name("page.html.j2")
LARGEST_PNG = 2**20
"""Bytes of a figure; larger ones are halved until they fit."""
LARGEST_GIF = 6 * 2**20
"""Bytes of an animation; larger ones are linked to."""
PIXEL = {"PNG": 0.5, "GIF": 1.0}
"""Of a figure's pixels on the page: `lib.report.plotting` draws 160 per inch, animations 90."""
ENVIRONMENT = {
    "commit": "{commit:.10}",
    "uncommitted changes": "{dirty}",
    "device": "{device[count]} × {device[kind]}",
    "processor": "{cpu[model]}, {cpu[cores]} cores",
    "Python": "{python}",
    "packages": "{versions}",
    "system": "{system}",
}
_DAMAGE = (
    OSError, ValueError, TypeError, KeyError, IndexError, EOFError, MemoryError, SyntaxError,
    struct.error, zlib.error, zipfile.BadZipFile, Image.DecompressionBombError,
)  # fmt: skip
"""What reading a damaged image or npz raises."""


def write_page(results: str | os.PathLike, cards: str | os.PathLike | None = None) -> Path:
    """Writes `results/index.html`, whole or not at all, and returns its path. Raises OSError where
    the folder cannot be read or written.

    `cards` is a JSON file: a list of objects with the strings experiment (a folder of the results),
    title, what, ours, published, and picture (a PNG's path from the file). Those of the experiments
    at hand stand at the top of the page. Raises ValueError where a string is missing.
    """
    cards, results = _cards(Path(cards)) if cards else {}, Path(results)
    make_folder(results)
    page = results / "index.html"
    # What is no UTF-8, in names of files or in JSON, shows as question marks.
    write_bytes(
        page,
        html.render(TEMPLATE, _Reader(results).contents() | {"cards": cards}).encode(
            errors="replace"
        ),
    )
    return page


def _cards(path: Path) -> dict[str, dict[str, str]]:
    """{experiment: card}, its picture as an address that holds all of it."""
    try:
        return {
            card["experiment"]: {
                name: card[name] for name in ("title", "what", "ours", "published")
            }
            | {"picture": html.data_uri((path.parent / card["picture"]).read_bytes(), "PNG")}
            for card in json.loads(path.read_bytes())
        }
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: not a list of cards with all their strings: {error!r}") from None


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
            "experiments": [e for e in experiments if e["sections"] or e["runs"] or e["problems"]],
            "environments": Table(
                ["", *ENVIRONMENT],
                [[str(number), *row] for row, number in self.environments.items()],
            ),
            "size": size_of(self.results),
        }

    def experiment(self, folder: Path) -> dict[str, Any]:
        self.problems = []
        sections = self.sections(folder)
        run_rows = []
        for path in _files(folder, "*/seed*"):
            if path.is_dir():
                run_rows.append(self.run(path))
                sections += self.sections(path, f"{path.parent.name}, {path.name}")
        spans = [run["span"] for run in run_rows if run["span"]]
        return {
            "name": folder.name,
            "problems": self.problems,
            "sections": sections,
            "num_figures": sum(len(section["figures"]) for section in sections),
            "runs": run_rows,
            "unfinished": [run for run in run_rows if not run["finished"]],
            "time": html.duration(covered(spans)) if spans else "–",
            "size": size_of(folder),
        }

    def sections(self, folder: Path, run: str = "") -> list[dict[str, Any]]:
        """A folder's summaries, each with the figures whose names begin with its own; the others.

        In a run's folder with one summary all figures are that one's.
        """
        sections = {}
        for path in _files(folder, "*.json"):
            if path.name not in ("config.json", "env.json"):
                document = self.json(path)
                sections[path.stem] = {
                    "title": f"{run}: {path.stem}" if run else path.stem,
                    "figures": [],
                    "source": self.name(path),
                    "link": self.link(path),
                    "tables": self.tables(path, document),
                    **self.made(document.get("environment")),
                }
        others = next(iter(sections)) if run and len(sections) == 1 else ""
        title = f"{run}: figures" if run else "Other figures"
        for path in _files(folder, "*.png", "*.gif", "figures/*.png", "figures/*.gif"):
            stems = (stem for stem in sections if path.stem.startswith(stem))
            stem = max(stems, key=len, default=others)
            if figure := self.figure(path):
                bare: dict[str, Any] = {"title": title, "figures": [], "source": None, "tables": []}
                sections.setdefault(stem, bare)["figures"].append(figure)
        return list(sections.values())

    def tables(self, path: Path, document: dict[str, Any]) -> list[Table]:
        """Those that `write_summary` put there; what else has this name is a problem."""
        try:
            return [
                Table(
                    [str(head) for head in table["heads"]],
                    [[str(cell) for cell in row] for row in table["rows"]],
                    str(table["caption"]),
                )
                for table in document.get("tables", [])
            ]
        except (TypeError, KeyError) as error:
            self.unreadable(path, ValueError(f"its tables are damaged: {error!r}"))
            return []

    def made(self, env: Any) -> dict[str, Any]:
        """When, by what command, in which environment, of an env.json or a summary's."""
        env, number = env if isinstance(env, dict) else {}, None
        if env:
            row = tuple(_filled(form, env) for form in ENVIRONMENT.values())
            number = self.environments.setdefault(row, len(self.environments) + 1)
        return {
            "environment": number,
            "command": words(env.get("command", "")),
            "time": words(env.get("time", "")).partition("+")[0].replace("T", " "),
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
            "duration": html.duration(span[1] - span[0]) if span else "–",
            "config": "\n".join(f"{k}: {words(v)}" for k, v in html.flat(config).items()),
            **self.made(env),
        }

    def steps(self, run: runs.Run) -> str:
        """Steps done: the last one recorded, or the checkpoint's."""
        path, name = (run.arrays, "steps") if run.finished else (run.checkpoint, "step")
        try:
            # Opened here, since numpy does not close what it cannot read. Reads only that array.
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as stored:
                if name in stored.files:
                    return f"{int(np.ravel(stored[name])[-1]):,}"
        except FileNotFoundError:
            pass
        except _DAMAGE as error:
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
            size, linked, note = html.in_bytes(len(content)), False, ""
            if form == "GIF" and len(content) > LARGEST_GIF:
                linked, note = True, f"{size}, not in the page"
            elif form == "PNG" and len(content) > LARGEST_PNG:
                note = f"smaller than the file, of {size}"
                content = html.smaller(content, LARGEST_PNG)
        except _DAMAGE as error:
            self.unreadable(path, error)
            return None
        return {
            "source": None if linked else html.data_uri(content, form),
            "name": path.name,
            "link": self.link(path),
            "width": round(PIXEL[form] * width),
            "height": round(PIXEL[form] * height),
            "note": note,
        }

    def json(self, path: Path) -> dict[str, Any]:
        """The object in a file; an empty one where there is none or it cannot be read."""
        try:
            document = json.loads(path.read_bytes())
            if not isinstance(document, dict):
                raise ValueError("it holds no JSON object")
            html.flat(document)  # or it nests deeper than can be shown
            return document
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
    paths = (path for pattern in patterns for path in folder.glob(pattern))
    return sorted((path for path in paths if not path.name.startswith(".")), key=_natural)


def _natural(path: Path) -> list[int | str]:
    parts = re.split(r"([0-9]+)", str(path))  # text and digits by turns
    return [int(part) if i % 2 else part for i, part in enumerate(parts)]


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


def size_of(folder: Path) -> str:
    """Of all files in the folder."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # removed meanwhile
            total += path.lstat().st_size
    return html.in_bytes(total)


def _filled(form: str, env: dict[str, Any]) -> str:
    """A line of `ENVIRONMENT`; a dash where a file does not have what it asks for."""
    plain = {name: words(value) for name, value in env.items()}
    try:
        return form.format(**plain | {name: env.get(name) for name in ("commit", "device", "cpu")})
    except (KeyError, TypeError, ValueError):
        return "–"


def main() -> None:
    parser = argparse.ArgumentParser(prog="lib.report.page", description=write_page.__doc__)
    parser.add_argument("results", nargs="?", default="results", help="the folder of results")
    parser.add_argument("--cards", help="a JSON file of summary cards")
    arguments = parser.parse_args()
    with console.one_line_errors():
        print(f"page:    {write_page(arguments.results, arguments.cards)}")


if __name__ == "__main__":
    main()
