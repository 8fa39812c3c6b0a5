"""The first stage's loss: each term against its formula, and each player's gradient against the gradient of its own loss alone."""
import dataclasses
from typing import Optional

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ldm_jax.models import PERCEPTUALS, quantizer
from ldm_jax.process.adversarial import ADVERSARIAL, r1
from ldm_jax.systems.autoencoding import autoencoding, rounded
from ldm_jax.training.loop import train_step
from ldm_jax.training.state import by_name, new_state
from ldm_jax.types import UserError, fold_in, normal

SHAPE, LATENT = (4, 4, 1), (2, 2, 3)
IMAGE = np.random.default_rng(0).uniform(-1, 1, (5, *SHAPE)).astype(np.float32)
KEYS = jax.random.split(jax.random.key(7), 5)


@dataclasses.dataclass(frozen=True)
class Linear:
    """An autoencoder of two matrices on 2x2 patches; with `codes` the decoder quantises first, straight-through."""
    codes: Optional[int] = None
    latent_shape = LATENT

    def init(self, key):
        k = jax.random.split(key, 4)
        params = {"encoder": {"kernel": jax.random.normal(k[0], (4, 3))}, "logvar": jax.random.normal(k[1], (3,)) - 3.0,
                  "decoder": {"hidden": {"kernel": jax.random.normal(k[2], (3, 6))},
                              "conv_out": {"kernel": jax.random.normal(k[3], (6, 4))}}}
        return {**params, "codebook": {"embedding": jax.random.normal(key, (self.codes, 3))}} if self.codes else params

    def encode(self, params, x, train=False, rngs=None):
        patches = x.reshape(-1, 2, 2, 2, 2, 1).transpose(0, 1, 3, 2, 4, 5).reshape(-1, 2, 2, 4)
        z = patches @ params["encoder"]["kernel"]
        return z if self.codes else (z, jnp.broadcast_to(params["logvar"].reshape(1, 1, 1, 3), z.shape))

    def posterior(self, params, x):
        out = self.encode(params, x)
        return (out, jnp.full_like(out, -1e4)) if self.codes else out

    def draw(self, mean, logvar, key):
        return mean + jnp.exp(0.5 * logvar) * normal(key, mean.shape)

    def decode(self, params, z, train=False, rngs=None):
        if self.codes:
            z, _ = quantizer.quantize(params["codebook"]["embedding"], z)
        y = jnp.tanh(z @ params["decoder"]["hidden"]["kernel"]) @ params["decoder"]["conv_out"]["kernel"]
        return y.reshape(-1, 2, 2, 2, 2, 1).transpose(0, 1, 3, 2, 4, 5).reshape(-1, 4, 4, 1)


@dataclasses.dataclass(frozen=True)
class Judge:
    """One logit for each row of the picture."""
    def init(self, key):
        return {"kernel": jax.random.normal(key, (4, 2))}

    def apply(self, params, image):
        return jnp.tanh(image[..., 0] @ params["kernel"]).sum(-1, keepdims=True) * 0.7


def build(codes=None, **options):
    return autoencoding(Linear(codes), image_shape=SHAPE, **options)


def gradients(system, params, image=IMAGE):
    def mean(mine):
        loss, metrics = system.loss_fn({**params, **mine}, {"image": jnp.asarray(image)}, KEYS)
        return jnp.mean(loss), metrics

    (loss, metrics), grads = jax.jit(jax.value_and_grad(mean, has_aux=True))({name: params[name] for name in system.trained})
    return loss, metrics, grads


def test_reconstruction_and_kl_terms():
    system = build(kl_weight=0.1)
    params = system.init(jax.random.key(0))
    loss, metrics = system.loss_fn(params, {"image": jnp.asarray(IMAGE)}, KEYS)
    mean, logvar = (np.asarray(a, np.float64) for a in Linear().encode(params["autoencoder"], jnp.asarray(IMAGE)))
    z = mean + np.exp(logvar / 2) * np.asarray(normal(fold_in(KEYS, 0), mean.shape))
    error = IMAGE - np.asarray(Linear().decode(params["autoencoder"], jnp.asarray(z, jnp.float32)), np.float64)
    mae, kl = np.abs(error).mean((1, 2, 3)), 0.5 * (mean**2 + np.exp(logvar) - 1 - logvar).sum((1, 2, 3))
    np.testing.assert_allclose(metrics["mae"], mae, rtol=1e-4)
    np.testing.assert_allclose(metrics["kl"], kl, rtol=1e-4)
    np.testing.assert_allclose(metrics["psnr"], 10 * np.log10(4 / (error**2).mean((1, 2, 3))), rtol=1e-4)
    np.testing.assert_allclose(loss, mae + 0.1 * kl / 16, rtol=1e-4)


def test_codebook_terms_and_the_straight_through_gradient():
    """The encoder's gradient is the decoder's at the codes, passed on, and the commitment's; the codes' is their own term's alone."""
    system = build(codes=6, codebook_weight=2.0, commitment=0.5)
    params = system.init(jax.random.key(1))
    loss, metrics, grads = gradients(system, params)
    ae, codebook = params["autoencoder"], np.asarray(params["autoencoder"]["codebook"]["embedding"], np.float64)
    z = np.asarray(Linear(6).encode(ae, jnp.asarray(IMAGE)), np.float64)
    ids = np.argmin(((z[..., None, :] - codebook) ** 2).sum(-1), -1)
    e = codebook[ids]
    far = ((z - e) ** 2).mean((1, 2, 3))
    np.testing.assert_allclose(metrics["codebook"], far, rtol=1e-4)
    np.testing.assert_allclose(metrics["commitment"], far, rtol=1e-4)
    plain = lambda z: Linear().decode(ae, z)
    np.testing.assert_allclose(loss, np.abs(IMAGE - plain(jnp.asarray(e, jnp.float32))).mean() + 3.0 * far.mean(), rtol=1e-4)

    of_codes = np.zeros_like(codebook)
    np.add.at(of_codes, ids.ravel(), (2.0 * 2 * (e - z) / e.size).reshape(-1, 3))
    np.testing.assert_allclose(grads["autoencoder"]["codebook"]["embedding"], of_codes, rtol=1e-3, atol=1e-6)
    pulled = jax.grad(lambda z: jnp.mean(jnp.abs(IMAGE - plain(z))))(jnp.asarray(e, jnp.float32)) + 2.0 * 0.5 * 2 * (z - e) / e.size
    patches = IMAGE.reshape(-1, 2, 2, 2, 2, 1).transpose(0, 1, 3, 2, 4, 5).reshape(-1, 4)
    of_encoder = patches.T @ np.asarray(pulled).reshape(-1, 3)
    np.testing.assert_allclose(grads["autoencoder"]["encoder"]["kernel"], of_encoder, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("adversarial", sorted(ADVERSARIAL))
def test_each_player_has_its_own_gradient(adversarial):
    """Against the two losses differentiated one by one, as two optimisers would; lambda from the whole gradient of the last layer."""
    system = build(perceptual=PERCEPTUALS["laplacian"](), perceptual_weight=0.3, discriminator=Judge(), adversarial=adversarial,
                   adversarial_weight=0.8, r1_weight=0.4, kl_weight=0.0)
    params = system.init(jax.random.key(2))
    loss, metrics, grads = gradients(system, params)
    game, ae, judge = ADVERSARIAL[adversarial], params["autoencoder"], params["discriminator"]
    z = lambda ae: Linear().draw(*Linear().encode(ae, jnp.asarray(IMAGE)), fold_in(KEYS, 0))
    again = lambda ae: Linear().decode(ae, z(ae))

    def reconstruction(ae):
        return jnp.mean(jnp.abs(IMAGE - again(ae))) + 0.3 * jnp.mean(PERCEPTUALS["laplacian"]().apply({}, jnp.asarray(IMAGE), again(ae)))

    def fooling(ae):
        return jnp.mean(game.generator(Judge().apply(judge, again(ae))))

    def judging(judge):
        real, fake = Judge().apply(judge, jnp.asarray(IMAGE)), Judge().apply(judge, again(ae))
        return jnp.mean(game.discriminator(real, fake)) + 0.2 * jnp.mean(r1(lambda x: Judge().apply(judge, x), jnp.asarray(IMAGE)))

    of_rec, of_fool, of_judge = jax.grad(reconstruction)(ae), jax.grad(fooling)(ae), jax.grad(judging)(judge)
    norm = lambda tree: float(jnp.linalg.norm(tree["decoder"]["conv_out"]["kernel"]))
    weight = norm(of_rec) / (norm(of_fool) + 1e-4)
    np.testing.assert_allclose(metrics["adversarial_weight"], weight, rtol=1e-3)
    want = jax.tree.map(lambda a, b: a + 0.8 * weight * b, of_rec, of_fool)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-5), grads["autoencoder"], want)
    np.testing.assert_allclose(grads["discriminator"]["kernel"], of_judge["kernel"], rtol=1e-3, atol=1e-6)


def test_the_discriminator_starts_late_and_has_an_optimiser_of_its_own():
    system = build(discriminator=Judge(), adversarial_start=2)
    params = system.init(jax.random.key(3))
    tx = by_name(optax.sgd(0.01), {"discriminator": optax.sgd(0.5)})
    state, steps = new_state(params, system.trained, tx), [params["discriminator"]["kernel"]]
    update = jax.jit(train_step(system.loss_fn, tx, ema_decay=0.9, refresh=system.refresh))
    for _ in range(3):
        before = state
        state, metrics = update(state, {"image": jnp.asarray(IMAGE)}, jax.random.key(0))
        steps.append(state.params["discriminator"]["kernel"])
    assert np.all(steps[0] == steps[2]) and np.any(steps[2] != steps[3])
    assert state.others["adversary"]["step"] == 3 and metrics["discriminator"] > 0
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(jax.random.key(0), 2), jnp.arange(5))
    mine = lambda p: jnp.mean(system.loss_fn({**before.others, **p}, {"image": jnp.asarray(IMAGE)}, keys)[0])
    grads = jax.jit(jax.grad(mine))(before.params)
    for name, rate in (("discriminator", 0.5), ("autoencoder", 0.01)):
        moved = jax.tree.map(lambda a, b: (a - b) / -rate, state.params[name], before.params[name])
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=5e-3, atol=2e-4), moved, grads[name])


def test_dead_codes_start_again_from_encoder_outputs():
    system = build(codes=6, usage_decay=0.5, restart_below=0.3)
    params = system.init(jax.random.key(4))
    far = params["autoencoder"]["codebook"]["embedding"].at[3].set(100.0)
    params["autoencoder"]["codebook"]["embedding"] = far
    state = new_state(params, system.trained, optax.sgd(0.0))
    update = jax.jit(train_step(system.loss_fn, optax.sgd(0.0), ema_decay=0.9, refresh=system.refresh))
    z = np.asarray(Linear(6).encode(params["autoencoder"], jnp.asarray(IMAGE))).reshape(-1, 3)
    for usage in (0.5, 1.0):  # halved once, then below 0.3, started again
        state, _ = update(state, {"image": jnp.asarray(IMAGE)}, jax.random.key(0))
        assert state.others["codes"]["usage"][3] == usage
    assert np.abs(z - np.asarray(state.params["autoencoder"]["codebook"]["embedding"][3])).max(-1).min() < 1e-6


def test_rounding_to_levels():
    z = np.random.default_rng(1).normal(size=(6, 2, 2, 3)).astype(np.float32)
    out = np.asarray(rounded(jnp.asarray(z), 256))
    assert all(len(np.unique(out[..., c])) <= 256 for c in range(3))
    assert np.abs(out - z).max() <= (z.max((0, 1, 2)) - z.min((0, 1, 2))).max() / 255 / 2 * 1.001
    assert len(np.unique(np.asarray(rounded(jnp.asarray(z), 2))[..., 0])) == 2


def test_what_it_keeps_is_stated():
    assert build().kept == (12, 8) and build(codes=32).kept == (4, 5.0)
    with pytest.raises(UserError, match="r1_weight=-1"):
        build(discriminator=Judge(), r1_weight=-1.0)
    with pytest.raises(UserError, match="wgan.*hinge"):
        build(discriminator=Judge(), adversarial="wgan")
