"""Training of a classifier on noisy images, and guidance by it."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ldm_jax import process
from ldm_jax.models import noisy_classifier
from ldm_jax.systems import classifying
from ldm_jax.training.loop import train_step
from ldm_jax.training.state import new_state
from ldm_jax.types import UserError, example_keys

SHAPE, SCHEDULE = (4, 4, 1), process.SCHEDULES["cosine"](100)
PICTURES = jnp.stack([jnp.full(SHAPE, 0.7), jnp.full(SHAPE, -0.7)])  # one constant picture for each of two classes


@dataclasses.dataclass(frozen=True)
class Recorded:
    """A "classifier" whose logits are the noisy picture's first values and the time: shows what it was asked."""
    num_classes: int = 3

    def init(self, key):
        return {}

    def apply(self, params, x_t, t, train=False, rngs=None):
        return jnp.stack([x_t[:, 0, 0, 0], x_t[:, 1, 2, 0], t], 1)


@pytest.mark.parametrize("times", ["uniform", "logit_normal"])
def test_times_and_noise_are_those_of_the_diffusion_loss(times):
    image, label = jax.random.uniform(jax.random.key(0), (6, *SHAPE), minval=-1.0), jnp.array([0, 1, 2, 0, 1, 2])

    @jax.jit
    def noised(key):
        seen = []
        process.diffusion_loss(lambda x_t, t: seen.append((x_t, t)) or x_t, SCHEDULE, "eps", image, key, times=times)
        return seen[0]

    keys = example_keys(jax.random.key(5), 6)
    x_t, t = noised(keys)
    system = classifying(Recorded(), image_shape=SHAPE, schedule=SCHEDULE, num_classes=3, times=times)
    loss, metrics = jax.jit(system.loss_fn)({"classifier": {}}, {"image": image, "class": label}, keys)
    logits = np.stack([x_t[:, 0, 0, 0], x_t[:, 1, 2, 0], t], 1).astype(np.float64)
    want = np.log(np.exp(logits).sum(1)) - logits[np.arange(6), label]
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    right = logits.argmax(1) == np.asarray(label)
    early = np.asarray(t) < 0.5
    assert 0 < early.sum() < 6 and 0 < right.sum() < 6
    np.testing.assert_array_equal(metrics["accuracy"], right)
    np.testing.assert_allclose(metrics["accuracy_early"], right[early].mean(), rtol=1e-6)


def test_importance_is_corrected():
    times = lambda key, n, schedule: (jnp.full(n, 0.5), jnp.full(n, 3.0))
    batch = {"image": jnp.zeros((2, *SHAPE)), "class": jnp.array([0, 1])}
    systems = [classifying(Recorded(), image_shape=SHAPE, schedule=SCHEDULE, num_classes=3, times=draw)
               for draw in (lambda *args: times(*args)[0], times)]
    one, three = (jax.jit(system.loss_fn)({"classifier": {}}, batch, jax.random.key(0))[0] for system in systems)
    np.testing.assert_allclose(three, 3 * one, rtol=1e-6)


def test_it_learns_and_guides_towards_the_class():
    net = noisy_classifier(SHAPE, 2, width=8, mults=(1,), num_res_blocks=1, attention=(), head_width=4, timesteps=100)
    system = classifying(net, image_shape=SHAPE, schedule=SCHEDULE, num_classes=2)
    tx = optax.adam(3e-3)
    state = new_state(system.init(jax.random.key(0)), system.trained, tx)
    step, label = jax.jit(train_step(system.loss_fn, tx, ema_decay=0.9)), jnp.arange(64) % 2
    history = []
    for _ in range(30):
        state, metrics = step(state, {"image": PICTURES[label], "class": label}, jax.random.key(1))
        history.append({name: float(metrics[name]) for name in ("loss", "accuracy_early")})
    assert history[0]["loss"] == pytest.approx(np.log(2), abs=1e-5)  # the logits are zero at first
    assert np.mean([m["loss"] for m in history[-5:]]) < 0.7 * np.log(2)
    assert np.mean([m["accuracy_early"] for m in history[-5:]]) > 0.9

    @jax.jit
    def guided(x_t, t, label):
        log_prob = lambda x_t, t: jax.nn.log_softmax(system.classify(state.params, x_t, t))[:, label]
        plain = lambda x_t, t: jnp.zeros_like(x_t)  # what says nothing of the class
        return process.GUIDANCE["classifier"](plain, log_prob, 2.0, SCHEDULE)(x_t, t)

    t = jnp.linspace(0.4, 0.7, 32)
    x_t = SCHEDULE.sigma(t).reshape(-1, 1, 1, 1) * jax.random.normal(jax.random.key(2), (32, *SHAPE))  # of neither class
    for label in (0, 1):
        along = np.mean(np.asarray(guided(x_t, t, label)) * np.asarray(PICTURES[label]), (1, 2, 3))
        assert np.mean(along) > 0 and np.mean(along > 0) > 0.8


def test_another_number_of_classes_is_refused():
    with pytest.raises(UserError, match="3 classes.*num_classes=10"):
        classifying(Recorded(), image_shape=SHAPE, schedule=SCHEDULE, num_classes=10)
