"""Posteriors, whitened features and likelihoods: against scikit-learn, SciPy, cvxpy, EM and loops
in float64; and what is estimated from them."""

from dataclasses import replace

import cvxpy
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import slow
from kernel_oracles import gram_of_means
from mixture_oracles import cvxpy_weights
from scipy.special import softmax
from scipy.stats import multivariate_normal
from sklearn.linear_model import LogisticRegression

from lib.rff import gaussian_frequencies, random_fourier_features
from lib.rows import as_rows
from lib.rows.fourier_means import row_blocks, stream_mean_embeddings
from lib.rows.kernel_means import noise_of_means
from xp_data_mixing import calibration, features, posteriors
from xp_data_mixing.block_moments import feature_moments, origin
from xp_data_mixing.calibration import Choice
from xp_data_mixing.likelihood import likelihood_weights
from xp_data_mixing.mixing import Bootstrap, Kernel, estimate

KEY = jax.random.key(0)
CENTERS = np.random.default_rng(9).normal(size=(3, 4))


def sources(seed, sizes=(150, 60, 200)):
    rng = np.random.default_rng(seed)
    return [(c + rng.normal(size=(n, 4))).astype("f4") for c, n in zip(CENTERS, sizes)]


def target(seed, weights, m=600):
    rng = np.random.default_rng(seed)
    kinds = rng.permutation(np.repeat(np.arange(3), np.rint(np.multiply(weights, m)).astype(int)))
    return (CENTERS[kinds] + rng.normal(size=(len(kinds), 4))).astype("f4")


# Classifiers


def test_classifiers_are_logistic_regressions_of_the_rows_with_weight():
    """scikit-learn's, of the same rows and their weights; C n = 1 / ridge."""
    rows, labels = np.concatenate(sources(0)), np.repeat([0, 1, 2], [150, 60, 200])
    weights = np.random.default_rng(1).random((2, 410)) * (np.arange(410) % 2 == [[0], [1]])
    fitted = posteriors.fit_classifiers(
        rows, labels, weights.astype("f4"), np.array([0.01, 0.1], "f4"), num_sources=3, num_steps=80
    )
    for k, ridge in enumerate((0.01, 0.1)):
        shares = weights[k] / weights[k].sum()
        expected = LogisticRegression(C=1 / ridge, tol=1e-10).fit(rows, labels, shares)
        probabilities = softmax(posteriors.logits(fitted, rows)[k], axis=1)
        np.testing.assert_allclose(probabilities, expected.predict_proba(rows), atol=2e-3)


@pytest.mark.slow
def test_the_default_number_of_steps_is_enough():
    rows, labels = np.concatenate(sources(0)), np.repeat([0, 1, 2], [150, 60, 200])
    weights, ridges = np.ones((1, 410), "f4"), np.array([0.01], "f4")
    some, many = (
        posteriors.fit_classifiers(rows, labels, weights, ridges, num_sources=3, num_steps=steps)
        for steps in (posteriors.NUM_STEPS, 200)
    )
    probabilities, expected = (softmax(posteriors.logits(c, rows)[0], axis=1) for c in (some, many))
    np.testing.assert_allclose(probabilities, expected, atol=2e-3)


def test_no_row_has_a_say_in_its_own_posteriors():
    """Other labels of fold 2 leave its classifier as it is, before it is calibrated."""
    rows, labels = np.concatenate(sources(0)), np.repeat([0, 1, 2], [150, 60, 200])
    folds = posteriors.random_folds(np.random.default_rng(0), (150, 60, 200))
    assert np.bincount(folds).tolist() == [82] * 5
    kept = np.asarray(folds != 2, "f4")[None]
    other = np.where(folds == 2, np.roll(labels, 7), labels)
    assert (other != labels).any()
    first, second = (
        posteriors.fit_classifiers(rows, y, kept, np.array([0.01], "f4"), num_sources=3)
        for y in (labels, other)
    )
    np.testing.assert_allclose(first.weights, second.weights, atol=1e-5)


def test_sources_count_the_same_whatever_their_size():
    weights = posteriors.balanced(np.array([0, 0, 0, 1]), 2)
    np.testing.assert_allclose(weights, [2 / 3, 2 / 3, 2 / 3, 2])


def test_calibration_undoes_a_scale_and_a_shift():
    """Logits of normal densities, which are right, after both; by their own cross-entropy."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 4000)
    rows, weights = CENTERS[labels] + rng.normal(size=(4000, 4)), np.ones(4000)
    exact = np.stack([multivariate_normal(c).logpdf(rows) for c in CENTERS], axis=1)
    scale, shift = posteriors.calibration((exact - [0.5, 0, -1]) / 3, labels, weights)
    calibrated = (exact - [0.5, 0, -1]) / 3 * scale + shift
    np.testing.assert_allclose(softmax(calibrated, 1), softmax(exact, 1), atol=0.05)
    best = posteriors.log_loss(calibrated, labels, weights)
    for d_scale, d_shift in ((1e-3, 0), (-1e-3, 0), (0, [1e-3, 0, 0]), (0, [-1e-3, 0, 0])):
        moved = (exact - [0.5, 0, -1]) / 3 * (scale + d_scale) + shift + d_shift
        assert posteriors.log_loss(moved, labels, weights) > best


def test_a_prior_is_bayes_rule():
    densities, prior = np.array([[0.2, 0.5, 0.1]]), np.array([0.6, 0.1, 0.3])
    expected = densities * prior / (densities @ prior)
    np.testing.assert_allclose(posteriors.with_prior(np.log(densities), prior), expected)


def test_posteriors_of_right_logits_give_the_weights():
    """Densities are known, so the second prior is near the target's weights."""
    logits = [
        np.stack([multivariate_normal(c).logpdf(rows) for c in CENTERS], axis=1)
        for rows in sources(3, (4000, 4000, 4000))
    ]
    truth = np.array([0.7, 0.0, 0.3])
    rows = target(4, truth, 8000)
    of_target = np.stack([multivariate_normal(c).logpdf(rows) for c in CENTERS], axis=1)
    weights, prior, _ = posteriors.weights_and_prior(
        logits, lambda prior: posteriors.with_prior(of_target, prior).mean(0), 0.01
    )
    np.testing.assert_allclose(weights, truth, atol=0.02)
    np.testing.assert_allclose(prior, 0.9 * truth + 0.1 / 3, atol=0.03)


# Features


def test_a_readout_is_of_the_features_of_every_row():
    rows = np.random.default_rng(0).normal(size=(700, 4)).astype("f4")
    frequencies = gaussian_frequencies(KEY, 6, 4)
    metric = features.Metric(jnp.full(12, 0.1), jnp.asarray(np.eye(12)[:, :5], jnp.float32))
    streamed = stream_mean_embeddings(rows, frequencies, [2.0], readout=metric, chunk_size=300)
    plain = np.asarray(random_fourier_features(jnp.asarray(rows), frequencies, 2.0), float) - 0.1
    expected = np.append(plain[:, :5].mean(0), np.square(plain[:, :5]).sum(1).mean())
    np.testing.assert_allclose(streamed.means[0], expected, atol=1e-6)


def fitted(kind, groups, **choice):
    settings = Choice(kind, 2.0, 0.01, 0.1)._replace(**choice)
    rows = [as_rows(x, "x") for x in groups]
    frequencies = gaussian_frequencies(KEY, 40, 4)
    return frequencies, features.fitted_features(
        KEY, rows[:-1], rows[-1], frequencies, [2.0], kinds=settings, count=10**6,
        offset=origin(rows),
    )  # fmt: skip


@pytest.mark.parametrize("kind", [slow("whitened"), "posteriors"])
def test_moments_of_fitted_features_by_hand(kind):
    """Means, noise and the mean square within sources; posteriors of each row by its own fold."""
    groups = [*sources(0), target(1, (0.5, 0.3, 0.2), 100)]
    frequencies, made = fitted(kind, groups)
    moments = feature_moments(
        KEY, [as_rows(x, "x") for x in groups], frequencies, 2.0, readout=made.readout,
        corrections=made.corrections, num_blocks=7,
    )  # fmt: skip
    offset = origin([as_rows(groups[-1], "x")])
    centered = np.concatenate(groups) - offset
    z = random_fourier_features(jnp.asarray(centered, jnp.float32), frequencies, 2.0)
    ends = np.cumsum([len(rows) for rows in groups])[:-1]
    by_hand = np.split(np.asarray(made.readout(z), float), ends)
    if kind == "posteriors":
        logits = made.readout.classifiers.logits(z) + jnp.log(made.readout.prior)[None, None]
        by_each = jax.vmap(made.readout.metric)(jax.nn.softmax(logits))
        for g, of_both in enumerate(np.split(np.asarray(by_each), ends, axis=1)[:3]):
            indices, differences = made.corrections[g]
            np.testing.assert_array_equal(indices, np.arange(len(groups[g])))
            by_hand[g] = by_hand[g] + differences
            # Each row has the posteriors of exactly one of the classifiers.
            gaps = np.abs(of_both - by_hand[g]).max(axis=2)
            assert (np.sort(gaps, axis=0)[0] < 1e-4).all()
    blocks = np.asarray(row_blocks(KEY, 0, 60, 7))
    sums = np.stack([by_hand[1][blocks == b, :-1].sum(0) for b in range(7)])
    np.testing.assert_allclose(moments.sums[1], sums, atol=1e-4)
    means = np.stack([rows[:, :-1].mean(0) for rows in by_hand])
    np.testing.assert_allclose(
        moments.sums.sum(1) / moments.sizes.sum(1)[:, None], means, atol=1e-5
    )
    noise = noise_of_means(
        means @ means.T, moments.sizes.sum(1), moments.mean_squares(moments.filled)
    )
    spread = [np.trace(np.cov(rows[:, :-1].T)) / len(rows) for rows in by_hand]
    np.testing.assert_allclose(noise, spread, rtol=1e-4)
    # Up to n / (n - 1), which variances within the sources are taken with.
    squares = np.mean([rows[:, -1].mean() for rows in by_hand[:3]])
    assert squares == pytest.approx(1, abs=1 / 60)


@pytest.mark.parametrize("estimator", ["whitened", slow("auto")])
def test_weights_are_near_the_truth_and_in_their_intervals(estimator):
    truth = np.array([0.6, 0.0, 0.4])
    kernel = Kernel(estimator=estimator, num_features=100)
    result = estimate(
        KEY,
        sources(5, (400, 300, 500)),
        target(6, truth, 2400),
        kernel=kernel,
        bootstrap=Bootstrap(100),
    )
    assert calibration.total_variation(result.weights, truth) < 0.06
    low, high = result.intervals.T
    assert np.all((low <= truth + 0.02) & (truth - 0.02 <= high) & (high - low < 0.25))
    assert result.gap < 1e-9
    assert result.choice.kind in ("whitened", "posteriors")
    assert min(result.choice.errors.values()) == result.choice.errors[result.choice.name]
    # The same again without choosing.
    again = estimate(
        KEY, sources(5, (400, 300, 500)), target(6, truth, 2400),
        kernel=replace(kernel, choice=result.choice), bootstrap=Bootstrap(100),
    )  # fmt: skip
    np.testing.assert_array_equal(again.weights, result.weights)


@pytest.mark.slow
def test_choosing_takes_what_recovers_best():
    rng = np.random.default_rng(0)
    projections = [s * rng.normal(size=(300, 50)).astype("f4") for s in (0.7, 1.0, 1.4)]
    both = calibration.choose(KEY, projections, [1.0, 4.0], ["whitened", "posteriors"])
    assert both.errors[both.name] == min(both.errors.values())
    assert len(both.errors) == 2 * len(calibration.METRICS) + 1
    only = calibration.choose(KEY, projections, [4.0], ["whitened"])
    assert (only.kind, len(only.errors)) == ("whitened", len(calibration.METRICS))


@pytest.mark.slow
def test_one_source_needs_no_posteriors():
    (rows, *_), estimator = sources(0), "posteriors"
    result = estimate(KEY, [rows], rows[:40] + 0.0, kernel=Kernel(estimator=estimator))
    assert (result.weights.tolist(), result.choice.kind) == ([1.0], "whitened")


@pytest.mark.slow
def test_sources_of_equal_rows():
    rows = [np.full((9, 2), i, "f4") for i in range(3)]
    drawn = np.concatenate([rows[0], rows[2], rows[2]])
    for estimator in ("whitened", "posteriors"):
        result = estimate(KEY, rows, drawn, kernel=Kernel(estimator=estimator, num_features=30))
        np.testing.assert_allclose(result.weights, [1 / 3, 0, 2 / 3], atol=0.02)


# Validation sets


def test_validation_sets_with_weights_of_their_own():
    """The kernel itself: the target's mean is the weighted one of its parts."""
    groups = sources(0, (40, 30, 50))
    parts = [target(1, (0.5, 0.5, 0), 20), target(2, (0, 0.2, 0.8), 50)]
    kernel = Kernel(1.5, estimator="exact", check_features=0)
    result = estimate(KEY, groups, parts, target_weights=[3, 1], kernel=kernel)
    gram = gram_of_means([x.astype(float) for x in (*groups, *parts)], 1.5)
    expected = cvxpy_weights(gram[:3, :3] + 1e-5 * np.eye(3), gram[:3, 3:] @ [0.75, 0.25])
    np.testing.assert_allclose(result.weights, expected, atol=1e-5)
    assert result.target_size == 70
    pooled = estimate(KEY, groups, parts, kernel=kernel)
    by_rows = estimate(KEY, groups, parts, target_weights=[20, 50], kernel=kernel)
    np.testing.assert_allclose(pooled.weights, by_rows.weights, atol=1e-6)


@pytest.mark.parametrize("statistic", ["v", "u"])
def test_a_sample_that_is_source_and_target_is_not_compared_with_itself(statistic):
    """Leave-one-out means between a source and its copy in the target."""
    groups = sources(0, (40, 30, 50))
    other = target(1, (0, 0.2, 0.8), 60)
    kernel = Kernel(1.5, estimator="exact", statistic=statistic, check_features=0)
    result = estimate(KEY, groups, [groups[1], other], kernel=kernel)
    rows = [x.astype(float) for x in (*groups, other)]
    plain, unbiased = (gram_of_means(rows, 1.5, unbiased=u) for u in (False, True))
    cross = unbiased[:3] @ np.array([0, 30, 0, 60]) / 90
    a = (plain if statistic == "v" else unbiased)[:3, :3]
    expected = cvxpy_weights(a + 1e-5 * np.eye(3), cross)
    np.testing.assert_allclose(result.weights, expected, atol=1e-5)


def test_intervals_of_a_shared_sample_are_around_its_weight():
    groups = sources(0, (200, 200, 200))
    kernel = Kernel(1.5, estimator="exact", statistic="u", check_features=0)
    options = {"kernel": kernel, "bootstrap": Bootstrap(200)}
    shared = estimate(KEY, groups, [groups[0]], **options)
    # Resampling moves the source and the target together: no replicate leaves it.
    assert shared.weights[0] > 0.95
    assert shared.replicates[:, 0].mean() > 0.95


# Likelihoods


def random_densities(rng, m, n):
    weights, centers = rng.dirichlet(np.full(n, 0.5)), rng.normal(size=(n, 5))
    rows = centers[rng.choice(n, m, p=weights)] + rng.normal(size=(m, 5))
    return -np.square(rows[:, None] - centers[None]).sum(2) / 2


@pytest.mark.parametrize(("m", "n"), [(200, 3), (1000, 10), (50, 60)])
def test_likelihood_weights_against_em(m, n):
    rng = np.random.default_rng(m)
    logs, v = random_densities(rng, m, n), rng.random(m)
    solution = likelihood_weights(logs, v)
    densities, w = np.exp(logs - logs.max(1, keepdims=True)), np.full(n, 1 / n)
    for _ in range(5000):
        shares = densities * w
        w = (v[:, None] * shares / shares.sum(1, keepdims=True)).sum(0) / v.sum()
    by_em = -(v @ (np.log(densities @ w) + logs.max(1))) / v.sum()
    assert solution.loss <= by_em + 1e-9
    assert solution.loss >= by_em - 1e-5
    assert 0 <= solution.gap + 1e-12 < 1e-8
    assert solution.weights.min() >= 0
    assert solution.weights.sum() == pytest.approx(1)


@pytest.mark.parametrize("exponent", [-3, -30, -300])
def test_likelihood_weights_of_sources_that_are_told_apart(exponent):
    """Each row is from one source for certain: the shares of the rows, zeros too."""
    kinds = np.random.default_rng(0).choice(4, 500, p=[0.9, 0.08, 0, 0.02])
    logs = np.random.default_rng(1).uniform(exponent - 1, exponent, (500, 4)) * np.log(10)
    logs[np.arange(500), kinds] = 0
    solution = likelihood_weights(logs)
    assert solution.gap < 1e-8
    np.testing.assert_allclose(solution.weights, np.bincount(kinds, minlength=4) / 500, atol=2e-3)
    assert solution.weights[2] == 0


def test_mixmin_against_cvxpy():
    logs = random_densities(np.random.default_rng(0), 80, 4) - 300  # exp underflows without a shift
    w = cvxpy.Variable(4)
    value = -cvxpy.sum(cvxpy.log(np.exp(logs + 300) @ w)) / 80
    cvxpy.Problem(cvxpy.Minimize(value), [cvxpy.sum(w) == 1, w >= 0]).solve(solver=cvxpy.CLARABEL)
    solution = likelihood_weights(logs)
    np.testing.assert_allclose(solution.weights, w.value, atol=1e-4)
    assert solution.loss == pytest.approx(value.value + 300, abs=1e-7)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: likelihood_weights(np.zeros(3)), r"must be \[rows, sources\], got shape \(3,\)"),
        (lambda: likelihood_weights([[0, np.nan]]), "NaN or"),
        (lambda: likelihood_weights([[0, 0], [-np.inf] * 2]), "no source can give row 1"),
        (lambda: likelihood_weights([[0, 0]], [-1]), "row_weights must be 1 numbers"),
        (lambda: Kernel(estimator="best"), "estimator must be one of rff, exact, whitened"),
        (lambda: Kernel(sample_rows=0), "sample_rows must be at least 1, got 0"),
        (
            lambda: estimate(KEY, [np.ones((3, 2))], np.eye(2), kernel=Kernel(estimator="auto")),
            "source 0 has 3 rows: features chosen by halves need four",
        ),
        (
            lambda: estimate(KEY, [np.eye(2)], [np.eye(2) + 1] * 2, target_weights=[1, -1]),
            r"target_weights must be 2 numbers >= 0, not all 0, got \[1, -1\]",
        ),
        (
            lambda: calibration.choose(KEY, [np.ones((3, 2))], [1.0], ["whitened"]),
            r"too few rows .* got \[3\]",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
