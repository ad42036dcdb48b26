"""Synthetic sets: what they start as, the controls beside them, their soft labels, and how to train on them (the recipe).

Source: SPEC 1.3 (packing), 1.6 (soft labels), 3.5 (what a file says of them).
"""
import hashlib
import json
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F

from augment import pack, parse_dsa_strategy, unpack
from datasets import DATASETS
from runtime.device import MICRO_BATCH
from formats.inputs import check_and_normalise, read_input, same_normalisation, take_flags
from runtime.safe_io import InputError, sha256
from runtime.seeding import make_generator
from formats.synset_file import SyntheticSet, mean_and_std
from networks import NETWORKS


# ---------------------------------------------------------------------------------------------- the first set, the controls
INITS = ("real", "noise")


def initial_set(args, data, generator, init, pack_by, exp=0):
    """Class-major images (C*ipc, 3, H, W), normalised, and labels (C*ipc,).

    init: "real" for random training images, pack_by*pack_by to a stored image; "noise" for standard normal values; or the path
    of a set, whose images are taken. Raises InputError where that is of another size, packing or order.
    """
    label_syn = torch.arange(data.num_classes, device=data.device).repeat_interleave(args.ipc)
    if init not in INITS:
        sets = start_from(init, data, args.ipc, pack_by).synset.sets
        return sets[exp % len(sets)].images.to(data.device), label_syn
    if init == "noise":
        return torch.randn(len(label_syn), data.channel, *data.size, generator=generator).to(data.device), label_syn
    images = [data.sample_class(c, args.ipc * pack_by**2, generator) for c in range(data.num_classes)]
    return torch.cat([pack(img_c, pack_by) for img_c in images]), label_syn


def start_from(path, data, ipc, pack):
    """The sets of --init, as an Input (formats.inputs). Raises InputError if they are of another data set, normalisation,
    size, packing or order than this run's."""
    one = read_input(path, NETWORKS, is_set=True, packed=pack)
    one.unknown.pop("model", None)  # the set is trained on --model
    take_flags(one, dataset=data.name if one.unknown.get("dataset", "").lower() == data.name.lower() else None)
    same_normalisation(one, data)
    size = (ipc * data.num_classes, data.channel, *data.size)
    order = torch.arange(data.num_classes).repeat_interleave(ipc)
    for found in one.synset.sets:
        theirs = tuple(found.images.shape), one.synset.pack, one.dataset or data.name
        if theirs != (size, pack, data.name) or not torch.equal(found.labels, order):
            raise InputError(f"--init {path}: images {theirs[0]}, packing {theirs[1]}, of {theirs[2]}; this run has {size}, "
                             f"{pack}, {data.name}, class after class")
    check_and_normalise(one, data)
    return one


def baseline_packs(args):
    """The controls beside a distilled set, {name: how it is packed}: random real images, and packed ones if that is."""
    packs = {"random real": 1}
    if args.pack > 1:
        packs[f"random real, {args.pack}x{args.pack} packed"] = args.pack
    return packs if args.baseline else {}


def baseline_sets(args, exp, data):
    """The controls of experiment `exp`, with as many stored images as the distilled set: {name: (SyntheticSet, how packed)}."""
    return {name: (SyntheticSet(*initial_set(args, data, make_generator(args.seed, exp, name), "real", pack_by)), pack_by)
            for name, pack_by in baseline_packs(args).items()}


def class_major(unpacked, stored):
    """Sub-images, or their labels, in the order of `unpack` -> all those of a stored image, and so of a class, together.

    unpacked: (stored*k*k, ...).
    """
    return torch.stack(unpacked.split(stored), dim=1).flatten(0, 1)


# ------------------------------------------------------------------------------------------------------------ soft labels
@torch.no_grad()
def soft_labels(networks, images, micro_batch=MICRO_BATCH):
    """The mean logits of `networks`, in eval mode, on normalised images (M, C, H, W): (M, num_classes). Source: SPEC 1.6."""
    total = 0
    for net in networks:
        was_training = net.training
        net.eval()
        total = total + torch.cat([net(x) for x in images.split(micro_batch)])
        net.train(was_training)
    return total / len(networks)


def training_set(one, pack):
    """What a network trains on: the sub-images of a SyntheticSet, (M, C, H, W), M = N*pack*pack, and their labels: (M,)
    int64, or, if the set has soft ones, logits (M, num_classes)."""
    labels = one.labels.repeat(pack**2) if one.soft_labels is None else one.soft_labels
    return unpack(one.images, pack), labels


def load_synset(path, index=0, *, packed=1, images=None):
    """A synthetic set in any layout, ready to train on: (images, labels, recipe), for `utils.train_on_set`.

    path: a file or a folder, see formats.layouts. index: which set of the file. packed: K, if it holds K x K sub-images in each
    image and does not say so. images: "normalised" or "pixels", if its values leave that open.
    Returns images (M, C, H, W), normalised and unpacked; labels, (M,) int64 or, if they are soft, logits (M, classes); and
    the options of `utils.train_on_set`. Raises InputError for what cannot be understood.
    """
    one = read_input(path, NETWORKS, is_set=True, packed=packed)
    meta = one.synset.meta
    if index >= len(one.synset.sets):
        raise InputError(f"{path} has {len(one.synset.sets)} set(s), from 0; there is no {index}")

    def normalize(pixels):
        said = meta if {"mean", "std"} <= set(meta) else DATASETS.get(one.dataset)
        if said is None or one.synset.declared_zca():
            raise InputError(f"{path} does not say how its pixels are normalised")
        mean, std = mean_and_std(said)
        return (pixels - mean) / std
    one.synset.normalise(normalize, images, bool(one.synset.declared_zca()))
    for warning in one.warnings + one.synset.warnings:
        warnings.warn(warning, stacklevel=2)
    return *training_set(one.synset.sets[index], one.synset.pack), protocol_of(meta)


def label_loss(logits, labels, temperature=1.0):
    """Cross-entropy of logits (N, num_classes) against labels (N,), or against soft ones, logits (N, num_classes), both then
    divided by `temperature` and the loss multiplied by its square (Hinton et al. 2015). A () tensor; Source: SPEC 1.6."""
    if labels.dim() == 1:
        return F.cross_entropy(logits, labels)
    return F.cross_entropy(logits / temperature, F.softmax(labels / temperature, dim=1)) * temperature**2


def with_soft_labels(image_syn, label_syn, pool, args, exp, data):
    """A set with its labels, and with --labels prior those of the controls too: mean logits of the networks of the pool.

    Returns plain values for the saved state: set, [images, labels, soft labels or None]; controls, {name: soft labels};
    teachers, what is known of the networks.
    """
    if args.labels == "hard":
        return {"set": [image_syn, label_syn, None], "controls": {}, "teachers": []}
    networks = [member.net for member in pool.members]

    def soft(images, pack_by):
        return soft_labels(networks, unpack(images, pack_by), data.micro_batch)
    return {"set": [image_syn, label_syn, soft(image_syn, args.pack)],
            "controls": {name: soft(one.images, pack_by) for name, (one, pack_by) in baseline_sets(args, exp, data).items()},
            "teachers": describe_teachers(args, pool)}


# ------------------------------------------------------------------------------------------------------------- the recipe
# What is said of a network that gave labels, fractions of n (aa_n) test images.
TEACHER_FIGURES = ("clean_acc", "robust_2_acc", "robust_4_acc", "robust_acc", "n", "aa_acc", "aa_n")


def describe_teachers(args, pool):
    """What is known of the networks that gave the labels: of files of pretrain.py their accuracies (clean, PGD, AutoAttack), of
    a pool the running accuracy. [{"model", "threat_model", "sha256", ...}, ...]"""
    if args.robust_prior:
        about = [json.loads(Path(f"{path}.json").read_text()) for path in args.robust_prior]
        return [{"file": Path(path).name, "model": said["model"], "threat_model": said["threat_model"], "sha256": sha256(path),
                 **{key: said[key] for key in TEACHER_FIGURES if key in said}}
                for path, said in zip(args.robust_prior, about)]
    return [{"file": None, "model": args.model, "threat_model": args.threat_model, "sha256": _sha256_of(member.net),
             "running_acc": member.running_accuracy().item() / 100} for member in pool.members]


def _sha256_of(net):
    """Of all parameters, in order."""
    digest = hashlib.sha256()
    for value in net.state_dict().values():
        digest.update(value.detach().cpu().contiguous().numpy())
    return digest.hexdigest()


# How a set is trained on that says nothing of it: the options of utils.train_on_set. Source: SPEC 3.1.
PROTOCOL = {"epochs": 1000, "lr_net": 0.01, "batch_train": 256, "dsa_strategy": "color_crop_cutout_flip_scale_rotate",
            "temperature": 1.0, "lr_schedule": "step"}
LR_SCHEDULES = ("step", "cosine")


def protocol(args):
    """How the flags of a script say that a set is trained on: the options of utils.train_on_set, None where they do not."""
    return {"epochs": args.epoch_eval_train, "lr_net": args.lr_net, "batch_train": args.batch_train,
            "dsa_strategy": args.dsa_strategy, "temperature": args.label_temperature, "lr_schedule": args.lr_schedule}


def protocol_of(meta, given=None):
    """How to train on the sets of a file: as `given` says (of `protocol`), where it says nothing as the recipe in `meta` does,
    else as SPEC 3.1. Raises InputError if the recipe names an unknown augmentation or schedule."""
    said = meta.get("recipe", {})
    found = {key: next(x for x in ((given or {}).get(key), said.get(key), value) if x is not None)
             for key, value in PROTOCOL.items()}
    try:
        parse_dsa_strategy(found["dsa_strategy"])
    except ValueError as error:
        raise InputError(f"the recipe of the set: {error}") from None
    if found["lr_schedule"] not in LR_SCHEDULES:
        raise InputError(f"the recipe of the set has the learning rate schedule {found['lr_schedule']!r}; known are "
                         f"{', '.join(LR_SCHEDULES)}")
    return found


def recipe(args, teachers):
    """How to train on the sets of a file, for its meta. teachers: of `describe_teachers`, an entry for each experiment."""
    return {**protocol(args), "optimizer": "SGD", "momentum": 0.9, "weight_decay": 5e-4, "labels": args.labels,
            "pack": args.pack, "model": args.model, "teachers": teachers}
