"""Eight devices give what one gives, to rounding, and each needs an eighth of the memory."""

import json
from pathlib import Path
from unittest.mock import create_autospec

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import slow
from jax.sharding import Mesh, PartitionSpec
from scripts import REPOSITORY, run_script

from lib import devices

DOUBLE = 1e-11  # float64 sums of some hundred terms in another order, along a dozen steps
SINGLE = 2e-5  # the same in float32, through a network
MORE = {"energy gradient", "flow of", "labelled", "resumed", "xp_drmmd", "condensation"}


@pytest.fixture(scope="module", params=["some", slow("all")])
def found(request):
    """What `on_eight_devices.py` prints: relative differences from one device, shares of memory."""
    script = Path(__file__).with_name("on_eight_devices.py")
    eight = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    # Most of the time is compiling; one device and eight are compiled alike.
    eight["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    printed = run_script(script, request.param, PYTHONPATH=str(REPOSITORY), **eight)
    return json.loads(printed.splitlines()[-1])


def chosen(found, *beginnings):
    if beginnings[0] in MORE and "devices, all" not in found:
        pytest.skip("slow to compile")
    picked = {name: value for name, value in found.items() if name.startswith(beginnings)}
    assert picked
    return picked


@pytest.mark.parametrize(
    ("what", "tolerance"),
    [
        *(
            (name, DOUBLE)
            for name in (
                "rows",
                "WoW gradient",
                "energy gradient",
                "labelled",
                "flow of",
                "resumed",
            )
        ),
        *(("streams, EM", 1e-12), ("streams, sums", 1e-12), ("streams, sizes", 0)),
        # Solving with the target's spectrum at lambda = 1e-3 magnifies rounding by 1 / lambda.
        ("xp_drmmd", 1e-9),
    ],
)
def test_float64_results_are_those_of_one_device(found, what, tolerance):
    assert found["devices"] == 8
    for name, difference in chosen(found, what).items():
        assert difference <= tolerance, name


def test_float32_results_are_those_of_one_device(found):
    for what in ("condensation", "classifiers", "flow matching"):
        for name, difference in chosen(found, what).items():
            assert difference < SINGLE, name


def test_memory_of_a_device_falls_with_their_number(found):
    assert found["memory: WoW gradient"] < 1.25 / 8
    if "devices, all" in found:
        assert found["memory: DrMMD"] < 1.25 / 8
        # Ten classes on eight devices: two on the busiest.
        assert found["memory: condensation, one network"] < 1.25 * 2 / 10
        assert found["memory: otdd"] < 1.25 / 8


def test_devices_form_the_rectangle_whose_busiest_has_least(found):
    assert found["grid (10, 1)"] == [8, 1]
    assert found["grid (10, 4)"] == [2, 4]  # 5 x 1 each
    assert found["grid (3, 8)"] == [1, 8]  # 3 x 1 each; [4, 2] would be 1 x 4
    assert found["grid (8, 6)"] in ([8, 1], [4, 2])  # 1 x 6, 2 x 3


# One device: what needs no second


def test_without_a_mesh_nothing_moves():
    x = {"a": np.arange(3.0), "key": jax.random.key(0)}
    placed = devices.device_put(x, None)
    assert isinstance(placed["a"], jax.Array)
    np.testing.assert_array_equal(placed["a"], x["a"])
    assert devices.constrain(x, None) is x
    assert devices.partition_spec((3, 4), (-1,), None) == PartitionSpec()
    assert devices.sharding(None) is None
    assert devices.gather(x, None) is x

    def function(x):
        return 2 * x

    assert devices.over_devices(function, None) is function


def test_keys_and_numbers_come_back_from_a_mesh():
    mesh = devices.device_mesh(1)
    key = devices.device_put(jax.random.key(5), mesh)
    np.testing.assert_array_equal(jax.random.key_data(key), jax.random.key_data(jax.random.key(5)))
    fetched = devices.fetch(devices.device_put({"a": jnp.arange(3), "b": 2.5}, mesh))
    np.testing.assert_array_equal(fetched["a"], [0, 1, 2])
    assert isinstance(fetched["a"], np.ndarray)
    assert fetched["b"] == 2.5
    there = devices.device_put(np.arange(3), mesh, PartitionSpec(devices.AXIS))
    assert there.sharding == devices.sharding(mesh, PartitionSpec(devices.AXIS))
    here = devices.gather(there, mesh)
    assert here.sharding == jnp.arange(3).sharding
    np.testing.assert_array_equal(here, [0, 1, 2])


def test_the_first_axis_that_fits_is_divided():
    eight = create_autospec(Mesh, instance=True, size=8)
    spec = devices.partition_spec((3, 16, 24), (-2, -3), eight)
    assert spec == PartitionSpec(None, devices.AXIS, None)
    assert devices.partition_spec((8, 5, 24), (-2, -3), eight) == PartitionSpec(
        devices.AXIS, None, None
    )
    assert devices.partition_spec((3, 5, 24), (-2, -3), eight) == PartitionSpec()


def test_too_many_devices_are_refused():
    there = len(jax.devices())
    with pytest.raises(ValueError, match=f"{there + 1} devices asked for, there are {there}"):
        devices.device_mesh(there + 1)
    with pytest.raises(ValueError, match="0 devices"):
        devices.device_mesh(0)
