"""scikit-learn's `GaussianMixture`, fitted and evaluated by `lib.gmm`: for pipelines and searches.

    from lib.gmm.estimator import GaussianMixture

    make_pipeline(PCA(50), GaussianMixture(10, random_state=0)).fit(X).score_samples(Y)

Parameters, attributes and methods are scikit-learn's (a subclass), in float64. It is apart from the
rest of `lib.gmm` since importing scikit-learn takes a second.
"""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import sklearn.mixture
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state
from sklearn.utils.validation import validate_data

from lib.gmm import component_log_prob, diagonal, from_sklearn, full, spherical, tied, to_sklearn
from lib.gmm._mixture import Mixture
from lib.gmm.em import fit
from lib.gmm.starts import Structure, kmeans_start
from lib.rows import Rows

STRUCTURES: dict[str, Structure] = {
    "full": full,
    "tied": tied,
    "diag": diagonal,
    "spherical": spherical,
}
FITTED = (
    *("weights_", "means_", "covariances_", "precisions_", "precisions_cholesky_"),
    *("lower_bound_", "lower_bounds_", "n_iter_", "converged_"),
)
_component_log_prob = jax.jit(component_log_prob, static_argnames="block_size")


class GaussianMixture(sklearn.mixture.GaussianMixture):
    """As scikit-learn's, whose parameters and attributes it has; see `lib.gmm.em.fit`.

    Starts from k-means (`lib.gmm.starts`), the best of `n_init`, or where the last fit ended
    (`warm_start`). Raises ValueError for starts that it has not: other `init_params`, and
    `weights_init`, `means_init` and `precisions_init`; scikit-learn's class has them, and
    `lib.gmm.from_sklearn` and `em.fit` go on from there.
    """

    def fit_predict(self, X, y=None):
        """Fits the mixture and returns the likeliest component of every row [n]."""
        self._validate_params()
        X = validate_data(self, X, dtype=[np.float64, np.float32], ensure_min_samples=2)
        if len(X) < self.n_components:
            raise ValueError(
                "Expected n_samples >= n_components but got n_components = "
                f"{self.n_components}, n_samples = {len(X)}"
            )
        if self.init_params != "kmeans":
            raise ValueError(f'init_params is "kmeans" here, got {self.init_params!r}')
        given = [
            name
            for name in ("weights_init", "means_init", "precisions_init")
            if getattr(self, name) is not None
        ]
        if given:
            raise ValueError(f"{given[0]} is not taken here: start with lib.gmm.em.fit")
        rng = check_random_state(self.random_state)
        warm = self.warm_start and hasattr(self, "converged_")
        data, best = Rows(X, dtype=X.dtype), None
        for _ in range(1 if warm else self.n_init):
            start = from_sklearn(self) if warm else self._start(rng, data)
            model = self._fitted(data, start)
            if best is None or model.lower_bound_ > best.lower_bound_:
                best = model
        for name in FITTED:
            setattr(self, name, getattr(best, name))
        if self.max_iter and not self.converged_:
            warnings.warn(
                f"EM has not converged in {self.max_iter} iterations: raise max_iter or tol",
                ConvergenceWarning,
                stacklevel=2,
            )
        return self._estimate_weighted_log_prob(X).argmax(axis=1)

    def _start(self, rng, data: Rows) -> Mixture:
        key = jax.random.key(int(rng.randint(2**31 - 1)))
        structure = STRUCTURES[self.covariance_type]
        return kmeans_start(key, data, self.n_components, structure, regularization=self.reg_covar)

    def _fitted(self, data: Rows, start: Mixture) -> Any:
        """scikit-learn's model of a fit."""
        if not self.max_iter:
            return to_sklearn(start)
        result = fit(
            data,
            start,
            regularization=self.reg_covar,
            tolerance=self.tol,
            max_iterations=self.max_iter,
            show_progress=bool(self.verbose),
        )
        model = to_sklearn(result.mixture)
        model.lower_bounds_ = result.log_likelihoods.tolist()
        model.lower_bound_, model.n_iter_ = model.lower_bounds_[-1], len(model.lower_bounds_)
        model.converged_ = result.converged
        return model

    def _estimate_weighted_log_prob(self, X, xp=None):
        """What predictions and scores are made of: [n, K], in float64."""
        with jax.enable_x64(True):
            mixture, points = from_sklearn(self), jnp.asarray(X, jnp.float64)
            return np.asarray(_component_log_prob(mixture, points))
