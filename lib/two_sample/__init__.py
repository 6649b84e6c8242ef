"""Do samples differ, and where? Are pairs dependent? Exact permutation tests, several kernels.

`two_sample_test` takes MMD and DrMMD under Gaussian and Laplace kernels of several bandwidths and
corrects for their number: its level is exact at any sample size. `witness` says where two samples
differ, `mmd_squared_interval` by how much. `k_sample_test` compares more than two samples,
`independence_test` the halves of pairs.
"""

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
