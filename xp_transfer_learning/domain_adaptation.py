"""Domain adaptation: a frozen classifier of the target, and source images that flow to it.

    python xp_transfer_learning/domain_adaptation.py --src_dataset usps --tgt_dataset mnist
    python xp_transfer_learning/domain_adaptation.py --src_dataset svhn --tgt_dataset cifar10

LeNet-5 is trained once on target images and frozen. Labelled source images flow to these images;
which source class becomes which target class is read off the end of the flow, by optimal transport
between classes. Reported is the share of the flowed images that the classifier then gives that
class, along the flow (Figure 3 of Bonet et al., 2025). Every try draws its source images anew.
"""

from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import Mesh

from lib import datasets, runs
from lib.networks import LeNet5, classification, optimizers
from lib.report.tables import write_summary
from lib.runs.commands import run_command
from lib.runs.processes import DeviceOptions
from xp_transfer_learning import methods, tables
from xp_transfer_learning.config import (
    ADAPTATION,
    EXPERIMENT,
    AdaptationConfig,
    Directions,
    FlowSettings,
    Preset,
)
from xp_transfer_learning.data import (
    draw,
    known_by_content,
    load,
    pair_name,
    resized,
    shaped,
    summary_name,
)
from xp_transfer_learning.labels import class_costs, match_classes


def _key(number: int):
    """0: the target's draw; 1 + seed: that of a source."""
    return jax.random.fold_in(jax.random.PRNGKey(0), number)


def target_data(config: AdaptationConfig, data_root: Path | None):
    """(x_tgt [D, n, d], image shape): drawn once for all seeds."""
    target = resized(load(config.target, "train", data_root), config.size)
    x_tgt = draw(_key(0), target, config.num_per_class, "--num_per_class")
    return x_tgt, target.image_shape


def data(seed: int, config: AdaptationConfig, data_root: Path | None):
    """(x0 [C, n, d], x_tgt [D, n, d], image shape): a source of its own for every seed."""
    x_tgt, image_shape = target_data(config, data_root)
    source = shaped(load(config.source, "train", data_root), image_shape)
    x0 = draw(_key(1 + seed), source, config.num_per_class, "--num_per_class")
    return x0, x_tgt, image_shape


def frozen_classifier(config: AdaptationConfig, data_root: Path | None):
    """(network, parameters, its accuracies): one for all tries and flows. `test` is on the target's
    test split; `target` on the images it was trained on, where a flow that arrives ends."""
    # Source and flow have no part in it: left out, so that they do not train it anew.
    config = replace(config, source=config.target, flow=FlowSettings())
    return _classifier(config, known_by_content(config, data_root), data_root)


@cache
def _classifier(config: AdaptationConfig, known: AdaptationConfig, data_root: Path | None):
    # `known` is for the cache: a path may hold other images by now.
    x_tgt, image_shape = target_data(config, data_root)
    num_classes, n, _ = x_tgt.shape
    network = LeNet5(num_classes)
    x, labels = x_tgt.reshape(-1, *image_shape), jnp.repeat(jnp.arange(num_classes), n)
    parameters, _ = classification.train(
        jax.random.PRNGKey(1),
        network,
        x,
        labels,
        optimizer=optimizers.adam(config.learning_rate),
        num_epochs=config.num_epochs,
    )
    test = shaped(load(config.target, "test", data_root), image_shape)
    images = datasets.flat(test).reshape(-1, *image_shape)
    accuracies = {
        "test": classification.accuracy(network, parameters, images, jnp.asarray(test.labels)),
        "target": classification.accuracy(network, parameters, x, labels),
    }
    return network, parameters, {name: float(value) for name, value in accuracies.items()}


def run_try(
    config: AdaptationConfig,
    *,
    seed: int,
    results: Path,
    data_root: Path | None,
    mesh: Mesh | None = None,
) -> runs.Run:
    """One flow. Its folder holds accuracies [records], steps, losses [T], matched [C] (the target
    class of each source class), classifier_accuracy and target_accuracy (of the classifier on the
    target's test split and on x_tgt, see `frozen_classifier`) and samples [records, C, d]."""
    name = f"adaptation_{pair_name(config.source, config.target)}"
    run = runs.open_run(results, EXPERIMENT, name, known_by_content(config, data_root), seed=seed)
    if run.finished:
        print(f"{run.folder}: done before")
        return run
    x0, x_tgt, image_shape = data(seed, config, data_root)
    network, parameters, of_classifier = frozen_classifier(config, data_root)
    print(
        f"{name}: the frozen classifier has {100 * of_classifier['test']:.1f}% on the target's "
        f"test split, {100 * of_classifier['target']:.2f}% on the images that the flow goes to"
    )
    losses, steps, images = methods.flow(
        config.flow,
        x0,
        x_tgt,
        seed=seed,
        records=config.records,
        run=run,
        description=name,
        mesh=mesh,
    )
    clipped = np.clip(images[-1], 0, 1)
    matched = match_classes(
        class_costs(clipped[:, : config.num_matched], x_tgt[:, : config.num_matched])
    )
    wanted = jnp.repeat(jnp.asarray(matched), x0.shape[1])
    accuracies = [
        float(
            classification.accuracy(
                network, parameters, jnp.clip(x, 0, 1).reshape(-1, *image_shape), wanted
            )
        )
        for x in images
    ]
    run.finish(
        accuracies=np.asarray(accuracies),
        steps=steps,
        losses=losses,
        matched=matched,
        classifier_accuracy=np.asarray(of_classifier["test"]),
        target_accuracy=np.asarray(of_classifier["target"]),
        samples=images[:, :, 0],
        image_shape=np.asarray(image_shape),
    )
    return run


@dataclass(frozen=True)
class Arguments(DeviceOptions):
    preset: Preset = "quick"
    src_dataset: str | None = None
    """A data set's name, or the path of a folder or zip of images: this flow instead of the
    preset's. Likewise `tgt_dataset`."""
    tgt_dataset: str | None = None
    num_per_class: int | None = None
    size: int | None = None
    """Side of the images. None: the target's."""
    n_epochs_wgd: Annotated[int | None, tyro.conf.arg(aliases=("--n-epochs",))] = None
    """Steps of the flow; `lr` its first step size, `decay` whether it decays linearly to 0."""
    lr: float | None = None
    decay: bool | None = None
    num_directions: int | None = None
    directions: Directions | None = None
    """None, the default: a basis, as many as 28 x 28 pixels."""
    ntry: int | None = None
    """Tries, each with its own draw of the source. None: 1 for quick, 3 for paper."""
    results: Path = Path("results")
    data_root: Path | None = None
    """A torchvision root. None: the environment's DATA_ROOT, else ./data."""


def chosen(arguments: Arguments) -> list[AdaptationConfig]:
    """The preset's settings, or those asked for."""
    configs = list(ADAPTATION[arguments.preset])
    if arguments.src_dataset or arguments.tgt_dataset:
        named: dict[str, Any] = {"source": arguments.src_dataset, "target": arguments.tgt_dataset}
        configs = [AdaptationConfig(**{k: v for k, v in named.items() if v})]
    flow: dict[str, Any] = {
        "num_steps": arguments.n_epochs_wgd,
        "step_size": arguments.lr,
        "decay": arguments.decay,
        "num_directions": arguments.num_directions,
        "directions": arguments.directions,
    }
    flow = {k: v for k, v in flow.items() if v is not None}
    sizes: dict[str, Any] = {"num_per_class": arguments.num_per_class, "size": arguments.size}
    sizes = {k: v for k, v in sizes.items() if v is not None}
    return [replace(c, flow=replace(c.flow, **flow), **sizes) for c in configs]


def main(arguments: Arguments, mesh: Mesh | None = None) -> list[Path]:
    """Runs the flows, prints accuracies along them, draws the figure; returns the summaries."""
    from xp_transfer_learning import plot

    tries = arguments.ntry or (1 if arguments.preset == "quick" else 3)
    summaries = []
    for config in chosen(arguments):
        folders = [
            run_try(
                config,
                seed=seed,
                results=arguments.results,
                data_root=arguments.data_root,
                mesh=mesh,
            ).folder
            for seed in range(tries)
        ]
        stored = [runs.Run(folder).load_arrays() for folder in folders]
        accuracies = np.stack([arrays["accuracies"] for arrays in stored])
        pair = summary_name(config.source, config.target, arguments.data_root)
        path = arguments.results / EXPERIMENT / f"adaptation_{pair}.json"
        table = tables.adaptation_table(
            f"{config.source} → {config.target}", stored[0]["steps"], accuracies
        )
        summary = write_summary(
            path,
            {
                "config": config,
                "steps": stored[0]["steps"],
                "accuracies": accuracies,
                "losses": [arrays["losses"][[0, -1]] for arrays in stored],
                "matched": [arrays["matched"] for arrays in stored],
                "classifier_accuracy": stored[0]["classifier_accuracy"],
                "target_accuracy": stored[0]["target_accuracy"],
            },
            [table],
            figures=partial(plot.adaptation, arrays=stored[0]),
        )
        summaries.append(summary)
    return summaries


if __name__ == "__main__":
    run_command(main, lambda: tyro.cli(Arguments), lower="--num_per_class or --size")
