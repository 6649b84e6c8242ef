"""Runs notebooks and keeps what they show in them: python docs/notebooks.py [NAME ...]

Figures are stored with fewer colors and at most `PIXELS` in all, so that a notebook stays small.
Results that lie in a results folder are not shown, only committed ones.
"""

import base64
import io
import math
import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
PIXELS, COLORS = 400_000, 32


def smaller(png: str) -> str:
    """A figure in base64, as it is stored."""
    with Image.open(io.BytesIO(base64.b64decode(png))) as image:
        image = image.convert("RGB")
    scale = min(1, math.sqrt(PIXELS / (image.width * image.height)))
    image = image.resize([round(scale * side) for side in image.size], Image.Resampling.LANCZOS)
    image.quantize(COLORS).save(stream := io.BytesIO(), "PNG", optimize=True)
    return base64.b64encode(stream.getvalue()).decode()


def run(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=600, kernel_name="python3").execute(cwd=path.parent)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times
        for output in cell.get("outputs", ()):
            figure = output.get("data", {})
            if "image/png" in figure:
                figure["image/png"] = smaller(figure["image/png"])
    notebook.metadata["language_info"] = {"name": "python"}
    nbformat.write(notebook, path)
    print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB", flush=True)


def main(names: list[str]) -> None:
    with tempfile.TemporaryDirectory() as empty:
        os.environ["RESULTS"] = empty
        for name in names or sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb")):
            run(NOTEBOOKS / f"{name}.ipynb")


if __name__ == "__main__":
    main(sys.argv[1:])
