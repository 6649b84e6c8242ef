"""The benchmark of scaling: its exponents are those of known laws, its formulas of memory those of
compiled programs, and it runs."""

import json

import jax
import numpy as np
import pytest
from cases import slow
from scripts import benchmark

scaling = benchmark("scaling")


def test_exponent_is_that_of_the_largest_three_sizes():
    sizes = np.array([1.0, 2, 4, 8, 16])
    law = 3 * sizes**1.7
    law[:2] = 5
    assert scaling.exponent(sizes, law) == pytest.approx(1.7, abs=1e-12)


def test_theory_counts_logarithms():
    sweep = scaling.Sweep("wow", "n", (256, 512, 1024), {}, ("n log²n", 1), ("n", 1), 2)
    # 256 (8 log 2)^2 to 1024 (10 log 2)^2: a factor 4 x 100/64 over a factor 4.
    shape = sweep.theory("time")
    assert shape[-1] / shape[0] == pytest.approx(4 * 100 / 64)
    assert scaling.exponent(sweep.values, sweep.theory("memory")) == pytest.approx(1)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("drmmd", {"N": 3000, "M": 1000, "d": 2}),
        ("drmmd_target", {"M": 2000, "d": 3}),
        ("embeddings", {"n": 10**6, "d": 3000, "D": 700}),
        slow("wow", {"C": 20, "n": 300, "d": 500, "L": 200}),
        slow("condensation", {"C": 6, "n": 100, "width": 48, "ipc": 7}),
        slow("em", {"n": 10**6, "d": 400, "K": 6}),
    ],
)
def test_formula_of_memory_is_that_of_compiled_programs(name, sizes):
    assert scaling.check(name, sizes)["ratio"] == pytest.approx(1, abs=0.25)


def test_largest_is_the_last_that_fits():
    system, sizes, budget = scaling.SYSTEMS["drmmd"], {"d": 2, "N": 500}, 1e9
    largest = scaling.largest("drmmd", "M", budget, **sizes)
    needed = [
        system.predicted(M=M, **sizes) + system.beside(M=M, **sizes) for M in (largest, largest + 1)
    ]
    assert needed[0] <= budget < needed[1]
    both = scaling.largest("drmmd", "N=M", budget, d=2)
    assert both == pytest.approx((budget / 8 / 5) ** 0.5, rel=0.01)  # five matrices of float64


@pytest.mark.slow
def test_quick_run(tmp_path):
    out = tmp_path / "deep" / "scaling.json"
    scaling.main(scaling.Options(quick=True, rounds=2, out=out))
    assert out.with_suffix(".png").stat().st_size > 10_000
    results = json.loads(out.read_text())
    assert {row["system"] for row in results["sweeps"]} == {sweep.system for sweep in scaling.QUICK}
    for row in results["sweeps"]:
        assert all(p["cpu"] > 0 and p["memory"] > 0 for p in row["points"])
    again = tmp_path / "again.json"
    scaling.main(scaling.Options(read=(out, out), out=again))
    assert json.loads(again.read_text())["sweeps"] == 2 * results["sweeps"]
    assert not jax.config.jax_enable_x64
