"""What generated pictures are worth, measured with real ones: by classifiers of scikit-learn, and by distances."""
from typing import Any

import numpy as np

from ldm_jax.types import UserError


def _unit(images: np.ndarray) -> np.ndarray:
    """Images, uint8 or float in [0, 1], as float32 in [0, 1]."""
    images = np.asarray(images)
    return images.astype(np.float32) / 255.0 if images.dtype == np.uint8 else images.astype(np.float32)


def _flat(images: np.ndarray) -> np.ndarray:
    """Images as float32 vectors in [0, 1]."""
    return _unit(images).reshape(len(images), -1)


def fit_classifier(images: np.ndarray, labels: np.ndarray) -> Any:
    """A support vector machine with a radial kernel on the pixels, of which the first 100 principal components where there are more."""
    from sklearn.decomposition import PCA
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVC
    x = _flat(images)
    shorten = [PCA(100, random_state=0)] if min(x.shape) > 100 else []
    return make_pipeline(StandardScaler(with_std=False), *shorten, SVC(C=10.0, gamma="scale")).fit(x, labels)


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


def ssim(images: np.ndarray, references: np.ndarray) -> np.ndarray:
    """The structural similarity of each image [N, H, W, C] and its reference, [N], 1 for equal ones (Wang et al. 2004):

        (2 mu_x mu_y + C1) (2 cov_xy + C2) / ((mu_x^2 + mu_y^2 + C1) (var_x + var_y + C2)),    C1 = 0.01^2, C2 = 0.03^2

    with means, variances and covariance under an 11x11 Gaussian window of standard deviation 1.5 whose weights sum to one,
    averaged over the positions where the window fits and over the channels.

    Raises:
      UserError: for images smaller than the window.
    """
    from scipy.ndimage import correlate1d
    x, y = (_unit(a).astype(np.float64) for a in (images, references))
    if min(x.shape[1:3]) < 11:
        raise UserError(f"SSIM compares windows of 11x11 and the images are {x.shape[1]}x{x.shape[2]}; give larger ones")
    window = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    window /= window.sum()
    mean = lambda a: correlate1d(correlate1d(a, window, 1), window, 2)[:, 5:-5, 5:-5]
    mu_x, mu_y = mean(x), mean(y)
    var_x, var_y, cov = mean(x * x) - mu_x**2, mean(y * y) - mu_y**2, mean(x * y) - mu_x * mu_y
    C1, C2 = 0.01**2, 0.03**2
    index = (2 * mu_x * mu_y + C1) * (2 * cov + C2) / ((mu_x**2 + mu_y**2 + C1) * (var_x + var_y + C2))
    return index.mean((1, 2, 3))
