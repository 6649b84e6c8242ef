"""What is compared: entries, numbers of images a class, and judges, by preset and group."""

from dataclasses import replace

from xp_dataset_distillation.config import (
    EVALUATORS,
    Comparison,
    CondenseConfig,
    Entry,
    Judged,
    NetworkName,
    Preset,
    baselines,
    dm,
    kernels,
    mmdsw,
    order,
)

ARCHITECTURES: tuple[NetworkName, ...] = ("convnet", "mlp", "lenet", "alexnet", "vgg11", "resnet18")

QUICK = CondenseConfig(
    dataset="digits",
    factor=1,
    start="real",
    iterations=300,
    real_batch=64,
    augmentation="",
    width=32,
    depth=2,
)
QUICK_JUDGE = Judged(
    replace(EVALUATORS["idc"], num_epochs=100, width=32, depth=2, augmentation="", cutmix=0.0),
    num_networks=3,
    whole_epochs=10,
)

# For two CPU cores: a ConvNet of 32 channels, 500 steps, evaluations of 200 epochs.
CPU = CondenseConfig(iterations=500, real_batch=64, width=32)
CPU_JUDGE = Judged(
    replace(EVALUATORS["idc"], num_epochs=200, width=32), num_networks=2, whole_epochs=5
)


def methods(base: CondenseConfig) -> dict[str, Entry]:
    """ECHO and what it is compared with, on one data set."""
    size = {"feature_width": base.width, "feature_depth": base.depth}
    return {
        "ECHO": base,
        "DM": dm(base),
        "MMDSW": mmdsw(base),
        **baselines(base.dataset, "random", "herding", "kmeans", "whole", **size),
    }


def cross_architecture(judged: Judged) -> dict[str, Judged]:
    return {
        name: replace(judged, evaluator=replace(judged.evaluator, network=name))
        for name in ARCHITECTURES
    }


def presets(preset: Preset) -> dict[str, Comparison]:
    """Groups by name."""
    if preset == "quick":
        entries: dict[str, Entry] = {
            "ECHO": QUICK,
            "DM": replace(QUICK, method="dm", kernel="linear"),
        }
        entries |= baselines("digits", "random", "whole")
        return {"digits": Comparison(entries, (1, 10), {"idc, short": QUICK_JUDGE})}
    if preset == "paper":
        names = ("fashion_mnist", "mnist")
        return _groups(names, CPU, (1, 10), {"idc, 200 epochs": CPU_JUDGE})
    names = ("fashion_mnist", "mnist", "cifar10", "svhn")
    judges = {"idc": Judged(EVALUATORS["idc"], num_networks=4, whole_epochs=200)}
    return _groups(names, CondenseConfig(), (1, 10, 50), judges)


def _groups(
    names: tuple[str, ...],
    base: CondenseConfig,
    numbers: tuple[int, ...],
    judges: dict[str, Judged],
) -> dict[str, Comparison]:
    """One group a data set, then what is varied on the first of them at 10 images a class."""
    groups = {
        name: Comparison(methods(replace(base, dataset=name)), numbers, judges) for name in names
    }
    base = replace(base, dataset=names[0])
    random = baselines(base.dataset, "random")
    (judge,) = judges.values()
    varied: dict[str, dict[str, Entry]] = {
        "order": order(base) | random,
        "kernels": kernels(base) | random,
        "data_size": {
            f"{size or 'all'} images a class": replace(base, num_per_class=size)
            for size in (100, 1000, None)
        },
    }
    groups |= {name: Comparison(entries, (10,), judges) for name, entries in varied.items()}
    few: dict[str, Entry] = {"ECHO": base, "DM": dm(base), **random}
    groups["architectures"] = Comparison(few, (10,), cross_architecture(judge))
    return groups
