"""Sliced-Wasserstein distances between clouds of points, and their optimal couplings.

Points are projected onto directions, and on a line the optimal coupling comes from sorting, in
O(n log n). Clouds may differ in size and have weights. Directions are independent, orthogonal, or
whole bases. Values and gradients are exact for the directions given.
"""

from lib.sliced_wasserstein._distances import (
    Coupling,
    basis_directions,
    exact_coupling,
    orthogonal_directions,
    pairwise_cost,
    percentile_coupling,
    project,
    random_directions,
    self_pairwise_cost,
    sliced_wasserstein,
    sliced_wasserstein_power,
    sum_over_directions,
)
from lib.sliced_wasserstein._sorting import (
    put_rows,
    sort_columns,
    sort_with_permutation,
    take_rows,
)
