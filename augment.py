"""Differentiable siamese augmentation (DSA), and packing of several images into one.

Siamese: one draw is applied to all images of two batches. Source: SPEC 1.3, 1.4; Zhao and Bilen,
"Dataset Condensation with Differentiable Siamese Augmentation", ICML 2021.
"""
import argparse
import math

import torch
import torch.nn.functional as F

from runtime.device import copy_to_device

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
def _per_image(values):  # (n,) -> (n, 1, 1, 1)
    return values.view(-1, 1, 1, 1)


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
    theta = torch.stack(rows, dim=1).view(-1, 2, 3).expand(len(x), 2, 3)
    grid = F.affine_grid(theta, x.shape, align_corners=False)  # (N, H, W, 2)
    device = x.device
    if x.requires_grad and torch.are_deterministic_algorithms_enabled():
        x, grid = x.cpu(), grid.cpu()  # on CUDA, the gradient is added up in any order
    x = F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return x.to(device)


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
            raise ValueError(f"unknown DSA operation {name!r}; choose from "
                             f"{', '.join(DSA_OPERATIONS)}, joined by '_', or none")
    return names


def dsa_strategy_flag(text):
    """An argparse type: `text`, if `parse_dsa_strategy` accepts it."""
    try:
        parse_dsa_strategy(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def dsa_draw(strategy, size, generator, n=1):
    """Draw an operation of `strategy`: (its name, its parameters), or None without operations.

    size: (height, width). generator: on the CPU. n: 1 draw for all images, or one for each.
    """
    names = parse_dsa_strategy(strategy)
    if not names:
        return None
    name = names[torch.randint(len(names), (), generator=generator).item()]
    return name, DSA_OPERATIONS[name][0](n, size, generator)


def dsa_to_device(draws, device):
    """Draws of `dsa_draw` on the device, after one copy of each operation's parameters."""
    parts = {}
    for name, parameters in filter(None, draws):
        parts.setdefault(name, []).append(parameters)
    moved = {}
    for name, found in parts.items():
        together = copy_to_device(torch.cat(found), device)
        moved[name] = iter(together.split([len(parameters) for parameters in found]))
    return [draw and (draw[0], next(moved[draw[0]])) for draw in draws]


def dsa_apply(x, draw):
    """Augment normalised images x (N, C, H, W) by a draw of `dsa_draw`; differentiable in x."""
    if draw is None:
        return x
    name, parameters = draw
    return DSA_OPERATIONS[name][1](x, copy_to_device(parameters, x.device))


# ------------------------------------------------------------------- mixing images of one batch
# {name: the steps of mixing}. Of each step the alternatives, one of which is drawn for a batch.
MIXES = {"none": (), "mixup": (("mixup",),), "cutmix": (("cutmix",),),
         "both": (("mixup", "cutmix"),), "cutmix_mixup": (("cutmix",), ("mixup",))}


def mix_draw(mix, size, generator, n):
    """Draw how the n images of a batch are mixed: [(weight, order), ...], one after the other.

    mix: of MIXES; "both" is mixup or CutMix, "cutmix_mixup" CutMix and then mixup. weight: of an
    image itself, (n, 1, 1, 1) for mixup, or (1, 1, H, W), 0 inside a square of a quarter to three
    quarters of the image's side, for CutMix. order: (n,) int64, whose rest it takes. Source: Zhang
    et al. 2018; Yun et al. 2019.
    """
    return [_mix_draw(names, size, generator, n) for names in MIXES[mix]]


def _mix_draw(names, size, generator, n):
    name = names[torch.randint(len(names), (), generator=generator).item()]
    order = torch.randperm(n, generator=generator)
    if name == "mixup":
        return torch.rand(n, 1, 1, 1, generator=generator), order
    weight, window = torch.ones(1, 1, *size), []
    share = 0.25 + 0.5 * torch.rand((), generator=generator).item()
    for length in size:
        side = round(share * length)
        start = torch.randint(length - side + 1, (), generator=generator).item()
        window.append(slice(start, start + side))
    weight[:, :, window[0], window[1]] = 0
    return weight, order


def mix_apply(x, draws):
    """Mix images x (N, C, H, W) by what `mix_draw` drew."""
    for draw in draws:
        weight, order = (copy_to_device(part, x.device) for part in draw)
        x = x[order] + weight * (x - x[order])
    return x


# --------------------------------------------------------------------------------------- packing
def pack(x, k=2):
    """Shrink images and set k*k of them side by side into one.

    x: (k*k*N, C, H, W) with the images of slot i at i, N + i, 2N + i, ...; k: a power of two.
    Returns (N, C, H, W), of which `unpack` has the order of x. Source: SPEC 1.3.
    """
    if len(x) % k**2 or k & (k - 1):
        raise ValueError(f"{len(x)} images cannot be packed {k}x{k}")
    _check_sides(x, k)
    for _ in range(k.bit_length() - 1):  # halving: the mean of 2x2 pixels
        x = F.interpolate(x, scale_factor=0.5, mode="bilinear", align_corners=False)
    columns = [torch.cat(column.chunk(k), dim=2) for column in x.chunk(k)]  # k of (N, C, H, W/k)
    return torch.cat(columns, dim=3)


def unpack(x, k=2):
    """Enlarge the k*k sub-images of each image to full size; differentiable. k = 1: x itself.

    x: (N, C, H, W). Returns (k*k*N, C, H, W): all top-left sub-images, then down the first column,
    then the next columns. Labels: `labels.repeat(k*k)`. Source: SPEC 1.3.
    """
    if k == 1:
        return x
    _check_sides(x, k)
    parts = [part for column in x.chunk(k, dim=3) for part in column.chunk(k, dim=2)]
    return F.interpolate(torch.cat(parts), scale_factor=k, mode="bilinear", align_corners=False)


def _check_sides(x, k):
    if x.shape[2] % k or x.shape[3] % k:
        raise ValueError(f"images of {x.shape[2]}x{x.shape[3]} cannot be packed {k}x{k}")
