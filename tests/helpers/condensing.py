"""The least condensation that the tests of it run: digits under a narrow network."""

from xp_dataset_distillation.config import CondenseConfig

SMALL = CondenseConfig(
    dataset="digits",
    images_per_class=2,
    factor=1,
    start="real",
    num_steps=4,
    real_batch=5,
    step_size=0.1,
    augmentation="",
    width=4,
    depth=1,
    num_snapshots=2,
)
