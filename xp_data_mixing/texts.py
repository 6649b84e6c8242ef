"""Texts that every installation has, by domain: what a small language model is trained on.

They are taken from the packages beside which this one runs: library code and test code in Python
without docstrings, English prose (docstrings), C and C++ headers, type stubs, data (JSON and CSV),
licenses; and as targets that are no domain, READMEs (of the packages' metadata) and the tests of
one package that is left out of the test code. Equal files count once. A file is held out by its
name's hash; `manifest` names every file that was taken, with its hash, so that two machines can
tell whether they have the same texts.
"""

import ast
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

TESTED_PACKAGE = "sklearn"
"""Its tests are a target, and in no domain."""
HELD_OUT = 5
"""One file in so many is held out."""
MOST_BYTES_OF_A_FILE = 200_000


class Texts(NamedTuple):
    """train and held_out: {name: bytes}, files one after the other with a zero between them."""

    train: dict[str, UInt8[np.ndarray, " n"]]
    held_out: dict[str, UInt8[np.ndarray, " n"]]
    manifest: dict[str, list[dict[str, Any]]]


def code(text: str) -> str:
    """Python without comments and docstrings; "" where it does not parse."""
    tree = _parsed(text)
    if tree is None:
        return ""
    for node in _documented(tree):
        if ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


def prose(text: str) -> str:
    """The docstrings of three lines or more."""
    tree = _parsed(text)
    strings = [] if tree is None else [ast.get_docstring(node) or "" for node in _documented(tree)]
    return "\n\n".join(words for words in strings if words.count("\n") >= 3)


def _parsed(text):
    try:
        return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):
        return None


def _documented(tree) -> Iterator[Any]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return (node for node in ast.walk(tree) if isinstance(node, kinds))


def readme(text: str) -> str:
    """What follows the headers of a package's metadata."""
    return text.partition("\n\n")[2]


def _unchanged(text: str) -> str:
    return text


def _is_test(path: Path) -> bool:
    return "tests" in path.parts and path.name.startswith("test_")


def _is_library(path: Path) -> bool:
    return path.suffix == ".py" and not {"tests", "test", "testing"} & set(path.parts)


def _even(path: Path) -> bool:
    """Code and prose are of different files."""
    return _hash(path.as_posix().encode())[1] % 2 == 0


DOMAINS: dict[str, tuple[Callable[[Path], bool], Callable[[str], str]]] = {
    "library code": (lambda p: _is_library(p) and _even(p), code),
    "test code": (lambda p: _is_test(p) and p.parts[0] != TESTED_PACKAGE, code),
    "prose": (lambda p: _is_library(p) and not _even(p), prose),
    "headers": (lambda p: p.suffix in (".h", ".hpp", ".cuh"), _unchanged),
    "stubs": (lambda p: p.suffix == ".pyi", _unchanged),
    "data": (lambda p: p.suffix in (".json", ".csv"), _unchanged),
    "licenses": (lambda p: p.name.startswith(("LICENSE", "COPYING", "NOTICE")), _unchanged),
}
REAL_TARGETS: dict[str, tuple[Callable[[Path], bool], Callable[[str], str]]] = {
    "READMEs": (lambda p: p.name == "METADATA", readme),
    f"tests of {TESTED_PACKAGE}": (lambda p: _is_test(p) and p.parts[0] == TESTED_PACKAGE, code),
}


def _hash(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


def collect(folder: Path, most_bytes: int) -> Texts:
    """Texts to train on and held-out ones from `folder`, of installed packages: of the domains, in
    turn, up to `most_bytes`, a half, a quarter and an eighth of it to train on, so that sizes
    differ as they do elsewhere, and of everything up to a quarter of it held out.

    Files come in the order of their names' hashes. Raises ValueError for a domain of which the
    folder has nothing.
    """
    paths = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    paths.sort(key=lambda path: _hash(path.as_posix().encode()))
    texts, seen = Texts({}, {}, {}), set[bytes]()
    for i, (name, (belongs, text_of)) in enumerate((DOMAINS | REAL_TARGETS).items()):
        parts: dict[bool, list[bytes]] = {False: [], True: []}
        sizes, files = {False: 0, True: 0}, []
        most = most_bytes >> i % 4 if name in DOMAINS else 0
        limits = {False: most, True: most_bytes // 4}
        for path in filter(belongs, paths):
            held_out = name in REAL_TARGETS or _hash(path.as_posix().encode())[0] % HELD_OUT == 0
            if sizes[held_out] >= limits[held_out]:
                continue
            content = (folder / path).read_bytes()[:MOST_BYTES_OF_A_FILE]
            text = text_of(content.decode("utf-8", "replace")).encode()
            key = _hash(text)
            if not text.strip() or key in seen:
                continue
            seen.add(key)
            text = text[: limits[held_out] - sizes[held_out]]
            parts[held_out].append(text)
            sizes[held_out] += len(text) + 1
            files.append(
                {"path": path.as_posix(), "sha256": key.hex(), "bytes": len(text),
                 "held_out": held_out}
            )  # fmt: skip
        if not parts[True] or (name in DOMAINS and not parts[False]):
            raise ValueError(f"{folder} has too few files of the domain {name!r}")
        for held_out, where in ((False, texts.train), (True, texts.held_out)):
            if parts[held_out]:
                where[name] = np.frombuffer(b"\0".join(parts[held_out]) + b"\0", np.uint8)
        texts.manifest[name] = files
    return texts


def windows(text: UInt8[np.ndarray, " n"], length: int) -> UInt8[np.ndarray, "m length"]:
    """Consecutive pieces that do not overlap; what is left over at the end is dropped."""
    return text[: len(text) // length * length].reshape(-1, length)
