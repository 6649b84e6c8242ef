"""The comparison of sources: one tiny group through the command, its tables, and its settings."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from lib import runs
from lib.datasets import Dataset
from lib.flow_matching import draw_step, optimal_permutation
from lib.kernels import squared_distances
from xp_gmm_source import experiments, flow, plot, tables
from xp_gmm_source.config import FlowConfig, comparison, presets

TINY = FlowConfig(
    dataset="digits", width=16, multipliers=(1,), patch=2, num_steps=3, batch_size=16,
    num_samples=60, num_train=300, em_iterations=2, euler=(2, 4), heun=(4,),
)  # fmt: skip
MIXTURE = {"source": "gmm", "coupling": "mode", "n_components": 2, "covariance_type": "diag"}
TEN_THOUSAND = Dataset("mnist", np.zeros((10_000, 1, 1, 1), np.uint8), np.zeros(10_000), ("0",))
FLOWS = {
    "Gaussian": replace(TINY, coupling="independent", prune=True),
    "mixture": replace(TINY, **MIXTURE),
}


@pytest.fixture(scope="module")
def summary(tmp_path_factory):
    """The summary of two flows, two seeds of one of them."""
    results = tmp_path_factory.mktemp("results")
    arguments = experiments.Arguments(seeds=(0,), results=results)
    return experiments.run_group("digits", FLOWS, arguments), arguments


@pytest.mark.slow
def test_a_group_leaves_numbers_and_figures(summary):
    path, arguments = summary
    told = json.loads(path.read_text())
    assert [row["label"] for row in told["rows"]] == ["Gaussian", "Gaussian, pruned", "mixture"]
    assert 0.5 < told["feature_accuracy"] <= 1
    for row in told["rows"]:
        assert (row["methods"], row["evaluations"]) == (["euler", "euler", "heun"], [2, 4, 4])
        assert np.isfinite(row["frechet"]).all()
        assert np.shape(row["frechet"]) == (1, 3)
        assert row["folders"][0].startswith("xp_gmm_source/digits-")
    assert 0 < told["rows"][1]["acceptance"][0] < 1
    assert told["rows"][1]["pruned_axes"] > 0
    names = {file.name.removeprefix("digits_quick_") for file in path.parent.glob("*.png")}
    assert names == {"nfe.png", "samples.png", "paths.png", "mixture_2_diag.png"}
    before = {file: file.stat().st_mtime_ns for file in arguments.results.rglob("arrays.npz")}
    assert len(before) == 4  # two flows, the mixture and the classifier
    experiments.run_group("digits", FLOWS, arguments)
    assert before == {file: file.stat().st_mtime_ns for file in before}
    assert not list(arguments.results.rglob("checkpoint.npz.tmp"))


@pytest.mark.slow
def test_stored_flows_can_be_followed_again(summary):
    """Shapes of what is stored; Euler's last sample is where the stored path with as many steps
    ends; measures are those of the samples."""
    path, arguments = summary
    row = json.loads(path.read_text())["rows"][0]
    stored = runs.Run(arguments.results / row["folders"][0]).load_arrays()
    assert stored["samples"].shape == (2, 3, 60, 8, 8, 1)
    assert stored["samples"].dtype == np.uint8
    assert stored["paths"].shape == (2, flow.PATH_STEPS + 1, 60, 2)
    assert stored["losses"].shape == (3,)
    page = (Path(experiments.__file__).parent / "README.md").read_text()
    assert all(f"`{name}`" in page for name in stored if not name.startswith("floor_"))
    starts = stored["starts"].reshape(60, -1)
    np.testing.assert_allclose(starts @ stored["basis"], stored["paths"][0, 0], atol=1e-4)
    np.testing.assert_allclose(stored["basis"].T @ stored["basis"], np.eye(2), atol=1e-5)
    # A network of three steps hardly moves anything: straight paths, of a length that is their
    # displacement, at a cost that is the mean square of what they move.
    moved = (stored["samples"][0, 1] / 127.5 - 1).reshape(60, -1)
    assert stored["length_ratio"][0] >= 1 - 1e-6
    assert np.mean((np.clip(starts, -1, 1) - moved) ** 2) < stored["transport_cost"][0] + 0.01


@pytest.mark.slow
def test_a_flow_is_the_same_from_command_line(summary, capsys):
    path, arguments = summary
    settings = {name: getattr(FLOWS["mixture"], name) for name in FlowConfig.__dataclass_fields__}
    folder = flow.main(flow.Arguments(**settings, seed=0, results=arguments.results))
    row = json.loads(path.read_text())["rows"][2]
    assert folder == arguments.results / row["folders"][0]
    said = capsys.readouterr().out
    assert "gmm, mode: samples that start from the source it was trained from" in said
    assert f"figure:  {folder / 'samples.png'}" in said
    assert "heun    4: frechet" in said
    assert "as many training images: frechet" in said


@pytest.mark.slow
def test_pruning_that_leaves_nothing_is_left_out(summary, monkeypatch, capsys):
    config = FLOWS["Gaussian"]
    train = flow.read(config, None).train
    source = flow.source_of(config, train, summary[1].results)
    assert set(flow.sampling_sources(config, source, train)) == {"own", "pruned"}
    monkeypatch.setattr(flow, "LEAST_ACCEPTANCE", 1.1)
    assert set(flow.sampling_sources(config, source, train)) == {"own"}
    assert "no pruning: " in capsys.readouterr().out


def test_the_rate_warms_up_and_falls():
    """Adam's first step, scaled by the schedule: the sign of the gradient times the rate."""
    chosen = flow.optimizer(0.1, 4, 20, True)
    assert chosen is flow.optimizer(0.1, 4, 20, True)
    warm_up = [0.025 * i for i in range(4)]
    falling = [0.05 * (1 + np.cos(np.pi * i / 16)) for i in range(16)]
    constant = flow.optimizer(0.1, 4, 20, False)
    for optimizer, after in ((chosen, falling), (constant, 16 * [0.1])):
        state, rates = optimizer.init(jnp.zeros(1)), []
        for _ in range(20):
            update, state = optimizer.update(jnp.ones(1), state)
            rates.append(-float(update[0]))
        np.testing.assert_allclose(rates, warm_up + after, rtol=1e-4, atol=1e-7)


def test_tables_show_mean_and_spread():
    assert tables.cell(np.array([1.0, 2.0, 3.0])) == "2 ± 1"
    assert tables.cell(np.array([0.12345])) == "0.123"
    measures = (*tables.MEASURES, "mmd2_pixels", "class_entropy_gap")
    stored = dict.fromkeys(measures, np.array([[1.0, 2.0]]))
    stored |= dict.fromkeys((*tables.PATHS, "straightness"), np.array([0.5]))
    stored |= {"methods": np.array(["euler", "heun"]), "evaluations": np.array([5, 20])}
    stored |= {"train_seconds": np.asarray(3.0)}
    rows = tables.rows_of("one", [stored, stored | {"frechet": np.array([[3.0, 2.0]])}])
    table = tables.table(rows, {"frechet": 0.25})
    assert table.heads == ["source", "euler 5", "heun 20", "straightness", "cost"]
    assert table.rows[0] == ["one", "2 ± 1", "2 ± 0", "0.5 ± 0", "0.5 ± 0"]
    assert table.rows[1] == ["as many training images", "0.25", "", "", ""]


def test_few_samples_make_a_sheet_too(tmp_path):
    """Of three, and without Euler's method."""
    measures = (*tables.MEASURES, "mmd2_pixels", "class_entropy_gap")
    arrays = dict.fromkeys(measures, np.ones((1, 1)))
    arrays |= dict.fromkeys((*tables.PATHS, "straightness"), np.ones(1))
    arrays |= {"methods": np.array(["heun"]), "evaluations": np.array([2])}
    run = runs.open_run(tmp_path, "xp", "flow", {}, seed=0)
    run.finish(**arrays, train_seconds=1.0, samples=np.full((1, 1, 3, 8, 8, 3), 100, np.uint8))
    with Image.open(plot.flow_samples(run, "label")) as sheet:
        assert (100, 100, 100) in {color for _, color in sheet.convert("RGB").getcolors(9999)}


def test_few_test_images_are_all_evaluated(tmp_path, monkeypatch, capsys):
    """By default; a number that is given stays, and so do the settings of larger data sets."""
    path = tmp_path / "imgs"
    for split, num in (("train", 4), ("test", 3)):
        (path / split / "all").mkdir(parents=True)
        for i in range(num):
            Image.new("L", (8, 8), 10 * i).save(path / split / "all" / f"{i}.png")

    class Opened(Exception):
        pass

    def opened(config, **_):
        raise Opened(config)

    monkeypatch.setattr(flow, "run_flow", opened)
    monkeypatch.setattr(experiments, "run_flow", opened)

    def asked(main, arguments):
        with pytest.raises(Opened) as info:
            main(arguments)
        return info.value.args[0]

    def of_flow(dataset, **options):
        return asked(flow.main, flow.Arguments(dataset=str(dataset), **options))

    assert of_flow(path) == FlowConfig(str(path), num_samples=3)
    assert of_flow("digits") == FlowConfig("digits", num_samples=355)
    assert of_flow(path, num_samples=4) == FlowConfig(str(path), num_samples=4)
    for preset, dataset, expected in (("quick", str(path), 3), ("gpu", "digits", 355)):
        arguments = experiments.Arguments(preset=preset, dataset=dataset)
        assert asked(experiments.main, arguments).num_samples == expected
        assert capsys.readouterr().out.startswith(f"{dataset}, ")
    assert asked(experiments.main, experiments.Arguments()).num_samples == 350
    monkeypatch.setattr(flow, "load", lambda *_, **__: TEN_THOUSAND)
    assert of_flow("mnist") == FlowConfig("mnist")
    with pytest.raises(ValueError, match="num_samples must be at least 1, got 0"):
        flow.Arguments(num_samples=0)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: FlowConfig(coupling="mode"), "of a mixture, not of source gaussian"),
        (lambda: FlowConfig(source="gmm", prune=True), "prune is for gaussian and norm_aligned"),
        (lambda: FlowConfig(heun=(5,)), "heun: evaluations are a multiple of 2, got 5"),
        (lambda: FlowConfig(euler=(0,)), "euler: evaluations are a multiple of 1, got 0"),
        (lambda: FlowConfig(masked_share=1.0), "masked_share"),
        (lambda: FlowConfig(ema_decay=1.0), "ema_decay"),
        (lambda: FlowConfig(learning_rate=0.0), "learning_rate"),
        (lambda: FlowConfig(num_steps=0), "num_steps"),
        (lambda: flow.read(replace(TINY, num_samples=400), None), "400, .* digits has 355 test"),
        (lambda: flow.read(replace(TINY, num_train=1443), None), "1443, digits has 1442 images"),
        (lambda: experiments.chosen(experiments.Arguments(only=("svhn",))), "no group 'svhn'"),
        (lambda: experiments.chosen(experiments.Arguments(labels=("GMM-0",))), "no flow"),
    ],
)
def test_settings_that_cannot_be(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_presets_compare_at_one_cost():
    """Flows of a group differ only in source and coupling."""
    alike = {"source": "gaussian", "coupling": "optimal", "prune": False, "n_components": 10}
    alike["covariance_type"] = "full"
    for preset in ("quick", "paper", "gpu"):
        for flows in presets(preset).values():
            bases = {replace(config, **alike) for config in flows.values()}
            assert len(bases) == 1
    chosen = experiments.chosen(
        experiments.Arguments(preset="gpu", dataset="mine.zip", num_steps=7, labels=("GMM-1, OT",))
    )
    assert list(chosen) == ["cifar10"]
    (config,) = chosen["cifar10"].values()
    assert (config.dataset, config.num_steps, config.n_components) == ("mine.zip", 7, 1)
    assert len(comparison(TINY)) == 10


@pytest.mark.slow
def test_semidiscrete_pairs_are_nearer_than_those_of_a_batch(tmp_path):
    """Digits, 64 pairs: beside optimal transport within the batch; the potentials are kept."""
    config = replace(TINY, coupling="semidiscrete", potential_steps=1500, potential_batch=64)
    split = flow.read(config, None)
    source = flow.source_of(config, split.train, tmp_path)
    (coupling, potentials) = flow.pairs_of(
        config, source, split.train, tmp_path, show_progress=False
    ).values()
    assert coupling == "semidiscrete"
    images = jnp.asarray(split.train.images)
    costs = []
    for step in range(20):
        far = draw_step(jax.random.key(0), step, source, images, 64)
        order = optimal_permutation(squared_distances(far.x1, far.x0))
        near = draw_step(jax.random.key(0), step, source, images, 64, None, jnp.asarray(potentials))
        pairs = (far.x0[order], far.x1), (near.x0, near.x1)
        costs.append([float(jnp.mean((x0 - x1) ** 2)) for x0, x1 in pairs])
    of_batch, of_all = np.mean(costs, axis=0)
    assert of_all < 0.97 * of_batch
    run = flow.run_flow(config, seed=0, results=tmp_path, show_progress=False)
    assert np.isfinite(run.load_arrays()["frechet"]).all()
    with pytest.raises(ValueError, match="semidiscrete potentials do not know"):
        replace(config, augment_flip=True)
