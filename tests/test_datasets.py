"""The data sets: what is loaded, how it is normalised and sampled, and what is refused."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from conftest import random_dataset
from PIL import Image

from datasets import DATASETS, dataset_name, load_dataset, random_indices
from runtime.safe_io import InputError

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3)).astype(np.uint8)


def write_npz(path, images=PIXELS, **changes):
    """Twelve training and six test images of three classes."""
    labels = np.arange(12) % 3
    arrays = {"x_train": images, "y_train": labels, "x_test": images[:6], "y_test": labels[:6]}
    np.savez(path, **arrays | changes)
    return path


def chw(images):
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def test_digits(digits):
    """The images are scikit-learn's: enlarging keeps the sum of the pixels."""
    from sklearn.datasets import load_digits
    assert digits.images["train"].shape == (1437, 3, 32, 32)
    x, _ = digits.get_batch("train", slice(None))
    assert abs(x.mean()) < 1e-3 and abs(x.std() - 1) < 1e-3  # the constants of DATASETS
    sums = [x[:, 0].float().sum((1, 2)) / 255 for x in digits.images.values()]
    assert np.allclose(sorted(torch.cat(sums)), sorted(load_digits().images.sum((1, 2))), rtol=0.01)
    assert torch.bincount(digits.labels["test"]).min() >= 34


def test_normalisation():
    data = random_dataset()
    x, labels = data.get_batch("train", torch.tensor([3, 1]))
    raw = data.images["train"][[3, 1]].permute(0, 2, 3, 1).numpy() / 255
    expected = (raw - [0.4914, 0.4822, 0.4465]) / [0.2023, 0.1994, 0.2010]
    assert np.allclose(x.permute(0, 2, 3, 1), expected, atol=1e-5) and labels.tolist() == [3, 1]
    assert np.allclose(data.denormalize(x).permute(0, 2, 3, 1), raw, atol=1e-6)


def test_zca():
    """Whitening of the pixels as numpy's eigenvectors have it, in place of the normalisation."""
    pytest.importorskip("kornia")
    data = random_dataset(per_class=40)
    images = data.images["train"] = data.images["train"][:, :, :4, :4]
    images[:, :, :, 1:] = images[:, :, :, :1] // 2 + images[:, :, :, 1:] // 2  # correlated
    data.fit_zca()
    x, _ = data.get_batch("train", slice(None))
    pixels = images.flatten(1).double().numpy() / 255
    centred = pixels - pixels.mean(0)
    values, vectors = np.linalg.eigh(np.cov(centred.T))
    expected = centred @ vectors @ np.diag((values + 0.1) ** -0.5) @ vectors.T
    assert np.allclose(x.flatten(1), expected, atol=1e-3)
    assert np.allclose(data.denormalize(x), images / 255, atol=1e-3)


@pytest.mark.parametrize("n, total", [(3, 12), (4, 12), (20, 12), (256, 50000), (0, 5)])
def test_random_indices(n, total):
    """All different; each index is as often the first, the last, or any one as any other."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([random_indices(n, total, generator) for _ in range(2000)])
    assert draws.shape[1] == min(n, total) and ((draws >= 0) & (draws < total)).all()
    assert (draws.sort(1)[0].diff(dim=1) > 0).all()
    for drawn in (draws, draws[:, :1], draws[:, -1:]) if total == 12 else ():
        counts, expected = torch.bincount(drawn.flatten(), minlength=12), drawn.numel() / 12
        assert ((counts - expected) ** 2 / expected).sum() < 40  # chi-square of 11: p = 4e-5


def test_download(tmp_path, monkeypatch):
    """torchvision's data set becomes the npz, which is then enough; without either, one line."""
    def no_network(*args, **kwargs):
        raise OSError("no network")

    def fake_cifar(root, train, download):
        images = np.random.default_rng(int(train)).integers(0, 256, (20, 32, 32, 3), np.uint8)
        return SimpleNamespace(data=images, targets=list(range(10)) * 2,
                               classes=list("abcdefghij"))
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", fake_cifar)
    first = load_dataset("CIFAR10", tmp_path)
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", no_network)
    second = load_dataset("CIFAR10", tmp_path)
    assert first.fingerprint() == second.fingerprint() and second.classes == list("abcdefghij")
    assert torch.equal(first.images["train"], chw(fake_cifar("", True, True).data))
    write_npz(tmp_path / "cifar10.npz")
    with pytest.raises(InputError, match=r"cifar10.npz: .*\(8, 8, 3\); CIFAR10 has \(32, 32, 3\)"):
        load_dataset("CIFAR10", tmp_path)
    (tmp_path / "cifar10.npz").unlink()
    with pytest.raises(InputError, match="^[^\n]*cifar10.npz [^\n]*no network[^\n]*internet.*$"):
        load_dataset("CIFAR10", tmp_path)
    with pytest.raises(InputError):
        load_dataset("CIFAR10", tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


SCALED, TURNED = "pixels given in [0, 1]", "images given as (N, C, H, W)"


@pytest.mark.parametrize("images, expected, notes", [
    (PIXELS, PIXELS, []),
    (PIXELS.astype(np.float32), PIXELS, []),
    (PIXELS.transpose(0, 3, 1, 2).astype(np.int64), PIXELS, [TURNED]),
    ((PIXELS / 255).astype(np.float32), PIXELS, [SCALED]),
    ((PIXELS / 255).transpose(0, 3, 1, 2), PIXELS, [TURNED, SCALED]),
    (PIXELS[..., 0], PIXELS[..., :1], []),  # grey
    (PIXELS[:, None, ..., 0], PIXELS[..., :1], [TURNED]),
])
def test_own_images_in_any_form(tmp_path, images, expected, notes):
    """The same bytes come out, normalised by their own mean and std; labels may be a column."""
    write_npz(tmp_path / "my-set.npz", images, y_train=(np.arange(12) % 3)[:, None])
    data = load_dataset(str(tmp_path / "my-set.npz"), "nowhere")
    assert torch.equal(data.images["train"], chw(expected)) and data.notes == notes
    assert np.allclose(data.mean, (expected / 255).mean((0, 1, 2)), atol=1e-4)
    assert np.allclose(data.std, (expected / 255).std((0, 1, 2)), atol=1e-4)
    assert (data.name, data.classes, data.num_classes) == ("myset", ["0", "1", "2"], 3)
    assert data.labels["train"].tolist() == [0, 1, 2] * 4


@pytest.mark.parametrize("changes, message", [
    ({"x_train": np.full((12, 8, 8, 3), 1.5)}, r"float64 .* with values from 1.5 to 1.5"),
    ({"images": (PIXELS / 255 - 0.5) / 0.25}, "values from -2 to 2; .*not normalised"),
    ({"images": np.full(PIXELS.shape, np.nan)}, "values from nan"),
    ({"images": np.zeros_like(PIXELS)}, "a channel of the training images is constant"),
    ({"x_train": np.zeros((12, 5, 8, 8), np.uint8)}, r"\(12, 5, 8, 8\)"),
    ({"x_train": PIXELS[:, :4]}, r"training images are \(4, 8, 3\), test images \(8, 8, 3\)"),
    ({"y_train": np.eye(12, 3)}, r"\(12, 3\); expected \(12,\)"),
    ({"y_train": np.arange(12) / 2}, r"expected \(12,\) whole numbers"),
    ({"y_train": np.full(12, 1 + 1j)}, "complex128 .*; expected"),
    ({"y_train": np.zeros(12, int)}, "class 1 has no training image"),
    ({"y_train": np.zeros(12, int), "y_test": np.zeros(6, int)}, "1 class.es."),
    ({"y_train": np.arange(12) % 3 + 1, "classes": np.array([b"a", b"b", b"c"])}, "to 3, 3 class"),
    ({"y_test": np.array([{}] * 6)}, "damaged"),  # a pickled object is not read
])
def test_own_data_that_is_refused(tmp_path, changes, message):
    with pytest.raises(InputError, match=f"own.npz[^\n]*{message}[^\n]*$"):
        load_dataset(write_npz(tmp_path / "own.npz", **changes), "")


def test_names_of_data_sets(tmp_path):
    assert [dataset_name(name) for name in ("cifar10", "CIFAR-100", "digits")] == list(DATASETS)
    for name in ("cifar10", "___"):
        path = write_npz(tmp_path / f"{name}.npz")
        with pytest.raises(InputError, match="cannot be called '(cifar10)?': .*--data_path"):
            dataset_name(path)


def test_own_folders_of_pictures(tmp_path):
    for c, name in enumerate(("cat", "dog", "eel")):
        for split, count in (("train", 4), ("val", 2)):
            folder = tmp_path / "pets" / split / name
            folder.mkdir(parents=True)
            for k in range(count):
                Image.fromarray(PIXELS[4 * c + k]).save(folder / f"{k}.png")
    data = load_dataset(tmp_path / "pets", "")
    assert (data.name, data.classes) == ("pets", ["cat", "dog", "eel"])
    assert torch.equal(data.images["train"], chw(PIXELS)) and len(data.labels["test"]) == 6
    with pytest.raises(InputError, match="has train/<class>/ and test/<class>/"):
        load_dataset(tmp_path, "")
