"""How often intervals hold the true weights, over draws of sets and target from one mixture."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lib.numerics import named_key
from lib.runs import console
from xp_data_mixing import problems
from xp_data_mixing.calibration import estimate_calibrated
from xp_data_mixing.config import CoverageConfig
from xp_data_mixing.mixing import estimate


def cover(config: CoverageConfig, seed: int, data_root: Path | None = None) -> dict[str, Any]:
    """weights [R, N] and intervals [R, N, 2] of R draws, the mixture truth [N], and for the
    calibrated estimator the bandwidth and damping that the uncounted draw chose; for the other the
    least signal over noise of each draw, [R]."""
    source = problems.load(config.samples, data_root)
    mixture_key, first_key, resample_key = jax.random.split(jax.random.key(seed), 3)
    mixture = problems.draw_mixture(mixture_key, source.num_classes)

    def draw(key):
        sets_key, target_key = jax.random.split(key)
        sizes = [config.samples.num_per_class] * source.num_classes
        if config.small_set is not None:
            label, sizes[label] = config.small_set
        indices = problems.draw_sets(sets_key, source, sizes)
        dataset, chosen, _ = problems.draw_target(target_key, source, mixture, indices)
        sets = [problems.pixels(source.train, one) for one in indices]
        return sets, problems.pixels(dataset, chosen)

    options: dict[str, Any] = {
        "num_features": config.num_features,
        "confidence": config.confidence,
        "bootstrap": config.replicates,
    }
    settings: dict[str, Any] = {}
    estimator: Callable[..., Any] = estimate_calibrated
    if config.estimator == "mmd":
        estimator, options = estimate, {**options, "statistic": "u", "check_features": 0}
    else:
        settings_key = named_key(first_key, "settings")
        found = estimate_calibrated(
            settings_key, *draw(first_key), num_features=config.num_features
        )
        settings = {"bandwidth": found.bandwidth, "damping": found.damping}
    weights, intervals, signals = [], [], []
    with console.progress(config.resamples, description=f"coverage, {config.estimator}") as advance:
        for r in range(config.resamples):
            draw_key, key = jax.random.split(jax.random.fold_in(resample_key, r))
            result = estimator(key, *draw(draw_key), **options, **settings)
            weights.append(result.weights)
            intervals.append(result.intervals)
            if config.estimator == "mmd":
                signals.append(result.signal_to_noise[0])
            advance(1)
    if signals:
        settings["signal"] = signals
    return {
        "weights": np.stack(weights),
        "mean_weights": np.mean(weights, axis=0),
        "intervals": np.stack(intervals),
        "truth": mixture,
        **{name: np.array(value) for name, value in settings.items()},
    }
