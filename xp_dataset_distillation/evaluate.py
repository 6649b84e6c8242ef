"""Evaluates an exported condensed set: classifiers trained on it, and their accuracy.

    python xp_dataset_distillation/evaluate.py results/xp_dataset_distillation/RUN/seed0/condensed
    python xp_dataset_distillation/evaluate.py FOLDER --dataset path/to/images.zip --evaluators dm

Accuracies are those on the test split after the last epoch. An evaluation in full takes hours
without a GPU, of which `--epochs` takes a part; an interrupted one resumes.
"""

import hashlib
from dataclasses import dataclass, replace
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
    """An exported set: what condense.py calls `images:`, or the run's folder that it is in."""
    evaluators: tuple[str, ...] = ("idc",)
    """Of dm, idc and wow."""
    num_networks: int = 3
    """Classifiers trained on the set."""
    epochs: int | None = None
    """Of each training. None: the evaluator's own, 1,000."""
    dataset: str | None = None
    """Whose test split is used: a name, or the path of a folder or zip of images. None: the named
    data set that the exported set was made from; of images of your own no path is stored."""
    seed: int = 0
    results: Path = Path("results")
    data_root: Path | None = None
    """A torchvision root. None: the environment's DATA_ROOT, else ./data."""

    def __post_init__(self):
        check_sizes(self, "num_networks")
        if self.epochs is not None:
            check_sizes(self, "epochs")


def test_data(arguments: Arguments, condensed: export.Condensed) -> str:
    """The data set to evaluate on. Raises ValueError where only the user knows where it is."""
    made_from = condensed.about.get("settings", {}).get("dataset", condensed.dataset)
    if arguments.dataset is None and made_from.startswith(runs.CONTENT):
        raise ValueError(
            f"{arguments.folder} was made from images of your own, called {condensed.dataset}: "
            "pass --dataset PATH, the folder or zip that it was made from"
        )
    return arguments.dataset or made_from


def main(arguments: Arguments, mesh: Mesh | None = None) -> dict[str, np.ndarray]:
    """Prints the accuracies and returns them by evaluator, [num_networks] each."""
    names = chosen(arguments.evaluators, EVALUATORS, kind="evaluator")
    inside = arguments.folder / "condensed"
    condensed = export.load(inside if inside.is_dir() else arguments.folder)
    settings = condensed.about.get("settings", {})
    image_shape = condensed.images.shape[2:]
    dataset = test_data(arguments, condensed)
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
        evaluator = EVALUATORS[name]
        evaluator = replace(evaluator, num_epochs=arguments.epochs or evaluator.num_epochs)
        accuracies[name] = evaluation.stored_accuracies(
            lambda: (training, evaluation.EvaluationSet(test.images, test.labels), setting),
            f"evaluated-{name}",
            known_by,
            evaluator,
            num_networks=arguments.num_networks,
            seed=arguments.seed,
            results=arguments.results,
            mesh=mesh,
        )["accuracies"]
        print(
            f"{name}: {100 * np.mean(accuracies[name]):.1f}% of the test split, "
            f"{arguments.num_networks} classifiers, {evaluator.num_epochs:,} epochs"
        )
    return accuracies


if __name__ == "__main__":
    run_command(main, lambda: tyro.cli(Arguments), lower="--num_networks")
