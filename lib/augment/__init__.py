"""Differentiable siamese augmentation; CutMix beside it."""

from lib.augment._siamese import (
    OPERATIONS,
    Augmentation,
    Parameters,
    apply,
    augment,
    draw,
    parse,
)
