"""Do samples differ, and where? Are pairs dependent? Exact permutation tests, several kernels."""

from lib.two_sample._independence import independence_test
from lib.two_sample._permutations import (
    LMBDAS,
    MMD,
    PermutationTest,
    default_kernels,
    k_sample_test,
    permutations,
    two_sample_test,
)
from lib.two_sample._witness import Interval, mmd_squared_interval, witness
