"""The files that arrays pass on their way through a command: the walk of a reader who follows them.

    python benchmarks/walks.py FILE ARGUMENTS ...

Runs the command in this process and prints, in the order of their first calls, the functions of the
project that are handed an array of two or more dimensions, by file; a function counts once. A
return is a step to a file, or to a room of the house, that was left before.
"""

import itertools
import runpy
import sys
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

ROOT = Path.cwd()


def holds_array(value: Any, depth: int = 2) -> bool:
    """Whether a value is a matrix or a batch of images, or holds one."""
    if getattr(value, "ndim", 0) in (2, 3, 4, 5):
        return True
    if depth and isinstance(value, tuple | list):
        return any(holds_array(item, depth - 1) for item in value[:20])
    if depth and type(value).__module__.startswith(("lib", "xp_")):
        return any(holds_array(item, depth - 1) for item in getattr(value, "__dict__", {}).values())
    return False


class Walk:
    """The files [(name, functions)] in the order in which arrays pass them."""

    def __init__(self) -> None:
        self.seen: set[CodeType] = set()
        self.files: list[tuple[str, list[str]]] = []

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if event != "call" or code in self.seen:
            return
        path = Path(code.co_filename).absolute()
        name = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else ""
        if not name.startswith(("lib/", "xp_")) or code.co_name.startswith("<"):
            self.seen.add(code)
            return
        count = code.co_argcount + code.co_kwonlyargcount
        if not any(holds_array(frame.f_locals.get(name)) for name in code.co_varnames[:count]):
            return
        self.seen.add(code)
        if not self.files or self.files[-1][0] != name:
            self.files.append((name, []))
        self.files[-1][1].append(code.co_name)


def room(file: str) -> str:
    """A module or package at the top of `lib`, or an experiment."""
    top, *inner = file.split("/")
    return f"lib/{inner[0].removesuffix('.py')}" if top == "lib" else top


if __name__ == "__main__":
    walk, sys.argv = Walk(), sys.argv[1:]
    sys.setprofile(walk)
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        sys.setprofile(None)
        for name, functions in walk.files:
            print(f"{name}: {', '.join(functions)}")
        files = [name for name, _ in walk.files]
        for kind, places in (("files", files), ("rooms", [room(name) for name in files])):
            steps = [place for place, _ in itertools.groupby(places)]
            print(f"{len(set(steps))} {kind}, {len(steps) - len(set(steps))} returns")
