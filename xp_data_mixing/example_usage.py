"""Three demonstrations on synthetic files: basic usage, parameters and what they do, a real run.

python example_usage.py
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lib.runs.console import one_line_errors
from xp_data_mixing.mmd_data_mixing import MMDDataMixer, MMDDataMixerRBF

DIMENSION = 64
MIXTURE = {"code": 0.5, "dialogue": 0.3, "encyclopedia": 0.2, "advertising": 0.0}
"""What the target is made of."""


def synthetic_files(folder: Path, *, rows: int = 600) -> tuple[list[str], list[str]]:
    """A training file for each domain and two validation files, a known mixture of the domains."""
    rng = np.random.default_rng(0)
    directions = rng.normal(size=(len(MIXTURE), DIMENSION))

    def gradients(domain):
        """Unit rows, one for each entry of `domain`, around the direction of its domain."""
        noisy = directions[domain] + 1.5 * rng.normal(size=(len(domain), DIMENSION))
        return noisy / np.linalg.norm(noisy, axis=1, keepdims=True)

    def save(name, domain):
        torch.save(torch.tensor(gradients(domain), dtype=torch.float32), folder / name)
        return str(folder / name)

    train_paths = [save(f"{name}.pt", np.full(rows, i)) for i, name in enumerate(MIXTURE)]
    of_target = rng.choice(len(MIXTURE), p=list(MIXTURE.values()), size=(2, rows // 2))
    val_paths = [save(f"validation{i}.pt", domain) for i, domain in enumerate(of_target)]
    return train_paths, val_paths


def basic_usage(train_paths: list[str], val_paths: list[str]) -> None:
    """The weights, with the default parameters."""
    mixer = MMDDataMixer(rff_dimension=100, sigma_bandwidth=3.0, ridge_penalty=1e-5, random_seed=42)
    results = mixer.optimize_mixing_weights(train_paths, val_paths)
    for path, weight in results.items():
        name = Path(path).stem
        print(f"Dataset: {name:12} -> Weight: {weight:.4f}  (the target has {MIXTURE[name]:.1f})")


def parameter_tuning(train_paths: list[str], val_paths: list[str]) -> None:
    """How far off the weights are for other dimensions, bandwidths and ridges, and what warns."""
    settings: list[dict[str, Any]] = [
        {"rff_dimension": 25, "sigma_bandwidth": "auto"},
        {"rff_dimension": 100, "sigma_bandwidth": "auto"},
        {"rff_dimension": 400, "sigma_bandwidth": "auto"},
        {"sigma_bandwidth": 0.1},
        {"sigma_bandwidth": 3.0},
        {"sigma_bandwidth": "auto", "ridge_penalty": 1e-2},
    ]
    mixers = {
        ", ".join(f"{name} {value}" for name, value in setting.items()): MMDDataMixer(**setting)
        for setting in settings
    }
    mixers["exact kernel, sigma_bandwidth auto"] = MMDDataMixerRBF(sigma_bandwidth="auto")
    truth = np.array(list(MIXTURE.values()))
    for title, mixer in mixers.items():
        result = mixer.mix(train_paths, val_paths)
        off = np.abs(result.weights - truth).sum() / 2
        print(f"{title}:\n    {off:.3f} off in total variation, condition {result.condition:.0f}")
        for warning in result.warnings:
            print(f"    warning: {warning}")


def real_world_usage(train_paths: list[str], val_paths: list[str]) -> None:
    """Bandwidth from the data, error bars, no file seen more than twice, what each is worth."""
    mixer = MMDDataMixer(
        rff_dimension=400,
        sigma_bandwidth="auto",
        statistic="u",
        bootstrap=100,
        max_epochs=2,
    )
    result = mixer.mix(train_paths, val_paths)
    print(f"sigma {result.bandwidth:.3f}; at most {result.gap:.0e} above the minimum")
    assert result.intervals is not None  # by the bootstrap
    rows = zip(train_paths, result.weights, result.intervals, result.leave_one_out_costs)
    for path, weight, (low, high), worth in rows:
        print(
            f"{Path(path).stem:12}  {weight:.3f} in [{low:.3f}, {high:.3f}], "
            f"the objective rises by {worth:.1e} without it"
        )
    assert result.held_out is not None  # by the check features
    for name, value in result.held_out._asdict().items():
        print(f"held-out MMD^2, {name.replace('_', ' ')}: {value:.2e}")
    for warning in result.warnings:
        print(f"warning: {warning}")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        paths = synthetic_files(Path(folder))
        for demonstration in (basic_usage, parameter_tuning, real_world_usage):
            title = demonstration.__name__.replace("_", " ").capitalize()
            print(f"{title}\n{'-' * len(title)}")
            demonstration(*paths)
            print()


if __name__ == "__main__":
    with one_line_errors():
        main()
