import math

import numpy as np
import pytest
import torch
from scipy import ndimage

from augment import DSA_OPERATIONS, dsa_apply, dsa_draw, pack, parse_dsa_strategy, unpack

SIZE = (32, 32)
ALL = "color_crop_cutout_flip_scale_rotate"


def images(n=5, size=SIZE, seed=0):
    return torch.randn(n, 3, *size, generator=torch.Generator().manual_seed(seed))


def reference(name, p, image):
    """One image (3, H, W) through one operation with parameters p (a row), in numpy, from the text of SPEC 1.4."""
    x, (_, height, width) = image.numpy().astype(np.float64), image.shape
    p = p.double().numpy() if p.dtype.is_floating_point else p.numpy()
    if name == "color":
        x = x + (p[0] - 0.5) * 1.0
        x = (x - x.mean(0)) * (2.0 * p[1]) + x.mean(0)
        return (x - x.mean()) * (p[2] + 0.5) + x.mean()
    if name == "flip":
        return x[:, :, ::-1] if p[0] else x
    out = np.zeros_like(x)
    if name == "crop":
        dy, dx = p[0] - round(0.125 * height), p[1] - round(0.125 * width)  # the shift of the window
        for i in range(height):
            for j in range(width):
                if 0 <= i + dy < height and 0 <= j + dx < width:
                    out[:, i, j] = x[:, i + dy, j + dx]
        return out
    if name == "cutout":
        out = x.copy()
        for i in range(height):
            for j in range(width):
                if -height // 4 <= i - p[0] < height // 4 and -width // 4 <= j - p[1] < width // 4:
                    out[:, i, j] = 0
        return out
    if name == "scale":
        matrix = np.diag([p[1], p[0]])  # rows scale with sy, columns with sx
    else:
        sin, cos = math.sin(p[0]), math.cos(p[0])
        matrix = np.array([[cos, sin], [-sin, cos]])  # in (row, column) coordinates
    centre = np.array([(height - 1) / 2, (width - 1) / 2])
    return np.stack([ndimage.affine_transform(channel, matrix, centre - matrix @ centre, order=1, mode="grid-constant")
                     for channel in x])


@pytest.mark.parametrize("name", DSA_OPERATIONS)
def test_operation_against_numpy_and_scipy(name):
    """One draw an image (evaluation), each image against the reference."""
    x = images(12)
    draw = dsa_draw(name, SIZE, torch.Generator().manual_seed(3), n=len(x))
    out = dsa_apply(x, draw)
    for i in range(len(x)):
        assert np.allclose(out[i].numpy(), reference(name, draw[1][i], x[i]), atol=2e-5), i
    assert len({tuple(row.tolist()) for row in draw[1]}) > 1  # the images have draws of their own


@pytest.mark.parametrize("name", DSA_OPERATIONS)
def test_siamese(name):
    """One draw acts alike on every image of a batch, and on another batch of another length."""
    x = images(1)
    for seed in range(4):
        draw = dsa_draw(name, SIZE, torch.Generator().manual_seed(seed))
        assert len(draw[1]) == 1
        batch = dsa_apply(torch.cat([x, images(2, seed=1), x]), draw)
        assert torch.equal(batch[0], batch[3])
        assert torch.allclose(batch[0], dsa_apply(x, draw)[0], atol=1e-6)


@pytest.mark.parametrize("name", DSA_OPERATIONS)
@pytest.mark.parametrize("n", [1, 3])
def test_gradient(name, n):
    x = images(3, size=(8, 8)).double().requires_grad_()
    draw = dsa_draw(name, (8, 8), torch.Generator().manual_seed(0), n=n)
    draw = (draw[0], draw[1].double() if draw[1].is_floating_point() else draw[1])
    assert torch.autograd.gradcheck(lambda x: dsa_apply(x, draw), (x,))


def test_draws_have_the_ranges_of_the_specification():
    def draws(name, n=20000):
        return dsa_draw(name, SIZE, torch.Generator().manual_seed(0), n=n)[1].double().numpy()
    assert {tuple(row) for row in draws("crop")} == {(a, b) for a in range(9) for b in range(9)}
    assert set(draws("cutout")[:, 0]) == set(range(33))
    for name, low, high in (("color", 0, 1), ("scale", 1 / 1.2, 1.2), ("rotate", -math.radians(15), math.radians(15))):
        d = draws(name)
        assert low <= d.min() < low + 0.01 * (high - low) and high - 0.01 * (high - low) < d.max() <= high, name
        assert abs(d.mean() - (low + high) / 2) < 0.01 * (high - low), name
    assert 0.48 < draws("flip").mean() < 0.52


def test_one_operation_of_the_list_is_drawn_per_call():
    generator = torch.Generator().manual_seed(0)
    counts = {}
    for _ in range(1200):
        name, _ = dsa_draw(ALL, SIZE, generator)
        counts[name] = counts.get(name, 0) + 1
    assert set(counts) == set(DSA_OPERATIONS) and min(counts.values()) > 150
    assert {dsa_draw("flip_scale", SIZE, generator)[0] for _ in range(50)} == {"flip", "scale"}


def test_strategy_names():
    assert parse_dsa_strategy("none") == () and dsa_draw("", SIZE, None) is None
    x = images()
    assert dsa_apply(x, None) is x
    with pytest.raises(ValueError, match="'blur'.*color, crop, cutout"):
        parse_dsa_strategy("flip_blur")


def test_unpack_order_and_enlargement():
    x = torch.zeros(2, 3, 4, 4)
    for i in range(2):
        x[i, :, :2, :2], x[i, :, 2:, :2], x[i, :, :2, 2:], x[i, :, 2:, 2:] = (10 * i + k for k in (1.0, 2.0, 3.0, 4.0))
    out = unpack(x)
    assert out.shape == (8, 3, 4, 4)
    # TL of both images, then BL, TR, BR; so labels go with labels.repeat(4).
    assert out.mean((1, 2, 3)).tolist() == [1, 11, 2, 12, 3, 13, 4, 14]
    ramp = torch.arange(4.0).view(1, 1, 1, 4).expand(1, 1, 4, 4)
    assert unpack(ramp)[0, 0, 0].tolist() == [0, 0.25, 0.75, 1]  # bilinear, align_corners=False


def test_pack_is_undone_by_unpack():
    corners = torch.randn(8, 3, 2, 2)
    smooth = torch.nn.functional.interpolate(corners, size=16, mode="bilinear")
    assert pack(smooth).shape == (2, 3, 16, 16)
    # Along an axis, a line of slope d/8 that ends between two pixels is missed by d/32 beside its end, and nowhere else.
    missed = (unpack(pack(smooth)) - smooth).abs().amax((2, 3))
    assert (missed <= (corners.amax((2, 3)) - corners.amin((2, 3))) / 16 + 1e-6).all()
    constant = torch.arange(8.0).view(8, 1, 1, 1).expand(8, 3, 16, 16)
    assert torch.equal(unpack(pack(constant)), constant)
    quarter = pack(torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
    original = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(quarter[0, :, 0, 0], original[0, :, :2, :2].mean((1, 2)))  # halved bilinearly: 2x2 means


@pytest.mark.parametrize("k", [2, 4, 8])
def test_packing_by_any_number(k):
    """Down the columns, each sub-image the mean of k*k pixels; unpacked, enlarged as F.interpolate does, slots fastest."""
    x = torch.randn(2 * k * k, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    packed, side = pack(x, k), 16 // k
    assert packed.shape == (2, 3, 16, 16)
    for slot in range(2):
        for column in range(k):
            for row in range(k):
                block = packed[slot, :, row * side:(row + 1) * side, column * side:(column + 1) * side]
                original = x[(column * k + row) * 2 + slot]
                means = original.reshape(3, side, k, side, k).mean((2, 4))
                assert torch.allclose(block, means, atol=1e-6)
                enlarged = torch.nn.functional.interpolate(block[None], scale_factor=k, mode="bilinear")[0]
                assert torch.equal(unpack(packed, k)[(column * k + row) * 2 + slot], enlarged)
    assert unpack(packed, 1) is packed and torch.equal(pack(x, 1), x)


@pytest.mark.parametrize("operation, shape, k", [(pack, (3, 3, 8, 8), 2), (pack, (4, 3, 7, 8), 2), (unpack, (1, 3, 8, 7), 2),
                                                 (pack, (4, 3, 8, 8), 4), (unpack, (1, 3, 8, 4), 8), (pack, (9, 3, 9, 9), 3)])
def test_packing_refuses(operation, shape, k):
    with pytest.raises(ValueError, match=f"{k}x{k}.*multiples of {k}"):
        operation(torch.zeros(shape), k)
