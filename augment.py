"""Differentiable siamese augmentation (DSA) and packing.

DSA: `dsa_draw` draws one operation and its parameters, `dsa_apply` applies them. The same draw applied to two batches
is the siamese use (one parameter for all images); a draw with `n` images has one parameter an image (evaluation).
Source: SPEC 1.3, 1.4; Zhao and Bilen, "Dataset Condensation with Differentiable Siamese Augmentation", ICML 2021.
"""
import math

import torch
import torch.nn.functional as F

from runtime.device import to_device_packed
from runtime.compilation import disable_tf32

# Strengths, in the units of SPEC 1.4.
BRIGHTNESS = 1.0  # width of the interval of the additive term, normalised units
SATURATION = 2.0  # largest factor
CONTRAST = 0.5  # smallest factor; the interval has width 1
CROP = 0.125  # largest shift, share of the image side
CUTOUT = 0.5  # side of the square, share of the image side
SCALE = 1.2  # largest zoom, and inverse of the smallest
ROTATE = 15.0  # largest angle, degrees


# ------------------------------------------------------------------------------------------------------------ operations
# Each pair: draw(n, size, generator) -> parameters with first dimension n; apply(x, parameters), where n is 1 or len(x).
def _uniform(n, count, generator):
    return torch.rand(n, count, generator=generator)


def _per_image(values):
    return values.view(-1, 1, 1, 1)  # (n,) -> (n, 1, 1, 1)


def _draw_color(n, size, generator):
    return _uniform(n, 3, generator)


def _color(x, u):
    x = x + _per_image((u[:, 0] - 0.5) * BRIGHTNESS)
    grey = x.mean(dim=1, keepdim=True)  # (N, 1, H, W)
    x = (x - grey) * _per_image(u[:, 1] * SATURATION) + grey
    level = x.mean(dim=(1, 2, 3), keepdim=True)  # (N, 1, 1, 1)
    return (x - level) * _per_image(u[:, 2] + CONTRAST) + level


def _draw_crop(n, size, generator):
    reach = [round(CROP * side) for side in size]
    return torch.cat([torch.randint(0, 2 * r + 1, (n, 1), generator=generator) for r in reach], dim=1)


def _crop(x, offset):
    n, channels, height, width = x.shape
    reach_y, reach_x = round(CROP * height), round(CROP * width)
    x = F.pad(x, (reach_x, reach_x, reach_y, reach_y))  # (N, C, H + 2 ry, W + 2 rx)
    rows = offset[:, 0, None] + torch.arange(height, device=x.device)  # (n, H)
    columns = offset[:, 1, None] + torch.arange(width, device=x.device)  # (n, W)
    x = x.gather(2, rows[:, None, :, None].expand(n, channels, height, x.shape[3]))
    return x.gather(3, columns[:, None, None, :].expand(n, channels, height, width))


def _draw_cutout(n, size, generator):
    return torch.cat([torch.randint(0, side + 1, (n, 1), generator=generator) for side in size], dim=1)


def _cutout(x, centre):
    def inside(side, c):  # (n, side): the rows (or columns) that the square covers
        half = round(CUTOUT * side) // 2
        position = torch.arange(side, device=x.device)
        return (position >= c[:, None] - half) & (position < c[:, None] + half)
    square = inside(x.shape[2], centre[:, 0])[:, None, :, None] & inside(x.shape[3], centre[:, 1])[:, None, None, :]
    return x.masked_fill(square, 0.0)  # square: (n, 1, H, W)


def _draw_flip(n, size, generator):
    return _uniform(n, 1, generator) < 0.5


def _flip(x, flipped):
    return torch.where(_per_image(flipped), x.flip(3), x)


def _affine(x, theta):
    if x.requires_grad and x.device.type != "cpu" and torch.are_deterministic_algorithms_enabled():
        return _sample_repeatably(x, F.affine_grid(theta, (len(theta), *x.shape[1:]), align_corners=False))
    theta = theta.expand(len(x), 2, 3)
    grid = F.affine_grid(theta, x.shape, align_corners=False)  # (N, H, W, 2)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _sample_repeatably(x, grid):
    """F.grid_sample as a matrix product, whose gradient is repeatable on CUDA; that of grid_sample adds in any order.

    x: (N, C, H, W). grid: (n, H, W, 2) of F.affine_grid, n = 1 or N. One (H*W, H*W) matrix a grid: 4 MiB for 32x32 images.
    """
    height, width = x.shape[2:]
    column, row = ((grid[..., 0] + 1) * width - 1) / 2, ((grid[..., 1] + 1) * height - 1) / 2  # (n, H, W): where it samples
    columns, rows = torch.arange(width, device=x.device), torch.arange(height, device=x.device)
    weight_x = (1 - (column[..., None] - columns).abs()).clamp(min=0)  # (n, H, W, W): bilinear, zeros outside
    weight_y = (1 - (row[..., None] - rows).abs()).clamp(min=0)  # (n, H, W, H)
    matrix = (weight_y[..., :, None] * weight_x[..., None, :]).flatten(3).flatten(1, 2)  # (n, H*W, H*W)
    with disable_tf32():
        return (x.flatten(2) @ matrix.transpose(1, 2)).view_as(x)


def _draw_scale(n, size, generator):
    return _uniform(n, 2, generator) * (SCALE - 1 / SCALE) + 1 / SCALE


def _scale(x, s):
    zero = torch.zeros_like(s[:, 0])
    return _affine(x, torch.stack([s[:, 0], zero, zero, zero, s[:, 1], zero], dim=1).view(-1, 2, 3))


def _draw_rotate(n, size, generator):
    return (_uniform(n, 1, generator) * 2 - 1) * math.radians(ROTATE)


def _rotate(x, angle):
    sin, cos, zero = angle[:, 0].sin(), angle[:, 0].cos(), torch.zeros_like(angle[:, 0])
    return _affine(x, torch.stack([cos, -sin, zero, sin, cos, zero], dim=1).view(-1, 2, 3))


DSA_OPERATIONS = {
    "color": (_draw_color, _color),
    "crop": (_draw_crop, _crop),
    "cutout": (_draw_cutout, _cutout),
    "flip": (_draw_flip, _flip),
    "scale": (_draw_scale, _scale),
    "rotate": (_draw_rotate, _rotate),
}


# ------------------------------------------------------------------------------------------------------------------- DSA
def parse_dsa_strategy(strategy):
    """"color_crop_..." -> the tuple of its operations; "none" or "" -> (). Raises ValueError naming an unknown one."""
    if strategy.lower() in ("", "none"):
        return ()
    names = tuple(strategy.split("_"))
    for name in names:
        if name not in DSA_OPERATIONS:
            raise ValueError(f"unknown DSA operation {name!r} in --dsa_strategy {strategy!r}; "
                             f"choose from {', '.join(DSA_OPERATIONS)}, joined by '_', or none")
    return names


def dsa_draw(strategy, size, generator, n=1):
    """Draw one operation of `strategy` and its parameters.

    strategy: names joined by '_'. size: (height, width) of the images. generator: CPU torch.Generator.
    n: 1 for a draw that all images share (siamese), or the number of images for one draw an image.
    Returns (name, parameters), or None when the strategy is empty.
    """
    names = parse_dsa_strategy(strategy)
    if not names:
        return None
    name = names[torch.randint(len(names), (), generator=generator).item()]
    return name, DSA_OPERATIONS[name][0](n, size, generator)


def dsa_apply(x, draw):
    """Augment a batch by a draw of `dsa_draw`; differentiable in x.

    x: (N, C, H, W) normalised images. Returns (N, C, H, W) on x's device.
    """
    if draw is None:
        return x
    name, parameters = draw
    return DSA_OPERATIONS[name][1](x, parameters.to(x.device))


def draws_to_device(chosen, draws, device):
    """Tensors of the CPU and draws of `dsa_draw`, one for each of them, on the device, in one copy: (tensors, draws)."""
    parameters = to_device_packed([*chosen, *(draw[1] for draw in draws if draw)], device)
    rest = iter(parameters[len(chosen):])
    return parameters[:len(chosen)], [draw and (draw[0], next(rest)) for draw in draws]


# --------------------------------------------------------------------------------------------------------------- packing
def pack(x, k=2):
    """k*k images into each stored one: shrink them and set them side by side.

    x: (k*k*N, C, H, W) with the images of slot i at i, N + i, 2N + i, ...; H and W multiples of k. k: a power of two.
    Returns (N, C, H, W). `unpack(pack(x, k), k)` has the order of x. Source: SPEC 1.3.
    """
    if len(x) % k**2 or x.shape[2] % k or x.shape[3] % k or k & (k - 1):
        raise ValueError(f"packing {k}x{k} takes a multiple of {k**2} images whose sides are multiples of {k}, not "
                         f"{tuple(x.shape)}")
    height = x.shape[2] // k
    while x.shape[2] > height:  # halving is the mean of 2x2 pixels; again and again, that of k*k
        x = F.interpolate(x, scale_factor=0.5, mode="bilinear", align_corners=False)
    columns = [torch.cat(column.chunk(k), dim=2) for column in x.chunk(k)]  # k of (N, C, H, W/k)
    return torch.cat(columns, dim=3)  # (N, C, H, W)


def unpack(x, k=2):
    """The k*k sub-images of each stored image, enlarged to full size; differentiable. k = 1: x itself.

    x: (N, C, H, W), H and W multiples of k. Returns (k*k*N, C, H, W): all top-left sub-images, then down the first column,
    then the next columns; so labels become `labels.repeat(k*k)`. Source: SPEC 1.3.
    """
    if k == 1:
        return x
    if x.shape[2] % k or x.shape[3] % k:
        raise ValueError(f"an image that is packed {k}x{k} has sides that are multiples of {k}, not {tuple(x.shape)}")
    parts = [part for column in x.chunk(k, dim=3) for part in column.chunk(k, dim=2)]  # k*k of (N, C, H/k, W/k)
    return F.interpolate(torch.cat(parts), scale_factor=k, mode="bilinear", align_corners=False)
