"""Every public function of lib has a property test.

Each `tests/test_properties_*.py` lists what it covers in a literal `COVERS = {module: (names,)}`. A
new function fails here until a property test names it; a new module, until it is covered too.
"""

import ast
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
# Modules of lib whose property tests are still to come.
PENDING = {
    "augment", "classification", "convolution", "cutmix", "datasets", "exact_means",
    "flow_matching", "flow_sampling", "gd", "gd_images", "gmm", "gmm_covariances", "gmm_em",
    "gmm_factors", "gmm_rows", "gmm_starts", "meshes", "networks", "row_files", "row_formats",
    "rows", "streamed_means", "velocity", "visits", "warps",
}  # fmt: skip
# Files, figures, processes and command lines: their tests are of faults, not of numbers.
OUTSIDE = {
    "__init__", "commands", "hosts", "image_folders", "pages", "plotting", "results_page",
    "run_locks", "runs", "settings", "sweeps",
}  # fmt: skip


def parse(path):
    return ast.parse(path.read_text())


def public_names(path):
    """Functions and classes of a module; not records and errors, which do nothing by themselves."""
    names = set()
    for node in parse(path).body:
        bases = [ast.unparse(base) for base in getattr(node, "bases", ())]
        record = any(base == "NamedTuple" or base.endswith("Error") for base in bases)
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not record:
            names.add(node.name)
    return {name for name in names if not name.startswith("_")}


def listed():
    """{test file: {module: names}}, of the literal COVERS of every file of property tests."""
    lists = {}
    for path in sorted(Path(__file__).parent.glob("test_properties_*.py")):
        for node in parse(path).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "COVERS":
                lists[path] = ast.literal_eval(node.value)
    return lists


LISTED = listed()
COVERED = {}
for lists in LISTED.values():
    for module, names in lists.items():
        COVERED.setdefault(module, set()).update(names)


@pytest.mark.parametrize("module", sorted(COVERED))
def test_covered_modules_are_covered_whole(module):
    assert COVERED[module] == public_names(REPOSITORY / f"{module.replace('.', '/')}.py")


def test_every_module_is_covered_pending_or_outside():
    modules = {path.stem for path in (REPOSITORY / "lib").glob("*.py")}
    covered = {module.removeprefix("lib.") for module in COVERED if module.startswith("lib.")}
    assert not PENDING & covered, "no longer pending"
    assert modules == covered | PENDING | OUTSIDE


@pytest.mark.parametrize("path", LISTED, ids=lambda path: path.stem)
def test_what_a_file_lists_it_uses(path):
    used = set()
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Name):
            used.add(node.id)
        elif isinstance(node, ast.Attribute):
            used.add(node.attr)
    assert set().union(*LISTED[path].values()) <= used
