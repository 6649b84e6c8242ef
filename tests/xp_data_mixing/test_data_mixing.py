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
from cases import slow
from kernel_oracles import gram_of_means
from mixture_oracles import cvxpy_weights
from scipy.spatial.distance import pdist

from lib.rff import gaussian_frequencies
from lib.rows import as_rows
from lib.rows.files import open_rows
from xp_data_mixing import report
from xp_data_mixing.block_moments import bootstrap_counts, exact_moments, grams
from xp_data_mixing.mixing import FOLDS, Bootstrap, Constraints, Kernel, estimate
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
    """Gaussian sources around `spread` times fixed normal centers and their mixture, float64."""
    rng = np.random.default_rng(seed)
    centers = spread * np.random.default_rng(99).normal(size=(len(sizes), d))
    sources = [rng.normal(size=(n, d)) + c for n, c in zip(sizes, centers)]
    domain = rng.choice(len(sizes), p=mixture, size=m)
    return sources, rng.normal(size=(m, d)) + centers[domain]


def run_estimate(
    sources, target, *, key=KEY, constraints=None, bootstrap=0, num_blocks=50, ridge=1e-5, **kernel
):
    """`estimate` with all options of the kernel by name, and those of the bootstrap."""
    return estimate(
        key,
        sources,
        target,
        kernel=Kernel(**kernel),
        constraints=constraints or Constraints(ridge),
        bootstrap=Bootstrap(bootstrap, 0.9, num_blocks),
    )


def mmd_by_hand(gram, w):
    return w @ gram[:-1, :-1] @ w - 2 * gram[:-1, -1] @ w + gram[-1, -1]


# Estimates


PRIOR = np.array([0.2, 0.2, 0.6])
CONSTRAINED = {
    "plain": ({}, {}),
    "bounds": (
        {"lower": [0, 0, 0.25], "upper": 0.45},
        {"constraints": lambda w: (w[2] >= 0.25, w <= 0.45)},
    ),
    "l2": (
        {"prior": PRIOR, "l2_penalty": 0.05},
        {"extra": lambda w: 0.05 * cvxpy.sum_squares(w - PRIOR)},
    ),
    "kl": (
        {"prior": PRIOR, "kl_penalty": 0.05},
        {"extra": lambda w: 0.05 * cvxpy.sum(cvxpy.kl_div(w, PRIOR))},
    ),
}


@pytest.mark.parametrize("case", CONSTRAINED)
def test_weights_of_random_features_against_cvxpy(case):
    """Own features in NumPy, with the frequencies that the key gives."""
    (sources, target), (options, by_cvxpy) = toy(), CONSTRAINED[case]
    constraints = Constraints(ridge=1e-4, **options)
    result = run_estimate(sources, target, constraints=constraints, bandwidth=1.5, num_features=20)
    frequencies = np.asarray(gaussian_frequencies(jax.random.split(KEY, 5)[1], 20, 3), float)
    means = [np.exp(1j * x @ frequencies.T / 1.5).mean(axis=0) for x in [*sources, target]]
    gram = np.real(np.array(means) @ np.conj(means).T) / 20
    expected = cvxpy_weights(gram[:3, :3] + 1e-4 * np.eye(3), gram[:3, 3], **by_cvxpy)
    np.testing.assert_allclose(result.weights, expected, rtol=0, atol=2e-6)
    assert result.gap < 1e-12
    best = np.argmin([mmd_by_hand(gram, vertex) for vertex in np.eye(3)])
    assert result.best_single == best
    mixtures = np.full(3, 1 / 3), np.array([40, 30, 50]) / 120, np.eye(3)[best], result.weights
    values = [mmd_by_hand(gram, mixture) for mixture in mixtures]
    np.testing.assert_allclose(result.mmd_squared, values, rtol=0, atol=1e-12)
    assert not jax.config.jax_enable_x64


@pytest.mark.parametrize("statistic", ["v", "u"])
def test_exact_weights_against_a_loop_and_cvxpy(statistic):
    sources, target = toy()
    options = {"bandwidth": 1.2, "estimator": "exact", "ridge": 0.0}
    result = run_estimate(sources, target, statistic=statistic, **options)
    groups = [*sources, target]
    biased, unbiased = (gram_of_means(groups, 1.2, unbiased=u) for u in (False, True))
    gram = unbiased if statistic == "u" else biased
    expected = cvxpy_weights(gram[:3, :3], gram[:3, 3])
    np.testing.assert_allclose(result.weights, expected, rtol=0, atol=1e-6)
    least = mmd_by_hand(gram, result.weights)
    np.testing.assert_allclose(result.mmd_squared.optimal, least, rtol=0, atol=1e-13)
    np.testing.assert_allclose(result.objective, result.mmd_squared.optimal, rtol=0, atol=1e-13)
    np.testing.assert_allclose(result.kernel_mean, np.diag(unbiased)[:3].mean(), rtol=1e-12)
    np.testing.assert_allclose(result.noise, np.diag(biased - unbiased), rtol=1e-11)
    between = np.array([[1, -1, 0], [0, 1, -1]])  # every change of weights of sum 1
    signal, noise = (between @ a[:3, :3] @ between.T for a in (unbiased, biased - unbiased))
    ratios = np.sort(np.linalg.eigvals(np.linalg.solve(noise, signal)))
    np.testing.assert_allclose(result.signal_to_noise, ratios, rtol=1e-9)


def test_held_out_mmd_by_hand():
    """Each fold's rows against all pairs of different rows in it, with the weights without it."""
    sources, target = toy(sizes=(21, 13, 15), m=17)
    result = run_estimate(sources, target, bandwidth=1.2, estimator="exact", statistic="u")
    block_key = jax.random.split(KEY, 5)[3]
    values = []
    for fold in range(FOLDS):
        held, fitted = [], []
        for x in [*sources, target]:
            parts = np.array_split(np.asarray(jax.random.permutation(block_key, len(x))), FOLDS)
            held.append(x[parts[fold]])
            fitted.append(np.delete(x, parts[fold], axis=0))
        gram, held_gram = (gram_of_means(rows, 1.2, unbiased=True) for rows in (fitted, held))
        expected = cvxpy_weights(gram[:3, :3] + 1e-5 * np.eye(3), gram[:3, 3])
        np.testing.assert_allclose(result.fold_weights[fold], expected, rtol=0, atol=1e-5)
        single = np.eye(3)[np.argmin([mmd_by_hand(gram, vertex) for vertex in np.eye(3)])]
        sizes = np.array([len(x) for x in fitted[:-1]])
        mixtures = np.full(3, 1 / 3), sizes / sizes.sum(), single, result.fold_weights[fold]
        values.append([mmd_by_hand(held_gram, mixture) for mixture in mixtures])
    np.testing.assert_allclose(result.held_out, np.mean(values, axis=0), rtol=0, atol=1e-12)


def test_held_out_frequencies_are_fresh():
    sources, target = toy(sizes=(1000,) * 3, m=1000)  # whose folds differ little from each other
    few, many = (
        run_estimate(sources, target, bandwidth=1.5, num_features=1, check_features=count)
        for count in (1, 2000)
    )
    exact = run_estimate(sources, target, bandwidth=1.5, estimator="exact")
    np.testing.assert_allclose(few.weights, many.weights, rtol=0, atol=1e-12)
    # With one frequency any 3 means lie in a plane: fitted they look fine, on fresh ones not.
    assert many.mmd_squared.optimal < 1e-3 < many.held_out.optimal
    np.testing.assert_allclose(many.held_out.uniform, exact.held_out.uniform, rtol=0.25)


@pytest.mark.parametrize(
    ("statistic", "penalty"), [("v", {}), ("u", {}), ("v", {"prior": PRIOR, "l2_penalty": 0.01})]
)
def test_leave_one_out_costs_are_rises_without_the_source(statistic, penalty):
    sources, target = toy(mixture=(0.6, 0.4, 0.0))
    options = {"bandwidth": 1.5, "num_features": 50, "check_features": 0, "statistic": statistic}
    result = run_estimate(sources, target, constraints=Constraints(**penalty), **options)
    for i, cost in enumerate(result.leave_one_out_costs):
        # An upper bound of 0 is the same problem without the source.
        bounded = Constraints(upper=np.arange(3) != i, **penalty)
        without = run_estimate(sources, target, constraints=bounded, **options).objective
        np.testing.assert_allclose(cost, without - result.objective, rtol=0, atol=1e-12)
        if not penalty:
            others = run_estimate([*sources[:i], *sources[i + 1 :]], target, **options)
            np.testing.assert_allclose(others.objective, without, rtol=0, atol=1e-10)
    assert max(result.leave_one_out_costs) > 1e-2


def test_a_source_split_in_two_gets_the_same_total():
    sources, target = toy(sizes=(400,) * 3, m=600)
    options = {"bandwidth": 2.0, "num_features": 100, "check_features": 0}
    whole = run_estimate(sources, target, statistic="u", **options)
    parts = [sources[0][::2], sources[0][1::2], *sources[1:]]
    split = run_estimate(parts, target, statistic="u", **options)
    # How the two halves differ is noise, of which the total takes a little.
    np.testing.assert_allclose(split.weights[:2].sum(), whole.weights[0], atol=0.02)
    # Of U-statistics the pair of a row and its copy is not known to be one: so V.
    twice = run_estimate([sources[0], *sources], target, ridge=0.0, **options)
    once = run_estimate(sources, target, ridge=0.0, **options)
    np.testing.assert_allclose(twice.weights[:2].sum(), once.weights[0], rtol=0, atol=1e-8)
    assert any("ill-conditioned" in warning for warning in twice.warnings)


# Blocks and intervals


def test_draws_vary_as_much_as_means_do():
    """The mean square of mu* - mu is the noise (1 - A_ii) / (n_i - 1) where blocks are rows."""
    sources, target = toy(sizes=(9, 6), mixture=(0.5, 0.5), m=7)
    samples = [as_rows(x, "a group") for x in (*sources, target)]
    moments = exact_moments(KEY, samples, 1.3, num_blocks=9)
    counts = bootstrap_counts(np.random.default_rng(0), moments, 4000)
    assert np.all(counts.sum(axis=2) == [8, 5, 6])
    assert np.all(counts[:, ~moments.filled] == 0)
    (gram,) = grams(moments, moments.filled[None].astype(float))
    drawn = np.mean([np.diag(resampled) for resampled in grams(moments, counts)], axis=0)
    noise = (1 - np.diag(gram)) / (np.array([9, 6, 7]) - 1)
    np.testing.assert_allclose(drawn - np.diag(gram), noise, rtol=0.06)


def intervals_of(num_draws, draw, **options):
    """Weights, lower and upper ends of draws from the seeds 0, 1, ...; each [num_draws, N]."""
    keys = [jax.random.key(seed) for seed in range(num_draws)]
    options |= {"statistic": "u", "check_features": 0}
    results = [run_estimate(*draw(seed), key=key, **options) for seed, key in enumerate(keys)]
    intervals = np.stack([result.intervals for result in results])
    return np.stack([result.weights for result in results]), intervals[..., 0], intervals[..., 1]


@pytest.mark.parametrize("mixture", [(0.6, 0.4, 0.0), slow((0.5, 0.3, 0.2))])
def test_intervals_cover_the_truth(mixture):
    """At a level of .9, over 40 draws of sources and target; not by being wide."""
    weights, low, high = intervals_of(
        40, lambda seed: toy(seed, sizes=(150,) * 3, mixture=mixture, m=150),
        bandwidth=2.0, num_features=40, ridge=0.0, bootstrap=60, num_blocks=30,
    )  # fmt: skip
    assert np.all((low <= weights) & (weights <= high))
    covered = (low <= np.array(mixture) + 1e-9) & (mixture <= high + 1e-9)
    # 40 draws of .9 lie within .9 +- 2.5 * .047.
    assert np.all(np.mean(covered, axis=0) > 0.78)
    assert 0.83 < np.mean(covered) < 0.99
    assert np.max(np.mean(high - low, axis=0)) < 0.25


def unequal(seed, rows):
    """Four overlapping Gaussians, one of them with few rows, and a target of equal shares."""
    return toy(seed, (rows, 1000, 1000, 1000), (0.25,) * 4, m=1000, spread=1.0)


@pytest.mark.slow
def test_intervals_cover_the_truth_beside_one_small_source():
    """Only percentiles and their reflections cover .88, .92, .79 and .95."""
    _, low, high = intervals_of(
        150, lambda seed: unequal(seed, 30), num_features=300, bootstrap=200
    )
    # 150 draws of .9 lie within .9 +- 2.5 * .0245.
    covered = np.mean((low <= 0.25) & (high >= 0.25), axis=0)
    assert np.all(covered > 0.9 - 2.5 * np.sqrt(0.9 * 0.1 / 150))


# Warnings


def has(result, words):
    return any(words in warning for warning in find_warnings(result))


def test_nothing_to_warn_of():
    sources, target = toy(sizes=(300,) * 3, m=300)
    assert run_estimate(sources, target, num_features=100, bootstrap=20).warnings == ()


def test_one_column_that_outweighs_the_others_is_named():
    """Units of three sizes and a constant; deviations against numpy."""
    sources, target = toy(sizes=(400,) * 3, m=300)
    units = np.ones(sources[0].shape[1])
    units[2], units[1] = 40.0, 0.1
    scaled = [np.c_[x * units, np.zeros(len(x))] for x in (*sources, target)]
    result = run_estimate(scaled[:-1], scaled[-1], num_features=100)
    every_other = np.concatenate([x[::2] for x in scaled])
    np.testing.assert_allclose(result.column_deviations, every_other.std(axis=0, ddof=1), rtol=1e-4)
    (line,) = [w for w in result.warnings if w.startswith("columns of unequal scale: column 2,")]
    assert "divide every column by its standard deviation" in line
    assert not has(run_estimate(sources, target, num_features=100), "unequal scale")


SPREADS = {"one row": (1, 0), "two equal rows": (2, 0), "equal rows": (40, 0), "rows": (40, 1)}
"""(number of rows, standard deviation)"""


def spread_samples(kinds):
    """Samples of these kinds, their centers about 4 apart."""
    rng = np.random.default_rng(0)
    pairs = enumerate(SPREADS[kind] for kind in kinds)
    return [3 * np.eye(6)[i] + spread * rng.normal(size=(num, 6)) for i, (num, spread) in pairs]


@pytest.mark.parametrize(
    ("sources", "estimator"),
    [(("one row",), "rff"), (("equal rows",), "exact"), (tuple(SPREADS), "exact")],
)
@pytest.mark.parametrize("target", ["one row", "equal rows", "rows"])
def test_sources_without_spread_are_named(sources, estimator, target):
    """They say nothing of sigma, which is about the distance between the centers here."""
    *samples, drawn = spread_samples([*sources, target])
    result = run_estimate(samples, drawn, bandwidth=3.0, estimator=estimator, num_features=256)
    assert not has(result, "saturated")
    kinds = dict(zip([*result.names, "the target"], [*sources, target]))
    for words, kind in (("a single row has no spread", "one row"), ("no spread: the", "equal")):
        (warning,) = [w for w in result.warnings if words in w] or [""]
        assert [name in warning for name in kinds] == [kind in kinds[name] for name in kinds]
    known = [i for i, name in enumerate(sources) if name != "one row"]
    expected = np.diag(result.kernel_means)[known].mean() if known else np.nan
    np.testing.assert_allclose(result.kernel_mean, expected, rtol=1e-12)
    # What sampling explains of a single row is not known.
    assert has(result, "no mixture of these sources") == ("one row" not in (*sources, target))


@pytest.mark.parametrize("kind", ["one row", "equal rows", "rows"])
@pytest.mark.parametrize(("bandwidth", "words"), [(1e5, "is wide"), (1e-3, "is narrow")])
def test_a_bandwidth_that_is_far_off_is_named(kind, bandwidth, words):
    *samples, drawn = spread_samples([kind] * 3)
    result = run_estimate(samples, drawn, bandwidth=bandwidth, estimator="exact")
    apart = kind == "equal rows" and bandwidth < 1  # they are points whatever sigma
    for part in ("kernel saturated", words, '"auto" takes'):
        assert has(result, part) != apart


def test_the_median_rule_is_not_advised_where_it_was_used():
    """Of tight sources far apart the median distance is that between the sources."""
    samples = [0.01 * sample + i for i, sample in enumerate(spread_samples(["rows"] * 3))]
    result = run_estimate(samples[:2], samples[2], estimator="exact")
    assert has(result, "give a smaller one")
    assert not has(result, '"auto" takes')


def test_sources_that_are_alike_warn():
    rng = np.random.default_rng(0)
    sources, target = [rng.normal(size=(40, 3)) for _ in range(4)], rng.normal(size=(20, 3))
    result = run_estimate(sources, target, bandwidth=1.5, estimator="exact", bootstrap=30)
    assert result.unidentifiable == 3
    assert has(result, "3 of 3 directions")
    assert has(result, "fewer than 30 rows: the target (20)")
    vertex = result._replace(weights=np.eye(4)[0], fold_weights=np.tile([0.5, 0.5, 0, 0], (5, 1)))
    assert has(vertex, "at a vertex by noise: all weight is on source 0")
    assert not has(result._replace(weights=np.full(4, 0.25)), "vertex")
    sure = vertex._replace(fold_weights=np.eye(4)[[0] * 5], replicates=np.zeros((0, 4)))
    assert not has(sure, "vertex")
    worse = result._replace(held_out=result.held_out._replace(uniform=-1.0))
    assert has(worse, "no better than equal ones")


@pytest.mark.parametrize(("rows", "warned"), [(30, True), (1000, False)])
def test_one_small_source_warns(rows, warned):
    """Though the mean of the noise over the sources is small."""
    result = run_estimate(*unequal(0, rows), statistic="u", num_features=100, check_features=0)
    assert has(result, f"source 0 ({rows} rows)") == has(result, "biased by noise") == warned
    assert (result.signal_to_noise[0] < 4) == warned


# Files


NAMES = ["train1.pt", "train2.pt", "train3.pt", "val1.pt", "val2.pt"]


@pytest.fixture
def files(tmp_path):
    """Three training and two validation files of a toy, in several formats and precisions; the
    second one also as .pt."""
    sources, target = toy(sizes=(60, 50, 70), m=80)
    for name, rows in zip(NAMES, [*sources, *np.split(target, [30])]):
        torch.save(torch.tensor(rows, dtype=torch.float32), tmp_path / name)
    paths = [str(tmp_path / name) for name in NAMES]
    second, paths[1] = paths[1], str(tmp_path / "train2.npy")
    np.save(paths[1], torch.load(second).numpy())
    torch.save({"gradients": torch.load(paths[2]).to(torch.bfloat16)}, paths[2])
    return paths[:3], paths[3:]


def test_weights_of_files_are_those_of_arrays(files, caplog):
    train_paths, val_paths = files
    with caplog.at_level(logging.DEBUG):
        weights = MMDDataMixer().optimize_mixing_weights(train_paths, val_paths)
    assert f"{train_paths[2]}: 70 rows of 3, bfloat16" in caplog.text
    assert "condition number" in caplog.text
    assert list(weights) == train_paths
    assert all(type(weight) is float for weight in weights.values())
    assert abs(sum(weights.values()) - 1) < 1e-12
    assert "-0.0" not in str(weights)
    sources, target = toy(sizes=(60, 50, 70), m=80)
    sources[2] = torch.tensor(sources[2]).float().bfloat16().double().numpy()
    options = {"key": jax.random.key(42), "bandwidth": 3.0, "num_features": 100}
    expected = run_estimate(sources, target, **options).weights
    np.testing.assert_allclose(list(weights.values()), expected, rtol=0, atol=1e-4)


def test_the_published_auto_sigma_is_the_median_of_a_sample(files, monkeypatch):
    opened = [file for side in open_files(*files) for file in side]
    rows = np.concatenate([file[:].astype(float) for file in opened])
    result = MMDDataMixer(auto_sigma=True).mix(*files)  # of more rows than there are: all of them
    assert result.bandwidth == pytest.approx(np.median(pdist(rows)), rel=1e-5)
    assert MMDDataMixer(sigma_sample_size=8).mix(*files).bandwidth == 3.0

    def draw(key, groups, *, num_points):
        raise ValueError(f"{num_points} rows are drawn")

    monkeypatch.setattr("xp_data_mixing.mixing.streamed_median_bandwidth", draw)
    for options in ({"auto_sigma": True}, {"sigma_bandwidth": "auto"}):
        with pytest.raises(ValueError, match=r"^8 rows are drawn$"):
            MMDDataMixer(sigma_sample_size=8, **options).mix(*files)


def test_solvers_of_cvxpy(files):
    own, other = (
        MMDDataMixer(check_features=0, solver=name).mix(*files) for name in ("own", "CLARABEL")
    )
    np.testing.assert_allclose(other.weights, own.weights, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="no solver 'NONE' here"):
        MMDDataMixer(solver="NONE").mix(*files)


def test_prior_and_caps_by_repetition(files):
    def weights(**options):
        return MMDDataMixer(**options).mix(*files).weights

    sizes = np.array([60, 50, 70]) / 180
    np.testing.assert_allclose(weights(prior="size", prior_strength=1e4), sizes, atol=1e-4)
    given = weights(prior=(0.1, 0.2, 0.7), prior_strength=1e4, pull="kl")
    np.testing.assert_allclose(given, [0.1, 0.2, 0.7], atol=1e-4)
    capped = weights(max_epochs=1.2)
    assert np.all(capped <= 1.2 * sizes + 1e-12)
    assert np.any(capped > 1.2 * sizes - 1e-12)
    assert np.all(weights(max_epochs=1, total_rows=90) <= 2 * sizes + 1e-12)
    bounded = weights(floors=(0.3,), caps=(0.35, 0.35, 0.5))
    assert bounded.min() >= 0.3
    assert np.all(bounded <= [0.35, 0.35, 0.5])


# Bad input

NAN = np.ones((20, 3), "f")
NAN[[4, 7, 9], 1] = np.nan
BAD = {
    "width": (torch.ones(5, 4), r"train1.pt has shape \(60, 3\), .*bad.pt has shape \(5, 4\)"),
    "NaN": (torch.tensor(NAN), "bad.pt: NaN or infinity in 3 of 20 rows, the first is row 4"),
    "code": (Path("runs.sh"), "is refused: its pickle asks for more than tensors"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_raise(files, tmp_path, case):
    """On either side; the rest of them in `tests/lib/test_row_files.py`."""
    (contents, words), bad = BAD[case], str(tmp_path / "bad.pt")
    torch.save(contents, bad)
    for kind in (MMDDataMixer, MMDDataMixerRBF):
        with pytest.raises(ValueError, match=words):
            kind().mix([*files[0], bad], files[1])
    with pytest.raises(ValueError, match=words):
        MMDDataMixer().mix(files[0], [bad])


@pytest.mark.parametrize(
    ("paths", "words"),
    [
        (["train1.pt", "absent.pt"], r"no such file: .*absent\.pt"),
        (["train1.pt", "train3.pt", "train1.pt"], r"the same file twice: .*train1\.pt"),
        ([], "a list of training paths is needed"),
        ("train1.pt", "a list of training paths is needed"),
    ],
)
def test_bad_paths_raise(files, tmp_path, monkeypatch, paths, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        MMDDataMixer().mix(paths, files[1])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sigma_bandwidth": 0.0}, "sigma_bandwidth must be positive"),
        ({"sigma_bandwidth": "median"}, "or auto, got 'median'"),
        ({"sigma_sample_size": 1}, r"integer in \[2, 10000\], .* got 1$"),
        ({"rff_dimension": 0}, "rff_dimension must be at least 1"),
        ({"ridge_penalty": -1e-5}, "ridge_penalty must lie in"),
        ({"statistic": "w"}, "statistic must be one of"),
        ({"bootstrap": -1}, "replicates >= 0"),
        ({"confidence": 1.0}, "confidence < 1"),
        ({"num_blocks": 1}, "num_blocks >= 2"),
        ({"check_features": -1}, "check_features >= 0"),
        ({"pull": "l1"}, "pull must be l2 or kl"),
        ({"random_seed": 2**32}, "must be a whole number from 0 to 4294967295"),
        ({"prior": "size"}, "no effect without a prior_strength"),
        ({"prior": (0.5, 0.5), "prior_strength": 1.0}, r"the prior must be \[3\]"),
        ({"caps": (0.2,)}, r"no weights of sum 1: the upper bounds \(caps\) sum to 0.6"),
        ({"floors": (0.4,)}, r"no weights of sum 1: the lower bounds \(floors\) sum to 1.2"),
        ({"caps": (0.5, 0.5)}, "caps: one number or 3 are needed, got 2"),
        ({"max_epochs": 0.5}, "0.5 epochs of 180 rows do not make 180 rows"),
        ({"total_rows": 10}, "no effect without max_epochs"),
    ],
)
def test_bad_options_raise_before_rows_are_read(files, monkeypatch, options, words):
    monkeypatch.setattr("lib.rows.files.RowFile.__getitem__", None)
    with pytest.raises(ValueError, match=words):
        MMDDataMixer(**options).mix(*files)


def test_a_single_row():
    sources, target = toy()
    sources[1] = sources[1][:1]
    result = run_estimate(sources, target, bandwidth=1.5, num_features=20, bootstrap=10)
    assert np.isfinite(result.intervals).all()
    assert result.held_out is None
    assert has(result, "fewer than 30 rows: source 1 (1)")
    with pytest.raises(ValueError, match="source 1 has one row: a U-statistic needs two"):
        run_estimate(sources, target, bandwidth=1.5, statistic="u")
    with pytest.raises(ValueError, match="0 sources and 1 targets"):
        run_estimate([], target)


# As printed in the document

DOCUMENT = """\
from mmd_data_mixing import MMDDataMixer

mixer = MMDDataMixer(
    rff_dimension=100,
    sigma_bandwidth=3.0,
    ridge_penalty=1e-5,
    random_seed=42
)
train_paths = ['/path/to/train1.pt', '/path/to/train2.pt', '/path/to/train3.pt']
val_paths = ['/path/to/val1.pt', '/path/to/val2.pt']
results = mixer.optimize_mixing_weights(train_paths, val_paths)
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


def run(command, folder):
    """By bash, with this Python, and the repository importable as setting up makes it."""
    environment = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": f"{REPOSITORY}:{os.environ.get('PYTHONPATH', '')}",
        "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.05",
    }
    command = command.replace("/path/to", str(folder)).replace("results.json", f"{folder}/out.json")
    options = {"cwd": FOLDER, "env": os.environ | environment}
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.usefixtures("files")
def test_snippet_as_printed(tmp_path):
    printed = run(f"python -c {shlex.quote(DOCUMENT)}", tmp_path)
    paths, weights = zip(*(line.split(" -> Weight: ") for line in printed.splitlines()))
    assert list(paths) == [f"Dataset: {tmp_path / name}" for name in NAMES[:3]]
    assert abs(sum(map(float, weights)) - 1) < 2e-4


@pytest.mark.usefixtures("files")
def test_command_as_printed(tmp_path):
    run(COMMAND, tmp_path)
    check_document(tmp_path / "out.json", 3)


@pytest.mark.slow
def test_example_script_as_printed(tmp_path):
    printed = run("python example_usage.py", tmp_path)
    for title in ("Basic usage", "Parameter tuning", "Real world usage"):
        assert f"{title}\n---" in printed
    assert "Dataset: code         -> Weight: 0.5" in printed


# Output


def check_document(path, num_sources):
    document = json.loads(path.read_text(), parse_constant=pytest.fail)
    ratios = document["mixing_ratios"]
    assert len(ratios) == num_sources
    assert abs(sum(row["weight"] for row in ratios.values()) - document["total_weight"]) < 1e-9
    assert abs(document["total_weight"] - 1) < 1e-12
    for row in ratios.values():
        assert row["percentage"] == pytest.approx(100 * row["weight"])
    assert [row["file_path"] for row in ratios.values()] == document["file_paths"]["train"]
    assert set(document["mmd_squared"]) == set(report.MIXTURES)
    assert not re.search(r"-0\.0+\b", path.read_text())
    return document


def command_line(*arguments):
    (result,) = main(tyro.cli(Arguments, args=[str(argument) for argument in arguments]))
    return result


def test_everything_on_the_command_line(files, tmp_path, capsys):
    train_paths, val_paths = files
    result = command_line(
        "--train_paths", *train_paths, "--val_paths", *val_paths,
        "--sigma_bandwidth", "auto", "--random_seed", 3, "--bootstrap", 20, "--confidence", 0.8,
        "--prior", 0.2, 0.3, 0.5, "--prior_strength", 1e-3, "--pull", "kl", "--floors", 0.05,
        "--caps", 0.9, 0.9, 0.5, "--max_epochs", 3, "--statistic", "u", "--solver", "CLARABEL",
        "--output_file", tmp_path / "out.json", "--report", tmp_path / "out.html",
    )  # fmt: skip
    document = check_document(tmp_path / "out.json", 3)
    rows, manifest = list(document["mixing_ratios"].values()), document["manifest"]
    np.testing.assert_array_equal([row["weight"] for row in rows], result.weights)
    np.testing.assert_array_equal([row["interval"] for row in rows], result.intervals)
    assert result.intervals[2, 1] <= 0.5
    assert result.intervals.min() >= 0.05
    assert (manifest["sigma"], manifest["seed"]) == (result.bandwidth, 3)
    assert manifest["files"][2]["dtype"] == "bfloat16"
    assert manifest["files"][0]["shape"] == [60, 3]
    assert len({file["content"] for file in manifest["files"]}) == len(manifest["files"])
    assert manifest["environment"]["versions"]["jax"] == jax.__version__
    assert "(intervals at 0.8)" in capsys.readouterr().out
    page = (tmp_path / "out.html").read_text()
    assert "data:image/png;base64," in page
    assert "http" not in page.replace("https://", "http").split("<details>")[0]
    assert not list(tmp_path.glob(".*"))


def test_one_source_and_a_strange_name(files, tmp_path, capsys):
    """With a seed that is drawn, printed and written."""
    strange = tmp_path / "<b>&.pt"
    Path(files[0][0]).rename(strange)
    command_line(
        "--train_paths", strange, "--val_paths", files[1][0], "--exact", "--random_seed", None,
        "--auto_sigma", "--sigma_sample_size", 20,
        "--output_file", tmp_path / "out.json", "--report", tmp_path / "out.html",
    )  # fmt: skip
    document = check_document(tmp_path / "out.json", 1)
    (name, row), manifest = document["mixing_ratios"].popitem(), document["manifest"]
    assert (name, row["weight"], row["leave_one_out_cost"]) == ("<b>&", 1.0, None)
    assert manifest["options"]["estimator"] == "exact"
    assert f"seed {manifest['seed']}\n" in capsys.readouterr().out
    assert manifest["options"]["random_seed"] == manifest["seed"] >= 0
    page = (tmp_path / "out.html").read_text()
    assert "<b>" not in page
    assert "&lt;b&gt;&amp;" in page


def test_matrices_of_one_file(files, tmp_path):
    train, val = ([as_rows(open_rows(p), "x").take(slice(99)) for p in paths] for paths in files)
    names, archive, out = ["code", "web/2", "c:x"], tmp_path / "all.npz", tmp_path / "out.json"
    np.savez(archive, target=np.concatenate(val), **dict(zip(names, train)))
    paths, target = [f"{archive}:{name}" for name in names], f"{archive}:target"
    command_line("--train_paths", *paths, "--val_paths", target, "--output_file", out)
    document = json.loads(out.read_text())
    assert list(document["mixing_ratios"]) == ["all:code", "all:web/2", "all:c:x"]
    assert document["file_paths"] == {"train": paths, "validation": [target]}
    weights = [row["weight"] for row in document["mixing_ratios"].values()]
    expected = MMDDataMixer().mix(files[0], [target]).weights
    np.testing.assert_allclose(weights, expected, rtol=0, atol=1e-9)


def test_only_a_figure_and_bad_outputs(files, tmp_path, monkeypatch):
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
