"""Seconds per step of condensation: all classes at once, and plain loops over classes and networks.

    DATA_ROOT=... python benchmarks/condensation.py [--width 32] [--num_networks 1 4] [--out FILE]

One data set, one start, in one process, in turn within each round:
- ours: the joint step of `objectives.py` in a compiled loop, as `condense.py` runs it;
- JAX loop: the same loss and gradient, class after class and network after network, each one call
  of a jitted function (compiled once, all classes have one shape);
- PyTorch loop: the published form, eager: class after class, one network, the same sizes, the same
  operations of augmentation (siamese shift, color and cutout), its Gram matrix on the joint
  sample.
Compiling is timed apart. Nothing else should run on the machine: its load before is kept.
"""

import os
import time
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
import tyro
from jax import lax

from lib.gd import flow_init, flow_step
from lib.runs import environment
from lib.runs.commands import run_command
from lib.runs.files import write_json
from xp_dataset_distillation import condense
from xp_dataset_distillation.config import CondenseConfig
from xp_dataset_distillation.objectives import Target, objective, optimizer, step_of
from xp_dataset_distillation.real_data import Setting


@dataclass(frozen=True)
class Options:
    """One step at these sizes."""

    dataset: str = "fashion_mnist"
    images_per_class: int = 10
    factor: int = 2
    width: int = 32
    depth: int = 3
    real_batch: int = 64
    num_networks: tuple[int, ...] = (1,)
    """The loops run over these too."""
    class_chunk: int | None = None
    """Of ours."""
    augmentation: str = "color_crop_cutout"
    rounds: int = 5
    steps: int = 4
    """Timed steps per round."""
    torch_threads: int = 0
    """0: torch's default."""
    data_root: Path | None = None
    out: Path = Path("results/benchmarks/condensation.json")


# ---- Contenders: functions that take some steps and wait for them


def joint(config: CondenseConfig, problem: condense.Problem, x0):
    target = Target(jax.tree.map(jnp.asarray, problem.real), jax.random.key_data(jax.random.key(1)))
    heavy_ball = optimizer(*step_of(config, problem.setting))
    step = flow_step(objective(config, problem.setting), heavy_ball)
    state = flow_init(heavy_ball, x0, jnp.zeros((), jnp.int32))

    @jax.jit
    def advance(state, target, count):
        def body(_, state):
            return step(jax.random.key(0), state, target)[0]

        return lax.fori_loop(0, count, body, state)

    def run(count):
        nonlocal state
        state = jax.block_until_ready(advance(state, target, count))

    return run


def class_loop(config: CondenseConfig, problem: condense.Problem, x0):
    """Every class a data set of its own; every network a call."""
    one = replace(config, num_networks=1)
    setting = Setting(1, *problem.setting[1:])
    value_and_grad = jax.jit(objective(one, setting))
    images = np.asarray(problem.real.images)
    targets = []
    for first in problem.real.starts:
        # One shape for all classes.
        own = images[first : first + min(problem.real.counts)]
        real = replace(problem.real, images=jnp.asarray(own), counts=(len(own),))
        targets.append(Target(real, jax.random.key_data(jax.random.key(1))))
    x, step = [jnp.asarray(each[None]) for each in x0], 0
    lr, _ = step_of(config, problem.setting)

    def one():
        nonlocal step
        for c, target in enumerate(targets):
            total = 0.0
            for j in range(config.num_networks):
                key = jax.random.fold_in(jax.random.key(c), step)
                carry = jnp.asarray(step * config.num_networks + j)
                total += value_and_grad(x[c], target, key, carry)[1]
            x[c] = jnp.clip(x[c] - lr * total / config.num_networks, 0, 1)
        jax.block_until_ready(x)
        step += 1

    return lambda count: [one() for _ in range(count)]


def torch_loop(config: CondenseConfig, problem: condense.Problem, x0):
    height, width, channels = problem.setting.image_shape
    images = np.asarray(problem.real.images).transpose(0, 3, 1, 2)
    classes = [
        torch.from_numpy(np.float32(images[first : first + count]) / 255)
        for first, count in zip(problem.real.starts, problem.real.counts)
    ]
    stored = x0.reshape(len(x0), -1, height, width, channels).transpose(0, 1, 4, 2, 3)
    x = torch.tensor(np.ascontiguousarray(stored), requires_grad=True)
    heavy_ball = torch.optim.SGD(
        [x], lr=config.resolved_step_size(problem.setting.image_shape), momentum=config.momentum
    )
    mean = torch.tensor(problem.setting.mean).reshape(1, -1, 1, 1)
    std = torch.tensor(problem.setting.std).reshape(1, -1, 1, 1)
    generator = torch.Generator().manual_seed(0)

    def network():
        layers, inputs = [], channels
        for _ in range(config.depth):
            layers += [
                torch.nn.Conv2d(inputs, config.width, 3, padding=1),
                torch.nn.GroupNorm(config.width, config.width),
                torch.nn.ReLU(),
                torch.nn.AvgPool2d(2),
            ]
            inputs = config.width
        pad = torch.nn.ZeroPad2d(2) if height == width == 28 else torch.nn.Identity()
        return torch.nn.Sequential(pad, *layers, torch.nn.Flatten())

    def decode(images):
        if config.factor == 1:
            return images
        size = height // config.factor
        cells = [
            images[:, :, i * size : (i + 1) * size, j * size : (j + 1) * size]
            for i in range(config.factor)
            for j in range(config.factor)
        ]
        return torch.nn.functional.interpolate(
            torch.cat(cells), (height, width), mode="bilinear", align_corners=False
        )

    def changed(images, change):
        if not config.augmentation:
            return images
        (dy, dx, cut_y, cut_x), (brightness, contrast) = change
        images = images + brightness
        images = (images - images.mean((1, 2, 3), keepdim=True)) * contrast + images.mean(
            (1, 2, 3), keepdim=True
        )
        padded = torch.nn.functional.pad(images, (4, 4, 4, 4))
        images = padded[:, :, 4 + dy : 4 + dy + height, 4 + dx : 4 + dx + width]
        mask = torch.ones(1, 1, height, width)
        mask[:, :, cut_y : cut_y + height // 2, cut_x : cut_x + width // 2] = 0
        return images * mask

    def loss(features, real):
        pooled = torch.cat([features, real])
        squared = torch.cdist(pooled, pooled).square()
        number = len(pooled)
        bandwidth = (squared.detach().sum() / (number**2 - number)).detach()
        gram = sum(torch.exp(-squared / (bandwidth * 2.0**k)) for k in range(-2, 3))
        n = len(features)
        return gram[:n, :n].mean() - 2 * gram[:n, n:].mean() + gram[n:, n:].mean()

    step, net = 0, None

    def one():
        nonlocal step, net
        if step % config.steps_per_network == 0:
            net = network()
        with torch.no_grad():
            x.clamp_(0, 1)
        for c, own in enumerate(classes):
            chosen = torch.randperm(len(own), generator=generator)[: config.real_batch]
            change = (
                tuple(torch.randint(-3, 4, (2,), generator=generator).tolist())
                + tuple(torch.randint(0, height // 2, (2,), generator=generator).tolist()),
                tuple((torch.rand(2, generator=generator) + torch.tensor([-0.5, 0.5])).tolist()),
            )
            with torch.no_grad():
                real = net((changed(own[chosen], change) - mean) / std)
            features = net((changed(decode(x[c]), change) - mean) / std)
            heavy_ball.zero_grad()
            loss(features, real).backward()
            heavy_ball.step()
        step += 1

    return lambda count: [one() for _ in range(count)]


# ---- Timing


def timed(contenders: dict, options: Options) -> dict[str, dict]:
    """Seconds of the first step, and of every later one, in turn within each round."""
    timings = {}
    for name, run in contenders.items():
        started = time.perf_counter()
        run(1)
        timings[name] = {"first": time.perf_counter() - started, "steps": []}
    for _ in range(options.rounds):
        for name, run in contenders.items():
            started = time.perf_counter()
            run(options.steps)
            timings[name]["steps"].append((time.perf_counter() - started) / options.steps)
    for each in timings.values():
        each["median"] = float(np.median(each["steps"]))
    return timings


def main(options: Options) -> None:
    load = os.getloadavg()[0]
    if options.torch_threads:
        torch.set_num_threads(options.torch_threads)
    rows = {}
    for num_networks in options.num_networks:
        config = CondenseConfig(
            dataset=options.dataset,
            images_per_class=options.images_per_class,
            factor=options.factor,
            width=options.width,
            depth=options.depth,
            real_batch=options.real_batch,
            augmentation=options.augmentation,
            num_networks=num_networks,
            class_chunk=options.class_chunk,
        )
        problem = condense.problem(config, options.data_root)
        x0 = condense.start(jax.random.key(0), config, problem.real)
        x0 = x0.reshape(*x0.shape[:2], -1)
        contenders = {
            "ours": joint(config, problem, x0),
            "JAX loop": class_loop(config, problem, x0),
        }
        if num_networks == 1:
            contenders["PyTorch loop"] = torch_loop(config, problem, x0)
        timings = timed(contenders, options)
        rows[f"{num_networks} networks"] = timings
        for name, each in timings.items():
            ratio = each["median"] / timings["ours"]["median"]
            print(
                f"{num_networks} networks, {name:12s}: {1000 * each['median']:8.1f} ms per step "
                f"({ratio:.2f} of ours), first {each['first']:.1f} s"
            )
    about = {"options": options, "load_before": load, "environment": environment()}
    write_json(options.out, {**about, "rows": rows})
    print(f"numbers: {options.out}")


if __name__ == "__main__":
    run_command(main, lambda: tyro.cli(Options))
