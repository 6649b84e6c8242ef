"""Flow matching with a condition: the two-dimensional task, samples by class, the table."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xp_gmm_source import conditional
from xp_gmm_source.conditional import Arguments, ConditionalConfig, EightGaussians

KEY = jax.random.key(0)


def test_eight_gaussians_have_their_moments():
    """Mean 0, variance radius^2 / 2 + deviation^2 per coordinate; each center as often."""
    x = np.asarray(EightGaussians(jnp.asarray(5.0), jnp.asarray(0.3)).sample(KEY, 40_000))
    np.testing.assert_allclose(x.mean(axis=0), 0, atol=0.08)
    np.testing.assert_allclose(np.cov(x.T), (25 / 2 + 0.09) * np.eye(2), atol=0.2)
    nearest = np.rint(np.arctan2(x[:, 1], x[:, 0]) / (np.pi / 4)).astype(int) % 8
    np.testing.assert_allclose(np.bincount(nearest) / len(x), 1 / 8, atol=0.01)
    centers = 5 * np.stack([np.cos(nearest * np.pi / 4), np.sin(nearest * np.pi / 4)], axis=1)
    np.testing.assert_allclose((x - centers).std(axis=0), 0.3, atol=0.01)


def test_the_distance_of_a_shifted_sample_is_the_shift():
    x = np.random.default_rng(0).normal(size=(50, 2))
    shuffled = x[np.random.default_rng(1).permutation(50)] + [3.0, 4.0]
    assert conditional.w2_squared(x, shuffled) == pytest.approx(25)


def test_samples_are_of_their_class():
    """A network whose velocity is the label everywhere: x0 moves by it, in any number of steps."""

    class Label(conditional.ConditionalMLP):
        def __call__(self, images, times, labels):
            return jnp.broadcast_to(labels[:, None, None, None].astype(jnp.float32), images.shape)

    x0 = jax.random.normal(KEY, (3, 4, 2))
    network = Label(3, 1)
    for num in (1, 5):
        x1 = conditional.sampled(network, (1, 1, 2), {}, x0, num)
        np.testing.assert_allclose(x1, x0 + jnp.arange(3.0)[:, None, None], rtol=1e-5)
    path = conditional.paths(network, (1, 1, 2), {}, x0)
    assert path.shape == (3, conditional.PATH_STEPS + 1, 4, 2)
    np.testing.assert_allclose(path[:, -1], x1, rtol=1e-5)


def test_differences_are_paired_by_seed():
    """1 and 3 less 1 and 1 is 1 on average, with the standard error 1."""
    common = {"dataset": "moons", "euler": (5,), "about": {"floor": 0.1}}
    common |= {"straightness": [0.5, 0.5], "cost": [2.0, 2.0]}
    rows = [
        common | {"coupling": "optimal", "W2²": [[1.0], [3.0]]},
        common | {"coupling": "conditional", "W2²": [[1.0], [1.0]]},
    ]
    first, second = conditional.table(rows, "W2²").rows
    assert first == ["optimal", "2 ± 1 (+1 ± 2)", "0.5 ± 0", "2 ± 0"]
    assert second[:2] == ["conditional", "1 ± 0"]


def test_what_raises():
    with pytest.raises(ValueError, match="preset is one of quick, paper, got 'gpu'"):
        Arguments("gpu")
    with pytest.raises(ValueError, match="name it too"):
        Arguments(couplings=("optimal",))


@pytest.mark.slow
def test_transport_within_classes_needs_fewest_evaluations(tmp_path):
    """After 500 steps: with one evaluation nearer to each moon than the other couplings."""
    (path,) = conditional.main(Arguments(num_steps=500, results=tmp_path))
    rows = {row["coupling"]: row["W2²"][0][0] for row in json.loads(path.read_text())["rows"]}
    assert rows["conditional"] < 0.5 * min(rows["optimal"], rows["independent"])


@pytest.mark.slow
def test_images_have_classes_too(tmp_path, monkeypatch):
    config = ConditionalConfig(
        "digits", num_steps=3, batch_size=16, width=8, num_per_class=5, euler=(1, 2)
    )
    monkeypatch.setitem(conditional.PRESETS, "quick", (config,))
    arguments = Arguments(dataset="digits", couplings=("conditional",), results=tmp_path)
    (path,) = conditional.main(arguments)
    (row,) = json.loads(path.read_text())["rows"]
    assert np.shape(row["frechet"]) == np.shape(row["right"]) == (1, 2)
    assert row["about"]["right"] > 0.8
