"""Differentiable siamese augmentation (Zhao and Bilen, 2021); CutMix, mixup, elastic beside it.

`parse` reads a published strategy such as "color_crop_cutout_flip_scale_rotate", `augment` changes
images by it: the same change for all of them (siamese), or one for each.
"""

from lib.augment._siamese import (
    OPERATIONS,
    Augmentation,
    Parameters,
    apply,
    augment,
    draw,
    parse,
)
