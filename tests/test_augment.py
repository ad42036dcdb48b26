"""DSA against numpy and scipy, its draws against SPEC 1.4; packing against literal loops."""
import math
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage

from augment import (DSA_OPERATIONS, dsa_apply, dsa_draw, dsa_to_device, mix_apply, mix_draw, pack,
                     unpack)

SIZE = (32, 32)


def reference(name, p, image):
    """One image (3, H, W) through one operation with parameters p (a row), from SPEC 1.4."""
    x, (_, height, width) = image.numpy().astype(np.float64), image.shape
    p = p.double().numpy() if p.dtype.is_floating_point else p.numpy()
    if name == "color":
        x = x + (p[0] - 0.5) * 1.0
        x = (x - x.mean(0)) * (2.0 * p[1]) + x.mean(0)
        return (x - x.mean()) * (p[2] + 0.5) + x.mean()
    if name == "flip":
        return x[:, :, ::-1] if p[0] else x
    if name == "crop":
        dy, dx = p[0] - round(0.125 * height), p[1] - round(0.125 * width)  # of the window
        return ndimage.shift(x, (0, -dy, -dx), order=0)
    if name == "cutout":
        for i, j in np.ndindex(height, width):
            if -height // 4 <= i - p[0] < height // 4 and -width // 4 <= j - p[1] < width // 4:
                x[:, i, j] = 0
        return x
    if name == "scale":
        matrix = np.diag([p[1], p[0]])  # rows scale with sy, columns with sx
    else:
        sin, cos = math.sin(p[0]), math.cos(p[0])
        matrix = np.array([[cos, sin], [-sin, cos]])  # in (row, column) coordinates
    centre = np.array([(height - 1) / 2, (width - 1) / 2])
    return np.stack([ndimage.affine_transform(channel, matrix, centre - matrix @ centre, order=1,
                                              mode="grid-constant") for channel in x])


@pytest.mark.parametrize("name", DSA_OPERATIONS)
@pytest.mark.parametrize("n", [12, 1])
def test_operation_against_numpy_and_scipy(name, n):
    """A draw for each image (evaluation), or one for all (siamese)."""
    x = torch.randn(12, 3, *SIZE)
    draw = dsa_draw(name, SIZE, torch.Generator().manual_seed(3), n)
    out = dsa_apply(x, draw)
    for i in range(12):
        assert np.allclose(out[i].numpy(), reference(name, draw[1][i % n], x[i]), atol=2e-5), i
    assert len(draw[1]) == n and len({tuple(row.tolist()) for row in draw[1]}) >= min(n, 2)


@pytest.mark.parametrize("name", DSA_OPERATIONS)
@pytest.mark.parametrize("n", [1, 2])
def test_gradient(name, n):
    x = torch.randn(2, 3, 8, 8).double().requires_grad_()
    draw = dsa_draw(name, (8, 8), torch.Generator().manual_seed(0), n=n)
    draw = (draw[0], draw[1].double() if draw[1].is_floating_point() else draw[1])
    assert torch.autograd.gradcheck(lambda x: dsa_apply(x, draw), (x,))


def test_draws_have_the_ranges_of_the_specification():
    def draws(name, n=20000):
        return dsa_draw(name, SIZE, torch.Generator().manual_seed(0), n=n)[1].double().numpy()
    assert {tuple(row) for row in draws("crop")} == {(a, b) for a in range(9) for b in range(9)}
    assert set(draws("cutout")[:, 0]) == set(range(33))
    angle = math.radians(15)
    for name, low, high in (("color", 0, 1), ("scale", 1 / 1.2, 1.2), ("rotate", -angle, angle)):
        d, tolerance = draws(name), 0.01 * (high - low)
        assert low <= d.min() < low + tolerance and high - tolerance < d.max() <= high, name
        assert abs(d.mean() - (low + high) / 2) < tolerance, name
    assert 0.48 < draws("flip").mean() < 0.52


def test_one_operation_of_the_list_is_drawn_per_call():
    generator, all_names = torch.Generator().manual_seed(0), "_".join(DSA_OPERATIONS)
    counts = Counter(dsa_draw(all_names, SIZE, generator)[0] for _ in range(1200))
    assert set(counts) == set(DSA_OPERATIONS) and min(counts.values()) > 150
    assert {dsa_draw("flip_scale", SIZE, generator)[0] for _ in range(50)} == {"flip", "scale"}
    assert dsa_draw("none", SIZE, None) is None


@pytest.mark.parametrize("k", [2, 4, 8])
def test_packing(k):
    """Down the columns (labels.repeat(k*k)), each sub-image the mean of k*k pixels; enlarged as
    F.interpolate does."""
    x, side = torch.randn(2 * k * k, 3, 16, 16), 16 // k
    packed = pack(x, k)
    assert packed.shape == (2, 3, 16, 16)
    for slot, column, row in np.ndindex(2, k, k):
        top, left, index = row * side, column * side, (column * k + row) * 2 + slot
        block = packed[slot, :, top:top + side, left:left + side]
        means = x[index].reshape(3, side, k, side, k).mean((2, 4))
        assert torch.allclose(block, means, atol=1e-6)
        enlarged = F.interpolate(block[None], scale_factor=k, mode="bilinear")[0]
        assert torch.equal(unpack(packed, k)[index], enlarged)
    assert unpack(packed, 1) is packed and torch.equal(pack(x, 1), x)
    ramp = torch.arange(4.0).expand(1, 1, 4, 4)
    assert unpack(ramp)[0, 0, 0].tolist() == [0, 0.25, 0.75, 1]


def test_packing_refuses():
    for function, shape, k in ((pack, (3, 3, 8, 8), 2), (pack, (16, 3, 8, 6), 4),
                               (pack, (9, 3, 9, 9), 3), (unpack, (1, 3, 8, 7), 2)):
        with pytest.raises(ValueError, match=f"cannot be packed {k}x{k}"):
            function(torch.zeros(shape), k)


def test_draws_ahead_are_the_draws():
    """Many draws copied to a device at once are those of `dsa_draw`, in their order."""
    generator = torch.Generator().manual_seed(0)
    draws = [dsa_draw("color_crop_flip", (4, 4), generator, n=n) for n in (3, 1, 2, 3, 2)]
    moved = dsa_to_device([*draws, None], torch.device("cpu"))
    assert [name for name, _ in draws] == [draw[0] for draw in moved[:-1]] and moved[-1] is None
    assert all(torch.equal(a[1], b[1]) for a, b in zip(draws, moved))


@pytest.mark.parametrize("mix", ["mixup", "cutmix", "both"])
def test_mixing(mix):
    """Every pixel is a mean of that of its own image and of one other's; the mean stays."""
    x = torch.rand(6, 3, 8, 8)
    for seed in range(5):
        ((weight, order),) = draws = mix_draw(mix, (8, 8), torch.Generator().manual_seed(seed), 6)
        assert torch.allclose(mix_apply(x, draws), torch.lerp(x[order], x, weight), atol=1e-6)
        assert sorted(order.tolist()) == list(range(6))
        if weight.dim() == 4 and len(weight) == 1:  # CutMix: a square, 2 to 6 pixels wide
            cut = (weight[0, 0] == 0).nonzero()
            side = len(cut[:, 0].unique())
            assert 2 <= side <= 6 and len(cut) == side**2 and mix != "mixup"
        else:
            assert weight.shape == (6, 1, 1, 1) and mix != "cutmix"
    assert mix_draw("none", (8, 8), None, 6) == [] and mix_apply(x, []) is x


def test_mixing_twice():
    """CutMix, and then mixup of what came out."""
    x = torch.rand(6, 3, 8, 8)
    first, second = mix_draw("cutmix_mixup", (8, 8), torch.Generator().manual_seed(0), 6)
    assert first[0].shape == (1, 1, 8, 8) and second[0].shape == (6, 1, 1, 1)
    cut = torch.lerp(x[first[1]], x, first[0])
    mixed = torch.lerp(cut[second[1]], cut, second[0])
    assert torch.allclose(mix_apply(x, [first, second]), mixed, atol=1e-6)
