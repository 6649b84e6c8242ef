"""The published import path of the sampler, for code that runs in this folder's parent.

There is no __init__.py, and nothing here is installed: a package `utils` of a user's goes first.
"""

from xp_gmm_source.torch_sampler import GMM_TORCH

__all__ = ["GMM_TORCH"]
