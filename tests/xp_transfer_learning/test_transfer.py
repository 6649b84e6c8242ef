"""Transfer learning and domain adaptation, as their users run them, on the embedded digits."""

import dataclasses
import json
from functools import partial
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tyro
from cases import slow
from hypothesis import example, given
from hypothesis import strategies as st
from scripts import run_script

from lib.gd import wasserstein_gradient_descent
from xp_transfer_learning import ablation, domain_adaptation, methods, transfer
from xp_transfer_learning.config import (
    ABLATION,
    INVERTED,
    ROTATED,
    AdaptationConfig,
    FlowSettings,
    TrainingConfig,
    TransferConfig,
)

SHORT = {
    "mmdsw": FlowSettings(num_steps=40, num_directions=100, step_size=5.0),
    "otdd": FlowSettings("otdd", num_steps=3, step_size=0.1, decay=False, m=0.0, epsilon=0.05),
    "mmd_product": FlowSettings("mmd_product", num_steps=3, step_size=1.0, decay=False, noise=0.01),
    "target_only": FlowSettings("target_only", num_steps=0),
}


def config(method="mmdsw", k=2, target=ROTATED):
    return TransferConfig("digits", target, k, num_per_class=8, size=16, flow=SHORT[method])


def test_every_method_gets_the_same_draw_and_every_seed_its_own():
    x0, x_tgt, shape = transfer.data(0, config(), None)
    assert (x0.shape, x_tgt.shape, shape) == ((10, 8, 256), (10, 2, 256), (16, 16, 1))
    for method in SHORT:
        again = transfer.data(0, config(method), None)
        np.testing.assert_array_equal(again[0], x0)
        np.testing.assert_array_equal(again[1], x_tgt)
    other = transfer.data(1, config(), None)
    assert not np.array_equal(other[0], x0)
    assert not np.array_equal(other[1], x_tgt)
    # More shots begin with the fewer ones, so that curves over k compare like with like.
    np.testing.assert_array_equal(transfer.data(0, config(k=5), None)[1][:, :2], x_tgt)


@pytest.mark.parametrize("method", ["mmdsw", "otdd", slow("mmd_product")])
def test_flows_go_down_keep_the_images_shape_and_are_stored_once(tmp_path, monkeypatch, method):
    options = {"seed": 0, "results": tmp_path, "data_root": None}
    with jax.numpy_rank_promotion("allow"):  # ott relies on it
        stored = transfer.flow(config(method), **options)
    x0, x_tgt, _ = transfer.data(0, config(method), None)
    assert stored["particles"].shape == (len(stored["steps"]), 10, 8, 256)
    np.testing.assert_array_equal(stored["particles"][0], x0)
    np.testing.assert_array_equal(stored["x_tgt"], x_tgt)
    assert stored["losses"][-1] < stored["losses"][0]
    problem = methods.problem(SHORT[method], x0, x_tgt)
    np.testing.assert_array_equal(problem.points(problem.start), x0)
    monkeypatch.setattr(methods, "wasserstein_gradient_descent", None)
    again = transfer.flow(config(method), **options)
    np.testing.assert_array_equal(stored["particles"], again["particles"])
    assert not list(tmp_path.rglob("checkpoint.npz"))


def test_training_set_clips_and_labels():
    rng = np.random.default_rng(0)
    x_tgt = rng.uniform(size=(3, 2, 4)).astype(np.float32)
    training_set = partial(transfer.training_set, x_tgt=x_tgt, image_shape=(2, 2, 1))
    # Class c of the particles sits around class 2 - c of the target, partly outside [0, 1].
    particles = x_tgt[::-1].repeat(3, axis=1) + rng.normal(scale=0.01, size=(3, 6, 4))
    particles[0, 0] = [-1, 2, 0.5, 0.5]
    images, labels, right = training_set(particles, labelling="transport")
    np.testing.assert_array_equal(images[:6], x_tgt.reshape(6, 2, 2, 1))
    clipped = np.clip(particles.reshape(18, 2, 2, 1), 0, 1)
    np.testing.assert_allclose(images[6:], clipped, rtol=1e-6)
    np.testing.assert_array_equal(labels, [0, 0, 1, 1, 2, 2] + [2] * 6 + [1] * 6 + [0] * 6)
    # The particle thrown out of place may lie nearest to any class.
    assert right in (1, 17 / 18)
    images, labels, right = training_set(np.zeros((0, 0, 4)), labelling="transport")
    assert len(images) == len(labels) == 6
    assert np.isnan(right)
    # A whole class on one class of the target, none on that of its own number.
    for labelling, share in (("transport", 1), ("particles", 1), ("axis", 0)):
        assert training_set(x_tgt[[1, 2, 0]], labelling=labelling)[2] == share


@given(
    st.integers(1, 40), st.integers(1, 40), st.integers(1, 120), st.integers(1, 300),
    st.integers(1, 60),
)  # fmt: skip
@example(10, 10, 5, 200, 50)
@example(3, 26, 100, 200, 50)
def test_without_flowed_images_the_same_epochs_and_the_same_gradient_steps(
    of_source, of_target, k, n, epochs
):
    """Steps counted one by one: an epoch's batches begin at 0, 64, 128, ..."""

    def steps(images, epochs):
        return epochs * len(range(0, images, TrainingConfig.batch_size))

    arguments = transfer.Arguments(n_epochs_nn=epochs, num_per_class=n)
    num_classes = of_source, of_target
    same_epochs, same_steps = transfer.trainings("target_only", k, arguments, num_classes)
    (one,) = transfer.trainings("mmdsw", k, arguments, num_classes)
    assert same_epochs.num_epochs == one.num_epochs == epochs
    wanted = steps(of_target * k + of_source * n, epochs)
    shots = of_target * k
    assert steps(shots, same_steps.num_epochs) <= wanted < steps(shots, same_steps.num_epochs + 1)


def test_the_classes_that_count_are_those_of_the_data(tmp_path, monkeypatch):
    classes, asked = {"digits": range(10), "usps": range(3)}, []

    def run_try(config, training, **_):
        asked.append(training.num_epochs)
        return {"accuracies": np.zeros((1, 1)), "steps": np.zeros(1, int), "losses": []}

    def load(name, *_):
        return SimpleNamespace(class_names=classes[name])

    monkeypatch.setattr(transfer, "load", load)
    monkeypatch.setattr(transfer, "run_try", run_try)
    (tmp_path / transfer.EXPERIMENT).mkdir()
    arguments = transfer.Arguments(
        src_dataset="digits", tgt_dataset="usps", k_shot=(2,), results=tmp_path,
        method=("target_only",), num_per_class=20, n_epochs_nn=7, ntry=1,
    )  # fmt: skip
    transfer.run_table(arguments)
    # 6 images are a batch, 206 are four.
    assert asked == [7, 28]


@pytest.mark.slow
def test_accuracies_along_the_flow_end_with_that_of_its_end(tmp_path):
    training = TrainingConfig(num_epochs=1, num_trainings=2)
    options = {"seed": 0, "results": tmp_path, "data_root": None}
    along = transfer.run_try(config(), training, along=True, **options)
    end = transfer.run_try(config(), training, **options)
    assert along["accuracies"].shape == (len(along["steps"]), 2)
    assert along["steps"][-1] == end["steps"][0] == 40
    np.testing.assert_array_equal(along["accuracies"][-1], end["accuracies"][0])
    assert np.all((end["accuracies"] >= 0) & (end["accuracies"] <= 1))


def test_too_few_images_name_the_option():
    with pytest.raises(ValueError, match=r"fewer than the 999 asked for \(--k_shot\)"):
        transfer.data(0, config(k=999), None)
    with pytest.raises(ValueError, match=r"fewer than the 999 asked for \(--num_per_class\)"):
        domain_adaptation.data(0, AdaptationConfig(ROTATED, "digits", 999), None)


@pytest.mark.parametrize("command", [domain_adaptation, ablation])
def test_steps_of_a_flow_go_by_both_names(command):
    """Where there are no epochs of a network beside them."""
    for name in ("--n_epochs", "--n_epochs_wgd"):
        assert tyro.cli(command.Arguments, args=[name, "7"]).n_epochs_wgd == 7


@pytest.mark.slow
def test_flags_are_the_published_ones(tmp_path):
    flags = f"--src_dataset digits --tgt_dataset {INVERTED} --k_shot 2 --method mmdsw --ntry 2 "
    flags += "--n_epochs_wgd 3 --n_epochs_nn 1 --lr 0.5 --num_per_class 5 --size 16 "
    flags += f"--num_trainings 2 --results {tmp_path}"
    printed = run_script("xp_transfer_learning/transfer.py", *flags.split())
    (summary,) = tmp_path.glob("xp_transfer_learning/*.json")
    assert f"numbers: {summary}" in printed
    (row,) = json.loads(summary.read_text())["rows"]
    assert (row["method"], row["k"]) == ("mmdsw", 2)
    assert np.shape(row["accuracies"]) == (2, 1, 2)
    assert len(row["label_agreement"]) == 2
    assert all(0 <= share <= 1 for share in row["label_agreement"])
    assert (row["settings"]["num_steps"], row["settings"]["step_size"]) == (3, 0.5)
    assert row["training"]["num_epochs"] == 1


@pytest.mark.slow
def test_adaptation_reaches_the_classifiers_classes(tmp_path):
    settings = AdaptationConfig(
        ROTATED, "digits", num_per_class=30, size=28, flow=FlowSettings(num_steps=300), records=4,
        num_epochs=30,
    )  # fmt: skip
    run = domain_adaptation.run_try(settings, seed=0, results=tmp_path, data_root=None)
    stored = run.load_arrays()
    assert sorted(stored["matched"]) == list(range(10))
    assert stored["classifier_accuracy"] > 0.7
    assert stored["accuracies"][0] < 0.5
    assert stored["accuracies"][-1] > 0.95
    np.testing.assert_array_equal(stored["steps"], [0, 75, 150, 225, 300])


def test_images_too_small_for_the_network_are_refused_before_the_flow(tmp_path, monkeypatch):
    monkeypatch.setattr(methods, "wasserstein_gradient_descent", None)
    options = {"seed": 0, "results": tmp_path, "data_root": None}
    with pytest.raises(ValueError, match=r"at least 12 x 12, these have 11 x 11"):
        transfer.flow(dataclasses.replace(config(), size=11), **options)
    with pytest.raises(ValueError, match=r"these have 8 x 8"):
        domain_adaptation.run_try(AdaptationConfig(ROTATED, "digits", 5), **options)


def test_adaptation_keeps_the_target_and_draws_the_source_anew():
    settings = AdaptationConfig(INVERTED, "digits", num_per_class=5)
    (x0, x_tgt, shape), (x1, same, _) = (
        domain_adaptation.data(seed, settings, None) for seed in (0, 1)
    )
    assert shape == (8, 8, 1)
    np.testing.assert_array_equal(x_tgt, same)
    assert not np.array_equal(x0, x1)


def test_steps_to_an_objective_and_an_accuracy():
    losses = np.concatenate([np.ones(10), np.full(20, 0.5), np.full(20, 0.01)])
    losses[12] = 0.0  # one lucky draw does not count
    # A median of ten is small when six are: losses 30 to 35, that is after 36 steps.
    assert ablation.steps_to_objective(losses, 0.05) == 36
    assert ablation.steps_to_objective(losses, 0.001) is None
    steps, accuracies = np.array([0, 10, 20]), np.array([0.1, 0.99, 1.0])
    assert ablation.steps_to_accuracy(steps, accuracies, 0.99) == 10
    assert ablation.steps_to_accuracy(steps, accuracies[:1].repeat(3), 0.5) is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("option", "lr"),
    [("ours", 5.0), ("orthogonal directions", 5.0), ("Adam", 0.05), ("L-BFGS", 0.5)],
)
def test_every_kind_of_optimizer_goes_down(option, lr):
    settings = dataclasses.replace(ABLATION[option], num_steps=30, num_directions=100, step_size=lr)
    x0, x_tgt, _ = transfer.data(0, config(), None)
    problem = methods.problem(settings, x0, x_tgt)
    losses, _ = wasserstein_gradient_descent(
        problem.start, problem.target, problem.value_and_grad, jax.random.key(0), n_epochs=30,
        optimizer=methods.optimizer(settings), show_progress=False,
    )  # fmt: skip
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.slow
def test_the_ablation_runs_every_option_with_every_step_size(tmp_path):
    arguments = ablation.Arguments(
        ROTATED, "digits", num_per_class=6, size=16, n_epochs_wgd=4, ntry=2, options=("Adam",),
        lr=(0.5, 1.0), results=tmp_path,
    )  # fmt: skip
    summary = ablation.main(arguments)
    assert summary.stem.startswith("step_sizes")
    rows = json.loads(summary.read_text())["rows"]
    options = [(row["option"], row["settings"]["step_size"]) for row in rows]
    assert options == [("Adam", 0.5), ("Adam", 1)]
    for row in rows:
        assert len(row["to_objective"]) == len(row["last_losses"]) == 2
        assert row["seconds_per_step"] > 0
