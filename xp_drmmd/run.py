"""One flow of particles, with the published flags.

    python xp_drmmd/run.py --dataset ThreeRing --flow drmmd --kernel Gaussian --lmbda 0.001 \\
        --step_size 0.1 --bandwidth 0.15 --num_steps 20000 --source_particle_num 300 --opt sgd \\
        --seed 42
    python xp_drmmd/run.py --source a.npy --target b.npy --flow sliced_mmd --gamma 1 --decay \\
        --num_steps 1000

The published code's other flags are taken too, as aliases, or refused with a line that says why;
its data set MixGaussian is FourGaussian here, its Laplace kernel `--distance l1`. As in the
published code the step is `step_size` times `lmbda`, for every flow; `--gamma` gives it outright.
Everything is in float64. The distances printed are MMD^2, W1 (which the published plots call W2)
and the true W2.
"""

import time
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
import tyro
from jax.sharding import Mesh

from lib import runs
from lib.gd import recorded_steps, wasserstein_gradient_descent
from lib.kernels import median_bandwidth
from lib.numerics import key_of_seed, named_key
from lib.report import plotting
from lib.runs import NOT_HASHED
from lib.runs.commands import run_command
from lib.runs.processes import DeviceOptions
from xp_drmmd import flows, metrics
from xp_drmmd.config import EXPERIMENT, DatasetName, FilterName, FlowConfig, FlowName
from xp_drmmd.problems import known_by_content, problem


def run_flow(
    config: FlowConfig,
    *,
    seed: int,
    results: Path,
    data_root: Path | None = None,
    mesh: Mesh | None = None,
) -> runs.Run:
    """Runs one flow, or finds it done. Its folder holds particles [records, N, d], steps, target,
    the seconds it took, values, lambdas and step_sizes [T], mmd2, w1, w2 (and on the line kl)
    [records], the bandwidth, and of images center, components and image_shape."""
    name = f"{config.dataset}-{config.flow}"
    exclude = (*NOT_HASHED, *config.without_effect())
    known = known_by_content(config)
    run = runs.open_run(results, EXPERIMENT, name, known, seed=seed, exclude=exclude)
    if run.finished:
        return run
    with jax.enable_x64(True):
        setup = problem(config, seed, data_root)
        if config.flow in ("ula", "svgd") and setup.log_density is None:
            raise ValueError(f"{config.flow} needs a density, {config.dataset} has none")
        bandwidth = config.bandwidth or float(
            median_bandwidth(named_key(jax.random.key(0), "bandwidth"), setup.target)
        )
        resolved = replace(config, bandwidth=bandwidth)
        prepared = flows.prepare(resolved, setup.target, setup.weights)
        every = max(1, config.num_steps // config.records)
        began = time.perf_counter()
        values, particles = wasserstein_gradient_descent(
            setup.start[None],
            prepared,
            flows.objective(resolved, setup.log_density),
            key_of_seed(seed, shift=1_000_000),
            n_epochs=config.num_steps,
            optimizer=flows.optimizer(resolved),
            carry=flows.first_memory(prepared),
            record_every=every,
            run=run,
            description=name,
            mesh=mesh,
        )
        seconds = time.perf_counter() - began
        measured = [
            metrics.evaluate(x, setup.target, bandwidth, setup.weights) for x in particles[:, 0]
        ]
        if config.dataset in ("Gaussian1d", "files"):  # the KL is that to the whole of N(0, 1)
            measured = [{k: v for k, v in distances.items() if k != "kl"} for distances in measured]
    run.finish(
        particles=particles[:, 0],
        steps=recorded_steps(config.num_steps, every),
        target=np.asarray(setup.target),
        bandwidth=np.asarray(bandwidth),
        seconds=np.asarray(seconds),
        values=values[:, 0, 0],
        lambdas=values[:, 0, 1],
        step_sizes=values[:, 0, 2],
        **{name: np.asarray([distances[name] for distances in measured]) for name in measured[0]},
        **({} if setup.basis is None else setup.basis._asdict()),
    )
    return run


@dataclass(frozen=True)
class Arguments(DeviceOptions, FlowConfig):
    dataset: DatasetName | Literal["MixGaussian"] = "ThreeRing"  # type: ignore[assignment]
    """Gaussian1d, Gaussian2d, Student and MixGaussian, which is FourGaussian, are those of the
    published code. Its Gaussian1d is N(0, 1) within [-1, 1] from N(0, .01^2); the Gaussian1D here
    is N(0, 1) from N(0, 1/2). files: the rows of --target, which implies it."""
    bandwidth: float | None = None  # type: ignore[assignment]
    """sigma, a length; 0: the median distance of the target. None: .15, of files the median."""
    flow: FlowName | Literal["drmmd_spectral"] = "drmmd"  # type: ignore[assignment]
    """drmmd_spectral: drmmd, which takes every `spectral_filter`."""
    spectral_filter: Annotated[FilterName, tyro.conf.arg(aliases=("--spectral",))] = "tikhonov"
    noise: Annotated[float, tyro.conf.arg(aliases=("--inject-noise-scale",))] = 0.0
    """Standard deviation of the noise injected where the velocity is evaluated (Arbel et al.,
    2019); it falls as 1 / sqrt(step). (The published code reads the flag and injects nothing.)"""
    target_scale: Annotated[float, tyro.conf.arg(aliases=("--logccv",))] = 1.0
    """Standard deviation of the target Gaussian2d."""
    adaptive_lmbda: bool = False
    """The same as --adaptive published."""
    nystrom: int = 0
    """K: the same as --approximation nystrom --rank K; 0: no approximation."""
    num_steps: Annotated[int, tyro.conf.arg(aliases=("--step-num",))] = 20_000
    step_size: float = 0.1
    """As published, a factor of `lmbda`: the step is step_size lmbda, unless `gamma` is given."""
    gamma: float | None = None
    """The step itself."""
    largest_step_size: Annotated[float, tyro.conf.arg(aliases=("--largest-gamma",))] = 0.1
    """Of the normalized step."""
    seed: int = 0
    results: Annotated[Path, tyro.conf.arg(aliases=("--save-path",))] = Path("results")
    data_root: Path | None = None
    """A torchvision root. None: the environment's DATA_ROOT, else ./data."""

    def __post_init__(self):
        config_of(self)  # so that what does not fit together is said before anything is done


def config_of(arguments: Arguments) -> FlowConfig:
    """The flow that the arguments describe. Raises ValueError where they contradict each other."""
    values: dict[str, Any] = {
        field.name: getattr(arguments, field.name) for field in fields(FlowConfig)
    }
    values["dataset"] = {"MixGaussian": "FourGaussian"}.get(arguments.dataset, arguments.dataset)
    values["flow"] = {"drmmd_spectral": "drmmd"}.get(arguments.flow, arguments.flow)
    if arguments.target is not None and arguments.dataset == "ThreeRing":
        values["dataset"] = "files"
    if arguments.bandwidth is None:
        values["bandwidth"] = 0.0 if values["dataset"] == "files" else FlowConfig.bandwidth
    if arguments.adaptive_lmbda:
        if arguments.adaptive == "paper":
            raise ValueError("adaptive_lmbda is --adaptive published, not --adaptive paper")
        if values["flow"] != "drmmd":
            raise ValueError(f"adaptive_lmbda is of the flow drmmd, not of {arguments.flow}")
        values["adaptive"] = "published"
    if arguments.nystrom:
        if arguments.nystrom < 0 or arguments.approximation == "rff":
            raise ValueError(
                f"nystrom is a number of columns, 0 for none, without --approximation rff: got "
                f"{arguments.nystrom}, --approximation {arguments.approximation}"
            )
        values |= {"approximation": "nystrom", "rank": arguments.nystrom}
    values["step_size"] = arguments.step_size * arguments.lmbda
    if arguments.gamma is not None:
        values["step_size"] = arguments.gamma
    return FlowConfig(**values)


def main(arguments: Arguments, mesh: Mesh | None = None) -> Path:
    """Runs the flow, prints its distances, returns its folder."""
    config = config_of(arguments)
    print(flows.kernel_line(config), flush=True)
    run = run_flow(
        config,
        seed=arguments.seed,
        results=arguments.results,
        data_root=arguments.data_root,
        mesh=mesh,
    )
    stored = run.load_arrays()
    sizes = f"lambda {config.lmbda:g}, step size {config.step_size:g}"
    print(f"{config.dataset}, {config.flow}, {sizes}")
    for i in np.unique(np.linspace(0, len(stored["steps"]) - 1, 11).round().astype(int)):
        shown = ", ".join(f"{name} {stored[name][i]:.3e}" for name in ("mmd2", "w1", "w2"))
        print(f"  step {stored['steps'][i]:7d}: {shown}")
    if config.dataset == "files":
        print(stray_line(stored["particles"][-1], stored["target"]))
    from xp_drmmd import plot

    figure = plot.flow(stored, f"{config.dataset}, {config.flow}")
    print(f"figure:  {plotting.save_figure(figure, run.folder / 'flow.png')}")
    print(f"numbers: {run.arrays}")
    return run.folder


def stray_line(particles: np.ndarray, target: np.ndarray) -> str:
    """How many particles end far outside of the target: the value can fall while they fly off."""
    low, high = target.min(axis=0), target.max(axis=0)
    margin = (high - low) / 2
    outside = int(np.any((particles < low - margin) | (particles > high + margin), axis=1).sum())
    advice = "; --flow sliced_mmd sees far, a larger --bandwidth farther" if outside else ""
    return (
        f"{outside} of {len(particles)} particles end outside the target's range, widened by "
        f"half{advice}"
    )


if __name__ == "__main__":
    lower = (
        "--source_particle_num, --target_particle_num or --records, or "
        "approximate the kernel (--approximation nystrom)"
    )
    run_command(main, lambda: tyro.cli(Arguments), lower=lower)
