"""Gaussian mixtures: densities, samples, conversions; `em` fits them, `starts` starts the fit.

A `Mixture` has weights, means and one of five structures of covariances: full, tied, diagonal,
spherical, low rank + diagonal. `estimator` is scikit-learn's interface to all of it.
"""

from lib.gmm._mixture import (
    Mixture,
    cast,
    component_log_prob,
    from_sklearn,
    joint_log_densities,
    log_prob,
    permuted,
    prepare,
    responsibilities,
    sample,
    sample_components,
    sample_coupled,
    to_sklearn,
    without_empty,
)
from lib.gmm.covariances import (
    Covariance,
    Diagonal,
    Full,
    LowRank,
    Spherical,
    Tied,
    diagonal,
    from_cholesky,
    from_matrices,
    full,
    latent_projections,
    low_rank,
    spherical,
    tied,
)
