"""What tests write to disk: the least condensed set, and the least mixture of images."""

import numpy as np

from lib import gmm
from xp_dataset_distillation.export import Condensed
from xp_gmm_source.gmm_files import ImageMixture, Projection

CONDENSED = Condensed(
    np.linspace(0, 1, 2 * 2 * 4 * 4, dtype=np.float32).reshape(2, 2, 4, 4, 1),
    ("a", "b"), 2, [0.5], [0.25], "toy", {"commit": None},
)  # fmt: skip
MIXTURE = ImageMixture(
    gmm.Mixture(np.array([0.25, 0.75]), np.eye(2, 3), gmm.Diagonal(np.ones((2, 3)))),
    Projection(np.eye(3, 4), np.zeros(4)),
    np.zeros(4), np.ones(4), (2, 2, 1), {"settings": {"seed": 1}},
)  # fmt: skip
