"""Differentiable siamese augmentation; CutMix beside it."""

from lib.augment._siamese import (
    OPERATIONS,
    Augmentation,
    Dialect,
    Images,
    Number,
    Parameters,
    apply,
    augment,
    draw,
    parse,
)
