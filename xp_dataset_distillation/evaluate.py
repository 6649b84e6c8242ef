"""Evaluates an exported condensed set: classifiers trained on it, and their accuracy.

    python xp_dataset_distillation/evaluate.py results/xp_dataset_distillation/RUN/seed0/condensed
    python xp_dataset_distillation/evaluate.py FOLDER --dataset path/to/images.zip --evaluators dm

Accuracies are those on the test split after the last epoch. An evaluation in full takes hours
without a GPU; an interrupted one resumes.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import Mesh

from lib import datasets, runs
from lib.runs.commands import run_command
from lib.runs.processes import DeviceOptions
from lib.runs.settings import check_sizes, chosen
from xp_dataset_distillation import evaluation, export
from xp_dataset_distillation.config import EVALUATORS
from xp_dataset_distillation.factor import decode
from xp_dataset_distillation.real_data import Setting, may_be_mirrored


@dataclass(frozen=True)
class Arguments(DeviceOptions):
    folder: tyro.conf.Positional[Path]
    """An exported set: what condense.py calls `images:`."""
    evaluators: tuple[str, ...] = ("idc",)
    """Of dm, idc and wow."""
    num_networks: int = 3
    """Classifiers trained on the set."""
    dataset: str | None = None
    """Whose test split is used: a name, or the path of a folder or zip of images. None: the data
    set that the exported set names."""
    seed: int = 0
    results: Path = Path("results")
    data_root: Path | None = None
    """A torchvision root. None: the environment's DATA_ROOT, else ./data."""

    def __post_init__(self):
        check_sizes(self, "num_networks")


def main(arguments: Arguments, mesh: Mesh | None = None) -> dict[str, np.ndarray]:
    """Prints the accuracies and returns them by evaluator, [num_networks] each."""
    names = chosen(arguments.evaluators, EVALUATORS, kind="evaluator")
    condensed = export.load(arguments.folder)
    settings = condensed.about.get("settings", {})
    image_shape = condensed.images.shape[2:]
    dataset = arguments.dataset or condensed.dataset
    test = evaluation.test_split(
        dataset,
        condensed.dataset,
        condensed.class_names,
        image_shape,
        resized=settings.get("size") is not None,
        data_root=arguments.data_root,
    )
    flips = settings.get("flips")
    if flips is None:
        flips = may_be_mirrored(test.origin, test.class_names)
    mean, std = (tuple(map(float, values)) for values in (condensed.mean, condensed.std))
    setting = Setting(len(test.class_names), test.image_shape, mean, std, flips)
    training = evaluation.labelled(
        np.asarray(decode(jnp.asarray(condensed.images), condensed.factor))
    )
    known_by = {
        "images": runs.CONTENT + hashlib.sha256(condensed.images.tobytes()).hexdigest(),
        "factor": condensed.factor,
        "setting": setting._asdict(),
        "dataset": datasets.identity(dataset, data_root=arguments.data_root),
    }
    accuracies = {}
    for name in names:
        accuracies[name] = evaluation.stored_accuracies(
            lambda: (training, evaluation.EvaluationSet(test.images, test.labels), setting),
            f"evaluated-{name}",
            known_by,
            EVALUATORS[name],
            num_networks=arguments.num_networks,
            seed=arguments.seed,
            results=arguments.results,
            mesh=mesh,
        )["accuracies"]
        percent = 100 * np.mean(accuracies[name])
        print(f"{name}: {percent:.1f}% of the test split, {arguments.num_networks} classifiers")
    return accuracies


if __name__ == "__main__":
    run_command(main, lambda: tyro.cli(Arguments), lower="--num_networks")
