"""Sphinx extension: API pages from docstrings that are plain text.

Docstrings of `lib` hold formulas such as |x - y|^2 as they are, code in backticks, indented blocks
and `Args:`, `Raises:` sections. `to_rst` makes reStructuredText of them in which nothing else is
markup. Signatures are read off the source, so that shapes stand there as they were written, and
what a module offers is what it defines, or for a package what its `__init__` imports.
"""

import ast
import inspect
import itertools
import re
import sys
import textwrap
from collections.abc import Iterable, Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType

SECTION = re.compile(r"(Args|Returns|Raises|Warns|Yields):")
TITLES = {"Args": "Arguments"}


# Public names


def public_modules(package: Path) -> list[str]:
    """Dotted names of the modules under `package` without a leading underscore, itself left out."""
    paths = (path.relative_to(package.parent) for path in sorted(package.rglob("*.py")))
    names = [path.with_suffix("").parts for path in paths]
    names = [parts[:-1] if parts[-1] == "__init__" else parts for parts in names]
    return [
        ".".join(parts) for parts in names if len(parts) > 1 and "_" not in {p[0] for p in parts}
    ]


def public_names(path: Path) -> list[str]:
    """In the order of the source: functions, classes, documented constants and type aliases.

    Of a package it is the names that its `__init__` imports from its own modules.
    """
    names, body = [], ast.parse(path.read_text()).body
    for node, following in zip(body, [*body[1:], None]):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.ImportFrom) and path.name == "__init__.py":
            names += [alias.asname or alias.name for alias in node.names]
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            documented = isinstance(following, ast.Expr) and isinstance(
                following.value, ast.Constant
            )
            alias = re.match(r"Callable\[|Literal\[|.* \| ", ast.unparse(node.value))
            name = node.targets[0].id
            if documented or (alias and not name.isupper()):
                names.append(name)
    return [name for name in names if name[0] != "_"]


class Written:
    """A constant or an alias of a type, shown as the source has it."""

    def __init__(self, source: str):
        self.source = source

    def __repr__(self) -> str:
        return self.source


FULL_NAMES: dict[int, str] = {}
"""By the identity of a public class or alias what it is called, for links from annotations."""


def declare(module: ModuleType) -> None:
    """Sets `__all__`. What a package offers does not stand a second time under its module."""
    names = public_names(Path(str(module.__file__)))
    package = sys.modules[module.__name__.rpartition(".")[0]]
    names = [name for name in names if name not in getattr(package, "__all__", [])]
    module.__dict__["__all__"] = names
    for name in names:
        FULL_NAMES.setdefault(id(getattr(module, name)), f"{module.__name__}.{name}")


def make_plain(module: ModuleType) -> None:
    """Puts in the place of compiled functions and of aliases what Sphinx reads and shows."""
    from sphinx.pycode import ModuleAnalyzer

    for name in module.__dict__["__all__"]:
        value = inspect.unwrap(getattr(module, name))
        if inspect.isfunction(value):
            setattr(module, name, value)
        elif not inspect.isclass(value):
            origin = origins(module).get(name, module)
            body = ast.parse(Path(str(origin.__file__)).read_text()).body
            (source,) = (
                ast.unparse(node.value)
                for node in body
                if isinstance(node, ast.Assign | ast.AnnAssign) and assigned(node) == name
            )
            # What is put together of private names stands there as its value.
            setattr(module, name, Written(repr(value) if re.search(r"\b_", source) else source))
            FULL_NAMES[id(getattr(module, name))] = f"{module.__name__}.{name}"
            # Sphinx shows constants and aliases that the module itself documents.
            analyzer = ModuleAnalyzer.for_module(module.__name__)
            analyzer.analyze()
            documented = ModuleAnalyzer.for_module(origin.__name__).find_attr_docs()
            analyzer.attr_docs["", name] = documented.get(("", name)) or [""]


def assigned(node: ast.Assign | ast.AnnAssign) -> str:
    return ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target)


def origins(module: ModuleType) -> dict[str, ModuleType]:
    """{name: module} of what a package's `__init__` imports from its own modules."""
    result = {}
    for node in ast.parse(Path(str(module.__file__)).read_text()).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(module.__name__):
            result |= {alias.name: import_module(str(node.module)) for alias in node.names}
    return result


def module_text(module: ModuleType, own: bool) -> list[str]:
    """A module's docstring, if `own`, and of a package those of its private modules that it
    offers."""
    private = {origin.__name__: origin for origin in origins(module).values()}
    parts = ([module] if own else []) + [part for name, part in private.items() if "._" in name]
    return "\n\n".join(inspect.getdoc(part) or "" for part in parts).splitlines()


# Docstrings

WORDS = "alpha beta gamma delta epsilon zeta eta theta kappa lambda mu nu xi pi rho sigma tau"
LETTERS = dict(zip(f"{WORDS} phi chi psi omega".split(), "αβγδεζηθκλμνξπρστφχψω"))
GREEK = f"({'|'.join(LETTERS)})"


def formulas(text: str) -> str:
    """Greek letters, indices and powers of escaped text as such: x_i, lambda^2, (H K)_ij."""
    text = re.sub(rf"(?<![A-Za-z]){GREEK}(?![A-Za-z])", lambda m: LETTERS[m[0]], text)
    text = re.sub(r"\bsum(?=\\_)", "Σ", text)
    base = r"((?<![A-Za-z0-9_])(?:[a-zα-ωΣ]|[A-Z]{1,3})|\))"
    index = r"([A-Za-zα-ω]{1,2}|\d+)(?![A-Za-z0-9_]|\\_)"
    text = re.sub(rf"{base}\\_{index}", r"\1\\ :sub:`\2`\\ ", text)
    power = r"(-?\d+|[A-Za-z](?![A-Za-z0-9])|\([^()`]+\))"
    return re.sub(rf"\^{power}", r"\\ :sup:`\1`\\ ", text)


def inline(text: str, targets: Mapping[str, str]) -> str:
    """Text with code in single backticks as a line of reStructuredText that says just that."""
    parts = re.split(r"(?<!`)`([^`]+)`(?!`)", text)
    for i, part in enumerate(parts):
        if i % 2 == 0:
            parts[i] = formulas(re.sub(r"([\\*_|`<>])", r"\\\1", part))
            continue
        code = " ".join(part.split()).replace("\\", "\\\\")
        target = targets.get(code)
        role = f":py:obj:`{code} <{target}>`" if target else f"``{code}``"
        before = r"\ " if re.search(r"\w$", parts[i - 1]) else ""
        after = r"\ " if re.match(r"\w", parts[i + 1]) else ""
        parts[i] = f"{before}{role}{after}"
    return "".join(parts)


def is_python(text: str) -> bool:
    try:
        body = ast.parse(textwrap.dedent(text)).body
    except SyntaxError:
        return False
    return any(isinstance(node, ast.Assign | ast.Import | ast.ImportFrom) for node in body)


def blocks(lines: Iterable[str]) -> list[list[str]]:
    """The runs of lines between empty ones."""
    result: list[list[str]] = [[]]
    for line in lines:
        if line.strip():
            result[-1].append(line)
        elif result[-1]:
            result.append([])
    return [block for block in result if block]


def items(lines: list[str]) -> list[list[str]]:
    """A section's lines, an item for each line that is indented least."""
    margin = min(len(line) - len(line.lstrip()) for line in lines)
    result: list[list[str]] = []
    for line in lines:
        if len(line) - len(line.lstrip()) == margin or not result:
            result.append([])
        result[-1].append(line.strip())
    return result


def section(title: str, lines: list[str], targets: Mapping[str, str]) -> list[str]:
    result = [f":{TITLES.get(title, title)}:"]
    for item in items(lines):
        name, colon, text = " ".join(item).partition(": ")
        line = (
            f"**{inline(name, {})}** – {inline(text, targets)}" if colon else inline(name, targets)
        )
        result.append(f"   - {line}")
    return [*result, ""]


def text_to_rst(block: list[str], targets: Mapping[str, str]) -> list[str]:
    """A paragraph, with bullets or indented items in it or without."""
    result, parts = [], [[block[0]]]
    for previous, line in itertools.pairwise(block):
        is_deeper, was_deeper = line.startswith(" "), previous.startswith(" ")
        of_bullet = parts[-1][0].startswith("- ") and is_deeper
        if line.startswith("- ") or (is_deeper != was_deeper and not of_bullet):
            parts.append([])
        parts[-1].append(line)
    for part in parts:
        if part[0].startswith(" "):
            for item in items(part):
                result.append(f"- {inline(' '.join(item), targets)}")
            result.append("")
            continue
        text = " ".join(" ".join(part).split())
        bullet = "- " if text.startswith("- ") else ""
        text = text.removeprefix(bullet)
        # An escaped space first: what looks like a list or a field is none.
        start = r"\ " if re.match(r"\(?\w+[.)] |[-+] |:|\.\. ", text) else ""
        result += [bullet + start + inline(text, targets), ""]
    return result


def to_rst(lines: Iterable[str], targets: Mapping[str, str]) -> list[str]:
    """A docstring's lines as reStructuredText; `targets` are the full names of what it may name."""
    result: list[str] = []
    for block in blocks(lines):
        if SECTION.fullmatch(block[0].strip()):
            result += section(block[0].strip()[:-1], block[1:], targets)
        elif block[0].startswith("    "):
            language = "python" if is_python("\n".join(block)) else "text"
            shift = "   " if result and result[-1].startswith("   ") else ""
            result += [
                f"{shift}.. code-block:: {language}",
                "",
                *(shift + line for line in block),
                "",
            ]
        else:
            result += text_to_rst(block, targets)
    return result


# Signatures


def definition(obj: object) -> ast.AST | None:
    """The syntax tree of a function or class, if it has a source."""
    try:
        source = textwrap.dedent(inspect.getsource(inspect.unwrap(obj)))  # type: ignore[arg-type]
        return ast.parse(source).body[0]
    except (OSError, TypeError, SyntaxError):
        return None


class Readable(ast.NodeTransformer):
    """Shapes without spaces around them, and names of array types as what they stand for."""

    def __init__(self, names: Mapping[str, object]):
        self.names = names

    def visit_Constant(self, node: ast.Constant) -> ast.Constant:
        return ast.Constant(node.value.strip()) if isinstance(node.value, str) else node

    def visit_Name(self, node: ast.Name) -> ast.AST:
        value = self.names.get(node.id)
        if full_name := FULL_NAMES.get(id(value)):
            return ast.parse(full_name, mode="eval").body
        if not hasattr(value, "dim_str"):
            return node
        return ast.parse(f"{value.dtype.__name__}[Array, {value.dim_str!r}]", mode="eval").body


def written(node: ast.AST, names: Mapping[str, object]) -> str:
    """Arguments or annotations as the source has them, made readable."""
    for part in ast.walk(node):
        for field in ("annotation", "returns"):
            if annotation := getattr(part, field, None):
                setattr(part, field, Readable(names).visit(annotation))
    return ast.unparse(node)


def without_self(arguments: ast.arguments) -> ast.arguments:
    for group in (arguments.posonlyargs, arguments.args):
        if group and group[0].arg in ("self", "cls"):
            del group[0]
            break
    return arguments


def signature(obj: object) -> tuple[str, str | None] | None:
    """(arguments, what is returned) as the source has them, None where it has none."""
    node = definition(obj)
    names = vars(sys.modules.get(str(getattr(obj, "__module__", "")), ast))
    if isinstance(node, ast.FunctionDef):
        returned = written(Readable(names).visit(node.returns), names) if node.returns else None
        return f"({written(without_self(node.args), names)})", returned
    if isinstance(node, ast.ClassDef):
        functions = {part.name: part for part in node.body if isinstance(part, ast.FunctionDef)}
        if "__init__" in functions:
            return f"({written(without_self(functions['__init__'].args), names)})", None
        fields = [part for part in node.body if isinstance(part, ast.AnnAssign)]
        shown = [written(field, names) for field in fields]
        shown = ["*" if field == "_: KW_ONLY" else field for field in shown]
        shown = [field for field in shown if "ClassVar[" not in field]
        shown = [re.sub(r" = (\w+\.)?field\(.*", " = ...", field) for field in shown]
        return (f"({', '.join(shown)})", None) if shown else None
    return None


# Sphinx


def full_names() -> dict[str, dict[str, str]]:
    """{module: {name: full name}} of all that is declared; under "" the full names."""
    names: dict[str, dict[str, str]] = {"": {}}
    for module in [name for name in sys.modules if name.startswith("lib.")]:
        offered = sys.modules[module].__dict__.get("__all__", [])
        names[module] = {name: f"{module}.{name}" for name in offered}
        names[""] |= {f"{module}.{name}": f"{module}.{name}" for name in offered}
        names[""] |= {module: module}
    return names


def setup(app):
    app.setup_extension("sphinx.ext.autodoc")
    modules = [import_module(name) for name in public_modules(Path(app.srcdir).parent / "lib")]
    for module in modules:
        declare(module)
    for module in modules:
        make_plain(module)
    names = full_names()

    def targets(name):
        """What the docstring of a module or of something in it may name."""
        module = next((m for m in sorted(names, key=len)[::-1] if m and name.startswith(m)), "")
        return names[""] | names.get(module, {})

    def process_docstring(app, what, name, obj, options, lines):
        if what == "module":
            lines[:] = module_text(obj, own=f"api/{name.removeprefix('lib.')}" != app.env.docname)
        lines[:] = to_rst(list(lines), targets(name))

    def process_signature(app, what, name, obj, options, arguments, returned):
        return signature(obj) if what in ("function", "method", "class", "exception") else None

    def skip_member(app, what, name, obj, skip, options):
        is_field = str(getattr(obj, "__doc__", "")).startswith("Alias for field")
        is_default = what == "class" and inspect.isclass(obj)
        return True if is_field or is_default else None

    def lead_with_text(app, page, source):
        """What a module is for, then the examples of its page, then its names."""
        module = sys.modules.get(page.replace("api/", "lib."))
        if module and (parts := re.split(r"(?m)^(?=```\{eval-rst\})", source[0], maxsplit=1))[1:]:
            title, _, examples = parts[0].partition("\n")
            text = to_rst((inspect.getdoc(module) or "").splitlines(), targets(module.__name__))
            text = "\n".join(("```{eval-rst}", *text, "```"))
            source[0] = f"{title}\n\n{text}\n\n## Examples\n{examples}\n## Reference\n\n{parts[1]}"

    app.connect("source-read", lead_with_text)
    app.connect("autodoc-process-docstring", process_docstring)
    app.connect("autodoc-process-signature", process_signature)
    app.connect("autodoc-skip-member", skip_member)
    return {"parallel_read_safe": True}
