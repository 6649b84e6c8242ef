"""Labelled image data sets by name, by folder, or made up.

`load("mnist")` reads a named set, `load("path/to/images.zip")` one's own. A `Dataset` holds uint8
images [N, H, W, channels] and labels; `draw` gives points [C, n, d] by class. `transforms` resize,
rotate, invert.
"""

from lib.datasets._datasets import (
    NAMES,
    Dataset,
    Split,
    as_images,
    draw,
    draw_indices,
    file_stem,
    flat,
    identity,
    load,
)
from lib.datasets._folders import SPLITS
from lib.datasets.synthetic import Centers, gaussian_mixture, gaussians, rings, rings_even
from lib.datasets.transforms import (
    Normalization,
    invert,
    normalization_constants,
    resize,
    rotate,
    to_gray,
    to_rgb,
    to_unit,
)
