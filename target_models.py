"""The networks that evaluate.py attacks: those of files, and those that it trains on sets."""
import itertools
import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

import utils
from attacks import attack, get_threat_model
from formats.network_file import load_into
from formats.synset_file import SyntheticSet
from networks import network_for
from runtime import distributed
from runtime.compilation import set_precision
from runtime.cost import compile_planned, training_batches
from runtime.device import synchronise
from runtime.safe_io import InputError, sha256, write_json, write_tensors
from runtime.seeding import derive_seed, make_generator
from runtime.training import require_finite
from synsets import TrainConfig, training_set

OTHER_NORMALISATIONS = ((0.0, 1.0), (0.5, 0.5))  # common ones: pixels in [0, 1], in [-1, 1]
NORMALISATION_IMAGES = 512
NORMALISATION_GAIN = 0.08  # of accuracy; its standard error on so many images is 0.02


@dataclass
class TargetModel:
    """A network to attack. name: its file name. threat: the threat model of its adversarial
    training, if any. meta: its origin, for results.json.
    """

    name: str
    method: str
    ipc: int
    model: str
    net: torch.nn.Module = None
    threat: str = None
    meta: dict = field(default_factory=dict)


@dataclass(frozen=True)
class TrainingPlan:
    """How networks are trained on sets.

    given: fields of a TrainConfig, None where the recipe of a set decides. num_eval: networks
    a set. labels: "own", "hard" or both. images: "normalised" or "pixels", if the user says so.
    threats: names of threat models to train under; [None]: natural training.
    """

    given: dict
    num_eval: int
    labels: list
    images: str
    threats: list
    precision: str
    compile: bool
    seed: int


def target_from_network(source, data):
    """The network of an Input (formats.inputs)."""
    net = load_into(network_for(data, source.model, 0), source.path, source.notes).eval()
    meta = {"file": str(source.path), "sha256": sha256(source.path)}
    name = source.path.name
    return TargetModel(name, source.method, source.ipc, source.model, net, meta=meta)


@torch.no_grad()
def check_normalisation(target, data):
    """[a warning] if a network is much better with another common normalisation, else []."""
    pixels = data.images["test"][:NORMALISATION_IMAGES].float() / 255
    labels = data.labels["test"][:NORMALISATION_IMAGES]

    def accuracy(x):
        return float((target.net(x).argmax(1) == labels).float().mean())

    here = accuracy(data.normalize(pixels))
    others = {(mean, std): accuracy((pixels - mean) / std) for mean, std in OTHER_NORMALISATIONS}
    (mean, std), best = max(others.items(), key=lambda item: item[1])
    if best < here + NORMALISATION_GAIN:
        return []
    return [f"{target.meta['file']} classifies {100 * here:.0f} % of {len(labels)} test images as "
            f"they are normalised here, {100 * best:.0f} % with mean {mean:g}, std {std:g}: "
            f"--network_mean {mean:g} --network_std {std:g}"]


def targets_from_synset(source, data, folder, plan):
    """The TargetModels of an Input that is a set. Those that `folder` lacks are trained first, each
    by the next free process. Raises InputError if one in `folder` was trained otherwise.
    """
    folder.mkdir(exist_ok=True)
    file = source.synset
    config = TrainConfig.from_meta(file.meta, **plan.given)
    training = {"seed": plan.seed, **asdict(config), "pack": file.pack, "precision": plan.precision,
                "set_sha256": file.sha256()}
    if plan.images:
        training["images"] = plan.images
    planned = [(target, synset, key) for index in range(len(file.sets))
               for target, synset, key in _plan_set(source, index, data, folder, training, plan)]
    untrained = [part for part in planned if not (folder / f"{part[0].name}.json").exists()]
    distributed.barrier()  # all processes have looked before one trains
    with tqdm(total=len(untrained), desc=f"training on {source.path.name}", unit="net",
              disable=distributed.disable_tqdm()) as bar:
        distributed.map_dynamic(
            len(untrained),
            lambda k: _train(*untrained[k], config, file.pack, data, plan, len(planned)),
            lambda k, result: bar.update())
    for target, _, _ in planned:
        target.net = load_into(network_for(data, source.model, 0), folder / target.name).eval()
        wanted = {key: target.meta[key] for key in (*training, "labels")}
        target.meta = json.loads((folder / f"{target.name}.json").read_text())
        for key, value in wanted.items():
            if target.meta.get(key) != value:
                raise InputError(f"{folder / target.name} was trained with another {key} "
                                 f"({target.meta.get(key)} instead of {value}); choose another "
                                 "--out")
    return [target for target, _, _ in planned]


def _plan_set(source, index, data, folder, training, plan):
    """Yields (TargetModel, SyntheticSet to train on, key of its seeds) for one set of a file."""
    file = source.synset
    synset = file.sets[index]
    synset = SyntheticSet(*(x if x is None else x.to(data.device) for x in synset))
    ipc = len(synset.labels) // data.num_classes
    if file.labels_from_soft and "own" not in plan.labels:
        raise InputError(f"{source.path} has soft labels only, no classes; leave out --labels hard")
    variants = {}
    if "own" in plan.labels or synset.soft_labels is None:
        variants[source.method] = synset
    if "hard" in plan.labels and synset.soft_labels is not None and not file.labels_from_soft:
        variants[f"{source.method}-hard"] = synset._replace(soft_labels=None)
    for method, threat, i in itertools.product(variants, plan.threats, range(plan.num_eval)):
        trained = f"PGD-{threat}" if threat else "None"
        name = f"{method}_{source.model}_{data.name}_{ipc}_{trained}_{index}-{i}.pth"
        # Both kinds of labels start from the same network: the key has the method of the file.
        key = "evaluate", source.method, ipc, index, trained, i
        labels = "hard" if variants[method].soft_labels is None else "soft"
        meta = {"file": str(folder / name), "set": str(source.path), "set_index": index,
                "labels": labels, **training,
                "seed_init": derive_seed(plan.seed, *key, "init"),
                "seed_train": derive_seed(plan.seed, *key, "train")}
        target = TargetModel(name, method, ipc, source.model, threat=threat, meta=meta)
        yield target, variants[method], key


def _train(target, synset, key, config, pack, data, plan, count):
    """Train one of `count` networks on a SyntheticSet and write it with its .json."""
    set_precision(plan.precision)
    images, labels = training_set(synset, pack)
    net = network_for(data, target.model, target.meta["seed_init"])
    attack_batch = None
    if target.threat:
        threat = get_threat_model(target.threat, data)
        rng = make_generator(plan.seed, *key, "attack", device=data.device)

        def attack_batch(x, y):
            return attack(net, x, y, threat, targeted=False, generator=rng)
    elif plan.compile:
        epochs = (config.epochs + 1) * count
        batches = training_batches(len(labels), config.batch_train, epochs)
        compile_planned(net, data, {"trained": batches}, distributed.print_rank0)
    start = time.perf_counter()
    generator = torch.Generator().manual_seed(target.meta["seed_train"])
    utils.train_on_set(net, images, labels, config, generator, attack_batch)
    synchronise(data.device)
    target.meta["train_seconds"] = round(time.perf_counter() - start, 2)
    path = Path(target.meta["file"])
    total = float(sum(parameter.detach().abs().sum() for parameter in net.parameters()))
    require_finite({f"a weight of {path.name} after training on {target.meta['set']} (--lr_net "
                    f"{config.lr_net})": total})
    write_tensors(path, {name: value.cpu() for name, value in net.state_dict().items()})
    target.meta["sha256"] = sha256(path)
    write_json(path.with_name(f"{path.name}.json"), target.meta)
