"""The networks that evaluate.py attacks: those of files, and those that it trains on sets."""

import itertools
import json
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

import utils
from attacks import attack_images, get_threat_model
from runtime import distributed
from runtime.device import synchronise
from runtime.compilation import set_precision
from formats.network_file import load_into
from runtime.cost import compile_planned, set_batches
from runtime.safe_io import InputError, sha256, write_json, write_tensors
from runtime.training import require_finite
from runtime.seeding import make_generator, derive_seed
from formats.synset_file import SyntheticSet
from networks import network_for
from synsets import protocol, protocol_of, training_set

# Normalisations of the field beside those of datasets: pixels in [0, 1], and in [-1, 1].
OTHER_NORMALISATIONS = ((0.0, 1.0), (0.5, 0.5))
NORMALISATION_IMAGES = 512
NORMALISATION_GAIN = 0.08  # of accuracy; its standard error on so many images is 0.02


@dataclass
class TargetModel:
    """A network under attack. name: its file name. threat: the threat model that it was
    adversarially trained under.
    """

    name: str
    method: str
    ipc: int
    model: str
    net: torch.nn.Module = None
    threat: str = None
    about: dict = field(default_factory=dict)  # where it comes from, for results.json


def target_from_network(one, data):
    """The network of an Input (formats.inputs), as it is."""
    net = load_into(network_for(data, one.model, 0), one.path, one.notes)
    return TargetModel(
        one.path.name,
        one.method,
        one.ipc,
        one.model,
        net.eval(),
        about={"file": str(one.path), "sha256": sha256(one.path)},
    )


@torch.no_grad()
def check_normalisation(target, data):
    """A warning, as a list of one line or none, where a network classifies many more images right
    that are normalised in another usual way: then it was probably trained on those.
    """
    pixels = data.images["test"][:NORMALISATION_IMAGES].float() / 255
    labels = data.labels["test"][:NORMALISATION_IMAGES]

    def right(x):
        return float((target.net(x).argmax(1) == labels).float().mean())

    here = right(data.normalize(pixels))
    others = {(m, s): right((pixels - m) / s) for m, s in OTHER_NORMALISATIONS}
    (mean, std), best = max(others.items(), key=lambda item: item[1])
    if best < here + NORMALISATION_GAIN:
        return []
    return [
        f"{target.about['file']} classifies {100 * here:.0f} % of {len(labels)} test images as "
        f"they are normalised here, {100 * best:.0f} % with mean {mean:g}, std {std:g}: "
        f"--network_mean {mean:g} --network_std {std:g}"
    ]


def targets_from_synset(args, source, data, folder):
    """Train --num_eval networks on each set of a file, with its own labels and, if they are soft,
    with the classes alone (with --adv_train for each threat model), but for those that are there;
    of several processes each trains the next one when it is free. Then read them all: a list of
    Victims.
    """
    folder.mkdir(exist_ok=True)
    targets, untrained, file = [], [], source.synset
    options, pack = protocol_of(file.meta, protocol(args)), file.pack
    training = {
        "seed": args.seed,
        **options,
        "pack": pack,
        "precision": args.precision,
        "set_sha256": file.sha256(),
    }
    if args.images:
        training["images"] = args.images
    if file.labels_from_soft and "own" not in args.labels:
        raise InputError(
            f"{source.path} has soft labels alone, no classes of its own; leave out --labels hard"
        )
    for exp, one in enumerate(file.sets):
        ipc, one = (
            len(one.labels) // data.num_classes,
            SyntheticSet(*(x if x is None else x.to(data.device) for x in one)),
        )
        variants = {source.method: one} if "own" in args.labels or one.soft_labels is None else {}
        if "hard" in args.labels and one.soft_labels is not None and not file.labels_from_soft:
            variants[f"{source.method}-hard"] = one._replace(soft_labels=None)
        for (method, variant), threat_name, i in itertools.product(
            variants.items(), args.threat_model if args.adv_train else [None], range(args.num_eval)
        ):
            trained = f"PGD-{threat_name}" if threat_name else "None"
            name = f"{method}_{source.model}_{data.name}_{ipc}_{trained}_{exp}-{i}.pth"
            key = (
                "evaluate",
                source.method,
                ipc,
                exp,
                trained,
                i,
            )  # the same start for both kinds of labels
            about = {
                "file": str(folder / name),
                "set": str(source.path),
                "set_index": exp,
                "labels": "hard" if variant.soft_labels is None else "soft",
                **training,
                "seed_init": derive_seed(args.seed, *key, "init"),
                "seed_train": derive_seed(args.seed, *key, "train"),
            }
            targets.append(TargetModel(name, method, ipc, source.model, None, threat_name, about))
            if not (folder / f"{name}.json").exists():
                untrained.append((targets[-1], variant, key))

    distributed.barrier()  # all have looked before one is trained
    with tqdm(
        total=len(untrained),
        desc=f"training on {source.path.name}",
        unit="net",
        disable=distributed.disable_tqdm(),
    ) as bar:
        distributed.map_dynamic(
            len(untrained),
            lambda k: train_target(args, *untrained[k], options, pack, data, len(targets)),
            lambda k, result: bar.update(),
        )
    for target in targets:
        target.net = load_into(network_for(data, source.model, 0), folder / target.name).eval()
        wanted, target.about = (
            target.about,
            json.loads((folder / f"{target.name}.json").read_text()),
        )
        for key in (*training, "labels"):
            if target.about.get(key) != wanted[key]:
                raise InputError(
                    f"{folder / target.name} was trained with another {key} "
                    f"({target.about.get(key)} instead of "
                    f"{wanted[key]}); choose another --out"
                )
    return targets


def train_target(args, target, one, key, options, pack, data, runs):
    """Train a fresh network, one of `runs`, on a SyntheticSet, and write it with its notes. key: of
    its random streams.
    """
    set_precision(args.precision)
    about, threat_name, train_on = target.about, target.threat, training_set(one, pack)
    net = network_for(data, target.model, about["seed_init"])
    if args.compile and not threat_name:
        epochs = (options["epochs"] + 1) * runs
        compile_planned(
            net,
            data,
            {"trained": set_batches(len(train_on[1]), options["batch_train"], epochs)},
            distributed.print_rank0,
        )
    start = time.perf_counter()
    attack = None
    if threat_name:
        threat = get_threat_model(threat_name, data)
        rng = make_generator(args.seed, *key, "attack", device=data.device)
        attack = lambda x, y: attack_images(net, x, y, threat, rng, targeted=False)  # noqa: E731
    utils.train_on_set(
        net,
        *train_on,
        attack=attack,
        generator=torch.Generator().manual_seed(about["seed_train"]),
        **options,
    )
    synchronise(data.device)
    about["train_seconds"] = round(time.perf_counter() - start, 2)
    require_finite(
        {
            f"a weight of {Path(about['file']).name} after training on {about['set']} (--lr_net "
            f"{options['lr_net']})": float(sum(p.detach().abs().sum() for p in net.parameters()))
        }
    )
    path = Path(about["file"])
    write_tensors(path, {k: v.cpu() for k, v in net.state_dict().items()})
    about["sha256"] = sha256(path)
    write_json(path.with_name(f"{path.name}.json"), about)
