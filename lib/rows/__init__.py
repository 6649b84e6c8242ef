"""Rows of features, in memory or in files, and sums over them."""

from lib.rows._rows import (
    Rows,
    Transform,
    as_rows,
    check_bandwidths,
    check_same_width,
    fill_up,
    one_behind,
    pooled,
    read_ahead,
)
