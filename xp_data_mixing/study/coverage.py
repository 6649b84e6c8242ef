"""How often intervals hold the true weights, over draws of sources and target from one mixture."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lib.numerics import named_key
from lib.runs import console
from xp_data_mixing.mixing import Bootstrap, Kernel, estimate
from xp_data_mixing.study import problems
from xp_data_mixing.study.config import CoverageConfig


def cover(config: CoverageConfig, seed: int, data_root: Path | None = None) -> dict[str, Any]:
    """weights [R, N] and intervals [R, N, 2] of R draws, the mixture truth [N], the least signal
    over noise of each draw [R], and of features that are chosen what an uncounted draw chose."""
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

    kernel = Kernel(
        estimator="rff" if config.estimator == "mmd" else config.estimator,
        num_features=config.num_features,
        statistic="u",
        check_features=0,
    )
    chosen = {}
    if kernel.adaptive:
        first = estimate(named_key(first_key, "settings"), *draw(first_key), kernel=kernel)
        assert first.choice is not None
        kernel, chosen = replace(kernel, choice=first.choice), {"choice": first.choice.name}
    weights, intervals, signals = [], list[Any](), []
    with console.progress(config.resamples, description=f"coverage, {config.estimator}") as advance:
        for r in range(config.resamples):
            draw_key, key = jax.random.split(jax.random.fold_in(resample_key, r))
            result = estimate(
                key,
                *draw(draw_key),
                kernel=kernel,
                bootstrap=Bootstrap(config.replicates, config.confidence),
            )
            weights.append(result.weights)
            intervals.append(result.intervals)
            signals.append(result.signal_to_noise[0])
            advance(1)
    return {
        "weights": np.stack(weights),
        "mean_weights": np.mean(weights, axis=0),
        "intervals": np.stack(intervals),
        "truth": mixture,
        "signal": np.array(signals),
        **{name: np.array(value) for name, value in chosen.items()},
    }
