"""Flow matching (Lipman et al., 2023): training a velocity, sampling along it, a U-Net.

`fit` trains a network v(x, t) on pairs of source and data, coupled in one of several ways;
`sampling` follows it from the source to the data; `semidiscrete` couples with all of the data.
"""

from lib.flow_matching.training import (
    Coupling,
    Draws,
    FitResult,
    Source,
    TrainState,
    Velocity,
    draw_step,
    fit,
    init,
    interpolate,
    loss,
    optimal_permutation,
    train_step,
    velocity,
)
