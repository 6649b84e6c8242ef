"""One of the processes of `test_processes.py`: python on_two_processes.py RESULTS [ADDRESS I].

Writes what it finds with one process or two to RESULTS/found-PROCESS.npz, and runs a flow in a run
folder that is stopped at step 5 by a signal to only the last process, and resumed.
"""

import contextlib
import os
import signal
import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np

from lib import gd, mmd, runs
from lib.gmm import Mixture
from lib.gmm.covariances import from_matrices
from lib.gmm.em import fit
from lib.networks import MLP, classification, optimizers
from lib.rows import Rows
from lib.runs import console, loop, processes


@contextlib.contextmanager
def progress_until_told(*args, initial, **options):
    """In place of `console.progress`: after five steps the last process gets a signal."""
    done = initial

    def tick(steps, **shown):
        nonlocal done
        done += steps
        if done == 5 and jax.process_index() == jax.process_count() - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    yield tick


def flow(results: Path, name: str, mesh):
    normal = partial(jax.random.normal, shape=(2, 6, 3))
    run = runs.open_run(results, "test", name, {}, seed=0)
    target = mmd.target_value_and_grad(mmd.sliced_riesz(), num_directions=10, mesh=mesh)
    arguments = normal(jax.random.key(0)), normal(jax.random.key(1)), target, jax.random.key(2)
    options = {"n_epochs": 40, "lr": 0.1, "m": 0.5, "show_progress": False}
    return run, gd.wasserstein_gradient_descent(*arguments, run=run, mesh=mesh, **options)


def main(results: Path, mesh) -> None:
    arrays = {}
    loop.SECONDS_PER_CHUNK = 0.0  # every step is a chunk
    run, (arrays["losses"], arrays["particles"]) = flow(results, "whole", mesh)
    run.finish(losses=arrays["losses"])
    loop.progress = progress_until_told
    try:
        flow(results, "stopped", mesh)
    except console.Interrupted as stopped:
        print("stopped", stopped)
    loop.progress = console.progress
    _, (_, arrays["resumed"]) = flow(results, "stopped", mesh)

    x = np.random.default_rng(0).normal(size=(101, 4)) + np.arange(101)[:, None] % 3
    start = Mixture(np.array([0.4, 0.6]), x[:2], from_matrices(np.stack([np.eye(4)] * 2)))
    data = Rows(x, dtype=np.float64, chunk_size=40, devices=mesh and tuple(mesh.devices.flat))
    result = fit(data, start, tolerance=0.0, max_iterations=4, show_progress=False)
    arrays["log_likelihoods"], arrays["means"] = result.log_likelihoods, result.mixture.means

    keys = jax.random.split(jax.random.key(3), 3)
    images = jax.random.normal(jax.random.key(0), (9, 2, 2, 1)), np.arange(9) % 2
    options = {"optimizer": optimizers.sgd(0.1), "num_epochs": 2, "batch_size": 4}
    options |= {"show_progress": False, "mesh": mesh}
    parameters, _ = classification.fit_seeds(keys, MLP(2, hidden=(5,)), *images, **options)
    for i, leaf in enumerate(jax.tree.leaves(parameters)):
        arrays[f"parameters{i}"] = leaf
    pieces = [np.arange(3.0) + i / 3 for i in processes.own_share(5)]
    arrays["gathered"] = processes.gathered(pieces, 5)
    np.savez(results / f"found-{jax.process_index()}.npz", **arrays)
    print("done")


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    options = processes.DeviceOptions()
    if len(sys.argv) > 2:
        options = processes.DeviceOptions(
            coordinator=sys.argv[2], num_processes=2, process_id=int(sys.argv[3])
        )
    with processes.started(options) as mesh:
        main(folder, mesh)
