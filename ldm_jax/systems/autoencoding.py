"""The first stage of latent diffusion, trained as Rombach et al. 2022 (section 3.1, appendix G) and Esser et al. 2021 train it:

    L = |x - x'| + a P(x, x') + R(z) + w(t) lambda G(D(x')),        x' = decode(z)
    L_D = hinge of D(x) and D(x'),    from step `adversarial_start` on

|.| is the mean absolute error, P a perceptual distance, D a patch discriminator, lambda the adaptive weight from the gradients
of the decoder's last layer. R is kl_weight KL(q(z|x) || N(0, I)) per value of the picture, or, with a codebook, the codebook and
commitment terms of van den Oord et al. 2017. Every term is a mean over the values it compares, so weights do not change with size.

One gradient serves both players: D is held still in the autoencoder's terms and x' in D's.
"""
import math
from typing import Any, Callable, Optional

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.models import quantizer
from ldm_jax.models.autoencoder import LAST_LAYER
from ldm_jax.process.adversarial import ADVERSARIAL, adaptive_weight, r1
from ldm_jax.systems.base import System
from ldm_jax.types import Array, PyTree, UserError, example_keys, fold_in, lookup, to_signed

LATENT_BITS = 8  # what a value of a KL latent is rounded to where bytes are counted


def autoencoding(autoencoder: Any, *, image_shape, kl_weight: float = 1e-6, codebook_weight: float = 1.0, commitment: float = 0.25,
                 usage_decay: float = 0.99, restart_below: float = 0.02, perceptual: Any = None, perceptual_weight: float = 1.0,
                 read_arrays: Optional[Callable] = None,
                 discriminator: Any = None, adversarial: str = "hinge", adversarial_weight: float = 0.5,
                 adversarial_start: int = 0, adaptive: bool = True, r1_weight: float = 0.0) -> System:
    """Training of an autoencoder, named "autoencoder", and of its "discriminator" where there is one.

    Args:
      kl_weight: of the KL term; for an autoencoder without a codebook.
      codebook_weight, commitment: of the two terms of a codebook.
      usage_decay, restart_below: a code whose moving share of the latents falls below `restart_below` of the uniform share starts
        again from an encoder's output (see `models.quantizer.refresh`); 0 never restarts.
      perceptual: a distance of `models.features`, held fixed; None for none. read_arrays: reads the files it names.
      adversarial: a row of ADVERSARIAL. adversarial_start: the step from which the discriminator takes part.
      adaptive: multiply the generator's term by lambda (Esser et al. 2021, eq. 7).
      r1_weight: of the discriminator's gradient penalty on real pictures, r1_weight / 2 |grad D(x)|^2.
    """
    values, has_codes = float(np.prod(image_shape)), autoencoder.codes is not None
    game = lookup(ADVERSARIAL, adversarial, "adversarial loss")
    for name, value in (("kl_weight", kl_weight), ("perceptual_weight", perceptual_weight), ("commitment", commitment),
                        ("adversarial_weight", adversarial_weight), ("adversarial_start", adversarial_start), ("r1_weight", r1_weight)):
        if value < 0:
            raise UserError(f"{name}={value} of the first stage must not be negative")

    def init(key):
        made = {"autoencoder": autoencoder.init(fold_in(key, 0))}
        if perceptual is not None:
            made["perceptual"] = perceptual.init(fold_in(key, 1))
        if discriminator is not None:
            made["discriminator"] = discriminator.init(fold_in(key, 2))
            made["adversary"] = {"step": jnp.int32(0)}
        if has_codes:
            made["codes"] = {"usage": jnp.ones((autoencoder.codes,))}
        return made

    def encode(params, image, keys):
        """z, what of the loss depends on it [B], metrics and notes."""
        rngs = {"dropout": fold_in(keys[0], 1)}
        if has_codes:
            z = autoencoder.encode(params, image, True, rngs)
            codebook = params["codebook"]["embedding"]
            ids = quantizer.nearest(codebook, z)
            code_term, commit_term = quantizer.vq_losses(codebook, z, ids)
            counts, flat = quantizer.count(ids, autoencoder.codes), jax.lax.stop_gradient(z).reshape(-1, z.shape[-1])
            chosen = jax.random.randint(fold_in(keys[0], 2), (autoencoder.codes,), 0, len(flat))
            metrics = {"codebook": code_term, "commitment": commit_term, "perplexity": quantizer.perplexity(counts)}
            return z, codebook_weight * (code_term + commitment * commit_term), metrics, {"counts": counts, "candidates": flat[chosen]}
        mean, logvar = autoencoder.encode(params, image, True, rngs)
        kl = 0.5 * jnp.sum(mean**2 + jnp.expm1(logvar) - logvar, axis=(1, 2, 3))
        return autoencoder.draw(mean, logvar, fold_in(keys, 0)), kl_weight * kl / values, {"kl": kl}, {}

    def reconstruction(params, image, again):
        mae = jnp.mean(jnp.abs(image - again), axis=(1, 2, 3))
        if perceptual is None:
            return mae, {"mae": mae}
        far = perceptual.apply(params["perceptual"], image, again)
        return mae + perceptual_weight * far, {"mae": mae, "perceptual": far}

    def compete(params, image, z, again, rngs):
        """The adversarial terms [B] of both players, and metrics; all zero until `adversarial_start`."""
        still = jax.lax.stop_gradient
        judge, held = params["discriminator"], still(params["discriminator"])
        frozen, seen = still(params["autoencoder"]), still(again)
        _, pull = jax.vjp(lambda kernel: autoencoder.decode(_replace(frozen, LAST_LAYER, kernel), still(z), True, rngs),
                          _leaf(frozen, LAST_LAYER))

        def played(again):
            fooled = game.generator(discriminator.apply(held, again))
            weight = jnp.float32(1.0)
            if adaptive:
                of_rec, of_adv = (pull(jax.grad(lambda x: jnp.mean(term(x)))(seen)) for term in (
                    lambda x: reconstruction(params, image, x)[0], lambda x: game.generator(discriminator.apply(held, x))))
                weight = adaptive_weight(of_rec, of_adv)
            real, fake = discriminator.apply(judge, image), discriminator.apply(judge, seen)
            judged = game.discriminator(real, fake)
            metrics = {"adversarial": fooled, "adversarial_weight": weight, "discriminator": judged, "real": jnp.mean(real),
                       "fake": jnp.mean(fake)}
            loss = adversarial_weight * weight * fooled + judged
            if r1_weight:
                penalty = r1(lambda x: discriminator.apply(judge, x), image)
                loss, metrics = loss + 0.5 * r1_weight * penalty, {**metrics, "r1": penalty}
            return loss, metrics

        nothing = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(played, again))
        started = params["adversary"]["step"] >= adversarial_start
        return jax.lax.cond(started, played, lambda _: nothing, again)

    def loss_fn(params, batch, key):
        image = to_signed(batch["image"])
        keys = example_keys(key, image.shape[0])
        rngs = {"dropout": fold_in(keys[0], 3)}
        z, loss, metrics, notes = encode(params["autoencoder"], image, keys)
        again = autoencoder.decode(params["autoencoder"], z, True, rngs)
        error, terms = reconstruction(params, image, again)
        loss, metrics = loss + error, {**metrics, **terms}
        if discriminator is not None:
            term, played = compete(params, image, z, again, rngs)
            loss, metrics = loss + term, {**metrics, **played}
        psnr = 10 * jnp.log10(4.0 / jnp.mean((image - again) ** 2, axis=(1, 2, 3)))
        return loss, {**metrics, "psnr": psnr, "notes": notes}

    def refresh(params, notes):
        changed = {}
        if discriminator is not None:
            changed["adversary"] = {"step": params["adversary"]["step"] + 1}
        if has_codes:
            codebook, usage = quantizer.refresh(params["autoencoder"]["codebook"]["embedding"], params["codes"]["usage"], notes["counts"],
                                                notes["candidates"], decay=usage_decay, below=restart_below)
            changed["autoencoder"] = {**params["autoencoder"], "codebook": {"embedding": codebook}}
            changed["codes"] = {"usage": usage}
        return changed

    def reconstruct(params, image):
        mean = autoencoder.posterior(params["autoencoder"], image)[0]
        return autoencoder.decode(params["autoencoder"], mean if has_codes else rounded(mean, 2**LATENT_BITS))

    def codes(params, image):
        return quantizer.nearest(params["autoencoder"]["codebook"]["embedding"], autoencoder.posterior(params["autoencoder"], image)[0])

    nets = {"autoencoder": autoencoder, "perceptual": perceptual, "discriminator": discriminator}
    h, w, c = autoencoder.latent_shape
    return System(
        nets={name: net for name, net in nets.items() if net is not None}, init=init, loss_fn=loss_fn, refresh=refresh,
        trained=("autoencoder",) + (("discriminator",) if discriminator is not None else ()), image_shape=tuple(image_shape),
        read=None if perceptual is None else lambda: {"perceptual": perceptual.read(read_arrays)}, reconstruct=reconstruct,
        codes=codes if has_codes else None, kept=(h * w, math.log2(autoencoder.codes)) if has_codes else (h * w * c, LATENT_BITS))


def rounded(z: Array, levels: int) -> Array:
    """z [B, h, w, c] with each channel rounded to one of `levels` values, evenly spaced between its extremes over the batch."""
    low, high = (f(z, axis=(0, 1, 2), keepdims=True) for f in (jnp.min, jnp.max))
    step = jnp.maximum(high - low, 1e-12) / (levels - 1)
    return low + jnp.round((z - low) / step) * step


def _leaf(tree: PyTree, path) -> Any:
    for name in path:
        tree = tree[name]
    return tree


def _replace(tree: PyTree, path, value: Any) -> PyTree:
    return {**tree, path[0]: _replace(tree[path[0]], path[1:], value)} if path else value
