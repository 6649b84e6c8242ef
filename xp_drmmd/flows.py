"""The flows behind one interface: a value and a velocity for every flow of a stack (C, N, d)."""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from lib import drmmd, kernels, numerics, rff
from lib.drmmd import Target, Witness
from lib.drmmd import features as feature_space
from lib.drmmd.features import FeatureTarget, FeatureWitness
from lib.drmmd.nystrom import landmark_basis, nystrom_features
from lib.mmd import sliced_energy_value_and_grad
from lib.numerics import named_key
from lib.sliced_wasserstein import basis_directions, orthogonal_directions
from xp_drmmd.config import FlowConfig

FILTERS = {"tikhonov": drmmd.tikhonov, "showalter": drmmd.showalter, "cutoff": drmmd.cutoff}
SMALLEST_PUBLISHED_STEP = 1e-4


def kernel_of(config: FlowConfig) -> kernels.Kernel:
    """The kernel of the config's name, distance and bandwidth."""
    if config.kernel == "Laplace":
        return kernels.laplace(config.bandwidth, distance=config.distance)
    makers = {"Gaussian": kernels.gaussian, "IMQ": kernels.imq, "Energy": _energy}
    return makers[config.kernel](config.bandwidth)


def _energy(bandwidth: float) -> kernels.Kernel:
    """k(x, y) = (|x| + |y| - |x - y|) / (2 sigma), whose MMD^2 is that of -|x - y| / (2 sigma), and
    whose Gram matrices, other than that kernel's, are positive (Sejdinovic et al., Annals of
    Statistics 2013). The published code adds 1e-8 below each root."""
    minus_distance = kernels.riesz()

    def kernel(x, y):
        origin = jnp.zeros_like(x[:1])
        twice = minus_distance(x, y) - minus_distance(x, origin) - minus_distance(origin, y)
        return twice / (2 * bandwidth)

    return kernel


def kernel_line(config: FlowConfig) -> str:
    """The kernel's formula, distance and bandwidth, for people."""
    name = "Energy" if config.flow == "sliced_mmd" else config.kernel
    formula = {
        "Gaussian": "exp(-|x - y|^2 / (2 sigma^2))",
        "Laplace": "exp(-|x - y| / sigma)",
        "IMQ": "(1 + |x - y|^2 / sigma^2)^(-1/2)",
        "Energy": "(|x| + |y| - |x - y|) / (2 sigma)",
    }[name]
    distance = "Euclidean distance (l2)"
    if name == "Laplace":
        distance += "; the published code's is --distance l1"
        if config.distance == "l1":
            distance = "sum of absolute differences (l1)"
    sigma = f"{config.bandwidth:g}" if config.bandwidth else "the target's median distance"
    return f"{name} kernel {formula}, {distance}, sigma {sigma}"


class Fourier(NamedTuple):
    """A target in random Fourier features: their frequencies, and the target's moments in them."""

    frequencies: Float[Array, "D d"]
    target: FeatureTarget


class Landmarks(NamedTuple):
    """A target in Nystrom features, whose landmarks are target points and particles: those of these
    numbers, wherever they are at a step. Without particles among them nothing would be known of
    places that the flow has not left yet and the target is not at."""

    points: Float[Array, "M d"]
    weights: Float[Array, " M"]
    of_target: Float[Array, "r d"]
    of_particles: Int[Array, " s"]


class Points(NamedTuple):
    """A target that is sorted: weights are None where they are equal."""

    points: Float[Array, "M d"]
    weights: Float[Array, " M"] | None


class Prepared(NamedTuple):
    """The target of a stack of flows, and for each flow its lambda and step size."""

    target: Target | Fourier | Landmarks | Points
    lmbda: Float[Array, " C"]
    step_size: Float[Array, " C"]


class Memory(NamedTuple):
    """What goes from step to step, for each flow: lambda, the first value, KALE's log ratios."""

    step: Float[Array, " C"]
    lmbda: Float[Array, " C"]
    first_value: Float[Array, " C"]
    log_ratio: Float[Array, "C M"]


def prepare(
    config: FlowConfig, target: Array, weights: Array | None = None, *, num_flows: int = 1
) -> Prepared:
    """The precomputed target, with the config's lambda and step size for every flow."""
    prepared_target: Target | Fourier | Landmarks | Points
    if config.flow == "sliced_mmd" and config.approximation == "none":
        prepared_target = Points(target, weights)
    elif config.approximation == "none":
        prepared_target = drmmd.prepare_target(kernel_of(config), target, weights)
    else:
        if config.flow not in ("mmd", "drmmd"):
            raise ValueError(f"{config.flow} has no form in features")
        if config.approximation == "rff" and config.kernel != "Gaussian":
            raise ValueError(f"random Fourier features are Gaussian here, not {config.kernel}")
        make = _landmarks if config.approximation == "nystrom" else _fourier
        prepared_target = make(config, target, weights)
    ones = jnp.ones(num_flows, target.dtype)
    return Prepared(prepared_target, config.lmbda * ones, config.step_size * ones)


def _fourier(config, target, weights) -> Fourier:
    key = named_key(jax.random.key(0), "frequencies")
    frequencies = rff.gaussian_frequencies(key, config.rank // 2, target.shape[1])
    features = _fourier_features(config, frequencies)
    moments = feature_space.prepare_target_features(features, target, weights)
    return Fourier(frequencies, moments)


def _fourier_features(config, frequencies) -> feature_space.Features:
    return lambda z: rff.random_fourier_features(z, frequencies, config.bandwidth)


def _landmarks(config, target, weights) -> Landmarks:
    """Half of the rank each, drawn without replacement."""
    of_target, of_particles = config.rank - config.rank // 2, config.rank // 2
    for name, wanted, there in (
        ("target points", of_target, len(target)),
        ("particles", of_particles, config.source_particle_num),
    ):
        if wanted > there:
            raise ValueError(f"rank {config.rank} wants {wanted} {name} as landmarks of {there}")
    keys = jax.random.split(named_key(jax.random.key(0), "landmarks"))
    return Landmarks(
        *drmmd.as_target(target, weights),
        jax.random.choice(keys[0], target, (of_target,), replace=False),
        jax.random.choice(keys[1], config.source_particle_num, (of_particles,), replace=False),
    )


def first_memory(prepared: Prepared) -> Memory:
    """The memory before the first step."""
    zeros = jnp.zeros_like(prepared.lmbda)
    points = len(prepared.target.points) if isinstance(prepared.target, Target) else 0
    return Memory(zeros, prepared.lmbda, zeros, jnp.zeros((len(zeros), points), zeros.dtype))


@cache
def objective(config: FlowConfig, log_density: Callable | None = None) -> Callable:
    """(x [C, N, d], prepared, key, memory) -> (values [C, 3], velocities [C, N, d], memory), for
    `lib.gd.wasserstein_gradient_descent` with step size 1: velocities have the step in them, but
    for Adam, which is not told. The values are the functional, lambda and the step."""
    others = {"ula": _langevin, "svgd": _stein, "sliced_mmd": _sliced}
    step = others.get(config.flow, _witness_flow)

    def value_and_grad(x, prepared, key, memory):
        keys = jax.random.split(key, len(x))
        flow = jax.vmap(
            lambda y, lmbda, step_size, key, memory: step(
                config, log_density, y, prepared.target, lmbda, step_size, key, memory
            )
        )
        return flow(x, prepared.lmbda, prepared.step_size, keys, memory)

    return value_and_grad


def optimizer(config: FlowConfig) -> optax.GradientTransformation:
    """Of step size 1, or for Adam of `config.step_size`."""
    rate = config.step_size if config.opt == "adam" else 1.0
    if config.decay:
        rate = optax.linear_schedule(rate, 0.0, config.num_steps)
    if config.opt == "adam":
        return optax.adam(rate)
    return optax.sgd(rate, momentum=0.9 if config.opt == "momentum" else None)


def _witness_flow(config, log_density, y, target, lmbda, step_size, key, memory):
    """One step of MMD, DrMMD or KALE for particles [N, d]."""
    forms: dict[type, Callable] = {
        Target: _exact,
        Fourier: _with_fourier,
        Landmarks: _with_landmarks,
    }
    solve, velocity_at = forms[type(target)](config, target, y)
    witness, lmbda, memory = _witness(config, solve, lmbda, memory)
    at = y
    if config.noise:
        spread = config.noise / jnp.sqrt(1 + memory.step)
        at = y + spread * jax.random.normal(key, y.shape, y.dtype)
    step = _step_size(config, witness.value, lmbda, step_size, memory)
    memory = memory._replace(step=memory.step + 1)
    factor = 1.0 if config.opt == "adam" else step
    values = jnp.stack([witness.value, lmbda, step])
    return values, factor * velocity_at(witness, at), memory


def _exact(config, target: Target, y):
    """(solve: (lambda, memory) -> (witness, memory), velocity_at: (witness, points) -> grad h)."""
    kernel = kernel_of(config)
    statistics, vjp = drmmd.particle_statistics(kernel, y, target)

    def solve(lmbda, memory: Memory) -> tuple[Witness, Memory]:
        if config.flow == "mmd":
            return drmmd.mmd_witness(target, statistics), memory
        if config.flow == "kale":
            witness, log_ratio = drmmd.kale_witness(target, statistics, lmbda, memory.log_ratio)
            return witness, memory._replace(log_ratio=log_ratio)
        chosen = FILTERS[config.spectral_filter]
        return drmmd.drmmd_witness(target, statistics, lmbda, spectral_filter=chosen), memory

    def velocity_at(witness, points):
        if points is y:
            return vjp(witness)[1]

        def h(z):
            return drmmd.witness_function(kernel, witness, target, y, z, block_size=len(z))

        return jax.grad(lambda z: jnp.sum(h(z)))(points)

    return solve, velocity_at


def _with_fourier(config, approximation: Fourier, y):
    """As `_exact`, in random Fourier features: O(N rank)."""
    features = _fourier_features(config, approximation.frequencies)
    mean, _ = feature_space.feature_moments(features, y, second=False)

    def velocity_at(witness, points):
        return feature_space.feature_velocity(features, witness, points)

    return _solver_in_features(config, approximation.target, mean), velocity_at


def _with_landmarks(config, approximation: Landmarks, y):
    """As `_exact`, in Nystrom features of this step's landmarks: O(M rank^2 + N rank)."""
    kernel = kernel_of(config)
    landmarks = jnp.concatenate([approximation.of_target, y[approximation.of_particles]])
    basis = landmark_basis(kernel, landmarks)

    def features(z):
        return nystrom_features(kernel, basis, z, block_size=len(z))

    def kernels(z):
        # phi(z) before the basis, which means and witnesses, single vectors, can have afterwards.
        return kernel(z, landmarks)

    target = feature_space.prepare_target_features(
        features, approximation.points, approximation.weights
    )
    mean = numerics.product(
        feature_space.feature_moments(kernels, y, second=False)[0], basis.inverse_root
    )

    def velocity_at(witness, points):
        direction = numerics.product(basis.inverse_root, witness.direction)
        witness = witness._replace(direction=direction)
        return feature_space.feature_velocity(kernels, witness, points)

    return _solver_in_features(config, target, mean), velocity_at


def _solver_in_features(config, target: FeatureTarget, mean):
    def solve(lmbda, memory: Memory) -> tuple[FeatureWitness, Memory]:
        if config.flow == "mmd":
            difference = mean - target.mean
            return FeatureWitness(difference, jnp.sum(difference**2) / 2), memory
        chosen = FILTERS[config.spectral_filter]
        witness = feature_space.feature_witness(target, mean, lmbda, spectral_filter=chosen)
        return witness, memory

    return solve


def _witness(config, solve, lmbda, memory: Memory):
    """(witness, the lambda of this step, memory)."""
    if config.flow != "drmmd" or config.adaptive == "fixed":
        witness, memory = solve(lmbda, memory)
        return witness, lmbda, memory
    # The value at the last lambda gives the next one: both cost O(M^2) from one spectrum.
    value = solve(memory.lmbda, memory)[0].value
    first = jnp.where(memory.step == 0, value, memory.first_value)
    rule = (
        {"regularity": config.regularity}
        if config.adaptive == "paper"
        else {"regularity": 1.0, "largest": jnp.inf}
    )
    following = drmmd.adaptive_lambda(value, first, lmbda, **rule)
    # At the target the value is 0 up to rounding: lambda stays a number to divide by.
    following = jnp.maximum(following, 1e-12)
    witness, memory = solve(following, memory._replace(lmbda=following, first_value=first))
    return witness, following, memory


def _step_size(config, value, lmbda, step_size, memory):
    if config.adaptive == "published":
        # step_size is published_step * lambda_0: the step falls as lambda does.
        return jnp.maximum(step_size * lmbda / config.lmbda, SMALLEST_PUBLISHED_STEP)
    if config.step_rule == "normalized":
        scale = jnp.sqrt(lmbda / jnp.maximum(value, jnp.finfo(value.dtype).tiny))
        return jnp.minimum(config.largest_step_size, step_size * scale)
    return step_size


def _sliced(config, log_density, y, target: Points, lmbda, step_size, key, memory):
    """The energy MMD by directions of this step, in the units of the kernel Energy."""
    # Whole bases: a fixed one is uniform enough in high dimensions only.
    draw = basis_directions if y.shape[1] >= 50 else orthogonal_directions
    directions = draw(key, config.num_directions, y.shape[1], dtype=y.dtype)
    value, velocity = sliced_energy_value_and_grad(
        y, target.points, directions, y_weights=target.weights
    )
    scale = 1 / (2 * config.bandwidth)
    factor = 1.0 if config.opt == "adam" else step_size
    values = jnp.stack([scale * value, lmbda, step_size])
    return values, factor * scale * velocity, memory


def _langevin(config, log_density, y, target, lmbda, step_size, key, memory):
    """Unadjusted Langevin: y + gamma grad log pi + s sqrt(2 gamma) N(0, I), gamma the step size and
    s = 1 unless set."""
    score = jax.vmap(jax.grad(log_density))(y)
    spread = config.diffusion_noise_scale * jnp.sqrt(2 / step_size)
    noise = spread * jax.random.normal(key, y.shape, y.dtype)
    return (
        jnp.stack([jnp.zeros_like(step_size), lmbda, step_size]),
        -step_size * (score + noise),
        memory,
    )


def _stein(config, log_density, y, target, lmbda, step_size, key, memory):
    """Stein variational gradient descent (Liu and Wang, NIPS 2016):
    y_i + step_size mean_j [k(y_j, y_i) grad log pi(y_j) + grad_{y_j} k(y_j, y_i)]."""
    kernel = kernel_of(config)
    score = jax.vmap(jax.grad(log_density))(y)
    gram, transpose = jax.vjp(lambda z: kernel(z, y), y)
    # The kernel is even: its gradient in the first argument is minus that in the second, so the
    # sum over j of grad_{y_j} k(y_j, y_i) is minus the sum of grad_{y_i} k(y_i, y_j).
    repulsion = -transpose(jnp.ones_like(gram))[0]
    velocity = (jnp.matmul(gram, score, precision=jax.lax.Precision.HIGHEST) + repulsion) / len(y)
    return jnp.stack([jnp.zeros_like(step_size), lmbda, step_size]), -step_size * velocity, memory
