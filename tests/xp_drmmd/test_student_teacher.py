"""Student and teacher networks against loops, autodiff of the loss, and a dense solve."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xp_drmmd.config import StudentConfig
from xp_drmmd.student_teacher import (
    HIDDEN,
    INPUTS,
    Lesson,
    lessons,
    loss,
    objective,
    outputs,
    run_student,
)

SMALL = StudentConfig(
    flow="mmd", students=7, teachers=3, num_inputs=12, batch_size=4, n_epochs=3, records=3
)
SHARED = INPUTS * HIDDEN


def draw(config=SMALL):
    return lessons(config, 0)


def loop_outputs(particles, inputs):
    """psi(x, theta) = sum_h w_h exp(-(W_h . x)^2 / 4)"""
    result = np.zeros((len(particles), len(inputs)))
    for i, particle in enumerate(np.asarray(particles, np.float64)):
        weights, last = particle[:SHARED].reshape(HIDDEN, INPUTS), particle[SHARED:]
        for j, x in enumerate(np.asarray(inputs, np.float64)):
            result[i, j] = sum(w * np.exp(-((row @ x) ** 2) / 4) for w, row in zip(last, weights))
    return result


def test_outputs_and_loss_are_those_of_a_loop():
    student, train, validation = draw()
    np.testing.assert_allclose(np.linalg.norm(train.inputs, axis=1), 1, rtol=1e-5)
    assert not np.array_equal(train.inputs, validation.inputs)
    expected = loop_outputs(student, train.inputs)
    np.testing.assert_allclose(outputs(student, train.inputs), expected, rtol=1e-4, atol=1e-5)
    teacher = loop_outputs(train.teacher, train.inputs)
    difference = expected.mean(0) - teacher.mean(0)
    np.testing.assert_allclose(loss(student, train), np.mean(difference**2) / 2, rtol=1e-4)


def whole_batch(config, student, lesson, key=0):
    """Value and velocity on all inputs as one batch."""
    config = replace(config, batch_size=config.num_inputs)
    value, velocity, step = objective(config)(
        student[None], lesson, jax.random.PRNGKey(key), jnp.zeros((), jnp.int32)
    )
    assert step == 1
    return value, velocity[0]


def test_mmd_flow_is_gradient_descent_on_the_loss():
    student, train, _ = draw()
    value, velocity = whole_batch(SMALL, student, train)
    expected, gradient = jax.value_and_grad(loss)(student, train)
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    np.testing.assert_allclose(velocity, len(student) * gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_drmmd_flow_is_that_of_its_kernel(x64):
    """Witness 2 (1 + lambda) (S + lambda)^-1 (m_mu - m_pi) by a dense solve on the inputs."""
    student, train, _ = draw()
    student, teacher = student.astype(float), train.teacher.astype(float)
    train = train._replace(inputs=train.inputs.astype(float), teacher=teacher)
    lmbda, size = 0.1, len(train.inputs)

    def features(z):
        return outputs(z, train.inputs) / np.sqrt(size)

    teacher = np.asarray(features(train.teacher))
    second = teacher.T @ teacher / len(teacher)
    difference = np.asarray(features(student)).mean(0) - teacher.mean(0)
    direction = 2 * (1 + lmbda) * np.linalg.solve(second + lmbda * np.eye(size), difference)
    expected = jax.grad(lambda z: jnp.sum(features(z) @ direction))(student)
    _, velocity = whole_batch(replace(SMALL, flow="drmmd", lmbda=lmbda), student, train)
    np.testing.assert_allclose(velocity, expected, rtol=1e-6, atol=1e-9)


def test_noise_moves_where_the_velocity_is_taken_and_is_halved():
    student, train, _ = draw()
    config = replace(SMALL, noise=0.5, halve_every=1, batch_size=SMALL.num_inputs)
    for epoch, spread in ((0, 0.5), (1, 0.25)):
        key = jax.random.PRNGKey(3)
        _, velocity, _ = objective(config)(student[None], train, key, jnp.asarray(epoch, jnp.int32))
        shifted = student + spread * jax.random.normal(key, student.shape)
        student_mean = outputs(student, train.inputs).mean(0)
        difference = student_mean - outputs(train.teacher, train.inputs).mean(0)
        _, transpose = jax.vjp(lambda z: outputs(z, train.inputs), shifted)
        expected = transpose(jnp.broadcast_to(difference[None], (len(student), 12)))[0]
        np.testing.assert_allclose(velocity[0], expected / len(train.inputs), rtol=1e-3, atol=1e-5)


def test_a_shared_layer_stays_shared():
    config = replace(SMALL, form="dense")
    student, train, _ = draw(config)
    assert np.ptp(np.asarray(student[:, :SHARED]), axis=0).max() == 0
    assert np.ptp(np.asarray(student[:, SHARED:]), axis=0).min() > 0
    _, velocity = whole_batch(config, student, train)
    assert np.ptp(np.asarray(velocity[:, :SHARED]), axis=0).max() == 0
    _, each = whole_batch(SMALL, student, train)
    mean = np.asarray(each)[:, :SHARED].mean(axis=0)
    np.testing.assert_allclose(velocity[0, :SHARED], mean, rtol=1e-4, atol=1e-6)


def test_batches_of_an_epoch_are_all_inputs_once():
    """The mean of the losses of an epoch's batches, taken without moving, is the loss."""
    student, train, _ = draw()
    values = [
        objective(SMALL)(student[None], train, jax.random.PRNGKey(0), jnp.asarray(i, jnp.int32))[0]
        for i in range(3, 6)
    ]
    np.testing.assert_allclose(np.mean(values), loss(student, train), rtol=1e-4)


@pytest.mark.parametrize("flow", ["mmd", "drmmd"])
def test_a_student_learns_and_is_stored(tmp_path, flow):
    config = replace(SMALL, flow=flow, students=50, num_inputs=100, batch_size=20, n_epochs=60)
    stored = run_student(config, seed=0, results=tmp_path).load_arrays()
    np.testing.assert_array_equal(stored["steps"], [0, 20, 40, 60])
    assert stored["validation"].shape == (4,)
    assert stored["train"][-1] < stored["train"][0]
    assert stored["particles"].shape == (50, SHARED + HIDDEN)
    student, train, _ = lessons(config, 0)
    assert isinstance(train, Lesson)
    np.testing.assert_allclose(stored["train"][0], loss(student, train), rtol=1e-5)


def test_bad_settings_are_named():
    for field, value in (
        ("lmbda", 0.0), ("lr", float("nan")), ("noise", -1.0), ("students", 0), ("batch_size", 300)
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"(?i){field}|batches of {value}"):
            StudentConfig(**{field: value})
