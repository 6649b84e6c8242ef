"""The benchmark compares like with like: both contenders estimate the same F and gradient."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from lib import mmd
from lib.sliced_wasserstein import (
    percentile_coupling,
    random_directions,
    sliced_wasserstein_power,
)

ROOT = Path(__file__).parents[2]
NUM_DIRECTIONS = 20


@pytest.fixture(scope="module")
def published():
    """benchmarks/published_wow.py, which is not installed."""
    spec = importlib.util.spec_from_file_location(
        "published_wow", ROOT / "benchmarks" / "published_wow.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def published_draws(key, dimension):
    """The directions and the levels that the published form draws, both from one key."""
    levels = jax.random.uniform(key, (NUM_DIRECTIONS, 100))
    return random_directions(key, NUM_DIRECTIONS, dimension), percentile_coupling(levels)


def clouds(*shape):
    key_x, key_y = jax.random.split(jax.random.key(0))
    return jax.random.normal(key_x, shape), 1 + 2 * jax.random.normal(key_y, shape)


def test_published_distance_is_ours_at_its_levels_and_near_the_exact_one(published):
    @jax.jit
    def distances(x, y, keys):
        def at_levels(key):
            directions, coupling = published_draws(key, 5)
            return (
                published.sliced_wasserstein_power(x, y, key, num_projections=NUM_DIRECTIONS),
                sliced_wasserstein_power(x, y, directions, coupling=coupling),
            )

        directions = random_directions(jax.random.key(2), 500, 5)
        return *jax.vmap(at_levels)(keys), sliced_wasserstein_power(x, y, directions)

    x, y = clouds(2049, 5)
    theirs, ours, exact = distances(x, y, jax.random.split(jax.random.key(1), 20))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    error = np.std(theirs) / np.sqrt(len(theirs))  # of the mean over keys
    assert abs(np.mean(theirs) - exact) < 5 * error
    assert error < 0.05 * exact


@pytest.mark.parametrize(
    "name",
    [
        "riesz",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("gaussian", "laplace", "imq")),
    ],
)
def test_published_step_is_ours_at_its_levels(published, name):
    parameter = {"riesz": 1.0, "gaussian": 0.1, "laplace": 0.5, "imq": 1.0}[name]

    @jax.jit
    def both(x, y, key):
        kernel = getattr(published, name)(parameter, num_projections=NUM_DIRECTIONS)
        directions, coupling = published_draws(key, 4)
        ours = mmd.wow_value_and_grad(
            getattr(mmd, f"sliced_{name}")(parameter), x, y, directions, coupling=coupling
        )
        return ours, published.value_and_grad(kernel, x, y, key)

    ours, theirs = both(*clouds(3, 8, 4), jax.random.key(1))
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-4)
    scale = np.abs(theirs[1]).max()
    np.testing.assert_allclose(ours[1], theirs[1], rtol=1e-3, atol=1e-4 * scale)


@pytest.mark.slow
def test_benchmark_runs(tmp_path):
    out = tmp_path / "deep" / "flows.json"
    command = [sys.executable, ROOT / "benchmarks" / "flows.py", "--shapes", "2", "10", "3"]
    command += ["--repeats", "2", "--projections", "20", "--kernel", "laplace", "--out", out]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    subprocess.run([str(part) for part in command], check=True, env=environment, timeout=600)
    (result,) = json.loads(out.read_text())["results"]
    assert result["shape"] == [2, 10, 3]
    assert {"ours", "published", "flow, 1 step"} < result["contenders"].keys()
    pairs = [value for name, value in result["values"].items() if name.startswith("pair")]
    np.testing.assert_allclose(pairs, pairs[0], rtol=1e-4)


@pytest.mark.slow
def test_transfer_benchmark_runs(tmp_path):
    out = tmp_path / "transfer.json"
    command = [sys.executable, ROOT / "benchmarks" / "transfer.py", "--src_dataset", "digits"]
    command += ["--tgt_dataset", "digits:rotated", "--size", "12", "--num_per_class", "6"]
    command += ["--k_shot", "2", "--rounds", "2", "--n_epochs_wgd", "10", "--out", out]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    subprocess.run([str(part) for part in command], check=True, env=environment, timeout=600)
    found = json.loads(out.read_text())
    ours, published = found["ours"], found["published"]
    assert 0 < ours["flow"] < ours["whole"]
    assert published["flow"] > 5_000 * found["per_step"]["published"]["step"]


@pytest.mark.slow
def test_solver_benchmark_runs(tmp_path):
    out = tmp_path / "mixing.json"
    command = [sys.executable, ROOT / "benchmarks" / "mixing.py", "--sizes", "3", "12"]
    command += ["--kinds", "mixture", "domain", "--repeats", "2", "--replicates", "3"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command += ["--out", out]
    subprocess.run([str(part) for part in command], check=True, env=environment, timeout=600)
    found = json.loads(out.read_text())
    assert [(one["size"], one["features"], one["kind"]) for one in found["results"]] == [
        (3, 100, "mixture"), (3, 100, "domain"), (12, 100, "mixture"), (12, 100, "domain"),
        (12, 1000, "mixture"),
    ]  # fmt: skip
    for result in found["results"]:
        for name, one in result["contenders"].items():
            timed = [one[what] for what in ("solve", "means") if what in one]
            assert timed
            assert all(times["wall"] > 0 for times in timed)
            # OSQP's own tolerance is 1e-3, Clarabel's 1e-8.
            most = 1e-14 if name == "ours" else 1e-9 if "tight" in name else 1e-3
            assert one["gap_to_scale"] < most, name
    assert found["bootstrap"]["largest_gap_to_scale"] < 1e-14


@pytest.mark.slow
def test_mixing_stream_benchmark_runs(tmp_path):
    out = tmp_path / "mixing_stream.json"
    command = [sys.executable, ROOT / "benchmarks" / "mixing_stream.py", "--files", "2"]
    command += ["--rows", "700", "--dimension", "32", "--num_features", "50", "--num_blocks", "3"]
    command += ["--chunk_size", "256", "--folder", tmp_path, "--out", out]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    subprocess.run([str(part) for part in command], check=True, env=environment, timeout=600)
    found = json.loads(out.read_text())
    assert [r["stream"]["rows"] for r in found["rounds"]] == [700, 700]
    assert found["binds"] in {"disk", "product"}
    assert 0 < found["resident_bytes"]["before"] <= found["resident_bytes"]["peak"]
    assert [path.name for path in tmp_path.iterdir()] == ["mixing_stream.json"]
