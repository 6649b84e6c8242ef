"""Which statements of lib the tests run: a tracer would cost a third of their time, this nothing.

    COUNT_LINES=1 pytest; python tests/helpers/lines.py

With COUNT_LINES set, `tests/conftest.py` has `count_lines` put before each simple statement of lib,
as it is imported, one that notes its line; processes write what they have noted to `NOTED`. As a
script it names the public functions of which no statement ran, and fails if there are any, or if
less than 97% of all statements ran. Processes that tests start do not count, nor do the files
of `ELSEWHERE`, which run in such processes.
"""

import ast
import builtins
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
NOTED = ROOT / ".pytest_cache/lines"
LEAST = 0.97
ELSEWHERE = {"devices.py", "runs/processes.py", "runs/_workers.py"}
"""Files of lib that tests run in processes of their own, with several devices or hosts."""


def statements(tree: ast.AST) -> Iterator[ast.stmt]:
    """Simple ones, those that hold no others; docstrings and `...` are none."""
    for node in ast.walk(tree):
        constant = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        holds = hasattr(node, "body") or hasattr(node, "cases")
        if isinstance(node, ast.stmt) and not constant and not holds:
            yield node


def counting(source: bytes, name: str) -> bytes:
    """The same lines, with `name.add(line)` before each statement."""
    lines = source.splitlines(keepends=True)
    for node in sorted(statements(ast.parse(source)), key=lambda n: (n.lineno, -n.col_offset)):
        line, start = lines[node.lineno - 1], node.col_offset
        lines[node.lineno - 1] = b"%s%s.add(%d); %s" % (
            line[:start], name.encode(), node.lineno, line[start:],
        )  # fmt: skip
    return b"".join(lines)


def count_lines(finder) -> None:
    """Counts in all modules that `finder`, an import hook, loads from now on."""
    find_spec, noted = finder.find_spec, {}

    def find_and_count(*arguments, **options):
        spec = find_spec(*arguments, **options)
        if spec is not None and spec.origin:
            loader, name = spec.loader, f"_lines_{len(noted)}"
            to_code = loader.source_to_code
            noted[spec.origin] = set()
            setattr(builtins, name, noted[spec.origin])
            loader.source_to_code = lambda data, *rest, **more: to_code(
                counting(data, name), *rest, **more
            )
            loader.path_stats = no_compiled_file
        return spec

    finder.find_spec = find_and_count
    count_lines.noted = noted


def no_compiled_file(path):
    raise OSError


def write_lines() -> None:
    NOTED.mkdir(parents=True, exist_ok=True)
    content = {path: sorted(lines) for path, lines in count_lines.noted.items()}
    (NOTED / f"{os.getpid()}.json").write_text(json.dumps(content))


def public_functions(nodes, prefix=""):
    """(dotted name, node) of functions and methods; protocols have nothing to run."""
    for node in nodes:
        if isinstance(node, ast.ClassDef) and node.name[0] != "_":
            yield from public_functions(node.body, f"{prefix}{node.name}.")
        elif isinstance(node, ast.FunctionDef) and node.name[0] != "_":
            yield prefix + node.name, node


def main() -> int:
    ran: dict[str, set[int]] = {}
    for file in NOTED.glob("*.json"):
        for path, lines in json.loads(file.read_text()).items():
            ran.setdefault(path, set()).update(lines)
    idle, num_ran, total = [], 0, 0
    for path in sorted((ROOT / "lib").rglob("*.py")):
        if path.relative_to(ROOT / "lib").as_posix() in ELSEWHERE:
            continue
        tree, lines = ast.parse(path.read_text()), ran.get(str(path), set())
        there = {node.lineno for node in statements(tree)}
        num_ran, total = num_ran + len(there & lines), total + len(there)
        for name, function in public_functions(tree.body):
            within = {node.lineno for node in statements(function)}
            if within and not within & lines:
                idle.append(f"{path.relative_to(ROOT)}: {name}")
    print(f"{num_ran:,} of {total:,} statements of lib ran: {num_ran / total:.1%}")
    if idle:
        print("public functions that no test runs:", *idle, sep="\n    ")
    return int(bool(idle) or num_ran < LEAST * total)


if __name__ == "__main__":
    sys.exit(main())
