"""Dependencies point one way: lib knows no experiment, and few modules touch files or torch."""

import ast
import re
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
LIB = sorted((REPOSITORY / "lib").glob("*.py"))
EXPERIMENTS = sorted(REPOSITORY.glob("xp_*/*.py"))
INPUT_OUTPUT = {
    "files", "runs", "run_locks", "console", "sweeps", "datasets", "image_folders", "row_files",
    "row_formats", "plotting", "pages", "results_page", "hosts",
}  # fmt: skip


def imports(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return names


@pytest.mark.parametrize("path", LIB, ids=lambda path: path.stem)
def test_lib_imports_no_experiment_and_torch_only_where_files_are_read(path):
    tops = {name.split(".")[0] for name in imports(path)}
    assert not {top for top in tops if top.startswith("xp_")}
    assert path.stem in {"datasets", "row_formats"} or not tops & {"torch", "torchvision"}
    assert path.stem in {"plotting"} or "matplotlib" not in tops
    assert path.stem == "sweeps" or "submitit" not in tops
    assert path.stem == "simplex_qp" or not tops & {"jaxopt", "cvxpy"}
    assert path.stem in INPUT_OUTPUT | {"gd"} or not tops & {"pathlib", "os", "io", "shutil"}


def test_numerics_stand_below_the_flow_engine():
    below = {"sorting", "kernels", "sliced_wasserstein", "rff", "wow", "mmd"}
    below |= {"active_set", "entropic", "mixing_problem", "simplex_qp"}
    below |= {"rows", "streamed_means", "exact_means"}
    below |= {"gmm", "gmm_covariances", "gmm_factors", "gmm_rows"}
    above = {f"lib.{name}" for name in ("gd", *INPUT_OUTPUT)}
    for path in LIB:
        if path.stem in below:
            assert not imports(path) & above, path.stem


def test_commands_take_devices():
    """What `run_command` parses extends `DeviceOptions`."""
    commands = [path for path in EXPERIMENTS if "lib.commands.run_command" in imports(path)]
    assert len({path.parent for path in commands}) == 5
    assert not [path for path in commands if "lib.hosts.DeviceOptions" not in imports(path)]


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: f"{path.parent.name}.{path.stem}")
def test_no_experiment_imports_another(path):
    others = {name.split(".")[0] for name in imports(path) if name.startswith("xp_")}
    assert others <= {path.parent.name}
    assert "sys.path" not in path.read_text()


# Where the distribution has another name than its module.
DISTRIBUTIONS = {"sklearn": "scikit-learn", "PIL": "pillow", "ot": "pot", "ott": "ott-jax"}


def test_what_lib_and_experiments_import_is_installed_for_users():
    """requirements.txt alone: what only tests need is in requirements-dev.txt."""
    lines = (REPOSITORY / "requirements.txt").read_text().splitlines()
    wanted = {re.match(r"[\w-]*", line)[0].lower() for line in lines} - {""}
    own = {"lib", *(path.name for path in REPOSITORY.glob("xp_*"))}
    found = {name.split(".")[0] for path in (*LIB, *EXPERIMENTS) for name in imports(path)}
    found -= own | set(sys.stdlib_module_names)
    # ml_dtypes and markupsafe come with jax and jinja2.
    missing = {DISTRIBUTIONS.get(name, name) for name in found} - wanted
    assert missing <= {"ml_dtypes", "markupsafe"}
