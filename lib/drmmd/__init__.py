"""(De)-regularized MMD: witnesses, targets, statistics of particles, penalties."""

from lib.drmmd._witnesses import (
    Filtered,
    SpectralFilter,
    Statistics,
    Target,
    Witness,
    adaptive_lambda,
    as_target,
    check_lambda,
    cutoff,
    density_ratio,
    drmmd_witness,
    mmd_witness,
    particle_statistics,
    prepare_target,
    showalter,
    tikhonov,
    witness_function,
)
from lib.drmmd.kale import kale_witness
