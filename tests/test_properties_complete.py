"""Every public function of lib has a property test.

Each `tests/test_properties_*.py` lists what it covers in a literal `COVERS = {module: (names,)}`. A
new function fails here until a property test names it; a new module, until it is covered too.
"""

import ast
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
# Files, figures, processes, devices and command lines: their tests are of faults, not of numbers.
OUTSIDE = {
    "__init__", "commands", "console", "datasets", "files", "hosts", "image_folders", "meshes",
    "pages", "plotting", "results_page", "run_locks", "runs", "sweeps", "visits",
}  # fmt: skip


# Reached through what is made of them: structures by their factories, draws by `sample`.
INDIRECT = {
    "Diagonal", "LowRank", "Spherical", "Prepared", "TrainState", "draw_by_component", "project",
}  # fmt: skip


def parse(path):
    return ast.parse(path.read_text())


def public_names(path):
    """(functions and classes of a module, records and errors, which do nothing by themselves)."""
    names, records = set(), set()
    for node in parse(path).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            bases = [ast.unparse(base) for base in getattr(node, "bases", ())]
            record = any(base == "NamedTuple" or base.endswith("Error") for base in bases)
            (records if record else names).add(node.name)
    return names, records


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
    names, records = public_names(REPOSITORY / f"{module.replace('.', '/')}.py")
    assert not names - COVERED[module], "have no property test"
    assert not COVERED[module] - names - records, "are listed, but not there"


def test_every_module_is_covered_or_outside():
    modules = {path.stem for path in (REPOSITORY / "lib").glob("*.py")}
    covered = {module.removeprefix("lib.") for module in COVERED if module.startswith("lib.")}
    assert modules == covered | OUTSIDE
    assert not covered & OUTSIDE


@pytest.mark.parametrize("path", LISTED, ids=lambda path: path.stem)
def test_what_a_file_lists_it_uses(path):
    """By name, by attribute, or, for what is looked up, as a string."""
    used = set()
    for statement in parse(path).body:
        if not isinstance(statement, ast.Assign) or ast.unparse(statement.targets[0]) != "COVERS":
            used |= names_in(statement)
    missing = set().union(*LISTED[path].values()) - used - INDIRECT
    assert not missing


def names_in(statement):
    used = set()
    for node in ast.walk(statement):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            used.add(node.value)
        elif isinstance(node, ast.Name):
            used.add(node.id)
        elif isinstance(node, ast.Attribute):
            used.add(node.attr)
    return used
