"""Gaussian mixtures: densities, samples, conversions; `em` fits them, `starts` starts the fit."""

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
