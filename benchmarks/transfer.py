"""Seconds of one transfer: ours, and the published algorithm with the same classifier.

    DATA_ROOT=... python benchmarks/transfer.py [--tgt_dataset usps] [--k_shot 5] [--out FILE]

One draw of 200 source images and k target images per class, in one process, one after the other:
- ours: `transfer.py` as its preset has it (1,000 steps with linear decay), run whole;
- published: heavy ball with tau = 1, m = .9, 5,000 steps (20,000 for k = 100) of
  `published_wow.py`. A few steps are timed in rounds between steps of ours, and their median is
  multiplied;
- training: five LeNet-5 on target and flowed images, vmapped (ours), and one after the other.
Compiling is timed apart. Nothing else should run on the machine: its load before is kept.
"""

import dataclasses
import os
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import published_wow
import tyro

from lib.gd import flow_init, flow_step, wasserstein_gradient_descent
from lib.networks import LeNet5, classification, optimizers
from lib.runs import environment
from lib.runs.commands import run_command
from lib.runs.files import write_json
from xp_transfer_learning import methods, transfer
from xp_transfer_learning.config import METHODS, TrainingConfig, TransferConfig


@dataclasses.dataclass(frozen=True)
class Options:
    """One transfer, ours and the published way."""

    src_dataset: str = "mnist"
    tgt_dataset: str = "usps"
    k_shot: int = 5
    num_per_class: int = 200
    size: int | None = None
    """Side of the images; None: the source's."""
    n_epochs_wgd: int = METHODS["mmdsw"].num_steps
    rounds: int = 5
    """Rounds of timing, each of 10 steps of ours and 2 published ones."""
    seed: int = 0
    data_root: Path | None = None
    out: Path = Path("results/benchmarks/transfer.json")


def seconds(function, *arguments) -> tuple[float, object]:
    """Wall seconds until the result is there, and the result."""
    started = time.perf_counter()
    result = jax.block_until_ready(function(*arguments))
    return time.perf_counter() - started, result


def per_step(contenders: dict, key, rounds: int) -> dict:
    """Compiling and median seconds per step of (step, state, target, steps per round)."""
    times, states, timings = {name: [] for name in contenders}, {}, {}
    for name, (step, state, target, _) in contenders.items():
        first, (states[name], _) = seconds(step, key, state, target)
        timings[name] = {"first_step": first}
    for _ in range(rounds):
        for name, (step, _, target, count) in contenders.items():
            started = time.perf_counter()
            for _ in range(count):
                states[name], _ = step(key, states[name], target)
            jax.block_until_ready(states[name])
            times[name].append((time.perf_counter() - started) / count)
    for name, each in times.items():
        timings[name] |= {"step": float(np.median(each)), "steps_timed": each}
        timings[name]["compiling"] = timings[name]["first_step"] - timings[name]["step"]
    return timings


def train_both(images, labels, config: TrainingConfig) -> dict[str, float]:
    """Seconds, compiling and all, of the trainings at once, and one after the other."""
    options = {
        "optimizer": optimizers.adam(config.learning_rate),
        "num_epochs": config.num_epochs,
        "batch_size": config.batch_size,
    }
    network = LeNet5()
    keys = jax.random.split(jax.random.PRNGKey(1), config.num_trainings)
    at_once, _ = seconds(
        lambda: classification.fit_seeds(
            keys, network, images, labels, show_progress=False, **options
        )
    )
    in_turn, _ = seconds(
        lambda: [classification.train(key, network, images, labels, **options) for key in keys]
    )
    return {"at_once": at_once, "in_turn": in_turn}


def main(options: Options) -> None:
    load = os.getloadavg()[0]
    config = TransferConfig(
        options.src_dataset,
        options.tgt_dataset,
        options.k_shot,
        num_per_class=options.num_per_class,
        size=options.size,
        flow=dataclasses.replace(METHODS["mmdsw"], num_steps=options.n_epochs_wgd),
    )
    x0, x_tgt, image_shape = transfer.data(options.seed, config, options.data_root)
    key = jax.random.PRNGKey(options.seed)
    problem, optimizer = methods.problem(config.flow, x0, x_tgt), methods.optimizer(config.flow)
    published_steps = 20_000 if options.k_shot == 100 else 5_000
    heavy_ball = optax.sgd(1.0, momentum=0.9)
    published = partial(published_wow.value_and_grad, published_wow.riesz())
    timings = per_step(
        {
            "ours": (
                jax.jit(flow_step(problem.value_and_grad, optimizer)),
                flow_init(optimizer, x0),
                x_tgt,
                10,
            ),
            "published": (
                jax.jit(flow_step(published, heavy_ball)),
                flow_init(heavy_ball, x0),
                x_tgt,
                2,
            ),
        },
        key,
        options.rounds,
    )
    whole, flowed = seconds(
        lambda: wasserstein_gradient_descent(
            x0,
            x_tgt,
            problem.value_and_grad,
            key,
            n_epochs=config.flow.num_steps,
            optimizer=optimizer,
            record_every=config.flow.num_steps,
        )
    )
    training = TrainingConfig()
    labelling, (images, labels, _) = seconds(
        transfer.training_set,
        flowed.particles[-1],
        np.asarray(x_tgt),
        image_shape,
        training.labelling,
    )
    trained = train_both(jnp.asarray(images), jnp.asarray(labels), training)
    ours = whole + labelling + trained["at_once"]
    published_flow = (
        timings["published"]["compiling"] + published_steps * timings["published"]["step"]
    )
    published_whole = published_flow + labelling + trained["in_turn"]
    for name, one in timings.items():
        print(f"{name:10s} {1e3 * one['step']:7.1f} ms/step, compiling {one['compiling']:.1f} s")
    print(
        f"ours       {ours:7.1f} s: flow {whole:.1f} (compiling included, {config.flow.num_steps} "
        f"steps), labels {labelling:.2f}, five trainings at once {trained['at_once']:.1f}"
    )
    print(
        f"published  {published_whole:7.1f} s: flow {published_flow:.1f} ({published_steps} steps, "
        f"from {2 * options.rounds}), labels, five trainings in turn {trained['in_turn']:.1f}"
    )
    print(f"ratio      {published_whole / ours:7.1f}; load before: {load:.2f}")
    write_json(
        options.out,
        {
            "environment": environment(),
            "options": options,
            "load_average_before": load,
            "per_step": timings,
            "training": trained,
            "labelling": labelling,
            "ours": {"flow": whole, "whole": ours},
            "published": {"flow": published_flow, "whole": published_whole},
        },
    )
    print(f"written to {options.out}")


if __name__ == "__main__":
    run_command(main, lambda: tyro.cli(Options))
