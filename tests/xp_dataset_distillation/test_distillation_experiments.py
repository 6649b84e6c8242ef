"""The evaluator, comparisons, tables and checks of condensation."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tyro
from condensing import SMALL
from PIL import Image

from lib import augment
from lib.networks import ConvNet, classification, optimizers
from lib.runs.processes import DeviceOptions
from lib.runs.settings import settings_of
from xp_dataset_distillation import (
    checks,
    condense,
    condensed_numpy,
    evaluation,
    experiments,
    presets,
    tables,
)
from xp_dataset_distillation.config import (
    EVALUATORS,
    BaselineConfig,
    Comparison,
    CondenseConfig,
    Evaluator,
    Judged,
    dm,
    mmdsw,
)
from xp_dataset_distillation.objectives import Setting

TINY = replace(SMALL, images_per_class=1, iterations=3, real_batch=4, records=1)
JUDGE = Judged(
    Evaluator(num_epochs=2, network="mlp", augmentation=""), num_networks=2, whole_epochs=1
)
SETTING = Setting(10, (8, 8, 1), (0.3,), (0.4,), flips=False)


# ---- The evaluator


def test_accuracies_are_those_of_classifiers_trained_by_hand():
    rng = np.random.default_rng(0)
    images = rng.uniform(size=(20, 8, 8, 1)).astype(np.float32)
    labels = np.repeat(np.arange(10), 2).astype(np.int32)
    shown = rng.integers(0, 256, (30, 8, 8, 1)).astype(np.uint8)
    truth = rng.integers(0, 10, 30).astype(np.int32)
    evaluator = Evaluator(num_epochs=3, batch_size=8, lr=0.1, network="mlp", milestones=(0.5,))
    key = jax.random.key(0)
    found = evaluation.accuracies(
        key,
        evaluation.TrainingSet(images, labels),
        evaluation.Judge(shown, truth, SETTING),
        evaluator,
        num_networks=2,
        show_progress=False,
    )
    from lib.networks import network_by_name

    network = network_by_name("mlp", 10, (8, 8, 1))
    for seed, accuracy in zip(jax.random.split(key, 2), found):
        parameters, _ = classification.train(
            seed,
            network,
            (jnp.asarray(images) - 0.3) / 0.4,
            jnp.asarray(labels),
            # 3 batches an epoch: half of 9 steps is the 5th.
            optimizer=optimizers.sgd(
                0.1, momentum=0.9, weight_decay=5e-4, milestones=(4,), factor=0.2
            ),
            num_epochs=3,
            batch_size=8,
        )
        logits = network.apply(parameters, (jnp.asarray(shown, jnp.float32) / 255 - 0.3) / 0.4)
        assert accuracy == pytest.approx(np.mean(np.argmax(logits, axis=1) == truth))


def test_batches_are_augmented_image_by_image_then_normalised_then_mixed():
    augmentation = augment.parse("color", dialect="dsa")
    images = jnp.ones((6, 8, 8, 1)) * 0.5
    targets = jnp.eye(6)
    changed, same = evaluation.transform(augmentation, SETTING, 0.0)(
        jax.random.key(0), images, targets
    )
    np.testing.assert_array_equal(same, targets)
    # Constant images: colour moves each by its own brightness alone.
    levels = np.asarray(changed)[:, 0, 0, 0]
    assert len(set(levels.tolist())) == 6
    np.testing.assert_allclose(np.asarray(changed), levels[:, None, None, None] + 0 * images)
    assert (np.abs(levels * 0.4 + 0.3 - 0.5) <= 0.5).all()
    _, mixed = evaluation.transform(augmentation, SETTING, 1.0)(jax.random.key(3), images, targets)
    np.testing.assert_allclose(np.sum(mixed, axis=1), 1, rtol=1e-6)
    assert (np.max(mixed, axis=1) < 1).any()


def test_published_protocols():
    assert EVALUATORS["dm"].batch_size == 256
    assert EVALUATORS["dm"].milestones == (0.5,)
    assert EVALUATORS["idc"].cutmix == 0.5
    assert EVALUATORS["wow"].optimizer == "adamw"
    assert {one.num_epochs for one in EVALUATORS.values()} == {1000}
    optimizer = evaluation.optimizer(EVALUATORS["idc"], 600)
    assert optimizer is evaluation.optimizer(EVALUATORS["idc"], 600)
    state, sizes = optimizer.init(jnp.zeros(())), []
    for _ in range(600):
        update, state = optimizer.update(jnp.ones(()), state, jnp.zeros(()))
        sizes.append(-float(update))
    # Momentum .9: 10 times the rate, soon after each milestone.
    np.testing.assert_allclose([sizes[399], sizes[499], sizes[599]], [0.1, 0.02, 0.004], rtol=1e-3)


def test_held_out_images_are_training_images_that_nothing_else_sees():
    entry = replace(TINY, held_out=7)
    real, kept = condense.training_images(entry, None)
    whole, none = condense.training_images(TINY, None)
    assert none is None
    np.testing.assert_array_equal(np.bincount(kept[1]), 7)
    np.testing.assert_array_equal(np.asarray(real.counts) + 7, whole.counts)
    assert len(real.images) + len(kept[0]) == len(whole.images)
    judged_on = evaluation.judge(entry, real, kept, None)
    np.testing.assert_array_equal(judged_on.images, kept[0])
    assert len(evaluation.judge(TINY, whole, None, None).images) == 355


@pytest.mark.parametrize("kind", ["random", "kmeans", "whole"])
def test_baselines_are_training_sets(kind, tmp_path):
    entry = BaselineConfig("digits", kind=kind, images_per_class=2)
    real, _ = condense.training_images(entry, None)
    found = evaluation.training_set(entry, real, seed=0, results=tmp_path, data_root=None)
    assert found.images.dtype == np.float32
    assert found.images.max() <= 1
    expected = np.asarray(real.counts) if kind == "whole" else 2
    np.testing.assert_array_equal(np.bincount(found.labels), expected + np.zeros(10, int))


def test_features_are_those_of_the_trained_network_before_its_last_layer():
    entry = BaselineConfig(
        "digits", kind="herding", feature_epochs=1, feature_width=2, feature_depth=1,
        num_per_class=3,
    )  # fmt: skip
    real, _ = condense.training_images(entry, None)
    images = jnp.asarray(real.images, jnp.float32) / 255
    features = evaluation.trained_features(jax.random.key(0), entry, real)(images)
    network = ConvNet(10, depth=1, width=2)
    normalised = (images - real.mean[0]) / real.std[0]
    parameters, _ = classification.train(
        jax.random.key(0),
        network,
        normalised,
        jnp.asarray(real.labels),
        optimizer=optimizers.adam(1e-3),
        num_epochs=1,
        batch_size=256,
    )
    last = parameters["params"]["Dense_0"]
    np.testing.assert_allclose(
        features @ last["kernel"] + last["bias"][None],
        network.apply(parameters, normalised),
        atol=1e-4,
    )


def test_a_set_is_judged_once(tmp_path, monkeypatch):
    entry = BaselineConfig("digits", images_per_class=1)
    options = {"seed": 0, "results": tmp_path, "show_progress": False}
    first = evaluation.evaluate(entry, JUDGE, **options)
    assert first["accuracies"].shape == (2,)
    monkeypatch.setattr(evaluation, "accuracies", None)  # would fail if it were called
    again = evaluation.evaluate(entry, JUDGE, **options)
    np.testing.assert_array_equal(first["accuracies"], again["accuracies"])
    assert int(first["num_images"]) == 10


# ---- Comparisons


def test_a_group_runs_and_its_summary_tells_all(tmp_path, monkeypatch, capsys):
    group = Comparison(
        {"ECHO": TINY, "Random": BaselineConfig("digits"), "whole set": BaselineConfig(
            "digits", kind="whole")},
        (2,),
        {"short": JUDGE},
    )  # fmt: skip
    monkeypatch.setattr(experiments, "presets", lambda preset: {"digits": group})
    arguments = experiments.Arguments(seeds=(0, 1), results=tmp_path)
    (summary,) = experiments.main(arguments)
    told = json.loads(summary.read_text())
    assert told["judged_on"] == "the test split"
    rows = {(row["label"], row["images_per_class"]): row for row in told["rows"]}
    assert set(rows) == {
        ("ECHO", 2), ("Random", 2), ("whole set", None),
    }  # fmt: skip
    for row in told["rows"]:
        assert np.shape(row["accuracies"]) == (2, 2)
    assert rows["ECHO", 2]["num_images"] == 20
    assert rows["whole set", None]["num_epochs"] == 1
    printed = capsys.readouterr().out
    figures = [line for line in printed.splitlines() if line.startswith("figure:")]
    assert len(figures) == 3
    for line in figures:
        assert Path(line.removeprefix("figure:").strip()).stat().st_size > 2000
    # What was condensed can be read with numpy alone.
    (folder,) = tmp_path.glob("xp_dataset_distillation/digits-echo-ipc2-*/seed1/condensed")
    images, labels, metadata = condensed_numpy.load(folder / "condensed.npz")
    assert images.shape == (20, 8, 8, 1)
    np.testing.assert_array_equal(labels, np.repeat(np.arange(10), 2))
    assert metadata["dataset"] == "digits"


def test_what_arguments_choose():
    arguments = experiments.Arguments(
        preset="paper", only=("order",), labels=("linear, factor 1", "Random"),
        images_per_class=(5,), dataset="kmnist", iterations=7, held_out=3,
    )  # fmt: skip
    found = experiments.chosen(arguments)
    assert set(found) == {"order"}
    entries = found["order"].at(5)
    assert set(entries) == {"linear, factor 1", "Random"}
    for entry in entries.values():
        assert (entry.dataset, entry.images_per_class, entry.held_out) == ("kmnist", 5, 3)
    assert entries["linear, factor 1"].iterations == 7
    with pytest.raises(ValueError, match=r"no group fashion; there are fashion_mnist"):
        experiments.chosen(replace(arguments, only=("fashion",)))
    with pytest.raises(ValueError, match="no entry nonsense"):
        experiments.chosen(replace(arguments, labels=("nonsense",)))


@pytest.mark.parametrize("preset", ["quick", "paper", "gpu"])
def test_presets_compare_like_with_like(preset):
    for group in presets.presets(preset).values():
        assert group.judges
        for number in group.images_per_class:
            entries = group.at(number).values()
            condensed = [entry for entry in entries if isinstance(entry, CondenseConfig)]
            assert len({(c.iterations, c.real_batch, c.width, c.depth) for c in condensed}) == 1


def test_methods_are_the_published_ones():
    base = CondenseConfig()
    assert (base.iterations, base.iterations_per_network, base.real_batch) == (10_000, 5, 256)
    sizes = [replace(base, images_per_class=n).step_size((32, 32, 3)) for n in (1, 10, 20)]
    assert sizes == [1, 10, 20]
    assert base.step_size((8, 8, 1)) == 10 / 16
    assert replace(base, lr=3.0).step_size((8, 8, 1)) == 3
    assert (dm(base).kernel, dm(base).factor, dm(base).sequential) == ("linear", 1, False)
    assert (mmdsw(base).momentum, mmdsw(base).lr) == (0.9, 1.0)


# ---- Tables


def row(label, number, values, judge="idc"):
    return {"label": label, "images_per_class": number, "judge": judge, "accuracies": values}


def test_tables_by_hand():
    rows = [
        row("ECHO", 1, [[0.5, 0.7], [0.6, 0.8]]),
        row("Random", 1, [[0.3, 0.5], [0.3, 0.5]]),
        row("whole set", None, [[0.8, 0.8]]),
        row("ECHO", 10, [[0.7, 0.9], [0.7, 0.9]]),
    ]
    echo, random, whole, ten = tables.relative(rows)
    assert echo["over_random"] == pytest.approx(0.25)
    assert echo["share_of_whole"] == pytest.approx(0.65 / 0.8)
    assert random["over_random"] == 0
    assert whole["share_of_whole"] == 1
    assert ten["over_random"] is None
    # Over sets .6 and .7: 65 ± 7.1; of one set over classifiers.
    assert tables.cell(rows[0]["accuracies"]) == "65.0 ± 7.1"
    assert tables.cell([[0.5, 0.7]]) == "60.0 ± 14.1"
    assert tables.cell([[0.5]]) == "50.0"
    lines = tables.markdown(rows).splitlines()
    assert lines[0] == "| idc | 1 a class | 10 a class | over Random | of the whole set |"
    assert lines[2] == "| ECHO | 65.0 ± 7.1 | 80.0 ± 0.0 | +25.0 /  | 81% / 100% |"
    assert lines[3] == "| Random | 40.0 ± 0.0 |  | +0.0 | 50% |"
    assert lines[4] == "| whole set | 80.0 ± 0.0 |  | | 100% |"


# ---- Checks


def test_the_linear_kernel_sees_means_alone(tmp_path, capsys):
    arguments = checks.Mmd(num=150, dimension=4, repeats=20, results=tmp_path / "new")
    table = json.loads(checks.main(arguments).read_text())["table"]
    assert "| linear |" in capsys.readouterr().out
    for kernel, found in table.items():
        assert found["mean"] > 4, kernel
        assert found["equal"] == 0
    assert abs(table["linear"]["variance"]) < 2
    for kernel in ("gaussian", "energy", "polynomial"):
        assert table[kernel]["variance"] > 3
    assert table["gaussian"]["skewness"] > 3


def test_known_samples_have_the_moments_they_are_named_by():
    draws = {
        which: np.asarray(checks.known_samples(jax.random.key(0), which, 200_000, 1))
        for which in checks.DIFFERENCES
    }
    moments = {
        "equal": (0, 1, 0), "mean": (0.3, 1, 0), "variance": (0, 1.5, 0), "skewness": (0, 1, 2),
    }  # fmt: skip
    for which, (mean, variance, third) in moments.items():
        x = draws[which]
        found = x.mean(), x.var(), np.mean((x - x.mean()) ** 3)
        np.testing.assert_allclose(found, (mean, variance, third), atol=0.06)


@pytest.mark.slow
def test_the_check_of_moments(tmp_path):
    arguments = checks.Moments(
        kernels=("gaussian",), images_per_class=2, iterations=40, lr=0.1, width=8, depth=2,
        real_batch=32, augmentation="", num_networks=2, results=tmp_path,
    )  # fmt: skip
    told = json.loads(checks.run_moments(arguments).read_text())
    start, end = (told["rows"][name] for name in ("start", "gaussian"))
    assert set(start) == set(checks.MOMENTS)
    assert np.mean(end["order 1"]) < 0.8 * np.mean(start["order 1"])


# ---- Commands


@pytest.mark.parametrize("check", ["mmd", "moments"])
def test_checks_take_devices_as_every_command(check):
    """`lib.runs.commands.run_command` starts the devices that the arguments ask for."""
    arguments = tyro.cli(checks.Check, args=[check, "--devices", "3"])
    assert settings_of(DeviceOptions, arguments) == DeviceOptions(devices=3)


def test_the_command_condenses_and_draws(tmp_path, capsys):
    folder = condense.main(condense.Arguments(**vars(TINY), results=tmp_path))
    assert (folder / "condensed.npz").exists()
    assert len(list(folder.glob("images/*/000.png"))) == 10
    for name in ("condensed.png", "along.png"):
        with Image.open(folder.parent / name) as image:
            assert min(image.size) > 100
    assert "images:" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no evaluator nonsense; there are dm, idc, wow"):
        condense.main(condense.Arguments(**vars(TINY), results=tmp_path, evaluate=("nonsense",)))
