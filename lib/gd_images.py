"""The engine of `lib.gd` with the defaults of long image flows: about a hundred records."""

from functools import wraps

from lib import gd


@wraps(gd.wasserstein_gradient_descent)
def wasserstein_gradient_descent(
    x0, x_tgt, target_value_and_grad, rng, n_epochs=101, *args, **options
):
    options.setdefault("record_every", max(1, n_epochs // 100))
    return gd.wasserstein_gradient_descent(
        x0, x_tgt, target_value_and_grad, rng, n_epochs, *args, **options
    )
