"""The DrMMD experiments: metrics against closed forms, flows against loops, commands as run."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tyro
from cases import slow
from kernel_oracles import kernel, mmd_squared
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from scipy.stats import kstest, norm, truncnorm, wasserstein_distance
from scipy.stats import t as t_distribution
from scripts import run_script

from lib import runs
from xp_drmmd import analytic, experiments, flows, metrics, plot, student_teacher, tables
from xp_drmmd.config import ABLATIONS, GROUPS, FlowConfig, StudentConfig, presets
from xp_drmmd.problems import problem
from xp_drmmd.run import Arguments, config_of, run_flow

x64 = pytest.mark.usefixtures("x64")
SMALL = FlowConfig(source_particle_num=12, target_particle_num=9, num_steps=5, records=5)


@pytest.mark.parametrize("variance", [0.5, 2.0])
def test_kl_of_quantiles_approaches_that_of_gaussians_from_below(variance):
    exact = (variance - 1 - np.log(variance)) / 2
    levels = [norm.ppf((np.arange(n) + 0.5) / n) for n in (100, 1000)]
    few, many = (analytic.kl_of_quantiles(np.sqrt(variance) * z[::-1]) for z in levels)
    assert few < many < exact
    assert many == pytest.approx(exact, rel=0.02)
    assert analytic.kl_of_quantiles(levels[0]) == pytest.approx(0, abs=1e-12)
    assert analytic.kl_of_quantiles(levels[1]) == pytest.approx(0, abs=1e-12)
    assert analytic.kl_of_quantiles(np.zeros(3)) == np.inf


def test_chi_squared_flow_starts_at_the_closed_form_and_ends_at_its_rate():
    """At t = 0: KL in closed form, and its derivative -2 E_pi |grad r|^2 with r = sqrt(2)
    exp(-y^2 / 2), that is -4 E y^2 exp(-y^2) = -4 / 3^1.5."""
    times = np.array([0, 0.001, 1.5, 2.0])
    kl = analytic.chi_squared_kl(times, num_cells=300)
    assert kl[0] == pytest.approx((0.5 - 1 - np.log(0.5)) / 2, rel=2e-3)
    assert (kl[1] - kl[0]) / 0.001 == pytest.approx(-4 / 3**1.5, rel=0.01)
    assert np.log(kl[2] / kl[3]) / 0.5 == pytest.approx(8, rel=0.01)
    assert np.all(kl <= kl[0] * np.exp(-2 * times) + 1e-12)


@pytest.mark.parametrize(("p", "metric"), [(1, "euclidean"), (2, "sqeuclidean")])
def test_wasserstein_is_that_of_an_assignment(p, metric):
    """Points of weight 2 / 9 are two of the copies that are assigned."""
    rng, times = np.random.default_rng(0), np.array([2, 1, 3, 1, 2])
    x, y = rng.normal(size=(9, 3)), rng.normal(size=(5, 3))
    copies = y.repeat(times, axis=0)
    costs = cdist(x, copies, metric)
    expected = costs[linear_sum_assignment(costs)].mean() ** (1 / p)
    assert metrics.wasserstein(x, copies, p, None) == pytest.approx(expected, rel=1e-9)
    assert metrics.wasserstein(x, y, p, times / 9) == pytest.approx(expected, rel=1e-9)


@x64
def test_evaluate_names_and_squares():
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(6, 1)), rng.normal(size=(7, 1))
    evaluated = metrics.evaluate(jnp.asarray(x), jnp.asarray(y), 0.7)
    expected = mmd_squared(x, y, lambda a, b: kernel(a, b, 0.7))
    assert evaluated["mmd2"] == pytest.approx(expected, rel=1e-9)
    assert evaluated["w1"] == pytest.approx(wasserstein_distance(x[:, 0], y[:, 0]), rel=1e-9)
    assert set(evaluated) == {"mmd2", "w1", "w2", "kl"}
    flat = metrics.evaluate(jnp.asarray(np.tile(x, 2)), jnp.asarray(np.tile(y, 2)), 0.7)
    assert set(flat) == {"mmd2", "w1", "w2"}


@x64
def test_rings_are_the_published_ones():
    posed = problem(FlowConfig(), 0)
    assert posed.start.shape == posed.target.shape == (300, 2)
    centers = np.repeat([[0, 0], [0, -0.75], [0, -1.5]], 100, axis=0)
    np.testing.assert_allclose(np.linalg.norm(posed.target - centers, axis=1), 0.3, rtol=1e-12)
    np.testing.assert_allclose(posed.start.mean(0), [0, -0.3], atol=0.003)
    assert not np.array_equal(problem(FlowConfig(), 1).start, posed.start)


FOUR_MEANS = 2 * np.array([[1, 1], [1, -1], [-1, 1], [-1, -1]])


@x64
@pytest.mark.parametrize(
    ("name", "density"),
    [
        ("FourGaussian", lambda z: np.exp(-((z - FOUR_MEANS) ** 2).sum(1) / 0.6).mean()),
        ("Gaussian1D", lambda z: norm.pdf(z[0])),
    ],
)
def test_scores_are_those_of_the_densities(name, density):
    posed = problem(replace(SMALL, dataset=name), 0)
    z = np.asarray(posed.target[0])
    score = jax.jit(jax.grad(posed.log_density))(z)
    for i, step in enumerate(1e-5 * np.eye(len(z))):
        difference = np.log(density(z + step)) - np.log(density(z - step))
        assert score[i] == pytest.approx(difference / 2e-5, rel=1e-6)


@x64
def test_quadrature_has_the_moments_of_the_gaussian():
    posed = problem(replace(SMALL, dataset="Gaussian1DExact"), 0)
    x, w = np.asarray(posed.target[:, 0]), np.asarray(posed.weights)
    np.testing.assert_allclose([w @ x**k for k in (0, 1, 2, 4)], [1, 0, 1, 3], atol=1e-12)


@x64
def test_images_are_their_principal_components():
    config = replace(SMALL, dataset="digits", components=64, target_particle_num=80)
    posed = problem(config, 0)
    images = posed.basis.center + np.asarray(posed.target) @ posed.basis.components
    assert posed.basis.image_shape == (8, 8, 1)
    # All components: the images themselves, 256 levels of gray.
    np.testing.assert_allclose(255 * images, np.round(255 * images), atol=1e-4)
    assert images.min() > -1e-6
    assert posed.start.shape == (12, 64)


def moved(config, seed=0):
    """What one step adds to the particles, by the engine's own objective."""
    posed = problem(config, seed)
    prepared = flows.prepare(config, posed.target, posed.weights)
    value_and_grad = jax.jit(flows.objective(config, posed.log_density))
    key = jax.random.PRNGKey(3)
    values, velocity, _ = value_and_grad(
        posed.start[None], prepared, key, flows.first_memory(prepared)
    )
    return posed, -np.asarray(velocity[0]), np.asarray(values[0]), key


def scores(posed):
    """Of the density, where the particles start."""
    return np.asarray(jax.jit(jax.vmap(jax.grad(posed.log_density)))(posed.start))


@x64
def test_langevin_is_a_step_along_the_score_and_noise():
    config = replace(SMALL, dataset="FourGaussian", flow="ula", step_size=0.02)
    posed, step, _, key = moved(config)
    score = scores(posed)
    noise = np.asarray(jax.random.normal(jax.random.split(key, 1)[0], posed.start.shape, float))
    np.testing.assert_allclose(step, 0.02 * score + np.sqrt(0.04) * noise, rtol=1e-10, atol=1e-12)


@x64
def test_stein_is_the_double_loop():
    config = replace(SMALL, dataset="FourGaussian", flow="svgd", step_size=0.5, bandwidth=1.3)
    posed, step, _, _ = moved(config)
    y = np.asarray(posed.start)
    score = scores(posed)
    forces = score[None] + (y[:, None] - y[None]) / 1.3**2
    expected = np.einsum("ij,ijd->id", kernel(y, y, 1.3), forces)
    np.testing.assert_allclose(step, 0.5 * expected / len(y), rtol=1e-9, atol=1e-12)


@x64
@pytest.mark.parametrize(
    ("dataset", "directions", "error"), [("Gaussian1DExact", 2, 1e-9), ("ThreeRing", 4000, 0.05)]
)
def test_sliced_mmd_is_the_energy_flow(dataset, directions, error):
    """On the line exactly, with a target that has weights."""
    config = replace(SMALL, dataset=dataset, flow="mmd", kernel="Energy", bandwidth=0.7)
    _, expected, energy, _ = moved(config)
    sliced = replace(config, flow="sliced_mmd", kernel="Gaussian", num_directions=directions)
    _, step, values, _ = moved(sliced)
    np.testing.assert_allclose(step, expected, rtol=0, atol=error * np.abs(expected).max())
    np.testing.assert_allclose(values, energy, rtol=error)
    assert flows.kernel_line(sliced) == flows.kernel_line(config)


@pytest.mark.slow
@x64
@pytest.mark.parametrize("flow", ["mmd", "drmmd", "kale"])
def test_flows_of_a_stack_are_single_flows(flow):
    """Lambdas and step sizes of their own, one call."""
    config = replace(SMALL, flow=flow)
    posed, evaluate = problem(config, 0), flows.objective(config)
    parameters = jnp.asarray([[1e-2, 1.0], [1e-1, 2.0]])
    starts = jnp.stack([posed.start, posed.start + 0.1])

    def value_and_velocity(chosen):
        prepared = flows.prepare(config, posed.target, num_flows=len(parameters[chosen]))
        prepared = prepared._replace(lmbda=parameters[chosen, 0], step_size=parameters[chosen, 1])
        memory = flows.first_memory(prepared)
        return evaluate(starts[chosen], prepared, jax.random.PRNGKey(0), memory)[:2]

    values, velocities = value_and_velocity(slice(None))
    for i in range(2):
        value, velocity = value_and_velocity(slice(i, i + 1))
        np.testing.assert_allclose(values[i], value[0], rtol=1e-9)
        np.testing.assert_allclose(velocities[i], velocity[0], rtol=1e-8, atol=1e-12)


@x64
@pytest.mark.parametrize(
    ("config", "power"),
    [
        (replace(SMALL, adaptive="paper", regularity=0.5, lmbda=0.1), 1 / 1.5),
        (replace(SMALL, adaptive="published", lmbda=0.1, step_size=0.05), 0.5),
    ],
)
def test_adaptive_rules_step_by_step(config, power):
    """lambda from the value at the last lambda; the published step falls with it."""
    posed = problem(config, 0)
    prepared = flows.prepare(config, posed.target)
    memory = start = flows.first_memory(prepared)
    key = jax.random.PRNGKey(0)
    fixed = jax.jit(flows.objective(replace(config, adaptive="fixed")))
    rule = jax.jit(flows.objective(config))
    y, lmbda, first = posed.start, 0.1, None
    for _ in range(3):
        at_last = prepared._replace(lmbda=jnp.asarray([lmbda]))
        value = fixed(y[None], at_last, key, start)[0][0, 0]
        first = value if first is None else first
        lmbda = float(0.1 * (value / first) ** power)
        values, velocity, memory = rule(y[None], prepared, key, memory)
        assert values[0, 1] == pytest.approx(lmbda, rel=1e-9)
        step = config.step_size if config.adaptive == "paper" else 0.05 * lmbda / 0.1
        assert values[0, 2] == pytest.approx(step, rel=1e-9)
        y = y - velocity[0]


@pytest.mark.slow
@x64
@pytest.mark.parametrize("flow", ["mmd", "drmmd"])
def test_landmarks_among_the_particles_follow_them(flow):
    """Landmarks everywhere give the exact flow wherever the particles are, half of them its
    witness."""
    config = replace(
        SMALL, flow=flow, source_particle_num=40, target_particle_num=42, bandwidth=0.3
    )
    target, key = problem(config, 0).target, jax.random.PRNGKey(0)

    def velocity(y, chosen):
        prepared = flows.prepare(chosen, target)
        return flows.objective(chosen)(y[None], prepared, key, flows.first_memory(prepared))[1]

    for shift, rank, error in ((1.5, 80, 1e-5), (0.0, 60, 0.02), (5.0, 60, 0.02), (-20, 60, 0.02)):
        y = shift + 0.1 * jax.random.normal(jax.random.key(1), (40, 2))
        exact = velocity(y, config)
        near = velocity(y, replace(config, approximation="nystrom", rank=rank))
        np.testing.assert_allclose(near, exact, rtol=0, atol=error * jnp.abs(exact).max())


def prepare(num_particles, rank):
    sizes = {"source_particle_num": num_particles, "target_particle_num": 42}
    config = replace(SMALL, approximation="nystrom", rank=rank, **sizes)
    flows.prepare(config, problem(config, 0).target)


def run_nowhere(**options):
    run_flow(replace(SMALL, **options), seed=0, results=Path("nowhere"))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: run_nowhere(flow="kale", approximation="rff"), "kale has no form in features"),
        (lambda: run_nowhere(kernel="Laplace", approximation="rff"), "Gaussian here, not Laplace"),
        (lambda: run_nowhere(flow="svgd"), "svgd needs a density, ThreeRing has none"),
        (lambda: prepare(40, 86), "rank 86 wants 43 target points as landmarks of 42"),
        (lambda: prepare(20, 60), "rank 60 wants 30 particles as landmarks of 20"),
        (lambda: problem(replace(SMALL, target_particle_num=10), 0), "multiple of 3"),
        (lambda: FlowConfig(lmbda=0.0), "lmbda must be .*, got 0.0"),
        (lambda: FlowConfig(lmbda=np.inf), "lmbda must be .*, got inf"),
        (lambda: FlowConfig(step_size=-1.0), "step_size must be .*, got -1.0"),
        (lambda: FlowConfig(bandwidth=-0.1), "bandwidth must be .*, got -0.1"),
        (lambda: FlowConfig(num_steps=0), "num_steps must be .*, got 0"),
        (lambda: FlowConfig(source_particle_num=0), "source_particle_num must be .*, got 0"),
        (lambda: FlowConfig(noise=-1.0), "noise must be .*, got -1.0"),
        (lambda: FlowConfig(regularity=0.0), "regularity must be .*, got 0.0"),
        (lambda: FlowConfig(flow="sliced_mmd", kernel="IMQ"), "of the kernel Energy, not of IMQ"),
        (lambda: FlowConfig(flow="sliced_mmd", noise=0.1), "noise 0.1 has no effect without"),
        (lambda: FlowConfig(num_directions=7), "num_directions 7 has no effect without --flow"),
        (lambda: run_nowhere(flow="sliced_mmd", approximation="rff"), "sliced_mmd has no form in"),
        (lambda: FlowConfig(records=0), "records must be .*, got 0"),
        (lambda: experiments.main(experiments.Arguments(only=("rings2",))), "no group 'rings2'"),
    ],
)
def test_what_cannot_be_is_named(tmp_path, monkeypatch, call, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=words):
        call()


def test_a_stored_flow_holds_numbers_and_is_not_run_twice(tmp_path, monkeypatch):
    run = run_flow(SMALL, seed=0, results=tmp_path)
    stored = run.load_arrays()
    assert stored["particles"].shape == (6, 12, 2)
    assert stored["particles"].dtype == np.float64
    np.testing.assert_array_equal(stored["steps"], range(6))
    assert stored["values"].shape == stored["lambdas"].shape == (5,)
    assert stored["w2"].shape == (6,)
    assert np.all(np.diff(stored["values"]) < 0)
    monkeypatch.setattr("xp_drmmd.run.wasserstein_gradient_descent", None)
    run_flow(SMALL, seed=0, results=tmp_path)


@pytest.mark.slow
def test_the_published_flags(tmp_path):
    """As printed in the paper's repository, fewer steps."""
    flags = "--dataset ThreeRing --flow drmmd --kernel Gaussian --lmbda 0.001 --step_size 0.1 "
    flags += "--bandwidth 0.15 --step_num 20 --source_particle_num 30 --target_particle_num 30 "
    flags += f"--opt sgd --seed 42 --results {tmp_path}"
    printed = run_script("xp_drmmd/run.py", *flags.split())
    assert "step size 0.0001" in printed
    assert "w1" in printed
    assert list(tmp_path.glob("xp_drmmd/ThreeRing-drmmd-*/seed42/arrays.npz"))


# What the paper's repository prints, and the other flags of its run.py.
PUBLISHED = {
    "--dataset ThreeRing --flow drmmd --kernel Gaussian --lmbda 0.001 --step_size 0.1 --bandwidth "
    "0.15 --step_num 20000 --source_particle_num 300 --opt sgd --seed 42": FlowConfig(),
    "--dataset ThreeRing --flow drmmd --kernel Gaussian --lmbda 0.1 --step_size 0.1 --bandwidth "
    "0.3 --step_num 100000 --adaptive_lmbda --opt sgd --seed 43": FlowConfig(
        lmbda=0.1, step_size=0.01, bandwidth=0.3, num_steps=100_000, adaptive="published"
    ),
    "--dataset MixGaussian --flow drmmd_spectral --spectral showalter --kernel Energy": FlowConfig(
        dataset="FourGaussian", spectral_filter="showalter", kernel="Energy"
    ),
    "--nystrom 150 --inject_noise_scale 0.5 --diffusion_noise_scale 1.0": FlowConfig(
        approximation="nystrom", rank=150, noise=0.5
    ),
    "--flow ula --dataset Gaussian2d --logccv 4 --diffusion_noise_scale 0.5": FlowConfig(
        flow="ula", dataset="Gaussian2d", target_scale=4.0, diffusion_noise_scale=0.5
    ),
    "--dataset Student --kernel Laplace --distance l1": FlowConfig(
        dataset="Student", kernel="Laplace", distance="l1"
    ),
    "--dataset Gaussian1d --nystrom 0": FlowConfig(dataset="Gaussian1d"),
}


def test_published_command_lines_parse_as_printed():
    for command, expected in PUBLISHED.items():
        arguments = tyro.cli(Arguments, args=[*command.split(), "--save_path", "./results_new/"])
        assert arguments.results == Path("results_new")
        config = config_of(arguments)
        assert replace(config, step_size=1) == replace(expected, step_size=1)
        assert config.step_size == pytest.approx(expected.step_size)
    assert config_of(Arguments(lmbda=0.01, gamma=0.3)).step_size == 0.3


def test_the_published_student_command_parses_as_printed():
    command = "--device 0 --lmbda 0.1 --loss drmmd --lr 0.1 --with_noise {} --noise_decay_freq 500"
    for with_noise, noise in (("false", 0.0), ("true", 1.0)):
        line = f"{command.format(with_noise)} --seed 42 --log_in_file"
        arguments = tyro.cli(student_teacher.Arguments, args=line.split())
        expected = StudentConfig(lmbda=0.1, step_size=0.1, noise=noise, halve_every=500)
        assert student_teacher.config_of(arguments) == expected
        assert arguments.seed == 42


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("--distance l1", "distance l1 has no effect without --kernel Laplace"),
        ("--diffusion_noise_scale 2", "2.0 has no effect without --flow ula"),
        ("--logccv 2", "target_scale 2.0 has no effect without --dataset Gaussian2d"),
        ("--adaptive_lmbda --flow mmd", "is of the flow drmmd, not of mmd"),
        ("--adaptive_lmbda --adaptive paper", "is --adaptive published, not --adaptive"),
        ("--nystrom -1", "nystrom is a number of columns, 0 for none"),
        ("--nystrom 9 --approximation rff", "without --approximation rff: got 9"),
        ("--flow svgd --kernel Energy", "svgd needs a kernel of x - y"),
        ("--lmbda -1", "lmbda must be positive and finite, got -1.0"),
        ("--device 1", "CUDA_VISIBLE_DEVICES"),
    ],
)
def test_flags_that_do_not_fit_together_end_in_a_line_before_anything_is_done(
    command, message, capsys
):
    parser = student_teacher.Arguments if "--device" in command else Arguments
    with pytest.raises(SystemExit):
        tyro.cli(parser, args=command.split())
    errors = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert message in errors
    assert "Traceback" not in errors


@x64
def test_kernels_are_the_published_formulas():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(5, 3)), rng.normal(size=(4, 3))
    from_origin = np.linalg.norm(x, axis=1)[:, None] + np.linalg.norm(y, axis=1)
    for name, distance, expected in (
        ("Laplace", "l1", np.exp(-cdist(x, y, "cityblock") / 0.7)),
        ("Laplace", "l2", np.exp(-cdist(x, y) / 0.7)),
        ("Energy", "l2", (from_origin - cdist(x, y)) / 1.4),
    ):
        config = FlowConfig(kernel=name, distance=distance, bandwidth=0.7)
        gram = flows.kernel_of(config)(jnp.asarray(x), jnp.asarray(y))
        np.testing.assert_allclose(gram, expected, rtol=1e-12, atol=1e-14)
        assert f"({distance})" in flows.kernel_line(config)
    positive = np.linalg.eigvalsh(flows.kernel_of(config)(jnp.asarray(x), jnp.asarray(x)))
    assert positive.min() > 0


def test_a_run_stores_the_distance_of_its_kernel_and_keeps_its_name_without_one(tmp_path):
    """The folder of the published rings is named as when they were run."""
    assert FlowConfig(flow="ula", dataset="FourGaussian").without_effect() == (
        "target", "source", "distance", "diffusion_noise_scale", "target_scale", "num_directions",
    )  # fmt: skip
    exclude = (*runs.NOT_HASHED, *FlowConfig().without_effect())
    assert runs.config_hash(ABLATIONS["Tikhonov"], exclude=exclude) == "f8caa3c792"
    published, ours = (replace(SMALL, kernel="Laplace", distance=d) for d in ("l1", "l2"))
    run = run_flow(published, seed=0, results=tmp_path)
    assert json.loads((run.folder / "config.json").read_text())["distance"] == "l1"
    hashes = {runs.config_hash(c, exclude=c.without_effect()) for c in (published, ours)}
    assert len(hashes) == 2


@x64
@pytest.mark.parametrize(
    ("name", "center", "spread"),
    [
        ("Gaussian1d", 0, 0.01),
        ("Gaussian2d", 1, 1),
        slow("Student", 2.5, 1),
    ],
)
def test_published_data_sets_are_what_they_are_called(name, center, spread):
    options = {"target_scale": 4.0} if name == "Gaussian2d" else {}
    config = FlowConfig(dataset=name, target_particle_num=4000, source_particle_num=4000, **options)
    posed = problem(config, 0)
    target = np.asarray(posed.target)
    assert target.shape == (4000, 1 if name == "Gaussian1d" else 2)
    normalized = (np.asarray(posed.start) - center) / spread
    assert kstest(normalized.ravel(), "norm").pvalue > 1e-3
    if name == "Gaussian1d":
        assert kstest(target[:, 0], truncnorm(-1, 1).cdf).pvalue > 1e-3
    elif name == "Gaussian2d":
        assert kstest(target.ravel() / 4, "norm").pvalue > 1e-3
    else:
        assert np.abs(target).max() <= 10
        # Turned back, each coordinate is Student's, except the one in fifty that lies outside.
        for column in (target @ [[1, 1], [-1, 1]] / np.sqrt(2)).T:
            assert kstest(column, t_distribution(2).cdf).statistic < 0.05


def test_a_group_makes_its_table_and_figures(tmp_path):
    small = {"a": SMALL, "b": replace(SMALL, flow="mmd", num_steps=4)}
    arguments = experiments.Arguments(seeds=(0, 1), results=tmp_path)
    summary = experiments.run_group("rings", small, arguments)
    stored = json.loads(summary.read_text())
    assert np.shape(stored["rows"][0]["w1"]) == (2, 6)
    first, second = tables.table(stored, w1=100.0).rows
    assert (first[:4], first[-1]) == (["a", "0.001", "0.0001", "5"], "0")
    assert second[:4] == ["b", "-", "0.0001", "4"]
    heads = tables.table(stored, names=("w2",)).heads
    assert heads == ["flow", "λ", "step size", "steps", "W2"]
    assert [path.name for path in plot.figures(summary)] == [
        "rings_quick_curves.png",
        "rings_quick_ends.png",
    ]


def test_presets_name_flows_that_exist():
    assert presets("paper") == GROUPS
    quick = presets("quick")
    assert set(quick) < set(GROUPS)
    students = quick.pop("students").values()
    assert max(c.num_epochs for c in students) <= 100
    assert max(c.num_steps for group in quick.values() for c in group.values()) <= 2_000
    assert len({str(c) for c in ABLATIONS.values()}) == len(ABLATIONS)
