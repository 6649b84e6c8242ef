"""No two uses of one run share a key: every draw, split and number folded in is recorded."""

import contextlib
import sys
from collections import defaultdict
from pathlib import Path

import jax
import numpy as np
import pytest
from cases import slow

try:
    from jax._src.random import prng  # jax 0.12
except ImportError:
    from jax._src import prng

from xp_data_mixing.study import coverage
from xp_data_mixing.study.config import CoverageConfig, Samples
from xp_dataset_distillation import experiments as distillation
from xp_dataset_distillation.config import BaselineConfig, Evaluation, Evaluator
from xp_drmmd import run as drmmd
from xp_drmmd import student_teacher
from xp_drmmd.config import FlowConfig, StudentConfig
from xp_transfer_learning import domain_adaptation, rings, transfer
from xp_transfer_learning.config import (
    ROTATED,
    AdaptationConfig,
    FlowSettings,
    RingsConfig,
    TrainingConfig,
    TransferConfig,
)

REPOSITORY = Path(__file__).parents[2]
REDONE = {
    "data": "transfer: all methods have the same images of a seed",
    "accuracies": "transfer, distillation: all rows have the same classifiers of a seed",
    "row_blocks": "mixing: a row's block depends on its number, not on its set",
    "run_sweep": "rings: all kernels have the same directions of a seed",
    "target_data": "adaptation: all tries, and the classifier, have the same target images",
    "_classifier": "adaptation: the classifier is the same for all tries",
    "prepare": "drmmd: all seeds have the same landmarks or frequencies",
    "training_images": "distillation: all entries and seeds keep the same images away",
}
"""Functions that make the same draw again, on purpose."""
SHARED = {frozenset({"_start", "_steps"}): "training: the first and the second half of one split"}
"""Functions that take different parts of one key."""
NETWORKS = {"_networks.py", "convolution.py"}


class Use:
    """What was done with a key, by which of our functions."""

    def __init__(self, kind):
        self.kind, self.chain, frame = kind, [], sys._getframe(2)
        while frame is not None:
            path = Path(frame.f_code.co_filename)
            if path.is_relative_to(REPOSITORY) and not {"tests", ".venv"} & {*path.parts}:
                self.chain.append((path.name, frame.f_code.co_name, frame.f_lineno))
            frame = frame.f_back
        places = [(file, name) for file, name, _ in self.chain]
        self.left_out = ("numerics.py", "named_key") in places
        # Within a network flax derives the keys, from the names of its parts.
        self.function = next((name for file, name in places if file not in NETWORKS), "?")
        again = [i for i, (_, name) in enumerate(places) if name in REDONE]
        self.redone = tuple(self.chain[: again[0] + 1]) if again else None


@contextlib.contextmanager
def recorded(monkeypatch):
    """{words of a key: its uses} of all that runs within."""
    uses = defaultdict(list)

    def patched(kind, original):
        def wrapper(keys, *args, **options):
            use = Use(kind)
            if not use.left_out:

                def add(words):
                    for one in np.reshape(words, (-1, np.shape(words)[-1])).tolist():
                        uses[tuple(one)].append(use)

                jax.debug.callback(add, prng.random_unwrap(keys))
            return original(keys, *args, **options)

        return wrapper

    default_rng = np.random.default_rng

    def host(seed=None):
        if np.size(seed) == 2:
            uses[tuple(np.asarray(seed).tolist())].append(Use("draw"))
        return default_rng(seed)

    jax.clear_caches()  # what is compiled records nothing
    with monkeypatch.context() as patch:
        patch.setattr(np.random, "default_rng", host)
        for name, kind in (("bits", "draw"), ("split", "split"), ("fold_in", "fold")):
            patch.setattr(prng, f"random_{name}", patched(kind, getattr(prng, f"random_{name}")))
        yield uses
        jax.effects_barrier()
    jax.clear_caches()


def shared(uses):
    """Keys drawn from twice, except the draws `REDONE`, or used by functions not `SHARED`."""
    those_shared = []
    for key, those in uses.items():
        functions = frozenset(use.function for use in those)
        again = [use.redone for use in those if use.kind == "draw"]
        twice = len(again) > 1 and (None in again or len({*again}) > 1)
        if twice or (len(functions) > 1 and functions not in SHARED):
            those_shared.append((key, functions, [use.chain for use in those][:3]))
    return those_shared


FLOW = FlowSettings(num_steps=3, num_directions=4, step_size=0.1)


def run_transfer(results, seed):
    for method in (FLOW, FlowSettings("mmd_product", num_steps=2, step_size=1.0, noise=0.01)):
        config = TransferConfig("digits", ROTATED, 2, num_per_class=3, size=16, flow=method)
        training = TrainingConfig(num_epochs=2, num_trainings=2)
        transfer.run_try(config, training, seed=seed, results=results, data_root=None)


def run_adaptation(results, seed):
    config = AdaptationConfig(
        ROTATED, "digits", num_per_class=3, size=16, flow=FLOW, records=1, num_epochs=3
    )
    domain_adaptation.run_try(config, seed=seed, results=results, data_root=None)


def run_students(results, seed):
    # A batch an epoch: each step shuffles its epoch's inputs again.
    config = StudentConfig(
        students=4, teachers=2, num_inputs=8, batch_size=8, num_epochs=2, noise=0.1, records=1
    )
    student_teacher.run_student(config, seed=seed, results=results)


def run_drmmd(results, seed):
    config = FlowConfig(
        dataset="FourGaussian", approximation="nystrom", rank=4, num_steps=3, records=1, noise=0.1,
        source_particle_num=6, target_particle_num=8,
    )  # fmt: skip
    drmmd.run_flow(config, seed=seed, results=results)


def run_coverage(results, seed, estimator="mmd"):
    samples = Samples("digits", num_per_class=8, num_target=12, target_from="rest", labels="drawn")
    config = CoverageConfig(samples, estimator, resamples=2, replicates=3, num_features=4)
    coverage.cover(config, seed)


def run_calibrated_coverage(results, seed):
    run_coverage(results, seed, "calibrated")


def run_baseline(results, seed):
    # Not beside condensed sets: both begin with the seed's own key.
    config = BaselineConfig("digits", held_out=5, num_per_class=20)
    evaluator = Evaluator(num_epochs=2, cutmix=1.0, width=4, depth=2)
    evaluation = Evaluation(evaluator, num_networks=2)
    distillation.evaluate(config, evaluation, seed=seed, results=results, data_root=None)


def run_rings(results, seed):
    config = RingsConfig(num_points=4, num_directions=3, num_steps=2, momentum_steps=2)
    for sweep in rings.sweeps(config)[:2]:
        rings.run_sweep(sweep, config, seed=seed, results=results)


SLOW = (
    run_adaptation, run_transfer, run_drmmd, run_coverage, run_calibrated_coverage, run_rings,
    run_baseline,
)  # fmt: skip
RUNS = [run_students, *(slow(run) for run in SLOW)]


@pytest.mark.parametrize("run", RUNS)
def test_no_two_uses_of_a_run_share_a_key(run, tmp_path, monkeypatch):
    with recorded(monkeypatch) as uses:
        for seed in (0, 1):
            run(tmp_path, seed)
    assert uses
    assert not shared(uses)
