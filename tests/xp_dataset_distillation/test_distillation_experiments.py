"""The evaluator, comparisons, tables, checks and commands of condensation."""

import json
import re
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tyro
from cases import slow
from condensing import SMALL
from PIL import Image

from lib import augment
from lib.networks import classification, network_by_name, optimizers
from xp_dataset_distillation import (
    checks,
    condense,
    condensed_numpy,
    evaluate,
    evaluation,
    experiments,
    plot,
    presets,
    tables,
)
from xp_dataset_distillation.config import (
    EVALUATORS,
    BaselineConfig,
    Comparison,
    CondenseConfig,
    Evaluation,
    Evaluator,
    dm,
    mmdsw,
)
from xp_dataset_distillation.real_data import Setting, training_images

TINY = replace(SMALL, images_per_class=1, num_steps=3, real_batch=4, num_snapshots=1)
SHORT = Evaluation(
    Evaluator(num_epochs=2, network="mlp", augmentation=""), num_networks=2, whole_epochs=1
)
SETTING = Setting(10, (8, 8, 1), (0.3,), (0.4,), flips=False)


def own_images(root):
    """Gray images 8 x 8 of two classes, in both splits."""
    rng = np.random.default_rng(0)
    for name in ("train/cat", "train/dog", "test/cat", "test/dog"):
        (root / name).mkdir(parents=True)
        for i in range(6):
            pixels = rng.integers(0, 256, (8, 8), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


@pytest.mark.slow
def test_accuracies_are_those_of_classifiers_trained_by_hand():
    rng = np.random.default_rng(0)
    images = rng.uniform(size=(20, 8, 8, 1)).astype(np.float32)
    labels = np.repeat(np.arange(10), 2).astype(np.int32)
    shown = rng.integers(0, 256, (30, 8, 8, 1)).astype(np.uint8)
    truth = rng.integers(0, 10, 30).astype(np.int32)
    evaluator = Evaluator(
        num_epochs=3, batch_size=8, learning_rate=0.1, network="mlp", milestones=(0.5,)
    )
    key, network = jax.random.key(0), network_by_name("mlp", 10, (8, 8, 1))
    sets = evaluation.TrainingSet(images, labels), evaluation.EvaluationSet(shown, truth)
    options = {"num_networks": 2, "show_progress": False}
    accuracies = evaluation.accuracies(key, *sets, SETTING, evaluator, **options)
    # 3 batches per epoch: half of 9 steps is the 5th.
    optimizer = optimizers.sgd(0.1, momentum=0.9, weight_decay=5e-4, milestones=(4,), factor=0.2)
    options = {"optimizer": optimizer, "num_epochs": 3, "batch_size": 8}
    for seed, accuracy in zip(jax.random.split(key, 2), accuracies):
        normalized = (jnp.asarray(images) - 0.3) / 0.4
        parameters, _ = classification.train(
            seed, network, normalized, jnp.asarray(labels), **options
        )
        logits = network.apply(parameters, (jnp.asarray(shown, jnp.float32) / 255 - 0.3) / 0.4)
        assert accuracy == pytest.approx(np.mean(np.argmax(logits, axis=1) == truth))


def test_batches_are_augmented_image_by_image_then_normalized_then_mixed():
    augmentation = augment.parse("color", dialect="dsa")
    images, targets = jnp.ones((6, 8, 8, 1)) * 0.5, jnp.eye(6)
    transform = evaluation.transform(augmentation, SETTING, 0.0)
    changed, same = map(np.asarray, transform(jax.random.key(0), images, targets))
    np.testing.assert_array_equal(same, targets)
    # Constant images: color moves each only by its own brightness.
    levels = changed[:, :1, :1]
    assert len(np.unique(levels)) == 6
    np.testing.assert_allclose(changed, levels + 0 * changed)
    assert (np.abs(levels * 0.4 + 0.3 - 0.5) <= 0.5).all()
    _, mixed = evaluation.transform(augmentation, SETTING, 1.0)(jax.random.key(3), images, targets)
    np.testing.assert_allclose(np.sum(mixed, axis=1), 1, rtol=1e-6)
    assert (np.max(mixed, axis=1) < 1).any()


def test_held_out_images_are_training_images_that_nothing_else_sees():
    method = replace(TINY, held_out=7)
    real, held_out = training_images(method, None)
    whole, none = training_images(TINY, None)
    assert none is None
    np.testing.assert_array_equal(np.bincount(held_out[1]), 7)
    np.testing.assert_array_equal(np.asarray(real.counts) + 7, whole.counts)
    test = experiments.evaluation_set(method, real, held_out, None)
    np.testing.assert_array_equal(test.images, held_out[0])
    assert len(experiments.evaluation_set(TINY, whole, None, None).images) == 355
    names, options = whole.class_names, {"resized": False, "data_root": None}
    words = r"test split of digits has images \(8, .*, the training images of toy \(5, 5, 1"
    with pytest.raises(ValueError, match=words):
        evaluation.test_split("digits", "toy", names, (5, 5, 1), **options)


@pytest.mark.slow
def test_a_group_runs_and_its_summary_tells_all(tmp_path, monkeypatch, capsys):
    whole = BaselineConfig("digits", kind="whole")
    methods = {"ECHO": TINY, "Random": BaselineConfig("digits"), "whole set": whole}
    group = Comparison(methods, (2,), {"short": SHORT})
    monkeypatch.setattr(experiments, "presets", lambda preset: {"digits": group})
    arguments = experiments.Arguments(seeds=(0, 1), results=tmp_path)
    (summary,) = experiments.main(arguments)
    told = json.loads(summary.read_text())
    assert told["evaluated_on"] == "the test split"
    rows = {(row["label"], row["images_per_class"]): row for row in told["rows"]}
    assert set(rows) == {("ECHO", 2), ("Random", 2), ("whole set", None)}
    assert all(np.shape(row["accuracies"]) == (2, 2) for row in told["rows"])
    assert rows["ECHO", 2]["num_images"] == rows["Random", 2]["num_images"] == 20
    assert rows["whole set", None]["num_epochs"] == 1
    figures = re.findall(r"(?m)^figure:\s*(.*)$", capsys.readouterr().out)
    assert len(figures) == 3
    assert all(Path(figure).stat().st_size > 2000 for figure in figures)
    # A method is evaluated once.
    monkeypatch.setattr(evaluation, "accuracies", None)
    assert experiments.main(arguments) == [summary]
    assert json.loads(summary.read_text())["rows"] == told["rows"]
    # What was condensed can be read with only numpy.
    (folder,) = tmp_path.glob("xp_dataset_distillation/digits-echo-ipc2-*/seed1/condensed")
    images, labels, metadata = condensed_numpy.load(folder / "condensed.npz")
    assert images.shape == (20, 8, 8, 1)
    np.testing.assert_array_equal(labels, np.repeat(np.arange(10), 2))
    assert metadata["dataset"] == "digits"


def test_what_arguments_choose():
    arguments = experiments.Arguments(
        preset="paper", only=("order",), labels=("linear, factor 1", "Random"),
        images_per_class=(5,), dataset="kmnist", num_steps=7, held_out=3,
    )  # fmt: skip
    (group,) = experiments.chosen(arguments).values()
    methods = group.at(5)
    assert set(methods) == {"linear, factor 1", "Random"}
    for method in methods.values():
        assert (method.dataset, method.images_per_class, method.held_out) == ("kmnist", 5, 3)
    assert methods["linear, factor 1"].num_steps == 7
    for names, message in (
        ({"only": ("fashion",)}, "no group 'fashion'; there are 'fashion_mnist'"),
        ({"labels": ("nonsense",)}, "no method 'nonsense'"),
    ):
        with pytest.raises(ValueError, match=message):
            experiments.chosen(replace(arguments, **names))


def test_a_group_is_called_by_the_data_set_in_use(tmp_path):
    names = {"only": ("fashion_mnist", "order"), "preset": "paper"}
    assert list(experiments.chosen(experiments.Arguments(**names))) == ["fashion_mnist", "order"]
    chosen = experiments.chosen(experiments.Arguments(**names, dataset="kmnist"))
    assert list(chosen) == ["kmnist", "order_kmnist"]
    night = str(own_images(tmp_path / "night"))
    (name,) = experiments.chosen(experiments.Arguments(dataset=night))
    assert re.fullmatch("night-[0-9a-f]{8}", name)


@pytest.mark.parametrize("preset", ["quick", "paper", "hour", "gpu"])
def test_presets_compare_like_with_like(preset):
    for group in presets.presets(preset).values():
        assert group.evaluations
        for number in group.images_per_class:
            methods = group.at(number).values()
            condensed = [method for method in methods if isinstance(method, CondenseConfig)]
            assert len({(c.num_steps, c.real_batch, c.width, c.depth) for c in condensed}) == 1


def test_methods_and_evaluators_are_the_published_ones():
    assert (EVALUATORS["dm"].batch_size, EVALUATORS["dm"].milestones) == (256, (0.5,))
    assert (EVALUATORS["idc"].cutmix, EVALUATORS["wow"].optimizer) == (0.5, "adamw")
    assert {evaluator.num_epochs for evaluator in EVALUATORS.values()} == {1000}
    base = CondenseConfig()
    assert (base.num_steps, base.steps_per_network, base.real_batch) == (10_000, 5, 256)
    sizes = [replace(base, images_per_class=n).resolved_step_size((32, 32, 3)) for n in (1, 10, 20)]
    assert sizes == [1, 10, 20]
    assert base.resolved_step_size((8, 8, 1)) == 10 / 16
    assert replace(base, step_size=3.0).resolved_step_size((8, 8, 1)) == 3
    assert (dm(base).kernel, dm(base).factor, dm(base).sequential) == ("linear", 1, False)
    assert (mmdsw(base).momentum, mmdsw(base).step_size) == (0.9, 1.0)


def test_the_mean_of_a_straight_loss_lies_on_it():
    """Where every mean is that of the steps around it."""
    losses = 3.0 - 0.01 * np.arange(300)
    snapshots = np.zeros((2, 3, 1, 8, 8, 1), np.uint8)
    axis = plot.along(snapshots, np.array([0, 300]), losses).axes[1]
    shown = {line.get_label(): line.get_xydata().T for line in axis.lines}
    assert set(shown) == {"each step", "mean of 6 steps"}
    assert axis.get_legend() is not None
    steps, means = shown["mean of 6 steps"]
    np.testing.assert_allclose(means, 3.0 - 0.01 * steps)
    assert len(plot.along(snapshots, np.array([0, 9]), losses[:9]).axes[1].lines) == 1


def test_tables_by_hand():
    rows = [
        {"label": label, "images_per_class": number, "evaluator": "idc", "accuracies": values}
        for label, number, values in (
            ("ECHO", 1, [[0.5, 0.7], [0.6, 0.8]]),
            ("Random", 1, [[0.3, 0.5], [0.3, 0.5]]),
            ("whole set", None, [[0.8, 0.8]]),
            ("ECHO", 10, [[0.7, 0.9], [0.7, 0.9]]),
        )
    ]
    rows[3]["minutes"] = [20.2, 20.4]
    echo, random, whole, ten = tables.relative(rows)
    assert echo["over_random"] == pytest.approx(0.25)
    assert echo["share_of_whole"] == pytest.approx(0.65 / 0.8)
    assert (random["over_random"], whole["share_of_whole"], ten["over_random"]) == (0, 1, None)
    # Over sets .6 and .7: 65 ± 7.1; of one set over classifiers.
    assert tables.cell([[0.5, 0.7]]) == "60.0 ± 14.1"
    assert tables.cell([[0.5]]) == "50.0"
    summary = {"rows": rows, "seeds": [0, 1], "evaluated_on": "the test split"}
    (table,) = tables.tables(summary)
    heads = ["idc", "1 per class", "10 per class", "over Random", "of the whole set"]
    assert table.heads == [*heads, "minutes per set"]
    assert table.rows == [
        ["ECHO", "65.0 ± 7.1", "80.0 ± 0.0", "+25.0 / ", "81% / 100%", " / 20"],
        ["Random", "40.0 ± 0.0", "", "+0.0", "50%", ""],
        ["whole set", "80.0 ± 0.0", "", "", "100%", ""],
    ]
    del rows[3]["minutes"]
    assert tables.tables(summary)[0].heads == heads


@pytest.mark.slow
def test_the_linear_kernel_sees_only_means(tmp_path, capsys):
    arguments = checks.Mmd(num=150, dimension=4, repeats=20, results=tmp_path / "new")
    table = json.loads(checks.main(arguments).read_text())["table"]
    assert "| linear |" in capsys.readouterr().out
    for kernel, row in table.items():
        assert row["mean"] > 4, kernel
        assert row["equal"] == 0
    assert abs(table["linear"]["variance"]) < 2
    for kernel in ("gaussian", "energy", "polynomial"):
        assert table[kernel]["variance"] > 3
    assert table["gaussian"]["skewness"] > 3


def test_known_samples_have_the_moments_they_are_named_by():
    moments = {
        "equal": (0, 1, 0), "mean": (0.3, 1, 0), "variance": (0, 1.5, 0), "skewness": (0, 1, 2),
    }  # fmt: skip
    for which, (mean, variance, third) in moments.items():
        x = np.asarray(checks.known_samples(jax.random.key(0), which, 200_000, 1))
        measured = x.mean(), x.var(), np.mean((x - x.mean()) ** 3)
        np.testing.assert_allclose(measured, (mean, variance, third), atol=0.06)


@pytest.mark.slow
def test_the_check_of_moments(tmp_path):
    arguments = checks.Moments(
        kernels=("gaussian",), images_per_class=2, num_steps=40, step_size=0.1, width=8, depth=2,
        real_batch=32, augmentation="", num_networks=2, results=tmp_path,
    )  # fmt: skip
    told = json.loads(checks.run_moments(arguments).read_text())
    start, end = (told["rows"][name] for name in ("start", "gaussian"))
    assert set(start) == set(checks.MOMENTS)
    assert np.mean(end["order 1"]) < 0.8 * np.mean(start["order 1"])


@pytest.mark.parametrize("size", [slow(None), 6])
def test_an_exported_set_is_evaluated_as_its_method_is(size, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "EVALUATORS", {"short": SHORT.evaluator})
    method, options = replace(TINY, size=size, factor=2, start="mixed"), {"show_progress": False}
    stored = experiments.evaluate(method, SHORT, seed=0, results=tmp_path / "a", **options)
    (folder,) = tmp_path.glob("a/xp_dataset_distillation/digits-*/seed0/condensed")
    options = {"evaluators": ("short",), "num_networks": 2, "results": tmp_path}
    arguments = evaluate.Arguments(folder, **options)
    accuracies = evaluate.main(arguments)["short"]
    np.testing.assert_array_equal(accuracies, stored["accuracies"])
    assert (
        f"short: {100 * accuracies.mean():.1f}% of the test split, 2 classifiers, 2 epochs"
        in capsys.readouterr().out
    )
    monkeypatch.setattr(evaluation, "accuracies", None)  # it is stored
    run = replace(arguments, folder=folder.parent, epochs=2)
    np.testing.assert_array_equal(evaluate.main(run)["short"], accuracies)
    with pytest.raises(TypeError):  # another training
        evaluate.main(replace(arguments, epochs=3))
    with pytest.raises(ValueError, match="no evaluator 'nonsense'; there are 'short'"):
        evaluate.main(replace(arguments, evaluators=("nonsense",)))


@pytest.mark.slow
def test_a_set_of_own_images_is_evaluated_on_those_that_are_named(tmp_path):
    """Also where they are called as a named data set is."""
    run = condense.condense(
        replace(TINY, dataset=str(own_images(tmp_path / "digits"))), seed=0, results=tmp_path
    )
    arguments = evaluate.Arguments(run.folder, epochs=1, num_networks=1, results=tmp_path)
    with pytest.raises(ValueError, match="images of your own, called digits: pass --dataset PATH"):
        evaluate.main(arguments)
    given = replace(arguments, dataset=str(tmp_path / "digits"))
    assert evaluate.main(given)["idc"].shape == (1,)
    assert str(tmp_path) not in (run.folder / "condensed/metadata.json").read_text()


def test_published_options_are_further_names():
    """As our README prints them."""
    bases = {"echo": ("", condense.Arguments()), "dm": ("", dm(condense.Arguments()))}
    line = "echo --iterations 3 --lr 0.5 --iterations_per_network 2 --dialect dsa"
    parsed = tyro.extras.overridable_config_cli(bases, args=line.split())
    assert (parsed.num_steps, parsed.step_size) == (3, 0.5)
    assert (parsed.steps_per_network, parsed.strategy) == (2, "dsa")
    assert tyro.cli(checks.Check, args=["moments", "--iterations", "7"]).num_steps == 7
    assert tyro.cli(experiments.Arguments, args=["--iterations", "7"]).num_steps == 7
