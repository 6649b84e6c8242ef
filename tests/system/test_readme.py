"""The README and the recipes keep their word: they print what they print, files exist."""

import json
import re
from functools import partial
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from blocks import run_blocks
from kernel_oracles import kernel, mmd_squared
from scripts import REPOSITORY

from lib import kernels

README = (REPOSITORY / "README.md").read_text()
EXPERIMENTS = sorted(path.parent.name for path in REPOSITORY.glob("xp_*/run.sh"))
CONTRIBUTING = (REPOSITORY / "CONTRIBUTING.md").read_text()
PAGES = sorted(
    path
    for pattern in ("*.md", "benchmarks/*.md", "xp_*/*.md")
    for path in REPOSITORY.glob(pattern)
)
RECIPES_PAGE = (REPOSITORY / "docs/recipes.md").read_text()
# {title: text} of its recipes.
RECIPES = dict(re.findall(r"(?ms)^## (\d\. [^\n]+)\n(.*?)(?=^## |\nIn float64)", RECIPES_PAGE))


def test_there_are_six_recipes():
    assert [title[0] for title in RECIPES] == list("123456")


SLOW = ("1", "2", "5")  # compile most
RECIPE_CASES = [
    pytest.param(title, marks=[pytest.mark.slow] if title[0] in SLOW else []) for title in RECIPES
]


@pytest.mark.parametrize("title", RECIPE_CASES)
def test_recipes_print_what_they_say(title):
    assert run_blocks(RECIPES[title], title)


def test_the_readme_is_short_and_runs(capsys):
    assert len(README.split()) < 950
    run_blocks(README, "README")
    (printed,) = re.findall(r"print\(.*\)  # (\S+)$", README, re.MULTILINE)
    assert f"{float(capsys.readouterr().out):.3f}" == printed


def test_the_systems_of_the_readme_are_the_cards():
    cards = json.loads((REPOSITORY / "docs/cards.json").read_text())
    rows = [
        f"| [{card['title']}]({card['experiment']}/README.md) | {card['what']} | {card['ours']} "
        f"| {card['published']} | `bash run.sh {card['experiment']}` |"
        for card in cards
    ]
    assert "\n".join(rows) in README
    assert sorted(card["experiment"] for card in cards) == EXPERIMENTS
    for name in EXPERIMENTS:
        assert (REPOSITORY / f"docs/_static/cards/{name}.png").exists()


def test_the_flow_of_the_guide():
    names = run_blocks(CONTRIBUTING, "flow")
    x0, y = (np.asarray(names[name], float) for name in ("x0", "y"))
    expected = sum(mmd_squared(*pair, partial(kernel, bandwidth=1.0)) / 2 for pair in zip(x0, y))
    np.testing.assert_allclose(names["losses"][0], expected, rtol=1e-4)
    assert names["losses"][-1] < 0.5 * names["losses"][0]


def slug(heading):
    """The anchor that GitHub gives a heading."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").strip().lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


def anchors(path):
    text = re.sub(r"(?ms)^```.*?^```", "", path.read_text())
    return {slug(heading) for heading in re.findall(r"(?m)^#+ (.+)$", text)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPOSITORY).as_posix())
def test_links_lead_somewhere(page):
    text = re.sub(r"(?ms)^```.*?^```", "", page.read_text())
    for link in re.findall(r"\]\((?!http)([^)\s]+)\)", text):
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_scripts_that_are_named_exist():
    scripts = re.findall(r"(?:python|--) ((?:\w+/)*\w+\.py)", README + CONTRIBUTING)
    assert not {script for script in scripts if not (REPOSITORY / script).exists()}


def test_the_table_of_modules_is_complete():
    table = RECIPES_PAGE[RECIPES_PAGE.index("| `lib.` | what |") :].split("\n\n")[0]
    named = re.findall(r"`(\w+)`", "".join(row.split(" | ")[0] for row in table.splitlines()[2:]))
    rooms = {path.stem for path in (REPOSITORY / "lib").iterdir() if path.name[0] not in "_."}
    assert sorted(named) == sorted(rooms)


def test_the_kernel_of_contributing_is_what_its_terms_say():
    """The lines that its difference adds, put where they belong."""
    difference = re.search(r"```diff\n(.*?)```", CONTRIBUTING, re.DOTALL)[1]
    added = [line[1:] for line in difference.splitlines() if line.startswith("+")]
    (entry,) = (i for i, line in enumerate(added) if line.endswith("),"))
    module = dict(vars(kernels))
    exec("\n".join(added[:entry]), module)
    tested = {"kernels": SimpleNamespace(**module), "np": np}
    exec("def terms(name, s, b):\n" + "\n".join(added[entry + 1 :]), tested)
    ((name, kernel),) = eval(f"{{{added[entry]}}}", tested).items()
    x, y = jnp.array([[0.0, 0.3]]), jnp.array([[1.0, -0.4], [0.0, 0.3]])
    expected = tested["terms"](name, np.array([1.49, 0.0]), 0.7)[0][0]
    np.testing.assert_allclose(kernel(0.7)(x, y)[0], expected, rtol=1e-5)


def test_every_benchmark_is_on_their_page():
    page = (REPOSITORY / "benchmarks/README.md").read_text()
    for path in (REPOSITORY / "benchmarks").glob("[!_]*.py"):
        if not path.stem.startswith("published_"):
            assert f"`{path.name}`" in page
