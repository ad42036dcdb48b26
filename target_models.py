"""The networks that evaluate.py attacks: those of files, and those that it trains on sets."""
import itertools
import json
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

import utils
from augment import unpack
from formats.inputs import read_input
from formats.network_file import load_into
from formats.synset_file import SyntheticSet
from networks import NETWORKS, network_for
from runtime import distributed
from runtime.compilation import set_precision
from runtime.cost import FORWARD, TRAINING_STEP, compile_planned, training_batches
from runtime.device import synchronise
from runtime.measures import HARD, RANDOM
from runtime.safe_io import InputError, sha256, sha256_of_tensors, write_json, write_tensors
from runtime.seeding import derive_seed, make_generator
from runtime.training import require_finite
from synsets import (TrainConfig, build_labellers, random_images, soft_labels, stored_labellers,
                     training_set)

OTHER_NORMALISATIONS = ((0.0, 1.0), (0.5, 0.5))  # common ones: pixels in [0, 1], in [-1, 1]
NORMALISATION_IMAGES = 512
NORMALISATION_GAIN = 0.08  # of accuracy; its standard error on so many images is 0.02


@dataclass
class TargetModel:
    """A network to attack. name: its file name. meta: its origin, for results.json."""

    name: str
    method: str
    ipc: int
    model: str
    net: torch.nn.Module = None
    meta: dict = field(default_factory=dict)


@dataclass(frozen=True)
class TrainingPlan:
    """Flags of evaluate.py. given: fields of a TrainConfig, None where a set's recipe decides."""

    given: dict
    num_eval: int
    labels: list
    images: str
    precision: str
    compile: bool
    seed: int
    most_images: int = None  # that a network sees


def read_networks(paths, data):
    """The networks, in eval mode, of files whose names say the architecture."""
    models = [read_input(path, NETWORKS, is_set=False).model or "ConvNet" for path in paths]
    return [load_into(network_for(data, model, 0), path).eval()
            for path, model in zip(paths, models)]


def read_labellers(paths, data):
    """Networks of files, as a SyntheticSet holds them."""
    return [stored for net in read_networks(paths, data)
            for stored in stored_labellers([net], net.architecture[0])]


def control_of(source, data, teachers, seed):
    """An Input of random real images, of each class as many as in the sets of an Input, packed,
    labelled and trained on alike. teachers: networks that give the labels where the sets store
    logits; without them the control has its classes alone, like `<method>-hard`, and a warning of
    the Input says so. Raises InputError if a class of `data` has too few images."""
    file, sets = source.synset, []
    for index, synset in enumerate(file.sets):
        generator = make_generator(seed, "control", index)
        images = random_images(data, synset.labels, file.pack, generator)
        soft = None
        if synset.soft_labels is not None and teachers:
            soft = soft_labels(teachers, unpack(images, file.pack))
        sets.append(SyntheticSet(images, synset.labels, soft, synset.labellers))
    method = f"{source.method}{RANDOM}"
    if file.sets[0].soft_labels is not None and not teachers:
        method += HARD
        source.warnings.append(f"{source.path} stores labels; its control has the classes alone: "
                               "name the networks that gave them with --control_labels")
        distributed.print_rank0(f"warning: {source.warnings[-1]}")
    return replace(source, method=method, control=True, warnings=[],
                   synset=replace(file, sets=sets, labels_from_soft=False))


def target_from_network(source, data):
    """The network of an Input (formats.inputs)."""
    net = load_into(network_for(data, source.model, 0), source.path, source.notes).eval()
    meta = {"file": str(source.path), "sha256": sha256(source.path)}
    meta["bytes"] = bytes_of_training(source.path, meta["sha256"])
    target = TargetModel(source.path.name, source.method, source.ipc, source.model, net, meta)
    source.warnings += check_normalisation(target, data)
    return target


def bytes_of_training(path, digest):
    """What the set stores that a network of evaluate.py was trained on, of the file beside it; None
    where there is none, or not of this network."""
    try:
        about = json.loads(Path(f"{path}.json").read_text())
        return about["bytes"] if about["sha256"] == digest else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


@torch.no_grad()
def check_normalisation(target, data):
    """[a warning] if a network is much better with another common normalisation, else []."""
    pixels = data.images["test"][:NORMALISATION_IMAGES].float() / 255
    labels = data.labels["test"][:NORMALISATION_IMAGES]

    def accuracy(x):
        return float((target.net(x).argmax(1) == labels).float().mean())

    here = accuracy(data.normalize(pixels))
    best, mean, std = max((accuracy((pixels - mean) / std), mean, std)
                          for mean, std in OTHER_NORMALISATIONS)
    if best < here + NORMALISATION_GAIN:
        return []
    return [f"{target.meta['file']} classifies {100 * here:.0f} % of {len(labels)} test images as "
            f"they are normalised here, {100 * best:.0f} % with mean {mean:g}, std {std:g}: "
            f"--network_mean {mean:g} --network_std {std:g}"]


def targets_from_synset(source, data, folder, plan):
    """The TargetModels of an Input that is a set; those that `folder` lacks are trained first.
    Raises InputError if one in `folder` was trained otherwise."""
    folder.mkdir(exist_ok=True)
    config = TrainConfig.from_meta(source.synset.meta, **plan.given)
    if plan.most_images:
        images = len(source.synset.sets[0].images) * source.synset.pack**2
        config = replace(config, epochs=max(1, min(config.epochs, plan.most_images // images)))
    planned = [part for index in range(len(source.synset.sets))
               for part in _plan_set(source, index, data, folder, config, plan)]
    untrained = [part for part in planned if not _meta_path(part[0]).exists()]
    distributed.barrier()  # all processes have looked before one trains
    distributed.map_dynamic(
        len(untrained),
        lambda k: _train(*untrained[k], config, source.synset.pack, data, plan, len(planned)),
        lambda k, _: distributed.print_rank0(f"trained {untrained[k][0].name}"))
    for target, _, _ in planned:
        target.net = load_into(network_for(data, source.model, 0), target.meta["file"]).eval()
        meta = {**asdict(TrainConfig()), **json.loads(_meta_path(target).read_text())}
        for key in target.meta.keys() - {"file", "set", "set_index", "bytes"}:
            if meta.get(key) != target.meta[key]:
                raise InputError(f"{target.meta['file']} was trained with another {key} "
                                 f"({meta.get(key)}, not {target.meta[key]}); choose another --out")
        target.meta = {**meta, "bytes": target.meta["bytes"]}
    return [target for target, _, _ in planned]


def _meta_path(target):
    return Path(f"{target.meta['file']}.json")


def _plan_set(source, index, data, folder, config, plan):
    """Yields (TargetModel, SyntheticSet to train on, key of its seeds) for one set of a file."""
    file = source.synset
    synset = file.sets[index].to(data.device)
    ipc = len(synset.labels) // data.num_classes
    soft, no_classes = synset.soft_labels is not None, file.labels_from_soft
    if soft and no_classes and "own" not in plan.labels:
        raise InputError(f"{source.path} has soft labels only, no classes; leave out --labels hard")
    own = "online" if synset.labellers else "soft" if soft else "hard"
    kinds = [own] if "own" in plan.labels or own == "hard" else []
    if own != "hard" and "hard" in plan.labels and not no_classes:
        kinds.append("hard")
    for kind, i in itertools.product(kinds, range(plan.num_eval)):
        method = f"{source.method}{HARD}" if kind != own else source.method
        name = f"{method}_{source.model}_{data.name}_{ipc}_None_{index}-{i}.pth"
        # Both kinds of labels start from the same network: the key has the method of the file.
        key = "evaluate", source.method, ipc, index, "None", i
        meta = {"file": str(folder / name), "set": str(source.path), "set_index": index,
                "labels": kind, "seed": plan.seed, **asdict(config), "pack": file.pack,
                "precision": plan.precision, "set_sha256": file.sha256()}
        if kind == "online":
            meta["labellers"] = [sha256_of_tensors(labeller["state"].values())
                                 for labeller in synset.labellers]
        if plan.images:
            meta["images"] = plan.images
        variant = synset if kind == own else synset._replace(soft_labels=None, labellers=[])
        meta["bytes"] = variant.stored_bytes()
        yield TargetModel(name, method, ipc, source.model, None, meta), variant, key


def _train(target, synset, key, config, pack, data, plan, count):
    """Train one of `count` networks on a SyntheticSet and write it with its .json."""
    set_precision(plan.precision)
    images, labels = training_set(synset, pack)
    labellers = build_labellers(synset, data.device)
    seeds = {f"seed_{what}": derive_seed(plan.seed, *key, what) for what in ("init", "train")}
    net = network_for(data, target.model, seeds["seed_init"])
    if plan.compile:
        batches = training_batches(len(labels), config.batch_train, (config.epochs + 1) * count)
        compile_planned(net, data, {"trained": batches}, distributed.print_rank0)
        for labeller in {one.architecture: one for one in labellers}.values():
            scored = {size: work * FORWARD / TRAINING_STEP for size, work in batches.items()}
            compile_planned(labeller, data, {"scored": scored}, distributed.print_rank0)
    start = time.perf_counter()
    generator = torch.Generator().manual_seed(seeds["seed_train"])
    utils.train_on_set(net, images, labels, config, generator, labellers=labellers)
    synchronise(data.device)
    seconds, path = round(time.perf_counter() - start, 2), Path(target.meta["file"])
    total = float(sum(parameter.detach().abs().sum() for parameter in net.parameters()))
    require_finite({f"a weight of {path.name} after training on {target.meta['set']} (--lr_net "
                    f"{config.lr_net})": total})
    write_tensors(path, {name: value.cpu() for name, value in net.state_dict().items()})
    write_json(_meta_path(target), {**target.meta, **seeds, "train_seconds": seconds,
                                    "sha256": sha256(path)})
