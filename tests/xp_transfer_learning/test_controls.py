"""Controls of the transfer: what each arm trains on, for how long, and how they are compared."""

import dataclasses
import re

import jax
import numpy as np
import pytest

from xp_transfer_learning import controls
from xp_transfer_learning.config import ROTATED, FlowSettings, TrainingConfig, TransferConfig
from xp_transfer_learning.controls import (
    ARMS,
    BASELINE,
    SOURCE,
    Arguments,
    ControlsConfig,
    Draw,
    Held,
    Place,
    Task,
    Trainer,
)

SHAPE = (2, 2, 1)
TRAINER = Trainer(TrainingConfig(num_epochs=4, num_trainings=2), 26, 2, seed=0, mesh=None)
HELD = Held(np.zeros((1, *SHAPE)), np.zeros(1))


def draw(k=3):
    """Two classes of ten source images at 0, matched crosswise, with k target images each: .5 of
    the first class, .75 of the second."""
    x_tgt = np.broadcast_to(np.array([0.5, 0.75])[:, None, None], (2, k, 4))
    return Draw(np.zeros((2, 10, 4)), x_tgt, np.array([1, 0]), SHAPE)


def test_source_images_go_a_share_of_their_way_and_stay_in_range():
    end = np.ones((2, 10, 4))
    end[0, 0] = 5.0
    images, labels = controls.training_images(draw(), 0.25, end)
    assert images.shape == (3 * 6 + 20, *SHAPE)  # the target's three times: about half
    np.testing.assert_array_equal(labels, [0, 0, 0, 1, 1, 1] * 3 + [1] * 10 + [0] * 10)
    np.testing.assert_array_equal(images[:6, 0, 0, 0], [0.5] * 3 + [0.75] * 3)
    np.testing.assert_array_equal(images[18], 1.0)
    np.testing.assert_array_equal(images[19:], 0.25)


def test_without_a_share_there_is_no_source_image_and_at_0_no_end():
    images, labels = controls.training_images(draw(), None)
    assert images.shape == (6, *SHAPE)
    np.testing.assert_array_equal(labels, [0, 0, 0, 1, 1, 1])
    np.testing.assert_array_equal(controls.training_images(draw(), 0.0)[0][18:], 0)


@pytest.mark.parametrize(("num_images", "epochs"), [(6, 4), (26, 4), (128, 2)])
def test_every_arm_takes_as_many_gradient_steps(monkeypatch, num_images, epochs):
    """Four epochs of all 2 (10 + 3) images are four batches; 128 images are two batches each."""
    seen = []
    monkeypatch.setattr(controls, "train_networks", lambda *a, **_: seen.append(a[2].num_epochs))
    TRAINER(np.zeros((num_images, *SHAPE)), np.arange(num_images) % 2, "none")
    assert seen == [epochs]


@pytest.fixture
def trained(monkeypatch):
    """The (images, labels, augmentation) of every training, instead of one; accuracy is 1 where the
    source's images are in it, else .5."""
    seen = []

    def train(self, images, labels, augmentation, parameters=None):
        seen.append((images, np.asarray(labels), augmentation))
        return len(images)

    monkeypatch.setattr(Trainer, "__call__", train)
    monkeypatch.setattr(
        controls, "accuracies", lambda size, *_, **__: np.array([1.0 if size > 6 else 0.5])
    )
    return seen


def measure(name, **ends):
    return controls.measure(ARMS[name], draw(), HELD, TRAINER, ends, None)


def test_without_a_flow_a_source_image_goes_to_images_of_its_class(trained, tmp_path):
    measure("half of the way, no flow", random=task(tmp_path).random_end)
    ((images, labels, augmentation),) = trained
    assert augmentation == "affine"
    np.testing.assert_array_equal(images[18:, 0, 0, 0], 0.5 * np.where(labels[18:], 0.75, 0.5))


def test_permuted_classes_flow_to_their_permuted_targets(trained):
    flowed = []
    flow = lambda d: flowed.append(d.matched) or d.x0 + 1  # noqa: E731
    measure("half of the way, classes permuted", flow=flow)
    ((images, labels, _),) = trained
    np.testing.assert_array_equal(labels[18:], np.repeat(flowed[0], 10))
    np.testing.assert_array_equal(images[18:], 0.5)


def test_fine_tuning_starts_from_the_source_under_the_targets_labels(trained):
    measure("source, fine-tuned")
    (images, labels, _), (tuned, *_) = trained
    assert len(images) == 20
    np.testing.assert_array_equal(labels, [1] * 10 + [0] * 10)
    assert len(tuned) == 6


def test_auto_takes_what_is_best_on_images_left_out(trained):
    kept = []
    chosen = controls.choose(draw(), lambda x: kept.append(x) or np.array([0, 1]), TRAINER, 1.0)
    assert chosen == SOURCE  # the first with accuracy 1
    assert [x.shape for x in kept] == [(2, 2, 4)] * 3
    assert len(trained) == 3 * 5  # fine-tuning is two
    np.testing.assert_array_equal(trained[2][1][-20:], np.repeat([0, 1], 10))


@pytest.mark.parametrize(
    ("of_source", "name"), [((0.4, 0.9, 0.5), BASELINE), ((0.6, 0.7, 0.65), SOURCE)]
)
def test_auto_asks_for_a_gain_above_its_standard_error(monkeypatch, of_source, name):
    """Gains of -.1, .4, 0 are .1 ± .15 on average, of .1, .2, .15 they are .15 ± .03."""
    folds = iter(of_source)
    monkeypatch.setattr(
        controls, "measure", lambda arm, *_: np.array([next(folds) if arm == ARMS[SOURCE] else 0.5])
    )
    assert controls.choose(draw(), lambda x: np.array([0, 1]), TRAINER, 1.0) == name


@pytest.mark.parametrize(("p_value", "name"), [(0.5, SOURCE), (0.51, BASELINE)])
def test_auto_of_one_image_per_class_asks_whether_classes_correspond(trained, p_value, name):
    assert controls.choose(draw(1), lambda x: x, TRAINER, p_value) == name
    assert trained == []


def task(tmp_path, matching="images", steps=2, step_size=20.0):
    flow = FlowSettings(
        "sliced_mmd", num_steps=steps, step_size=step_size, num_directions=64, m=0.0
    )
    transfer = TransferConfig("digits", ROTATED, 3, num_per_class=4, size=28, flow=flow)
    training = TrainingConfig(num_epochs=1, num_trainings=1)
    return Task(ControlsConfig(transfer, training, matching), 0, Place(tmp_path, None, None))


def test_flows_of_other_matchings_are_other_flows(tmp_path):
    one = task(tmp_path)
    x0, x_tgt, shape = one.images()
    draws = [Draw(x0, x_tgt, np.roll(np.arange(10), shift), shape) for shift in (0, 1)]
    ends = [one.end_of_flow(draw) for draw in draws]
    assert np.abs(ends[0] - ends[1]).max() > 0.01
    np.testing.assert_array_equal(one.end_of_flow(draws[0]), ends[0])


def test_a_flow_of_features_couples_images(tmp_path, monkeypatch):
    """Features are the first pixel: half of each class has it near that of the first image."""
    monkeypatch.setattr(Task, "source_network", lambda _: None)
    monkeypatch.setattr(controls, "of_classes", lambda network, x, shape: x[:, :, :1])
    x0 = np.random.default_rng(0).random((2, 6, 4))
    x0[:, :, 0] = [[0.0, 1.0, 0.1, 0.9, 0.2, 0.8], [1.0, 0.9, 0.8, 0.2, 0.1, 0.0]]
    x_tgt = np.zeros((2, 2, 4))
    x_tgt[:, 1, 0], x_tgt[1, :, 1:] = 0.9, 0.5
    end = task(tmp_path, steps=100, step_size=0.2).end_by_features(
        Draw(x0, x_tgt, np.array([1, 0]), SHAPE)
    )
    np.testing.assert_array_equal(end[:, :, 0], 0.9 * (x0[:, :, 0] > 0.5))
    np.testing.assert_array_equal(end[:, :, 1], np.repeat([[0.5], [0.0]], 6, axis=1))


@pytest.mark.slow
def test_the_sources_network_is_read_back_as_it_was(tmp_path):
    first, again = (task(tmp_path).source_network() for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, again)


def test_matching_by_number_needs_as_many_classes(tmp_path):
    x = np.zeros((3, 2, 4))
    one = task(tmp_path, "number")
    np.testing.assert_array_equal(one.match(x, x, SHAPE)[0], [0, 1, 2])
    with pytest.raises(ValueError, match=r"both: 3 and 2; use --matching features"):
        one.match(x, x[:2], SHAPE)


def test_differences_are_paired_by_draw():
    """.6 and .8 against .5 and .6: more by 15 points, with the standard error 5."""
    common = {"source": "a", "target": "b", "k": 5}
    rows = [
        common | {"arm": BASELINE, "accuracies": [[0.4, 0.6], [0.6, 0.6]]},
        common | {"arm": "auto", "accuracies": [[0.6, 0.6], [0.7, 0.9]], "chosen": [SOURCE] * 2},
    ]
    first, second = controls.table(rows).rows
    assert first[2:] == [BASELINE, "55.0 ± 7.1", "-"]
    assert second[2:] == ["auto: with the source 2x", "70.0 ± 14.1", "+15.0 ± 9.8"]


def test_unknown_arms_are_named():
    with pytest.raises(ValueError, match=re.escape("no arm 'arrive'; there are k images, ")):
        Arguments(arms=("arrive",))


@pytest.mark.slow
def test_the_quick_preset_ends_in_a_table(tmp_path, capsys):
    arguments = dataclasses.replace(Arguments("quick"), results=tmp_path)
    assert controls.main(arguments).exists()
    printed = capsys.readouterr().out
    rows = re.findall(
        r"^\| digits → digits:rotated \| 2 \| .* \| ([\d.]+) \|", printed, re.MULTILINE
    )
    assert len(rows) == len(ARMS)
    assert all(10 < float(row) <= 100 for row in rows)
