"""The main programs at the papers' sizes, lowered for accelerators that are not there.

Lowering ends before any compiler of the platform: what shows is a primitive without a rule for it,
a branch that was meant for a CPU, a precision that a GPU would not keep.
"""

import re

import jax
import pytest
from scripts import benchmark

from lib.networks import convolution

LARGEST_CONSTANT = 2**20  # bytes
QUICK = (
    "WoW, IMQ, percentiles (10, 500, 784)",
    "WoW flow (10, 500, 784)",
    "DrMMD target, 2,000",
    "DrMMD step (300, 2,000)",
    "KALE step (300, 2,000)",
    "condensation, 1 network",
    "E-step, K = 10, d = 3072",
    "draws of a mixture, K = 10, d = 3072",
    "draws without high frequencies, d = 3072",
    "distances of a batch",
    "mean embeddings, D = 10,000, d = 8,192",
)
PROGRAMS = benchmark("gpu_programs").PROGRAMS


def lowered(program, platform: str) -> str:
    with jax.enable_x64(program.double):
        function, arguments, keywords = program.build(jax.devices()[0])
        return (
            function.trace(*arguments, **keywords).lower(lowering_platforms=(platform,)).as_text()
        )


def faults(text: str, *, double: bool, networks: bool) -> set[str]:
    """What would be wrong on an accelerator, in words."""
    named = set()
    for call in re.findall(r"custom_call @([\w.]+)", text):
        if re.match("lapack|blas|eigen|topk", call, re.IGNORECASE):
            named.add(f"the CPU's {call}")
        if "callback" in call:
            named.add("a callback to the host")
    if not double and re.search(r"tensor<[\dx]*f64>", text):
        named.add("float64 among float32")
    for product in re.findall(r"stablehlo\.dot_general.*", text):
        outer = "contracting_dims = [] x []" in product  # no sum, so no precision
        if not networks and not outer and "HIGHEST" not in product and "f32>" in product:
            named.add(f"a product at the default precision: {product}")
    if any(len(digits) / 2 > LARGEST_CONSTANT for digits in re.findall(r'"0x([0-9A-F]+)"', text)):
        named.add("a large constant")
    return named


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in PROGRAMS]
)
def test_programs_lower_for_accelerators(name, platform, monkeypatch):
    program = PROGRAMS[name]
    if platform == "tpu" and program.double:
        pytest.skip("a TPU has no float64")
    monkeypatch.setattr(convolution, "_on_cpu", lambda: False)
    text = lowered(program, platform)
    named = faults(text, double=program.double, networks=program.networks)
    assert not named


def test_faults_are_seen():
    """On a CPU's program each of them stands, except constants."""

    def program(x):
        jax.debug.callback(print, x[0, 0])
        return jax.numpy.linalg.eigh(x @ x)[1].astype(float)

    with jax.enable_x64(True):
        text = jax.jit(program).lower(jax.ShapeDtypeStruct((3, 3), "f4")).as_text()
    named = " ".join(sorted(faults(text, double=False, networks=False)))
    for part in ("a callback", "a product at the default", "lapack_ssyevd", "float64 among"):
        assert part in named
