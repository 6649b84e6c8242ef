"""The benchmark compares like with like: both contenders estimate the same F and gradient."""

import json

import jax
import numpy as np
import pytest
from scripts import benchmark, run_script

from lib import mmd
from lib.sliced_wasserstein import percentile_coupling, random_directions, sliced_wasserstein_power

NUM_DIRECTIONS = 20
published = benchmark("published_wow")


def published_draws(key, dimension):
    """The directions and the levels that the published form draws, both from one key."""
    levels = jax.random.uniform(key, (NUM_DIRECTIONS, 100))
    return random_directions(key, NUM_DIRECTIONS, dimension), percentile_coupling(levels)


def clouds(*shape):
    key_x, key_y = jax.random.split(jax.random.key(0))
    return jax.random.normal(key_x, shape), 1 + 2 * jax.random.normal(key_y, shape)


@pytest.mark.slow
def test_published_distance_is_ours_at_its_levels_and_near_the_exact_one():
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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["riesz", "gaussian", "laplace", "imq"])
def test_published_step_is_ours_at_its_levels(name):
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


def results_of(script, tmp_path, arguments):
    """What the benchmark writes."""
    out = tmp_path / "deep" / f"{script}.json"
    script = f"benchmarks/{script}.py"
    run_script(script, *arguments.split(), "--out", out, JAX_PLATFORMS="cpu")
    return json.loads(out.read_text())


@pytest.mark.slow
def test_flow_benchmark_runs(tmp_path):
    arguments = "--shapes 2 10 3 --repeats 2 --projections 20 --kernel laplace"
    (result,) = results_of("flows", tmp_path, arguments)["results"]
    assert result["shape"] == [2, 10, 3]
    assert {"ours", "published", "flow, 1 step"} < result["contenders"].keys()
    pairs = [value for name, value in result["values"].items() if name.startswith("pair")]
    np.testing.assert_allclose(pairs, pairs[0], rtol=1e-4)


@pytest.mark.slow
def test_transfer_benchmark_runs(tmp_path):
    arguments = "--src_dataset digits --tgt_dataset digits:rotated --size 12 --num_per_class 6"
    arguments += " --k_shot 2 --rounds 2 --n_epochs_wgd 10"
    document = results_of("transfer", tmp_path, arguments)
    assert 0 < document["ours"]["flow"] < document["ours"]["whole"]
    assert document["published"]["flow"] > 5_000 * document["per_step"]["published"]["step"]


@pytest.mark.slow
def test_solver_benchmark_runs(tmp_path):
    arguments = "--sizes 3 12 --kinds mixture domain --repeats 2 --replicates 3"
    document = results_of("mixing", tmp_path, arguments)
    assert [(r["size"], r["features"], r["kind"]) for r in document["results"]] == [
        (3, 100, "mixture"), (3, 100, "domain"), (12, 100, "mixture"), (12, 100, "domain"),
        (12, 1000, "mixture"),
    ]  # fmt: skip
    for result in document["results"]:
        for name, contender in result["contenders"].items():
            timed = [contender[what] for what in ("solve", "means") if what in contender]
            assert timed
            assert all(times["wall"] > 0 for times in timed)
            # OSQP's own tolerance is 1e-3, Clarabel's 1e-8.
            most = 1e-14 if name == "ours" else 1e-9 if "tight" in name else 1e-3
            assert contender["gap_to_scale"] < most, name
    assert document["bootstrap"]["largest_gap_to_scale"] < 1e-14


@pytest.mark.slow
def test_mixing_stream_benchmark_runs(tmp_path):
    arguments = "--files 2 --rows 700 --dimension 32 --num_features 50 --num_blocks 3"
    arguments += f" --chunk_size 256 --folder {tmp_path}"
    document = results_of("mixing_stream", tmp_path, arguments)
    assert [r["stream"]["rows"] for r in document["rounds"]] == [700, 700]
    assert document["binds"] in {"disk", "product"}
    assert 0 < document["resident_bytes"]["before"] <= document["resident_bytes"]["peak"]
    assert [path.name for path in tmp_path.iterdir()] == ["deep"]


def test_figures_of_the_house_are_those_of_a_small_one(tmp_path):
    """By benchmarks/house.py, on a checkout written here."""
    wide = ", ".join(f"a{i}" for i in range(11))
    long = "\n".join(f"    x = {i}" for i in range(80))
    for name, text in {
        "lib/one.py": "def used(): ...\n\n"
        f"def idle({wide}): run.save_checkpoint()\n\ndef _long():\n{long}\n",
        "lib/two/__init__.py": "from lib.one import idle  # noqa: F401\n",
        "tests/test_one.py": "from lib.one import idle\n\nidle()\n",
        "xp_one/run.py": "from lib import one\n\none.used()\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    table, *_ = run_script("benchmarks/house.py", tmp_path).split("\n\n")
    assert [int(line.split()[-1]) for line in table.splitlines()] == [2, 1, 1, 1, 1, 1, 86, 3]
