"""Sorted columns, their permutation and their derivatives, against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lib.sliced_wasserstein import _sorting as sorting
from lib.sliced_wasserstein import sort_columns, sort_with_permutation

SIZES = (1, 2, 3, 7, 8, 17, 100)


def hard_columns(n, dtype=np.float32):
    """[2, n, 4]: random, ties, ascending, descending, -0.0 with 0.0, infinite, constant, spread."""
    rng = np.random.default_rng(n)
    columns = [
        rng.standard_normal(n),
        rng.integers(0, 3, n),
        np.arange(n),
        -np.arange(n),
        rng.choice([-0.0, 0.0], n),
        rng.choice([-np.inf, np.inf, 1.0, np.finfo(dtype).max], n),
        np.full(n, 2.5),
        rng.standard_normal(n) * 10.0 ** rng.integers(-30, 30, n),
    ]
    columns = np.stack(columns, axis=1).astype(dtype)
    return np.stack([columns[:, :4], columns[:, 4:]])


def check_sorted(x, values, permutation):
    values, permutation = np.asarray(values), np.asarray(permutation)
    assert values.dtype == x.dtype
    assert permutation.dtype == np.int32
    np.testing.assert_array_equal(values, np.sort(x, axis=-2))
    rows = np.broadcast_to(np.arange(x.shape[-2])[:, None], x.shape)
    np.testing.assert_array_equal(np.sort(permutation, axis=-2), rows)
    np.testing.assert_array_equal(np.take_along_axis(x, permutation, axis=-2), values)


@pytest.mark.parametrize("n", SIZES)
def test_network_sorts_every_kind_of_column(n):
    x = hard_columns(n)
    check_sorted(x, *sort_with_permutation(x))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("n", [5, 16])
def test_float64_stays_float64(n):
    x = hard_columns(n, np.float64)
    # Below float32's resolution.
    x[0, :, 0] = 1 + 1e-15 * np.random.default_rng(0).permutation(n)
    check_sorted(x, *sort_with_permutation(x))
    assert sort_columns(x).dtype == np.float64


def test_long_columns_take_the_platform_sort(monkeypatch):
    monkeypatch.setattr(sorting, "_by_network", None)
    monkeypatch.setattr(sorting, "LONGEST_NETWORK", 34)
    x = hard_columns(35)  # compiled nowhere else
    check_sorted(x, *sort_with_permutation(x))
    np.testing.assert_array_equal(sort_columns(x), np.sort(x, axis=-2))


@pytest.mark.parametrize("most", [1, 60, 100, 10**6])
def test_wide_matrices_are_cut_into_columns(monkeypatch, most):
    monkeypatch.setattr(sorting, "MOST_VALUES_A_PASS", most)
    x = np.concatenate([hard_columns(33), hard_columns(33)[::-1, :, :3]], axis=2)
    check_sorted(x, *sorting._by_network(jnp.asarray(x), True))
    np.testing.assert_array_equal(sorting._by_network(jnp.asarray(x), False)[0], np.sort(x, axis=1))


def test_columns_of_thousands():
    x = hard_columns(4097)
    check_sorted(x, *sort_with_permutation(x))


def test_nan_stays_in_its_column():
    x = hard_columns(16)
    x[0, 3, 1] = np.nan
    x[1, 5, 2] = -np.nan
    packed, permutation = map(np.asarray, sort_with_permutation(x))
    spoilt = np.isnan(x).any(axis=1)
    for values in (np.asarray(sort_columns(x)), packed):
        np.testing.assert_array_equal(np.isnan(values).any(axis=1), spoilt)
        for b, column in np.argwhere(~spoilt):
            expected = np.sort(x[b, :, column])
            np.testing.assert_array_equal(values[b, :, column], expected)
    np.testing.assert_array_equal(np.take_along_axis(x, permutation, axis=1), packed)


@pytest.mark.parametrize("shape", [(0, 5, 4), (3, 0, 4), (3, 5, 0)])
def test_nothing_to_sort_gives_nothing(shape):
    x = np.zeros(shape, np.float32)
    check_sorted(x, *sort_with_permutation(x))
    assert sort_columns(x).shape == shape


def test_vmap_over_any_axis():
    x = np.random.default_rng(1).standard_normal((5, 3, 4)).astype(np.float32)
    values, permutation = jax.vmap(sort_with_permutation, in_axes=1, out_axes=1)(x)
    check_sorted(x.swapaxes(0, 1), values.swapaxes(0, 1), permutation.swapaxes(0, 1))
    tangent = np.random.default_rng(2).standard_normal(x.shape).astype(np.float32)
    out = jax.vmap(lambda a, t: jax.jvp(sort_columns, (a,), (t,)), in_axes=1, out_axes=1)(
        x, tangent
    )
    order = np.argsort(x, axis=0)
    np.testing.assert_array_equal(out[0], np.take_along_axis(x, order, axis=0))
    np.testing.assert_array_equal(out[1], np.take_along_axis(tangent, order, axis=0))


@pytest.mark.parametrize("shape", [(5, 4), (2, 5, 4), (2, 1, 5, 4)])
def test_derivatives_carry_tangents_with_the_values(shape):
    rng = np.random.default_rng(3)
    x, tangent, cotangent = (rng.standard_normal(shape).astype(np.float32) for _ in range(3))
    order = np.argsort(x, axis=-2)
    values, moved = jax.jvp(sort_columns, (jnp.asarray(x),), (jnp.asarray(tangent),))
    np.testing.assert_array_equal(values, np.sort(x, axis=-2))
    np.testing.assert_array_equal(moved, np.take_along_axis(tangent, order, axis=-2))
    back = np.zeros_like(x)
    np.put_along_axis(back, order, cotangent, axis=-2)
    values, pull_back = jax.vjp(sort_columns, x)
    np.testing.assert_array_equal(values, np.sort(x, axis=-2))
    np.testing.assert_array_equal(pull_back(cotangent)[0], back)


def test_derivatives_of_the_values_with_their_permutation():
    rng = np.random.default_rng(3)
    x, tangent, cotangent = (
        jnp.asarray(rng.standard_normal((2, 5, 4)), jnp.float32) for _ in range(3)
    )
    order = np.argsort(x, axis=1)
    (values, rows), (moved, _) = jax.jvp(sort_with_permutation, (x,), (tangent,))
    check_sorted(np.asarray(x), values, rows)
    np.testing.assert_array_equal(moved, np.take_along_axis(np.asarray(tangent), order, axis=1))
    _, pull_back, rows = jax.vjp(sort_with_permutation, x, has_aux=True)
    np.testing.assert_array_equal(rows, order)
    back = np.zeros(x.shape, np.float32)
    np.put_along_axis(back, order, np.asarray(cotangent), axis=1)
    np.testing.assert_array_equal(pull_back(cotangent)[0], back)


def test_derivative_at_ties_is_that_of_a_permutation():
    x = np.zeros((2, 5, 4), np.float32)
    cotangent = np.random.default_rng(5).standard_normal(x.shape).astype(np.float32)
    back = np.asarray(jax.vjp(sort_columns, x)[1](cotangent)[0])
    np.testing.assert_array_equal(np.sort(back, axis=1), np.sort(cotangent, axis=1))
