"""Figures of the house: how much there is, and what a reader stumbles over, in each checkout.

    python benchmarks/house.py [FOLDER ...]            (default: this checkout)

One column a checkout, so that before and after stand side by side; below them, the names behind the
figures of the last one. Only the files are read. A use of a public name is its mention in code
outside the tests, or in a document's block of code; so a name that something else bears too passes.
"""

import ast
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

SAVE = "save_checkpoint"
"""A function that calls this drives a loop by itself: it saves the state, and resumes from it."""
MOST_LINES, MOST_PARAMETERS = 80, 10
Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, Function]]:
    """(dotted name, node) of all functions, also of those in classes and functions."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, Function | ast.ClassDef):
            if isinstance(node, Function):
                yield f"{prefix}{node.name}", node
            yield from functions(node, f"{prefix}{node.name}.")
        else:
            yield from functions(node, prefix)


def called(node: ast.AST) -> set[str]:
    """The last names of what is called in a function, not in the functions within it."""
    names, inside = set(), list(ast.iter_child_nodes(node))
    while inside:
        child = inside.pop()
        if isinstance(child, ast.Call):
            names.add(getattr(child.func, "attr", getattr(child.func, "id", "")))
        if not isinstance(child, Function):
            inside += ast.iter_child_nodes(child)
    return names


def num_parameters(function: Function) -> int:
    listed = function.args
    every = [*listed.posonlyargs, *listed.args, *listed.kwonlyargs]
    return len([parameter for parameter in every if parameter.arg not in ("self", "cls")])


def words_of_code(path: Path) -> list[str]:
    """Identifiers of a module, of a notebook's cells, or of a document's blocks; a package's
    `__init__` only hands names on."""
    text = path.read_text()
    if path.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        text = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
    elif path.suffix == ".md":
        text = "\n".join(re.findall(r"(?ms)^```.*?^```", text))
    elif path.name == "__init__.py":
        text = ""
    return re.findall(r"\w+", re.sub(r"(?m)^\s*(from|import) .*$", "", text))


def house(root: Path) -> dict[str, list[str] | int]:
    """{what is counted: the number, or the names that are counted} of the checkout at `root`."""
    lib, tests = sorted((root / "lib").rglob("*.py")), sorted((root / "tests").rglob("*.py"))
    experiments = sorted(root.glob("xp_*/**/*.py"))
    trees = {path: ast.parse(path.read_text()) for path in (*lib, *experiments)}
    others = [p for q in ("benchmarks/*.py", "*.md", "*/*.md", "**/*.ipynb") for p in root.glob(q)]
    words: dict[str, int] = {}
    for path in (*trees, *others):
        for word in words_of_code(path):
            words[word] = words.get(word, 0) + 1
    drivers, long, wide, public = [], [], [], []
    for path, tree in trees.items():
        module = path.relative_to(root).as_posix()
        for name, function in functions(tree):
            lines = function.end_lineno - function.lineno + 1
            if lines > MOST_LINES:
                long.append(f"{module}:{name} {lines}")
            if num_parameters(function) > MOST_PARAMETERS:
                wide.append(f"{module}:{name} {num_parameters(function)}")
            if path in lib and function.name != SAVE and SAVE in called(function):
                drivers.append(f"{module}:{name}")
        defined = [node for node in tree.body if isinstance(node, Function | ast.ClassDef)]
        if path in lib:
            public += [f"{module}:{d.name}" for d in defined if d.name[0] != "_"]
    modules = [p.stem for p in (root / "lib").iterdir() if p.suffix == ".py" or p.is_dir()]
    return {
        "names at the top of lib": sorted(name for name in modules if name[0] not in "_."),
        "drivers of the loop": drivers,
        "re-exports with noqa: F401": [
            path.relative_to(root).as_posix() for path in lib if "noqa: F401" in path.read_text()
        ],
        f"functions over {MOST_LINES} lines": long,
        f"functions over {MOST_PARAMETERS} parameters": wide,
        "public names of lib for tests only": [
            name for name in public if words.get(name.rpartition(":")[2], 0) < 2
        ],
        "lines of lib": sum(len(path.read_text().splitlines()) for path in lib),
        "lines of tests": sum(len(path.read_text().splitlines()) for path in tests),
    }


def main(roots: list[Path]) -> None:
    columns = [house(root) for root in roots]
    for what in columns[-1]:
        values = [column[what] for column in columns]
        numbers = [value if isinstance(value, int) else len(value) for value in values]
        print(f"{what:36}", *(f"{number:8,}" for number in numbers))
    for what, value in columns[-1].items():
        if not isinstance(value, int):
            print(f"\n{what}:", *value, sep="\n    ")


if __name__ == "__main__":
    main([Path(folder) for folder in sys.argv[1:]] or [Path(__file__).parents[1]])
