"""Controls of the transfer: what each arm trains on, for how long, and how they are compared."""

import re

import numpy as np
import pytest

from xp_transfer_learning import controls
from xp_transfer_learning.config import METHODS, ROTATED, TrainingConfig, TransferConfig
from xp_transfer_learning.controls import Arguments, ControlsConfig, Draw, Place

SHAPE = (2, 2, 1)
CONFIG = ControlsConfig(
    TransferConfig("digits", ROTATED, 3, num_per_class=10, flow=METHODS["sliced_mmd"]),
    TrainingConfig(num_epochs=4, num_trainings=2),
)


def draw():
    """Two classes of ten source images that go from 0 to 1 (one too far), three target images."""
    start, end = np.zeros((2, 10, 4)), np.ones((2, 10, 4))
    end[0, 0] = 5.0
    return Draw(start, end, np.repeat([[1], [0]], 10, axis=1), np.full((2, 3, 4), 0.5), SHAPE)


def test_source_images_go_a_share_of_their_way():
    images, labels = controls.training_images(draw(), 0.25)
    assert images.shape == (6 + 20, *SHAPE)
    np.testing.assert_array_equal(labels, [0] * 3 + [1] * 3 + [1] * 10 + [0] * 10)
    np.testing.assert_array_equal(images[:6], 0.5)
    np.testing.assert_array_equal(images[6], 1.0)
    np.testing.assert_array_equal(images[7:], 0.25)


def test_no_share_is_no_source_image_and_balanced_repeats_the_others():
    images, labels = controls.training_images(draw(), None)
    assert images.shape == (6, *SHAPE)
    np.testing.assert_array_equal(labels, [0, 0, 0, 1, 1, 1])
    images, labels = controls.training_images(draw(), 1.0, balanced=True)
    assert len(images) == 3 * 6 + 20
    np.testing.assert_array_equal(labels[:12], [0, 0, 0, 1, 1, 1] * 2)


@pytest.mark.parametrize(("num_images", "epochs"), [(6, 4), (26, 4), (128, 2)])
def test_every_arm_takes_as_many_gradient_steps(monkeypatch, num_images, epochs):
    """Four epochs of all 2 (10 + 3) images are four batches; 128 images are two batches each."""
    seen = []

    def accuracies(*arguments, transform, **options):
        seen.append((arguments[4].num_epochs, transform is not None))
        return np.zeros(2)

    monkeypatch.setattr(controls, "accuracies", accuracies)
    images, labels = np.zeros((num_images, *SHAPE)), np.arange(num_images) % 2
    for augmented in (False, True):
        controls.train(CONFIG, images, labels, None, None, augmented=augmented, seed=0, mesh=None)
    assert seen == [(epochs, False), (epochs, True)]


def test_the_share_is_that_of_the_best_folds(monkeypatch, tmp_path):
    """Accuracy is read off the brightness: images that went half their way are best. Each fold
    leaves one image of every class out of flow and training."""
    kept = []

    def flowed(config, x0, x_tgt, seed, mesh, run=None):
        kept.append(np.asarray(x_tgt))
        end = np.asarray(x0) + 1
        return {"end": end, "labels": np.zeros(end.shape[:2], int), "losses": np.zeros(1)}

    def train(config, images, labels, test_images, test_labels, *, augmented, seed, mesh):
        assert (config.training.num_trainings, len(test_labels), augmented) == (1, 2, True)
        assert len(images) == 2 * 2 + 20
        return np.array([-abs(images[4:].mean() - 0.5)])

    x0, x_tgt = np.zeros((2, 10, 4)), np.arange(24.0).reshape(2, 3, 4)
    monkeypatch.setattr(controls, "data", lambda *_: (x0, x_tgt, SHAPE))
    monkeypatch.setattr(controls, "flowed", flowed)
    monkeypatch.setattr(controls, "train", train)
    assert controls.choose_share(CONFIG, 0, Place(tmp_path, None, None)) == 0.5
    assert [x.shape for x in kept] == [(2, 2, 4)] * 3
    np.testing.assert_array_equal(kept[1], x_tgt[:, [0, 2]])


def test_permuted_classes_flow_to_other_classes(tmp_path):
    flow = METHODS["sliced_mmd"].__class__("sliced_mmd", num_steps=2, num_directions=64)
    transfer = TransferConfig("digits", ROTATED, 3, num_per_class=4, size=28, flow=flow)
    config, place = ControlsConfig(transfer, TrainingConfig()), Place(tmp_path, None, None)
    plain, permuted = (
        controls.draw_of(config, 0, place, permuted=permuted) for permuted in (False, True)
    )
    np.testing.assert_array_equal(plain.x_tgt, permuted.x_tgt)
    apart = np.abs(plain.start[:, None] - permuted.start[None]).max(axis=(2, 3))
    order = apart.argmin(axis=0)
    assert sorted(order) == list(range(10)) != order.tolist()
    assert apart.min(axis=0).max() == 0
    again = controls.draw_of(config, 0, place)
    np.testing.assert_array_equal(again.end, plain.end)


def test_differences_are_paired_by_draw():
    """.6 and .8 against .5 and .6: more by 15 points, with the standard error 5."""
    common = {"source": "a", "target": "b", "k": 5}
    rows = [
        common | {"arm": controls.BASELINE, "shares": [np.nan] * 2,
                  "accuracies": [[0.4, 0.6], [0.6, 0.6]]},
        common | {"arm": "on the way", "shares": [0.5, 0.25],
                  "accuracies": [[0.6, 0.6], [0.7, 0.9]]},
    ]  # fmt: skip
    first, second = controls.table(rows).rows
    assert first[3:] == ["-", "55.0 ± 7.1", "-"]
    assert second[3:] == ["0.25, 0.5", "70.0 ± 14.1", "+15.0 ± 9.8"]


def test_unknown_arms_are_named():
    with pytest.raises(ValueError, match=re.escape("no arm 'arrive'; there are k images, ")):
        Arguments(arms=("arrive",))


@pytest.mark.slow
def test_the_quick_preset_ends_in_a_table(tmp_path, capsys):
    arguments = Arguments("quick", results=tmp_path, arms=("on the way, augmented", "arrived"))
    assert controls.main(arguments).exists()
    printed = capsys.readouterr().out
    assert len(re.findall(r"^\| digits → digits:rotated \| 2 \|", printed, re.MULTILINE)) == 3
    shares = {"0", "0.25", "0.5", "0.75", "1"}
    (chosen,) = re.findall(r"on the way, augmented \| ([\d.]+) \|", printed)
    assert chosen in shares
