"""Mixing weights of gradient (or any embedding) files, from Python or the command line.

    python xp_data_mixing/mmd_data_mixing.py --train_paths code.pt text.pt chat.pt \\
        --val_paths target.pt --sigma_bandwidth auto --bootstrap 200 \\
        --output_file results.json --report report.html

Files are .pt, .npy, .npz or .safetensors of rows [n, d], read once, a few rows at a time; of
several matrices in a file PATH:KEY names one, as rows.npz:train. Weights minimize MMD^2 to the
pooled validation files; see `xp_data_mixing.mixing` for what comes beside them. Logging at the
level DEBUG says what was read.
"""

import logging
import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import tyro
from jax.sharding import Mesh

from lib.numerics import check_seed
from lib.rows import check_same_width
from lib.rows.files import RowFile, check_distinct, open_rows
from lib.runs import console
from lib.runs.commands import run_command
from lib.runs.files import write_json
from lib.runs.processes import DeviceOptions
from lib.runs.settings import check_sizes
from xp_data_mixing import report as reports
from xp_data_mixing.mixing import (
    ADAPTIVE,
    ESTIMATORS,
    Bootstrap,
    Constraints,
    Estimator,
    Kernel,
    MixingResult,
    estimate,
)

logger = logging.getLogger(__name__)

SHOWN_FROM = 20_000_000
"""Numbers to read from which the progress is shown."""
SIGMA = 3.0
MOST_SAMPLED = 10_000
"""Rows of which the distances of all pairs take 2 GB."""


@dataclass(frozen=True)
class MMDDataMixer:
    """Weights of training files for validation files, by random Fourier features.

        MMDDataMixer(estimator="auto")

    takes what recovers known mixtures of the training files best, most often posteriors of
    classifiers between them. By default the kernel is exp(-|x - y|^2 / (2 sigma^2)), and
    `rff_dimension` frequencies have a cosine and a sine each, instead of one cosine with a random
    phase: less variance at the same cost. Raises ValueError on bad options.
    """

    rff_dimension: int = 100
    """Number of random frequencies D."""
    sigma_bandwidth: float | Literal["auto"] = SIGMA
    """sigma, a length in units of the rows; auto: the median distance of a subsample, and for
    whitened, posteriors and auto (which take it so unless another than 3 is given) the best of
    multiples of it."""
    ridge_penalty: float = 1e-5
    """rho of rho |w|^2, in units of the kernel, whose values are at most 1."""
    random_seed: int | None = 42
    """Of frequencies, blocks, bootstrap; None: drawn by the operating system, and from then on kept
    here, printed and written with the results, so that they can be had again."""
    statistic: Literal["v", "u"] = "v"
    """u: unbiased, without the pairs of a row with itself, which in v count against small files."""
    prior: Literal["uniform", "size"] | tuple[float, ...] = "uniform"
    """What `prior_strength` favors: equal weights, proportional to rows, or numbers of sum 1."""
    prior_strength: float = 0.0
    """Of the penalty towards the prior, in units of MMD^2; 0: none."""
    pull: Literal["l2", "kl"] = "l2"
    """l2: |w - p|^2; kl: sum_i w_i log(w_i / p_i)."""
    floors: tuple[float, ...] = ()
    """Least weights: one number for all files, or one for each."""
    caps: tuple[float, ...] = ()
    """Largest weights, likewise."""
    max_epochs: float | None = None
    """Cap by repetition: no file is seen more than so often, w_i T <= e n_i."""
    total_rows: int | None = None
    """T, the rows that will be trained on; None: as many as all training files have together."""
    bootstrap: int = 0
    """Replicates for intervals; 0: none."""
    confidence: float = 0.9
    """Level of the intervals."""
    solver: str = "own"
    """own, or the name of any that cvxpy (pip install cvxpy) has, such as OSQP or CLARABEL."""
    num_blocks: int = 50
    """Blocks of rows of each file that the bootstrap draws."""
    check_features: int = 256
    """Further frequencies for the held-out MMD^2; 0: leave it out."""
    chunk_size: int = 1024
    """Rows in memory at a time."""
    auto_sigma: bool = False
    """As published: the same as a `sigma_bandwidth` of auto, whatever number that has."""
    sigma_sample_size: int = 1000
    """Rows of the subsample of auto, of all files together (the published class: of each)."""
    estimator: Estimator = "rff"
    """rff: MMD by random features. exact: by the kernel, quadratic in the rows. whitened: MMD in
    the metric of the features' covariance within files. posteriors: of classifiers between files.
    auto: whichever of whitened, posteriors and MMD recovers mixtures of the training files best."""
    auto_dimension: int = 1000
    """D of whitened, posteriors and auto."""
    sample_rows: int = 10_000
    """Rows of all training files together that these three are chosen and fitted on."""

    def __post_init__(self):
        if self.random_seed is None:
            object.__setattr__(self, "random_seed", secrets.randbits(31))
        sigma = self.sigma_bandwidth
        if sigma != "auto" and not (isinstance(sigma, int | float) and 0 < sigma < math.inf):
            raise ValueError(f"sigma_bandwidth must be positive and finite or auto, got {sigma!r}")
        check_sizes(self, "rff_dimension", "chunk_size", "auto_dimension", "sample_rows")
        if self.estimator not in ESTIMATORS:
            known = ", ".join(ESTIMATORS)
            raise ValueError(f"estimator must be one of {known}, not {self.estimator!r}")
        check_seed(self.random_seed, "random_seed")
        rows = self.sigma_sample_size
        if not (isinstance(rows, int) and 2 <= rows <= MOST_SAMPLED):
            raise ValueError(
                f"sigma_sample_size must be an integer in [2, {MOST_SAMPLED}], of which all "
                f"distances fit into memory, got {rows!r}"
            )
        for name in ("ridge_penalty", "prior_strength"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must lie in [0, inf), got {getattr(self, name)}")
        for name in ("max_epochs", "total_rows"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {value}")
        if self.pull not in ("l2", "kl"):
            raise ValueError(f"pull must be l2 or kl, not {self.pull!r}")
        if isinstance(self.prior, str) and self.prior not in ("uniform", "size"):
            raise ValueError(f"prior must be uniform, size or numbers, not {self.prior!r}")
        if not ((isinstance(self.prior, str) and self.prior == "uniform") or self.prior_strength):
            raise ValueError("a prior has no effect without a prior_strength above 0")
        if self.total_rows is not None and self.max_epochs is None:
            raise ValueError("total_rows has no effect without max_epochs")

    def optimize_mixing_weights(
        self, train_paths: Sequence[str | Path], val_paths: Sequence[str | Path]
    ) -> dict[str | Path, float]:
        """{training path: weight}, of sum 1. Raises as `mix` does."""
        return dict(zip(train_paths, self.mix(train_paths, val_paths).weights.tolist()))

    def mix(
        self,
        train_paths: Sequence[str | Path],
        val_paths: Sequence[str | Path],
        *,
        val_weights: Sequence[float] | None = None,
        devices: Sequence[jax.Device] | None = None,
    ) -> MixingResult:
        """The weights with all that is known of them, in the order of `train_paths`; `devices` of
        this process share its rows.

        Validation files are pooled, or count by `val_weights`. A file may be training and
        validation: its rows are then not compared with themselves.

        Raises FileNotFoundError, or ValueError naming the file: no path, the same file twice, what
        `lib.rows.files.open_rows` refuses, unequal widths, NaN or infinity; and where no weights
        meet floors and caps.
        """
        train, val = open_files(train_paths, val_paths)
        sizes = np.array([file.shape[0] for file in train])
        total = int(sizes.sum()) + sum(file.shape[0] for file in val)
        assert self.random_seed is not None  # drawn in __post_init__
        penalty: dict[str, Any] = {f"{self.pull}_penalty": self.prior_strength}
        constraints = Constraints(
            ridge=self.ridge_penalty,
            prior=self._prior(sizes),
            lower=_one_or_each("floors", self.floors, sizes),
            upper=self._caps(sizes),
            **penalty,
        )
        adaptive = self.estimator in ADAPTIVE
        # The published default of 3 is of rows of norm 1; these choose around the median distance.
        automatic = self.auto_sigma or (adaptive and self.sigma_bandwidth == SIGMA)
        kernel = Kernel(
            bandwidth="auto" if automatic else self.sigma_bandwidth,
            bandwidth_rows=self.sigma_sample_size,
            estimator=self.estimator,
            num_features=self.auto_dimension if adaptive else self.rff_dimension,
            check_features=self.check_features,
            statistic=self.statistic,
            sample_rows=self.sample_rows,
        )
        # The exact kernel reads the rows once for each block of them, from that block on.
        passes = (-(-total // 1024) + 1) / 2 if self.estimator == "exact" else 1
        steps = round(total * passes)
        shown = steps * train[0].shape[1] >= SHOWN_FROM
        with console.progress(steps, description="rows", enabled=shown, line_every=30.0) as advance:
            result = estimate(
                jax.random.key(self.random_seed),
                train,
                val,
                target_weights=val_weights,
                kernel=kernel,
                constraints=constraints,
                bootstrap=Bootstrap(self.bootstrap, self.confidence, self.num_blocks),
                solver=self.solver,
                chunk_size=self.chunk_size,
                devices=devices,
                on_rows=advance,
            )
        logger.debug(
            "sigma %.6g, condition number %.3g, objective %.6g, gap %.3g",
            *(result.bandwidth, result.condition, result.objective, result.gap),
        )
        for warning in result.warnings:
            logger.info(warning)
        return result

    def _prior(self, sizes):
        if not self.prior_strength:
            return None
        if isinstance(self.prior, str):
            return (
                sizes / sizes.sum() if self.prior == "size" else np.full(len(sizes), 1 / len(sizes))
            )
        return np.array(self.prior)

    def _caps(self, sizes):
        caps = _one_or_each("caps", self.caps, sizes)
        if self.max_epochs is None:
            return caps
        total = self.total_rows or int(sizes.sum())
        if self.max_epochs * sizes.sum() < total:
            raise ValueError(
                f"{self.max_epochs:g} epochs of {sizes.sum()} rows do not make {total} rows: raise "
                "max_epochs or lower total_rows"
            )
        by_repetition = np.minimum(1.0, self.max_epochs * sizes / total)
        return by_repetition if caps is None else np.minimum(caps, by_repetition)


@dataclass(frozen=True)
class MMDDataMixerRBF(MMDDataMixer):
    """The same with the exact Gaussian kernel: time quadratic in the rows, for small files or as a
    check; `rff_dimension` and `chunk_size` have no effect."""

    estimator: Estimator = "exact"


def open_files(
    train_paths: Sequence[str | Path], val_paths: Sequence[str | Path]
) -> tuple[list[RowFile], list[RowFile]]:
    """Opens all files, reading headers only. Raises as `MMDDataMixer.mix` does."""
    for name, paths in (("training", train_paths), ("validation", val_paths)):
        if isinstance(paths, str | Path) or not len(paths):
            raise ValueError(f"a list of {name} paths is needed, got {paths!r}")
    train, val = ([open_rows(path) for path in paths] for paths in (train_paths, val_paths))
    check_distinct(train)
    check_distinct(val)
    for file in train + val:
        logger.debug("%s: %d rows of %d, %s", file.name, *file.shape, file.dtype)
    check_same_width(train + val)
    return train, val


def _one_or_each(name, values, sizes):
    """None for none, a number for all, or one for each file."""
    if len(values) not in (0, 1, len(sizes)):
        raise ValueError(f"{name}: one number or {len(sizes)} are needed, got {len(values)}")
    return None if not values else values[0] if len(values) == 1 else np.array(values)


@dataclass(frozen=True, kw_only=True)
class Arguments(DeviceOptions, MMDDataMixer):
    """Mixing weights of training files for validation files, by MMD."""

    train_paths: tuple[Path, ...]
    """Files of rows, one per source; PATH:KEY for one of several matrices in a file."""
    val_paths: tuple[Path, ...]
    """Files of the target; several are pooled. A training file may be one of them."""
    val_weights: tuple[float, ...] = ()
    """How much each validation file counts; none: by its rows."""
    each: bool = False
    """One solution for each validation file, in outputs of its name: OUTPUT-NAME.json."""
    exact: bool = False
    """The same as --estimator exact."""
    output_file: Path | None = None
    """JSON of everything."""
    report: Path | None = None
    """A page (.html) or only its figure (.png, .pdf, .svg)."""
    experiment_name: str = "mmd_data_mixing"


def main(arguments: Arguments, mesh: Mesh | None = None) -> list[MixingResult]:
    """Prints the weights, writes what is asked for; one result, or with `each` one per validation
    file."""
    suffixes = (".html", ".png", ".pdf", ".svg")
    if arguments.report is not None and arguments.report.suffix not in suffixes:
        raise ValueError(f"{arguments.report}: the report must be one of {', '.join(suffixes)}")
    if arguments.each and arguments.val_weights:
        raise ValueError("--val_weights weighs validation files in one solution: not with --each")
    options = {field.name: getattr(arguments, field.name) for field in fields(MMDDataMixer)}
    if arguments.exact:
        if arguments.estimator not in ("rff", "exact"):
            raise ValueError(f"--exact and --estimator {arguments.estimator}: give one of them")
        options["estimator"] = "exact"
    mixer = MMDDataMixer(**options)
    devices = None if mesh is None else mesh.local_devices
    parts = [(arguments.val_paths, "")]
    if arguments.each:
        _, val = open_files(arguments.train_paths, arguments.val_paths)
        names = reports.labels([file.name for file in val])
        parts = [
            ((path,), "-" + name.replace("/", "-"))
            for path, name in zip(arguments.val_paths, names)
        ]
    results = []
    for val_paths, suffix in parts:
        result = mixer.mix(
            arguments.train_paths,
            val_paths,
            val_weights=arguments.val_weights or None,
            devices=devices,
        )
        document = reports.document(
            result,
            open_files(arguments.train_paths, val_paths),
            experiment_name=arguments.experiment_name + suffix,
            options=options | {"random_seed": mixer.random_seed},
        )
        print(reports.text(document))
        if arguments.output_file is not None:
            path = _with_suffix(arguments.output_file, suffix)
            write_json(path, document)
            print(f"numbers: {path}")
        if arguments.report is not None:
            path = _with_suffix(arguments.report, suffix)
            reports.write(document, path)
            print(f"report: {path}")
        results.append(result)
    return results


def _with_suffix(path: Path, suffix: str) -> Path:
    return path.with_name(path.stem + suffix + path.suffix)


if __name__ == "__main__":
    run_command(
        main,
        lambda: tyro.cli(Arguments, use_underscores=True),
        lower="--chunk_size or --rff_dimension",
    )
