"""The study of mixing weights: numbers against plain NumPy, samples, calibration, commands."""

import json
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import slow
from kernel_oracles import gram_of_means, kernel
from mixture_oracles import cvxpy_weights

from lib.networks import MLP
from xp_data_mixing import calibration, whitening
from xp_data_mixing.study import (
    coverage,
    downstream,
    experiments,
    plot,
    problems,
    recovery,
    solvers,
    tables,
)
from xp_data_mixing.study.config import (
    DIGITS,
    GROUPS,
    QUICK,
    AblationConfig,
    CoverageConfig,
    DownstreamConfig,
    Group,
    RecoveryConfig,
    Samples,
    SolversConfig,
    presets,
)

KEY = jax.random.key(0)
TINY = replace(DIGITS, num_per_class=12, num_target=40)


def gaussian_sources(rng, sizes, num_columns, spread=1.0):
    """Rows around centers of their own, float32."""
    centers = rng.normal(size=(len(sizes), num_columns)) * spread
    return [(c + rng.normal(size=(n, num_columns))).astype("f4") for c, n in zip(centers, sizes)]


@pytest.mark.parametrize("damping", [1e-2, 1.0])
def test_whitened_weights_are_generalized_least_squares(damping):
    """Against the formula with an inverse matrix and cvxpy, in float64."""
    rows = gaussian_sources(np.random.default_rng(0), [30, 20, 40], 5, spread=3.0)
    sources = [source.astype(float) * np.arange(1, 6) for source in rows]
    target = np.concatenate([sources[0][:15], sources[2][:25]]).mean(0)
    covariances = [np.cov(rows.T) for rows in sources]
    s = sum(c * (len(rows) - 1) for c, rows in zip(covariances, sources)) / (90 - 3)
    inverse = np.linalg.inv(s + damping * np.linalg.eigvalsh(s)[-1] * np.eye(5))
    means = np.stack([rows.mean(0) for rows in sources])
    noise = [np.trace(c @ inverse) / len(rows) for c, rows in zip(covariances, sources)]
    spectrum = whitening.spectrum(sources)
    gram = means @ inverse @ means.T - np.diag(noise)
    expected = cvxpy_weights(gram, means @ inverse @ target)
    weights = whitening.whitened_weights(spectrum, target @ spectrum.basis, damping)
    np.testing.assert_allclose(weights, expected, atol=1e-6)
    assert 0.01 < weights.max() < 0.99


def test_a_large_damping_is_mmd_with_a_u_statistic():
    """The kernel's diagonal is 1: tr S_i / n_i = (1 - A_ii) / (n_i - 1)."""
    rng = np.random.default_rng(1)
    sources = gaussian_sources(rng, [30, 25, 40], 3)
    frequencies = rng.normal(size=(20, 3))
    features = []
    for rows in (*sources, np.concatenate([sources[0][:10], sources[1][:20]])):
        angles = rows @ frequencies.T / 2
        features.append(np.concatenate([np.cos(angles), np.sin(angles)], axis=1) / np.sqrt(20))
    spectrum = whitening.spectrum(features[:-1])
    mean = features[-1].mean(0) @ spectrum.basis
    weights, mmd = (whitening.whitened_weights(spectrum, mean, d) for d in (1e7, np.inf))
    means = np.stack([rows.mean(0) for rows in features])
    expected = recovery.mmd_weights(means @ means.T, [30, 25, 40])
    np.testing.assert_allclose(weights, expected, atol=1e-5)
    np.testing.assert_allclose(mmd, expected, atol=1e-6)


def test_halves_are_a_partition():
    for (first, second), size in zip(calibration.halves(KEY, [4, 7]), [4, 7]):
        assert sorted([*first, *second]) == list(range(size))
        assert len(first) - len(second) == size % 2


def test_calibrated_bandwidth_is_that_of_a_loop_over_pseudo_targets():
    """The loop makes each target of weighted rows, and knows neither halves' Gram nor lib."""
    rng = np.random.default_rng(2)
    sources = [rows.astype(float) for rows in gaussian_sources(rng, [16, 12, 20], 3, spread=2.0)]
    halves = [[rows[::2] for rows in sources], [rows[1::2] for rows in sources]]
    pseudo, bandwidths = calibration.pseudo_weights(KEY, 3, num_targets=5), [0.3, 1.0, 3.0]
    np.testing.assert_allclose(pseudo.sum(1), 1, atol=1e-12)

    expected = np.zeros(3)
    for s, bandwidth in enumerate(bandwidths):
        for fit, held in (halves, halves[::-1]):
            gram = gram_of_means(fit, bandwidth, unbiased=True)
            counts, rows = [len(x) for x in held], np.concatenate(held)
            for w in pseudo:
                shares = np.repeat(w / counts, counts)
                cross = np.array([kernel(x, rows, bandwidth).mean(0) @ shares for x in fit])
                square = shares @ kernel(rows, rows, bandwidth) @ shares
                centered = gram - cross[:, None] - cross[None] + square
                expected[s] += np.abs(cvxpy_weights(centered + 1, np.zeros(3)) - w).sum() / 20
    groups = [*halves[0], *halves[1]]
    grams, sizes = [gram_of_means(groups, b) for b in bandwidths], [len(x) for x in groups]
    best, errors = calibration.calibrated_bandwidth(np.stack(grams), sizes, pseudo)
    np.testing.assert_allclose(errors, expected, atol=1e-4)
    assert best == np.argmin(expected)


@pytest.mark.parametrize("labels", ["fixed", "drawn"])
@pytest.mark.parametrize("target_from", ["test", "rest"])
def test_targets_have_their_shares_and_no_image_of_the_sources(labels, target_from):
    samples = replace(TINY, labels=labels, target_from=target_from, num_target=20)
    splits, mixture = problems.load(samples), problems.draw_mixture(KEY, 10)
    sources = problems.draw_sources(KEY, splits, [12, 5] * 5)
    assert [len(source) for source in sources] == [12, 5] * 5
    for label, source in enumerate(sources):
        assert np.all(splits.train.labels[source] == label)
    dataset, chosen, truth = problems.draw_target(jax.random.key(1), splits, mixture, sources)
    assert dataset is (splits.train if target_from == "rest" else splits.test)
    assert len(set(chosen.tolist())) == len(chosen) == 20
    if labels == "fixed":
        np.testing.assert_array_equal(np.bincount(dataset.labels[chosen], minlength=10) / 20, truth)
        assert np.abs(truth - mixture).max() < 1 / 20
    else:
        np.testing.assert_array_equal(truth, mixture)
    assert target_from == "test" or not set(chosen) & set(np.concatenate(sources))


@pytest.mark.slow
@pytest.mark.parametrize("target_from", ["rest", "test"])
def test_gradients_are_unit_rows_of_a_network_that_saw_none_of_the_images(monkeypatch, target_from):
    seen = []

    def spy(key, network, images, labels, **options):
        seen.extend(np.asarray(images).reshape(len(images), -1))
        return network.init(key, images[:1]), None

    def drawn(space):
        samples = replace(TINY, space=space, target_from=target_from, num_target=20)
        rows = problems.draw(KEY, problems.load(samples), 1)
        return np.concatenate([*rows.sources, *rows.targets])

    monkeypatch.setattr(problems.classification, "train", spy)
    monkeypatch.setattr(problems, "DIMENSION", 16)
    monkeypatch.setattr(problems, "draw_mixture", lambda key, n: np.full(n, 1 / n))
    rows = drawn("gradients")
    assert rows.shape == (140, 16)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-5)
    assert seen
    assert not {row.tobytes() for row in drawn("pixels")} & {row.tobytes() for row in seen}


def test_grams_of_unions_are_those_of_the_rows_together():
    rng = np.random.default_rng(4)
    groups = gaussian_sources(rng, [5, 8, 3, 6], 2)
    grams = recovery.merged(
        recovery.exact_grams(groups, [0.5, 2.0]), [5, 8, 3, 6], [(0, 2), (1,), (3,)]
    )
    together = [np.concatenate([groups[0], groups[2]]), groups[1], groups[3]]
    for gram, bandwidth in zip(grams, (0.5, 2.0)):
        np.testing.assert_allclose(gram, gram_of_means(together, bandwidth), rtol=1e-5)


@pytest.fixture(scope="module")
def recovered():
    return recovery.recover(
        RecoveryConfig(TINY, num_targets=2, num_features=(20,), num_chosen=30), 0
    )


@pytest.mark.slow
def test_recovery_reports_every_estimator(recovered):
    names = recovered["names"].tolist()
    assert recovered["weights"].shape == (len(names), 2, 10)
    np.testing.assert_allclose(recovered["weights"].sum(-1), 1, atol=1e-9)
    expected = np.abs(recovered["weights"] - recovered["truth"]).sum(-1) / 2
    np.testing.assert_allclose(recovered["tv"], expected, atol=1e-12)
    uniform = recovered["tv"][names.index(recovery.UNIFORM)]
    for name in (recovery.WHITENED, recovery.AUTO, recovery.EMQ):
        assert recovered["tv"][names.index(name)].mean() < 0.6 * uniform.mean()
    assert recovered["choices"][0].startswith(("whitened", "MMD"))
    # The calibrated row is the cell of the bandwidth that it names.
    cell = names.index(f"exact U, σ = {recovered['sigma']:g}")
    chosen = names.index(recovery.CALIBRATED_MMD)
    np.testing.assert_array_equal(recovered["weights"][cell], recovered["weights"][chosen])


@pytest.mark.slow
def test_linear_mean_matching_is_nonnegative_least_squares(recovered):
    """Its optimality, from the images: no exchange of weight between two classes helps."""
    splits = problems.load(TINY)
    drawn = problems.draw(jax.random.split(jax.random.key(0), 6)[0], splits, 2)
    means = np.stack([rows.mean(0, dtype=float) for rows in drawn.sources])
    names = recovered["names"].tolist()
    for target, weights in zip(drawn.targets, recovered["weights"][names.index(recovery.LINEAR)]):
        slope = means @ (weights @ means - target.mean(0, dtype=float))
        assert slope @ weights - slope.min() < 1e-6


@pytest.mark.slow
def test_ablation_ends_in_the_table_cells():
    """Its last size with the exact kernel is the U-statistic of the whole sources."""
    config = AblationConfig(TINY, num_targets=2, sizes=(6, 12), num_features=(50,))
    measured = recovery.ablate(config, 0)
    assert measured["tv"].shape == (2, 2, len(recovery.SIGMAS), 2)
    draw_key, median_key, _ = jax.random.split(jax.random.key(0), 3)
    drawn = problems.draw(draw_key, problems.load(TINY), 2)
    np.testing.assert_array_equal(drawn.truth, measured["truth"])
    median = recovery.streamed_median_bandwidth(median_key, drawn.sources)
    for n, size in enumerate((6, 12)):
        sources = [rows[:size] for rows in drawn.sources]
        gram = recovery.exact_grams([*sources, drawn.targets[1]], [0.5 * median / np.sqrt(2)])[0]
        error = calibration.total_variation(recovery.mmd_weights(gram, [size] * 10), drawn.truth[1])
        assert measured["tv"][n, -1, recovery.SIGMAS.index(0.5), 1] == pytest.approx(
            error, abs=1e-5
        )


@pytest.mark.parametrize("estimator", [slow("auto"), "mmd"])
def test_coverage_draws_anew_from_one_mixture(estimator):
    samples = replace(TINY, labels="drawn")
    config = CoverageConfig(samples, estimator, resamples=3, replicates=10, num_features=20)
    measured = coverage.cover(config, 0)
    assert measured["intervals"].shape == (3, 10, 2)
    low, high = measured["intervals"][..., 0], measured["intervals"][..., 1]
    assert np.all((low >= 0) & (low <= measured["weights"]) & (measured["weights"] <= high))
    assert len({row.tobytes() for row in measured["weights"]}) == 3
    assert ("choice" in measured) == (estimator == "auto")
    assert measured["signal"].shape == (3,)


def test_a_small_source_has_its_line():
    """Of six draws, four of which hold the small set's weight of .2."""
    intervals = [[[[0.1, 0.3], [0, 1]], [[0.2, 0.4], [0, 1]], [[0.25, 0.3], [0, 1]]] * 2]
    row = {"label": "class 0: 5 rows", "settings": {"small_set": [0, 5]}, "truth": [[0.2, 0.8]]}
    row |= {"intervals": intervals, "mean_weights": [[0.25, 0.75]], "signal": [[3.0, 2.0, 7.0]]}
    (line,) = tables.unequal_table([row]).rows
    assert line[:5] == ["class 0: 5 rows", "3.0", "0.200", "+0.050", "0.150"]
    assert line[5:] == ["67 (standard error 19)", "100 (100 to 100)"]


def test_draws_have_the_shares_and_repeat_whole_sources():
    sources = [np.arange(5), np.arange(100, 103), np.arange(200, 300)]
    chosen = downstream.draw_from(KEY, sources, np.array([0.2, 0.7, 0.1]), 20)
    assert len(chosen) == 20
    assert sorted(chosen[:4]) == sorted(set(chosen[:4]))
    counts = np.bincount(chosen[4:18] - 100)
    assert counts.sum() == 14
    assert counts.max() - counts.min() <= 1
    np.testing.assert_array_equal(
        downstream.draw_from(KEY, sources, np.array([0.0, 0.0, 1.0]), 100).sum(), sources[2].sum()
    )


def test_evaluating_is_that_of_a_sample_with_the_shares():
    """Classes weighted are classes repeated."""
    network, images = MLP(num_classes=3, hidden=(4,)), jax.random.uniform(KEY, (7, 2, 2, 1))
    parameters = jax.jit(network.init)(jax.random.key(1), images)
    labels, repeated = jnp.array([0, 0, 1, 1, 1, 1, 2]), jnp.array([0, 0, 1, 1, 2, 3, 4, 5])
    evaluate = partial(downstream.evaluate, network, parameters)
    loss, accuracy = evaluate(images, labels, np.array([4, 4, 0]) / 8)
    logits = jax.jit(network.apply)(parameters, images)[repeated]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels[repeated])
    assert loss == pytest.approx(float(losses.mean()), rel=1e-6)
    assert accuracy == pytest.approx(float((logits.argmax(1) == labels[repeated]).mean()))
    with pytest.raises(ValueError, match=r"class 2 has the weight 1\.0 and no image"):
        evaluate(images[:6], labels[:6], np.eye(3)[2])


DOWNSTREAM = DownstreamConfig(
    TINY, largest=30, smallest=8, num_images=100, num_epochs=2, hidden=8, num_features=30
)


@pytest.mark.slow
def test_downstream_compares_mixtures_of_unequal_sources():
    measured = downstream.compare(DOWNSTREAM, 0)
    sizes, weights = measured["sizes"], dict(zip(measured["names"], measured["weights"]))
    assert (sizes.min(), sizes.max()) == (8, 30)
    np.testing.assert_allclose(weights["size-proportional"], sizes / sizes.sum(), rtol=1e-12)
    assert measured["tv"][-1] == 0
    assert np.all(np.isfinite(measured["loss"]))
    assert np.all((measured["accuracy"] > 0) & (measured["accuracy"] < 1))


def test_solvers_agree_and_ours_is_certified():
    config = SolversConfig(TINY, parts=(1, 3), solvers=("CLARABEL", "none such"))
    measured = solvers.compare_solvers(config, 0)
    assert measured["num_sets"].tolist() == [10, 30]
    assert np.all(measured["gap"][:, 0] < 1e-12)
    assert np.all(measured["distance"][:, 1] < 1e-3)
    assert np.all(measured["objective"][:, 0] <= measured["objective"][:, 1] + 1e-12)
    assert np.all(np.isnan(measured["gap"][:, 2]))


SPECTRUM = whitening.spectrum([np.eye(2), np.ones((2, 2))])
FEW = np.ones((9, 2))


def target_of_a_class(num):
    splits = problems.load(replace(TINY, num_target=num, target_from="test"))
    sources = problems.draw_sources(KEY, splits, [5] * 10)
    problems.draw_target(KEY, splits, np.eye(10)[0], sources)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Samples(num_target=0), "num_target must be at least 1, got 0"),
        (lambda: AblationConfig(sizes=(50, 100)), "sizes must rise to num_per_class, 500"),
        (lambda: SolversConfig(parts=(2, 3)), "must divide the last"),
        (lambda: DownstreamConfig(largest=5), "largest must be at least smallest: 5, 200"),
        (lambda: CoverageConfig(resamples=0), "resamples must be at least 1"),
        (lambda: target_of_a_class(100), "needs 100 images of class '0' of digits, 35 are left"),
        (lambda: whitening.spectrum([FEW, FEW[:1]]), r"two rows of each .* got \[9, 1\]"),
        (lambda: whitening.whitened_weights(SPECTRUM, np.zeros(2), 0.0), "damping must .* got 0"),
        (lambda: experiments.main(experiments.Arguments(only=("re",))), "no group 're'; there are"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_presets():
    assert presets("paper") is GROUPS
    quick = presets("quick")
    assert set(quick) == set(GROUPS) == set(experiments.MEASURES)
    for group in quick.values():
        assert {config.samples.dataset for config in group.settings.values()} == {"digits"}


@pytest.mark.slow
def test_groups_leave_summaries_tables_and_figures_and_are_skipped_when_done(tmp_path, capsys):
    covered = replace(QUICK["coverage"].settings["auto"], samples=replace(TINY, labels="drawn"))
    small = {
        "recovery": RecoveryConfig(TINY, num_targets=2, num_features=(20,), num_chosen=30),
        "coverage": covered,
        "unequal": replace(covered, estimator="mmd", small_set=(8, 5)),
        "downstream": replace(DOWNSTREAM, num_epochs=1),
        "ablation": AblationConfig(TINY, num_targets=1, sizes=(6, 12), num_features=(30,)),
        "solvers": SolversConfig(TINY, parts=(1,), solvers=("none such",)),
    }
    run = partial(experiments.run_group, arguments=experiments.Arguments(results=tmp_path))

    def times():
        return {path: path.stat().st_mtime_ns for path in tmp_path.rglob("arrays.npz")}

    for name, config in small.items():
        group = Group({"one": config}, seeds=1)
        summary = run(name, group)
        about, before = json.loads(summary.read_text()), times()
        assert about["seeds"] == [0]
        assert "weights" not in about["rows"][0]
        made = tables.tables(about)
        assert all(table.rows and table.caption.endswith(".") for table in made)
        assert run(name, group) == summary
        assert times() == before
        assert tables.tables(json.loads(summary.read_text())) == made
        figures = plot.figures(summary)
        assert all(path.stat().st_size > 10_000 for path in figures)
        assert bool(figures) == (name != "solvers")
    folder = tmp_path / "xp_data_mixing"
    table = tables.bandwidth_table(tables.rows_of(folder / "recovery_quick.json"), "one")
    assert table.heads[1:] == ["exact V", "exact U", "RFF D = 20"]
    assert len(table.rows) == len(recovery.SIGMAS)
    assert "failed" in tables.solver_table(tables.rows_of(folder / "solvers_quick.json")).rows[1]
    assert "cvxpy has no solver" in capsys.readouterr().out


def test_without_cvxpy_its_solvers_are_left_out(monkeypatch, capsys):
    monkeypatch.setattr(experiments, "presets", lambda preset: {"solvers": QUICK["solvers"]})
    monkeypatch.setattr(experiments, "find_spec", lambda name: None)
    assert experiments.main(experiments.Arguments()) == []
    assert "solvers: left out, they are cvxpy's: pip install cvxpy" in capsys.readouterr().out
