"""What generated pictures are worth, measured with real ones: by classifiers of scikit-learn, and by distances."""
from typing import Any

import numpy as np


def _flat(images: np.ndarray) -> np.ndarray:
    """Images, uint8 or float in [0, 1], as float32 vectors in [0, 1]."""
    images = np.asarray(images)
    unit = images.astype(np.float32) / 255.0 if images.dtype == np.uint8 else images.astype(np.float32)
    return unit.reshape(len(images), -1)


def fit_classifier(images: np.ndarray, labels: np.ndarray) -> Any:
    """A support vector machine with a radial kernel on the pixels."""
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVC
    return make_pipeline(StandardScaler(with_std=False), SVC(C=10.0, gamma="scale")).fit(_flat(images), labels)


def accuracy(classifier: Any, images: np.ndarray, labels: np.ndarray) -> float:
    """The fraction of images that the classifier gives their label."""
    return float(np.mean(classifier.predict(_flat(images)) == np.asarray(labels)))


def nearest_distance(images: np.ndarray, references: np.ndarray, chunk: int = 256) -> np.ndarray:
    """The root-mean-square distance per value from each image to the nearest reference, [N], in units of the range [0, 1]."""
    a, b = _flat(images).astype(np.float64), _flat(references).astype(np.float64)
    b2 = np.sum(b**2, 1)
    squared = [np.min(np.sum(part**2, 1)[:, None] - 2 * part @ b.T + b2[None], 1) for part in np.array_split(a, -(-len(a) // chunk))]
    return np.sqrt(np.maximum(np.concatenate(squared), 0.0) / a.shape[1])


def psnr(images: np.ndarray, references: np.ndarray) -> np.ndarray:
    """10 log10(1 / mse) of each image against its reference, [N], in dB."""
    mse = np.mean((_flat(images).astype(np.float64) - _flat(references)) ** 2, axis=1)
    return -10.0 * np.log10(np.maximum(mse, 1e-12))
