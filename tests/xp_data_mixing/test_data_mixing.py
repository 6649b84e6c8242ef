"""Mixing weights end to end: against cvxpy and loops in float64, as printed in the document, and
with bad input."""

import json
import logging
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import cvxpy
import jax
import numpy as np
import pytest
import torch
import tyro
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import pdist

from lib.rff import gaussian_frequencies
from lib.rows import as_rows
from lib.rows.files import open_rows
from lib.rows.fourier_means import row_blocks
from xp_data_mixing import report
from xp_data_mixing.block_moments import (
    Pooled,
    bootstrap_counts,
    exact_moments,
    feature_moments,
    grams,
    split_features,
)
from xp_data_mixing.mixing import FOLDS, estimate
from xp_data_mixing.mixing_warnings import find_warnings
from xp_data_mixing.mmd_data_mixing import (
    Arguments,
    MMDDataMixer,
    MMDDataMixerRBF,
    main,
    open_files,
)

REPOSITORY = Path(__file__).parents[2]
FOLDER = REPOSITORY / "xp_data_mixing"
KEY = jax.random.key(0)


def toy(seed=0, sizes=(40, 30, 50), mixture=(0.5, 0.3, 0.2), m=60, d=3, spread=2.0):
    """Gaussian sets around `spread` times fixed normal centres and their mixture, float64."""
    rng = np.random.default_rng(seed)
    centres = spread * np.random.default_rng(99).normal(size=(len(sizes), d))
    sets = [rng.normal(size=(n, d)) + c for n, c in zip(sizes, centres)]
    domain = rng.choice(len(sizes), p=mixture, size=m)
    return sets, rng.normal(size=(m, d)) + centres[domain]


def kernel(x, y, bandwidth):
    """By a loop over the rows of x."""
    return np.array([np.exp(-np.square(row - y).sum(1) / (2 * bandwidth**2)) for row in x])


def gram_by_hand(sets, target, bandwidth, *, unbiased=False):
    """Means of the kernel between sets and, last, the target; [N + 1, N + 1]."""
    groups = [*sets, target]
    gram = np.array([[kernel(x, y, bandwidth).mean() for y in groups] for x in groups])
    if unbiased:
        for i, x in enumerate(groups):
            k = kernel(x, x, bandwidth)
            gram[i, i] = (k.sum() - np.trace(k)) / (len(x) * (len(x) - 1))
    return gram


def mmd_by_hand(gram, w):
    return w @ gram[:-1, :-1] @ w - 2 * gram[:-1, -1] @ w + gram[-1, -1]


def cvxpy_weights(quadratic, linear, *, constraints=lambda w: (), extra=lambda w: 0):
    """argmin w'Aw - 2 b'w + extra over the simplex, by Clarabel to 1e-12."""
    w = cvxpy.Variable(len(linear))
    value = cvxpy.quad_form(w, cvxpy.psd_wrap(quadratic)) - 2 * linear @ w + extra(w)
    program = cvxpy.Problem(cvxpy.Minimize(value), [cvxpy.sum(w) == 1, w >= 0, *constraints(w)])
    tight = dict.fromkeys(("tol_gap_abs", "tol_gap_rel", "tol_feas"), 1e-12)
    program.solve(solver=cvxpy.CLARABEL, **tight)
    assert program.status == cvxpy.OPTIMAL
    return w.value


# Estimates


PRIOR = np.array([0.2, 0.2, 0.6])
CONSTRAINED = {
    "plain": ({}, {}),
    "bounds": (
        {"floors": [0, 0, 0.25], "caps": 0.45},
        {"constraints": lambda w: (w[2] >= 0.25, w <= 0.45)},
    ),
    "l2": (
        {"prior": PRIOR, "l2_pull": 0.05},
        {"extra": lambda w: 0.05 * cvxpy.sum_squares(w - PRIOR)},
    ),
    "kl": (
        {"prior": PRIOR, "kl_pull": 0.05},
        {"extra": lambda w: 0.05 * cvxpy.sum(cvxpy.kl_div(w, PRIOR))},
    ),
}


@pytest.mark.parametrize("case", CONSTRAINED)
def test_weights_of_random_features_against_cvxpy(case):
    """Own features in NumPy, with the frequencies that the key gives."""
    (sets, target), (options, by_cvxpy) = toy(), CONSTRAINED[case]
    found = estimate(KEY, sets, target, bandwidth=1.5, num_features=20, ridge=1e-4, **options)

    frequencies = np.asarray(gaussian_frequencies(jax.random.split(KEY, 5)[1], 20, 3), float)
    features = [
        np.concatenate([np.cos(x @ frequencies.T / 1.5), np.sin(x @ frequencies.T / 1.5)], axis=1)
        for x in [*sets, target]
    ]
    means = np.array([one.mean(axis=0) for one in features]) / np.sqrt(20)
    gram = means @ means.T
    expected = cvxpy_weights(gram[:3, :3] + 1e-4 * np.eye(3), gram[:3, 3], **by_cvxpy)
    np.testing.assert_allclose(found.weights, expected, rtol=0, atol=2e-6)
    assert found.gap < 1e-12
    mixtures = np.full(3, 1 / 3), np.array([40, 30, 50]) / 120, found.weights
    values = found.mmd_squared.uniform, found.mmd_squared.size_proportional
    values += (found.mmd_squared.optimal,)
    for mixture, value in zip(mixtures, values):
        difference = mixture @ means[:3] - means[3]
        np.testing.assert_allclose(value, difference @ difference, rtol=0, atol=1e-12)
    singles = np.square(means[:3] - means[3]).sum(axis=1)
    assert found.best_single == np.argmin(singles)
    np.testing.assert_allclose(found.mmd_squared.best_single, singles.min(), atol=1e-12)
    assert not jax.config.jax_enable_x64


@pytest.mark.parametrize("statistic", ["v", "u"])
def test_exact_weights_against_a_loop_and_cvxpy(statistic):
    sets, target = toy()
    found = estimate(
        KEY, sets, target, bandwidth=1.2, estimator="exact", statistic=statistic, ridge=0.0
    )
    gram = gram_by_hand(sets, target, 1.2, unbiased=statistic == "u")
    expected = cvxpy_weights(gram[:3, :3], gram[:3, 3])
    np.testing.assert_allclose(found.weights, expected, rtol=0, atol=1e-6)
    np.testing.assert_allclose(
        found.mmd_squared.optimal, mmd_by_hand(gram, found.weights), rtol=0, atol=1e-13
    )
    np.testing.assert_allclose(found.objective, found.mmd_squared.optimal, rtol=0, atol=1e-13)
    within = [gram_by_hand([x], x, 1.2, unbiased=True)[0, 0] for x in sets]
    np.testing.assert_allclose(found.kernel_mean, np.mean(within), rtol=1e-12)
    noise = [(1 - kernel(x, x, 1.2).mean()) / (len(x) - 1) for x in [*sets, target]]
    np.testing.assert_allclose(found.noise, noise, rtol=1e-11)


def test_held_out_mmd_by_hand():
    """Each fold's rows against all pairs of different rows in it, with the weights without it."""
    sets, target = toy(sizes=(21, 13, 15), m=17)
    found = estimate(KEY, sets, target, bandwidth=1.2, estimator="exact", statistic="u")
    block_key = jax.random.split(KEY, 5)[3]
    values = []
    for fold in range(FOLDS):
        held, kept = [], []
        for x in [*sets, target]:
            parts = np.array_split(np.asarray(jax.random.permutation(block_key, len(x))), FOLDS)
            held.append(x[parts[fold]])
            kept.append(x[np.concatenate([parts[f] for f in range(FOLDS) if f != fold])])
        gram = gram_by_hand(kept[:-1], kept[-1], 1.2, unbiased=True)
        expected = cvxpy_weights(gram[:3, :3] + 1e-5 * np.eye(3), gram[:3, 3])
        np.testing.assert_allclose(found.fold_weights[fold], expected, rtol=0, atol=1e-5)
        judge = gram_by_hand(held[:-1], held[-1], 1.2, unbiased=True)
        single = np.eye(3)[np.argmin([mmd_by_hand(gram, one) for one in np.eye(3)])]
        size = np.array([len(x) for x in kept[:-1]]) / sum(len(x) for x in kept[:-1])
        mixtures = np.full(3, 1 / 3), size, single, found.fold_weights[fold]
        values.append([mmd_by_hand(judge, one) for one in mixtures])
    np.testing.assert_allclose(found.held_out, np.mean(values, axis=0), rtol=0, atol=1e-12)


def test_held_out_frequencies_are_fresh():
    sets, target = toy(sizes=(1000,) * 3, m=1000)  # whose folds differ little from each other
    few = estimate(KEY, sets, target, bandwidth=1.5, num_features=1, check_features=1)
    many = estimate(KEY, sets, target, bandwidth=1.5, num_features=1, check_features=2000)
    exact = estimate(KEY, sets, target, bandwidth=1.5, estimator="exact")
    np.testing.assert_allclose(few.weights, many.weights, rtol=0, atol=1e-12)
    # With one frequency any 3 means lie in a plane: fitted they look fine, on fresh ones not.
    assert many.mmd_squared.optimal < 1e-3 < many.held_out.optimal
    np.testing.assert_allclose(many.held_out.uniform, exact.held_out.uniform, rtol=0.25)


@pytest.mark.parametrize("options", [{}, {"statistic": "u"}, {"prior": PRIOR, "l2_pull": 0.01}])
def test_marginal_values_are_rises_without_the_set(options):
    sets, target = toy(mixture=(0.6, 0.4, 0.0))
    options = {"bandwidth": 1.5, "num_features": 50, "check_features": 0, **options}
    found = estimate(KEY, sets, target, **options)
    for i in range(3):
        # A cap of 0 is the same problem without the set.
        without = estimate(KEY, sets, target, caps=np.arange(3) != i, **options)
        rise = without.objective - found.objective
        np.testing.assert_allclose(found.marginal_values[i], rise, rtol=0, atol=1e-12)
        if "prior" not in options:
            rest = [x for j, x in enumerate(sets) if j != i]
            left = estimate(KEY, rest, target, **options)
            np.testing.assert_allclose(left.objective, without.objective, rtol=0, atol=1e-10)
    assert max(found.marginal_values) > 1e-2


def test_one_set():
    sets, target = toy()
    found = estimate(KEY, sets[:1], target, bandwidth=1.5, num_features=20, bootstrap=5)
    np.testing.assert_array_equal(found.weights, [1.0])
    np.testing.assert_array_equal(found.intervals, [[1.0, 1.0]])
    assert np.isinf(found.marginal_values[0])
    assert found.undetermined == 0


@settings(max_examples=10, deadline=None)
@given(order=st.permutations(range(3)), statistic=st.sampled_from(["v", "u"]))
def test_weights_permute_with_the_sets(order, statistic):
    sets, target = toy()
    options = {"bandwidth": 1.5, "num_features": 20, "statistic": statistic, "check_features": 0}
    found = estimate(KEY, sets, target, **options)
    permuted = estimate(KEY, [sets[i] for i in order], target, **options)
    np.testing.assert_allclose(permuted.weights, found.weights[list(order)], rtol=0, atol=1e-9)


def test_a_set_split_in_two_gets_the_same_total():
    sets, target = toy(sizes=(400,) * 3, m=600)
    options = {"bandwidth": 2.0, "num_features": 100, "check_features": 0, "statistic": "u"}
    whole = estimate(KEY, sets, target, **options)
    split = estimate(KEY, [sets[0][::2], sets[0][1::2], *sets[1:]], target, **options)
    # How the two halves differ is noise, of which the total takes a little.
    np.testing.assert_allclose(split.weights[:2].sum(), whole.weights[0], atol=0.02)
    # Of U-statistics the pair of a row and its copy is not known to be one: so V.
    options["statistic"] = "v"
    twice = estimate(KEY, [sets[0], *sets], target, ridge=0.0, **options)
    alone = estimate(KEY, sets, target, ridge=0.0, **options)
    np.testing.assert_allclose(twice.weights[:2].sum(), alone.weights[0], rtol=0, atol=1e-8)
    assert any("ill-conditioned" in warning for warning in twice.warnings)


# Blocks and intervals


@pytest.mark.parametrize("kind", ["rff", "exact"])
def test_counted_blocks_are_weighted_rows(kind):
    (sets, target), num_blocks = toy(sizes=(17, 6, 3), m=11), 7
    groups = [*sets, target]
    samples = [as_rows(x, f"group {i}") for i, x in enumerate(groups)]
    if kind == "exact":
        found = exact_moments(KEY, samples, 1.3, num_blocks=num_blocks)
        blocks = []
        for x in groups:
            order, of_row = np.asarray(jax.random.permutation(KEY, len(x))), np.zeros(len(x), int)
            for b, part in enumerate(np.array_split(order, min(num_blocks, len(x)))):
                of_row[part] = b
            blocks.append(of_row)
        products = [[kernel(x, y, 1.3) for y in groups] for x in groups]
    else:
        frequencies = gaussian_frequencies(jax.random.key(5), 12, 3)
        found = feature_moments(KEY, samples, frequencies, 1.3, num_blocks=num_blocks)
        found, others = split_features(found, 10)
        assert others.sums.shape == (4, 7, 4)
        blocks = [np.asarray(row_blocks(KEY, 0, len(x), num_blocks)) for x in groups]
        angles = [x @ np.asarray(frequencies, float)[:10].T / 1.3 for x in groups]
        features = [np.concatenate([np.cos(a), np.sin(a)], axis=1) / np.sqrt(10) for a in angles]
        products = [[x @ y.T for y in features] for x in features]
    np.testing.assert_array_equal(
        found.sizes, [np.bincount(of_row, minlength=num_blocks) for of_row in blocks]
    )
    counts = np.random.default_rng(1).integers(1, 4, size=(3, 4, num_blocks)).astype(float)
    for one, gram in zip(counts, grams(found, counts)):
        weights = [of_block[of_row] for of_block, of_row in zip(one, blocks)]
        weights = [w / w.sum() for w in weights]
        expected = [[u @ k @ v for v, k in zip(weights, row)] for u, row in zip(weights, products)]
        np.testing.assert_allclose(gram, expected, rtol=0, atol=1e-7 if kind == "rff" else 1e-13)


def test_draws_vary_as_much_as_means_do():
    """The mean square of mu* - mu is the noise (1 - A_ii) / (n_i - 1) where blocks are rows."""
    sets, target = toy(sizes=(9, 6), mixture=(0.5, 0.5), m=7)
    samples = [as_rows(x, "a group") for x in (*sets, target)]
    moments = exact_moments(KEY, samples, 1.3, num_blocks=9)
    counts = bootstrap_counts(np.random.default_rng(0), moments, 4000)
    assert np.all(counts.sum(axis=2) == [8, 5, 6])
    assert np.all(counts[:, ~moments.filled] == 0)
    (gram,) = grams(moments, moments.filled[None].astype(float))
    drawn = np.mean([np.diag(one) for one in grams(moments, counts)], axis=0)
    noise = (1 - np.diag(gram)) / (np.array([9, 6, 7]) - 1)
    np.testing.assert_allclose(drawn - np.diag(gram), noise, rtol=0.06)


def test_the_targets_own_noise_is_in_the_intervals():
    """Far apart sets: the weight is a share of m rows, whose normal interval is known."""
    sets, target = toy(sizes=(2000, 2000), mixture=(0.4, 0.6), m=100, spread=30.0)
    found = estimate(
        KEY, sets, target, bandwidth=5.0, num_features=200, bootstrap=400, check_features=0
    )
    share = found.weights[0]
    assert 0.3 < share < 0.5
    expected = 2 * 1.645 * np.sqrt(share * (1 - share) / 100)
    np.testing.assert_allclose(np.diff(found.intervals), expected, rtol=0.2)
    np.testing.assert_allclose(found.intervals.mean(axis=1), found.weights, atol=0.02)


@pytest.mark.parametrize("mixture", [(0.5, 0.3, 0.2), (0.6, 0.4, 0.0)])
def test_intervals_cover_the_truth(mixture):
    """At a level of .9, over 40 draws of sets and target; not by being wide."""
    covered, widths = [], []
    for seed in range(40):
        sets, target = toy(seed, sizes=(150,) * 3, mixture=mixture, m=150)
        found = estimate(
            jax.random.key(seed), sets, target, bandwidth=2.0, num_features=40, statistic="u",
            bootstrap=60, num_blocks=30, check_features=0, ridge=0.0,
        )  # fmt: skip
        low, high = found.intervals.T
        assert np.all((low <= found.weights) & (found.weights <= high))
        covered.append((low <= np.array(mixture) + 1e-9) & (mixture <= high + 1e-9))
        widths.append(high - low)
    # 40 draws of .9 lie within .9 +- 2.5 * .047.
    assert np.all(np.mean(covered, axis=0) > 0.78)
    assert 0.83 < np.mean(covered) < 0.99
    assert np.max(np.mean(widths, axis=0)) < 0.25


def unequal(seed, rows):
    """Four overlapping Gaussians, one of them with few rows, and a target of equal shares."""
    rng, sizes = np.random.default_rng(seed), (rows, 1000, 1000, 1000)
    centres = np.random.default_rng(99).normal(size=(4, 3))
    sets = [rng.normal(size=(n, 3)) + centre for n, centre in zip(sizes, centres)]
    return sets, rng.normal(size=(1000, 3)) + centres[rng.choice(4, p=[0.25] * 4, size=1000)]


@pytest.mark.slow
def test_intervals_cover_the_truth_beside_one_small_set():
    """Percentiles and their reflections alone cover .88, .92, .79 and .95."""
    covered = []
    for seed in range(150):
        sets, target = unequal(seed, 30)
        found = estimate(
            jax.random.key(seed), sets, target, statistic="u", bootstrap=200, num_features=300,
            check_features=0,
        )  # fmt: skip
        covered.append(np.abs(found.intervals - 0.25).sum(axis=1) <= np.diff(found.intervals)[:, 0])
    # 150 draws of .9 lie within .9 +- 2.5 * .0245.
    assert np.all(np.mean(covered, axis=0) > 0.9 - 2.5 * np.sqrt(0.9 * 0.1 / 150))


@pytest.mark.parametrize("statistic", ["u", "v"])
def test_signal_over_noise_of_two_sets_by_hand(statistic):
    sets, target = toy(sizes=(15, 40), mixture=(0.5, 0.5))
    found = estimate(KEY, sets, target, bandwidth=2.0, estimator="exact", statistic=statistic)
    gram = gram_by_hand(sets, target, 2.0, unbiased=True)
    biased = gram_by_hand(sets, target, 2.0)
    signal = gram[0, 0] - 2 * gram[0, 1] + gram[1, 1]
    noise = np.trace(biased[:2, :2] - gram[:2, :2])
    np.testing.assert_allclose(found.signal_to_noise, [signal / noise], rtol=1e-4)


# Warnings


def has(result, words):
    return any(words in warning for warning in find_warnings(result))


def test_nothing_to_warn_of():
    sets, target = toy(sizes=(300,) * 3, m=300)
    found = estimate(KEY, sets, target, num_features=100, bootstrap=20)
    assert found.warnings == ()


@pytest.mark.parametrize(("bandwidth", "words"), [(100.0, "is wide"), (0.02, "is narrow")])
def test_saturated_kernels(bandwidth, words):
    sets, target = toy()
    found = estimate(KEY, sets, target, bandwidth=bandwidth, estimator="exact")
    assert has(found, "kernel saturated")
    assert has(found, words)


SPREADS = {
    "one row": (1, 0.0),
    "two equal rows": (2, 0.0),
    "equal rows": (40, 0.0),
    "rows": (40, 1),
}
"""(number of rows, standard deviation)"""


def spread_samples(kinds):
    """Samples of these kinds, their centers about 4 apart."""
    rng = np.random.default_rng(0)
    pairs = enumerate(SPREADS[kind] for kind in kinds)
    return [3 * np.eye(6)[i] + spread * rng.normal(size=(num, 6)) for i, (num, spread) in pairs]


@pytest.mark.parametrize(
    ("sets", "estimator"),
    [(("one row",), "rff"), (tuple(SPREADS), "rff"), (tuple(SPREADS), "exact")],
)
@pytest.mark.parametrize("target", ["one row", "equal rows", "rows"])
def test_sets_without_spread_are_called_that(sets, estimator, target):
    """They say nothing of sigma, which is about the distance between the sets' centers here."""
    *samples, drawn = spread_samples([*sets, target])
    found = estimate(KEY, samples, drawn, bandwidth=3.0, estimator=estimator, num_features=256)
    assert not has(found, "saturated")
    kinds = dict(zip([*found.names, "the target"], [*sets, target]))
    for words, kind in (
        ("a single row has no spread", "one row"),
        ("no spread: the rows", "equal"),
    ):
        (warning,) = [w for w in found.warnings if words in w] or [""]
        named = {name for name in kinds if name in warning}
        assert named == {name for name in kinds if kind in kinds[name]}
    known = [i for i, name in enumerate(sets) if name != "one row"]
    expected = np.diag(found.kernel_means)[known].mean() if known else np.nan
    np.testing.assert_allclose(found.kernel_mean, expected, rtol=1e-12)
    # What sampling explains of a single row is not known.
    assert has(found, "no mixture of these sets") == ("one row" not in (*sets, target))


def test_a_target_apart_from_sets_of_equal_rows_is_no_mixture():
    *samples, drawn = spread_samples(["equal rows", "rows", "equal rows"])
    found = estimate(KEY, samples[:1], drawn, bandwidth=3.0, estimator="exact")
    assert has(found, "no mixture of these sets")
    same = estimate(KEY, samples[:1], samples[0], bandwidth=3.0, estimator="exact")
    assert not has(same, "no mixture of these sets")


@pytest.mark.parametrize("kind", ["one row", "equal rows", "rows"])
@pytest.mark.parametrize("bandwidth", [1e5, 1e-3])
def test_a_bandwidth_that_is_far_off_is_said_of_any_sets(kind, bandwidth):
    *samples, drawn = spread_samples([kind] * 3)
    found = estimate(KEY, samples, drawn, bandwidth=bandwidth, estimator="exact")
    apart = kind == "equal rows" and bandwidth < 1  # they are points whatever sigma
    assert has(found, "kernel saturated") != apart
    assert has(found, '"auto" takes') != apart


def test_what_was_used_is_not_advised():
    """Of tight sets far apart the median distance is that between the sets."""
    samples = [0.01 * sample for sample in spread_samples(["rows"] * 3)]
    samples = [sample + i for i, sample in enumerate(samples)]
    found = estimate(KEY, samples[:2], samples[2], bandwidth="auto", estimator="exact")
    assert has(found, "give a smaller one")
    assert not has(found, '"auto" takes')


def test_sets_that_are_alike_warn():
    rng = np.random.default_rng(0)
    sets, target = [rng.normal(size=(40, 3)) for _ in range(4)], rng.normal(size=(20, 3))
    found = estimate(KEY, sets, target, bandwidth=1.5, estimator="exact", bootstrap=30)
    assert found.undetermined == 3
    assert has(found, "3 of 3 directions")
    assert has(found, "fewer than 30 rows: the target (20)")
    vertex = found._replace(weights=np.eye(4)[0], fold_weights=np.tile([0.5, 0.5, 0, 0], (5, 1)))
    assert has(vertex, "at a vertex by noise: all weight is on set 0")
    assert not has(found._replace(weights=np.full(4, 0.25)), "vertex")
    sure = vertex._replace(fold_weights=np.eye(4)[[0] * 5], replicates=np.zeros((0, 4)))
    assert not has(sure, "vertex")
    worse = found._replace(held_out=found.held_out._replace(uniform=-1.0))
    assert has(worse, "no better than equal ones")


@pytest.mark.parametrize(("rows", "warned"), [(30, True), (1000, False)])
def test_one_small_set_warns(rows, warned):
    """Though the mean of the noise over the sets is small."""
    found = estimate(KEY, *unequal(0, rows), statistic="u", num_features=100, check_features=0)
    assert has(found, f"set 0 ({rows} rows)") == has(found, "biased by noise") == warned
    assert (found.signal_to_noise[0] < 4) == warned


def test_a_target_that_is_no_mixture_warns():
    sets, _ = toy()
    far = np.random.default_rng(0).normal(size=(100, 3)) + 6
    assert has(estimate(KEY, sets, far, bandwidth=2.0, estimator="exact"), "no mixture of these")


# Files


@pytest.fixture
def files(tmp_path):
    """Training and validation files of a toy, in several formats and precisions."""
    sets, target = toy(sizes=(60, 50, 70), m=80)
    tensors = [torch.tensor(x, dtype=torch.float32) for x in sets]
    paths = [str(tmp_path / name) for name in ("train1.pt", "train2.npy", "train3.pt")]
    torch.save(tensors[0], paths[0])
    np.save(paths[1], tensors[1].numpy())
    torch.save({"gradients": tensors[2].to(torch.bfloat16)}, paths[2])
    val_paths = [str(tmp_path / f"val{i}.pt") for i in (1, 2)]
    for path, part in zip(val_paths, np.split(target, [30])):
        torch.save(torch.tensor(part, dtype=torch.float32), path)
    return paths, val_paths


def test_weights_of_files_are_those_of_arrays(files):
    train_paths, val_paths = files
    weights = MMDDataMixer().optimize_mixing_weights(train_paths, val_paths)
    assert list(weights) == train_paths
    assert all(type(weight) is float for weight in weights.values())
    assert abs(sum(weights.values()) - 1) < 1e-12
    assert "-0.0" not in str(weights)
    sets, target = toy(sizes=(60, 50, 70), m=80)
    sets[2] = torch.tensor(sets[2]).float().bfloat16().double().numpy()
    expected = estimate(
        jax.random.key(42), sets, target, bandwidth=3.0, num_features=100, ridge=1e-5
    )
    np.testing.assert_allclose(list(weights.values()), expected.weights, rtol=0, atol=1e-4)


def test_the_published_auto_sigma_is_the_median_of_a_sample(files, monkeypatch):
    opened = [file for side in open_files(*files) for file in side]
    rows = np.concatenate([file.take(range(file.shape[0])) for file in opened])
    found = MMDDataMixer(auto_sigma=True).mix(*files)  # of more rows than there are: all of them
    assert found.bandwidth == pytest.approx(np.median(pdist(rows)), rel=1e-5)
    assert MMDDataMixer(sigma_sample_size=8).mix(*files).bandwidth == 3.0

    def draw(key, groups, *, num_points):
        raise ValueError(f"{num_points} rows are drawn")

    monkeypatch.setattr("xp_data_mixing.mixing.streamed_median_bandwidth", draw)
    for options in ({"auto_sigma": True}, {"sigma_bandwidth": "auto"}):
        with pytest.raises(ValueError, match=r"^8 rows are drawn$"):
            MMDDataMixer(sigma_sample_size=8, **options).mix(*files)


def test_no_seed_is_a_seed_drawn_and_recorded(files):
    mixers = [MMDDataMixer(random_seed=None) for _ in range(3)]
    assert len({mixer.random_seed for mixer in mixers}) == 3
    assert all(0 <= mixer.random_seed < 2**31 for mixer in mixers)
    found = mixers[0].mix(*files).weights
    again = MMDDataMixer(random_seed=mixers[0].random_seed).mix(*files).weights
    np.testing.assert_array_equal(again, found)


def test_several_validation_files_are_pooled(files, tmp_path):
    train_paths, val_paths = files
    pooled = torch.cat([torch.load(path) for path in val_paths])
    torch.save(pooled, tmp_path / "pooled.pt")
    for kind in (MMDDataMixer, MMDDataMixerRBF):
        together = kind(check_features=0).mix(train_paths, [tmp_path / "pooled.pt"])
        apart = kind(check_features=0).mix(train_paths, val_paths)
        np.testing.assert_allclose(apart.weights, together.weights, rtol=0, atol=1e-6)
        assert apart.target_size == 80


def test_pooled_rows():
    parts = [as_rows(np.arange(12.0).reshape(-1, 2), "a"), as_rows(np.ones((3, 2)), "b")]
    whole = np.concatenate([part.array for part in parts])
    pooled = Pooled(parts)
    indices = np.array([8, 0, 5, 6])
    np.testing.assert_array_equal(pooled.take(indices), whole[indices])
    np.testing.assert_array_equal(np.concatenate(list(pooled.chunks(4, start=1))), whole[1:])
    assert (pooled.shape, pooled.dtype) == ((9, 2), "float64")


def test_random_features_approach_the_exact_kernel(files):
    options = {"sigma_bandwidth": 1.5, "check_features": 0}
    exact = MMDDataMixerRBF(**options).mix(*files).weights
    random = MMDDataMixer(rff_dimension=4000, **options).mix(*files).weights
    np.testing.assert_allclose(random, exact, atol=0.02)


def test_solvers_of_cvxpy(files):
    own = MMDDataMixer(check_features=0).mix(*files)
    other = MMDDataMixer(check_features=0, solver="CLARABEL").mix(*files)
    np.testing.assert_allclose(other.weights, own.weights, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="no solver 'NONE' here"):
        MMDDataMixer(solver="NONE").mix(*files)


def test_prior_and_caps_by_repetition(files):
    sizes = np.array([60, 50, 70]) / 180
    pulled = MMDDataMixer(prior="size", prior_strength=1e4).mix(*files).weights
    np.testing.assert_allclose(pulled, sizes, atol=1e-4)
    pulled = MMDDataMixer(prior=(0.1, 0.2, 0.7), prior_strength=1e4, pull="kl").mix(*files).weights
    np.testing.assert_allclose(pulled, [0.1, 0.2, 0.7], atol=1e-4)
    capped = MMDDataMixer(max_epochs=1.2).mix(*files).weights
    assert np.all(capped <= 1.2 * sizes + 1e-12)
    assert np.any(capped > 1.2 * sizes - 1e-12)
    capped = MMDDataMixer(max_epochs=1, total_rows=90).mix(*files).weights
    assert np.all(capped <= 2 * sizes + 1e-12)
    bounded = MMDDataMixer(floors=(0.3,), caps=(0.35, 0.35, 0.5)).mix(*files).weights
    assert bounded.min() >= 0.3
    assert np.all(bounded <= [0.35, 0.35, 0.5])


def test_debug_logging_says_what_was_read(files, caplog):
    with caplog.at_level(logging.DEBUG):
        MMDDataMixer(check_features=0).mix(*files)
    assert f"{files[0][2]}: 70 rows of 3, bfloat16" in caplog.text
    assert "condition number" in caplog.text


# Bad input


class Runs:
    """Its pickle runs code."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (Path(self.path),))


NAN = np.ones((20, 3), "f")
NAN[[4, 7, 9], 1] = np.nan
BAD = {
    "1-D": (torch.ones(5), "2-D array .* is needed, not the shape"),
    "3-D": (torch.ones(5, 3, 2), "2-D array .* is needed, not the shape"),
    "width": (torch.ones(5, 4), r"train1.pt has shape \(60, 3\), .*bad.pt has shape \(5, 4\)"),
    "empty": (torch.ones(0, 3), "bad.pt is empty"),
    "NaN": (torch.tensor(NAN), "bad.pt: NaN or infinity in 3 of 20 rows, the first is row 4"),
    "integer": (torch.ones(5, 3, dtype=torch.int32), "bad.pt.*dtype must be one of .* not int32"),
    "no tensor": ({"lr": 0.1}, "bad.pt holds no tensor"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_raise(files, tmp_path, case):
    contents, words = BAD[case]
    torch.save(contents, tmp_path / "bad.pt")
    for kind in (MMDDataMixer, MMDDataMixerRBF):
        with pytest.raises(ValueError, match=words):
            kind().mix([*files[0], str(tmp_path / "bad.pt")], files[1])
    with pytest.raises(ValueError, match=words):
        MMDDataMixer().mix(files[0], [str(tmp_path / "bad.pt")])


def test_a_pickle_with_code_is_refused_and_not_run(files, tmp_path):
    torch.save(Runs(tmp_path / "ran"), tmp_path / "bad.pt")
    with pytest.raises(ValueError, match="is refused: its pickle asks for more than tensors"):
        MMDDataMixer().mix([*files[0], tmp_path / "bad.pt"], files[1])
    assert not (tmp_path / "ran").exists()


def test_bad_paths_raise(files, tmp_path):
    train_paths, val_paths = files
    with pytest.raises(FileNotFoundError, match=r"no such file: .*absent\.pt"):
        MMDDataMixer().mix([*train_paths, tmp_path / "absent.pt"], val_paths)
    with pytest.raises(ValueError, match=r"the same file twice: .*train1\.pt"):
        MMDDataMixer().mix([*train_paths, train_paths[0]], val_paths)
    with pytest.raises(ValueError, match="the same file twice"):
        MMDDataMixer().mix(train_paths, [*val_paths, tmp_path / f"../{tmp_path.name}/train1.pt"])
    for paths in ([], train_paths[0]):
        with pytest.raises(ValueError, match="a list of training paths is needed"):
            MMDDataMixer().mix(paths, val_paths)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sigma_bandwidth": 0.0}, "sigma_bandwidth must be positive"),
        ({"sigma_bandwidth": -1.0}, "sigma_bandwidth must be positive"),
        ({"sigma_bandwidth": float("nan")}, "sigma_bandwidth must be positive"),
        ({"sigma_bandwidth": "median"}, "or auto, got 'median'"),
        ({"sigma_sample_size": 1}, r"integer in \[2, 10000\], .* got 1$"),
        ({"sigma_sample_size": 1e3}, "sigma_sample_size must be an integer .* got 1000.0"),
        ({"sigma_sample_size": 10**6}, "distances fit into memory, got 1000000"),
        ({"rff_dimension": 0}, "rff_dimension must be at least 1"),
        ({"ridge_penalty": -1e-5}, "ridge_penalty must lie in"),
        ({"statistic": "w"}, "statistic must be one of"),
        ({"bootstrap": -1}, "bootstrap >= 0"),
        ({"confidence": 1.0}, "confidence < 1"),
        ({"num_blocks": 1}, "num_blocks >= 2"),
        ({"pull": "l1"}, "pull must be l2 or kl"),
        ({"prior": "size"}, "no effect without a prior_strength"),
        ({"prior": (0.5, 0.5), "prior_strength": 1.0}, r"the prior must be \[3\]"),
        ({"caps": (0.2,)}, "no weights of sum 1: the caps sum to 0.6"),
        ({"floors": (0.4,)}, "no weights of sum 1: the floors sum to 1.2"),
        ({"caps": (0.5, 0.5)}, "caps: one number or 3 are needed, got 2"),
        ({"max_epochs": 0.5}, "0.5 epochs of 180 rows do not make 180 rows"),
        ({"total_rows": 10}, "no effect without max_epochs"),
    ],
)
def test_bad_options_raise_before_rows_are_read(files, monkeypatch, options, words):
    monkeypatch.setattr("lib.rows.files.RowFile._checked", None)
    monkeypatch.setattr("lib.rows.files.RowFile.stored_chunks", None)
    with pytest.raises(ValueError, match=words):
        MMDDataMixer(**options).mix(*files)


def test_a_single_row():
    sets, target = toy()
    sets[1] = sets[1][:1]
    found = estimate(KEY, sets, target, bandwidth=1.5, num_features=20, bootstrap=10)
    assert np.isfinite(found.intervals).all()
    assert found.held_out is None
    assert has(found, "fewer than 30 rows: set 1 (1)")
    with pytest.raises(ValueError, match="set 1 has one row: a U-statistic needs two"):
        estimate(KEY, sets, target, bandwidth=1.5, statistic="u")


# As printed in the document


SNIPPET = """\
from mmd_data_mixing import MMDDataMixer

# Initialize the mixer
mixer = MMDDataMixer(
    rff_dimension=100,
    sigma_bandwidth=3.0,
    ridge_penalty=1e-5,
    random_seed=42
)

# Define your gradient file paths
train_paths = [
    '/path/to/train_dataset1.pt',
    '/path/to/train_dataset2.pt',
    '/path/to/train_dataset3.pt'
]

val_paths = [
    '/path/to/val_dataset1.pt',
    '/path/to/val_dataset2.pt'
]

# Optimize mixing weights
results = mixer.optimize_mixing_weights(train_paths, val_paths)

# Print results
for path, weight in results.items():
    print(f"Dataset: {path} -> Weight: {weight:.4f}")
"""
COMMAND = """\
python mmd_data_mixing.py \\
    --train_paths /path/to/train1.pt /path/to/train2.pt /path/to/train3.pt \\
    --val_paths /path/to/val1.pt /path/to/val2.pt \\
    --rff_dimension 100 \\
    --sigma_bandwidth 3.0 \\
    --ridge_penalty 1e-5 \\
    --output_file results.json
"""


def run(command, cwd=FOLDER):
    """By bash, with this Python, and the repository importable as setting up makes it."""
    before = {"PATH": str(Path(sys.executable).parent), "PYTHONPATH": str(REPOSITORY)}
    environment = os.environ | {
        name: os.pathsep.join([first, os.environ.get(name, "")]) for name, first in before.items()
    }
    environment["JAX_COMPILATION_CACHE_DIR"] = str(jax.config.jax_compilation_cache_dir)
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.05"
    return subprocess.run(
        ["bash", "-c", command], cwd=cwd, env=environment, capture_output=True, text=True
    )


def save_toy(folder, names):
    sets, target = toy(sizes=(60, 50, 70), m=80)
    for name, rows in zip(names, [*sets, *np.split(target, 2)]):
        torch.save(torch.tensor(rows, dtype=torch.float32), folder / name)


def test_snippet_as_printed(tmp_path):
    names = [f"train_dataset{i}.pt" for i in (1, 2, 3)] + [f"val_dataset{i}.pt" for i in (1, 2)]
    save_toy(tmp_path, names)
    done = run(f"python -c {shlex.quote(SNIPPET.replace('/path/to', str(tmp_path)))}")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split(" -> ")[0] for line in lines] == [
        f"Dataset: {tmp_path / name}" for name in names[:3]
    ]
    assert abs(sum(float(line.split()[-1]) for line in lines) - 1) < 2e-4


@pytest.mark.parametrize("from_root", [False, True])
def test_command_as_printed(tmp_path, from_root):
    save_toy(tmp_path, [f"{name}.pt" for name in ("train1", "train2", "train3", "val1", "val2")])
    command = COMMAND.replace("/path/to", str(tmp_path))
    command = command.replace("results.json", str(tmp_path / "results.json"))
    if from_root:
        command = command.replace("mmd_data_mixing.py", "xp_data_mixing/mmd_data_mixing.py")
    done = run(command, cwd=REPOSITORY if from_root else FOLDER)
    assert done.returncode == 0, done.stderr
    check_document(tmp_path / "results.json", 3)


@pytest.mark.slow
def test_example_script_as_printed():
    done = run("python example_usage.py")
    assert done.returncode == 0, done.stderr
    for title in ("Basic usage", "Parameter tuning", "Real world usage"):
        assert f"{title}\n---" in done.stdout
    assert "Dataset: code         -> Weight: 0.5" in done.stdout


def test_bad_input_is_one_line_on_the_command_line(tmp_path):
    save_toy(tmp_path, ["train1.pt"])
    command = f"--train_paths {tmp_path}/train1.pt --val_paths {tmp_path}/absent.pt"
    done = run(f"python mmd_data_mixing.py {command}")
    assert done.returncode == 1
    assert done.stderr == f"FileNotFoundError: no such file: {tmp_path / 'absent.pt'}\n"


# Output


def check_document(path, num_sets):
    def refuse(constant):
        raise AssertionError(constant)

    document = json.loads(path.read_text(), parse_constant=refuse)
    ratios = document["mixing_ratios"]
    assert len(ratios) == num_sets
    assert abs(sum(row["weight"] for row in ratios.values()) - document["total_weight"]) < 1e-9
    assert abs(document["total_weight"] - 1) < 1e-12
    for row in ratios.values():
        assert row["percentage"] == pytest.approx(100 * row["weight"])
    wanted = {"experiment_name", "timestamp", "summary", "file_paths", "warnings", "manifest"}
    assert wanted <= set(document)
    assert [row["file_path"] for row in ratios.values()] == document["file_paths"]["train"]
    assert set(document["mmd_squared"]) == set(report.MIXTURES)
    assert not re.search(r"-0\.0+\b", path.read_text())
    return document


def command_line(*arguments):
    return main(tyro.cli(Arguments, args=[str(argument) for argument in arguments]))


def test_everything_on_the_command_line(files, tmp_path, capsys):
    train_paths, val_paths = files
    found = command_line(
        "--train_paths", *train_paths, "--val_paths", *val_paths,
        "--sigma_bandwidth", "auto", "--random_seed", 3, "--bootstrap", 20, "--confidence", 0.8,
        "--prior", 0.2, 0.3, 0.5, "--prior_strength", 1e-3, "--pull", "kl", "--floors", 0.05,
        "--caps", 0.9, 0.9, 0.5, "--max_epochs", 3, "--statistic", "u", "--solver", "CLARABEL",
        "--output_file", tmp_path / "out.json", "--report", tmp_path / "out.html",
    )  # fmt: skip
    document = check_document(tmp_path / "out.json", 3)
    rows = list(document["mixing_ratios"].values())
    np.testing.assert_array_equal([row["weight"] for row in rows], found.weights)
    np.testing.assert_array_equal([row["interval"] for row in rows], found.intervals)
    assert found.intervals[2, 1] <= 0.5
    assert found.intervals.min() >= 0.05
    assert document["manifest"]["sigma"] == found.bandwidth
    assert document["manifest"]["seed"] == 3
    assert document["manifest"]["files"][2]["dtype"] == "bfloat16"
    assert document["manifest"]["files"][0]["shape"] == [60, 3]
    assert len({file["content"] for file in document["manifest"]["files"]}) == (
        len(document["manifest"]["files"])
    )
    assert document["manifest"]["environment"]["versions"]["jax"] == jax.__version__
    assert "(intervals at 0.8)" in capsys.readouterr().out
    page = (tmp_path / "out.html").read_text()
    assert "data:image/png;base64," in page
    assert "http" not in page.replace("https://", "http").split("<details>")[0]
    assert not list(tmp_path.glob(".*"))


def test_one_set_and_a_strange_name(files, tmp_path, capsys):
    """With a seed that is drawn, printed and written."""
    strange = tmp_path / "<b>&.pt"
    Path(files[0][0]).rename(strange)
    command_line(
        "--train_paths", strange, "--val_paths", files[1][0], "--exact", "--random_seed", None,
        "--auto_sigma", "--sigma_sample_size", 20,
        "--output_file", tmp_path / "out.json", "--report", tmp_path / "out.html",
    )  # fmt: skip
    document = check_document(tmp_path / "out.json", 1)
    assert document["mixing_ratios"]["<b>&"]["weight"] == 1.0
    assert document["mixing_ratios"]["<b>&"]["marginal_value"] is None
    assert document["manifest"]["options"]["estimator"] == "exact"
    assert f"seed {document['manifest']['seed']}\n" in capsys.readouterr().out
    assert document["manifest"]["options"]["random_seed"] == document["manifest"]["seed"] >= 0
    page = (tmp_path / "out.html").read_text()
    assert "<b>" not in page
    assert "&lt;b&gt;&amp;" in page


def test_matrices_of_one_file(files, tmp_path):
    train = [next(iter(open_rows(path).chunks(99))) for path in files[0]]
    val = np.concatenate([next(iter(open_rows(path).chunks(99))) for path in files[1]])
    names = ["code", "web/2", "c:x"]
    np.savez(tmp_path / "all.npz", target=val, **dict(zip(names, train)))
    paths = [f"{tmp_path / 'all.npz'}:{name}" for name in names]
    target = f"{tmp_path / 'all.npz'}:target"
    out = tmp_path / "out.json"
    command_line("--train_paths", *paths, "--val_paths", target, "--output_file", out)
    document = json.loads(out.read_text())
    assert list(document["mixing_ratios"]) == ["all:code", "all:web/2", "all:c:x"]
    assert document["file_paths"] == {"train": paths, "validation": [target]}
    found = [row["weight"] for row in document["mixing_ratios"].values()]
    expected = MMDDataMixer().mix(files[0], [target]).weights
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match="the same file twice"):
        MMDDataMixer().mix(paths, [paths[1]])


def test_figure_alone_and_bad_outputs(files, tmp_path, monkeypatch):
    paths = "--train_paths", *files[0], "--val_paths", *files[1]
    command_line(*paths, "--report", tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes()[:4] == b"\x89PNG"
    monkeypatch.setattr(MMDDataMixer, "mix", None)  # not reached
    with pytest.raises(ValueError, match=r"the report must be one of \.html"):
        command_line(*paths, "--report", tmp_path / "report.docx")


def test_labels_tell_files_apart():
    assert report.labels(["a/x.pt", "b/y.pt"]) == ["x", "y"]
    assert report.labels(["a/x.pt", "b/x.pt"]) == ["a/x", "b/x"]
    assert report.labels(["x.pt", "x.npy"]) == ["x.pt", "x.npy"]
    assert report.labels(["a/x.npz:a.b", "a/x.npz:c/d"]) == ["x:a.b", "x:c/d"]
