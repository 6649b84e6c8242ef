"""What a result is known by: a name, or the content of one's own data, for every command."""

import dataclasses
import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from lib import datasets, runs
from lib.rows.files import open_rows
from lib.runs import sweeps
from xp_data_mixing.study import experiments as mixing
from xp_data_mixing.study.config import Samples, SolversConfig
from xp_dataset_distillation import condense
from xp_dataset_distillation import experiments as distillation
from xp_dataset_distillation.config import BaselineConfig, CondenseConfig
from xp_dataset_distillation.presets import QUICK_EVALUATION
from xp_gmm_source import flow as source_flow
from xp_gmm_source import gmm_files, gmm_fit
from xp_gmm_source.config import FlowConfig
from xp_transfer_learning import data, domain_adaptation, image_flow, transfer
from xp_transfer_learning.config import (
    AdaptationConfig,
    ImageFlowConfig,
    TrainingConfig,
    TransferConfig,
)

ROOT = Path(__file__).parents[2]


def write_images(root: Path, seed: int = 0, num: int = 3) -> Path:
    """Gray images 4 x 3 of two classes, in both splits."""
    rng = np.random.default_rng(seed)
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(num):
                pixels = rng.integers(0, 256, (4, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.bmp")
    return root


def one_pixel(root, file):
    pixels = np.asarray(Image.open(file)).copy()
    pixels[1, 2] ^= 1
    before = file.stat()
    Image.fromarray(pixels).save(file)
    assert file.stat().st_size == before.st_size


def renamed(change):
    """What moves an image to where `change` of (split, class) says."""

    def move(root, file):
        split, kind = change(file.parents[1].name, file.parent.name)
        file.rename(root / split / kind / "9.bmp")

    return move


OTHER = {"cat": "dog", "dog": "cat", "train": "test", "test": "train"}
CHANGES = {
    "one pixel": one_pixel,
    "another class": renamed(lambda split, kind: (split, OTHER[kind])),
    "another split": renamed(lambda split, kind: (OTHER[split], kind)),
    "one more": lambda root, file: shutil.copy(file, file.with_name("9.bmp")),
    "one less": lambda root, file: file.unlink(),
    "another order": lambda root, file: file.rename(file.with_name(f"{9 - int(file.stem)}.bmp")),
    "a class's name": lambda root, file: file.parent.rename(file.parent.with_name("emu")),
}


@given(change=st.sampled_from(sorted(CHANGES)), seed=st.integers(0, 999), which=st.integers(0, 11))
@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_content_counts_and_its_place_does_not(tmp_path, change, seed, which):
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    first = write_images(tmp_path / "a" / "imgs", seed)
    elsewhere = Path(shutil.copytree(first, tmp_path / "b" / "other"))
    (elsewhere / "train" / "cat" / "0.bmp").rename(elsewhere / "train" / "cat" / "00.bmp")
    known_by = datasets.identity(first)
    assert known_by.startswith(runs.CONTENT)
    assert datasets.identity(elsewhere) == known_by
    zipped = partial(shutil.make_archive, format="zip", root_dir=first.parent, base_dir=first.name)
    assert datasets.identity(zipped(tmp_path / "c")) == known_by
    file = sorted(first.rglob("*.bmp"))[which]
    moves = change == "another order" and file.stem == "2"  # it stays the last
    CHANGES[change](first, file)
    assert (datasets.identity(first) == known_by) == moves
    assert (datasets.identity(zipped(tmp_path / "d")) == known_by) == moves


def test_names_are_known_by_themselves(tmp_path):
    for name in ("digits", "MNIST", "cifar-100"):
        assert datasets.identity(name, data_root=tmp_path) == name
        assert datasets.file_stem(name, data_root=tmp_path) == name
    with pytest.raises(FileNotFoundError, match="unknown data set 'imgs'"):
        datasets.identity("imgs", data_root=tmp_path)
    path = write_images(tmp_path / "imgs")
    known_by = datasets.identity("imgs", data_root=tmp_path)
    assert known_by == datasets.identity(path)
    assert datasets.file_stem(path) == f"imgs-{known_by.removeprefix(runs.CONTENT)[:8]}"


class Opened(Exception):
    """In place of a run: what it would be known by."""


WHERE = {"seed": 0, "results": Path("results"), "data_root": None}


def known_source_flow(path):
    config = source_flow.known_by_content(FlowConfig(path, num_samples=6), None)
    return config, source_flow.read(dataclasses.replace(config, dataset=path), None)


COMMANDS = {
    "image_flow, source": lambda path: image_flow.run_flow(
        ImageFlowConfig(path, "digits"), **WHERE
    ),
    "image_flow, target": lambda path: image_flow.run_flow(ImageFlowConfig("noise", path), **WHERE),
    "transfer, flow": lambda path: transfer.flow(TransferConfig(path, "digits"), **WHERE),
    "transfer, accuracy": lambda path: transfer.run_try(
        TransferConfig("digits", path), TrainingConfig(), **WHERE
    ),
    "adaptation": lambda path: domain_adaptation.run_try(
        AdaptationConfig(path, "digits:rotated"), **WHERE
    ),
    "flow": lambda path: source_flow.run_flow(FlowConfig(path), **WHERE),
    "flow, mixture": lambda path: source_flow.fitted_mixture(
        known_source_flow(path)[0], known_source_flow(path)[1].train, Path("results")
    ),
    "flow, features": lambda path: source_flow.feature_network(
        *known_source_flow(path), Path("results")
    ),
    "gmm_fit": lambda path: gmm_fit.main(gmm_fit.Arguments(dataset=path, n_components=1)),
    "condense": lambda path: condense.condense(CondenseConfig(path), **WHERE),
    "evaluate": lambda path: distillation.evaluate(BaselineConfig(path), QUICK_EVALUATION, **WHERE),
    "mixing": lambda path: mixing.run_one(
        "solvers", SolversConfig(Samples(path)), 0, mixing.Arguments()
    ),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_runs_are_known_by_the_content_of_their_data(tmp_path, monkeypatch, command):
    def open_run(results, experiment, name, config, *, seed, **options):
        raise Opened(name, runs.config_hash(config))

    def run_of(path):
        with pytest.raises(Opened) as told:
            COMMANDS[command](str(path))
        return told.value.args

    monkeypatch.setattr(runs, "open_run", open_run)
    first = run_of(write_images(tmp_path / "a" / "imgs"))
    elsewhere = run_of(shutil.copytree(tmp_path / "a" / "imgs", tmp_path / "b" / "imgs"))
    others = run_of(write_images(tmp_path / "c" / "imgs", seed=1))
    assert elsewhere == first
    assert others[0] == first[0]
    assert others[1] != first[1]
    for folder, expected in (("a", first), ("c", others)):
        monkeypatch.chdir(tmp_path / folder)
        assert run_of("imgs") == expected


def test_the_classifier_of_other_images_is_another(tmp_path, monkeypatch):
    """Within one process too, where it is kept."""
    trained, kept = [], domain_adaptation.classification
    monkeypatch.setattr(kept, "train", lambda *_, **__: trained.append(1) or (None, None))
    monkeypatch.setattr(kept, "accuracy", lambda *_: 0.0)
    path = write_images(tmp_path / "imgs")
    config = AdaptationConfig("digits", str(path), num_per_class=2)
    for wanted in (1, 1, 2):
        if wanted == 2:
            one_pixel(None, path / "train" / "cat" / "0.bmp")
        domain_adaptation.frozen_classifier(config, None)
        assert len(trained) == wanted


def test_published_runs_keep_their_folders():
    """Named data sets add nothing to the hash of their settings."""
    fields = {field.name for field in dataclasses.fields(FlowConfig)}
    for file in ROOT.glob("xp_gmm_source/published/*.json"):
        for row in json.loads(file.read_text())["rows"]:
            config = FlowConfig(**{k: v for k, v in row["settings"].items() if k in fields})
            exclude = (*runs.NOT_HASHED, *config.without_effect())
            known = runs.config_hash(source_flow.known_by_content(config, None), exclude=exclude)
            assert all(Path(folder).parent.name.endswith(known) for folder in row["folders"])


def test_a_sweep_knows_commands_by_the_content_of_their_data(tmp_path, monkeypatch):
    named = ("xp/condense.py", "echo", "--dataset=digits", "--seed", "3")
    assert sweeps.known_by(named) is named
    monkeypatch.setattr(sweeps._workers, "ROOT", tmp_path)
    commands = [
        "x.py --dataset imgs --seed 0",
        "x.py --seed 0 --src_dataset=imgs",
        f"x.py --tgt-dataset {tmp_path / 'imgs'}",
        "x.py --train_paths rows.npy missing.npy --val_paths other.npy",
    ]

    def hashes():
        known = (sweeps.known_by(tuple(command.split())) for command in commands)
        return [runs.config_hash({"command": command}) for command in known]

    write_images(tmp_path / "imgs")
    np.save(tmp_path / "rows.npy", np.zeros((3, 2), np.float32))
    before = hashes()
    assert before == hashes()
    one_pixel(None, tmp_path / "imgs" / "train" / "cat" / "0.bmp")
    np.save(tmp_path / "rows.npy", np.ones((3, 2), np.float32))
    assert len({*before, *hashes()}) == 8


def test_files_of_rows_are_known_by_their_content(tmp_path):
    rows = np.random.default_rng(0).normal(size=(9, 4))
    paths = [tmp_path / "a.npy", tmp_path / "b.npy"]
    np.save(paths[0], rows)
    shutil.copy(*paths)
    first, second = (open_rows(path).fingerprint() for path in paths)
    assert first == second
    rows[4, 2] = np.nextafter(rows[4, 2], 9)
    np.save(paths[1], rows)
    assert open_rows(paths[1]).fingerprint() != first
    # Of a large file blocks from end to end: 80 MB that are not written take no disk.
    large = np.lib.format.open_memmap(tmp_path / "c.npy", "w+", np.float32, (10_000_000, 2))
    known = [open_rows(tmp_path / "c.npy").fingerprint()]
    for row in (0, 5_000_000, 9_999_999):
        large[row : row + 200_000] = 1
        large.flush()
        known.append(open_rows(tmp_path / "c.npy").fingerprint())
    assert len(set(known)) == 4


def test_a_run_of_what_is_no_seed_is_refused(tmp_path):
    with pytest.raises(ValueError, match="must be a whole number from 0 to 4294967295"):
        runs.open_run(tmp_path, "xp", "flow", {}, seed=2**32 + 1)
    assert not list(tmp_path.iterdir())


def test_the_same_data_are_found_and_others_are_said(tmp_path, capsys):
    def open_it(name, content, lr=1.0):
        config = {"data": {"source": content, "target": "digits"}, "lr": lr}
        return runs.open_run(tmp_path, "xp", name, config, seed=0)

    first = open_it("imgs-flow", "content:00ff")
    first.finish(a=1)
    assert open_it("renamed-flow", "content:00ff").folder == first.folder
    assert open_it("imgs-flow", "content:00ff").folder == first.folder
    assert open_it("imgs-flow", "content:00ff", lr=2.0).folder != first.folder
    assert capsys.readouterr().err == ""
    changed = open_it("imgs-flow", "content:11ff")
    assert f"no longer those of {first.folder.parent}: a new" in capsys.readouterr().err
    assert changed.folder.parent != first.folder.parent
    assert not changed.finished


def test_a_mixture_of_other_images_of_the_same_name(tmp_path, monkeypatch, capsys):
    """The one of `imgs` in A is not that of `imgs` in B, and neither is overwritten."""
    written = {}
    for place, level in (("A", 40), ("B", 220), ("A", 40)):
        folder = tmp_path / place / "imgs" / "x"
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(6):
            pixels = np.full((2, 2), level + i % 3, np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
        monkeypatch.chdir(tmp_path / place)
        arguments = gmm_fit.Arguments(
            dataset="imgs", n_components=1, covariance_type="spherical", n_stat_samples=0,
            engine="sklearn", output_dir=tmp_path / "out", results=tmp_path / "results",
        )  # fmt: skip
        path = gmm_fit.main(arguments)
        said = capsys.readouterr()
        assert ("there already" in said.out) == (place in written)
        assert ("no longer those of" in said.err) == (place == "B")
        written[place] = path
        np.testing.assert_allclose(gmm_files.load(path).mean, (level + 1) / 127.5 - 1, atol=1e-6)
    assert written["A"] != written["B"]


def test_summaries_of_other_data_have_other_names(tmp_path):
    first, second = (write_images(tmp_path / place / "imgs", i) for i, place in enumerate("ab"))
    for source, target in ((str, lambda path: "digits"), (lambda path: "noise", str)):
        one, other = (data.summary_name(source(x), target(x), None) for x in (first, second))
        assert one != other
    assert data.summary_name("mnist", "digits:rotated", None) == "mnist-digits_rotated"
