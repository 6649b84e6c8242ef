"""A student network of particles learns a teacher's outputs, by MMD and DrMMD flows.

    python xp_drmmd/student_teacher.py --flow drmmd --lmbda 0.1 --noise 1.0

A particle theta = (W, w), W [3, 50] and w [3], is the small network psi(x, theta) = w . G(W x) with
G(t) = exp(-t^2 / 4); student and teacher are means over their particles. On a batch of B inputs the
features psi(x_b, theta) / sqrt(B) have the kernel E_x psi(x, theta) psi(x, theta'), whose MMD^2 is
the mean squared difference of the two networks (Arbel et al., 2019), so that DrMMD costs O(N B) and
the spectrum of B x B. The published form (`--form dense`) shares W between all
particles and has one teacher. The command of the published README is taken as printed there.
"""

import time
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax.sharding import Mesh
from jaxtyping import Array, Float

from lib import runs
from lib.drmmd.features import feature_witness, prepare_target_features
from lib.gd import recorded_steps, wasserstein_gradient_descent
from lib.numerics import PRNGKey, key_of_seed, named_key
from lib.runs.commands import run_command
from lib.runs.processes import DeviceOptions
from lib.runs.settings import settings_of
from xp_drmmd.config import EXPERIMENT, StudentConfig

INPUTS, HIDDEN = 50, 3
PARAMETERS = INPUTS * HIDDEN + HIDDEN


class Lesson(NamedTuple):
    """Inputs [n, 50], the teacher's particles [M, 153], and the key of the epochs' shuffles."""

    inputs: Float[Array, "n 50"]
    teacher: Float[Array, "M 153"]
    batches: PRNGKey


def outputs(particles: Float[Array, "N 153"], inputs: Float[Array, "B 50"]) -> Float[Array, "N B"]:
    """psi(x_b, theta_i)"""
    first = particles[:, : INPUTS * HIDDEN].reshape(-1, INPUTS)
    hidden = jnp.exp(-(jnp.matmul(first, inputs.T, precision="highest") ** 2) / 4)
    last = particles[:, INPUTS * HIDDEN :]
    return jnp.einsum(
        "nh,nhb->nb", last, hidden.reshape(-1, HIDDEN, len(inputs)), precision="highest"
    )


def loss(student: Array, lesson: Lesson) -> Array:
    """Half the mean squared difference of the two networks."""
    difference = outputs(student, lesson.inputs).mean(0) - outputs(
        lesson.teacher, lesson.inputs
    ).mean(0)
    return jnp.mean(difference**2) / 2


def sphere(key: Array, count: int) -> Array:
    """Uniform on S^49."""
    points = jax.random.normal(key, (count, INPUTS))
    return points / jnp.linalg.norm(points, axis=1, keepdims=True)


def lessons(config: StudentConfig, seed: int) -> tuple[Array, Lesson, Lesson]:
    """(students [N, 153], training, validation): a draw for each seed."""
    keys = jax.random.split(key_of_seed(seed), 4)
    students = jax.random.normal(keys[0], (config.students, PARAMETERS))
    teacher = jax.random.normal(keys[1], (config.teachers, PARAMETERS))
    if config.form == "dense":
        shared = INPUTS * HIDDEN
        students = students.at[:, :shared].set(students[:1, :shared])
    # Seed 0 has the batches that the published numbers were made with.
    batches = jax.random.PRNGKey(7)
    if seed:
        batches = named_key(batches, f"seed {seed}")
    train, validation = (
        Lesson(sphere(key, config.num_inputs), teacher, batches) for key in keys[2:]
    )
    return students, train, validation


@cache
def objective(config: StudentConfig):
    """(particles [1, N, 153], lesson, key, step) -> (batch loss, velocity, step + 1)."""
    batches = config.num_inputs // config.batch_size

    def value_and_grad(x, lesson, key, step):
        epoch, batch = step // batches, step % batches
        order = jax.random.permutation(jax.random.fold_in(lesson.batches, epoch), config.num_inputs)
        chosen = jax.lax.dynamic_slice_in_dim(order, batch * config.batch_size, config.batch_size)
        inputs = lesson.inputs[chosen]

        def features(particles):
            return outputs(particles, inputs) / jnp.sqrt(len(inputs))

        student = shifted = x[0]
        if config.noise:
            spread = config.noise * 0.5 ** (epoch // config.halve_every)
            shifted = student + spread * jax.random.normal(key, student.shape, student.dtype)
        at_shifted, transpose = jax.vjp(features, shifted)
        mean = (features(student) if config.noise else at_shifted).mean(axis=0)
        target = prepare_target_features(features, lesson.teacher)
        value = jnp.sum((mean - target.mean) ** 2) / 2
        direction = mean - target.mean
        if config.flow == "drmmd":
            direction = feature_witness(target, mean, config.lmbda).direction
        velocity = transpose(jnp.broadcast_to(direction[None, :], at_shifted.shape))[0]
        if config.form == "dense":
            shared = INPUTS * HIDDEN
            common = velocity[:, :shared].mean(axis=0, keepdims=True)
            velocity = velocity.at[:, :shared].set(jnp.broadcast_to(common, (len(student), shared)))
        return value, velocity[None], step + 1

    return value_and_grad


def run_student(
    config: StudentConfig, *, seed: int, results: Path, mesh: Mesh | None = None
) -> runs.Run:
    """One training. Its folder holds losses [T] of the batches, the seconds it took, and steps
    (epochs), train and validation [records], half the mean squared residual."""
    run = runs.open_run(results, EXPERIMENT, f"student-{config.flow}", config, seed=seed)
    if run.finished:
        return run
    students, train, validation = lessons(config, seed)
    batches = config.num_inputs // config.batch_size
    steps = config.num_epochs * batches
    every = max(1, steps // config.records)
    began = time.perf_counter()
    losses, particles = wasserstein_gradient_descent(
        students[None],
        train,
        objective(config),
        key_of_seed(seed, shift=1_000_000),
        n_epochs=steps,
        optimizer=optax.sgd(config.step_size),
        carry=jnp.zeros((), jnp.int32),
        record_every=every,
        run=run,
        description=f"student, {config.flow}",
        mesh=mesh,
    )
    seconds = time.perf_counter() - began
    evaluate = jax.jit(lambda x: jnp.stack([loss(x, train), loss(x, validation)]))
    measured = np.stack([evaluate(x[0]) for x in particles])
    run.finish(
        losses=losses,
        steps=recorded_steps(steps, every) / batches,
        seconds=np.asarray(seconds),
        train=measured[:, 0],
        validation=measured[:, 1],
        particles=particles[-1, 0],
    )
    return run


@dataclass(frozen=True)
class Arguments(DeviceOptions, StudentConfig):
    flow: Annotated[Literal["mmd", "drmmd"], tyro.conf.arg(aliases=("--loss",))] = "drmmd"
    noise: Annotated[float, tyro.conf.arg(aliases=("--noise-level",))] = 0.0
    """Standard deviation of the noise injected at first; halved every `halve_every` epochs."""
    halve_every: Annotated[int, tyro.conf.arg(aliases=("--noise-decay-freq",))] = 1000
    num_epochs: Annotated[int, tyro.conf.arg(aliases=("--n-epochs", "--total-epochs"))] = 15_000
    step_size: Annotated[float, tyro.conf.arg(aliases=("--lr",))] = 0.1
    """Of SGD on the particles: times N the gradient of the functional."""
    with_noise: Literal["true", "false"] | None = None
    """As published: true is a noise of 1 unless `noise` says another, false is none."""
    device: int = 0
    """As published, and only 0: which device it is, is up to the environment."""
    log_in_file: bool = False
    """As published: results are written to files in any case."""
    seed: int = 0
    results: Annotated[Path, tyro.conf.arg(aliases=("--log-dir",))] = Path("results")

    def __post_init__(self):
        super().__post_init__()
        if self.device:
            raise ValueError(
                f"device {self.device} is not chosen here: set JAX_PLATFORMS=cpu for the CPU, or "
                "CUDA_VISIBLE_DEVICES to the number of a GPU"
            )


def config_of(arguments: Arguments) -> StudentConfig:
    """The training that the arguments describe."""
    config = settings_of(StudentConfig, arguments)
    if arguments.with_noise is None:
        return config
    return replace(config, noise=(config.noise or 1.0) if arguments.with_noise == "true" else 0.0)


def main(arguments: Arguments, mesh: Mesh | None = None) -> Path:
    """Trains one student and prints its validation error."""
    config = config_of(arguments)
    form = "each of its own weights" if config.form == "particles" else "with one shared layer"
    print(f"{config.flow}, noise {config.noise:g}, {config.students} particles {form}", flush=True)
    run = run_student(config, seed=arguments.seed, results=arguments.results, mesh=mesh)
    stored = run.load_arrays()
    for i in np.unique(np.linspace(0, len(stored["steps"]) - 1, 11).round().astype(int)):
        print(f"  epoch {stored['steps'][i]:8.0f}: validation {stored['validation'][i]:.3e}")
    print(f"numbers: {run.arrays}")
    return run.folder


if __name__ == "__main__":
    run_command(main, lambda: tyro.cli(Arguments), lower="--batch_size, --students or --records")
