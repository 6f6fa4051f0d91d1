"""Scikit-learn's handwritten digits as 32x32 images: real data with no download, for trying."""

import numpy as np
import torch
from torch.nn.functional import interpolate

from experiments.data.images import SIZE, ImageData, image_data

TEST_IMAGES = 360  # of 1797
SPLIT_SEED = 1998


def load_digits(augment: bool = False, validation: int = 0) -> ImageData:
    """The 1797 digits, 8x8 grey, enlarged bilinearly to three equal channels of 32x32.

    A fixed split: 1437 to train, 360 to test. augment: random crops (digits are never mirrored).
    Raises UserError if `validation` is not smaller than the training set.
    """
    from sklearn.datasets import load_digits as load_sklearn_digits

    digits = load_sklearn_digits()
    grey = torch.from_numpy(digits.images.astype(np.float32)) * (255 / 16)  # (N, 8, 8), 0..255
    large = interpolate(grey[:, None], size=(SIZE, SIZE), mode="bilinear")  # (N, 1, 32, 32)
    images = large.round().to(torch.uint8).repeat(1, 3, 1, 1)  # (N, 3, 32, 32)
    labels = torch.from_numpy(digits.target.astype(np.int64))  # (N,)

    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SPLIT_SEED))
    train, test = order[:-TEST_IMAGES], order[-TEST_IMAGES:]
    splits = [(images[rows], labels[rows]) for rows in (train, test)]
    return image_data("digits", *splits, 10, validation, augment, False)
