"""Names the public functions of lib of which the tests have run no line, and fails if any.

It reads what `pytest --cov=lib` has left in .coverage. Protocols have nothing to run.
"""

import ast
import sys
from pathlib import Path

from coverage import CoverageData


def public_functions(nodes, prefix=""):
    """(dotted name, lines of the body without its docstring) of functions and methods."""
    for node in nodes:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            if not any("Protocol" in ast.unparse(base) for base in node.bases):
                yield from public_functions(node.body, f"{prefix}{node.name}.")
        elif isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            if body:
                yield prefix + node.name, range(body[0].lineno, node.end_lineno + 1)


data = CoverageData()
data.read()
missing = [
    f"{path}: {name}"
    for path in sorted(Path("lib").rglob("*.py"))
    for name, lines in public_functions(ast.parse(path.read_text()).body)
    if not {*lines} & {*(data.lines(str(path.resolve())) or ())}
]
sys.exit("public functions that no test runs:\n" + "\n".join(missing) if missing else 0)
