"""Differentiable siamese augmentation (DSA), and packing of several images into one.

`dsa_draw` draws one operation and its parameters, `dsa_apply` applies them. Siamese: the same draw,
for all images, is applied to two batches. Source: SPEC 1.3, 1.4; Zhao and Bilen, "Dataset
Condensation with Differentiable Siamese Augmentation", ICML 2021.
"""
import argparse
import math

import torch
import torch.nn.functional as F

from runtime.compilation import disable_tf32
from runtime.device import to_device_packed

# Strengths. Source: SPEC 1.4.
BRIGHTNESS = 1.0  # width of the interval of the additive term, normalised units
SATURATION = 2.0  # largest factor
CONTRAST = 0.5  # smallest factor; the interval has width 1
CROP = 0.125  # largest shift, share of the image side
CUTOUT = 0.5  # side of the square, share of the image side
SCALE = 1.2  # largest zoom, and inverse of the smallest
ROTATE = 15.0  # largest angle, degrees


# ------------------------------------------------------------------------------------ operations
# x: (N, C, H, W). Parameters: (n, ...) with n = 1 or N.
def _per_image(values):
    return values.view(-1, 1, 1, 1)  # (n,) -> (n, 1, 1, 1)


def _color(x, u):
    x = x + _per_image((u[:, 0] - 0.5) * BRIGHTNESS)
    grey = x.mean(dim=1, keepdim=True)  # (N, 1, H, W)
    x = (x - grey) * _per_image(u[:, 1] * SATURATION) + grey
    level = x.mean(dim=(1, 2, 3), keepdim=True)  # (N, 1, 1, 1)
    return (x - level) * _per_image(u[:, 2] + CONTRAST) + level


def _crop(x, offset):
    n, channels, height, width = x.shape
    reach_y, reach_x = round(CROP * height), round(CROP * width)
    x = F.pad(x, (reach_x, reach_x, reach_y, reach_y))  # (N, C, H + 2 ry, W + 2 rx)
    rows = offset[:, 0, None] + torch.arange(height, device=x.device)  # (n, H)
    columns = offset[:, 1, None] + torch.arange(width, device=x.device)  # (n, W)
    x = x.gather(2, rows[:, None, :, None].expand(n, channels, height, x.shape[3]))
    return x.gather(3, columns[:, None, None, :].expand(n, channels, height, width))


def _cutout(x, centre):
    def covered(side, c):  # (n, side): the rows or columns of the square
        half = round(CUTOUT * side) // 2
        position = torch.arange(side, device=x.device)
        return (position >= c[:, None] - half) & (position < c[:, None] + half)

    rows, columns = covered(x.shape[2], centre[:, 0]), covered(x.shape[3], centre[:, 1])
    square = rows[:, None, :, None] & columns[:, None, None, :]  # (n, 1, H, W)
    return x.masked_fill(square, 0.0)


def _flip(x, flipped):
    return torch.where(_per_image(flipped), x.flip(3), x)


def _affine(x, *rows):
    """Sample x at an affine map of its coordinates. rows: the six entries of the map, (n,) each."""
    theta = torch.stack(rows, dim=1).view(-1, 2, 3)
    if x.requires_grad and x.device.type != "cpu" and torch.are_deterministic_algorithms_enabled():
        grid = F.affine_grid(theta, (len(theta), *x.shape[1:]), align_corners=False)
        return _sample_deterministically(x, grid)
    grid = F.affine_grid(theta.expand(len(x), 2, 3), x.shape, align_corners=False)  # (N, H, W, 2)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _sample_deterministically(x, grid):
    """F.grid_sample as a matrix product: on CUDA, grid_sample's gradient adds in any order.

    x: (N, C, H, W). grid: (n, H, W, 2), n = 1 or N. Each grid takes an (H*W, H*W) matrix: 4 MiB
    for 32x32 images.
    """
    height, width = x.shape[2:]
    column = ((grid[..., 0] + 1) * width - 1) / 2  # (n, H, W): where it samples, in pixels
    row = ((grid[..., 1] + 1) * height - 1) / 2
    columns, rows = (torch.arange(side, device=x.device) for side in (width, height))
    weight_x = (1 - (column[..., None] - columns).abs()).clamp(min=0)  # (n, H, W, W): bilinear
    weight_y = (1 - (row[..., None] - rows).abs()).clamp(min=0)  # (n, H, W, H)
    matrix = weight_y[..., :, None] * weight_x[..., None, :]  # (n, H, W, H, W)
    with disable_tf32():
        return (x.flatten(2) @ matrix.flatten(3).flatten(1, 2).transpose(1, 2)).view_as(x)


def _scale(x, s):
    zero = torch.zeros_like(s[:, 0])
    return _affine(x, s[:, 0], zero, zero, zero, s[:, 1], zero)


def _rotate(x, angle):
    sin, cos, zero = angle[:, 0].sin(), angle[:, 0].cos(), torch.zeros_like(angle[:, 0])
    return _affine(x, cos, -sin, zero, sin, cos, zero)


def _uniform(n, count, generator):
    return torch.rand(n, count, generator=generator)


def _integers(n, limits, generator):
    columns = [torch.randint(0, limit + 1, (n, 1), generator=generator) for limit in limits]
    return torch.cat(columns, dim=1)


DSA_OPERATIONS = {  # name: (draw(n, size, generator) -> parameters, apply(x, parameters))
    "color": (lambda n, size, g: _uniform(n, 3, g), _color),
    "crop": (lambda n, size, g: _integers(n, [2 * round(CROP * side) for side in size], g), _crop),
    "cutout": (lambda n, size, g: _integers(n, size, g), _cutout),
    "flip": (lambda n, size, g: _uniform(n, 1, g) < 0.5, _flip),
    "scale": (lambda n, size, g: _uniform(n, 2, g) * (SCALE - 1 / SCALE) + 1 / SCALE, _scale),
    "rotate": (lambda n, size, g: (_uniform(n, 1, g) * 2 - 1) * math.radians(ROTATE), _rotate),
}


# ------------------------------------------------------------------------------------------- DSA
def parse_dsa_strategy(strategy):
    """"color_crop" -> ("color", "crop"); "none" or "" -> (). Raises ValueError for other names."""
    if strategy.lower() in ("", "none"):
        return ()
    names = tuple(strategy.split("_"))
    for name in names:
        if name not in DSA_OPERATIONS:
            raise ValueError(f"unknown DSA operation {name!r} in --dsa_strategy {strategy!r}; "
                             f"choose from {', '.join(DSA_OPERATIONS)}, joined by '_', or none")
    return names


def dsa_strategy_flag(text):
    """An argparse type: `text`, if `parse_dsa_strategy` accepts it."""
    try:
        parse_dsa_strategy(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def dsa_draw(strategy, size, generator, n=1):
    """Draw one operation of `strategy` and its parameters.

    size: (height, width). generator: on the CPU. n: 1 for all images, or one for each.
    Returns (name, parameters), or None if the strategy is empty.
    """
    names = parse_dsa_strategy(strategy)
    if not names:
        return None
    name = names[torch.randint(len(names), (), generator=generator).item()]
    return name, DSA_OPERATIONS[name][0](n, size, generator)


def dsa_apply(x, draw):
    """Augment (N, C, H, W) normalised images x by a draw of `dsa_draw`; differentiable in x."""
    if draw is None:
        return x
    name, parameters = draw
    return DSA_OPERATIONS[name][1](x, parameters.to(x.device))


def draws_to_device(tensors, draws, device):
    """Copy CPU tensors, and draws of `dsa_draw`, to the device in one copy: (tensors, draws)."""
    parameters = [draw[1] for draw in draws if draw]
    moved = iter(to_device_packed([*tensors, *parameters], device))
    return [next(moved) for _ in tensors], [draw and (draw[0], next(moved)) for draw in draws]


# --------------------------------------------------------------------------------------- packing
def pack(x, k=2):
    """Shrink images and set k*k of them side by side into one.

    x: (k*k*N, C, H, W) with the images of slot i at i, N + i, 2N + i, ...; H and W multiples of k,
    a power of two. Returns (N, C, H, W), of which `unpack` has the order of x. Source: SPEC 1.3.
    """
    if len(x) % k**2 or x.shape[2] % k or x.shape[3] % k or k & (k - 1):
        raise ValueError(f"packing {k}x{k} takes a multiple of {k**2} images whose sides are "
                         f"multiples of {k}, not {tuple(x.shape)}")
    for _ in range(k.bit_length() - 1):  # halving: the mean of 2x2 pixels
        x = F.interpolate(x, scale_factor=0.5, mode="bilinear", align_corners=False)
    columns = [torch.cat(column.chunk(k), dim=2) for column in x.chunk(k)]  # k of (N, C, H, W/k)
    return torch.cat(columns, dim=3)


def unpack(x, k=2):
    """Enlarge the k*k sub-images of each image to full size; differentiable. k = 1: x itself.

    x: (N, C, H, W), H and W multiples of k. Returns (k*k*N, C, H, W): all top-left sub-images, then
    down the first column, then the next columns. Labels: `labels.repeat(k*k)`. Source: SPEC 1.3.
    """
    if k == 1:
        return x
    if x.shape[2] % k or x.shape[3] % k:
        raise ValueError(f"an image that is packed {k}x{k} has sides that are multiples of {k}, "
                         f"not {tuple(x.shape)}")
    parts = [part for column in x.chunk(k, dim=3) for part in column.chunk(k, dim=2)]
    return F.interpolate(torch.cat(parts), scale_factor=k, mode="bilinear", align_corners=False)
