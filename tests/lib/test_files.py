"""Files: what is written is whole, what is read back has the same bits."""

import json
import math
import os
import signal

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lib.runs import files


def same_bits(a, b):
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    arrays, told = tmp_path / "arrays.npz", tmp_path / "told.json"
    files.save_arrays(arrays, x=np.arange(3))
    files.write_json(told, {"steps": 100})
    monkeypatch.setattr(os, "fsync", lambda number: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        files.save_arrays(arrays, x=np.arange(4))
    with pytest.raises(KeyboardInterrupt):
        files.write_json(told, {})
    assert json.loads(told.read_text()) == {"steps": 100}
    assert same_bits(files.load_arrays(arrays)["x"], np.arange(3))
    assert sorted(os.listdir(tmp_path)) == ["arrays.npz", "told.json"]


SHAPES = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)
NPY_DTYPES = ["?", "i1", "u4", "i8", "f2", "f4", ">f4", "f8", "c8", "c16"]
ML_DTYPES = ["bfloat16", "float8_e4m3fn", "float8_e5m2", "int4"]


@st.composite
def arrays_of_any_bits(draw):
    shape = draw(SHAPES)
    name = draw(st.sampled_from(NPY_DTYPES + ML_DTYPES))
    dtype = np.dtype(getattr(ml_dtypes, name) if name in ML_DTYPES else name)
    size = math.prod(shape) * dtype.itemsize
    content = draw(st.binary(min_size=size, max_size=size))
    if name == "?":
        content = bytes(byte & 1 for byte in content)
    array = np.frombuffer(bytearray(content), dtype).reshape(shape)
    return array.T if draw(st.booleans()) else array


@settings(deadline=None, max_examples=100)
@given(
    st.dictionaries(
        st.sampled_from(["x", "file", "path", "step", "a/b", "self", "é"]), arrays_of_any_bits()
    )
)
def test_arrays_round_trip_bit_for_bit(tmp_path_factory, arrays):
    path = tmp_path_factory.getbasetemp() / "round_trip.npz"
    files.save_arrays(path, **arrays)
    loaded = files.load_arrays(path)
    assert list(loaded) == list(arrays)
    for name, array in arrays.items():
        assert same_bits(loaded[name], array)
    first = path.read_bytes()
    files.save_arrays(path, **arrays)
    assert path.read_bytes() == first


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
@pytest.mark.parametrize("shape", [(), (2, 3)])
def test_typed_keys_round_trip(tmp_path, impl, shape):
    key = jax.random.key(5, impl=impl)
    keys = jax.random.split(key, shape) if shape else key
    raw = jax.random.PRNGKey(5)
    files.save_arrays(tmp_path / "a.npz", keys=keys, raw=raw)
    loaded = files.load_arrays(tmp_path / "a.npz")
    assert (loaded["keys"].dtype, loaded["keys"].shape) == (keys.dtype, shape)
    assert same_bits(jax.random.key_data(loaded["keys"]), jax.random.key_data(keys))
    assert isinstance(loaded["raw"], np.ndarray)
    assert same_bits(loaded["raw"], raw)


def test_numpy_alone_reads_plain_arrays(tmp_path):
    files.save_arrays(tmp_path / "a.npz", x=jnp.arange(6.0).reshape(2, 3))
    with np.load(tmp_path / "a.npz", allow_pickle=False) as loaded:
        assert loaded.files == ["x"]
        assert same_bits(loaded["x"], np.arange(6, dtype=np.float32).reshape(2, 3))


@pytest.mark.parametrize("arrays", [{"x": np.array([None])}, {"__dtypes__": np.ones(1)}])
def test_what_cannot_be_saved_is_named(tmp_path, arrays):
    with pytest.raises(TypeError, match=next(iter(arrays))):
        files.save_arrays(tmp_path / "a.npz", **arrays)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def path(tmp_path):
    return tmp_path / "checkpoint.npz"


def example_state():
    parameters = {"w": jnp.ones((3, 2)), "b": jnp.zeros(2, jnp.bfloat16), "none": None}
    opt_state = optax.adam(optax.constant_schedule(0.1)).init(parameters)
    opt_state = jax.tree.map(lambda x: jnp.asarray(np.asarray(x) + 0.3, x.dtype), opt_state)
    return (parameters, opt_state, jax.random.key(1), 5, 0.25, True, np.float64(2.0))


def same_trees(a, b):
    def bits(leaf):
        is_key = jnp.issubdtype(getattr(leaf, "dtype", None), jax.dtypes.prng_key)
        return jax.random.key_data(leaf) if is_key else leaf

    same = jax.tree.map(lambda x, y: same_bits(bits(x), bits(y)), a, b)
    return jax.tree.structure(a) == jax.tree.structure(b) and all(jax.tree.leaves(same))


def test_states_round_trip(path):
    """Of optax, with numbers and a key; a single array; and into abstract shapes."""
    state = example_state()
    files.save_checkpoint(path, state, step=12)
    loaded, step = files.load_checkpoint(path, jax.tree.map(lambda leaf: leaf, state))
    assert step == 12
    assert same_trees(loaded, state)
    assert [type(leaf) for leaf in loaded[3:6]] == [int, float, bool]
    assert isinstance(loaded[0]["w"], np.ndarray)
    assert loaded[1][0].count.shape == ()
    for other in (jnp.arange(3), state[:3]):
        files.save_checkpoint(path, other, step=0)
        assert same_trees(files.load_checkpoint(path, jax.eval_shape(lambda s=other: s))[0], other)


@pytest.mark.parametrize(
    ("like", "words"),
    [
        ({"w": np.ones((3, 4)), "k": 1}, ["['w']", "float64[3, 2]", "float64[3, 4]"]),
        ({"w": np.ones((3, 2), "f4"), "k": 1}, ["['w']", "float64[3, 2]", "float32[3, 2]"]),
        ({"w": np.ones((3, 2)), "k": 1.0}, ["['k']", "int64[]", "float64[]"]),
        ({"w": np.ones((3, 2)), "k": 1, "v": 1}, ["['v']", "absent in the file"]),
        ({"w": np.ones((3, 2))}, ["['k']", "absent in this run"]),
        ({"w": np.ones((3, 2)), "k": None}, ["['k']", "absent in this run"]),
        (np.ones((3, 2)), ["leaf state is absent in the file"]),
    ],
)
def test_a_checkpoint_of_another_state_is_one_clear_error(path, like, words):
    files.save_checkpoint(path, {"w": np.ones((3, 2)), "k": 1}, step=1)
    with pytest.raises(files.RunFileError) as error:
        files.load_checkpoint(path, like)
    for word in [str(path), "delete it", *words]:
        assert word in str(error.value)


def test_other_archives_and_keys_are_refused(path):
    files.save_arrays(path, x=np.ones(2))
    with pytest.raises(files.RunFileError, match="is not a checkpoint"):
        files.load_checkpoint(path, np.ones(2))
    files.save_checkpoint(path, jax.random.key(0), step=1)
    with pytest.raises(files.RunFileError, match=r"key<fry>\[\].*key<rbg>\[\]"):
        files.load_checkpoint(path, jax.random.key(0, impl="rbg"))


def test_floats_are_rounded_wherever_they_stand():
    value = {"a": [1.23456, (np.float64(98765.4), 3)], "b": {"c": float("inf"), "d": "1.23456"}}
    expected = {"a": [1.23, [98800.0, 3]], "b": {"c": float("inf"), "d": "1.23456"}}
    assert files.rounded(value, 3) == expected
