"""Rows of features, in memory or in files, and sums over them."""

from lib.rows._rows import (
    ArrayRows,
    Rows,
    as_rows,
    check_bandwidths,
    check_floating,
    check_same_width,
    fill_up,
    joined,
    one_behind,
    read_ahead,
)

__all__ = [
    "ArrayRows",
    "Rows",
    "as_rows",
    "check_bandwidths",
    "check_floating",
    "check_same_width",
    "fill_up",
    "joined",
    "one_behind",
    "read_ahead",
]
