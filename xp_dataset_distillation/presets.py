"""What is compared: methods, numbers of images per class, and evaluations, by preset and group."""

from dataclasses import replace

from xp_dataset_distillation.config import (
    EVALUATORS,
    Comparison,
    CondenseConfig,
    Evaluation,
    Method,
    NetworkName,
    Preset,
    baselines,
    dm,
    kernels,
    mmdsw,
    order,
    pools,
)

ARCHITECTURES: tuple[NetworkName, ...] = ("convnet", "mlp", "lenet", "alexnet", "vgg11", "resnet18")

QUICK = CondenseConfig(
    dataset="digits",
    factor=1,
    start="real",
    num_steps=300,
    real_batch=64,
    augmentation="",
    width=32,
    depth=2,
)
QUICK_EVALUATION = Evaluation(
    replace(EVALUATORS["idc"], num_epochs=100, width=32, depth=2, augmentation="", cutmix=0.0),
    num_networks=3,
    whole_epochs=10,
)

# For two CPU cores: a ConvNet of 32 channels, 500 steps, evaluations of 200 epochs.
CPU = CondenseConfig(num_steps=500, real_batch=64, width=32)
CPU_EVALUATION = Evaluation(
    replace(EVALUATORS["idc"], num_epochs=200, width=32), num_networks=2, whole_epochs=5
)

# At most an hour of one core for a set, its pool included; the evaluator at its published size.
HOUR = replace(
    CPU,
    networks="interpolated",
    pool_networks=6,
    pool_epochs=1,
    num_steps=4000,
    steps_per_batch=5,
)
HOUR_EVALUATION = Evaluation(EVALUATORS["idc"], num_networks=2, whole_epochs=20)


def methods(base: CondenseConfig) -> dict[str, Method]:
    """ECHO and what it is compared with, on one data set."""
    size = {"feature_width": base.width, "feature_depth": base.depth}
    return {
        "ECHO": base,
        "DM": dm(base),
        "MMDSW": mmdsw(base),
        **baselines(base.dataset, "random", "herding", "kmeans", "whole", **size),
    }


def of_an_hour(base: CondenseConfig) -> dict[str, Method]:
    """ECHO under trained and under random networks in as many steps, and what is simplest."""
    return {
        "ECHO, interpolated networks": base,
        "ECHO, random networks": replace(base, networks="random"),
        "DM": dm(replace(base, networks="random")),
        **baselines(base.dataset, "random", "whole"),
    }


def cross_architecture(evaluation: Evaluation) -> dict[str, Evaluation]:
    return {
        name: replace(evaluation, evaluator=replace(evaluation.evaluator, network=name))
        for name in ARCHITECTURES
    }


def presets(preset: Preset) -> dict[str, Comparison]:
    """Groups by name."""
    if preset == "quick":
        compared: dict[str, Method] = {
            "ECHO": QUICK,
            "DM": replace(QUICK, method="dm", kernel="linear"),
        }
        compared |= baselines("digits", "random", "whole")
        return {"digits": Comparison(compared, (1, 10), {"idc, short": QUICK_EVALUATION})}
    if preset == "paper":
        names = ("fashion_mnist", "mnist")
        return _groups(names, CPU, (1, 10), {"idc, 200 epochs": CPU_EVALUATION})
    if preset == "hour":
        evaluations = {"idc": HOUR_EVALUATION}
        return {
            name: Comparison(of_an_hour(replace(HOUR, dataset=name)), (1, 10), evaluations)
            for name in ("fashion_mnist", "mnist", "cifar10")
        }
    names = ("fashion_mnist", "mnist", "cifar10", "svhn")
    evaluations = {"idc": Evaluation(EVALUATORS["idc"], num_networks=4, whole_epochs=200)}
    return _groups(names, CondenseConfig(), (1, 10, 50), evaluations)


def _groups(
    names: tuple[str, ...],
    base: CondenseConfig,
    numbers: tuple[int, ...],
    evaluations: dict[str, Evaluation],
) -> dict[str, Comparison]:
    """One group per data set, then what is varied on the first of them at 10 images per class."""
    groups = {
        name: Comparison(methods(replace(base, dataset=name)), numbers, evaluations)
        for name in names
    }
    base = replace(base, dataset=names[0])
    random = baselines(base.dataset, "random")
    (evaluation,) = evaluations.values()
    varied: dict[str, dict[str, Method]] = {
        "order": order(base) | random,
        "pools": pools(base) | random,
        "kernels": kernels(base) | random,
        "data_size": {
            f"{size or 'all'} images per class": replace(base, num_per_class=size)
            for size in (100, 1000, None)
        },
    }
    groups |= {name: Comparison(methods, (10,), evaluations) for name, methods in varied.items()}
    few: dict[str, Method] = {"ECHO": base, "DM": dm(base), **random}
    groups["architectures"] = Comparison(few, (10,), cross_architecture(evaluation))
    return groups
