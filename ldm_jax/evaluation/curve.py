"""First stages side by side, what they keep against what they lose:

    python -m ldm_jax.evaluation.curve --out=curve.png RUN [RUN ...]

RUN is the workdir of a first stage with an eval.json. Prints a table, and draws PSNR and SSIM on test images against the bytes kept,
with JPEG at as many bytes as the reference line.
"""
import argparse
import json
import os
import sys
from typing import Any, Dict, List, Mapping, Sequence

from ldm_jax import paths
from ldm_jax.evaluation.evaluate import RATE
from ldm_jax.types import UserError


def read(run: str) -> Dict[str, Any]:
    """A first stage's measurements and the name of its kind.

    Raises:
      UserError: where `run` holds none.
    """
    try:
        values, config = (json.loads(paths.read_text(os.path.join(run, name))) for name in ("eval.json", "config.json"))
        kind = config["autoencoder"]["name"]
        return {"run": run, "kind": kind, **{short: values[name] for short, name in RATE.items()}}
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{run!r} holds no measured first stage ({error}); train one, or measure it: "
                        f"python -m ldm_jax.main --workdir={run} --mode=eval") from error


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as Markdown, fewest bytes first."""
    lines = ["| first stage | values kept | bytes | PSNR | SSIM | JPEG: bytes | PSNR | SSIM |", "|---|---|---|---|---|---|---|---|"]
    lines += [f"| {r['run']} | {r['values']} {'codes' if r['kind'] == 'vq' else 'numbers'} | {r['bytes']:.0f} | {r['psnr']:.1f} | "
              f"{r['ssim']:.3f} | {r['jpeg_bytes']:.0f} | {r['jpeg_psnr']:.1f} | {r['jpeg_ssim']:.3f} |" for r in rows]
    return "\n".join(lines)


def draw(plt: Any, rows: Sequence[Mapping[str, Any]]) -> Any:
    """PSNR and SSIM of each kind of first stage, and of JPEG, against bytes."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    jpeg = sorted(rows, key=lambda r: r["jpeg_bytes"])
    for axis, name, label in zip(axes, ("psnr", "ssim"), ("PSNR (dB)", "SSIM")):
        axis.plot([r["jpeg_bytes"] for r in jpeg], [r[f"jpeg_{name}"] for r in jpeg], "k--", label="JPEG, headers not counted")
        for kind in sorted({r["kind"] for r in rows}):
            mine = [r for r in rows if r["kind"] == kind]
            axis.plot([r["bytes"] for r in mine], [r[name] for r in mine], "o-", label=kind.upper())
            for r in mine:
                axis.annotate(r["values"], (r["bytes"], r[name]), textcoords="offset points", xytext=(4, -12), fontsize=8)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:.0f}")
        axis.set(xlabel="bytes kept (beside the points: values)", ylabel=label)
        axis.grid(alpha=0.3)
    axes[0].legend()
    return figure


def main(argv: Sequence[str] = None) -> int:
    parser = argparse.ArgumentParser(description="First stages side by side, with JPEG as the reference.")
    parser.add_argument("--out", required=True, help="the picture, a PNG file")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="workdirs of first stages")
    args = parser.parse_args(argv)
    try:
        rows: List[Dict[str, Any]] = sorted(map(read, args.runs), key=lambda r: (r["kind"], r["bytes"]))
        try:
            import matplotlib
        except ImportError as error:
            raise UserError("the curve needs matplotlib: pip install matplotlib") from error
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        print(table(rows))
        with paths.new_file(args.out) as out:
            draw(plt, rows).savefig(out, dpi=110, format=os.path.splitext(args.out)[1][1:] or "png")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
