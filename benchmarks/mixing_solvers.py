"""Times the quadratic program of mixing weights: ours beside OSQP, Clarabel, quadprog and piqp.

    python benchmarks/mixing_solvers.py [--sizes 3 10 50 200 1000] [--kinds mixture] [--out FILE]

The problem is that of `lib.simplex_qp` with ridge 1e-5, from embeddings made by `make_domains`: N
domains of 400 Gaussian rows in 512 dimensions whose means have cosines of about .975, D = 100
random Fourier features at the median bandwidth. The target is a mixture of the domains, or
(`shifted`) lies off their hull, where few of them are active, or (`domain`) is one of them.

What is compared, one solve of one problem that is there as arrays in each solver's own format:
- ours: `solve`, with its certificate; and apart from it what comes before (`ours: set-up`, the
  centred Gram matrix, its spectrum and the checks) and the part that is `ours: projected gradient`,
  where there is one;
- OSQP, Clarabel, quadprog and piqp on the same centred matrix, divided by its largest diagonal
  entry because their tolerances are absolute, their own set-up included, at tolerances that bring
  the gap as low as they go;
- published: cvxpy with OSQP's defaults on A and b, not centred.
Each is cleaned to weights that are not negative and sum to 1 and gets the same Frank-Wolfe gap,
outside the clock, relative to max_i H_ii and to the objective itself.

Bootstrap: 200 replicates of the rows at N = 50, `solve_batch` beside a loop over each solver.

How: one process, a round of each in turn, so that drift is shared. The first call is apart: it is
where ours compiles. A call shorter than ROUND_SECONDS is repeated within its round; one that takes
long has fewer rounds. Wall seconds are the median over rounds. What is not installed is left out,
and said: `pip install cvxpy quadprog piqp` for all. The machine's load before is kept.
"""

import dataclasses
import importlib
import math
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import scipy.sparse
import tyro

from lib.runs import environment, write_json
from lib.simplex_qp import (
    FIRST_PHASE,
    Problem,
    frank_wolfe_gap,
    from_means,
    make_problem,
    objective,
    projected_gradient,
    solve,
    solve_batch,
)

Kind = Literal["mixture", "shifted", "domain"]

RIDGE = 1e-5
ROUND_SECONDS, CONTENDER_SECONDS, SOLVER_SECONDS = 0.05, 20.0, 60.0
SOLVERS = ("quadprog", "piqp", "osqp", "clarabel")


@dataclasses.dataclass(frozen=True)
class Options:
    """Ours against other solvers of quadratic programs."""

    sizes: tuple[int, ...] = (3, 10, 50, 200, 1000)
    """Numbers of domains N."""
    kinds: tuple[Kind, ...] = ("mixture", "shifted")
    """What the target is."""
    repeats: int = 7
    """Rounds of timing."""
    replicates: int = 200
    """Bootstrap replicates at N = 50; 0: none."""
    published: bool = True
    """Time the published way too, cvxpy with OSQP's defaults."""
    seed: int = 0
    out: Path = Path("results/benchmarks/mixing_solvers.json")


# Problems


class Domains(NamedTuple):
    """Mean embeddings [N, D], the target's [D], and the mixture it was drawn from [N] or None."""

    means: np.ndarray
    target_mean: np.ndarray
    weights: np.ndarray | None


def feature_sampler(
    seed: int, num_domains: int, *, dimension: int = 512, features: int = 100, spread: float = 0.23
) -> Callable[[np.ndarray, np.random.Generator], np.ndarray]:
    """`sample(domains [n], rng) -> [n, D]`: features sqrt(2/D) cos(W x / sigma + b) of one row x
    from each of the domains N(m_i, I), m_i ~ N(0, spread^2 I), at the median distance sigma.

    W x is drawn instead of x, N(W m_i, W W'): the same law at a fraction of the cost.
    """
    rng = np.random.default_rng(seed)
    frequencies = rng.normal(size=(features, dimension))
    phases = rng.uniform(0, 2 * math.pi, features)
    sigma = math.sqrt(2 * dimension * (1 + spread**2))
    centres = spread * rng.normal(size=(num_domains, dimension)) @ frequencies.T
    root = np.linalg.cholesky(frequencies @ frequencies.T)

    def sample(domains, rng):
        projected = centres[domains] + rng.normal(size=(len(domains), features)) @ root.T
        return math.sqrt(2 / features) * np.cos(projected / sigma + phases)

    return sample


def make_domains(
    seed: int,
    num_domains: int,
    *,
    kind: Kind = "mixture",
    rows: int = 400,
    target_rows: int = 2000,
    shift: float = 0.02,
) -> Domains:
    """Embeddings of the module's domains, `rows` rows each, and of a target of `target_rows`.

    A mixture has weights from Dirichlet(1/2). A shifted one is moved by N(0, shift^2) in each
    feature, about as far as a domain is from the hull of the others.
    """
    sample, rng = feature_sampler(seed, num_domains), np.random.default_rng([seed, 1])
    means = np.stack([sample(np.full(rows, i), rng).mean(axis=0) for i in range(num_domains)])
    if kind == "domain":
        return Domains(means, means[0], None)
    weights = rng.dirichlet(np.full(num_domains, 0.5))
    target = sample(rng.choice(num_domains, target_rows, p=weights), rng).mean(axis=0)
    if kind == "shifted":
        return Domains(means, target + shift * rng.normal(size=target.shape), None)
    return Domains(means, target, weights)


def bootstrap_means(
    seed: int, num_domains: int, replicates: int, *, rows: int = 400
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Means [N, D] and the target's [D] of `replicates` resamplings of the rows of each."""
    sample, rng = feature_sampler(seed, num_domains), np.random.default_rng([seed, 1])
    features = [sample(np.full(rows, i), rng) for i in range(num_domains)]
    weights = rng.dirichlet(np.full(num_domains, 0.5))
    features.append(sample(rng.choice(num_domains, 2000, p=weights), rng))

    def resampled(table):
        counts = rng.multinomial(len(table), np.full(len(table), 1 / len(table)), replicates)
        return counts @ table / len(table)

    means = np.stack([resampled(table) for table in features], axis=1)
    return [(one[:-1], one[-1]) for one in means]


# Solvers: each makes its arrays of a problem and returns the call to time, which yields weights


def quadprog_call(problem: Problem) -> Callable[[], np.ndarray]:
    import quadprog

    n, double = problem.size, 2 * problem.hessian / problem.scale
    constraints = np.concatenate([np.ones((n, 1)), np.eye(n)], axis=1)
    right, zeros = np.append(1.0, np.zeros(n)), np.zeros(n)
    return lambda: quadprog.solve_qp(double, zeros, constraints, right, 1)[0]


def piqp_call(problem: Problem) -> Callable[[], np.ndarray]:
    import piqp

    n, double = problem.size, 2 * problem.hessian / problem.scale
    zeros, ones, infinite = np.zeros(n), np.ones((1, n)), np.full(n, np.inf)

    def call():
        solver = piqp.DenseSolver()
        solver.settings.verbose = False
        solver.settings.eps_abs = solver.settings.eps_duality_gap_abs = 1e-12
        solver.settings.eps_rel = solver.settings.eps_duality_gap_rel = 0
        solver.setup(double, zeros, ones, np.ones(1), None, None, None, zeros, infinite)
        solver.solve()
        return np.array(solver.result.x)

    return call


def osqp_call(problem: Problem) -> Callable[[], np.ndarray]:
    import osqp

    n = problem.size
    upper_half = scipy.sparse.csc_matrix(np.triu(2 * problem.hessian / problem.scale))
    constraints = scipy.sparse.csc_matrix(np.vstack([np.ones(n), np.eye(n)]))
    low, high = np.append(1.0, np.zeros(n)), np.append(1.0, np.full(n, np.inf))

    def call():
        solver = osqp.OSQP()
        solver.setup(
            upper_half,
            np.zeros(n),
            constraints,
            low,
            high,
            verbose=False,
            eps_abs=1e-9,
            eps_rel=1e-9,
            max_iter=100_000,
            polishing=True,
            time_limit=SOLVER_SECONDS,
        )
        return solver.solve().x

    return call


def clarabel_call(problem: Problem) -> Callable[[], np.ndarray]:
    import clarabel

    n = problem.size
    upper_half = scipy.sparse.csc_matrix(np.triu(2 * problem.hessian / problem.scale))
    constraints = scipy.sparse.csc_matrix(np.vstack([np.ones(n), -np.eye(n)]))
    right = np.append(1.0, np.zeros(n))
    cones = [clarabel.ZeroConeT(1), clarabel.NonnegativeConeT(n)]
    settings = clarabel.DefaultSettings()
    settings.verbose = False
    settings.time_limit = SOLVER_SECONDS
    settings.tol_gap_abs = settings.tol_gap_rel = settings.tol_feas = 1e-12

    def call():
        solver = clarabel.DefaultSolver(
            upper_half, np.zeros(n), constraints, right, cones, settings
        )
        return np.array(solver.solve().x)

    return call


def published_call(domains: Domains) -> Callable[[], np.ndarray]:
    import cvxpy

    n = len(domains.means)
    gram = domains.means @ domains.means.T + RIDGE * np.eye(n)
    cross = domains.means @ domains.target_mean

    def call():
        w = cvxpy.Variable(n)
        value = cvxpy.quad_form(w, gram) - 2 * cross @ w
        cvxpy.Problem(cvxpy.Minimize(value), [cvxpy.sum(w) == 1, w >= 0]).solve(solver=cvxpy.OSQP)
        return w.value

    return call


CALLS = {
    "quadprog": quadprog_call,
    "piqp": piqp_call,
    "osqp": osqp_call,
    "clarabel": clarabel_call,
}


def clean(weights: np.ndarray) -> np.ndarray:
    weights = np.maximum(weights, 0)
    return weights / weights.sum()


def cleaned(call: Callable[[], np.ndarray]) -> np.ndarray:
    return clean(call())


# Measuring


class Contender(NamedTuple):
    """`call()` does the work; `weights` of its result are judged, None where there are none."""

    name: str
    call: Callable[[], Any]
    weights: Callable[[Any], np.ndarray] | None = None


def seconds(call: Callable[[], Any], count: int = 1) -> float:
    started = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - started) / count


def measure(contenders: Sequence[Contender], repeats: int) -> dict[str, dict[str, Any]]:
    """Seconds of the first call, and of the others by rounds in which each runs in turn."""
    found, counts, rounds = {}, {}, {}
    for name, call, _ in contenders:
        first, again = seconds(call), None
        if first < CONTENDER_SECONDS:
            again = seconds(call)
        found[name] = {"first_call": first, "wall_rounds": []}
        counts[name] = math.ceil(ROUND_SECONDS / again) if again else 1
        rounds[name] = math.ceil(CONTENDER_SECONDS / again) if again else 0
    for number in range(repeats):
        for name, call, _ in contenders:
            if number < rounds[name]:
                found[name]["wall_rounds"].append(seconds(call, counts[name]))
    for one in found.values():
        times = one["wall_rounds"] or [one["first_call"]]
        one |= {"wall": float(np.median(times)), "wall_min": min(times), "rounds": len(times)}
    return found


def missing(names: Sequence[str]) -> list[str]:
    return [name for name in names if importlib.util.find_spec(name) is None]


def available(published: bool) -> tuple[list[str], list[str]]:
    """The solvers that are installed, and those asked for that are not."""
    absent = missing(SOLVERS)
    present = [name for name in SOLVERS if name not in absent]
    if published:
        lacking = missing(("cvxpy", "osqp"))
        (absent if lacking else present).append("published")
    return present, absent


def contenders_for(domains: Domains, problem: Problem, solvers: Sequence[str]) -> list[Contender]:
    def set_up():
        return make_problem(from_means(domains.means, domains.target_mean), ridge=RIDGE)

    contenders = [
        Contender("ours", partial(solve, problem), lambda solution: solution.weights),
        Contender("ours: set-up", set_up),
    ]
    if problem.size >= FIRST_PHASE:
        gradient = partial(projected_gradient, [problem])
        contenders.append(Contender("ours: projected gradient", gradient, lambda w: clean(w[0])))
    for name in solvers:
        call = published_call(domains) if name == "published" else CALLS[name](problem)
        contenders.append(Contender(name, partial(cleaned, call), lambda weights: weights))
    return contenders


def judge(problem: Problem, weights: np.ndarray) -> dict[str, float]:
    """Certificate and objective of weights, as they are and relative."""
    if not np.isfinite(weights).all():
        return {"gap": math.nan, "objective": math.nan, "gap_to_scale": math.nan}
    gap, value = frank_wolfe_gap(problem, weights), objective(problem, weights)
    return {
        "gap": gap,
        "objective": value,
        "gap_to_scale": gap / problem.scale,
        "gap_to_objective": gap / value,
    }


def benchmark(
    size: int, kind: Kind, solvers: Sequence[str], options: Options, say: Callable[[str], None]
) -> dict[str, Any]:
    say(f"N = {size}, {kind}: domains")
    domains = make_domains(options.seed, size, kind=kind)
    problem = make_problem(from_means(domains.means, domains.target_mean), ridge=RIDGE)
    load = os.getloadavg()[0]
    contenders = contenders_for(domains, problem, solvers)
    say(f"N = {size}, {kind}: timing")
    found = measure(contenders, options.repeats)
    for name, call, weights in contenders:
        if weights is not None:
            found[name] |= judge(problem, weights(call()))
    solution = solve(problem)
    others = {name: found[name]["wall"] for name in solvers if name in CALLS}
    fastest = min(others, key=others.get, default=None)
    return {
        "size": size,
        "kind": kind,
        "condition": problem.condition,
        "support": int((solution.weights > 0).sum()),
        "rounds": solution.rounds,
        "load_average_before": load,
        "contenders": found,
        "fastest_other": fastest,
        "ours_to_fastest": found["ours"]["wall"] / others[fastest] if fastest else None,
    }


def bootstrap(solvers: Sequence[str], options: Options, say: Callable[[str], None]) -> dict:
    say(f"bootstrap: {options.replicates} replicates at N = 50")
    means = bootstrap_means(options.seed, 50, options.replicates)
    problems = [make_problem(from_means(*one), ridge=RIDGE) for one in means]
    contenders = [
        Contender("ours: solve_batch", partial(solve_batch, problems)),
        Contender("ours: projected gradient", partial(projected_gradient, problems)),
        Contender("ours: loop of solve", lambda: [solve(problem) for problem in problems]),
    ]
    for name in solvers:
        if name in CALLS:
            calls = [CALLS[name](problem) for problem in problems]
            contenders.append(
                Contender(name, lambda calls=calls: [cleaned(call) for call in calls])
            )
    found = measure(contenders, options.repeats)
    solutions = solve_batch(problems)
    gaps = [solution.gap / problem.scale for problem, solution in zip(problems, solutions)]
    return {
        "size": 50,
        "replicates": options.replicates,
        "largest_gap_to_scale": max(gaps),
        "contenders": found,
    }


# Tables


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths))
        )
        for line in lines
    )


def milliseconds(value: float) -> str:
    return f"{1e3 * value:.3g}" if value < 10 else f"{1e3 * value:.0f}"


def report(results: Sequence[dict], resampled: dict | None) -> str:
    rows = []
    for result in results:
        label = f"{result['size']}, {result['kind']}"
        for name, one in result["contenders"].items():
            gaps = [
                f"{one[key]:.0e}" if key in one else "-"
                for key in ("gap_to_scale", "gap_to_objective")
            ]
            times = map(milliseconds, (one["wall"], one["wall_min"], one["first_call"]))
            rows.append([f"{label}: {name}", *times, *gaps])
    header = ["", "ms", "min", "first call", "gap / scale", "gap / objective"]
    sections = [table(header, rows)]
    lines = [
        f"N = {result['size']}, {result['kind']}: condition {result['condition']:.0e}, "
        f"{result['support']} active, ours takes {result['ours_to_fastest']:.2f} times as "
        f"long as {result['fastest_other']}, the fastest of the others"
        for result in results
        if result["fastest_other"]
    ]
    sections.append("\n".join(lines))
    if resampled:
        rows = [
            [name, *map(milliseconds, (one["wall"], one["wall_min"], one["first_call"]))]
            for name, one in resampled["contenders"].items()
        ]
        sections.append(
            f"Bootstrap, {resampled['replicates']} at N = 50, largest gap "
            f"{resampled['largest_gap_to_scale']:.0e} of the scale\n"
            + table(["", "ms", "min", "first call"], rows)
        )
    return "\n\n".join(section for section in sections if section)


def main(options: Options) -> None:
    started = time.monotonic()

    def say(what: str) -> None:
        print(f"[{time.monotonic() - started:6.1f} s] {what}", flush=True)

    options.out.parent.mkdir(parents=True, exist_ok=True)
    solvers, absent = available(options.published)
    for name in absent:
        say(f"{name} is not installed: left out")
    content = {"environment": environment(), "options": options, "left_out": absent}
    results = []
    for size in options.sizes:
        for kind in options.kinds:
            results.append(benchmark(size, kind, solvers, options, say))
            # After every problem, so that an interrupted run leaves what it has measured.
            write_json(options.out, content | {"results": results, "bootstrap": None})
    resampled = bootstrap(solvers, options, say) if options.replicates else None
    write_json(options.out, content | {"results": results, "bootstrap": resampled})
    print("\n" + report(results, resampled))
    print(f"\nwritten to {options.out}")


if __name__ == "__main__":
    main(tyro.cli(Options))
