"""Student and teacher networks against loops, autodiff of the loss, and a dense solve."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import slow

from xp_drmmd import student_teacher
from xp_drmmd.config import StudentConfig
from xp_drmmd.student_teacher import HIDDEN, INPUTS, lessons, objective, run_student

SMALL = StudentConfig(
    flow="mmd", students=7, teachers=3, num_inputs=12, batch_size=4, num_epochs=3, records=3
)
SHARED = INPUTS * HIDDEN
loss, outputs = jax.jit(student_teacher.loss), jax.jit(student_teacher.outputs)


def difference(student, lesson):
    """Of the mean outputs from the teacher's."""
    return outputs(student, lesson.inputs).mean(0) - outputs(lesson.teacher, lesson.inputs).mean(0)


def expected_outputs(particles, inputs):
    """psi(x, theta) = sum_h w_h exp(-(W_h . x)^2 / 4)"""
    particles, inputs = np.asarray(particles, np.float64), np.asarray(inputs, np.float64)
    layer, last = particles[:, :SHARED].reshape(-1, HIDDEN, INPUTS), particles[:, SHARED:]
    return np.einsum("ph,phj->pj", last, np.exp(-((layer @ inputs.T) ** 2) / 4))


def test_outputs_and_loss_are_those_of_the_formula():
    student, train, validation = lessons(SMALL, 0)
    np.testing.assert_allclose(np.linalg.norm(train.inputs, axis=1), 1, rtol=1e-5)
    assert not np.array_equal(train.inputs, validation.inputs)
    of_student, of_teacher = (
        expected_outputs(particles, train.inputs) for particles in (student, train.teacher)
    )
    np.testing.assert_allclose(outputs(student, train.inputs), of_student, rtol=1e-4, atol=1e-5)
    expected = np.mean((of_student.mean(0) - of_teacher.mean(0)) ** 2) / 2
    np.testing.assert_allclose(loss(student, train), expected, rtol=1e-4)


@cache
def compiled(config):
    return jax.jit(objective(config))


def evaluate(config, student, lesson, step=0, key=0):
    """Value and velocity of one batch, the next."""
    step = jnp.asarray(step, jnp.int32)
    value, velocity, following = compiled(config)(
        student[None], lesson, jax.random.PRNGKey(key), step
    )
    assert following == step + 1
    return value, velocity[0]


WHOLE = replace(SMALL, batch_size=SMALL.num_inputs)


def test_mmd_flow_is_gradient_descent_on_the_loss():
    student, train, _ = lessons(SMALL, 0)
    value, velocity = evaluate(WHOLE, student, train)
    expected, gradient = jax.value_and_grad(loss)(student, train)
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    np.testing.assert_allclose(velocity, len(student) * gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_drmmd_flow_is_that_of_its_kernel(x64):
    """Witness 2 (1 + lambda) (S + lambda)^-1 (m_mu - m_pi) by a dense solve on the inputs."""
    student, train, _ = jax.tree.map(
        lambda x: x.astype(float) if x.dtype == "f4" else x, lessons(SMALL, 0)
    )
    lmbda, size = 0.1, len(train.inputs)
    teacher = np.asarray(outputs(train.teacher, train.inputs)) / np.sqrt(size)
    second = teacher.T @ teacher / len(teacher)
    mean = np.asarray(difference(student, train)) / np.sqrt(size)
    direction = 2 * (1 + lmbda) * np.linalg.solve(second + lmbda * np.eye(size), mean)
    witness = jax.grad(lambda z: jnp.sum(outputs(z, train.inputs) @ direction) / np.sqrt(size))
    _, velocity = evaluate(replace(WHOLE, flow="drmmd", lmbda=lmbda), student, train)
    np.testing.assert_allclose(velocity, witness(student), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("epoch", "spread"), [(0, 0.5), (1, 0.25)])
def test_noise_moves_where_the_velocity_is_taken_and_is_halved(epoch, spread):
    student, train, _ = lessons(SMALL, 0)
    config = replace(WHOLE, noise=0.5, halve_every=1)
    _, velocity = evaluate(config, student, train, step=epoch, key=3)
    shifted = student + spread * jax.random.normal(jax.random.PRNGKey(3), student.shape)
    direction = difference(student, train) / len(train.inputs)
    expected = jax.grad(lambda z: jnp.sum(outputs(z, train.inputs) @ direction))(shifted)
    np.testing.assert_allclose(velocity, expected, rtol=1e-3, atol=1e-5)


def test_a_shared_layer_stays_shared():
    config = replace(WHOLE, form="dense")
    student, train, _ = lessons(config, 0)
    assert np.ptp(np.asarray(student[:, :SHARED]), axis=0).max() == 0
    assert np.ptp(np.asarray(student[:, SHARED:]), axis=0).min() > 0
    (_, shared), (_, free) = (evaluate(c, student, train) for c in (config, WHOLE))
    assert np.ptp(np.asarray(shared[:, :SHARED]), axis=0).max() == 0
    mean = np.asarray(free)[:, :SHARED].mean(axis=0)
    np.testing.assert_allclose(shared[0, :SHARED], mean, rtol=1e-4, atol=1e-6)


def test_batches_of_an_epoch_are_all_inputs_once():
    """The mean of the losses of an epoch's batches, taken without moving, is the loss."""
    student, train, _ = lessons(SMALL, 0)
    values = [evaluate(SMALL, student, train, step=step)[0] for step in range(3, 6)]
    np.testing.assert_allclose(np.mean(values), loss(student, train), rtol=1e-4)


@pytest.mark.parametrize("flow", [slow("mmd"), "drmmd"])
def test_a_student_learns_and_is_stored(tmp_path, flow):
    config = replace(SMALL, flow=flow, students=50, num_inputs=100, batch_size=20, num_epochs=60)
    stored = run_student(config, seed=0, results=tmp_path).load_arrays()
    np.testing.assert_array_equal(stored["steps"], [0, 20, 40, 60])
    assert stored["validation"].shape == (4,)
    assert stored["train"][-1] < stored["train"][0]
    assert stored["particles"].shape == (50, SHARED + HIDDEN)
    student, train, _ = lessons(config, 0)
    np.testing.assert_allclose(stored["train"][0], loss(student, train), rtol=1e-5)


@pytest.mark.parametrize(
    ("field", "value"),
    [("lmbda", 0.0), ("step_size", np.nan), ("noise", -1.0), ("students", 0), ("batch_size", 300)],
)
def test_bad_settings_are_named(field, value):
    with pytest.raises(ValueError, match=f"(?i){field}|batches of {value}"):
        StudentConfig(**{field: value})
