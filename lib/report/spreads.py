"""Means and how far values lie from them: what every "±" and every shaded band here is.

The spread is the sample standard deviation, sqrt(sum_i (x_i - mean)^2 / (n - 1)), in the units of
the values. Of one value there is none: nothing is written, and a band has no width. Values are
arrays, or nested lists of one shape.
"""

from typing import Any

import numpy as np


def spread(values: Any, axis: int | tuple[int, ...] | None = None) -> Any:
    """The sample standard deviation over all values, or along `axis`, float64; 0 of one value."""
    values = np.asarray(values, np.float64)
    mean = np.mean(values, axis=axis)
    if values.size == np.size(mean):
        return np.zeros_like(mean)
    return np.std(values, axis=axis, ddof=1)


def standard_error(values: Any, axis: int | tuple[int, ...] | None = None) -> Any:
    """That of the mean: `spread` / sqrt(n)."""
    deviation = spread(values, axis)
    return deviation / np.sqrt(np.size(values) / np.size(deviation))


def mean_and_spread(values: Any, form: str, spread_form: str | None = None) -> str:
    """Such as "57.5 ± 5.3": mean and `spread` of all values in Python's format specifications, the
    first for both where there is one. Of one value it is the value.

    Raises ValueError where there is no value.
    """
    values = np.asarray(values, np.float64)
    if not values.size:
        raise ValueError("there is no value to take the mean of")
    mean = f"{np.mean(values):{form}}"
    return mean if values.size == 1 else f"{mean} ± {spread(values):{spread_form or form}}"
