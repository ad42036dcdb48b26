"""The real data: CIFAR-10 and CIFAR-100 from `data/` or a download, the digits of scikit-learn, or a file of the user's.

A data set of one's own needs no code: `--dataset FILE.npz`, or a folder of pictures (docs/foreign_files.md).
"""
import hashlib
import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from formats.arrays import read_arrays, standard_arrays
from runtime.device import choose_micro_batch
from runtime.compilation import disable_tf32
from runtime.safe_io import InputError, read_npz, write_atomically

# mean, std: per-channel constants of the normalisation, pixels in [0, 1]. Source: SPEC 1.5 for CIFAR (its std is the
# field's habit, not the pixel std); Digits: measured on its training images.
DATASETS = {
    "CIFAR10": {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2023, 0.1994, 0.2010)},
    "CIFAR100": {"mean": (0.5071, 0.4866, 0.4409), "std": (0.2673, 0.2564, 0.2762)},
    "Digits": {"mean": (0.3054,) * 3, "std": (0.3237,) * 3},
}
NUM_CLASSES = {"CIFAR10": 10, "CIFAR100": 100, "Digits": 10}
ZCA_EPS = 0.1
CLASS_GROUP_IMAGES = 16384  # real images held at a time, some copies of 12 KiB each


class Dataset:
    """Images that stay as uint8 on the device and are normalised batch by batch.

    images: {"train": (N, C, H, W) uint8, "test": ...}; labels: {"train": (N,) int64, ...}; both on one device.
    mean, std: per-channel floats, pixels in [0, 1]. After `fit_zca` the images are ZCA-whitened instead.
    notes: sentences on how its file was understood.
    micro_batch: how many images go through a network at a time where they are attacked; 0: see `choose_micro_batch`.
    """

    def __init__(self, name, images, labels, classes, mean, std, device="cpu", micro_batch=0, notes=()):
        self.name, self.classes, self.num_classes = name, list(classes), len(classes)
        self.notes = list(notes)
        self.device = torch.device(device)
        self.micro_batch = choose_micro_batch(self.device, micro_batch)
        self.images = {split: x.to(self.device) for split, x in images.items()}
        self.labels = {split: y.to(self.device) for split, y in labels.items()}
        self.channel, self.size = self.images["train"].shape[1], tuple(self.images["train"].shape[2:])
        self.set_normalisation(mean, std)
        train_labels = self.labels["train"].cpu()
        self._class_index = [(train_labels == c).nonzero().flatten() for c in range(self.num_classes)]  # CPU

    def fingerprint(self):
        """SHA-256 of all images and labels."""
        digest = hashlib.sha256()
        for part in (*self.images.values(), *self.labels.values()):
            digest.update(part.cpu().contiguous().numpy())
        return digest.hexdigest()

    def set_normalisation(self, mean, std):
        """Normalise by these per-channel floats from now on."""
        self.mean, self.std, self._zca = tuple(mean), tuple(std), None
        self._mean = torch.tensor(self.mean, device=self.device).view(1, -1, 1, 1)
        self._std = torch.tensor(self.std, device=self.device).view(1, -1, 1, 1)

    @property
    def zca(self):
        """Whether the images are ZCA-whitened."""
        return self._zca is not None

    def describe(self):
        """What the data set is, for a reader."""
        normalised = "ZCA-whitened" if self.zca else f"normalised with mean {list(self.mean)}, std {list(self.std)}"
        sizes = f"{len(self.labels['train'])} training and {len(self.labels['test'])} test images"
        return ", ".join([f"{self.name}: {sizes}", "x".join(map(str, (self.channel, *self.size))),
                          f"{self.num_classes} classes", normalised, *self.notes])

    def fit_zca(self):
        """Let ZCA whitening, fitted on the pixels of the training images, take the place of the normalisation (SPEC 1.2)."""
        import kornia
        self.set_normalisation((0.0,) * self.channel, (1.0,) * self.channel)
        zca = kornia.enhance.ZCAWhitening(eps=ZCA_EPS, compute_inv=True)
        with disable_tf32():
            self._zca = zca.fit(self.images["train"].float() / 255)

    def normalize(self, pixels):
        """(N, C, H, W) pixels in [0, 1] -> normalised units."""
        x = (pixels - self._mean) / self._std
        if self._zca is None:
            return x
        with disable_tf32():
            return self._zca(x)

    def denormalize(self, x):
        """(N, C, H, W) normalised units -> pixels; outside [0, 1] where x is no image. Inverse of `normalize`."""
        if self._zca is not None:
            with disable_tf32():
                x = self._zca.inverse_transform(x)
        return x * self._std + self._mean

    def get_batch(self, split, index):
        """Normalised images and labels. index: (n,) int64 or a slice. Returns ((n, C, H, W), (n,))."""
        if isinstance(index, torch.Tensor):
            index = index.to(self.device)
        return self.normalize(self.images[split][index].float() / 255), self.labels[split][index]

    def class_size(self, c):
        """How many training images class c has."""
        return len(self._class_index[c])

    def sample_class_indices(self, c, n, generator):
        """The numbers of n training images of class c without replacement; of the whole class, shuffled, if it is smaller.
        (n,) int64, on the CPU."""
        return self._class_index[c][torch.randperm(self.class_size(c), generator=generator)[:n]]

    def sample_indices(self, n, generator):
        """The numbers of n training images of all classes, likewise."""
        return different(n, len(self.labels["train"]), generator)

    def sample_class(self, c, n, generator):
        """The images of `sample_class_indices`, (n, C, H, W) normalised."""
        return self.get_batch("train", self.sample_class_indices(c, n, generator))[0]

    def sample(self, n, generator):
        """The images of `choose` and their labels."""
        return self.get_batch("train", self.sample_indices(n, generator))

    def class_groups(self, batch_real):
        """Ranges of classes whose batches of `batch_real` images are held at a time, so that memory does not grow with their
        number."""
        largest = max(min(batch_real, self.class_size(c)) for c in range(self.num_classes))
        return class_ranges(self.num_classes, largest, CLASS_GROUP_IMAGES)


def different(n, total, generator):
    """n different numbers below `total` in random order, all of them if there are not so many. (n,) int64, on the CPU.

    *Performance-impacting*: few of many are drawn until n different ones are there, which is as random as the beginning of a
    permutation and takes a fraction of the time for 256 of 50 000.
    """
    if 4 * n > total:
        return torch.randperm(total, generator=generator)[:n]
    found = {}  # in the order of their first draw
    while len(found) < n:
        found.update(dict.fromkeys(torch.randint(total, (n + 16,), generator=generator).tolist()))
    return torch.tensor(list(found)[:n], dtype=torch.int64)


def class_ranges(num_classes, per_class, most):
    """Ranges of classes that together have at most `most` images, `per_class` of each; at least one class in each range."""
    step = max(1, most // max(per_class, 1))
    return [range(first, min(first + step, num_classes)) for first in range(0, num_classes, step)]


def _digits(name, folder):
    """scikit-learn's 1 797 real 8x8 digits as 32x32 RGB, a fifth of each class as test set."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
    digits = load_digits()
    small = torch.from_numpy(digits.images).float()[:, None] / 16  # (1797, 1, 8, 8) in [0, 1]
    large = F.interpolate(small, scale_factor=4, mode="bilinear", align_corners=False)  # (1797, 1, 32, 32)
    x = (large * 255).round().to(torch.uint8).permute(0, 2, 3, 1).expand(-1, -1, -1, 3).numpy()  # (1797, 32, 32, 3)
    x_train, x_test, y_train, y_test = train_test_split(x, digits.target, test_size=0.2, random_state=0,
                                                        stratify=digits.target)
    return {"x_train": x_train, "y_train": y_train, "x_test": x_test, "y_test": y_test,
            "classes": digits.target_names.astype(str)}, "Digits"


def _cifar(name, folder):
    path = folder / f"{name.lower()}.npz"
    if not path.exists():
        _download_cifar(name, folder, path)
    try:
        arrays = read_npz(path, ("x_train", "y_train", "x_test", "y_test", "classes"))
    except InputError as error:
        raise InputError(f"{error}; delete it to have it made again") from None
    return arrays, path


def _download_cifar(name, folder, path):
    """Fetch with torchvision and keep the result as `path`."""
    import torchvision
    new_folder = not folder.exists()
    try:
        splits = {s: getattr(torchvision.datasets, name)(folder, train=s == "train", download=True)
                  for s in ("train", "test")}
    except (OSError, RuntimeError) as error:
        if new_folder and folder.exists() and not any(folder.iterdir()):
            folder.rmdir()  # torchvision made it
        raise InputError(f"no {path} and the download of {name} failed ({error}). Either run once where there is internet "
                         f"access, or put {path.name} (uint8 arrays x_train, y_train, x_test, y_test, classes; see "
                         f"docs/reproduce.md) into {folder}") from None
    arrays = {"classes": np.array(splits["train"].classes)}
    for split, images in splits.items():
        arrays[f"x_{split}"], arrays[f"y_{split}"] = images.data, np.array(images.targets, dtype=np.uint8)
    write_atomically(path, lambda partial: np.savez(partial, **arrays))


# Each: (name, folder) -> arrays as in the npz files, and where they come from.
LOADERS = {"CIFAR10": _cifar, "CIFAR100": _cifar, "Digits": _digits}


def known_dataset(name):
    """The name in DATASETS that is meant by `name`, whatever its case and hyphens; None for none."""
    plain = {known.lower(): known for known in DATASETS}
    return plain.get(str(name).lower().replace("-", ""))


def dataset_name(name):
    """The name of a data set, given one of DATASETS or the path of a file or folder of the user's: letters and digits only,
    since it stands between underscores in the names of files. Raises InputError for what is neither."""
    known, path = known_dataset(name), Path(name)
    if known:
        return known
    if not (path.is_dir() or path.is_file() and path.suffix == ".npz"):
        raise InputError(f"unknown --dataset {str(name)!r}; choose one of {', '.join(DATASETS)}, or give the path of a .npz "
                         "file or of a folder of pictures")
    own = re.sub(r"[^A-Za-z0-9]", "", path.resolve().stem)
    if known_dataset(own) or not own:
        raise InputError(f"--dataset {path}: a data set of your own cannot be called {own!r}; rename it"
                         + (f", or read that one with --dataset {known_dataset(own)} --data_path {path.parent}" if own else ""))
    return own


def load_dataset(name, data_path, device="cpu", micro_batch=0):
    """Load CIFAR10, CIFAR100 (from `data_path`, or downloaded into it), Digits (embedded in scikit-learn), or a file.

    name: one of DATASETS; or the path of a .npz file, or of a folder of pictures, see formats.arrays. The mean and the standard
    deviation of the training pixels normalise those, rounded to four digits.
    Returns a Dataset on `device`; micro_batch: see there. Raises InputError for an unknown name, a damaged file, or data that is not
    to be had.
    """
    own = dataset_name(name)
    if own in DATASETS:
        arrays, where = LOADERS[own](own, Path(data_path))
    else:
        arrays, where = read_arrays(name), name
    arrays, notes = standard_arrays(where, arrays)
    if own in DATASETS and arrays["x_train"].shape[1:] != (32, 32, 3):
        raise InputError(f"{where}: images are {arrays['x_train'].shape[1:]}; {own} has (32, 32, 3)")
    normalisation = DATASETS[own] if own in DATASETS else _normalisation_of(where, arrays["x_train"])
    images = {s: torch.from_numpy(arrays[f"x_{s}"]).permute(0, 3, 1, 2).contiguous() for s in ("train", "test")}
    labels = {s: torch.from_numpy(arrays[f"y_{s}"]) for s in ("train", "test")}
    return Dataset(own, images, labels, arrays["classes"], device=device, micro_batch=micro_batch, notes=notes, **normalisation)


def _normalisation_of(where, pixels):
    """Mean and standard deviation of each channel. pixels: (N, H, W, C) uint8."""
    counts = np.stack([np.bincount(channel.ravel(), minlength=256) for channel in np.moveaxis(pixels, 3, 0)])  # (C, 256)
    shares, levels = counts / counts.sum(1, keepdims=True), np.arange(256) / 255
    mean = shares @ levels
    std = np.sqrt((shares * (levels - mean[:, None]) ** 2).sum(1))
    if std.min() < 1e-3:
        raise InputError(f"{where}: a channel of the training images is constant")
    return {"mean": mean.round(4).tolist(), "std": std.round(4).tolist()}
