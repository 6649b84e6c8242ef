"""Scripts of this repository, as their users run them."""

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def run_script(*command, **environment) -> str:
    """What it prints, if it ends well."""
    command = [sys.executable, *map(str, command)]
    options = {"cwd": REPOSITORY, "env": {**os.environ, **environment}, "timeout": 600}
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout
