"""Real data: CIFAR-10, CIFAR-100, scikit-learn's digits, or a file or folder of the user's.

The last needs no code, only `--dataset PATH` (docs/foreign_files.md).
"""
import argparse
import re
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from formats.arrays import read_arrays, standard_arrays
from runtime.device import copy_to_device
from runtime.safe_io import InputError, sha256_of_tensors, write_atomically

# Mean and standard deviation of each channel, pixels in [0, 1]. CIFAR: SPEC 1.5 (its std is the
# field's habit, not that of the pixels). Digits: measured on the training images.
DATASETS = {
    "CIFAR10": {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2023, 0.1994, 0.2010)},
    "CIFAR100": {"mean": (0.5071, 0.4866, 0.4409), "std": (0.2673, 0.2564, 0.2762)},
    "Digits": {"mean": (0.3054,) * 3, "std": (0.3237,) * 3},
}
NUM_CLASSES = {"CIFAR10": 10, "CIFAR100": 100, "Digits": 10}
ZCA_EPS = 0.1  # SPEC 1.2
CLASS_GROUP_IMAGES = 16384  # real images in memory at a time, several copies of 12 KiB each


class Normalisation(NamedTuple):
    """How images are normalised: by the mean and std of each channel, or by ZCA whitening."""

    mean: tuple
    std: tuple
    zca: bool = False

    def matches(self, other):
        are_close = self.zca or np.allclose(self[:2], other[:2], atol=1e-4)
        return self.zca == other.zca and are_close

    def __str__(self):
        if self.zca:
            return "ZCA-whitened"
        return f"normalised with mean {list(self.mean)}, std {list(self.std)}"


class Dataset:
    """Images on the device, normalised batch by batch.

    images: {"train": (N, C, H, W) uint8, "test": ...}; labels: {"train": (N,) int64, "test": ...}.
    mean, std: of each channel, pixels in [0, 1]. notes: how its file was read.
    """

    def __init__(self, name, images, labels, classes, mean, std, device="cpu", notes=()):
        self.name, self.classes, self.notes = name, list(classes), list(notes)
        self.num_classes = len(self.classes)
        self.device = torch.device(device)
        self.images = {split: x.to(self.device) for split, x in images.items()}
        self.labels = {split: y.to(self.device) for split, y in labels.items()}
        self.channel, *size = self.images["train"].shape[1:]
        self.size = tuple(size)
        self.set_normalisation(mean, std)
        train = self.labels["train"].cpu()
        self._class_indices = [(train == c).nonzero().flatten() for c in range(self.num_classes)]

    def fingerprint(self):
        """SHA-256 of all images and labels."""
        return sha256_of_tensors([*self.images.values(), *self.labels.values()])

    def describe(self):
        """Sizes, classes and normalisation in a line."""
        train, test = len(self.labels["train"]), len(self.labels["test"])
        shape = "x".join(map(str, (self.channel, *self.size)))
        about = (f"{self.name}: {train} training and {test} test images, {shape}, "
                 f"{self.num_classes} classes, {self.normalisation}")
        return ", ".join([about, *self.notes])

    def set_normalisation(self, mean, std):
        """Normalise with these values of each channel, without ZCA."""
        self.mean, self.std, self._zca = tuple(mean), tuple(std), None
        constants = torch.tensor([self.mean, self.std], device=self.device)
        self._mean, self._std = constants.view(2, 1, -1, 1, 1)

    @property
    def normalisation(self):
        return Normalisation(self.mean, self.std, self.zca)

    @property
    def zca(self):
        """Whether images are ZCA-whitened."""
        return self._zca is not None

    def fit_zca(self):
        """ZCA-whiten in place of the normalisation, fitted on the training pixels."""
        import kornia
        self.set_normalisation((0.0,) * self.channel, (1.0,) * self.channel)
        whitening = kornia.enhance.ZCAWhitening(eps=ZCA_EPS, compute_inv=True)
        self._zca = whitening.fit(self.images["train"].float() / 255)

    def normalize(self, pixels):
        """(N, C, H, W) pixels in [0, 1] -> normalised units."""
        x = (pixels - self._mean) / self._std
        if self.zca:
            x = self._zca(x)
        return x

    def denormalize(self, x):
        """Inverse of `normalize`; the result is not clamped to [0, 1]."""
        if self.zca:
            x = self._zca.inverse_transform(x)
        return x * self._std + self._mean

    def get_batch(self, split, index):
        """Normalised images (n, C, H, W) and labels (n,). index: (n,) int64 or a slice."""
        if isinstance(index, torch.Tensor):
            index = copy_to_device(index, self.device)
        return self.normalize(self.images[split][index].float() / 255), self.labels[split][index]

    def class_size(self, c):
        """Number of training images of class c."""
        return len(self._class_indices[c])

    def sample_class_indices(self, c, n, generator):
        """Indices of n random training images of class c, at most all: (n,) on the CPU."""
        return self._class_indices[c][torch.randperm(self.class_size(c), generator=generator)[:n]]

    def sample_indices(self, n, generator):
        """Likewise, of all classes together."""
        return random_indices(n, len(self.labels["train"]), generator)

    def sample_class(self, c, n, generator):
        """Normalised images of `sample_class_indices`, (n, C, H, W)."""
        return self.get_batch("train", self.sample_class_indices(c, n, generator))[0]

    def sample(self, n, generator):
        """Normalised images of `sample_indices` and their labels."""
        return self.get_batch("train", self.sample_indices(n, generator))

    def class_groups(self, batch_real, at_once=None):
        """Ranges of classes whose real batches are in memory together; at_once: so many."""
        if at_once:
            return class_ranges(self.num_classes, 1, at_once)
        per_class = min(batch_real, max(map(len, self._class_indices)))
        return class_ranges(self.num_classes, per_class, CLASS_GROUP_IMAGES)


def random_indices(n, total, generator):
    """n different integers below `total` in random order, at most all: (n,) int64 on the CPU.

    *Performance-impacting*: few of many are drawn until n differ, faster than a permutation.
    """
    if 4 * n > total:
        return torch.randperm(total, generator=generator)[:n]
    found = {}  # a dict keeps the order of the first draws
    while len(found) < n:
        drawn = torch.randint(total, (n + 16,), generator=generator)
        found.update(dict.fromkeys(drawn.tolist()))
    return torch.tensor(list(found)[:n], dtype=torch.int64)


def class_ranges(num_classes, per_class, max_images):
    """Ranges of classes, each of at most `max_images` images, but of one class at least."""
    step = max(1, max_images // max(per_class, 1))
    return [range(c, min(c + step, num_classes)) for c in range(0, num_classes, step)]


# -------------------------------------------------------------------------------- names and loading
def known_dataset(name):
    """The name in DATASETS that `name` means, whatever its case and hyphens, or None."""
    plain = str(name).lower().replace("-", "")
    return next((known for known in DATASETS if known.lower() == plain), None)


def dataset_name(name):
    """The name of a data set, given one in DATASETS or the path of a .npz file or a folder.

    Letters and digits only, since file names put it between underscores. Raises InputError.
    """
    path, known = Path(name), known_dataset(name)
    if known:
        return known
    if not (path.is_dir() or path.is_file() and path.suffix == ".npz"):
        raise InputError(f"unknown --dataset {str(name)!r}; choose {', '.join(DATASETS)}, or the "
                         "path of a .npz file or folder of pictures")
    stem = re.sub(r"[^A-Za-z0-9]", "", path.resolve().stem)
    if known_dataset(stem) or not stem:
        raise InputError(f"--dataset {path}: your own data cannot be called {stem!r}: rename it, "
                         "or name the data set and give --data_path")
    return stem


def add_dataset_flag(parser, default="CIFAR10", text=""):
    """--dataset: a known name, in any case, or the path of a file or folder."""
    def dataset(given):
        try:
            dataset_name(given)
        except InputError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        return known_dataset(given) or given
    parser.add_argument("--dataset", type=dataset, default=default, metavar="DATA",
                        help=f"{', '.join(DATASETS)}, or your own file or folder{text}")


def load_dataset(name, data_path, device="cpu"):
    """Load a data set onto `device`.

    name: CIFAR10 or CIFAR100 (read from `data_path`, or downloaded into it), Digits, or the path of
    a file or folder (formats.arrays), normalised by its own mean and std, rounded to four digits.
    Raises InputError for an unknown name, a damaged file, or a failed download.
    """
    source, name = name, dataset_name(name)
    if name in ("CIFAR10", "CIFAR100"):
        source = Path(data_path) / f"{name.lower()}.npz"
        if not source.exists():
            _download_cifar(name, source)
    arrays = _load_digits() if name == "Digits" else read_arrays(source)
    arrays, notes = standard_arrays(source, arrays)
    shape = arrays["x_train"].shape[1:]
    if name in DATASETS and shape != (32, 32, 3):
        raise InputError(f"{source}: images are {shape}; {name} has (32, 32, 3)")
    normalisation = DATASETS.get(name) or _mean_and_std(source, arrays["x_train"])
    images, labels = {}, {}
    for split in ("train", "test"):
        images[split] = torch.from_numpy(arrays[f"x_{split}"]).permute(0, 3, 1, 2).contiguous()
        labels[split] = torch.from_numpy(arrays[f"y_{split}"])
    return Dataset(name, images, labels, arrays["classes"], device=device,
                   notes=notes, **normalisation)


def _load_digits():
    """scikit-learn's 1 797 digits, 8x8 enlarged to 32x32 RGB; a fifth of each class for testing."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
    digits = load_digits()
    x = torch.from_numpy(digits.images).float()[:, None] / 16  # (1797, 1, 8, 8) in [0, 1]
    x = F.interpolate(x, scale_factor=4, mode="bilinear", align_corners=False)
    x = (x * 255).round().to(torch.uint8).expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
    split = train_test_split(x, digits.target, test_size=0.2, random_state=0,
                             stratify=digits.target)
    return dict(zip(("x_train", "x_test", "y_train", "y_test"), split), classes=digits.target_names)


def _download_cifar(name, path):
    """Download with torchvision and keep the arrays as `path`."""
    import torchvision
    arrays, folder_is_new = {}, not path.parent.exists()
    try:
        for split in ("train", "test"):
            download = getattr(torchvision.datasets, name)
            data = download(path.parent, train=split == "train", download=True)
            arrays |= {f"x_{split}": data.data, f"y_{split}": np.array(data.targets, np.uint8)}
    except (OSError, RuntimeError) as error:
        if folder_is_new:
            with suppress(OSError):  # not there, or with a part of the download in it
                path.parent.rmdir()
        raise InputError(f"no {path} and the download failed ({error}): put {path.name} there "
                         "(docs/reproduce.md) or run once with internet access") from None
    arrays["classes"] = np.array(data.classes)
    write_atomically(path, lambda partial: np.savez(partial, **arrays))


def _mean_and_std(source, pixels):
    """Mean and std of each channel. pixels: (N, H, W, C) uint8, counted as [0, 1]."""
    levels = np.arange(256) / 255
    counts = [np.bincount(x.ravel(), minlength=256) for x in np.moveaxis(pixels, 3, 0)]
    mean = np.array([np.average(levels, weights=count) for count in counts])
    std = [np.average((levels - m) ** 2, weights=count) ** 0.5 for m, count in zip(mean, counts)]
    if min(std) < 1e-3:
        raise InputError(f"{source}: a channel of the training images is constant")
    return {"mean": mean.round(4).tolist(), "std": np.round(std, 4).tolist()}
