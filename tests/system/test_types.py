"""Checked without running it: types (mypy), style (ruff) and spelling (codespell), configured in
pyproject.toml."""

import subprocess
import sys

import pytest
from scripts import REPOSITORY

SOURCES = ["lib", "tests", "benchmarks", "docs", *sorted(REPOSITORY.glob("xp_*"))]


def output_of(*command) -> str:
    """What the tool says, if it finds anything; nothing else ends it with status 1."""
    done = subprocess.run(
        [sys.executable, "-m", *map(str, command)], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return done.stdout if done.returncode else ""


@pytest.mark.slow
def test_types_of_lib_and_experiments():
    assert output_of("mypy") == ""


def test_mypy_sees_shape_annotations_and_functions_without_any(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from lib.kernels import gaussian\n"
        "from lib.runs.settings import settings_of\n\n"
        'gaussian(2.0)(1.0, "y")\n\n\n'  # Kernel = Callable[[Float[Array, "n d"], ...], ...]
        "def without_annotations():\n"
        "    return settings_of(int)\n"
    )
    errors = output_of("mypy", script)
    assert "script.py:4: error: Argument 1 has incompatible type" in errors
    assert "script.py:8: error: Missing positional argument" in errors


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=" ".join)
def test_style(command):
    assert output_of("ruff", *command, *SOURCES) == ""


def test_spelling():
    files = subprocess.check_output(["git", "ls-files"], cwd=REPOSITORY, text=True).split()
    texts = [file for file in files if file.endswith((".md", ".py", ".sh", ".toml"))]
    command = [sys.executable, "-m", "codespell_lib", *texts]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.stdout + done.stderr == ""
