"""The measurements of one finished run, as a dict of numbers and as a table."""
from typing import Any, Callable, Dict, Mapping, Optional, Tuple

import numpy as np

from ldm_jax.evaluation.jpeg import within
from ldm_jax.evaluation.metrics import accuracy, fit_classifier, nearest_distance, psnr, ssim
from ldm_jax.evaluation.pictures import to_uint8

Images = Mapping[str, np.ndarray]

RATE = {  # the names, in tables and files, of what is measured of a first stage
    "values": "values kept of a picture", "of": "values that a picture has", "bytes": "bytes kept",
    "psnr": "mean PSNR of reconstructed test images (dB)", "ssim": "mean SSIM of the same", "jpeg_bytes": "bytes that JPEG takes",
    "jpeg_psnr": "mean PSNR of JPEG (dB)", "jpeg_ssim": "mean SSIM of JPEG",
}


def evaluate_samples(sample: Callable[[np.ndarray], np.ndarray], train: Images, test: Images, *, samples: int) -> Dict[str, float]:
    """How well class-conditional samples carry their class, can stand in for real data, and differ from it.

    Args:
      sample: class ids [N] -> pictures [N, H, W, C] in [0, 1].
      train, test: {"image": uint8 [N, H, W, C], "class": [N]} of real pictures; the classifier sees `train` only.
      samples: how many to draw, the classes in turn.
    """
    classes = int(max(train["class"].max(), test["class"].max())) + 1
    asked = np.arange(samples) % classes
    images = to_uint8(sample(asked))
    real = fit_classifier(train["image"], train["class"])
    imitation = fit_classifier(images, asked)
    return {
        "samples labelled as asked, by a classifier of real images": accuracy(real, images, asked),
        "real test images labelled right, by the same": accuracy(real, test["image"], test["class"]),
        "real test images labelled right, by a classifier of samples": accuracy(imitation, test["image"], test["class"]),
        "median distance of samples to the nearest training image": float(np.median(nearest_distance(images, train["image"]))),
        "median distance of real test images to the same": float(np.median(nearest_distance(test["image"], train["image"]))),
    }


def evaluate_reconstruction(again: np.ndarray, images: np.ndarray, *, kept: Tuple[int, float],
                            codes: Optional[np.ndarray] = None) -> Dict[str, float]:
    """What a first stage keeps of real pictures, beside JPEG at as many bytes (its headers and tables not counted).

    Args:
      again: the pictures `images`, uint8 [N, H, W, C], as they come back, in [0, 1].
      kept: how many values it keeps of a picture, and of how many bits each.
      codes: the codes of each picture, where these are what it keeps.
    """
    count, bits = kept
    again, size = to_uint8(again), count * bits / 8
    used, jpeg = within(images, size)
    measured = {
        "values": count, "of": int(np.prod(images.shape[1:])), "bytes": size,
        "psnr": float(np.mean(psnr(again, images))), "ssim": float(np.mean(ssim(again, images))),
        "jpeg_bytes": used, "jpeg_psnr": float(np.mean(psnr(jpeg, images))), "jpeg_ssim": float(np.mean(ssim(jpeg, images))),
    }
    values = {name: measured[short] for short, name in RATE.items()}
    if codes is not None:
        counts = np.bincount(codes.ravel())
        p = counts[counts > 0] / codes.size
        values.update({"codes in use": len(p), "their perplexity": float(np.exp(-np.sum(p * np.log(p))))})
    return values


def table(values: Mapping[str, Any]) -> str:
    """The numbers, one a line, aligned."""
    width = max(map(len, values))
    return "\n".join(f"{name:<{width}}  {value:.4g}" if isinstance(value, float) else f"{name:<{width}}  {value}"
                     for name, value in values.items())
