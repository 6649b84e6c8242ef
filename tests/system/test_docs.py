"""The documentation site: every page is reachable, every module has one, links lead somewhere."""

import ast
import importlib.util
import re
import subprocess
import sys
from decimal import Decimal

import pytest
from blocks import run_blocks
from scripts import REPOSITORY

DOCS = REPOSITORY / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md") if "_build" not in path.parts)
GUIDES = sorted(DOCS.glob("guides/*.md"))
API = sorted(page for page in DOCS.glob("api/*.md") if page.stem != "index")
# What annotates arguments, and what functions return: examples show these by their use.
TYPES = {
    "AnyArray", "Centers", "Coupling", "Covariance", "Features", "Identity", "Kernel", "Method",
    "NumSteps", "OnRows", "PRNGKey", "PathLike", "Readout", "SpectralFilter", "Split",
    "StatefulValueAndGrad", "Structure", "TargetValueAndGrad", "Transform", "Velocity",
    "Draws", "FeatureTarget", "FeatureWitness", "Filtered", "FitResult", "FlowResult", "FlowState",
    "GramOfMeans", "Interval", "Moments", "Normalization", "NystromBasis", "Parameters",
    "PermutationTest", "Potentials", "Problem", "Quadratic", "Solution", "Statistics", "StepInfo",
    "Straightness", "StreamedMeans", "Target", "TrainState", "Witness",
}  # fmt: skip


def extension(name):
    """A module of docs/_extensions."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"_extensions/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PLAIN_DOCSTRINGS, REPOSITORY_PAGES = map(extension, ("plain_docstrings", "repository_pages"))


def relative(path):
    return path.relative_to(DOCS).as_posix()


def without_code(text):
    return re.sub(r"(?ms)^```(?!\{).*?^```", "", text)


def entries(page):
    """The pages, without their ending, that a page's tables of contents name."""
    for block in re.findall(r"(?ms)^```\{toctree\}\n(.*?)^```", page.read_text()):
        names = [line for line in block.splitlines() if line and not line.startswith(":")]
        names = [re.sub(r".* <(.*)>", r"\1", name) for name in names]  # behind a title
        yield from (relative((page.parent / name).resolve()) for name in names)


def table_rows(text):
    """The rows of all tables, without their heads."""
    tables = re.findall(r"(?m)^\|[^\n]*\n\|[-|]+\n((?:\|[^\n]*\n?)+)", text)
    return [row for table in tables for row in table.splitlines()]


def test_every_page_is_in_a_table_of_contents():
    named = [name for page in PAGES for name in entries(page)]
    notebooks = [f"notebooks/{path.stem}" for path in REPOSITORY.glob("notebooks/*.ipynb")]
    pages = [relative(path).removesuffix(".md") for path in PAGES]
    assert sorted(["index", *named]) == sorted([*pages, *notebooks])


def test_every_public_module_has_its_place_in_the_api():
    pages = "".join(page.read_text() for page in DOCS.glob("api/*.md"))
    documented = re.findall(r"\.\. automodule:: (\S+)", pages)
    assert sorted(documented) == sorted(PLAIN_DOCSTRINGS.public_modules(REPOSITORY / "lib"))


@pytest.mark.parametrize("page", API, ids=relative)
def test_every_public_name_has_an_example(page):
    examples = "".join(re.findall(r"(?ms)^```pycon\n(.*?)^```$", page.read_text()))
    for module in re.findall(r"\.\. automodule:: (\S+)", page.read_text()):
        path = REPOSITORY / module.replace(".", "/")
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        names = set(PLAIN_DOCSTRINGS.public_names(path)) - TYPES
        assert not names - set(re.findall(r"\w+", examples)), module


@pytest.mark.slow
@pytest.mark.parametrize("page", API, ids=relative)
def test_examples_print_what_they_say(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # which an example sets: put back after it
    assert run_blocks(page.read_text(), page.name)


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_links_lead_somewhere(page):
    text = without_code(page.read_text())
    links = re.findall(r"\]\((?!https?:)([^)\s]+)\)", text)
    links += re.findall(r"(?m)^```\{(?:include|image)\} (\S+)$", text)
    for link in links:
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        if target.suffix == ".ipynb":  # copied next to the pages when the site is built
            target = REPOSITORY / "notebooks" / target.name
        assert target.exists(), link
        assert not anchor or anchor in REPOSITORY_PAGES.slugs(target.read_text()), link


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_commands_name_scripts_that_exist(page):
    scripts = re.findall(r"(?:python|--|bash) ((?:\w+/)*\w+\.(?:py|sh))", page.read_text())
    assert not {script for script in scripts if not (REPOSITORY / script).exists()}


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_parts_that_pages_include_are_there(page):
    for match in REPOSITORY_PAGES.INCLUDE.finditer(page.read_text()):
        part = REPOSITORY_PAGES.part_of(page, match)
        assert len(part.text.split()) > 20


def messages():
    """All texts in the code, with \0 where values come in; and what run.sh prints."""
    for path in [*REPOSITORY.glob("lib/**/*.py"), *REPOSITORY.glob("xp_*/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [
                    part.value if isinstance(part, ast.Constant) else "\0" for part in node.values
                ]
                yield "".join(parts)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value
    yield (REPOSITORY / "run.sh").read_text()


def test_errors_of_troubleshooting_are_those_of_the_code():
    rows = table_rows((DOCS / "troubleshooting.md").read_text())
    quoted = [row.split("`")[1] for row in rows if re.match(r"\| `[^`]*`(,[^|]*)? \|", row)]
    theirs = {"No module named 'lib'", "operator torchvision::nms does not exist"}
    known = list(messages())
    assert len(quoted) >= 30
    for message in set(quoted) - theirs:
        pattern = re.compile(".*".join(map(re.escape, message.split("..."))), re.DOTALL)
        assert any(pattern.search(text) for text in known), message


def test_numbers_of_the_results_are_those_of_the_experiments():
    """Rounded: each is a number of their pages within half a unit of its last digit."""

    def numbers(text):
        matches = re.findall(r"(?<![\w-])\.?\d[\d,.]*(?:e-?\d+)?", text.replace(", ", " "))
        return {number.rstrip(".,").replace(",", "") for number in matches}

    pages = [*REPOSITORY.glob("xp_*/README.md"), REPOSITORY / "benchmarks/README.md"]
    known = [float(n) for page in pages for n in numbers(page.read_text()) if n.count(".") < 2]
    rows = table_rows((DOCS / "results.md").read_text())
    of_numbers = [row for row in rows if not row.startswith(("| `", "| the same, `"))]
    shown = {n for row in of_numbers for cell in row.split("|")[2:4] for n in numbers(cell)}
    assert len(shown) > 80
    for number in shown:
        unit = 10.0 ** Decimal(number).as_tuple().exponent
        assert any(abs(float(number) - value) <= 0.501 * unit for value in known), number


def test_docstrings_become_pages():
    lines = """|x_i - y_j|^2 of `x`, and a * b; raises_ nothing.

    h(z) = |z|

- one `Kernel`s
- another

Args:
  x: points [n, d],
    on two lines.
""".splitlines()
    assert PLAIN_DOCSTRINGS.to_rst(lines, {"Kernel": "lib.kernels.Kernel"}) == [
        r"\|x\ :sub:`i`\  - y\ :sub:`j`\ \|\ :sup:`2`\  of ``x``, and a \* b; raises\_ nothing.",
        "",
        ".. code-block:: text",
        "",
        "    h(z) = |z|",
        "",
        r"- one :py:obj:`Kernel <lib.kernels.Kernel>`\ s",
        "",
        "- another",
        "",
        ":Arguments:",
        "   - **x** – points [n, d], on two lines.",
        "",
    ]


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("sum_ij (H K)_ij / n^2", "Σ<ij> (H K)<ij> / n^2^"),
        ("SW_p^p(mu, nu), e^(-1/2)", "SW<p>^p^(μ, ν), e^(-1/2)^"),
        ("<f, v_1>^2 <= lambda", r"\<f, v<1>\>^2^ \<= λ"),
        (
            "block_size, a_b_c, raises_, log_p, lambdas",
            r"block\_size, a\_b\_c, raises\_, log\_p, lambdas",
        ),
    ],
)
def test_formulas_have_indices_powers_and_greek_letters(written, shown):
    shown = re.sub(r"<(\w+)>", r"\\ :sub:`\1`\\ ", shown)
    shown = re.sub(r"\^(\S+?)\^", r"\\ :sup:`\1`\\ ", shown)
    assert PLAIN_DOCSTRINGS.inline(written, {}) == shown


def test_signatures_are_those_of_the_source():
    from lib.kernels import gaussian, gram_product
    from lib.networks import ConvNet

    assert PLAIN_DOCSTRINGS.signature(gaussian) == ("(bandwidth: ScalarLike)", "Kernel")
    arguments, returned = PLAIN_DOCSTRINGS.signature(gram_product)
    assert "weights: Float[Array, 'm *columns'], *, block_size: int=1024" in arguments
    assert returned == "Float[Array, 'n *columns']"
    assert "depth: int = 3" in PLAIN_DOCSTRINGS.signature(ConvNet)[0]


@pytest.mark.slow
@pytest.mark.parametrize("page", [DOCS / "index.md", DOCS / "getting_started.md", *GUIDES])
def test_recipes_run(page, tmp_path, monkeypatch):
    """The blocks of Python; those that the README has too run in test_readme.py."""
    monkeypatch.chdir(tmp_path)
    for body in re.findall(r"(?ms)^```python\n(.*?)^```$", page.read_text()):
        exec(body, {})


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path):
    for name in ("sphinx", "furo", "myst_nb", "sphinx_copybutton", "sphinx_design"):
        pytest.importorskip(name, reason="`bash run.sh docs` installs it")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "-b", "html", DOCS, tmp_path / "html"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "html/searchindex.js").exists()
    kernels = (tmp_path / "html/api/kernels.html").read_text()
    assert 'id="lib.kernels.gaussian"' in kernels
    assert "problematic" not in kernels
