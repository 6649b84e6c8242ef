"""Which label a flowed particle has.

A flow of F = MMD^2 / 2 between sets of classes carries each source class to one target class, but
which one is its own choice: labels are read off afterwards.
"""

import numpy as np
from jaxtyping import Float, Int

from xp_transfer_learning.config import Labelling


def class_costs(
    x: Float[np.ndarray, "C n d"], y: Float[np.ndarray, "D k d"]
) -> Float[np.ndarray, "C D"]:
    """W_2^2 between every class of x and every class of y, exact (POT), in float64."""
    import ot

    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    costs = np.empty((len(x), len(y)))
    for i, points in enumerate(x):
        for j, others in enumerate(y):
            squared = ot.dist(points, others)
            costs[i, j] = squared.mean() if 1 in squared.shape else ot.emd2([], [], squared)
    return costs


def match_classes(costs: Float[np.ndarray, "C D"]) -> Int[np.ndarray, "C"]:
    """The target class of every source class: the largest entry of its row of the optimal transport
    plan between classes of equal weight. One to one where C = D."""
    import ot

    num_x, num_y = costs.shape
    plan = ot.emd(np.full(num_x, 1 / num_x), np.full(num_y, 1 / num_y), costs)
    return plan.argmax(axis=1)


def nearest(
    x: Float[np.ndarray, "C n d"], y: Float[np.ndarray, "D k d"]
) -> tuple[Int[np.ndarray, "C n"], Float[np.ndarray, "C n"]]:
    """(class * k + place of every particle's nearest point of y, Euclidean distance to it)."""
    from sklearn.metrics import pairwise_distances_argmin_min

    index, distances = pairwise_distances_argmin_min(
        x.reshape(-1, x.shape[2]), y.reshape(-1, y.shape[2])
    )
    return index.reshape(x.shape[:2]), distances.reshape(x.shape[:2])


def agreement(
    labels: Int[np.ndarray, "C n"], x: Float[np.ndarray, "C n d"], y: Float[np.ndarray, "D k d"]
) -> float:
    """The share of the particles x whose label is the class of their nearest point of y.

    Where a flow has arrived, every particle lies on a target point, and this is how many labels are
    right.
    """
    index, _ = nearest(x, y)
    return float(np.mean(labels == index // y.shape[1]))


def label_particles(
    x: Float[np.ndarray, "C n d"], y: Float[np.ndarray, "D k d"], labelling: Labelling = "transport"
) -> Int[np.ndarray, "C n"]:
    """A label of y's for every particle of x.

    - transport: all of a class get the target class that optimal transport between classes, with
      the cost W_2^2, matches it with.
    - axis: class c gets label c, as if the flow kept the order of classes.
    - particles: each for itself, the class it sends most mass to in the optimal transport plan
      between all particles and all target points.
    """
    num_x, n, d = x.shape
    if labelling == "axis":
        if num_x != len(y):
            raise ValueError(f"labels by axis need as many classes in both: {num_x} and {len(y)}")
        return np.repeat(np.arange(num_x)[:, None], n, axis=1)
    if labelling == "transport":
        return np.repeat(match_classes(class_costs(x, y))[:, None], n, axis=1)
    if labelling == "particles":
        import ot

        squared = ot.dist(
            np.asarray(x, np.float64).reshape(-1, d), np.asarray(y, np.float64).reshape(-1, d)
        )
        plan = ot.emd([], [], squared, numItermax=1_000_000)
        return plan.reshape(num_x, n, len(y), -1).sum(axis=3).argmax(axis=2)
    raise ValueError(f"labelling is transport, axis or particles, not {labelling!r}")
