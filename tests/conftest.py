"""Shape annotations are checked, and silent rank promotion raises, in tests only."""

import gc
import os
import signal
import sys
from pathlib import Path

# Else every parallel worker takes three quarters of a GPU; JAX_PLATFORMS=cuda tests there.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import lines
import pytest
from jaxtyping import install_import_hook

install_import_hook(["lib"], "beartype.beartype")
if "COUNT_LINES" in os.environ:
    lines.count_lines(sys.meta_path[0])
jax.config.update("jax_numpy_rank_promotion", "raise")
# Many tests compile one program again, because they close over their own constants or clear caches.
# One folder for each parallel worker: entries are not written atomically.
CACHE = Path(__file__).parents[1] / ".pytest_cache/jax" / os.environ.get("PYTEST_XDIST_WORKER", "")
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)

OPTIMIZED = {
    *("test_kernels.py", "test_drmmd.py", "test_two_sample.py", "test_programs.py"),
    *("test_mmd_samples.py", "test_mmd_measures.py", "test_sliced_wasserstein.py"),
    *("test_sliced_energy.py", "test_rff.py", "test_fourier_means.py", "test_kernel_means.py"),
    *("test_simplex_qp.py", "test_gd.py", "test_killed_runs.py"),
}
"""Tests of the core and of bits; the rest compile without most optimizations, if not slow."""

# A job started in the background may ignore SIGINT, which the tests of interruption send.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_sessionfinish():
    if "COUNT_LINES" in os.environ:
        lines.write_lines()


@pytest.fixture(autouse=True)
def _leave_survivors_to_no_collection():
    """What a test leaves behind, programs above all, is not searched again at every collection."""
    yield
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def _drop_programs():
    """Those of one file hardly serve another, and a worker would hold gigabytes of them."""
    yield
    gc.unfreeze()
    jax.clear_caches()
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def _compile_plainly(request):
    """Most time goes to compiling: a quarter of it is spared without most optimizations, where no
    digits or bytes are counted. Slow tests run what users run."""
    quick = "not slow" in request.config.option.markexpr
    plain = quick and request.path.name not in OPTIMIZED
    jax.config.update("jax_disable_most_optimizations", plain)


@pytest.fixture
def x64():
    """Runs the test with float64 switched on."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def data_root():
    """A torchvision root with the real data sets, or a skip that says how to give one."""
    root = os.environ.get("DATA_ROOT")
    if not root or not Path(root, "MNIST", "raw").is_dir():
        pytest.skip("set DATA_ROOT to a torchvision root with MNIST to run this test")
    return Path(root)
