"""(De)-regularized MMD (Chen et al., 2025): values, witnesses and velocities of particles.

A target's samples are prepared once (`prepare_target`), which costs an eigendecomposition, for
every lambda. Statistics of the particles (`particle_statistics`) then give the witness, its value
and, by a vector-Jacobian product, the velocity. KALE and the plain MMD go the same way. `features`
does it for 100,000 points.
"""

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
