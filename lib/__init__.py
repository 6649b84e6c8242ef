"""Kernels, MMD, sliced-Wasserstein and flows on distributions: pure functions of arrays."""
