"""Scripts of this repository, as their users run them, and what of it is not installed."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


def run_script(*command, **environment) -> str:
    """What it prints, if it ends well."""
    command = [sys.executable, *map(str, command)]
    options = {"cwd": REPOSITORY, "env": {**os.environ, **environment}, "timeout": 1800}
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def benchmark(name):
    """The module benchmarks/`name`.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(REPOSITORY / "benchmarks")
        return importlib.import_module(name)
