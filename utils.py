"""What both experiments and the tools share: data, training on a synthetic set, accuracy, random streams, run files.

Nothing here takes a decision about the method; that stands in the two ROME scripts.
"""
import argparse
import collections
import hashlib
import json
import math
import os
import platform
import re
import shlex
import sys
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import fast
from attacks import CHUNK, PGD_STEPS, attack_images
from augment import dsa_apply, dsa_draw, unpack
from checkpoint import Interrupted, Interrupts, StateFile, lock, refuse_other_flags
from files import InputError, load_into, read_npz, write_atomically, write_json, write_tensors
from networks import NETWORKS, eval_pool, get_network

# The accuracies in a row of an Evaluator, fractions, and their names in tables. `robust_acc` is at the eps of the threat model
# (8/255); the smaller radii are measured under `pixel` only.
COLUMNS = {"clean_acc": "clean", "clamp_acc": "clamp-only", "robust_2_acc": "robust 2/255", "robust_4_acc": "robust 4/255",
           "robust_acc": "robust 8/255"}
ACCURACIES = ("clean_acc", "clamp_acc", "robust_acc")  # those that every row has
SELECT_IMAGES = 2000  # real training images on which --select train measures; all of a smaller set


# --------------------------------------------------------------------------------------------------------- random streams
def stream_seed(seed, *key):
    """The seed of one named random stream.

    seed: int >= 0, the --seed of the run. key: strings and non-negative ints that name the stream, such as
    ("attack", experiment). Different keys give independent streams; none depends on how much another was used.
    """
    spawn_key = tuple(zlib.crc32(part.encode()) if isinstance(part, str) else part for part in key)
    return int(np.random.SeedSequence(seed, spawn_key=spawn_key).generate_state(1, np.uint64)[0] >> 1)


def stream(seed, *key, device="cpu"):
    """A torch.Generator on `device` for the stream `key` (see stream_seed)."""
    return torch.Generator(device).manual_seed(stream_seed(seed, *key))


# ------------------------------------------------------------------------------------------------------------------ data
# mean, std: per-channel constants of the normalisation, pixels in [0, 1]. Source: SPEC 1.5 for CIFAR (its std is the
# field's habit, not the pixel std); Digits: measured on its training images.
DATASETS = {
    "CIFAR10": {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2023, 0.1994, 0.2010)},
    "CIFAR100": {"mean": (0.5071, 0.4866, 0.4409), "std": (0.2673, 0.2564, 0.2762)},
    "Digits": {"mean": (0.3054,) * 3, "std": (0.3237,) * 3},
}
ZCA_EPS = 0.1
BYTES_PER_ATTACKED_IMAGE = 8 << 20  # generous for the published ConvNet, whose activations are 2.5 MiB
MOST_ATTACKED = 4096  # images at a time: an activation of ConvNetW256 then has 2^30 values, and an index of 32 bits is enough


def attack_chunk(device, chunk=0):
    """How many images are attacked at a time: `chunk` if it is given, else by the free memory of the device.

    A power of two, so that a little memory in use elsewhere does not change it.
    """
    if chunk or device.type != "cuda":
        return chunk or CHUNK
    free, _ = torch.cuda.mem_get_info(device)
    fits = max(256, min(MOST_ATTACKED, free // 2 // BYTES_PER_ATTACKED_IMAGE))
    return 1 << fits.bit_length() - 1


class Dataset:
    """Images that stay as uint8 on the device and are normalised batch by batch.

    images: {"train": (N, C, H, W) uint8, "test": ...}; labels: {"train": (N,) int64, ...}; both on one device.
    mean, std: per-channel floats, pixels in [0, 1]. After `fit_zca` the images are ZCA-whitened instead.
    chunk: how many images go through a network at a time where they are attacked; 0: see `attack_chunk`.
    """

    def __init__(self, name, images, labels, classes, mean, std, device="cpu", chunk=0):
        self.name, self.classes, self.num_classes = name, list(classes), len(classes)
        self.device = torch.device(device)
        self.chunk = attack_chunk(self.device, chunk)
        self.images = {split: x.to(self.device) for split, x in images.items()}
        self.labels = {split: y.to(self.device) for split, y in labels.items()}
        self.channel, self.size = self.images["train"].shape[1], tuple(self.images["train"].shape[2:])
        self.mean, self.std = tuple(mean), tuple(std)
        self._mean = torch.tensor(mean, device=self.device).view(1, -1, 1, 1)
        self._std = torch.tensor(std, device=self.device).view(1, -1, 1, 1)
        self._zca = None
        train_labels = self.labels["train"].cpu()
        self._class_index = [(train_labels == c).nonzero().flatten() for c in range(self.num_classes)]  # CPU

    def fingerprint(self):
        """SHA-256 of all images and labels."""
        digest = hashlib.sha256()
        for part in (*self.images.values(), *self.labels.values()):
            digest.update(part.cpu().contiguous().numpy())
        return digest.hexdigest()

    def fit_zca(self):
        """Let ZCA whitening, fitted on the pixels of the training images, take the place of the normalisation (SPEC 1.2)."""
        import kornia
        self.mean, self.std = (0.0,) * self.channel, (1.0,) * self.channel
        self._mean, self._std = torch.zeros_like(self._mean), torch.ones_like(self._std)
        zca = kornia.enhance.ZCAWhitening(eps=ZCA_EPS, compute_inv=True)
        with fast.exact_products():
            self._zca = zca.fit(self.images["train"].float() / 255)

    def normalize(self, pixels):
        """(N, C, H, W) pixels in [0, 1] -> normalised units."""
        x = (pixels - self._mean) / self._std
        if self._zca is None:
            return x
        with fast.exact_products():
            return self._zca(x)

    def denormalize(self, x):
        """(N, C, H, W) normalised units -> pixels; outside [0, 1] where x is no image. Inverse of `normalize`."""
        if self._zca is not None:
            with fast.exact_products():
                x = self._zca.inverse_transform(x)
        return x * self._std + self._mean

    def take(self, split, index):
        """Normalised images and labels. index: (n,) int64 or a slice. Returns ((n, C, H, W), (n,))."""
        if isinstance(index, torch.Tensor):
            index = index.to(self.device)
        return self.normalize(self.images[split][index].float() / 255), self.labels[split][index]

    def class_size(self, c):
        """How many training images class c has."""
        return len(self._class_index[c])

    def sample_class(self, c, n, generator):
        """n training images of class c without replacement; the whole class, shuffled, if it is smaller."""
        order = torch.randperm(self.class_size(c), generator=generator)[:n]
        return self.take("train", self._class_index[c][order])[0]

    def sample(self, n, generator):
        """n training images of all classes without replacement, with labels; the whole set if it is smaller."""
        return self.take("train", torch.randperm(len(self.labels["train"]), generator=generator)[:n])


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
            "classes": digits.target_names.astype(str)}


def _cifar(name, folder):
    path = folder / f"{name.lower()}.npz"
    if not path.exists():
        _download_cifar(name, folder, path)
    try:
        arrays = read_npz(path, ("x_train", "y_train", "x_test", "y_test", "classes"))
    except InputError as error:
        raise InputError(f"{error}; delete it to have it made again") from None
    for split in ("train", "test"):
        x, y = arrays[f"x_{split}"], arrays[f"y_{split}"]
        if x.dtype != np.uint8 or x.ndim != 4 or x.shape[1:] != (32, 32, 3) or y.shape != (len(x),) or len(x) == 0:
            raise InputError(f"{path}: x_{split} is {x.dtype} {x.shape} with labels {y.shape}; "
                             "expected uint8 (N, 32, 32, 3) and (N,)")
        if not np.issubdtype(y.dtype, np.integer) or set(np.unique(y)) - set(range(len(arrays["classes"]))):
            raise InputError(f"{path}: y_{split} has labels outside 0..{len(arrays['classes']) - 1}")
    return arrays


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


LOADERS = {"CIFAR10": _cifar, "CIFAR100": _cifar, "Digits": _digits}  # (name, folder) -> arrays as in the npz files


def load_dataset(name, data_path, device="cpu", chunk=0):
    """Load CIFAR10, CIFAR100 (from `data_path`, or downloaded into it) or Digits (embedded in scikit-learn).

    Returns a Dataset on `device`; chunk: see there. Raises InputError for an unknown name, a damaged file, or data that is not
    to be had.
    """
    if name not in DATASETS:
        raise InputError(f"unknown --dataset {name!r}; choose one of {', '.join(DATASETS)}")
    arrays = LOADERS[name](name, Path(data_path))
    images = {s: torch.from_numpy(arrays[f"x_{s}"]).permute(0, 3, 1, 2).contiguous() for s in ("train", "test")}
    labels = {s: torch.from_numpy(arrays[f"y_{s}"].astype(np.int64)) for s in ("train", "test")}
    return Dataset(name, images, labels, arrays["classes"].tolist(), device=device, chunk=chunk, **DATASETS[name])


# -------------------------------------------------------------------------------------------------------- pool of networks
@dataclass
class PoolMember:
    """A network of the pool, its optimiser, and its running count of right answers on the batches it was trained on."""

    net: torch.nn.Module
    optimizer: torch.optim.Optimizer
    correct: torch.Tensor  # () float, on the device
    seen: int = 0

    def record(self, logits, labels):
        """Count the right answers of one training batch. logits: (N, num_classes), labels: (N,)."""
        self.correct += (logits.detach().argmax(1) == labels).sum()
        self.seen += len(labels)

    def running_accuracy(self):
        """Percent, 0 to 100, as a () tensor; 0 before the first batch (w_f of SPEC 1)."""
        return 100 * self.correct / max(self.seen, 1)


class NetPool:
    """The networks that the robust prior is made with: at most `limit`, the oldest leave first. Source: SPEC 1.1.

    make_net: int (how many were made before) -> network; make_optimizer: network -> optimiser.
    """

    fixed = False

    def __init__(self, make_net, make_optimizer, limit, start=3):
        self.make_net, self.make_optimizer, self.limit = make_net, make_optimizer, limit
        self.members, self.made = [], 0
        self.push(start)

    def push(self, count):
        """Add `count` fresh networks and drop the oldest beyond the limit."""
        for _ in range(count):
            net = self.make_net(self.made)
            device = next(net.parameters()).device
            self.members.append(PoolMember(net, self.make_optimizer(net), torch.zeros((), device=device)))
            self.made += 1
        del self.members[:-self.limit]

    def choose(self, count, generator, begin=0, end=None):
        """`count` different members at random (all, shuffled, if there are fewer).

        begin, end: choose from this slice of the pool, oldest first, if it holds more than 10 members.
        """
        sliced = self.members[begin:end]
        candidates = sliced if len(sliced) > 10 else self.members
        order = torch.randperm(len(candidates), generator=generator)[:count]
        return [candidates[i] for i in order.tolist()]

    def reset_running_accuracy(self):
        for member in self.members:
            member.correct.zero_()
            member.seen = 0

    def state_dict(self):
        """The whole pool, as plain values and tensors."""
        return {"made": self.made, "members": [{"net": m.net.state_dict(), "optimizer": m.optimizer.state_dict(),
                                                "correct": m.correct, "seen": m.seen} for m in self.members]}

    def load_state_dict(self, state):
        """Become the pool of a `state_dict`."""
        self.members, self.made = [], state["made"] - len(state["members"])
        self.push(len(state["members"]))
        for member, saved in zip(self.members, state["members"]):
            member.net.load_state_dict(saved["net"])
            member.optimizer.load_state_dict(saved["optimizer"])
            member.correct.copy_(saved["correct"])
            member.seen = saved["seen"]


class FixedPool(NetPool):
    """Networks that are used as they are: no push, no training, and a running accuracy that stays.

    networks: (network, its robust training accuracy as a fraction) each.
    """

    fixed = True

    def __init__(self, networks):
        self.members = [PoolMember(net, None, torch.tensor(accuracy, device=next(net.parameters()).device), seen=1)
                        for net, accuracy in networks]

    def push(self, count):
        pass

    def reset_running_accuracy(self):
        pass

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def load_robust_prior(args, data):
    """The networks of --robust_prior, if any: [(network, robust training accuracy), ...], frozen, in eval mode.

    Each has a file of the same name and `.json` beside it, as pretrain.py writes them. Raises InputError that names a network
    of another architecture, data set, class count or threat model, or without such a file.
    """
    networks = []
    for path in map(Path, args.robust_prior):
        about_path = path.with_name(path.name + ".json")
        if not path.is_file():
            raise InputError(f"--robust_prior {path} does not exist or is a folder")
        try:
            about = json.loads(about_path.read_text())
            said = {key: about[key] for key in ("model", "dataset", "num_classes", "threat_model")}
            accuracy = float(about["train_robust_acc"])
            if not 0 <= accuracy <= 1:
                raise ValueError(f"train_robust_acc is {accuracy}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"--robust_prior {path}: {about_path.name}, which says how it was trained, is missing or damaged "
                             f"({type(error).__name__}: {error}); pretrain.py writes it") from None
        wanted = {"model": args.model, "dataset": args.dataset, "num_classes": data.num_classes,
                  "threat_model": args.threat_model}
        for key, value in wanted.items():
            if said[key] != value:
                raise InputError(f"--robust_prior {path}: its {key} is {said[key]}, this run's {value}")
        net = load_into(get_network(args.model, data.channel, data.num_classes, data.size, 0), path).to(data.device).eval()
        networks.append((net.requires_grad_(False), accuracy))
    return networks


# ------------------------------------------------------------------------------------------- training on a synthetic set
def train_on_set(net, images, labels, *, epochs, lr_net, batch_train, dsa_strategy, generator, attack=None):
    """Train a fresh network on a (synthetic) set, in place. Source: SPEC 3.1.

    images: (N, C, H, W) normalised, already unpacked; labels: (N,). epochs: `epochs` + 1 are run, as published.
    lr_net: of SGD with momentum 0.9 and weight decay 5e-4. generator: CPU, for the order and the augmentation.
    attack: (augmented images, labels) -> attacked ones, for adversarial training.
    """
    def new_optimizer(lr):
        return torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)

    net.train()
    optimizer = new_optimizer(lr_net)
    for epoch in range(epochs + 1):
        for index in torch.randperm(len(images), generator=generator).split(batch_train):
            batch = images[index.to(images.device)]
            draw = dsa_draw(dsa_strategy, batch.shape[2:], generator, n=len(batch))  # one draw an image: not siamese
            batch, batch_labels = dsa_apply(batch, draw), labels[index.to(labels.device)]
            if attack:
                batch = attack(batch, batch_labels)
            loss = F.cross_entropy(fast.forward(net, batch), batch_labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if epoch == epochs // 2 + 1:
            optimizer = new_optimizer(lr_net * 0.1)  # QUIRK (published): a new optimiser, so the momentum is lost
    net.eval()


@torch.no_grad()
def accuracy(net, images, labels, chunk=1024):
    """The fraction of normalised images (N, C, H, W) that `net`, in eval mode, classifies as labels (N,)."""
    was_training = net.training
    net.eval()
    correct = sum((net(x).argmax(1) == y).sum() for x, y in zip(images.split(chunk), labels.split(chunk)))
    net.train(was_training)
    return float(correct) / len(labels)


def robust_accuracies(net, images, labels, threat, generator, chunk=CHUNK):
    """Accuracies (fractions) under PGD with a random start, as the threat model judges: under `published` targeted, 10 steps
    (SPEC 3.1); under `pixel` untargeted, 20 steps, at 2, 4 and 8 of 255. Arguments as in `accuracy`.

    Returns {column: accuracy}; the columns are those of COLUMNS that the threat model has.
    """
    return {column: accuracy(net, attack_images(net, images, labels, threat, generator, eps=eps, chunk=chunk, **threat.judge),
                             labels) for column, eps in threat.judge_eps.items()}


def judge_cost(threat):
    """Image-gradients that `robust_accuracies` takes of an image."""
    return threat.judge["steps"] * len(threat.judge_eps)


class Evaluator:
    """Trains fresh networks on a synthetic set and measures them (SPEC 3.1), as the flags of a run say.

    args: the flags eval_mode, model, num_eval, test_limit, select, seed and those of `train_on_set`.
    """

    def __init__(self, args, data, threat):
        self.data, self.threat, self.seed, self.num_eval = data, threat, args.seed, args.num_eval
        self.models = eval_pool(args.eval_mode, args.model)
        self.networks = len(self.models) * self.num_eval  # that a set is evaluated with
        self.protocol = {"epochs": args.epoch_eval_train, "lr_net": args.lr_net, "batch_train": args.batch_train,
                         "dsa_strategy": args.dsa_strategy}
        self.test_set = data.take("test", slice(args.test_limit or None))
        self.select_set = None
        if args.select == "train":  # the same images for every run of a data set, so no seed enters
            order = torch.randperm(len(data.labels["train"]), generator=stream(0, "select"))
            self.select_set = data.take("train", order[:SELECT_IMAGES])

    def __call__(self, images, labels, packed, *key, select=False):
        """images: (N, C, H, W) normalised, 2x2-packed if `packed`; labels: (N,). key: names the random streams.

        Returns one dict a network: model; clean_acc, clamp_acc (the clamp-only control) and the columns of
        `robust_accuracies`, all fractions of the n test images; select_acc, the mean of those columns on the selection images
        (with --select test or last, on the test images), None unless `select`; seconds.
        """
        if packed:
            images, labels = unpack(images), labels.repeat(4)  # (4N, C, H, W), (4N,)
        return [self._one_network(images, labels, model, ("evaluate", *key, model, i), select)
                for model in self.models for i in range(self.num_eval)]

    def _one_network(self, images, labels, model, key, select):
        start, data, threat = time.perf_counter(), self.data, self.threat
        net = get_network(model, data.channel, data.num_classes, data.size, stream_seed(self.seed, *key, "init"), data.device)
        train_on_set(net, images, labels, generator=stream(self.seed, *key, "train"), **self.protocol)
        rng = stream(self.seed, *key, "attack", device=data.device)
        test_images, test_labels = self.test_set
        robust = robust_accuracies(net, test_images, test_labels, threat, rng, data.chunk)
        select_acc = None
        if select:
            judged = robust_accuracies(net, *self.select_set, threat, rng, data.chunk) if self.select_set else robust
            select_acc = float(np.mean(list(judged.values())))
        return {
            "model": model,
            "clean_acc": accuracy(net, test_images, test_labels),
            "clamp_acc": accuracy(net, threat.clamp_only(test_images), test_labels),
            **robust,
            "select_acc": select_acc,
            "n": len(test_labels),
            "seconds": round(time.perf_counter() - start, 2),
        }


def robustness_metrics(clean_acc, attacked_acc, clean_seconds, attacked_seconds, crei_weight=0.5):
    """The metrics of BEARD and ROME, in percent. Source: SPEC 3.3.

    clean_acc: accuracies (fractions), one an IPC setting. attacked_acc: all attacked accuracies of all these settings.
    clean_seconds, attacked_seconds: wall time of the test pass, likewise; of several clean passes of a setting, the fastest.
    crei_weight: of RR against AE in CREI.
    Returns {"RR", "I-RR", "AE", "CREI", "I-CREI"}. RR and I-RR exceed 100 where attacks raise the accuracy.
    Raises ValueError without accuracies, or if the clean accuracy is 0.
    """
    if len(clean_acc) == 0 or len(attacked_acc) == 0:
        raise ValueError("metrics need a clean and an attacked accuracy")
    clean, mean, worst = np.mean(clean_acc), np.mean(attacked_acc), np.min(attacked_acc)
    if clean == 0:
        raise ValueError("metrics are not defined where the clean accuracy is 0")
    unattacked, slowest = np.mean(clean_seconds), np.max(attacked_seconds)
    rr = 0.0 if clean == worst else 1 - (clean - mean) / (clean - worst)
    improved_rr = 1 - (clean - mean) * (clean - worst) / clean**2
    attack_efficiency = 0.0 if slowest <= unattacked else (np.mean(attacked_seconds) - unattacked) / (slowest - unattacked)
    metrics = {"RR": rr, "I-RR": improved_rr, "AE": attack_efficiency,
               "CREI": crei_weight * rr + (1 - crei_weight) * attack_efficiency,
               "I-CREI": crei_weight * improved_rr + (1 - crei_weight) * attack_efficiency}
    return {name: float(100 * value) for name, value in metrics.items()}


def percent(values):
    """'mean +- std' of fractions, in percent; the population standard deviation, as the field reports it."""
    return f"{100 * np.mean(values):5.2f} +- {100 * np.std(values):4.2f}"


def check_finite(values):
    """Raise FloatingPointError naming the first of {name: float} that is not finite."""
    for name, value in values.items():
        if not math.isfinite(value):
            raise FloatingPointError(f"{name} is {value}")


# ------------------------------------------------------------------------------------------------------------- run files
def versions():
    """The versions that a result depends on, as plain strings."""
    from importlib.metadata import version  # importing torchvision takes two seconds
    return {"python": platform.python_version(), "torch": str(torch.__version__), "torchvision": version("torchvision"),
            "numpy": np.__version__, "threads": str(torch.get_num_threads())}


def save_synset(path, sets, rows, meta):
    """Write synthetic sets in the DC layout plus `meta`; read it with torch.load(path, weights_only=True).

    sets: one (images (N, C, H, W) normalised, labels (N,)) an experiment. rows: of an Evaluator; their robust accuracy is
    `accs_all_exps`, as in the published files, the clean one is in `meta`. meta: plain Python values. Source: SPEC 3.5.
    """
    accs = {key: {model: columns[key] for model, columns in by_model(rows).items()} for key in ("robust_acc", "clean_acc")}
    data = [[images.detach().float().cpu().clone(), labels.cpu().clone()] for images, labels in sets]
    write_tensors(path, {"data": data, "accs_all_exps": accs["robust_acc"], "meta": {**meta, "clean_accs": accs["clean_acc"]}})


def save_grid(path, images, data, per_row):
    """Write normalised images (N, C, H, W) as one PNG, `per_row` a row, enlarged to about 1000 pixels."""
    from torchvision.utils import make_grid, save_image
    grid = make_grid(data.denormalize(images.detach()).clamp(0, 1), nrow=per_row, pad_value=1.0)  # (C, H', W')
    factor = max(1, min(math.ceil(960 / grid.shape[2]), 1200 // grid.shape[1]))
    grid = grid.repeat_interleave(factor, dim=1).repeat_interleave(factor, dim=2)
    write_atomically(path, lambda partial: save_image(grid, partial))


NO_EFFECT = ("fresh", "save_interval")  # on the result
# Flags that a run that goes on may change.
MAY_CHANGE = ("Iteration", "eval_interval", "save_path", "save_interval", "data_path", "fresh")


class Run:
    """What one run writes, and what it goes on from.

    <save_path>/<run>/: flags.json, metrics.jsonl (one JSON object a line), log.txt, grids as PNG
    <save_path>/ROME_res_<method>_<dataset>_<model>_<ipc>ipc.pt: the distilled sets, at the end
    <checkpoint_path>/<run>/best_exp<k>.pt: the best set of experiment k so far
    <checkpoint_path>/<run>/state.pt, state.previous.pt: the last two saved states

    A context manager: SIGINT and SIGTERM inside it save the state and raise `Interrupted`. With a saved state the run goes on
    from it; `progress` and `experiment` then hold what was saved. Without one, or with --fresh, a folder of that name is
    kept beside the new one as <run>.1, <run>.2, ...
    progress: dict of plain values and tensors that is saved as it is. experiment: the part that `watch` described, or None.
    """

    def __init__(self, args, data):
        self.args, self.data = args, data
        self.name = f"{args.method}_{args.dataset}_{args.model}_{args.ipc}ipc_{args.threat_model}_seed{args.seed}"
        self.folder = Path(args.save_path) / self.name
        self.checkpoint_folder = Path(args.checkpoint_path) / self.name
        if self.folder.resolve() == self.checkpoint_folder.resolve():
            raise InputError(f"--save_path and --checkpoint_path are both {args.save_path}; choose two folders: the one of an "
                             "earlier run is moved aside, and its saved state must not be")
        self.result_file = Path(args.save_path) / f"ROME_res_{args.method}_{args.dataset}_{args.model}_{args.ipc}ipc.pt"
        for flag, folder in (("save_path", self.folder.parent), ("checkpoint_path", self.checkpoint_folder)):
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise InputError(f"cannot write to --{flag} {getattr(args, flag)} ({error}); choose another folder") from None
        # The second one stands beside the run folder, which may be moved.
        self._locks = [lock(self.checkpoint_folder), lock(self.folder.parent, f".{self.name}.lock")]
        self._state_file = StateFile(self.checkpoint_folder, args.save_interval)
        self._same = {"flags": vars(args), "versions": versions(), "device": device_name(data.device),
                      "data": data.fingerprint()}
        saved, damage = (None, None) if args.fresh else self._state_file.load(
            (*self._same, "chunk", "progress", "experiment", "seconds", "metrics_bytes", "finished"))
        if saved:
            self._check_saved(saved)
            data.chunk = saved["chunk"]  # another one draws other random starts on CUDA, and free memory changes
        else:
            self._state_file.remove()
        saved = saved or {"progress": {}, "experiment": None, "seconds": 0.0, "metrics_bytes": 0, "finished": False}
        self.progress, self.experiment, self.finished = saved["progress"], saved["experiment"], saved["finished"]
        self._describe = None
        self._open(saved)
        if damage:
            self.say(damage)

    def _check_saved(self, saved):
        where = f"the run saved in {self.checkpoint_folder}"
        refuse_other_flags(saved["flags"], vars(self.args), MAY_CHANGE, where,
                           "--fresh to start over, or another --checkpoint_path")
        if saved["data"] != self._same["data"]:
            raise InputError(f"{where} began with other data than {self.args.data_path} holds now")
        if saved["device"].split("(")[0] != self._same["device"].split("(")[0]:
            raise InputError(f"{where} ran on {saved['device']}, whose random streams {self._same['device']} does not have; go "
                             "on there, or start over with --fresh")
        if saved["progress"].get("sets") and saved["flags"]["Iteration"] != self.args.Iteration:
            raise InputError(f"--Iteration {self.args.Iteration}: {where} has finished experiments of "
                             f"{saved['flags']['Iteration']} iterations, and all of its sets are to be alike")
        if saved["experiment"] and saved["experiment"]["it"] > self.args.Iteration:
            raise InputError(f"--Iteration {self.args.Iteration}: {where} is at iteration {saved['experiment']['it']} already")

    def _open(self, saved):
        """Begin, or go on with, the files of the run folder."""
        going_on = bool(saved.get("flags"))
        earlier = self._set_aside() if self.folder.exists() and not going_on else None
        self.folder.mkdir(exist_ok=True)
        self._log = open(self.folder / "log.txt", "a")
        self._metrics = open(self.folder / "metrics.jsonl", "a")
        self._metrics.truncate(min(saved["metrics_bytes"], os.fstat(self._metrics.fileno()).st_size))  # later lines come again
        self._metrics.seek(0, os.SEEK_END)  # truncation leaves the position, which the next state records, where it was
        self.start = time.perf_counter() - saved["seconds"]
        if self.finished:
            other = saved["flags"]["Iteration"] != self.args.Iteration
            self.say(f"{self.name} is finished: {self.result_file}, {self.folder}; "
                     + (f"--Iteration {self.args.Iteration} does not prolong it; " if other else "") + "--fresh starts over")
            return
        about = {"command": shlex.join(sys.argv), **{k: self._same[k] for k in ("flags", "versions", "device")}}
        write_json(self.folder / "flags.json", about)
        if going_on:
            where = f"experiment {len(self.progress.get('sets', []))}"
            where += f", iteration {self.experiment['it']}" if self.experiment else ""
            self.say(f"going on with {self.name} at {where}, after {duration(saved['seconds'])}")
            if saved["versions"] != self._same["versions"] or saved["device"] != self._same["device"]:
                self.say(f"the saved part ran with {saved['versions']} on {saved['device']}, this is {self._same['versions']} "
                         f"on {self._same['device']}: the result may differ in the last bits from that of an undisturbed run")
        if earlier:
            self.say(f"{self.folder} held an earlier run, now in {earlier}")
        if self.result_file.exists():
            self.say(f"{self.result_file} exists and will be replaced at the end")

    def _set_aside(self):
        number = 1
        while (target := self.folder.with_name(f"{self.name}.{number}")).exists():
            number += 1
        os.replace(self.folder, target)
        return target

    def __enter__(self):
        self._interrupts = Interrupts(self.say)
        return self

    def __exit__(self, kind, error, traceback):
        try:
            if isinstance(error, Interrupted) and error.whole and not self.finished:
                self.save_state()
        finally:
            self._interrupts.restore()
            for file in (self._log, self._metrics, *self._locks):
                file.close()

    # ------------------------------------------------------------------------------------------------------ saved state
    def watch(self, describe):
        """From now on a saved state has `describe()` as its `experiment`; None: no experiment is under way."""
        self._describe, self.experiment = describe, None

    def uninterrupted(self):
        """A context in which signals wait, because the state of the run is not whole."""
        return self._interrupts.deferred()

    def checkpoint(self, it):
        """Before iteration `it`, with the state whole: save it if it is time to, or stop if a signal asked for it."""
        self._interrupts.check()
        if self._state_file.due(it):
            self.save_state()

    def save_state(self, finished=False):
        self._metrics.flush()
        self._state_file.save({**self._same, "chunk": self.data.chunk, "progress": self.progress,
                               "experiment": self._describe and self._describe(),
                               "seconds": time.perf_counter() - self.start, "metrics_bytes": self._metrics.tell(),
                               "finished": finished})

    def finish(self):
        """The results are written: only the fact stays in the saved state."""
        self.progress, self._describe, self.finished = {}, None, True
        self._state_file.remove()
        self.save_state(finished=True)

    # ------------------------------------------------------------------------------------------------------------ reports
    def say(self, text):
        """A line for the reader: on the screen, above a progress bar if there is one, and in log.txt."""
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()
        print(text, file=self._log, flush=True)

    def metric(self, event, **values):
        """A line for programs, in metrics.jsonl."""
        line = {"event": event, "seconds": round(time.perf_counter() - self.start, 2), **values}
        print(json.dumps(line), file=self._metrics, flush=True)

    def report_evaluation(self, rows, **values):
        """Rows of an Evaluator, for each network name: one line on the screen, one in metrics.jsonl."""
        where = " ".join(name if value is True else f"{name} {value}" for name, value in values.items() if value is not False)
        for model, columns in by_model(rows).items():
            self.metric("evaluation", **values, model=model, **columns)
            self.say(f"{where}, {model}: " + "  ".join(f"{name} {percent(columns[key])}" for key, name in
                                                       {**COLUMNS, "select_acc": "select"}.items() if key in columns))

    def save_grids(self, name, images):
        """PNG grids, a row a class or, of many classes, several (ten at ipc 1); a packed set also with its sub-images."""
        ipc, classes = self.args.ipc, self.data.num_classes

        def per_row(per_class):
            return per_class * max(1, math.isqrt(classes // per_class))
        save_grid(self.folder / f"{name}.png", images, self.data, per_row=per_row(ipc) if ipc > 1 else 10)
        if self.args.aug:
            parts = torch.stack(unpack(images).chunk(4), dim=1).flatten(0, 1)  # (C*ipc*4, 3, H, W): class-major again
            save_grid(self.folder / f"{name}_unpacked.png", parts, self.data, per_row=per_row(4 * ipc))

    def _meta(self, **more):
        args, data = self.args, self.data
        return {"dataset": args.dataset, "classes": data.classes, "mean": list(data.mean), "std": list(data.std),
                "packed": args.aug, "zca": args.zca, "threat_model": args.threat_model, "seed": args.seed,
                "flags": {name: value for name, value in vars(args).items() if name not in NO_EFFECT},
                "versions": versions(), "device": device_name(data.device), **more}

    def save_best(self, exp, best):
        """best: dict of images, labels, iteration, rows."""
        save_synset(self.checkpoint_folder / f"best_exp{exp}.pt", [(best["images"], best["labels"])], best["rows"],
                    self._meta(iteration=best["iteration"]))

    def save_result(self, sets, table):
        """The final file and the final table. sets: (images, labels) an experiment; table: {set name: rows}."""
        save_synset(self.result_file, sets, table[self.args.method], self._meta())
        args = self.args
        measured = [key for key in COLUMNS if key in table[args.method][0]]
        self.say(f"\n{args.dataset}, {args.ipc} image(s) per class, threat model {args.threat_model}, {args.num_exp} set(s) x "
                 f"{args.num_eval} network(s), {table[args.method][0]['n']} test images; accuracy in percent, mean +- std\n"
                 f"{'set':<24} {'network':<12} " + " ".join(f"{COLUMNS[key]:>15}" for key in measured))
        for name, rows in table.items():
            for model, columns in by_model(rows).items():
                self.metric("final", set=name, model=model, **columns)
                self.say(f"{name:<24} {model:<12} " + " ".join(f"{percent(columns[key]):>15}" for key in measured))
        self.say(f"\nset: {self.result_file}\nrun: {self.folder}")


def by_model(rows):
    """Rows of an Evaluator -> {network name: {column: list, n: int}}; a column that was not measured is left out."""
    models = {}
    for row in rows:
        columns = models.setdefault(row["model"], {"n": row["n"]})
        for key in (*COLUMNS, "select_acc"):
            if row.get(key) is not None:
                columns.setdefault(key, []).append(row[key])
    return models


# ----------------------------------------------------------------------------------------------------------- command line
def add_switch(parser, name, default, text):
    """A pair of flags --name and --no_name."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument(f"--{name}", action="store_true", default=default, help=f"{text}; --no_{name} turns it off")
    group.add_argument(f"--no_{name}", dest=name, action="store_false", default=default, help=argparse.SUPPRESS)


def add_compatibility_flags(parser):
    """The flags of the published scripts that nothing reads or that had a single legal value. Source: SPEC 1.2."""
    group = parser.add_argument_group("accepted for compatibility, without effect")
    group.add_argument("--net_train_real", action="store_true")
    for name in ("inner_loop", "mismatch_lambda", "mismatch_type", "weight_layer_index", "local_num", "local_weight",
                 "conf_path", "last", "dis_metric", "ij_selection", "aug_num"):
        group.add_argument(f"--{name}", metavar="X")


def at_least(low, kind=int):
    """An argparse type: a finite number of `kind` that is >= low."""
    def parse(text):
        value = kind(text)
        if not (value >= low and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"{text} is not a number of at least {low}")
        return value
    parse.__name__ = kind.__name__
    return parse


def fraction(text):
    """An argparse type: a number between 0 and 1."""
    value = at_least(0, float)(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def method_name(text):
    """An argparse type: a name that can stand between underscores in a file name."""
    if not re.fullmatch(r"[A-Za-z0-9+.-]+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not made of letters, digits, '+', '.' and '-'")
    return text


def add_fast_flags(parser):
    """The flags of `fast`."""
    add_switch(parser, "compile", True, "torch.compile for the batches of which there are enough to pay for it")
    parser.add_argument("--precision", choices=fast.PRECISIONS, default="tf32", help="of convolutions and matrix products; "
                        "tf32 is fp32 where there is no TensorFloat-32; bf16: in the attacks and the training of networks")


def get_device(name, deterministic=False):
    """"auto" (CUDA if it is there), "cpu", "cuda" or "cuda:N" -> torch.device. Raises InputError if it is not there.

    deterministic: let PyTorch refuse operations whose result depends on the order of threads (CUDA has some; CPU none here).
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    found = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if name == "auto":
        return torch.device("cuda:0" if len(found) > 1 else "cpu")
    if name not in found + ["cuda"] * (len(found) > 1):
        raise InputError(f"--device {name} is not available here; choose auto or one of {', '.join(found)}")
    return torch.device(name)


def run_script(main):
    """Run `main()`; turn the errors that a user can mend into one line and a non-zero exit status."""
    fast.reuse_freed_memory()
    try:
        main()
    except (InputError, OSError, FloatingPointError) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: error: {error}")
    except torch.OutOfMemoryError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: error: the memory of the device is full ({str(error).split('.')[0]}); smaller "
                 "numbers of images at a time need less: --chunk, --batch_real, --trained_bs, --batch_train")
    except Interrupted as stop:
        rest = "goes on from here" if stop.whole else "goes on from the last saved state"
        same = "the same command without --fresh" if "--fresh" in sys.argv else "the same command"
        print(f"{Path(sys.argv[0]).name}: stopped by {stop}; {same} {rest}", file=sys.stderr)
        sys.exit(stop.exit_status)
    except KeyboardInterrupt:
        print(f"{Path(sys.argv[0]).name}: interrupted", file=sys.stderr)
        sys.exit(130)


# ------------------------------------------------------------------------------------------------------------ time and cost
class Clock:
    """How long the phases of a run take and what is left; str() of it is "1.2 s/iteration, ETA 3 min".

    `expect` announces a phase; `lap` ends one. A phase that never ended counts with its estimate.
    """

    def __init__(self):
        self.total, self.estimate, self.done, self.spent = {}, {}, {}, {}
        self.bar = None  # a tqdm bar of iterations
        self._last = time.perf_counter()

    def expect(self, phase, total, estimate):
        """`total` phases of that name will follow, of `estimate` seconds each. Starts the first lap."""
        self.total[phase], self.estimate[phase] = total, estimate
        self.done[phase], self.spent[phase] = 0, 0.0
        self._last = time.perf_counter()

    def skip(self, phase, count=1):
        """`count` phases of that name were done by an earlier part of the run."""
        self.total[phase] -= count
        if self.bar is not None and phase == "iteration":
            self.bar.update(count)

    def lap(self, phase):
        """The time since the last lap was one phase of that name."""
        now = time.perf_counter()
        self.done[phase] += 1
        self.spent[phase] += now - self._last
        self._last = now
        if self.bar is not None and phase == "iteration":
            self.bar.update()
            self.bar.set_postfix_str(f"ETA {duration(self.eta())}")

    def seconds(self, phase):
        """Seconds of one such phase: measured if one has ended, else estimated."""
        return self.spent[phase] / self.done[phase] if self.done[phase] else self.estimate[phase]

    def eta(self):
        """Seconds to the end of the run."""
        return sum(max(self.total[p] - self.done[p], 0) * self.seconds(p) for p in self.total)

    def __str__(self):
        return f"{duration(self.seconds('iteration'))}/iteration, ETA {duration(self.eta())}"


def duration(seconds):
    """'4.5 s', '12 min' or '3.4 h'."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def device_name(device):
    """What the run computes on, for a reader."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads)"


def forward_flops(net, channel, size):
    """Floating-point operations of one forward pass of one image, in convolutions and linear layers (a multiply-add counts as
    two). torch.utils.flop_counter says the same, after the two seconds of its imports."""
    flops = []

    def count(layer, inputs, output):
        flops.append(2 * output.numel() * layer.weight[0].numel())  # each output value is a product with one row or filter
    hooks = [layer.register_forward_hook(count) for layer in net.modules()
             if isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear))]
    net.eval()
    with torch.no_grad():
        net(torch.zeros(1, channel, *size, device=next(net.parameters()).device))
    for hook in hooks:
        hook.remove()
    return sum(flops)


def image_gradients_per_second(net, data, threat):
    """Measure the speed of attacks: (images x PGD steps) a second on real images, as many at a time as the run will take. Takes
    about a second."""
    images, labels = data.take("train", slice(data.chunk))
    generator = torch.Generator(data.device).manual_seed(0)
    for steps in (1, 1 if data.device.type == "cpu" else PGD_STEPS):  # the first is the warm-up
        start = time.perf_counter()
        attack_images(net, images, labels, threat, generator, steps=steps)  # its audit synchronises the device
    return len(images) * steps / (time.perf_counter() - start)


def print_plan(args, data, threat, run, clock, evaluations, reports):
    """Say what the run is about to do and, from a short measurement, how long it will take; tell `clock` the same.

    evaluations: how many sets are evaluated for selection in each experiment; reports: how many more, without selection.
    """
    per_class = [min(args.batch_real, data.class_size(c)) for c in range(data.num_classes)]
    train_size, test_size = len(data.labels["train"]), len(data.labels["test"])
    # Image-gradients: (images x PGD steps), and one more for a training step. Source: SPEC 4.
    trained = 0 if args.robust_prior else args.fetch_net_num * args.model_train_steps
    gradients = args.outer_loop * ((PGD_STEPS if args.attack_prior else 0.5) * args.train_net_num * sum(per_class)
                                   + ((PGD_STEPS if args.attack_pool else 0) + 1) * trained * min(args.trained_bs, train_size))
    stored = args.ipc * data.num_classes
    trained_on = stored * (4 if args.aug else 1)
    models = eval_pool(args.eval_mode, args.model)
    networks = len(models) * args.num_eval
    # A training step costs 1.5 image-gradients: it has the gradient of the weights as well.
    gradients_report = networks * (1.5 * trained_on * (args.epoch_eval_train + 1)
                                   + (judge_cost(threat) + 1) * (args.test_limit or test_size))
    gradients_select = networks * judge_cost(threat) * (min(SELECT_IMAGES, train_size) if args.select == "train" else 0)

    net = get_network(args.model, data.channel, data.num_classes, data.size, 0, data.device)
    flops = 2 * forward_flops(net, data.channel, data.size)  # of an image-gradient: forward and backward to the input
    if args.compile:
        compile_planned(net, data, *planned_batches(args, data, threat), run.say)
    rate = image_gradients_per_second(net, data, threat)
    clock.expect("iteration", args.Iteration * args.num_exp, gradients / rate)
    clock.expect("evaluation", evaluations * args.num_exp, (gradients_report + gradients_select) / rate)
    clock.expect("report", reports * args.num_exp, gradients_report / rate)
    run.say(f"{run.name} on {device_name(data.device)}: {train_size} training, {test_size} test images of {data.num_classes} "
            f"classes; threat model {threat.name}, eps {255 * threat.eps:.3g}/255, step {255 * threat.step_size:.3g}/255")
    run.say(f"{args.num_exp} set(s) of {stored} stored images" + (f" ({trained_on} sub-images)" if args.aug else "")
            + f", {args.Iteration} iterations each, {evaluations + reports} evaluations each of {networks} network(s)")
    run.say(f"an iteration: {gradients:.0f} image-gradients of {flops / 1e9:.3g} GFLOP = {gradients * flops / 1e12:.3g} TFLOP; "
            f"measured {rate:.0f} image-gradients/s; estimated {clock} in all")
    small = sum(n < args.batch_real for n in per_class)
    if small:
        run.say(f"--batch_real {args.batch_real} is more than {small} of the classes have: all their images are used")


def compile_planned(net, data, attacked, trained, say):
    """fast.compile_planned for a network of this data set. attacked, trained: {batch size: image-gradients}."""
    flops = 2 * forward_flops(net, data.channel, data.size)
    fast.compile_planned(net, (data.channel, *data.size), {size: n * flops for size, n in attacked.items()},
                         {size: n * flops for size, n in trained.items()}, say)


def set_batches(count, batch, epochs):
    """Training on `count` images in batches: {batch size: image-gradients}, of which a training step costs 1.5."""
    work = collections.Counter({min(batch, count): 1.5 * epochs * (count // batch) * batch})
    work[count % batch] += 1.5 * epochs * (count % batch)
    return work


COMPILE_PAYS_WITHIN = 50  # outer iterations


def planned_batches(args, data, threat):
    """The batches of COMPILE_PAYS_WITHIN outer iterations and one evaluation, whatever --Iteration says: a run that is given
    more iterations later computes the same as one that had them from the start.

    Returns {batch size: image-gradients} of the attacks, and of training.
    """
    attacked, trained, chunk = collections.Counter(), collections.Counter(), data.chunk

    def attack(images, times, steps=PGD_STEPS):
        attacked[chunk] += images // chunk * chunk * steps * times
        attacked[images % chunk] += images % chunk * steps * times

    updates = COMPILE_PAYS_WITHIN * args.outer_loop * args.train_net_num
    steps = 0 if args.robust_prior else COMPILE_PAYS_WITHIN * args.outer_loop * args.fetch_net_num * args.model_train_steps
    pool_batch = min(args.trained_bs, len(data.labels["train"]))
    for classes in class_groups(args, data) if args.attack_prior else ():
        attack(sum(min(args.batch_real, data.class_size(c)) for c in classes), updates)
    attack(pool_batch if args.attack_pool else 0, steps)
    trained[pool_batch] += 1.5 * pool_batch * steps
    attack(args.test_limit or len(data.labels["test"]), args.num_eval, judge_cost(threat))
    trained_on = args.ipc * data.num_classes * (4 if args.aug else 1)
    return attacked, trained + set_batches(trained_on, args.batch_train, args.num_eval * (args.epoch_eval_train + 1))


CLASS_GROUP_IMAGES = 16384  # real images held at a time, some copies of 12 KiB each


def class_groups(args, data):
    """Ranges of classes whose real batches are held at a time, so that memory does not grow with their number."""
    largest = max(min(args.batch_real, data.class_size(c)) for c in range(data.num_classes))
    step = max(1, CLASS_GROUP_IMAGES // max(largest, 1))
    return [range(first, min(first + step, data.num_classes)) for first in range(0, data.num_classes, step)]


def check_sizes(args, data):
    """Raise InputError for sizes that this data set or this network cannot serve."""
    net = get_network(args.model, data.channel, data.num_classes, data.size, 0)
    if any(isinstance(layer, torch.nn.BatchNorm2d) for layer in net.modules()) and not args.robust_prior:
        others = ", ".join(name for name in NETWORKS if not name.endswith("BN"))
        raise InputError(f"--model {args.model} has BatchNorm, which the pool does not admit (an embedding would depend on the "
                         f"batch around it); choose one of {others}, or --robust_prior")
    if not range(len(net.features))[:args.embed_last]:
        raise InputError(f"--embed_last {args.embed_last} leaves none of the {len(net.features)} layers of {args.model}; 1000 "
                         "means all")
    needed = args.ipc * (4 if args.aug else 1)
    for c in range(data.num_classes):
        if data.class_size(c) == 0:
            raise InputError(f"--dataset {args.dataset}: class {data.classes[c]} has no training image")
        if data.class_size(c) < needed and (args.init == "real" or args.baseline):
            raise InputError(f"--ipc {args.ipc}" + (" with --aug" if args.aug else "") + f" takes {needed} real images of each "
                             f"class; class {data.classes[c]} has {data.class_size(c)}: choose a smaller --ipc, or "
                             "--init noise --no_baseline")
    if args.test_limit > len(data.labels["test"]):
        raise InputError(f"--test_limit {args.test_limit} is more than the {len(data.labels['test'])} test images")
