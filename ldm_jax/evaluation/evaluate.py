"""The measurements of one finished run, as a dict of numbers and as a table."""
from typing import Any, Callable, Dict, Mapping

import numpy as np

from ldm_jax.evaluation.metrics import accuracy, fit_classifier, nearest_distance, psnr
from ldm_jax.evaluation.pictures import to_uint8

Images = Mapping[str, np.ndarray]


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


def evaluate_reconstruction(reconstruct: Callable[[np.ndarray], np.ndarray], test: Images) -> Dict[str, float]:
    """What a first stage keeps of real pictures. reconstruct: uint8 images -> [0, 1]."""
    return {"mean PSNR of reconstructed test images (dB)": float(np.mean(psnr(to_uint8(reconstruct(test["image"])), test["image"])))}


def table(values: Mapping[str, Any]) -> str:
    """The numbers, one a line, aligned."""
    width = max(map(len, values))
    return "\n".join(f"{name:<{width}}  {value:.4g}" if isinstance(value, float) else f"{name:<{width}}  {value}"
                     for name, value in values.items())
