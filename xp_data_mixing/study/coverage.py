"""How often intervals hold the true weights, over draws of sources and target from one mixture."""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lib.numerics import named_key
from lib.runs import console
from xp_data_mixing.calibration import estimate_calibrated
from xp_data_mixing.mixing import Bootstrap, Kernel, estimate
from xp_data_mixing.study import problems
from xp_data_mixing.study.config import CoverageConfig


def cover(config: CoverageConfig, seed: int, data_root: Path | None = None) -> dict[str, Any]:
    """weights [R, N] and intervals [R, N, 2] of R draws, the mixture truth [N], and for the
    calibrated estimator the bandwidth and damping that the uncounted draw chose; for the other the
    least signal over noise of each draw, [R]."""
    splits = problems.load(config.samples, data_root)
    mixture_key, first_key, resample_key = jax.random.split(jax.random.key(seed), 3)
    mixture = problems.draw_mixture(mixture_key, splits.num_classes)

    def draw(key):
        sources_key, target_key = jax.random.split(key)
        sizes = [config.samples.num_per_class] * splits.num_classes
        if config.small_set is not None:
            label, sizes[label] = config.small_set
        indices = problems.draw_sources(sources_key, splits, sizes)
        dataset, target, _ = problems.draw_target(target_key, splits, mixture, indices)
        sources = [problems.pixels(splits.train, images) for images in indices]
        return sources, problems.pixels(dataset, target)

    chosen: dict[str, Any] = {}
    if config.estimator == "mmd":
        run = partial(
            estimate,
            kernel=Kernel(num_features=config.num_features, statistic="u", check_features=0),
            bootstrap=Bootstrap(config.replicates, config.confidence),
        )
    else:
        run = partial(estimate_calibrated, num_features=config.num_features)
        calibrated = run(named_key(first_key, "settings"), *draw(first_key))
        chosen = {"bandwidth": calibrated.bandwidth, "damping": calibrated.damping}
        run = partial(run, bootstrap=config.replicates, confidence=config.confidence, **chosen)
    weights, intervals, signals = [], [], []
    with console.progress(config.resamples, description=f"coverage, {config.estimator}") as advance:
        for r in range(config.resamples):
            draw_key, key = jax.random.split(jax.random.fold_in(resample_key, r))
            result: Any = run(key, *draw(draw_key))
            weights.append(result.weights)
            intervals.append(result.intervals)
            if config.estimator == "mmd":
                signals.append(result.signal_to_noise[0])
            advance(1)
    if signals:
        chosen["signal"] = signals
    return {
        "weights": np.stack(weights),
        "mean_weights": np.mean(weights, axis=0),
        "intervals": np.stack(intervals),
        "truth": mixture,
        **{name: np.array(value) for name, value in chosen.items()},
    }
