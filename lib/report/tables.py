"""Tables of text, and the summaries that hold them."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lib import runs
from lib.runs.files import write_json

_NUMBER = re.compile(r"[-+−]?[\d.,]+(e[-+]?\d+)?(?!\w)|[-–]?$")


class Table(NamedTuple):
    """Cells as text; rows may be shorter or longer than the heads. The caption is a sentence that
    says what the cells are."""

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""

    @property
    def numeric(self) -> list[bool]:
        """For each column whether everything in it is a number, or blank."""
        width = max(map(len, [self.heads, *self.rows]))
        columns = ([row[i] for row in self.rows if i < len(row)] for i in range(width))
        return [all(_NUMBER.match(cell) for cell in column) for column in columns]

    def markdown(self) -> str:
        """The table in Markdown, without its caption."""
        heads, *rows = ("| " + " | ".join(cells) + " |" for cells in (self.heads, *self.rows))
        return "\n".join([heads, "|" + "---|" * len(self.heads), *rows])


def write_summary(
    path: Path,
    document: Mapping[str, Any],
    tables: Iterable[Table] = (),
    *,
    figures: Callable[[Path], Iterable[Path]] = lambda path: (),
) -> Path:
    """Writes the document, the environment and the tables to `path` (JSON), from which the page of
    the results shows them; draws `figures(path)`, prints the tables and where everything lies.

    Returns `path`. Raises as `lib.runs.files.write_json`.
    """
    tables = list(tables)
    about = {"environment": runs.environment(), "tables": [t._asdict() for t in tables]}
    write_json(path, {**document, **about})
    for table in tables:
        print(f"\n{table.caption}\n\n{table.markdown()}\n".lstrip("\n"))
    print(f"numbers: {path}")
    for figure in figures(path):
        print(f"figure:  {figure}")
    return path
