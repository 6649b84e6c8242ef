"""Labels of particles against POT's transport and SciPy's assignment."""

from itertools import permutations

import hypothesis
import hypothesis.strategies as st
import numpy as np
import ot
import pytest
from hypothesis.extra.numpy import arrays
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from strategies import normal

from xp_transfer_learning.labels import agreement, class_costs, label_particles, match_classes

seeds = hypothesis.given(st.integers(0, 2**31))
few = hypothesis.settings(max_examples=20, deadline=None)


def transported_shares(x, y):
    """Share of its mass that each point of x sends to each of y."""
    return len(x) * ot.emd([], [], cdist(x, y, "sqeuclidean"))


def transport_cost(x, y):
    return np.mean(np.sum(transported_shares(x, y) * cdist(x, y, "sqeuclidean"), axis=1))


@pytest.mark.parametrize(("n", "k"), [(5, 5), (2, 4), (6, 4), (3, 7), (1, 1), (4, 1), (1, 4)])
def test_class_costs_are_those_of_optimal_transport(n, k):
    x, y = normal(0, 3, n, 2), 1 + normal(1, 2, k, 2)
    costs = class_costs(x, y)
    np.testing.assert_allclose(costs, [[transport_cost(a, b) for b in y] for a in x], rtol=1e-12)
    np.testing.assert_allclose(class_costs(y, x), costs.T, rtol=1e-12)


def test_class_costs_are_computed_in_float64():
    """Far from the origin, float32 squares would lose every digit of these distances."""
    x = (1000 + normal(0, 2, 4, 3)).astype("f")
    costs = class_costs(x, x + np.float32(0.25))
    np.testing.assert_allclose(np.diagonal(costs), 3 / 16, rtol=1e-6)


@few
@hypothesis.given(arrays(float, (4, 4), elements=st.floats(0, 1e4)))
def test_a_matching_is_the_cheapest_permutation(costs):
    match = match_classes(costs)
    assert sorted(match) == [0, 1, 2, 3]
    cheapest = costs[linear_sum_assignment(costs)].sum()
    np.testing.assert_allclose(costs[range(4), match].sum(), cheapest, rtol=1e-9, atol=1e-9)


@few
@seeds
def test_matching_with_more_source_classes_fills_every_target(seed):
    costs = np.random.default_rng(seed).uniform(size=(4, 2))
    halves = [list(order) for order in set(permutations((0, 0, 1, 1)))]
    expected = min(halves, key=lambda order: costs[range(4), order].sum())
    np.testing.assert_array_equal(match_classes(costs), expected)


def test_matching_with_more_target_classes_takes_the_largest_share():
    """Each of 2 classes fills 1.5 of 3: one target entirely, and half of the one in the middle."""
    costs = np.array([[4.0, 1, 0], [0, 1, 4]])
    np.testing.assert_array_equal(match_classes(costs), [2, 0])
    np.testing.assert_array_equal(match_classes(np.ones((1, 3)) * [[3, 1, 2]]), [0])
    np.testing.assert_array_equal(match_classes(np.array([[3.0], [1]])), [0, 0])


@pytest.mark.parametrize("labelling", ["transport", "particles"])
@pytest.mark.parametrize(("n", "k"), [(5, 5), (6, 2), (4, 1), (1, 3), (3, 5)])
@few
@hypothesis.given(seed=st.integers(0, 2**31), order=st.permutations(range(4)))
def test_labels_are_those_of_classes_near_by(labelling, n, k, seed, order):
    rng = np.random.default_rng(seed)
    means = 10 * rng.permutation(np.stack(np.meshgrid(range(2), range(2)), -1).reshape(4, 1, 2))
    x, y = (means + rng.uniform(-1, 1, (4, points, 2)) for points in (n, k))
    labels = label_particles(x, y[np.argsort(order)], labelling)
    np.testing.assert_array_equal(labels, np.repeat(np.array(order)[:, None], n, axis=1))


def test_labels_by_transport_are_the_cheapest_matching():
    x, y = normal(0, 4, 6, 2), normal(1, 4, 5, 2)
    costs = [[transport_cost(a, b) for b in y] for a in x]
    _, expected = linear_sum_assignment(costs)
    assert list(expected) != [0, 1, 2, 3]
    np.testing.assert_array_equal(label_particles(x, y), np.tile(expected, (6, 1)).T)


@pytest.mark.parametrize(
    ("classes", "n", "num_targets", "k"), [(2, 3, 2, 3), (3, 4, 3, 2), (1, 2, 2, 3), (1, 4, 2, 7)]
)
def test_labels_by_particles_are_the_largest_shares_of_transport(classes, n, num_targets, k):
    x, y = normal(0, classes, n, 2), normal(1, num_targets, k, 2)
    shares = transported_shares(x.reshape(-1, 2), y.reshape(-1, 2))
    shares = shares.reshape(classes, n, num_targets, k).sum(axis=3)
    largest, second = np.sort(shares, axis=2)[..., :-3:-1].transpose(2, 0, 1)
    assert (largest > second + 1e-9).all()
    labels = label_particles(x, y, "particles")
    np.testing.assert_array_equal(labels, shares.argmax(axis=2))
    assert len(np.unique(labels)) > 1


def test_labels_by_axis_and_impossible_labellings():
    x, y = normal(0, 3, 2, 4), normal(1, 3, 5, 4)
    np.testing.assert_array_equal(label_particles(x, y, "axis"), [[0, 0], [1, 1], [2, 2]])
    with pytest.raises(ValueError, match="as many classes in both: 3 and 2"):
        label_particles(x, y[:2], "axis")
    with pytest.raises(ValueError, match="transport, axis or particles, not 'nearest'"):
        label_particles(x, y, "nearest")


@seeds
@few
def test_agreement_is_the_share_of_labels_of_the_nearest_point(seed):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(3, 5, 2)), rng.normal(size=(4, 2, 2))
    labels = rng.integers(4, size=(3, 5))
    nearest = cdist(x.reshape(15, 2), y.reshape(8, 2)).argmin(axis=1) // 2
    assert agreement(labels, x, y) == np.mean(labels.ravel() == nearest)
