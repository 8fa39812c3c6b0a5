"""Pipelines under several conditions and under a classifier, with nets whose answers are known."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax import api, process
from ldm_jax.systems.base import System, diffusion
from ldm_jax.systems.conditioners import CONDITIONERS
from ldm_jax.systems.conditions import Space
from ldm_jax.types import UserError

SHAPE = (4, 4, 1)
SPACE = Space(SHAPE, SHAPE, 2, {"vector": (2,)})
FLOW = process.SCHEDULES["rectified_flow"]()
DEFAULTS = {"name": "ddim", "steps": 8, "guidance": 1.0, "grid": "uniform"}


@dataclasses.dataclass(frozen=True)
class SumNet:
    """x0 is a constant: 0.2 and -0.2 for the two classes and 0 for none, plus the vector's sum, plus the mean of the picture given."""
    num_classes: int = 2
    vector_dim: int = 2
    concat_channels: int = 2

    def init(self, key):
        return {"w": jnp.ones(())}

    def apply(self, params, x_t, t, cond=None, train=False, rngs=None):
        x0 = jnp.array([0.2, -0.2, 0.0])[cond["class"]] + cond["vector"].sum(1) + cond["concat"][..., 1].mean((1, 2))
        return params["w"] * (x_t - x0.reshape(-1, 1, 1, 1)) / t.reshape(-1, 1, 1, 1)


def several(**drop):
    """A pipeline of class, vector and masked picture."""
    rows = {name: CONDITIONERS[name](SPACE, drop=drop.get(name, 0.1)) for name in ("class", "vector", "masked_image")}
    system = diffusion(SumNet(), image_shape=SHAPE, schedule=FLOW, parameterization="flow", conditioners=rows)
    return api.Pipeline(system, system.init(jax.random.key(0)), DEFAULTS)


def values(pipeline, **settings):
    """The constant of each picture, in [-1, 1]."""
    images = pipeline.sample(0, **settings)
    np.testing.assert_allclose(images, np.broadcast_to(images[:, :1, :1], images.shape), atol=1e-5)
    return images[:, 0, 0, 0] * 2 - 1


PICTURE = {"image": np.full((4, 4, 1), 0.6), "mask": np.array([[1, 1, 0, 0]] * 4)}  # 0.2 over half of the picture: a mean of 0.1
VECTOR = np.array([[0.1, 0.2], [0.0, -0.3]])


def test_conditions_are_given_by_name_and_what_is_left_out_is_null():
    pipeline = several()
    cond = {"class": [0, 1], "vector": VECTOR, "masked_image": PICTURE}
    np.testing.assert_allclose(values(pipeline, cond=cond), [0.6, -0.4], atol=1e-5)
    np.testing.assert_allclose(values(pipeline, cond={"vector": VECTOR}), [0.3, -0.3], atol=1e-5)
    np.testing.assert_allclose(values(pipeline, cond={"class": 1, "vector": VECTOR}, batch_size=1), [0.1, -0.5], atol=1e-5)
    np.testing.assert_allclose(values(pipeline, cond={"class": 0, "vector": None}, num=3), [0.2] * 3, atol=1e-5)
    np.testing.assert_allclose(values(pipeline, num=2), 0.0, atol=1e-5)


def test_guidance_keeps_what_training_never_dropped():
    """u has the masked picture, whose drop is 0, and neither class nor vector: u + s (c - u) is 0.1 + s (c - 0.1)."""
    pipeline = several(masked_image=0.0)
    cond = {"class": [0, 1], "vector": VECTOR, "masked_image": PICTURE}
    np.testing.assert_allclose(values(pipeline, cond=cond, guidance=[1.0, 1.5]), [0.6, 0.1 + 1.5 * -0.5], atol=1e-5)
    np.testing.assert_allclose(values(pipeline, cond={"masked_image": PICTURE, "class": 0}, guidance=2.0), [0.5], atol=1e-5)
    with pytest.raises(UserError, match="needs the condition 'masked_image'"):
        pipeline.sample(0, cond={"class": 0})
    with pytest.raises(UserError, match="guidance=2.0 needs a condition that training has dropped"):
        several(**{"masked_image": 0.0, "class": 0.0, "vector": 0.0}).sample(0, cond=cond, guidance=2.0)


@pytest.mark.parametrize("cond, says", [
    ([0, 1], "several conditions, class, masked_image, vector"),
    ({"size": 3}, "no condition 'size'; it takes: class, masked_image, vector"),
    ({"class": [0, 1], "vector": np.zeros((3, 2))}, "num=3"),
    ({"class": [2]}, "class id 2"),
])
def test_mistakes_are_named(cond, says):
    with pytest.raises(UserError, match=says):
        several().sample(0, cond=cond)


V = 0.5  # the data: two pictures, V and -V everywhere, equally likely


@dataclasses.dataclass(frozen=True)
class TwoPictures:
    """E[x0 | x_t] of that data without a condition; with S the sum over x_t, p(+V | x_t) = sigmoid(2 alpha V S / sigma^2)."""
    def init(self, key):
        return {"w": jnp.ones(())}

    def apply(self, params, x_t, t, cond=None, train=False, rngs=None):
        x0 = V * jnp.tanh(evidence(x_t, t)).reshape(-1, 1, 1, 1)
        return params["w"] * (x_t - x0) / t.reshape(-1, 1, 1, 1)


def evidence(x_t, t):
    return (1 - t) * V * x_t.sum((1, 2, 3)) / t**2


def judge(classes=2, shape=SHAPE):
    system = System(nets={}, trained=("classifier",), init=None, loss_fn=None, image_shape=shape, num_classes=classes,
                    classify=lambda params, x_t, t: params["gain"] * evidence(x_t, t)[:, None] * jnp.array([[1.0, -1.0]]))
    return api.Pipeline(system, {"gain": jnp.float32(1.0)}, {})


def unconditional():
    system = diffusion(TwoPictures(), image_shape=SHAPE, schedule=FLOW, parameterization="flow")
    return api.Pipeline(system, system.init(jax.random.key(0)), DEFAULTS)


def test_an_exact_classifier_makes_an_unconditional_model_conditional():
    pipeline, classifier = unconditional(), judge()
    free = pipeline.sample(0, num=5)[:, 0, 0, 0] * 2 - 1
    np.testing.assert_allclose(abs(free), V, atol=1e-3)
    for labels in (np.zeros(5, int), np.ones(5, int)):
        ends = values(pipeline, cond=labels, classifier=classifier)
        np.testing.assert_allclose(ends, V * (1 - 2 * labels), atol=1e-4)
        some = values(pipeline, cond=labels, classifier=classifier, classifier_scale=[1.0, 0.0, 0.0, 1.0, 0.0])
        np.testing.assert_allclose(some, [ends[0], *free[1:3], ends[3], free[4]], atol=1e-4)
    np.testing.assert_allclose(values(dataclasses.replace(pipeline, classifier=classifier), cond=labels), ends, atol=1e-5)


def test_neither_scale_nor_weights_of_the_classifier_compile_again():
    pipeline, classifier = unconditional(), judge()
    pipeline.sample(0, cond=[0, 1], classifier=classifier)
    before = pipeline._sample._cache_size()
    weaker = dataclasses.replace(classifier, params={"gain": jnp.float32(0.0)})
    assert np.abs(pipeline.sample(0, cond=[0, 1], classifier=weaker) - pipeline.sample(0, num=2)).max() < 1e-5
    pipeline.sample(0, cond=[0, 1], classifier=classifier, classifier_scale=3.0)
    assert pipeline._sample._cache_size() == before + 1  # the one without a classifier


def test_a_classifier_of_something_else_is_refused():
    pipeline = unconditional()
    for classifier, says in ((judge(shape=(2, 2, 4)), "sees x_t of shape \\(2, 2, 4\\), this model diffuses \\(4, 4, 1\\)"),
                             (pipeline, "given as classifier is none")):
        with pytest.raises(UserError, match=says):
            pipeline.sample(0, cond=[0], classifier=classifier)
    with pytest.raises(UserError, match="knows 3 classes, this model 2"):
        several().sample(0, cond={"class": 0}, classifier=judge(classes=3))
    with pytest.raises(UserError, match="the class of each picture"):
        pipeline.sample(0, num=2, classifier=judge())
    with pytest.raises(UserError, match="class id 2 is out of range; this model knows 0 to 1"):
        pipeline.sample(0, cond=[2], classifier=judge())
    with pytest.raises(UserError, match="takes no condition"):
        pipeline.sample(0, cond=[0])
    with pytest.raises(UserError, match="classifier_scale has shape"):
        pipeline.sample(0, cond=[0, 1], classifier=judge(), classifier_scale=[1.0, 2.0, 3.0])
    with pytest.raises(UserError, match="this is a classifier, which samples no pictures"):
        judge().sample(0)
