"""Mixing weights beside the quantifiers of QuaPy, on the targets of the recovery study.

    pip install quapy
    python benchmarks/quantifiers.py [--seeds 0 1 2 3 4]

PACC, EMQ and KDEy of QuaPy, with scikit-learn's logistic regression on the features that `auto`
would classify by: the same random Fourier features, bandwidth and ridge. A setting's sources are
learnt from once for each seed, and asked for the weights of each of its targets; seconds are of
both. Settings, seeds and targets are those of `xp_data_mixing/study/config.py`.
"""

import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from sklearn.linear_model import LogisticRegression

from lib.report.spreads import mean_and_spread, standard_error
from lib.report.tables import Table, write_summary
from lib.rff import gaussian_frequencies
from lib.rows import as_rows
from lib.rows.kernel_means import streamed_median_bandwidth
from lib.runs.commands import run_command
from xp_data_mixing.block_moments import origin
from xp_data_mixing.calibration import FACTORS, choose, fourier, total_variation
from xp_data_mixing.features import draw_sample
from xp_data_mixing.mixing import Kernel, estimate
from xp_data_mixing.study import problems
from xp_data_mixing.study.config import GROUPS, RecoveryConfig

OURS = "ours, auto"


@dataclass(frozen=True)
class Arguments:
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    labels: tuple[str, ...] = ()
    """Settings of the recovery group; none: all."""
    results: Path = Path("results")
    data_root: Path | None = None


def quantifiers(ridge: float) -> dict[str, Any]:
    from quapy.method.aggregative import EMQ, PACC, KDEyML

    # Per row the same penalty as ours.
    model = LogisticRegression(C=1 / ridge, max_iter=300)
    return {
        "QuaPy PACC": PACC(model, val_split=5),
        "QuaPy EMQ": EMQ(model),
        "QuaPy EMQ, calibrated": EMQ(model, val_split=5, calib="bcts"),
        "QuaPy KDEy": KDEyML(model, val_split=5, random_state=0),
    }


def compare(config: RecoveryConfig, seed: int, data_root: Path | None) -> dict[str, Any]:
    """{method: (total variation of each target, seconds)} of a setting and a seed."""
    splits = problems.load(config.samples, data_root)
    keys = jax.random.split(jax.random.key(seed), 6)  # as in `recovery.recover`
    drawn = problems.draw(keys[0], splits, config.num_targets)
    measured, began, choice = {}, time.perf_counter(), None
    weights = []
    for target in drawn.targets:
        kernel = Kernel(estimator="auto", choice=choice, check_features=0)
        result = estimate(keys[5], drawn.sources, target, kernel=kernel)
        weights.append(result.weights)
        choice = result.choice
    tv = total_variation(np.stack(weights), drawn.truth)
    measured[OURS] = (tv, time.perf_counter() - began)

    frequency_key, choice_key = jax.random.split(keys[4])
    groups = [as_rows(rows, "rows") for rows in (*drawn.sources, *drawn.targets)]
    frequencies = gaussian_frequencies(frequency_key, Kernel().num_features, groups[0].shape[1])
    projections = [
        draw_sample(choice_key, rows, rows.shape[0], frequencies, origin(groups)).projections
        for rows in groups
    ]
    num_sources = len(drawn.sources)
    median = streamed_median_bandwidth(keys[1], drawn.sources)
    best = choose(
        choice_key, projections[:num_sources], [f * median for f in FACTORS], ["posteriors"]
    )
    assert best.ridge is not None
    labels = np.repeat(np.arange(num_sources), [len(rows) for rows in drawn.sources])
    rows = fourier(np.concatenate(projections[:num_sources]), best.bandwidth)
    targets = [fourier(part, best.bandwidth) for part in projections[num_sources:]]
    for name, method in quantifiers(best.ridge).items():
        began = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of scikit-learn's iterations
            method.fit(rows, labels)
            weights = [method.predict(target) for target in targets]
        tv = total_variation(np.stack(weights), drawn.truth)
        measured[name] = (tv, time.perf_counter() - began)
        print(f"  {name} {tv.mean():.3f}", flush=True)
    return measured


def main(arguments: Arguments) -> Path:
    """Writes `quantifiers.json` and its page; returns the former."""
    settings = GROUPS["recovery"].settings
    rows, document = [], {}
    for label in arguments.labels or settings:
        config = settings[label]
        assert isinstance(config, RecoveryConfig)
        runs = []
        for seed in arguments.seeds:
            print(f"{label}, seed {seed}", flush=True)
            runs.append(compare(config, seed, arguments.data_root))
        tv = {name: np.concatenate([run[name][0] for run in runs]) for name in runs[0]}
        seconds = {name: float(np.mean([run[name][1] for run in runs])) for name in runs[0]}
        document[label] = {"tv": {name: v.tolist() for name, v in tv.items()}, "seconds": seconds}
        for name, values in tv.items():
            more = values - tv[OURS]
            error = 1.96 * standard_error(more)
            difference = "-" if name == OURS else f"{more.mean():+.4f} ± {error:.4f}"
            cells = [mean_and_spread(values, ".4f"), difference, f"{seconds[name]:.1f}"]
            rows.append([label, name, *cells])
            print(rows[-1], flush=True)
    table = Table(
        ["sources and targets", "method", "total variation", "less ours", "seconds"],
        rows,
        f"Mean ± sample standard deviation over the targets of {len(arguments.seeds)} seeds; "
        "paired difference with 1.96 standard errors; seconds of the sources and all targets of a "
        "seed.",
    )
    path = arguments.results / "benchmarks" / "quantifiers.json"
    return write_summary(path, {"settings": document}, [table])


if __name__ == "__main__":
    run_command(main, lambda: tyro.cli(Arguments))
