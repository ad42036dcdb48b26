"""Synthetic sets: what they start as, the baselines beside them, soft labels, how to train on them.

Source: SPEC 1.3 (packing), 1.6 (soft labels), 3.1 (training), 3.5 (what a file says).
"""
import argparse
import dataclasses
import json
import math
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F

from augment import MIXES, pack, parse_dsa_strategy, unpack
from formats.inputs import (check_and_normalise, normalisation_of, normalise_alone, read_input,
                            take_flags)
from formats.synset_file import SyntheticSet
from networks import NETWORKS, get_network
from runtime.device import MICRO_BATCH
from runtime.safe_io import InputError, reason, sha256, sha256_of_tensors
from runtime.seeding import make_generator

INITS = ("real", "noise")
LR_SCHEDULES = ("step", "cosine")
LABELS = ("hard", "stored", "online")
# Of a TrainConfig; int: a whole number.
LEAST = {"epochs": 1, "lr_net": 0.0, "batch_train": 1, "temperature": 0.01, "noise": 0.0,
         "ema": 0.0, "warm_up": 0.0}


# ------------------------------------------------------------------------- how to train on a set
@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How a network is trained on a synthetic set; the defaults are those of SPEC 3.1.

    epochs: `epochs` + 1 are run, as published. lr_net: of SGD, momentum 0.9, weight decay 5e-4.
    dsa_strategy: operations of augment.py joined by "_". temperature: of soft labels.
    lr_schedule: "step", a tenth after half of the epochs; "cosine", to 0, step by step. warm_up: of
    the cosine, the share of the steps in which the learning rate rises. mix, noise: with labellers,
    how images of a batch are mixed (augment.MIXES), and the standard deviation of the noise on
    them, in normalised units. ema: decay of the average of weights that is kept, step by step; 0:
    the last weights.
    """

    epochs: int = 1000
    lr_net: float = 0.01
    batch_train: int = 256
    dsa_strategy: str = "color_crop_cutout_flip_scale_rotate"
    temperature: float = 1.0
    lr_schedule: str = "step"
    mix: str = "none"
    noise: float = 0.0
    ema: float = 0.0
    warm_up: float = 0.0

    @classmethod
    def from_meta(cls, meta, **given):
        """What is `given` and not None; else what the recipe in the meta of a file says.

        Raises InputError for a value out of range or an unknown name.
        """
        values = dataclasses.asdict(cls())
        for source in (meta.get("recipe", {}), given):
            values |= {key: source[key] for key in values if source.get(key) is not None}
        for key, least in LEAST.items():
            kinds = int if isinstance(least, int) else (int, float)
            if not isinstance(values[key], kinds) or not least <= values[key] < math.inf:
                raise InputError(f"the recipe of the set: {key} is {values[key]!r}; expected a "
                                 f"number of at least {least}")
        try:
            parse_dsa_strategy(str(values["dsa_strategy"]))
        except ValueError as error:
            raise InputError(f"the recipe of the set: {error}") from None
        for key, known in ("lr_schedule", LR_SCHEDULES), ("mix", MIXES):
            if values[key] not in known:
                raise InputError(f"the recipe of the set: {key} is {values[key]!r}; known are "
                                 f"{', '.join(known)}")
        return cls(**values)


def training_set(synset, pack):
    """What a network trains on: unpacked images (M, C, H, W), and their labels.

    Labels: (M,) int64, or soft ones as logits (M, num_classes). M = N * pack * pack.
    """
    labels = synset.labels.repeat(pack**2) if synset.soft_labels is None else synset.soft_labels
    return unpack(synset.images, pack), labels


def build_labellers(synset, device="cpu"):
    """The networks of a SyntheticSet that label what a student sees, frozen, in eval mode.

    Raises InputError for an unknown architecture or parameters that do not fit it.
    """
    networks, shape = [], synset.images.shape[1:]
    for labeller in synset.labellers:
        model, state = labeller["model"], labeller["state"]
        if model not in NETWORKS:
            raise InputError(f"a labeller is a {model[:60]!r}; known are {', '.join(NETWORKS)}")
        try:
            num_classes = len(state["classifier.bias"])
            net = get_network(model, shape[0], num_classes, tuple(shape[1:]), 0, device)
            net.load_state_dict(state)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"the state of a labeller is of no {model} for images of "
                             f"{tuple(shape)} ({reason(error)})") from None
        networks.append(net.eval().requires_grad_(False))
    return networks


def stored_labellers(networks, model):
    """Networks of one architecture, as a SyntheticSet holds them: float16, on the CPU."""
    def half(tensor):
        return tensor.detach().cpu().half() if tensor.is_floating_point() else tensor.cpu()
    return [{"model": model, "state": {key: half(value) for key, value in net.state_dict().items()}}
            for net in networks]


def load_labellers(path, index=0):
    """The labellers of set number `index` of a file, for `train_on_set`; [] if it has none."""
    return build_labellers(read_sets(path, index).synset.sets[index])


def read_sets(path, index, packed=1):
    """A file as an Input. Raises InputError where it has no set of this number."""
    source = read_input(path, NETWORKS, is_set=True, packed=packed)
    if index >= (count := len(source.synset.sets)):
        raise InputError(f"{path} has {count} set(s); there is no {index}")
    return source


def label_loss(logits, labels, temperature=1.0):
    """Cross-entropy of logits (N, num_classes) with labels, a () tensor.

    labels: (N,) classes; or soft labels, logits (N, num_classes): both are then divided by
    `temperature` and the loss is multiplied by its square. Source: Hinton et al. 2015; SPEC 1.6.
    """
    if labels.dim() == 1:
        return F.cross_entropy(logits, labels)
    targets = F.softmax(labels / temperature, dim=1)
    return F.cross_entropy(logits / temperature, targets) * temperature**2


def load_synset(path, index=0, *, packed=1, images=None):
    """A synthetic set in any layout, ready for `utils.train_on_set`.

    path: a file or folder. index: which set of the file. packed: K, if it holds K x K sub-images
    and does not say so. images: "normalised" or "pixels", if its values leave that open.
    Returns images (M, C, H, W), normalised and unpacked; labels, (M,) int64 or logits
    (M, num_classes); and a TrainConfig. Raises InputError for what cannot be understood.
    """
    source = read_sets(path, index, packed)
    file = source.synset
    normalise_alone(source, images=images)
    for warning in source.warnings:
        warnings.warn(warning, stacklevel=2)
    return *training_set(file.sets[index], file.pack), TrainConfig.from_meta(file.meta)


# -------------------------------------------------------------------------- starts and baselines
def init_flag(text):
    """An argparse type: one of INITS, or the path of a set."""
    if text not in INITS and not Path(text).exists():
        raise argparse.ArgumentTypeError(f"{text} is no file, nor {' or '.join(INITS)}")
    return text


def labels_flag(text):
    """An argparse type: of LABELS; "prior" is what older commands call "stored"."""
    text = "stored" if text == "prior" else text
    if text not in LABELS:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(LABELS)}")
    return text


def initial_set(data, ipc, pack_by, init, generator, exp=0):
    """Class-major images (C*ipc, C, H, W), normalised, and labels (C*ipc,).

    init: "real", random training images, pack_by * pack_by in each stored one; "noise", standard
    normal values; or the path of a set. Raises InputError if that does not fit.
    """
    label_syn = torch.arange(data.num_classes, device=data.device).repeat_interleave(ipc)
    if init not in INITS:
        sets = load_initial_sets(init, data, ipc, pack_by).synset.sets
        return sets[exp % len(sets)].images.to(data.device), label_syn
    if init == "noise":
        shape = (len(label_syn), data.channel, *data.size)
        return torch.randn(shape, generator=generator).to(data.device), label_syn
    return random_images(data, label_syn, pack_by, generator), label_syn


def random_images(data, classes, pack_by, generator):
    """Random training images of these classes, (N,), pack_by * pack_by in each stored one:
    (N, C, H, W). Raises InputError if a class has too few."""
    found = torch.empty(len(classes), data.channel, *data.size, device=data.device)
    for c, count in enumerate(torch.bincount(classes.cpu(), minlength=data.num_classes).tolist()):
        images = data.sample_class(c, count * pack_by**2, generator)
        if len(images) < count * pack_by**2:
            raise InputError(f"{count * pack_by**2} random images of class {c} are needed, "
                             f"{data.name} has {len(images)} (evaluate.py: --no_control)")
        if count:
            found[classes == c] = pack(images, pack_by)
    return found


def load_initial_sets(path, data, ipc, pack_by):
    """The sets of --init FILE, as an Input. Raises InputError if they are not like this run's."""
    source = read_input(path, NETWORKS, is_set=True, packed=pack_by)
    source.names["model"] = None  # the set is trained on --model
    same_name = str(source.names["dataset"]).lower() == data.name.lower()
    take_flags(source, dataset=data.name if same_name else None)
    theirs = normalisation_of(source, data.normalisation, data.zca)
    if not theirs.matches(data.normalisation):
        raise InputError(f"--init {path} is {theirs}, this run's images are {data.normalisation}")
    shape = (ipc * data.num_classes, data.channel, *data.size)
    order = torch.arange(data.num_classes).repeat_interleave(ipc)
    expected = shape, pack_by, data.name
    for synset in source.synset.sets:
        found = tuple(synset.images.shape), source.synset.pack, source.dataset or data.name
        if found != expected or not torch.equal(synset.labels, order):
            raise InputError(f"--init {path}: images {found[0]}, packing {found[1]}, of {found[2]};"
                             f" this run has {shape}, {pack_by}, {data.name}, class after class")
    check_and_normalise(source, data)
    return source


def baseline_packs(pack_by):
    """The baselines beside a distilled set: {name: how it is packed}."""
    packs = {"random real": 1}
    if pack_by > 1:
        packs[f"random real, {pack_by}x{pack_by} packed"] = pack_by
    return packs


def baseline_set(name, pack_by, data, ipc, seed, exp):
    """Random real images, as many as the distilled set of experiment `exp` stores."""
    generator = make_generator(seed, exp, name)
    return SyntheticSet(*initial_set(data, ipc, pack_by, "real", generator))


def class_major(unpacked, stored):
    """(stored*k*k, ...) in the order of `unpack` -> all sub-images of a stored image together."""
    return torch.stack(unpacked.split(stored), dim=1).flatten(0, 1)


# ----------------------------------------------------------------------------------- soft labels
@torch.no_grad()
def soft_labels(networks, images, micro_batch=MICRO_BATCH):
    """Mean logits (M, num_classes) of networks in eval mode on normalised images. SPEC 1.6."""
    total = 0
    for net in networks:
        was_training = net.training
        net.eval()
        total = total + torch.cat([net(x) for x in images.split(micro_batch)])
        net.train(was_training)
    return total / len(networks)


# What is said of a network that gave labels: fractions of n (aa_n) test images.
TEACHER_FIGURES = ("clean_acc", "robust_2_acc", "robust_4_acc", "robust_acc", "n", "aa_acc", "aa_n")


def describe_prior_networks(paths):
    """What the files beside networks of pretrain.py say: [{"file", "model", "sha256", ...}]."""
    teachers = []
    for path in paths:
        about = json.loads(Path(f"{path}.json").read_text())
        figures = {key: about[key] for key in TEACHER_FIGURES if key in about}
        teachers.append({"file": Path(path).name, "model": about["model"],
                         "threat_model": about["threat_model"], "sha256": sha256(path), **figures})
    return teachers


def describe_pool_networks(members, model, threat_name):
    """The same of the networks of a pool, with their running accuracy."""
    return [{"file": None, "model": model, "threat_model": threat_name,
             "sha256": sha256_of_tensors(member.net.state_dict().values()),
             "running_acc": member.running_accuracy().item() / 100} for member in members]
