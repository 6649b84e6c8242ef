"""What is to be run first on a GPU runs, at tiny sizes, on the CPU."""

import json
import os
import subprocess
import zipfile
from io import BytesIO
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from scripts import REPOSITORY, benchmark

gpu = benchmark("gpu")


def images(path: Path) -> Path:
    """A zip of two classes of six images in both splits."""
    generator = np.random.default_rng(0)
    with zipfile.ZipFile(path, "w") as file:
        for name in (
            f"{split}/{c}/{i}.png" for split in ("train", "test") for c in "ab" for i in range(6)
        ):
            content = BytesIO()
            Image.fromarray(generator.integers(0, 255, (8, 8, 3), np.uint8)).save(content, "png")
            file.writestr(name, content.getvalue())
    return path


@pytest.mark.slow
def test_the_whole_script(tmp_path):
    command = ["bash", "benchmarks/gpu.sh", images(tmp_path / "a.zip"), "--rehearse"]
    quick = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    subprocess.run([*command, "--out", tmp_path], check=True, cwd=REPOSITORY, env=quick)
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert len(report["times"]) == len(gpu.timings(True))
    assert not report["failed"]
    assert set(gpu.checks(True)) < set(report["checks"])
    assert report["condensed"]["steps"] == 3
    assert "a.zip" in (tmp_path / "gpu.md").read_text()


@pytest.mark.parametrize(("wrong", "expected"), [(0.0, 0.0), (0.01, 0.01), (np.nan, np.inf)])
def test_a_difference_is_seen(wrong, expected):
    """In the second output, of a function that is off only in float32, as the device runs it."""

    def function(x):
        return x, x + (wrong if x.dtype == np.float32 else 0)

    check = gpu.Check(function, lambda _: (np.ones(3),))
    difference = gpu.difference(check, True, jax.devices()[0], "highest")
    assert difference == pytest.approx(expected, abs=1e-6)
