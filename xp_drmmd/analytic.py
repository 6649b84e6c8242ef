"""What is known of the flow from N(0, 1/2) to pi = N(0, 1): the limit of small lambda.

As lambda falls, DrMMD becomes chi^2, whose flow has the velocity -2 grad r, r = dmu/dpi. So
d/dt (r pi) = div(pi grad r^2), a porous-medium equation on the line. Since pi has Poincare constant
1, KL(mu_t || pi) <= exp(-2 t) KL(mu_0 || pi) (section 4 of Chen et al., 2025). Near pi the slowest
even mode of r decays as exp(-4 t), and KL as exp(-8 t).
"""

import numpy as np
from jaxtyping import Array, Float
from scipy.special import ndtr, xlogy

START_VARIANCE = 0.5


def kl_of_quantiles(quantiles: Float[np.ndarray | Array, " n"]) -> float:
    """KL(mu || N(0, 1)) over the cells between mu's quantiles at the levels (i + 1/2) / n.

    Only of the masses, 1 / n a cell and half as much at either end, so a lower bound that is 0 at
    the quantiles of N(0, 1). Infinite where two quantiles coincide.
    """
    q = np.sort(np.asarray(quantiles, np.float64))
    # Each cell on the side where the distribution function is small: no digit is lost in the tails.
    inner = np.where(
        q[1:] < 0,
        ndtr(q[1:]) - ndtr(q[:-1]),
        ndtr(-q[:-1]) - ndtr(-q[1:]),
    )
    masses = np.concatenate([ndtr(q[:1]), inner, ndtr(-q[-1:])])
    shares = np.full(len(masses), 1 / len(q))
    shares[[0, -1]] /= 2
    with np.errstate(divide="ignore"):
        return float(np.sum(shares * np.log(shares / masses)))


def chi_squared_kl(times: Float[np.ndarray, " T"], num_cells: int = 400) -> Float[np.ndarray, " T"]:
    """KL(mu_t || N(0, 1)) along the chi^2 flow from N(0, 1/2), by finite volumes on [-7, 7].

    Mass flows between neighboring cells at the rate pi(face) (r_i^2 - r_{i+1}^2) / width, which
    keeps the total and the sign; the error is of second order in the width. Integrated implicitly.
    """
    from scipy.integrate import solve_ivp
    from scipy.sparse import diags_array

    faces = np.linspace(-7.0, 7.0, num_cells + 1)
    width = faces[1] - faces[0]
    masses = np.diff(ndtr(faces))
    conductance = np.exp(-(faces[1:-1] ** 2) / 2) / (2 * np.pi) ** 0.5 / width

    def change(_, r):
        flow = conductance * np.diff(r**2)
        return (np.append(flow, 0) - np.append(0, flow)) / masses

    def jacobian(_, r):
        right, left = np.append(conductance, 0), np.append(0, conductance)
        diagonals = [
            -(right + left) * 2 * r,
            (left * 2 * np.roll(r, 1))[1:],
            (right * 2 * np.roll(r, -1))[:-1],
        ]
        return diags_array(diagonals, offsets=[0, -1, 1]) * (1 / masses)[:, None]

    start = np.diff(ndtr(faces / START_VARIANCE**0.5)) / masses
    # SciPy's BDF subtracts rows that it has not filled yet, and does not use the difference.
    with np.errstate(invalid="ignore", over="ignore"):
        solution = solve_ivp(
            change,
            (0.0, float(times[-1])),
            start,
            method="BDF",
            t_eval=np.asarray(times, np.float64),
            jac=jacobian,
            rtol=1e-8,
            atol=1e-10,
        )
    if not solution.success or not np.all(np.isfinite(solution.y)):
        raise FloatingPointError(f"the chi^2 flow was not integrated: {solution.message}")
    ratios = np.maximum(solution.y, 0)
    return masses @ xlogy(ratios, ratios)
