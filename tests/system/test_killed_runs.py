"""Processes killed (SIGKILL) at random moments: what resumes ends in the bits of what was not.

A save is forced after every step, and the process kills itself at a random one of its operations on
files, so also between two of them that belong together; or some time after it, in the middle of a
computation. Then the same command runs again.
"""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lib.runs import files

DRIVER = """
import os, random, signal, sys, threading, time, types
from pathlib import Path

results, kill_at, operations = Path(sys.argv[2]), int(sys.argv[3]), 0

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def counted(system):
    def call(*arguments, **options):
        global operations
        operations += 1
        if operations == kill_at:
            if kill_at % 2:
                die()
            threading.Timer(random.Random(kill_at).uniform(0, 0.05), die).start()
        return system(*arguments, **options)
    return call

if kill_at:
    from lib.runs import loop

    class Clock:  # a hundred seconds go by between two looks: every step is a chunk, with a save
        now = 0.0
        def monotonic(self):
            Clock.now += 100.0
            return Clock.now

    loop.time = Clock()
    for name in ("fsync", "replace", "link", "unlink"):
        setattr(os, name, counted(getattr(os, name)))
exec(sys.argv[1])
"""


def start(code, results, cache, kill_at=0):
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.05",
    }
    command = [sys.executable, "-c", DRIVER, code, str(results), str(kill_at)]
    options = {"cwd": Path(__file__).parents[2], "env": environment, "timeout": 600}
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == (-signal.SIGKILL if kill_at else 0), done.stderr


def final_arrays(results):
    """{(file, array): bits} of all finished runs, but how long they took."""
    return {
        (path.relative_to(results), name): (array.dtype, array.shape, np.asarray(array).tobytes())
        for path in results.rglob("arrays.npz")
        for name, array in files.load_arrays(path).items()
        if name not in ("seconds", "train_seconds")
    }


def check_same(results, expected):
    """In the bits, with neither what killed writers left, nor what was saved to resume from."""
    assert final_arrays(results) == expected
    for pattern in ("*.tmp", "checkpoint*.npz"):
        assert not list(results.rglob(pattern))


FLOW = """
import jax
import jax.numpy as jnp
from lib import gd, runs

def target(x, y, key):
    return jnp.mean((x - y) ** 2, axis=(1, 2)), x - y + 0.1 * jax.random.normal(key, x.shape)

def flow(results):
    run = runs.open_run(results, "xp", "flow", {"lr": 0.1}, seed=0)
    if not run.finished:
        x0, y = jax.random.normal(jax.random.key(1), (2, 2, 4, 2))
        losses, particles = gd.wasserstein_gradient_descent(
            x0, y, target, jax.random.key(2), 60, 0.1, 0.5, record_every=7, run=run,
            show_progress=False,
        )
        run.finish(losses=losses, particles=particles)

if __name__ == "__main__":
    flow(results)
"""


def test_a_flow_killed_three_times_ends_in_the_same_bits(tmp_path):
    names, rng = {"__name__": "here"}, random.Random(1)
    exec(FLOW, names)
    names["flow"](tmp_path / "whole")
    for _ in range(3):
        # Operations: 8 to open a run, then 6 a save; 60 steps.
        start(FLOW, tmp_path / "killed", tmp_path / "cache", rng.randrange(9, 100))
    (checkpoint,) = (tmp_path / "killed").rglob("checkpoint.npz")
    assert 3 <= int(files.load_arrays(checkpoint)["step"]) < 60
    names["flow"](tmp_path / "killed")
    check_same(tmp_path / "killed", final_arrays(tmp_path / "whole"))


EXPERIMENTS = {
    "rings": (
        """
from xp_transfer_learning import rings
from xp_transfer_learning.config import RingsConfig

one = (0.1, 1.0)
config = RingsConfig(
    num_points=8, num_directions=16, num_steps=30, gaussian=one, momenta=(0.0, 0.9),
    momentum_steps=20,
)
for sweep in rings.sweeps(config):
    if sweep.name in ("gaussian", "momentum", "decay"):
        rings.run_sweep(sweep, config, seed=0, results=results)
""",
        100,
    ),
    "drmmd": (
        """
from xp_drmmd.config import FlowConfig
from xp_drmmd.run import run_flow

config = FlowConfig(
    source_particle_num=20, target_particle_num=21, num_steps=40, records=5, adaptive="paper"
)
run_flow(config, seed=0, results=results)
""",
        50,
    ),
    "data mixing": (
        """
from dataclasses import replace
from xp_data_mixing.study import experiments
from xp_data_mixing.study.config import DIGITS, AblationConfig

config = AblationConfig(
    replace(DIGITS, num_per_class=12, num_target=40), num_targets=2, sizes=(6, 12),
    num_features=(50,),
)
experiments.run_one("ablation", config, 0, experiments.Arguments(results=results))
""",
        6,
    ),
    "gmm source": (
        """
from xp_gmm_source import flow
from xp_gmm_source.config import FlowConfig

config = FlowConfig(
    "digits", width=16, multipliers=(1,), patch=2, num_steps=16, batch_size=16, num_samples=60,
    num_train=300, em_iterations=4, euler=(2, 4), heun=(4,), source="gmm", coupling="mode",
    n_components=2, covariance_type="diag",
)
flow.run_flow(config, seed=0, results=results, show_progress=False)
""",
        40,
    ),
    "condensation": (
        """
from xp_dataset_distillation import experiments
from xp_dataset_distillation.config import CondenseConfig, Evaluation, Evaluator

config = CondenseConfig(
    "digits", images_per_class=1, factor=1, start="real", num_steps=16, real_batch=4,
    step_size=0.1, augmentation="", width=4, depth=1, num_snapshots=2,
)
evaluation = Evaluation(Evaluator(num_epochs=4, network="mlp", augmentation=""), num_networks=2)
experiments.evaluate(config, evaluation, seed=0, results=results, show_progress=False)
""",
        30,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_killed_experiment_ends_in_the_same_bits(tmp_path, name):
    """Killed three times, each within the first `operations` of a process: few enough that the last
    one killed has as many left to do."""
    code, operations = EXPERIMENTS[name]
    rng, cache, killed = random.Random(code), tmp_path / "cache", tmp_path / "killed"
    start(code, tmp_path / "whole", cache)
    expected = final_arrays(tmp_path / "whole")
    assert expected
    for _ in range(3):
        start(code, killed, cache, rng.randrange(1, operations))
    start(code, killed, cache)
    check_same(killed, expected)
