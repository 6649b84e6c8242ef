"""Rows of features, in memory or in files larger than memory, and sums over them.

`Rows` is one sample with weights, wherever it lies; `files` opens .pt, .npy, .npz and .safetensors,
`sums` adds up over chunks and devices. `fourier_means` are mean embeddings in one pass,
`kernel_means` exact means of kernels.
"""

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
