"""Times the quadratic program of mixing weights: ours beside OSQP, Clarabel, quadprog and piqp.

    python benchmarks/mixing.py [--sizes 3 10 50 200 1000] [--kinds mixture] [--out FILE]

The problem is that of `lib.simplex_qp` with ridge 1e-5, from embeddings made by `make_domains`: N
domains of 400 Gaussian rows in 512 dimensions whose means have cosines of about .975, D = 100
random Fourier features at the median bandwidth. The target is a mixture of the domains, or
(`shifted`) lies off their hull, where few of them are active, or (`domain`) is one of them. The
largest N comes again with D = 1000 (`--wide 0`: not).

Two times, each to weights that are not negative and sum to 1:
- solve: of one problem that is there as arrays in each solver's own format. Ours is `solve`, with
  its certificate;
- from means: the same and what comes before it, from the N means and the target's on. For ours
  checks, spectrum and condition number; for the others the centered matrix with its ridge, divided
  by its largest diagonal entry because their tolerances are absolute, and the constraints.
OSQP, Clarabel and piqp run at their defaults and (`tight`) at tolerances that bring the gap about
as low as they go; quadprog has none. `published` is cvxpy with OSQP's defaults on A and b, not
centered, from means. All weights get the same Frank-Wolfe gap, outside the clock, relative to
max_i H_ii and to the objective.

Bootstrap: 200 replicates of the rows at N = 50, `solve_batch` beside a loop over each solver.

How: one process, a round of each in turn, so that drift is shared. The first call is apart. A call
shorter than ROUND_SECONDS is repeated within its round; one that takes long has fewer rounds, or
only the second call, and where a solve takes over LONG_SECONDS its time from means, the same except
for a few milliseconds, is left out. Seconds are wall time, the median over rounds.
What is not installed is left out, and said: `pip install cvxpy quadprog piqp` for all. The
machine's load before is kept.
"""

import dataclasses
import importlib.util
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

from lib.runs import environment
from lib.runs.commands import run_command
from lib.runs.files import write_json
from lib.simplex_qp import (
    Problem,
    Solution,
    frank_wolfe_gap,
    from_means,
    make_problem,
    nearest_weights,
    objective,
    solve,
    solve_batch,
)

Kind = Literal["mixture", "shifted", "domain"]
Call = Callable[[], Any]

RIDGE = 1e-5
# Of a round of repeated calls, of all rounds of one contender, and the limit of one solve.
ROUND_SECONDS, CONTENDER_SECONDS, SOLVER_SECONDS = 0.01, 2.0, 20.0
LONG_SECONDS = 1.0


@dataclasses.dataclass(frozen=True)
class Options:
    """Ours against other solvers of quadratic programs."""

    sizes: tuple[int, ...] = (3, 10, 50, 200, 1000)
    """Numbers of domains N."""
    kinds: tuple[Kind, ...] = ("mixture", "shifted")
    """What the target is."""
    wide: int = 1000
    """Features D with which the largest N comes again; 0: it does not."""
    repeats: int = 15
    """Rounds of timing."""
    replicates: int = 200
    """Bootstrap replicates at N = 50; 0: none."""
    published: bool = True
    """Time the published way too, cvxpy with OSQP's defaults."""
    seed: int = 0
    out: Path = Path("results/benchmarks/mixing.json")


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

    With D < d, W x is drawn instead of x, N(W m_i, W W'): the same law at a fraction of the cost.
    """
    rng = np.random.default_rng(seed)
    frequencies = rng.normal(size=(features, dimension))
    phases = rng.uniform(0, 2 * math.pi, features)
    sigma = math.sqrt(2 * dimension * (1 + spread**2))
    centers = spread * rng.normal(size=(num_domains, dimension)) @ frequencies.T
    narrow = features < dimension
    root = np.linalg.cholesky(frequencies @ frequencies.T) if narrow else frequencies
    root = (root.T / sigma).astype("f")

    def sample(domains, rng):
        angles = rng.standard_normal((len(domains), len(root)), dtype="f") @ root
        angles += (centers / sigma + phases).astype("f")[domains]
        return math.sqrt(2 / features) * np.cos(angles)

    return sample


def make_domains(
    seed: int,
    num_domains: int,
    *,
    kind: Kind = "mixture",
    rows: int = 400,
    target_rows: int = 2000,
    features: int = 100,
    shift: float = 0.02,
) -> Domains:
    """Embeddings of the module's domains, `rows` rows each, and of a target of `target_rows`.

    A mixture has weights from Dirichlet(1/2). A shifted one is moved by N(0, shift^2) in each
    feature, about as far as a domain is from the hull of the others.
    """
    sample = feature_sampler(seed, num_domains, features=features)
    rng = np.random.default_rng([seed, 1])

    def mean(rows):
        return sample(rows, rng).mean(axis=0, dtype=np.float64)

    means = np.stack([mean(np.full(rows, i)) for i in range(num_domains)])
    if kind == "domain":
        return Domains(means, means[0], None)
    weights = rng.dirichlet(np.full(num_domains, 0.5))
    target = mean(rng.choice(num_domains, target_rows, p=weights))
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


# Solvers: each takes the matrix H of w'Hw, in units of its scale, and whether to be tight, makes
# its arrays and returns the call to time


def centered(domains: Domains) -> np.ndarray:
    difference = domains.means - domains.target_mean
    hessian = difference @ difference.T
    hessian.flat[:: len(hessian) + 1] += RIDGE
    return hessian / hessian.diagonal().max()


def quadprog_call(hessian: np.ndarray, tight: bool) -> Call:
    import quadprog

    n, double = len(hessian), 2 * hessian
    constraints = np.concatenate([np.ones((n, 1)), np.eye(n)], axis=1)
    right, zeros = np.append(1.0, np.zeros(n)), np.zeros(n)
    return lambda: quadprog.solve_qp(double, zeros, constraints, right, 1)[0]


def piqp_call(hessian: np.ndarray, tight: bool) -> Call:
    import piqp

    n, double = len(hessian), 2 * hessian
    zeros, ones, infinite = np.zeros(n), np.ones((1, n)), np.full(n, np.inf)

    def call():
        solver = piqp.DenseSolver()
        if tight:
            solver.settings.eps_abs = solver.settings.eps_duality_gap_abs = 1e-12
            solver.settings.eps_rel = solver.settings.eps_duality_gap_rel = 0
        solver.setup(double, zeros, ones, np.ones(1), None, None, None, zeros, infinite)
        solver.solve()
        return np.array(solver.result.x)

    return call


def osqp_call(hessian: np.ndarray, tight: bool) -> Call:
    import osqp

    n = len(hessian)
    upper_half = scipy.sparse.csc_matrix(np.triu(2 * hessian))
    constraints = scipy.sparse.csc_matrix(np.vstack([np.ones(n), np.eye(n)]))
    low, high = np.append(1.0, np.zeros(n)), np.append(1.0, np.full(n, np.inf))
    settings = {"verbose": False, "time_limit": SOLVER_SECONDS}
    if tight:
        settings |= {"eps_abs": 1e-9, "eps_rel": 1e-9, "max_iter": 100_000, "polishing": True}

    def call():
        solver = osqp.OSQP()
        solver.setup(upper_half, np.zeros(n), constraints, low, high, **settings)
        return solver.solve().x

    return call


def clarabel_call(hessian: np.ndarray, tight: bool) -> Call:
    import clarabel

    n = len(hessian)
    upper_half = scipy.sparse.csc_matrix(np.triu(2 * hessian))
    constraints = scipy.sparse.csc_matrix(np.vstack([np.ones(n), -np.eye(n)]))
    right = np.append(1.0, np.zeros(n))
    cones = [clarabel.ZeroConeT(1), clarabel.NonnegativeConeT(n)]
    settings = clarabel.DefaultSettings()
    settings.verbose = False
    settings.time_limit = SOLVER_SECONDS
    if tight:
        settings.tol_gap_abs = settings.tol_gap_rel = settings.tol_feas = 1e-12

    def call():
        solver = clarabel.DefaultSolver(
            upper_half, np.zeros(n), constraints, right, cones, settings
        )
        return np.array(solver.solve().x)

    return call


def published(domains: Domains) -> np.ndarray:
    import cvxpy

    n = len(domains.means)
    gram = domains.means @ domains.means.T + RIDGE * np.eye(n)
    cross = domains.means @ domains.target_mean
    w = cvxpy.Variable(n)
    value = cvxpy.quad_form(w, gram) - 2 * cross @ w
    cvxpy.Problem(cvxpy.Minimize(value), [cvxpy.sum(w) == 1, w >= 0]).solve(solver=cvxpy.OSQP)
    return w.value


CALLS = {
    "quadprog": quadprog_call,
    "piqp": piqp_call,
    "osqp": osqp_call,
    "clarabel": clarabel_call,
}


def cleaned(call: Call) -> np.ndarray:
    weights = np.maximum(call(), 0)
    return weights / weights.sum()


def ours(domains: Domains) -> Solution:
    return solve(make_problem(from_means(domains.means, domains.target_mean), ridge=RIDGE))


def available(with_published: bool) -> tuple[list[str], list[str]]:
    """The solvers that are installed, and those asked for that are not."""
    needs = {name: (name,) for name in CALLS}
    if with_published:
        needs["published"] = ("cvxpy", "osqp")
    absent = [n for n in needs if not all(importlib.util.find_spec(name) for name in needs[n])]
    return [name for name in needs if name not in absent], absent


# Measuring


def seconds(call: Call, count: int = 1) -> float:
    started = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - started) / count


def measure(calls: dict[Any, Call], repeats: int) -> dict[Any, dict[str, Any]]:
    """Result and seconds of the first call, and seconds of the others by rounds in which each runs
    in turn. Contenders may be named (solver, "solve") and then (solver, "means").
    """
    measured, counts, rounds = {}, {}, {}
    for name, call in calls.items():
        solved = measured.get((name[0], "solve"))
        if solved and solved["second_call"] > LONG_SECONDS:
            continue
        started = time.perf_counter()
        result = call()
        first, again = time.perf_counter() - started, seconds(call)
        measured[name] = {"result": result, "first_call": first, "second_call": again}
        measured[name]["wall_rounds"] = []
        counts[name] = math.ceil(ROUND_SECONDS / again)
        rounds[name] = min(repeats, int(CONTENDER_SECONDS / again))
    for number in range(repeats):
        for name, call in calls.items():
            if number < rounds.get(name, 0):
                measured[name]["wall_rounds"].append(seconds(call, counts[name]))
    for one in measured.values():
        times = one["wall_rounds"] or [one["second_call"]]
        one |= {"wall": float(np.median(times)), "wall_min": min(times)}
    return measured


def evaluate(problem: Problem, weights: np.ndarray) -> dict[str, float]:
    """Certificate of weights, relative to the scale and to the objective."""
    if not np.isfinite(weights).all():
        return {"gap_to_scale": math.nan, "gap_to_objective": math.nan}
    weights = nearest_weights(problem, weights)
    gap = frank_wolfe_gap(problem, weights)
    return {
        "gap_to_scale": gap / problem.scale,
        "gap_to_objective": gap / objective(problem, weights),
    }


def benchmark(
    size: int, kind: Kind, features: int, solvers: Sequence[str], options: Options
) -> dict[str, Any]:
    domains = make_domains(options.seed, size, kind=kind, features=features)
    problem = make_problem(from_means(domains.means, domains.target_mean), ridge=RIDGE)
    hessian = centered(domains)
    calls = {("ours", "solve"): partial(solve, problem), ("ours", "means"): partial(ours, domains)}
    for solver in solvers:
        if solver == "published":
            if features > 100:  # half a minute
                continue
            calls[solver, "means"] = partial(cleaned, partial(published, domains))
            continue
        make = CALLS[solver]
        for tight in (False,) if solver == "quadprog" else (False, True):
            name = f"{solver}, tight" if tight else solver
            calls[name, "solve"] = partial(cleaned, make(hessian, tight))
            calls[name, "means"] = lambda make=make, tight=tight: cleaned(
                make(centered(domains), tight)
            )
    load = os.getloadavg()[0]
    measured = measure(calls, options.repeats)
    contenders = {}
    for (name, what), one in measured.items():
        result = one.pop("result")
        weights = result.weights if name == "ours" else result
        contenders.setdefault(name, evaluate(problem, weights))[what] = one
    solution = solve(problem)
    return {
        "size": size,
        "kind": kind,
        "features": features,
        "condition": problem.condition,
        "support": int((solution.weights > 0).sum()),
        "rounds": solution.iterations,
        "load_average_before": load,
        "contenders": contenders,
    }


def bootstrap(solvers: Sequence[str], options: Options) -> dict[str, Any]:
    means = bootstrap_means(options.seed, 50, options.replicates)
    problems = [make_problem(from_means(*one), ridge=RIDGE) for one in means]
    calls = {
        "ours: solve_batch": partial(solve_batch, problems),
        "ours: loop of solve": lambda: [solve(problem) for problem in problems],
    }
    for name in solvers:
        if name in CALLS:
            each = [CALLS[name](problem.hessian / problem.scale, True) for problem in problems]
            calls[name] = lambda each=each: [cleaned(call) for call in each]
    contenders = measure(calls, options.repeats)
    results = {name: one.pop("result") for name, one in contenders.items()}
    solutions = results["ours: solve_batch"]
    gaps = [one.gap / problem.scale for one, problem in zip(solutions, problems)]
    return {"largest_gap_to_scale": max(gaps), "contenders": contenders}


# Tables


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """In Markdown, its columns aligned."""
    rule = [":--", *["--:"] * (len(header) - 1)]
    widths = [max(map(len, column)) for column in zip(header, rule, *rows)]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |"
        for line in (header, rule, *rows)
    )


def milliseconds(value: float) -> str:
    return f"{1e3 * value:.3g}" if value < 1 else f"{1e3 * value:.0f}"


def section(result: dict[str, Any]) -> str:
    """The table of one problem, and ours beside the fastest of the others at any accuracy."""
    contenders, rows = result["contenders"], []
    walls = {
        what: {name: one[what]["wall"] for name, one in contenders.items() if what in one}
        for what in ("solve", "means")
    }
    for name, one in contenders.items():
        cells = [name]
        for wall in walls.values():
            known = name in wall
            cells.append(milliseconds(wall[name]) if known else "")
            cells.append(f"{wall[name] / min(wall.values()):.2f}" if known else "")
        first = one["solve" if "solve" in one else "means"]["first_call"]
        gaps = [f"{one[key]:.0e}" for key in ("gap_to_scale", "gap_to_objective")]
        rows.append([*cells, milliseconds(first), *gaps])
    title = (
        f"N = {result['size']}, D = {result['features']}, {result['kind']}: condition "
        f"{result['condition']:.0e}, {result['support']} active, {result['rounds']} systems solved"
    )
    lines = []
    for what, label in (("solve", "solve"), ("means", "from means")):
        own = walls[what].pop("ours")
        if walls[what]:
            best = min(walls[what], key=walls[what].get)
            lines.append(f"{label} {own / walls[what][best]:.2f} times {best}")
    header = ["", "solve, ms", "/ fastest", "from means, ms", "/ fastest", "first call, ms"]
    header += ["gap / scale", "gap / objective"]
    note = f"\n\nOurs beside the fastest of the others: {'; '.join(lines)}." if lines else ""
    return f"#### {title}\n\n{table(header, rows)}{note}"


def bootstrap_section(bootstrapped: dict[str, Any], replicates: int) -> str:
    rows = [
        [name, milliseconds(one["wall"]), milliseconds(one["first_call"])]
        for name, one in bootstrapped["contenders"].items()
    ]
    return (
        f"#### Bootstrap, {replicates} at N = 50: our largest gap "
        f"{bootstrapped['largest_gap_to_scale']:.0e} of the scale\n\n"
        + table(["", "ms", "first call, ms"], rows)
    )


def main(options: Options) -> None:
    started = time.monotonic()

    def say(what: str) -> None:
        print(f"[{time.monotonic() - started:6.1f} s] {what}", flush=True)

    solvers, absent = available(options.published)
    for name in absent:
        say(f"{name} is not installed: left out")
    content = {"environment": environment(), "options": options, "left_out": absent}
    cases = [(size, kind, 100) for size in options.sizes for kind in options.kinds]
    if options.wide:
        cases.append((max(options.sizes), options.kinds[0], options.wide))
    results = []
    for size, kind, features in cases:
        say(f"N = {size}, D = {features}, {kind}")
        results.append(benchmark(size, kind, features, solvers, options))
        # After every problem, so that an interrupted run leaves what it has measured.
        write_json(options.out, content | {"results": results, "bootstrap": None})
    sections = [section(result) for result in results]
    if options.replicates:
        say("bootstrap")
        bootstrapped = bootstrap(solvers, options)
        write_json(options.out, content | {"results": results, "bootstrap": bootstrapped})
        sections.append(bootstrap_section(bootstrapped, options.replicates))
    print("\n" + "\n\n".join(sections))
    say(f"written to {options.out}")


if __name__ == "__main__":
    run_command(main, lambda: tyro.cli(Options))
