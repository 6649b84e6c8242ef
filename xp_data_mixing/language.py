"""A small language model trained on mixtures of domains: do weights that match a target help?

    python xp_data_mixing/language.py --preset quick
    python xp_data_mixing/language.py --preset paper --seeds 0 1 2 3 4

Domains and targets are texts of the installed packages (`xp_data_mixing.texts`): targets of known
mixtures, and real ones. For every target each method chooses weights from windows of the target;
a byte-level transformer is trained from scratch on as many bytes of each mixture, from one start;
and evaluated on other windows of the target. What is finished is skipped.

Methods: uniform; by size; the gradients of a model that was trained a little on all domains (of its
last block and head, projected), or Adam's direction for them, and `estimate(estimator="auto")`;
MixMin on models of each domain (`xp_data_mixing.likelihood`); RegMix (Liu et al., ICLR 2025):
losses of small models on random mixtures, regressed on the mixtures, and the mean of the best of
many mixtures by that regression; the oracle, where the mixture is known.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax.sharding import Mesh
from jax.tree_util import Partial
from jaxtyping import Array, Float, Int, Key, UInt8
from sklearn.linear_model import Ridge

from lib import runs
from lib.numerics import named_key
from lib.report.spreads import mean_and_spread, standard_error
from lib.report.tables import Table, write_summary
from lib.rows import fill_up
from lib.runs.commands import run_command
from lib.runs.files import write_json
from lib.runs.processes import DeviceOptions
from lib.runs.settings import check_sizes
from xp_data_mixing.calibration import host_rng, total_variation
from xp_data_mixing.gradient_embeddings import adam_direction, class_counts, project_gradients
from xp_data_mixing.likelihood import likelihood_weights
from xp_data_mixing.mixing import Kernel, estimate
from xp_data_mixing.study.config import EXPERIMENT
from xp_data_mixing.texts import DOMAINS, REAL_TARGETS, Texts, collect, windows

METHODS = ("uniform", "by size", "gradients", "gradients, Adam", "MixMin", "RegMix", "oracle")
VOCABULARY = 256
BATCH = 50
"""Windows whose gradients, or losses, are computed at a time."""


@dataclass(frozen=True)
class LanguageConfig:
    domain_bytes: int = 2_000_000
    context: int = 128
    width: int = 128
    depth: int = 4
    heads: int = 4
    learning_rate: float = 1e-3
    batch_size: int = 32
    num_steps: int = 500
    """Of each training: num_steps x batch_size x context bytes."""
    first_steps: int = 25
    """Of the model whose gradients are taken."""
    proxy_steps: int = 25
    """Of each model of MixMin and RegMix."""
    num_proxies: int = 24
    """Random mixtures of RegMix."""
    num_windows: int = 200
    """Of each domain, and of a target, that weights are chosen from."""
    num_known: int = 2
    """Targets of known mixtures."""
    dimension: int = 512

    def __post_init__(self):
        check_sizes(self, "context", "num_steps", "first_steps", "proxy_steps", "num_windows")


QUICK = LanguageConfig(
    domain_bytes=100_000, context=32, width=32, depth=1, heads=2, num_steps=60, first_steps=10,
    proxy_steps=10, num_proxies=6, num_windows=50, num_known=1, dimension=64,
)  # fmt: skip


# ---- The model


class Transformer(nn.Module):
    """A causal transformer over bytes: tokens [..., L] to logits [..., L, 256]."""

    width: int
    depth: int
    heads: int

    @nn.compact
    def __call__(self, tokens: Int[Array, "*b L"]) -> Float[Array, "*b L 256"]:
        length = tokens.shape[-1]
        places = self.param("places", nn.initializers.normal(0.02), (length, self.width))
        h = nn.Embed(VOCABULARY, self.width)(tokens)
        h = h + jnp.broadcast_to(places, h.shape)
        for i in range(self.depth):
            h = Block(self.width, self.heads, name=f"block{i}")(h)
        return nn.Dense(VOCABULARY, name="head")(nn.LayerNorm(name="last")(h))


class Block(nn.Module):
    width: int
    heads: int

    @nn.compact
    def __call__(self, h: Float[Array, "*b L width"]) -> Float[Array, "*b L width"]:
        mask = nn.make_causal_mask(h[..., 0])
        h = h + nn.MultiHeadDotProductAttention(self.heads)(nn.LayerNorm()(h), mask=mask)
        inner = nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(h)))
        return h + nn.Dense(self.width)(inner)


def losses(network: Transformer, parameters: Any, window: UInt8[Array, "*b L1"]):
    """Cross-entropy of each byte of windows given those before it, in nats [..., L]."""
    tokens = window.astype(jnp.int32)
    logits = network.apply(parameters, tokens[..., :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[..., 1:])


class Pool(NamedTuple):
    """Windows of all domains, one domain after the other."""

    rows: UInt8[Array, "n L1"]
    starts: Int[Array, " N"]
    counts: Int[Array, " N"]


@cache
def schedule(learning_rate: float, num_steps: int) -> optax.GradientTransformation:
    """Adam; the rate rises over a tenth of the steps, then follows a cosine down to 0."""
    return optax.adam(
        optax.warmup_cosine_decay_schedule(0, learning_rate, max(1, num_steps // 10), num_steps)
    )


@partial(jax.jit, static_argnames=("network", "optimizer", "num_steps", "batch_size"))
def train(
    key: Key[Array, ""],
    network: Transformer,
    pool: Pool,
    weights: Float[Array, " N"],
    *,
    optimizer: optax.GradientTransformation,
    num_steps: int,
    batch_size: int,
) -> tuple[Any, Any]:
    """(parameters, state of the optimizer) after steps on windows of domains drawn by `weights`,
    with replacement."""
    start_key, step_key = jax.random.split(key)
    parameters = network.init(start_key, pool.rows[0, :-1].astype(jnp.int32))

    def step(carry, i):
        parameters, state = carry
        domain_key, row_key = jax.random.split(jax.random.fold_in(step_key, i))
        domains = jax.random.categorical(domain_key, jnp.log(weights), shape=(batch_size,))
        places = jax.random.uniform(row_key, (batch_size,)) * pool.counts[domains]
        batch = pool.rows[pool.starts[domains] + places.astype(jnp.int32)]
        grad = jax.grad(lambda p: jnp.mean(losses(network, p, batch)))(parameters)
        updates, state = optimizer.update(grad, state, parameters)
        return (optax.apply_updates(parameters, updates), state), None

    start = parameters, optimizer.init(parameters)
    return jax.lax.scan(step, start, jnp.arange(num_steps))[0]


@partial(jax.jit, static_argnames="network")
def _batch_losses(network, parameters, batch):
    return losses(network, parameters, batch)


def window_losses(network: Transformer, parameters: Any, rows: np.ndarray) -> np.ndarray:
    """`losses` of any number of windows, [n, L]."""
    return in_batches(partial(_batch_losses, network, parameters), rows)


def in_batches(function: Callable[[Any], Array], rows: np.ndarray) -> np.ndarray:
    """What a function gives for each row, `BATCH` of them at a time."""
    filled = fill_up(rows, -(-len(rows) // BATCH) * BATCH)
    parts = [np.asarray(function(filled[i : i + BATCH])) for i in range(0, len(filled), BATCH)]
    return np.concatenate(parts)[: len(rows)]


# ---- Texts


class Target(NamedTuple):
    """chosen_from: windows that weights are chosen from. evaluated: groups of other windows, whose
    mean losses count by `shares`."""

    chosen_from: UInt8[np.ndarray, "m L1"]
    evaluated: list[UInt8[np.ndarray, "m L1"]]
    shares: Float[np.ndarray, " G"]
    truth: Float[np.ndarray, " N"] | None


def draw_targets(config: LanguageConfig, held_out: Mapping[str, np.ndarray]) -> dict[str, Target]:
    """The same whatever the seed."""
    rng, targets = host_rng(named_key(jax.random.key(0), "targets")), {}
    halves: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for name, text in held_out.items():
        rows = rng.permutation(windows(text, config.context + 1))
        halves[name] = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    for k in range(config.num_known):
        truth = rng.dirichlet(np.full(len(DOMAINS), 0.5))
        counts = class_counts(truth, config.num_windows)
        parts = [rng.choice(halves[name][0], count) for name, count in zip(DOMAINS, counts)]
        evaluated = [halves[name][1] for name in DOMAINS]
        targets[f"mixture {k}"] = Target(np.concatenate(parts), evaluated, truth, truth)
    for name in REAL_TARGETS:
        chosen, evaluated = halves[name]
        targets[name] = Target(chosen[: config.num_windows], [evaluated], np.ones(1), None)
    return targets


# ---- Methods


class Chosen(NamedTuple):
    """weights of each target, and the seconds that all of them took together."""

    weights: dict[str, Float[np.ndarray, " N"]]
    seconds: float


def choose_by_gradients(
    key: Key[Array, ""],
    trained: Callable[..., tuple[Any, Any]],
    network: Transformer,
    domains: list[np.ndarray],
    targets: dict[str, Target],
    config: LanguageConfig,
    *,
    adam: bool,
) -> Chosen:
    """By gradients of the last block and the head."""
    began = time.perf_counter()
    model_key, projection_key, row_key, estimate_key = jax.random.split(key, 4)
    parameters, state = trained(
        model_key, np.full(len(domains), 1 / len(domains)), config.first_steps
    )
    last = (f"block{config.depth - 1}", "last", "head")

    def some(tree):
        return {name: tree["params"][name] for name in last}

    transform = None
    if adam:
        moments = state[0]
        transform = adam_direction(moments._replace(mu=some(moments.mu), nu=some(moments.nu)))
    loss = Partial(_loss_of_some, network, parameters)

    def embed(batch):
        return project_gradients(
            projection_key, loss, some(parameters), jnp.asarray(batch),
            dimension=config.dimension, transform=transform,
        )  # fmt: skip

    rng = host_rng(row_key)
    chosen = (rng.permutation(rows)[: config.num_windows] for rows in domains)
    sources = [in_batches(embed, rows) for rows in chosen]
    weights, kernel = {}, Kernel(estimator="auto", check_features=0)
    for name, target in targets.items():
        result = estimate(
            estimate_key, sources, in_batches(embed, target.chosen_from), kernel=kernel
        )
        weights[name] = result.weights
        kernel = Kernel(estimator="auto", check_features=0, choice=result.choice)
    return Chosen(weights, time.perf_counter() - began)


def _loss_of_some(network, parameters, some, window):
    return jnp.mean(losses(network, {"params": parameters["params"] | some}, window))


def choose_by_mixmin(key, trained, network, domains, targets, config) -> Chosen:
    """A model of each domain; every byte of the target is an example."""
    began, n = time.perf_counter(), len(domains)
    models = [
        trained(jax.random.fold_in(key, i), np.eye(n)[i], config.proxy_steps)[0] for i in range(n)
    ]
    weights = {}
    for name, target in targets.items():
        logs = [-window_losses(network, model, target.chosen_from).ravel() for model in models]
        weights[name] = likelihood_weights(np.stack(logs, axis=1)).weights
    return Chosen(weights, time.perf_counter() - began)


def choose_by_regression(key, trained, network, domains, targets, config) -> Chosen:
    """The mean of the best 100 of 10,000 mixtures by a linear regression of the proxies' losses."""
    began, rng = time.perf_counter(), host_rng(key)
    mixtures = rng.dirichlet(np.full(len(domains), 0.5), config.num_proxies)
    models = [
        trained(jax.random.fold_in(key, i), mixture, config.proxy_steps)[0]
        for i, mixture in enumerate(mixtures)
    ]
    candidates, weights = rng.dirichlet(np.full(len(domains), 0.5), 10_000), {}
    for name, target in targets.items():
        proxy_losses = [window_losses(network, m, target.chosen_from).mean() for m in models]
        predicted = Ridge(1e-3).fit(mixtures, proxy_losses).predict(candidates)
        weights[name] = candidates[np.argsort(predicted)[:100]].mean(axis=0)
    return Chosen(weights, time.perf_counter() - began)


# ---- The comparison


def compare(config: LanguageConfig, seed: int, texts: Texts) -> dict[str, Any]:
    """names, targets; weights [T, M, N], loss [T, M] in bits per byte, tv [T, M] to the known
    mixture; NaN where a method has no weights or a target no mixture. seconds [M] of choosing for
    all targets, and training, of one model."""
    domains = [windows(texts.train[name], config.context + 1) for name in DOMAINS]
    counts = np.array([len(rows) for rows in domains])
    starts = np.cumsum(counts) - counts
    pool = Pool(*map(jnp.asarray, (np.concatenate(domains), starts, counts)))
    network = Transformer(config.width, config.depth, config.heads)
    targets, key = draw_targets(config, texts.held_out), jax.random.key(seed)

    def trained(key, weights, num_steps):
        return jax.block_until_ready(
            train(
                key, network, pool, jnp.asarray(weights, jnp.float32), num_steps=num_steps,
                optimizer=schedule(config.learning_rate, num_steps), batch_size=config.batch_size,
            )
        )  # fmt: skip

    common = trained, network, domains, targets, config
    n = len(domains)
    chosen = {
        "uniform": Chosen(dict.fromkeys(targets, np.full(n, 1 / n)), 0.0),
        "by size": Chosen(dict.fromkeys(targets, counts / counts.sum()), 0.0),
        "gradients": choose_by_gradients(named_key(key, "gradients"), *common, adam=False),
        "gradients, Adam": choose_by_gradients(named_key(key, "gradients"), *common, adam=True),
        "MixMin": choose_by_mixmin(named_key(key, "MixMin"), *common),
        "RegMix": choose_by_regression(named_key(key, "RegMix"), *common),
        "oracle": Chosen(
            {name: t.truth for name, t in targets.items() if t.truth is not None}, 0.0
        ),
    }
    models: dict[bytes, Any] = {}
    training = []
    shape = len(targets), len(METHODS)
    weights = np.full((*shape, n), np.nan)
    loss, tv = np.full(shape, np.nan), np.full(shape, np.nan)
    for t, (name, target) in enumerate(targets.items()):
        for m, method in enumerate(METHODS):
            if name not in chosen[method].weights:
                continue
            w = weights[t, m] = chosen[method].weights[name]
            if w.tobytes() not in models:
                began = time.perf_counter()
                models[w.tobytes()], _ = trained(named_key(key, "training"), w, config.num_steps)
                training.append(time.perf_counter() - began)
            parameters = models[w.tobytes()]
            of_groups = [window_losses(network, parameters, g).mean() for g in target.evaluated]
            loss[t, m] = target.shares @ np.array(of_groups) / np.log(2)
            if target.truth is not None:
                tv[t, m] = total_variation(w, target.truth)
            print(f"  {name}, {method}: {loss[t, m]:.4f} bits per byte", flush=True)
    return {
        "names": np.array(METHODS),
        "targets": np.array(list(targets)),
        "weights": weights,
        "loss": loss,
        "tv": tv,
        "seconds": np.array([chosen[method].seconds for method in METHODS]),
        "training": np.array(np.median(training)),
    }


def tables(stored: Sequence[Mapping[str, Any]]) -> list[Table]:
    """Of the arrays of every seed."""
    loss, tv = (np.stack([arrays[name] for arrays in stored]) for name in ("loss", "tv"))
    lines = []
    for t, target in enumerate(stored[0]["targets"].tolist()):
        for m, method in enumerate(METHODS):
            if np.isnan(loss[:, t, m]).any():
                continue
            less = loss[:, t, m] - loss[:, t, 0]
            cells = [mean_and_spread(loss[:, t, m], ".3f")]
            cells.append("-" if m == 0 else f"{less.mean():+.3f} ± {2 * standard_error(less):.3f}")
            known = not np.isnan(tv[:, t, m]).any()
            cells.append(mean_and_spread(tv[:, t, m], ".3f") if known else "-")
            lines.append([target, method, *cells])
    seeds = f"{len(stored)} seed{'s' * (len(stored) > 1)}"
    made = [
        Table(
            ["target", "weights", "bits per byte", "less uniform", "TV to the mixture"],
            lines,
            f"Loss on the target's other texts, mean ± sample standard deviation over {seeds}; "
            "paired difference to uniform with two standard errors.",
        )
    ]
    seconds = np.median([arrays["seconds"] for arrays in stored], axis=0)
    training = float(np.median([arrays["training"] for arrays in stored]))
    costs = [
        [method, f"{s:.1f}", f"{100 * s / training / len(stored[0]['targets']):.0f}"]
        for method, s in zip(METHODS, seconds)
        if s > 0
    ]
    heads = ["weights", "seconds of choosing, all targets", "per target, % of a training"]
    made.append(Table(heads, costs, f"Median over {seeds}; a training takes {training:.0f} s."))
    return made


@dataclass(frozen=True)
class Arguments(DeviceOptions):
    preset: Literal["quick", "paper"] = "quick"
    seeds: tuple[int, ...] = ()
    """None: 0 for quick, 0 to 4 for paper."""
    folder: Path | None = None
    """Installed packages; None: those beside which this one runs."""
    results: Path = Path("results")


def main(arguments: Arguments, mesh: Mesh | None = None) -> Path:
    """Writes the manifest of the texts, the summary and its page; returns the summary."""
    config = QUICK if arguments.preset == "quick" else LanguageConfig()
    folder = Path(np.__file__).parents[1] if arguments.folder is None else arguments.folder
    texts, stored = collect(folder, config.domain_bytes), []
    out = arguments.results / EXPERIMENT
    write_json(out / f"texts_{arguments.preset}.json", texts.manifest)
    seeds = arguments.seeds or tuple(range(1 if arguments.preset == "quick" else 5))
    for seed in seeds:
        print(f"language, seed {seed}", flush=True)
        # Other texts are another experiment.
        known = asdict(config) | {"texts": runs.config_hash(texts.manifest)}
        run = runs.open_run(arguments.results, EXPERIMENT, "language", known, seed=seed)
        if not run.finished:
            run.finish(**compare(config, seed, texts))
        stored.append(run.load_arrays())
    row = {name: [arrays[name].tolist() for arrays in stored] for name in sorted(stored[0])}
    summary = {"group": "language", "seeds": seeds, "settings": asdict(config), "rows": [row]}
    return write_summary(out / f"language_{arguments.preset}.json", summary, tables(stored))


if __name__ == "__main__":
    run_command(main, lambda: tyro.cli(Arguments), lower="the preset (--preset quick)")
