"""The page of a results folder: complete, self-contained, escaped, and never stopped by damage."""

import base64
import html
import io
import json
import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, unquote_to_bytes

import numpy as np
import pytest
from PIL import Image

from lib import runs
from lib.report import _html as pages
from lib.report import page as results_page
from lib.report.tables import Table, write_summary
from lib.runs import files

REPOSITORY = Path(__file__).parents[2]


class Parsed(HTMLParser):
    """Tags with their attributes, tables as lists of rows of cells, and the text of all."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags, self.tables, self.text, self.open = [], [], "", []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data.strip()

    def all(self, tag, attribute):
        return [values[attribute] for name, values in self.tags if name == tag]

    def table(self, head):
        """The table whose first head is this."""
        return next(table for table in self.tables if table[0][0] == head)


def image(path: Path, form: str = "PNG", size: tuple[int, int] = (8, 6)) -> bytes:
    """A picture of noise, written to `path`."""
    stream = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(stream, form)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(stream.getvalue())
    return stream.getvalue()


def finished(results: Path, name: str = "flow", *, seed: int = 0, steps=(0, 150, 300)) -> runs.Run:
    run = runs.open_run(results, "xp_one", name, {"lr": 0.1, "nested": {"depth": 3}}, seed=seed)
    run.finish(steps=np.asarray(steps))
    return run


@pytest.fixture
def results(tmp_path) -> Path:
    """An experiment with two summaries, figures, runs."""
    folder = tmp_path / "results" / "xp_one"
    for seed in (10, 2):
        finished(tmp_path / "results", seed=seed)
    rows = [
        {"label": "ours", "loss": [0.5, 0.25, 1.5], "steps": 1000, "settings": {"lr": 0.1}},
        {"label": "theirs", "loss": [1, 2, "-Infinity"], "rate": 0.123456},
    ]
    files.write_json(folder / "plain.json", {"seeds": [0, 1, 2], "rows": rows, "about": {"n": 7}})
    table = Table(["flow", "loss"], [["a b", ".5"]], "Losses of all.")
    write_summary(folder / "told.json", {"rows": rows}, [table])
    image(folder / "told_losses.png")
    image(folder / "figures" / "plain.gif", "GIF")
    return tmp_path / "results"


def test_the_page_holds_all_and_needs_nothing_else(results):
    page = results_page.write_page(results)
    assert page == results / "index.html"
    parsed = Parsed(page)
    assert {tag for tag, _ in parsed.tags}.isdisjoint(
        {"script", "link", "iframe", "object", "base"}
    )
    held = {}
    for name, source in zip(parsed.all("img", "alt"), parsed.all("img", "src")):
        form, content = source.removeprefix("data:image/").split(";base64,")
        held[name] = form, base64.b64decode(content)
    assert held == {
        "plain.gif": ("gif", (results / "xp_one/figures/plain.gif").read_bytes()),
        "told_losses.png": ("png", (results / "xp_one/told_losses.png").read_bytes()),
    }
    for link in parsed.all("a", "href"):
        assert link == "#experiment1" or (results / unquote(link)).is_file()
    style = pages.STYLE.read_text()
    assert style in page.read_text()
    assert "url(" not in style
    assert "@import" not in style
    assert {p.name for p in results.iterdir()} == {"index.html", "xp_one"}


def test_cards_of_the_experiments_at_hand_come_first(results, tmp_path):
    picture = image(tmp_path / "pictures" / "one.png")
    card = {"title": "One", "what": "it flows", "ours": "1 < 2", "published": "3"}
    cards = [
        card | {"experiment": f"xp_{n}", "picture": "pictures/one.png"} for n in ("one", "two")
    ]
    files.write_json(tmp_path / "cards.json", cards)
    parsed = Parsed(results_page.write_page(results, tmp_path / "cards.json"))
    assert parsed.all("a", "href")[0] == "#experiment1"
    assert base64.b64decode(parsed.all("img", "src")[0].partition(",")[2]) == picture
    text = " ".join(parsed.text.split())
    assert text.count("it flows") == text.count("In full: 1 < 2") == 1
    del cards[1]["what"]
    files.write_json(tmp_path / "cards.json", cards)
    with pytest.raises(ValueError, match=r"cards\.json: not a list of cards with all .*'what'"):
        results_page.write_page(results, tmp_path / "cards.json")


def test_summaries_bring_their_tables(results, capsys):
    parsed = Parsed(results_page.write_page(results))
    assert parsed.table("flow") == [["flow", "loss"], ["a b", ".5"]]
    assert "Losses of all." in parsed.text
    path = results / "xp_one" / "told.json"
    ragged = Table(["name", "n"], [["a", "b", "1"], ["2"]])  # cells too many, or too few
    capsys.readouterr()
    write_summary(path, {"n": 7}, [ragged], figures=lambda at: [at])
    assert capsys.readouterr().out.splitlines()[-2:] == [f"numbers: {path}", f"figure:  {path}"]
    assert json.loads(path.read_text())["n"] == 7
    table = Parsed(results_page.write_page(results)).table("name")
    assert table == [["name", "n"], ["a", "b", "1"], ["2"]]


def test_columns_of_numbers():
    assert Table(["", "n"], [["a", "1.5 ± 2"], ["b"], ["c", "-"], ["d", "9e-05"]]).numeric[1]
    assert not Table(["commit"], [["3c3dbf8505"]]).numeric[0]


def test_runs_are_listed_with_seed_steps_time_and_configuration(results):
    run = finished(results, "timed", steps=())  # nothing recorded
    began = json.loads((run.folder / "env.json").read_text())["time"]
    ended = results_page.datetime.datetime.fromisoformat(began).timestamp() + 125
    os.utime(run.arrays, (ended, ended))
    parsed = Parsed(results_page.write_page(results))
    _, *rows = parsed.table("run")
    assert [row[1:4] for row in rows[:2]] == [["2", "finished", "300"], ["10", "finished", "300"]]
    assert rows[2][2:5] == ["finished", "–", "2 min 5 s"]
    assert "lr: 0.1\nnested.depth: 3\nseed: 2\n" in parsed.text + "\n"
    environment = runs.environment()
    assert environment["command"] in parsed.text
    (listed,) = parsed.table("")[1:]
    assert listed[1] == (environment["commit"] or "–")[:10]
    assert environment["versions"]["jax"] in listed[6]


def test_an_interrupted_run_says_how_to_go_on(results):
    stopped = runs.open_run(results, "xp_one", "stopped", {}, seed=3)
    stopped.save_checkpoint({"x": np.zeros(2)}, step=1200)
    runs.open_run(results, "xp_one", "killed", {}, seed=0)
    command = "python xp_one/flow.py --name 'a b'"
    for path in results.glob("xp_one/*/*/env.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"command": command}))
    parsed = Parsed(results_page.write_page(results))
    assert f"{stopped.folder.parent.name}, seed 3: saved after step 1,200" in parsed.text
    assert "seed 0: nothing saved yet" in parsed.text
    assert command in parsed.text.split("goes on where a run stopped")[1]
    head, row = parsed.table("experiment")
    assert dict(zip(head, row))["runs finished"] == "2"
    assert dict(zip(head, row))["not finished"] == "2"
    assert [row[2] for row in parsed.table("run")[1:]] == ["finished"] * 2 + ["interrupted"] * 2


def damage(results: Path) -> set[str]:
    """Damages one file of each kind; returns their names."""
    run = finished(results, "torn")
    config = run.folder / "config.json"
    other = runs.open_run(results, "xp_one", "other", {}, seed=0)
    other.checkpoint.write_bytes(b"no zip")
    (other.folder / "env.json").write_bytes(
        b'{"time": 3, "device": [], "versions": {}, "commit": 1}'
    )
    run.arrays.write_bytes(run.arrays.read_bytes()[:60])
    config.write_bytes(b'{"lr": ')
    folder = results / "xp_one"
    content = image(folder / "cut.png", size=(64, 64))
    (folder / "cut.png").write_bytes(content[:2000])
    (folder / "text.gif").write_text("no image")
    (folder / "list.json").write_text("[1, 2]")
    (folder / "deep.json").write_text('{"a": ' * 900 + "1" + "}" * 900)
    (folder / "deeper.json").write_text("[" * 100_000)
    (folder / "huge.json").write_text('{"rows": [{"n": [1' + "0" * 400 + ', 2]}], "m": 1e999}')
    (folder / "tables.json").write_text('{"tables": [{"heads": ["n"]}]}')
    (folder / "odd.json").write_text('{"rows": 3, "environment": "none", "seeds": {}}')
    names = ["cut.png", "text.gif", "list.json", "deep.json", "deeper.json", "tables.json"]
    return {
        *names,
        *(str(path.relative_to(folder)) for path in (config, run.arrays, other.checkpoint)),
    }


def test_damaged_files_are_named_and_the_rest_is_shown(results):
    names = damage(results)
    parsed = Parsed(results_page.write_page(results))
    listed = parsed.text.split("Cannot be read, and left out:")[1].split("Interrupted")[0]
    paths = {line.strip().split(": ")[0] for line in listed.strip().splitlines()}
    assert paths == {f"xp_one/{name}" for name in names}
    assert parsed.table("flow")
    assert len(parsed.all("img", "src")) == 2


def test_names_and_values_are_escaped(results):
    evil = "<script>alert(1)</script>&\"'"
    folder = results / ("xp_<img src=x onerror=alert(1)>")
    content = {"rows": [{evil: evil, "label": [evil]}], evil: {evil: evil}, "environment": {}}
    content["environment"] = {"command": evil, "commit": evil, "versions": {evil: evil}}
    name = evil.replace("/", "_")
    folder.mkdir()
    files.write_json(folder / f"{name}.json", content)
    image(folder / f"{name}#?%41.png")
    image(Path(os.fsdecode(os.fsencode(folder) + b"/\xff\n.png")))
    write_summary(results / "xp_one" / "told.json", {}, [Table([evil], [[evil]], evil)])
    (results / "xp_one" / f"broken{name}.json").write_text("\ud800", errors="surrogatepass")
    run = runs.open_run(results, folder.name, name, {evil: evil, "half": "\ud800"}, seed=0)
    (run.folder / "env.json").write_text(json.dumps({"command": evil, "time": evil}))
    page = results_page.write_page(results)
    parsed = Parsed(page)
    assert "<script" not in page.read_text().lower()
    assert evil in parsed.text
    assert {tag for tag, _ in parsed.tags} <= {
        "html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "p", "div", "table",
        "tr", "th", "td", "a", "code", "details", "summary", "ul", "li", "figure", "figcaption",
        "img", "pre",
    }  # fmt: skip
    assert not [name for _, values in parsed.tags for name in values if name.startswith("on")]
    assert all(source.startswith("data:image/") for source in parsed.all("img", "src"))
    links = [link for link in parsed.all("a", "href") if not link.startswith("#")]
    assert len(links) == 8
    for link in links:
        assert Path(os.fsdecode(os.fsencode(results) + b"/" + unquote_to_bytes(link))).is_file()


def test_an_empty_folder_says_so_and_one_of_damage_alone_names_it(tmp_path):
    for _ in range(2):
        parsed = Parsed(results_page.write_page(tmp_path / "results"))
        assert "No results yet: bash run.sh" in parsed.text
        assert parsed.tables == []
        (tmp_path / "results" / "xp_one").mkdir(exist_ok=True)
    (tmp_path / "results" / "xp_one" / "cut.png").write_bytes(b"")
    assert "xp_one/cut.png: " in Parsed(results_page.write_page(tmp_path / "results")).text


def test_large_figures_are_scaled_down_and_large_animations_linked(results, monkeypatch):
    monkeypatch.setattr(results_page, "LARGEST_PNG", 4000)
    monkeypatch.setattr(results_page, "LARGEST_GIF", 100)
    large = image(results / "xp_one/large.png", size=(120, 90))
    assert len(large) > 4 * 4000  # noise does not compress: half the sides is not enough
    parsed = Parsed(results_page.write_page(results))
    shown = dict(zip(parsed.all("img", "alt"), parsed.all("img", "src")))
    assert set(shown) == {"told_losses.png", "large.png"}
    content = base64.b64decode(shown["large.png"].split(",")[1])
    assert len(content) <= 4000
    small, whole = (np.asarray(Image.open(io.BytesIO(c)), float) for c in (content, large))
    assert small.shape == (23, 30, 3)
    means = whole[:88].reshape(22, 4, 30, 4, 3).mean(axis=(1, 3))
    np.testing.assert_allclose(small[:22], means, atol=1.01)  # rounded twice
    assert "plain.gif (0 kB, not in the page)" in " ".join(parsed.text.split())
    assert "xp_one/figures/plain.gif" in parsed.all("a", "href")


def test_time_is_counted_once_where_runs_overlap():
    generator = np.random.default_rng(1)
    for _ in range(20):
        starts = generator.integers(0, 50, 6)
        spans = [(float(a), float(a + b)) for a, b in zip(starts, generator.integers(0, 15, 6))]
        seconds = {second for low, high in spans for second in range(int(low), int(high))}
        assert results_page.covered(spans) == len(seconds)
    assert results_page.covered([]) == 0


def test_durations_in_words():
    for seconds, words in (
        (0.4, "0 s"), (59.6, "1 min 0 s"), (3599.0, "59 min 59 s"), (4830.0, "1 h 20 min")
    ):  # fmt: skip
        assert pages.duration(seconds) == words


@pytest.mark.parametrize("status", [0, 130])
def test_run_sh_ends_with_the_page_also_after_a_failure(tmp_path, status):
    """With a python that only says what it was asked for."""
    for name in ("run.sh", "requirements.txt", "pyproject.toml"):
        (tmp_path / name).write_text((REPOSITORY / name).read_text())
    names = ["xp_transfer_learning", "xp_drmmd", "xp_dataset_distillation", "xp_gmm_source"]
    names += ["xp_data_mixing", "xp_one"]
    for name in names:
        (tmp_path / name).mkdir()
        ends = status if name == names[0] else 0
        (tmp_path / name / "run.sh").write_text(f"echo {name} runs; exit {ends}\n")
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "python $*"\n')
    python.chmod(0o755)
    options = {"cwd": tmp_path, "env": {"PATH": "/usr/bin:/bin", "RESULTS": "my results"}}
    for arguments, ran in (((), names), (names[:1], names[:1])):
        command = ["bash", "run.sh", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, **options)
        assert done.returncode == status, done.stderr
        lines = done.stdout.splitlines()
        assert [line for line in lines if line.endswith(" runs")] == [
            f"{name} runs" for name in (ran[:1] if status else ran)
        ]
        assert lines[-1] == "python -m lib.report.page my results --cards docs/cards.json"


def test_the_command_prints_where_the_page_is(results, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["page", str(results)])
    results_page.main()
    assert capsys.readouterr().out == f"page:    {results / 'index.html'}\n"
    assert html.escape(results.as_posix()) in (results / "index.html").read_text()
