"""What `bash run.sh setup` installs: read off the pip commands that it would run."""

import http.server
import os
import shutil
import subprocess
import sys
import threading

import pytest
from scripts import REPOSITORY

PYTHON = f"""#!/usr/bin/env bash
case "$*" in
  "-m pip install"*) echo "${{@:4}}" >>pip.txt; [[ -z "${{FAIL:-}}" ]] ;;
  "-m pip freeze") cat freeze.txt ;;
  "-m pip"*) ;;
  *) exec {sys.executable} "$@" ;;
esac
"""


@pytest.fixture
def setup(tmp_path):
    """Runs the set-up in a copy where pip only notes what it is asked for; (output, its calls)."""
    for path in (
        REPOSITORY / "run.sh",
        REPOSITORY / "pyproject.toml",
        *REPOSITORY.glob("requirements*.txt"),
    ):
        shutil.copy(path, tmp_path)
    shutil.copytree(REPOSITORY / "constraints", tmp_path / "constraints")
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/python").write_text(PYTHON)
    (tmp_path / ".venv/bin/python").chmod(0o755)
    (tmp_path / "freeze.txt").touch()

    def run(check=True, **environment):
        (tmp_path / "pip.txt").write_text("")
        environment = {**os.environ, "TORCH_INDEX": "http://127.0.0.1:9/none", **environment}
        done = subprocess.run(
            ["bash", "run.sh", "setup"], cwd=tmp_path, env=environment, text=True,
            capture_output=True, check=check,
        )  # fmt: skip
        return done.stdout + done.stderr, (tmp_path / "pip.txt").read_text().splitlines()

    return run


@pytest.fixture
def index():
    """An index of packages on loopback."""
    handler = http.server.BaseHTTPRequestHandler
    handler.do_GET = lambda self: (self.send_response(200), self.end_headers())
    server = http.server.HTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_without_a_gpu_torch_comes_from_its_own_index(setup, index):
    _, (torch, rest, own) = setup(ACCELERATOR="cpu", TORCH_INDEX=index)
    assert "torch==" in torch
    assert "torchvision==" in torch
    assert f"--index-url {index}" in torch
    assert rest.endswith("-r requirements.txt")
    assert own.endswith("--editable .")


def test_where_that_index_cannot_be_reached_a_line_says_what_it_costs(setup):
    said, calls = setup(ACCELERATOR="cpu")
    assert "cannot be reached" in said
    assert "3.4 GB" in said
    assert not any("--index-url" in call for call in calls)


@pytest.mark.parametrize(("kind", "from_index"), [("cuda12", True), ("cuda13", False)])
def test_one_family_of_cuda(setup, index, kind, from_index):
    _, calls = setup(ACCELERATOR=kind, TORCH_INDEX=index)
    assert any("--index-url" in call for call in calls) == from_index
    assert any(f"-r requirements-{kind}.txt" in call for call in calls)


def test_what_it_was_made_for_stays_until_another_is_asked_for(setup):
    setup(ACCELERATOR="cuda13")
    assert setup()[1] == []
    assert any("requirements-cuda12" in call for call in setup(ACCELERATOR="cuda12")[1])


def test_tested_versions_unless_the_latest_are_asked_for(setup):
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    assert any(f"constraints/python{version}.txt" in call for call in setup()[1])
    assert not any("constraints/" in call for call in setup(LATEST="1")[1])


def test_a_failure_of_pip_is_one_line_and_tried_again(setup):
    said, _ = setup(check=False, FAIL="1")
    assert "pip failed" in said
    assert "Traceback" not in said
    assert setup()[1]


def test_an_unknown_accelerator_is_refused(setup):
    said, calls = setup(check=False, ACCELERATOR="tpu")
    assert "cpu, cuda12 or cuda13, not tpu" in said
    assert calls == []
