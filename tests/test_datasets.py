"""The data sets: what is loaded, how it is normalised and drawn from, and what is refused."""

import numpy as np
import pytest
import torch
from conftest import random_dataset

from datasets import DATASETS, Dataset, dataset_name, different, load_dataset
from runtime.safe_io import InputError


def test_digits(digits):
    from sklearn.datasets import load_digits
    assert [len(digits.labels[s]) for s in ("train", "test")] == [1437, 360]
    assert digits.images["train"].shape == (1437, 3, 32, 32) and digits.images["train"].dtype == torch.uint8
    x, _ = digits.get_batch("train", slice(None))
    assert abs(x.mean()) < 1e-3 and abs(x.std() - 1) < 1e-3  # the constants of DATASETS
    # The images are scikit-learn's: the brightest pixel of each quarter and the total are kept by the enlargement.
    totals = sorted(image.sum() for image in load_digits().images)
    ours = torch.cat([digits.images[s][:, 0].float().sum((1, 2)) / 255 for s in ("train", "test")])
    assert np.allclose(sorted(ours.numpy()), totals, rtol=0.01)
    assert torch.bincount(digits.labels["test"]).min() >= 34


def test_normalisation():
    data = random_dataset()
    x, labels = data.get_batch("train", torch.tensor([3, 1]))
    raw = data.images["train"][[3, 1]].numpy() / 255
    mean, std = (np.array(v).reshape(1, 3, 1, 1) for v in ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)))
    assert np.allclose(x.numpy(), (raw - mean) / std, atol=1e-5) and labels.tolist() == [3, 1]
    assert np.allclose(data.denormalize(x).numpy(), raw, atol=1e-6)


def test_zca():
    pytest.importorskip("kornia")
    rng = np.random.default_rng(0)
    labels = torch.arange(400) % 4
    images = torch.from_numpy(rng.integers(0, 256, (400, 3, 4, 4), dtype=np.uint8))
    images[:, :, :, 1:] = images[:, :, :, :1] // 2 + images[:, :, :, 1:] // 2  # correlated
    data = Dataset("d", {"train": images, "test": images}, {"train": labels, "test": labels}, "abcd",
                         mean=(0.5,) * 3, std=(0.25,) * 3)
    plain = images.flatten(1).double().numpy() / 255  # the pixels: whitening takes the place of the normalisation
    data.fit_zca()
    x, _ = data.get_batch("train", slice(None))
    centred = plain - plain.mean(0)
    values, vectors = np.linalg.eigh(np.cov(centred.T))
    assert np.allclose(x.flatten(1).numpy(), centred @ vectors @ np.diag((values + 0.1) ** -0.5) @ vectors.T, atol=1e-3)
    assert np.allclose(data.denormalize(x).numpy(), images.numpy() / 255, atol=1e-3)


@pytest.mark.parametrize("n, total", [(3, 12), (4, 12), (20, 12), (256, 50000), (0, 5)])
def test_different_numbers(n, total):
    """All different; with each seed others; each number, and each first number, as often as any other, whichever way."""
    generator = torch.Generator().manual_seed(0)
    drawn = [different(n, total, generator) for _ in range(2000 if total == 12 else 20)]
    assert all(len(set(one.tolist())) == len(one) == min(n, total) and one.dtype == torch.int64 for one in drawn)
    assert all(0 <= one.min() and one.max() < total for one in drawn if n)
    if total == 12:
        for numbers in (torch.cat(drawn), torch.stack(drawn)[:, 0], torch.stack(drawn)[:, -1]):
            counts = torch.bincount(numbers, minlength=total).double()
            expected = len(numbers) / total
            assert ((counts - expected).square() / expected).sum() < 40  # chi-square, 11 degrees of freedom: p = 4e-5


def test_sampling():
    data, generator = random_dataset(num_classes=10, per_class=8), torch.Generator().manual_seed(0)
    everything = data.get_batch("train", slice(None))[0]
    batch = data.sample_class(4, 5, generator)
    positions = [int((everything == image).flatten(1).all(1).nonzero()) for image in batch]
    assert len(set(positions)) == 5 and all(p % 10 == 4 for p in positions)  # without replacement, of the class
    assert len(data.sample_class(4, 5000, generator)) == 8  # the whole class
    x, labels = data.sample(80, generator)
    assert sorted(labels.tolist()) == sorted(data.labels["train"].tolist())
    assert all(torch.equal(x[i], everything[(everything == x[i]).flatten(1).all(1)][0]) for i in range(3))


def write_npz(path, **changes):
    x, y = np.zeros((20, 32, 32, 3), np.uint8), np.arange(20, dtype=np.uint8) % 10
    arrays = {"x_train": x, "y_train": y, "x_test": x, "y_test": y, "classes": np.array(list("abcdefghij")), **changes}
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})


@pytest.mark.parametrize("changes, says", [
    ({"x_test": None}, "x_test"),
    ({"x_train": np.full((20, 32, 32, 3), 1.5, np.float32)}, "float32 with values from 1.5 to 1.5"),
    ({"x_train": np.full((20, 32, 32, 3), -1, np.int64)}, "int64 with values from -1 to -1"),
    ({"x_train": np.zeros((20, 5, 32, 32), np.uint8)}, r"\(20, 5, 32, 32\)"),
    ({"x_train": np.zeros((20, 28, 28, 3), np.uint8)}, r"training images are \(28, 28, 3\), test images \(32, 32, 3\)"),
    ({"x_train": np.zeros((20, 28, 28), np.uint8), "x_test": np.zeros((20, 28, 28), np.uint8)}, r"CIFAR10 has \(32, 32, 3\)"),
    ({"y_train": np.eye(20, 10)}, r"\(20, 10\) for 20 images"),
    ({"y_train": np.arange(20) / 2}, "expected whole numbers"),
    ({"y_train": np.zeros(20, np.uint8)}, "class b has no training image"),
    ({"y_train": np.zeros(19, np.uint8)}, r"\(19,\)"),
    ({"y_test": np.full(20, 10)}, "labels outside 0..9"),
    ({"y_test": np.array([{}] * 20)}, "damaged"),  # a pickled object is not read
])
def test_data_file_with_wrong_content(tmp_path, changes, says):
    write_npz(tmp_path / "cifar10.npz", **changes)
    with pytest.raises(InputError, match=says) as error:
        load_dataset("CIFAR10", tmp_path)
    assert "cifar10.npz" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("damage", [lambda b: b[:-1000], lambda b: b"", lambda b: b"no zip" * 100,
                                    lambda b: b[:5000] + bytes([b[5000] ^ 255]) + b[5001:]],
                         ids=["truncated", "empty", "text", "bit flip"])
def test_damaged_data_file(tmp_path, damage):
    write_npz(tmp_path / "good.npz")
    (tmp_path / "cifar10.npz").write_bytes(damage((tmp_path / "good.npz").read_bytes()))
    with pytest.raises(InputError, match="cifar10.npz is damaged"):
        load_dataset("CIFAR10", tmp_path)


def test_no_data_and_no_download(tmp_path, monkeypatch):
    import torchvision

    def no_network(*args, **kwargs):
        raise OSError("no network")
    monkeypatch.setattr(torchvision.datasets, "CIFAR100", no_network)
    with pytest.raises(InputError, match="internet.*cifar100.npz") as error:
        load_dataset("CIFAR100", tmp_path)
    assert "\n" not in str(error.value) and list(tmp_path.iterdir()) == []


def test_download_is_kept_as_npz(tmp_path, monkeypatch):
    """torchvision's data set becomes the npz, which is then enough on its own."""
    import torchvision

    class Fake:
        classes = list("abcdefghij")

        def __init__(self, root, train, download):
            assert download
            rng = np.random.default_rng(int(train))
            self.data, self.targets = rng.integers(0, 256, (20, 32, 32, 3), dtype=np.uint8), list(range(10)) * 2
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Fake)
    first = load_dataset("CIFAR10", tmp_path)
    monkeypatch.delattr(torchvision.datasets, "CIFAR10")
    second = load_dataset("CIFAR10", tmp_path)
    assert torch.equal(first.images["train"], second.images["train"]) and second.classes == Fake.classes
    assert not torch.equal(first.images["train"], first.images["test"])
    assert [p.name for p in tmp_path.iterdir()] == ["cifar10.npz"]


def test_fingerprint_tells_data_apart():
    """It is the same for the same arrays and another one after a change of one value."""
    def fingerprint(change=None):
        images = {split: torch.zeros(4, 3, 32, 32, dtype=torch.uint8) for split in ("train", "test")}
        labels = {split: torch.arange(4) for split in ("train", "test")}
        if change:
            (images if change[0] == "images" else labels)[change[1]][2] += 1
        return Dataset("CIFAR10", images, labels, "abcdefghij", **DATASETS["CIFAR10"]).fingerprint()
    prints = [fingerprint(), *(fingerprint((what, split)) for what in ("images", "labels") for split in ("train", "test"))]
    assert len(set(prints)) == 5 and fingerprint() == prints[0]


def test_unknown_dataset():
    with pytest.raises(InputError, match="'MNIST'.*CIFAR10, CIFAR100, Digits, or give the path of a .npz file"):
        load_dataset("MNIST", ".")


# ------------------------------------------------------------------------------------------------------ data of the user's
OWN = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3)).astype(np.uint8)


def write_own(path, images=OWN, **changes):
    labels = np.arange(12) % 3
    arrays = {"x_train": images, "y_train": labels, "x_test": images[:6], "y_test": labels[:6], **changes}
    np.savez(path, **arrays)


@pytest.mark.parametrize("images, note", [
    (OWN, None), (OWN.transpose(0, 3, 1, 2), "images given as (N, C, H, W)"), (OWN / 255, "pixels given in [0, 1]"),
    ((OWN / 255).astype(np.float32), "pixels given in [0, 1]"), (OWN.astype(np.float32), None), (OWN.astype(np.int64), None),
    ((OWN / 255).transpose(0, 3, 1, 2), "pixels given in [0, 1]"),
])
def test_own_images_in_any_form(tmp_path, images, note):
    """The same bytes come out, once divided by 255."""
    write_own(tmp_path / "my-set.npz", images)
    data = load_dataset(str(tmp_path / "my-set.npz"), "nowhere")
    assert torch.equal(data.images["train"], torch.from_numpy(OWN).permute(0, 3, 1, 2))
    pixels = OWN.reshape(-1, 3) / 255
    assert np.allclose(data.mean, pixels.mean(0), atol=1e-4) and np.allclose(data.std, pixels.std(0), atol=1e-4)
    x, _ = data.get_batch("train", slice(None))
    assert x.mean((0, 2, 3)).abs().max() < 1e-3 and (x.std((0, 2, 3)) - 1).abs().max() < 1e-2
    assert (data.name, data.classes, data.num_classes) == ("myset", ["0", "1", "2"], 3)
    assert note in data.notes if note else not data.notes
    assert data.describe().startswith("myset: 12 training and 6 test images, 3x8x8, 3 classes, normalised with mean [0.")


def test_own_grey_images_and_labels_in_a_column(tmp_path):
    for images in (OWN[..., 0], OWN[..., :1], OWN[:, None, :, :, 0]):
        write_own(tmp_path / "grey.npz", images, y_train=(np.arange(12) % 3)[:, None], classes=np.array([b"a", b"b", b"c"]))
        data = load_dataset(tmp_path / "grey.npz", "")
        assert torch.equal(data.images["train"][:, 0], torch.from_numpy(OWN[..., 0])) and data.classes == ["a", "b", "c"]
        assert data.labels["train"].tolist() == [0, 1, 2] * 4 and len(data.mean) == 1


@pytest.mark.parametrize("changes, message", [
    ({"y_train": np.arange(1, 13) % 3 + 1, "classes": np.array(list("abc"))}, "labels outside 0..2: 1 to 3"),
    ({"images": (OWN / 255 - 0.5) / 0.25}, "float64 with values from -2 to 2; .*without a normalisation"),
    ({"images": np.zeros_like(OWN)}, "a channel of the training images is constant"),
    ({"y_train": np.zeros(12, int), "y_test": np.zeros(6, int)}, "1 class.es., at least 2"),
    ({"images": np.full(OWN.shape, np.nan)}, "not finite"),
    ({"y_train": np.full(12, 1 + 1j)}, "complex128; expected whole numbers"),
])
def test_own_data_that_cannot_be(tmp_path, changes, message):
    write_own(tmp_path / "own.npz", **changes)
    with pytest.raises(InputError, match=f"own.npz.*{message}"):
        load_dataset(tmp_path / "own.npz", "")


def test_own_folders_of_pictures(tmp_path):
    from PIL import Image
    for split, count in (("train", 4), ("val", 2)):
        for c, name in enumerate(("cat", "dog", "eel")):
            (tmp_path / "pets" / split / name).mkdir(parents=True)
            for k in range(count):
                Image.fromarray(OWN[3 * k + c]).save(tmp_path / "pets" / split / name / f"{k}.png")
    data = load_dataset(tmp_path / "pets", "")
    assert (data.name, data.classes) == ("pets", ["cat", "dog", "eel"]) and len(data.labels["test"]) == 6
    index = [3 * k + c for c in range(3) for k in range(4)]
    assert torch.equal(data.images["train"], torch.from_numpy(OWN[index]).permute(0, 3, 1, 2))
    with pytest.raises(InputError, match="has train/<class>/ and test/<class>/"):
        load_dataset(tmp_path / "pets" / "train", "")


def test_names_of_data_sets(tmp_path):
    assert [dataset_name(name) for name in ("cifar10", "CIFAR-100", "digits")] == ["CIFAR10", "CIFAR100", "Digits"]
    write_own(tmp_path / "cifar10.npz")
    with pytest.raises(InputError, match="cannot be called 'cifar10'; .*--dataset CIFAR10 --data_path"):
        dataset_name(tmp_path / "cifar10.npz")
    (tmp_path / "___.npz").write_bytes(b"")
    with pytest.raises(InputError, match="cannot be called ''"):
        dataset_name(tmp_path / "___.npz")
