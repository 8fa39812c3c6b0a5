"""Pictures of the process, from the tables themselves:  python -m ldm_jax.process.gallery --out=DIR

    schedules.png     alpha, sigma and logsnr of every row of SCHEDULES
    samplers.png      error against network calls of every row of SAMPLERS, on data whose denoiser is known
    trajectories.png  paths from noise to that data, in two dimensions

Deterministic methods are compared with the exact end of the flow from the same noise, by the median distance; random ones with
the data's distribution, by the sliced Wasserstein distance, which a finite sample of the data itself does not bring to zero.
"""
import argparse
import functools
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.process.samplers import SAMPLERS, make_sampler, prior, sample
from ldm_jax.process.schedules import SCHEDULES, Schedule
from ldm_jax.types import Denoise, UserError, expand

WEIGHTS, SCALE = np.array([0.3, 0.3, 0.4]), 0.15  # the data: a mixture of three round Gaussians
MEANS = np.array([[1.4, 0.2], [-0.9, 1.1], [-0.3, -1.2]])
CALLS = (4, 8, 12, 16, 24, 32, 48, 64)
REFERENCE = "ode"  # chooses its own steps: the exact flow for the others


def denoiser_of_mixture(schedule: Schedule) -> Denoise:
    """denoise(x_t [B, 2], t [B]) -> E[x0 | x_t]: each component's answer, weighted by its posterior probability."""
    means, logits = jnp.asarray(MEANS, jnp.float32), jnp.asarray(np.log(WEIGHTS), jnp.float32)

    def denoise(x_t, t):
        a, s = expand(schedule.alpha(t), x_t), expand(schedule.sigma(t), x_t)  # [B, 1]
        variance = (a * SCALE) ** 2 + s**2
        residual = x_t[:, None] - a[..., None] * means[None]  # [B, K, 2]
        posterior = jax.nn.softmax(logits[None] - 0.5 * jnp.sum(residual**2, -1) / variance, -1)
        x0 = means[None] + (a * SCALE**2 / variance)[..., None] * residual
        return jnp.sum(posterior[..., None] * x0, 1)

    return denoise


def draw_mixture(rng: np.random.Generator, n: int) -> np.ndarray:
    """n draws of the data, [n, 2]."""
    return MEANS[rng.choice(len(WEIGHTS), n, p=WEIGHTS)] + SCALE * rng.normal(size=(n, 2))


def sliced_distance(x: np.ndarray, y: np.ndarray, directions: int = 32) -> float:
    """The Wasserstein-1 distance of projections, averaged over directions; x [n, 2], y [m, 2]."""
    angle = np.pi * (np.arange(directions) + 0.5) / directions
    rays = np.stack([np.cos(angle), np.sin(angle)])
    level = (np.arange(1000) + 0.5) / 1000
    return float(np.mean(np.abs(np.quantile(x @ rays, level, axis=0) - np.quantile(y @ rays, level, axis=0))))


def sampling_errors(schedule: Schedule, n: int, grid: str = "logsnr_uniform") -> dict:
    """name -> (deterministic, calls [k], errors [k]) of every sampler that runs from noise to data in steps of its own number."""
    denoise, rng = denoiser_of_mixture(schedule), np.random.default_rng(0)
    x = prior(schedule, jax.random.key(0), (n, 2))
    data = draw_mixture(rng, 50 * n)
    exact = np.asarray(sample(denoise, schedule, x, jax.random.key(1), sampler=REFERENCE, steps=1, rtol=1e-7, atol=1e-7))
    errors = {}
    for name in SAMPLERS:
        made = make_sampler(name)
        if name == REFERENCE or made.upwards:
            continue
        steps = sorted({max(calls // made.calls, 1) for calls in CALLS})
        run = jax.jit(functools.partial(sample, denoise, schedule, sampler=made, grid=grid, capacity=max(steps)))
        ends = [np.asarray(run(x, jax.random.key(1), steps=count)) for count in steps]
        known = made.order is not None
        error = [np.median(np.linalg.norm(end - exact, axis=1)) if known else sliced_distance(end, data) for end in ends]
        errors[name] = (known, [count * made.calls for count in steps], error)
    floor = np.mean([sliced_distance(draw_mixture(rng, n), data) for _ in range(16)])
    errors["(the data)"] = (False, list(CALLS), [floor] * len(CALLS))
    return errors


def _style(i: int) -> dict:
    return {"color": f"C{i % 10}", "linestyle": ("-", "--", ":")[i // 10 % 3], "linewidth": 1.5}


def draw_schedules(plt):
    """alpha, sigma and logsnr of every schedule."""
    figure, axes = plt.subplots(1, 3, figsize=(15, 5), layout="constrained")
    t = jnp.linspace(0.0, 1.0, 501)
    for i, (name, row) in enumerate(SCHEDULES.items()):
        schedule = row()
        for axis, value in zip(axes, (schedule.alpha(t), schedule.sigma(t), schedule.logsnr(t))):
            axis.plot(t, value, label=name, **_style(i))
    for axis, title in zip(axes, (r"$\alpha(t)$", r"$\sigma(t)$", r"$\log\,\mathrm{SNR}(t)$")):
        axis.set(title=title, xlabel="t")
        axis.grid(alpha=0.3)
    axes[1].set_ylim(-0.03, 1.5)  # the exploding ones leave the picture
    axes[2].set_ylim(-16, 16)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=9)
    return figure


def draw_samplers(plt, n: int):
    """Error against network calls, deterministic methods on the left, random ones on the right."""
    figure, axes = plt.subplots(1, 2, figsize=(15, 5), layout="constrained")
    places = [0, 0]
    for name, (known, calls, error) in sampling_errors(SCHEDULES["vp_sde"](), n).items():
        side = 0 if known else 1
        style = _style(places[side]) if calls and not name.startswith("(") else {"color": "black", "linestyle": ":"}
        axes[side].plot(calls, error, marker="." if not name.startswith("(") else None, label=name, **style)
        places[side] += 1
    titles = ("deterministic: median distance to the exact end of the flow", "random: sliced Wasserstein distance to the data")
    for axis, title in zip(axes, titles):
        axis.set(title=title, xlabel="network calls", xscale="log", yscale="log", xticks=CALLS, xticklabels=CALLS)
        axis.set_ylim(top=2.0)  # the data's own size: what lies above has missed it
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def draw_trajectories(plt, paths: int = 24):
    """Paths of a few samples under two processes and four methods, over the data."""
    panels = [("vp_sde", "ddim", 100), ("rectified_flow", "ddim", 100), ("vp_sde", "dpmpp_2m", 8), ("vp_sde", "ddpm", 100)]
    figure, axes = plt.subplots(1, len(panels), figsize=(16, 4.3), layout="constrained", sharex=True, sharey=True)
    data = draw_mixture(np.random.default_rng(0), 3000)
    for axis, (schedule, sampler, steps) in zip(axes, panels):
        made = SCHEDULES[schedule]()
        x = prior(made, jax.random.key(2), (paths, 2))
        _, visited = sample(denoiser_of_mixture(made), made, x, jax.random.key(3), sampler=sampler, steps=steps, trajectory=True,
                            grid="karras" if steps < 20 else "uniform")
        path = np.asarray(visited["x"])
        axis.scatter(*data.T, s=2, color="0.8", linewidths=0)
        axis.plot(path[..., 0], path[..., 1], color="C0", linewidth=0.8, alpha=0.8, marker="." if steps < 20 else None)
        axis.scatter(*path[0].T, s=14, color="C7", label="t = 1", zorder=3)
        axis.scatter(*path[-1].T, s=14, color="C3", label="t = 0", zorder=3)
        axis.set(title=f"{schedule}, {sampler}, {steps} steps", xlim=(-3, 3), ylim=(-3, 3), aspect="equal")
    axes[0].legend(loc="upper right", fontsize=9)
    return figure


def draw_all(out: str, n: int = 2000) -> list:
    """The three pictures as files in `out`; n samples measure each sampler. Returns their paths.

    Raises:
      UserError: where matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("the gallery needs matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    os.makedirs(out, exist_ok=True)
    paths, pictures = [], {"schedules": draw_schedules, "samplers": functools.partial(draw_samplers, n=n),
                           "trajectories": draw_trajectories}
    for name, draw in pictures.items():
        figure = draw(plt)
        paths.append(os.path.join(out, f"{name}.png"))
        figure.savefig(paths[-1], dpi=110)
        plt.close(figure)
    return paths


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0].split(":  ")[0])
    parser.add_argument("--out", required=True, help="folder for the pictures")
    parser.add_argument("--samples", type=int, default=2000, help="samples that measure each sampler")
    args = parser.parse_args(argv)
    try:
        print("\n".join(draw_all(args.out, args.samples)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
