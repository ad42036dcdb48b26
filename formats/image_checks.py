"""Guess from the values of stored images how they were normalised and packed."""

import torch

PACKS = (2, 4, 8)  # sub-images along each side of a stored image
PIXEL_SCALES = {"pixels in [0, 1]": 1.0, "pixels from 0 to 255": 255.0}
# Standard deviations: about 1.2 for normalised CIFAR-10 images, 0.5 for images in [-1, 1], 0.25
# for ZCA-whitened ones.
WHITENED_DEVIATION, ORDINARY_DEVIATION = 0.38, 0.9
SEAM_RATIO, SEAM_DEVIATIONS = 1.75, 4.0


def likely_space(images, zca=False):
    """What a list of images (N, C, H, W) probably holds, and its range, both as text.

    The first is "normalised images", a key of PIXEL_SCALES or another kind. zca: in doubt, they
    are whitened.
    """
    low, high = min(float(x.min()) for x in images), max(float(x.max()) for x in images)
    deviation = float(images[0].std())
    if low >= -1e-3:
        kind = "images without negative values"
        if high <= 1 + 1e-3:
            kind = "pixels in [0, 1]"
        elif 5 < high <= 255.5:
            kind = "pixels from 0 to 255"
    elif deviation < (ORDINARY_DEVIATION if zca else WHITENED_DEVIATION):
        kind = "ZCA-whitened images"
    elif low >= -1.001 and high <= 1.001:
        kind = "images in [-1, 1]"
    else:
        kind = "normalised images"
    return kind, f"from {low:.4g} to {high:.4g} (standard deviation {deviation:.2g})"


def seams(images):
    """How images (N, C, H, W) seem to be packed: (K, ratio), K of PACKS, or 1 without seams.

    ratio: the mean difference of neighbouring pixels across the seams that only K x K sub-images
    have, relative to that where no packing has any. CIFAR-10: 1.9 to 4.0 where packed, 0.9 to 1.3
    where not. Over the images it must also exceed 1 by SEAM_DEVIATIONS standard errors.
    """
    side, found = images.shape[-1], (1, 1.0)
    if images.shape[2] != side or side % (2 * PACKS[-1]):
        return found
    rows, columns = images.diff(dim=2).abs().mean((1, 3)), images.diff(dim=3).abs().mean((1, 2))
    differences = (rows + columns) / 2  # (N, side - 1)
    position = torch.arange(1, side)
    inside = differences[:, position % (side // PACKS[-1]) != 0].mean(1)
    for pack in PACKS:
        step = side // pack  # the odd multiples are seams of no coarser packing
        across = differences[:, (position % (2 * step) == step)].mean(1)
        ratio = float(across.mean() / inside.mean().clamp(min=1e-12))
        logs = ((across + 1e-6) / (inside + 1e-6)).log()
        deviation = logs.std(correction=0) / len(logs) ** 0.5
        if ratio > SEAM_RATIO and logs.mean() > SEAM_DEVIATIONS * deviation:
            found = (pack, ratio)
    return found
