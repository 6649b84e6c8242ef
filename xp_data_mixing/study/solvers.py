"""The same mixing problems by this library's solver and by others through cvxpy."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from lib.rows.kernel_means import streamed_median_bandwidth
from lib.simplex_qp import (
    SolverError,
    from_gram,
    make_problem,
    solve,
    solve_with_cvxpy,
)
from xp_data_mixing.calibration import total_variation
from xp_data_mixing.study import problems
from xp_data_mixing.study.config import SolversConfig
from xp_data_mixing.study.recovery import exact_grams, merged

OWN = "own"


def compare_solvers(
    config: SolversConfig, seed: int, data_root: Path | None = None
) -> dict[str, Any]:
    """For sources N [P] and solvers [Q]: objective, gap (a bound on how far it is above the
    minimum, over the problem's scale), distance (largest difference of a weight from our solver's)
    and tv of the classes' weights to the truth, each [P, Q], NaN where a solver failed; condition
    [P].

    Exact V-statistic, median distance, as `mixing.estimate` has it.
    """
    splits = problems.load(config.samples, data_root)
    draw_key, median_key = jax.random.split(jax.random.key(seed))
    drawn = problems.draw(draw_key, splits, 1)
    most, num_classes = config.parts[-1], len(drawn.sources)
    bandwidth = streamed_median_bandwidth(median_key, drawn.sources)
    pieces = [piece for rows in drawn.sources for piece in np.split(rows, most)]
    sizes = [*(len(piece) for piece in pieces), len(drawn.targets[0])]
    grams = exact_grams([*pieces, drawn.targets[0]], [bandwidth])
    names = (OWN, *config.solvers)
    numbers = {
        name: np.full((len(config.parts), len(names)), np.nan)
        for name in ("objective", "gap", "distance", "tv")
    }
    conditions = []
    for p, parts in enumerate(config.parts):
        together = most // parts
        members = [range(k, k + together) for k in range(0, len(pieces), together)]
        (gram,) = merged(grams, sizes, [*members, [len(pieces)]])
        quadratic = from_gram(gram[:-1, :-1], gram[:-1, -1], gram[-1, -1])
        problem = make_problem(quadratic, ridge=config.ridge)
        conditions.append(problem.condition)
        best = solve(problem)
        for q, name in enumerate(names):
            try:
                solution = best if name == OWN else solve_with_cvxpy(problem, solver=name)
            except SolverError as error:
                print(f"  {len(members)} sources: {error}")
                continue
            classes = solution.weights.reshape(num_classes, parts).sum(axis=1)
            numbers["objective"][p, q] = solution.objective
            numbers["gap"][p, q] = solution.gap / problem.scale
            numbers["distance"][p, q] = np.abs(solution.weights - best.weights).max()
            numbers["tv"][p, q] = total_variation(classes, drawn.truth[0])
    return {
        "names": np.array(names),
        "num_sets": np.array([num_classes * parts for parts in config.parts]),
        "condition": np.array(conditions),
        **numbers,
    }
