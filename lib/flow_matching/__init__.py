"""Flow matching: training a velocity, sampling along it, a U-Net."""

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
