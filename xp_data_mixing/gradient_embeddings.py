"""Per-example gradients of any flax or plain JAX model, projected at random, as files to mix by.

    python xp_data_mixing/gradient_embeddings.py --dataset fashion_mnist --out_dir embeddings

For a model of one's own, with `loss(parameters, example)` the loss of one example:

    project = partial(project_gradients, jax.random.key(0), loss, parameters, dimension=8192)
    write_embeddings("code.npy", (project(batch) for batch in batches))

A row is P' g: g the gradient of one example's loss in all p parameters, P [p, D] with independent
entries +-1/sqrt(D). So E <P'g, P'h> = <g, h>, and E |P'g|^2 = |g|^2, with the variance

    Var <P'g, P'h> = (|g|^2 |h|^2 + <g, h>^2 - 2 sum_i g_i^2 h_i^2) / D

(Achlioptas, Database-friendly random projections, 2003). Random signs rather than normal entries:
their variance is the smaller one, normal entries lack the last term, and an entry costs one random
bit instead of 32 and an inverse error function.

P is never stored. Row j of the part that meets the i-th leaf is drawn from the key, i and j only,
whenever a block of rows is needed. So it is the same for every batch, block size and file made with
one key, one D and one shape of the gradients; only such files may be mixed.

Gradient embeddings as in LESS (Xia et al., Selecting influential data for targeted instruction
tuning, ICML 2024), which sums cosines over checkpoints weighted by their learning rates eta_i.
Rows sqrt(eta_i) P'g_i / |P'g_i| of several checkpoints, concatenated, have that sum as their inner
product.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax import lax
from jax.sharding import Mesh
from jax.tree_util import Partial
from jaxtyping import Array, Float32, Int, Key, PyTree, ScalarLike

from lib import datasets, runs
from lib.networks import MLP, classification, optimizers
from lib.numerics import check_seed
from lib.runs.commands import run_command
from lib.runs.files import write_json
from lib.runs.processes import DeviceOptions
from xp_data_mixing.embedding_files import write_embeddings

Loss = Callable[[PyTree, PyTree], ScalarLike]
Transform = Callable[[PyTree], PyTree]

# ---- Projected gradients


def project_gradients(
    key: Key[Array, ""],
    loss: Loss,
    parameters: PyTree,
    batch: PyTree,
    *,
    dimension: int,
    normalize: bool = True,
    block_size: int = 512,
    transform: Transform | None = None,
) -> Float32[Array, "B dimension"]:
    """P' transform(grad_parameters loss(parameters, example)) for every example: [B, D] float32.

    `batch` is a pytree of arrays whose first axis counts the B examples; `loss` sees one of them,
    without that axis (a flax module wants it back: `apply(parameters, image[None])[0]`). Only
    `parameters` are differentiated: what else the model needs, such as running means, belongs in
    `loss`. `transform` maps a gradient, a pytree like `parameters`, to any pytree: it may
    precondition (`adam_direction`) or pick some layers.

    With `normalize` rows have Euclidean norm 1, and a gradient of 0 stays a row of 0.

    Beside its arguments and the result this holds the B gradients, B p numbers (and what `loss` and
    `transform` need), and one block of P, `block_size` D numbers. For less, pass smaller batches.
    It compiles once for each `loss`, `transform` and shape, so pass the same function objects, or a
    `jax.tree_util.Partial` where they hold arrays. A model of hundreds of leaves compiles in half a
    minute or more; `transform=lambda g: jax.flatten_util.ravel_pytree(g)[0]` makes them one leaf
    (and another P), for twice the memory.

    Raises ValueError for a dimension or block size < 1, for a batch without examples or of unequal
    lengths, for no parameters, and, unless traced, for a gradient that is not finite, with the
    index of its example.
    """
    if dimension < 1 or block_size < 1:
        raise ValueError(f"dimension and block_size must be >= 1: {dimension}, {block_size}")
    sizes = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(batch)}
    if len(sizes) != 1 or sizes <= {(), (0,)}:
        shapes = sorted(np.shape(leaf) for leaf in jax.tree.leaves(batch))
        raise ValueError(f"the leaves of a batch are [B, ...] with one B >= 1, got shapes {shapes}")
    rows = _project_gradients(
        key,
        Partial(loss),
        Partial(transform or _unchanged),
        parameters,
        batch,
        dimension=dimension,
        normalize=normalize,
        block_size=block_size,
    )
    if not isinstance(rows, jax.core.Tracer):
        # P has no zero: what is not finite in a gradient reaches every entry of the row.
        bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
        if len(bad):
            raise ValueError(
                f"the gradient of example {bad[0]} of the batch is not finite "
                f"({len(bad)} of {len(rows)} examples)"
            )
    return rows


def _unchanged(gradient):
    return gradient


@partial(jax.jit, static_argnames=("dimension", "normalize", "block_size"))
def _project_gradients(
    key, loss, transform, parameters, batch, *, dimension, normalize, block_size
):
    gradients = jax.vmap(lambda example: transform(jax.grad(loss)(parameters, example)))(batch)
    leaves = [leaf.reshape(len(leaf), -1) for leaf in jax.tree.leaves(gradients)]
    if not sum(leaf.shape[1] for leaf in leaves):
        raise ValueError("no parameters to differentiate, or the transform leaves none")
    rows = sum(
        _signed_sums(_leaf_key(key, i), leaf, dimension, block_size)
        for i, leaf in enumerate(leaves)
        if leaf.size
    )
    return _unit_rows(rows) if normalize else rows / math.sqrt(dimension)


def _leaf_key(key, leaf):
    """The key of a leaf's signs. Threefry whatever `key` is: rbg's bits change under vmap."""
    words = jax.random.bits(jax.random.fold_in(key, leaf), (2,), jnp.uint32)
    return jax.random.wrap_key_data(words, impl="threefry2x32")


@partial(jax.jit, static_argnames="dimension")
def random_signs(
    key: Key[Array, ""], leaf: ScalarLike, rows: Int[Array, " n"], dimension: int
) -> Float32[Array, "n dimension"]:
    """The rows `rows` of sqrt(D) P that meet the leaf of index `leaf`: +-1, [n, D]."""
    return _signs(_leaf_key(key, leaf), rows, dimension)


def _signs(leaf_key, rows, dimension):
    def words_of(row):
        return jax.random.bits(jax.random.fold_in(leaf_key, row), (-(-dimension // 32),), "u4")

    words = jax.vmap(words_of)(rows)
    bits = words[:, :, None] >> jnp.arange(32, dtype=jnp.uint32).reshape(1, 1, 32) & 1
    return 2 * bits.reshape(len(rows), -1)[:, :dimension].astype(jnp.float32) - 1


def _signed_sums(leaf_key, gradients, dimension, block_size):
    """gradients [B, size] times the signs [size, D], a block of rows of the signs at a time."""
    size = gradients.shape[1]
    block = min(block_size, size)

    def add_block(b, total):
        # The last block is moved back to have full size; the rows it repeats count 0.
        start = jnp.minimum(b * block, size - block)
        rows = start + jnp.arange(block)
        signs = _signs(leaf_key, rows, dimension) * (rows >= b * block)[:, None]
        part = lax.dynamic_slice_in_dim(gradients, start, block, axis=1).astype(jnp.float32)
        return total + jnp.matmul(part, signs, precision=lax.Precision.HIGHEST)

    start = jnp.zeros((len(gradients), dimension), jnp.float32)
    return lax.fori_loop(0, -(-size // block), add_block, start)


def _unit_rows(rows):
    """Rows over their norms, 0 for 0; over their largest entry first, as squares under- and
    overflow in float32 for entries of 1e-23 and 1e20."""
    largest = jnp.max(jnp.abs(rows), axis=1, keepdims=True)
    rows = rows / jnp.where(largest == 0, 1, largest)
    return rows / jnp.maximum(jnp.linalg.norm(rows, axis=1, keepdims=True), 1)


def adam_direction(
    state: optax.ScaleByAdamState,
    *,
    b1: ScalarLike = 0.9,
    b2: ScalarLike = 0.999,
    eps: ScalarLike = 1e-8,
) -> Transform:
    """A transform: the direction in which Adam would move for this example's gradient only.

    With m, v and t the moments and count of `state`, as optax.scale_by_adam keeps them (optax.adam
    has them in the first part of its state), and g the gradient,

        m' = b1 m + (1 - b1) g,   v' = b2 v + (1 - b2) g^2,
        m-hat = m' / (1 - b1^(t + 1)),   v-hat = v' / (1 - b2^(t + 1)),
        m-hat / (sqrt(v-hat) + eps)

    (Kingma and Ba, Adam, ICLR 2015, algorithm 1). Up to the sign and the learning rate it is the
    step that training on the example would take: LESS's embedding of training examples. `state`
    comes from the checkpoint; b1, b2 and eps are those of its optimizer.

    LESS leaves validation gradients as they are. For a kernel mean embedding this matters: m moves
    every training row the same way, so with one side preconditioned the two distributions differ,
    and the MMD stays away from 0, even where the mixture is perfect. Weights that match
    distributions need the same transform on both sides.

    Raises ValueError where `state` is not an optax.ScaleByAdamState.
    """
    if not isinstance(state, optax.ScaleByAdamState):
        raise ValueError(
            "the state is an optax.ScaleByAdamState, the first part of optax.adam's, "
            f"not {type(state).__name__}"
        )
    return Partial(_adam_direction, state, b1, b2, eps)


def _adam_direction(state, b1, b2, eps, gradient):
    return optax.scale_by_adam(b1=b1, b2=b2, eps=eps).update(gradient, state)[0]


# ---- A small network's gradients, class by class

BATCH_SIZE = 100  # examples; their gradients are held at once


@dataclass(frozen=True)
class Arguments(DeviceOptions):
    out_dir: Path
    """Where the files go: train_CLASS for every class, target, and embeddings.json."""
    dataset: str = "fashion_mnist"
    """A name, or a folder or zip of images, as lib.datasets.load takes it."""
    data_root: Path | None = None
    dimension: int = 512
    num_per_class: int = 500
    """Training images embedded in the file of each class. The network trains on the others."""
    num_target: int = 1000
    """Test images embedded in the target's file."""
    mixture: tuple[float, ...] | None = None
    """The shares of the classes in the target. None: a draw from Dirichlet(1/2, ..., 1/2)."""
    hidden: int = 128
    num_epochs: int = 3
    learning_rate: float = 1e-3
    seed: int = 0
    format: Literal["npy", "pt"] = "npy"
    dtype: Literal["float16", "float32"] = "float32"


def class_counts(mixture: Iterable[float], total: int) -> np.ndarray:
    """Whole numbers [C] of sum `total` nearest to mixture * total, by largest remainders."""
    exact = np.asarray(mixture, float) * total
    counts = np.floor(exact).astype(int)
    counts[np.argsort(counts - exact, kind="stable")[: total - counts.sum()]] += 1
    return counts


def _checked_mixture(key, arguments: Arguments, class_names: tuple[str, ...]) -> np.ndarray:
    if arguments.mixture is None:
        mixture = np.asarray(jax.random.dirichlet(key, jnp.full(len(class_names), 0.5)), float)
        return mixture / mixture.sum()
    mixture = np.asarray(arguments.mixture, float)
    shares = len(mixture) == len(class_names) and np.all(mixture >= 0)
    if not shares or not np.isclose(mixture.sum(), 1, rtol=0, atol=1e-6):
        raise ValueError(
            f"the mixture has one share >= 0 for each of {len(class_names)} classes "
            f"({', '.join(class_names)}), of sum 1, got {arguments.mixture}"
        )
    return mixture / mixture.sum()


def _file_stem(label: int, class_name: str) -> str:
    word = re.sub(r"[^\w-]+", "_", class_name)
    return f"train_{label}" if word == str(label) else f"train_{label}_{word}"


def cross_entropy(network: nn.Module) -> Loss:
    """The loss of one example, an image [H, W, channels] and its label."""

    def loss(parameters, example):
        image, label = example
        logits = network.apply(parameters, image[None])[0]
        return optax.softmax_cross_entropy_with_integer_labels(logits, label)

    return loss


def images_and_labels(dataset: datasets.Dataset, indices: np.ndarray) -> tuple[Array, Array]:
    """[n, H, W, channels] in [0, 1] and labels [n]."""
    images = datasets.as_images(datasets.flat(dataset, indices), dataset.image_shape)
    return images, jnp.asarray(dataset.labels[indices])


def projected_batches(
    project: Callable[[PyTree], Array], dataset: datasets.Dataset, indices: np.ndarray
) -> Iterator[Array]:
    """Rows of the images at `indices`, `BATCH_SIZE` at a time, by a `project_gradients` with
    everything except the batch."""
    for i in range(0, len(indices), BATCH_SIZE):
        yield project(images_and_labels(dataset, indices[i : i + BATCH_SIZE]))


def main(arguments: Arguments, mesh: Mesh | None = None) -> Path:
    """Trains the network, writes the files, prints their paths and shapes, and returns the path of
    embeddings.json, which holds them with the target's true mixture."""
    for option in ("dimension", "num_target", "hidden", "num_epochs"):
        if getattr(arguments, option) < 1:
            raise ValueError(f"{option} must be >= 1, got {getattr(arguments, option)}")
    check_seed(arguments.seed)
    load = partial(datasets.load, arguments.dataset, data_root=arguments.data_root)
    train, test = load(split="train"), load(split="test")
    keys = jax.random.split(jax.random.key(arguments.seed), 6)
    source_key, network_key, projection_key, mixture_key, target_key, order_key = keys
    mixture = _checked_mixture(mixture_key, arguments, train.class_names)
    counts = class_counts(mixture, arguments.num_target)
    embedded = datasets.draw_indices(source_key, train, arguments.num_per_class)
    target = np.concatenate(
        [
            datasets.draw_indices(target_key, test, int(count), classes=[label])[0]
            for label, count in enumerate(counts)
            if count
        ]
    )
    # Shuffled, so that the first rows of the file are a sample of it.
    target = target[np.asarray(jax.random.permutation(order_key, len(target)))]
    rest = np.setdiff1d(np.arange(len(train.labels)), embedded)
    if not len(rest):
        raise ValueError(f"{arguments.num_per_class} per class leave no image to train on")

    network = MLP(num_classes=len(train.class_names), hidden=(arguments.hidden,))
    print(f"training on {len(rest)} images, {arguments.num_epochs} epochs", flush=True)
    parameters, losses = classification.train(
        network_key,
        network,
        *images_and_labels(train, rest),
        optimizer=optimizers.adam(arguments.learning_rate),
        num_epochs=arguments.num_epochs,
    )
    everything = images_and_labels(test, np.arange(len(test.labels)))
    accuracy = float(classification.accuracy(network, parameters, *everything))
    print(f"last loss {losses[-1]:.4f}, test accuracy {100 * accuracy:.1f}%", flush=True)

    project = partial(
        project_gradients,
        projection_key,
        cross_entropy(network),
        parameters,
        dimension=arguments.dimension,
    )
    files = {}
    sources = [
        (_file_stem(label, name), train, indices)
        for label, (name, indices) in enumerate(zip(train.class_names, embedded))
    ]
    for stem, dataset, indices in [*sources, ("target", test, target)]:
        path = arguments.out_dir / f"{stem}.{arguments.format}"
        batches = projected_batches(project, dataset, indices)
        files[path.name] = write_embeddings(path, batches, dtype=arguments.dtype)
        print(path, files[path.name], flush=True)
    summary = arguments.out_dir / "embeddings.json"
    about = {"arguments": arguments, "environment": runs.environment(), "accuracy": accuracy}
    about["data"] = datasets.identity(arguments.dataset, data_root=arguments.data_root)
    shares = dict(zip(train.class_names, counts / arguments.num_target))
    write_json(summary, {**about, "files": files, "target_mixture": shares})
    print(f"the target's mixture, and the rest: {summary}")
    return summary


if __name__ == "__main__":
    run_command(main, lambda: tyro.cli(Arguments), lower="--dimension, --hidden or --num_per_class")
