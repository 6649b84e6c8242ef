"""What tests of condensation share: the least that they run, digits of a narrow network; toys."""

import numpy as np

from lib.datasets import Dataset
from xp_dataset_distillation.config import CondenseConfig

SMALL = CondenseConfig(
    "digits", images_per_class=2, factor=1, start="real", num_steps=4, real_batch=5, step_size=0.1,
    augmentation="", width=4, depth=1, num_snapshots=2,
)  # fmt: skip


def toy(counts=(7, 5, 9), *, shape=(3, 2, 1)) -> Dataset:
    """Shuffled images; the first pixel is an image's own number, the second its label."""
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat(np.arange(len(counts)), counts)).astype(np.int32)
    images = rng.integers(0, 256, (len(labels), *shape), dtype=np.uint8)
    images[:, 0, 0, 0], images[:, 0, 1, 0] = np.arange(len(labels)), labels
    return Dataset("toy", images, labels, tuple("abcdefgh"[: len(counts)]))
