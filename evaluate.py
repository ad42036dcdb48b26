"""The robustness benchmark: attack networks, or networks trained on synthetic sets, under two threat models.

    python evaluate.py --synset result/ROME_res_ROME_CIFAR10_ConvNet_10ipc.pt --out result/rome10
    python evaluate.py --networks checkpoints/BACON_ConvNet_CIFAR10_50_None_0.6995.pth --limit 1000 --out result/bacon

Writes results.json (every figure), results.md (tables) and pictures into --out. A run that was killed goes on with --resume.
Source: the attacks and metrics are those of the BEARD benchmark (arXiv 2411.09265) and the ROME paper; SPEC 3.
Distributed under the MIT licence.
"""
import argparse
import hashlib
import itertools
import json
import re
import time
from contextlib import closing
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import binomtest
from tqdm import tqdm

import fast
import utils
from attacks import ATTACKS, PGD_STEPS, THREAT_MODELS, attack_images, craft, get_threat_model
from augment import parse_dsa_strategy, unpack
from checkpoint import lock, refuse_other_flags
from fast import forward
from files import InputError, load_into, read_synset, write_atomically, write_json, write_tensors, write_text
from networks import NETWORKS, get_network
from utils import at_least, stream, stream_seed

WHITE_BOX = ("FGSM", "PGD", "PGD_L2", "CW", "Deepfool", "AA")  # the grid; the first four are those of the targeted metrics
QUERY = tuple(name for name, attack in ATTACKS.items() if attack.query)
CONTROLS = ("Clean", "Clamp-only")
SLICE = 256  # images between two saves; four times as many of an attack that keeps its batches full to the last ones
SANITY_IMAGES = 100
# Flags that a resumed run may change: they add work and leave what is done as it is.
MAY_CHANGE = ("out", "resume", "device", "attacks", "threat_model", "targeted", "untargeted", "eps", "query", "transfer",
              "craft_on", "sanity", "crei_weight", "compile")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    what = parser.add_argument_group("what is attacked")
    add = what.add_argument
    add("--synset", nargs="+", default=[], metavar="FILE", help="synthetic sets: fresh networks are trained on each")
    add("--networks", nargs="+", default=[], metavar="FILE", help="networks (state_dicts)")
    add("--dataset", choices=utils.DATASETS, help="default: what the files say, else CIFAR10")
    add("--model", choices=NETWORKS, metavar="MODEL", help="default: what the files say, else ConvNet")
    add("--method", nargs="+", default=[], metavar="NAME", type=utils.method_name, help="a name for each file; default: what "
        "the file says")
    add("--data_path", default="./data", help="folder of cifar10.npz, cifar100.npz")
    add("--limit", type=at_least(0), default=0, metavar="N", help="the first N test images; 0: all")

    training = parser.add_argument_group("training on a set")
    add = training.add_argument
    add("--num_eval", type=at_least(1), default=5, help="networks trained on each set")
    add("--packed", action="store_true", help="sets that do not say so themselves hold 2x2 sub-images in each image")
    add("--epoch_eval_train", type=at_least(1), default=1000, help="epochs")
    add("--batch_train", type=at_least(1), default=256, help="batch")
    add("--lr_net", type=at_least(0, float), default=0.01, help="learning rate")
    add("--dsa_strategy", default="color_crop_cutout_flip_scale_rotate", help="augmentations joined by '_', or none")
    add("--adv_train", action="store_true", help="train adversarially (PGD), once for each threat model")

    attack = parser.add_argument_group("attacks")
    add = attack.add_argument
    add("--threat_model", nargs="+", choices=THREAT_MODELS, default=list(THREAT_MODELS))
    add("--attacks", nargs="+", choices=ATTACKS, default=list(WHITE_BOX), metavar="ATTACK",
        help=f"of {', '.join(ATTACKS)}")
    add("--query", action="store_true", help=f"the query attacks as well: {', '.join(QUERY)}")
    add("--targeted", action="store_true", help="the targeted form only; default: both where there are both")
    add("--untargeted", action="store_true", help="the untargeted form only")
    add("--eps", nargs="+", type=at_least(0, float), default=[], metavar="E",
        help="radii in 1/255, of the norm of each attack; default: 8 (L-inf), 128 (L2)")
    add("--transfer", action="store_true", help="evaluate all networks on what was crafted on each")
    add("--craft_on", nargs="+", default=[], metavar="METHOD", help="craft on the networks of these methods only")
    add("--aa_iterations", type=at_least(1), default=100, help="of AutoAttack's components (the published benchmark: 10)")
    add("--queries", type=at_least(1), default=5000, help="of Square, alone and in AutoAttack")
    add("--spsa_steps", type=at_least(1), default=1, help="of SPSA, 256 queries each")
    utils.add_switch(attack, "sanity", True, "check every network for signs of a broken evaluation")

    run = parser.add_argument_group("the run")
    add = run.add_argument
    add("--out", default="./result/evaluation", metavar="DIR", help="folder for the results")
    add("--resume", action="store_true", help="go on with the results in --out")
    add("--seed", type=at_least(0), default=0, help="governs everything that is random")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    utils.add_switch(run, "compile", True, "torch.compile for the batches of which there are enough to pay for it")
    add("--crei_weight", type=utils.fraction, default=0.5, help="of RR against AE in CREI, 0 to 1")
    args = parser.parse_args(argv)

    try:
        parse_dsa_strategy(args.dsa_strategy)
    except ValueError as error:
        parser.error(str(error))
    files = args.synset + args.networks
    if not files:
        parser.error("nothing to attack: give --synset or --networks")
    if args.method and len(args.method) != len(files):
        parser.error(f"--method has {len(args.method)} name(s) for {len(files)} file(s)")
    if args.query:
        args.attacks += [name for name in QUERY if name not in args.attacks]
    if args.targeted and not args.untargeted and not any(ATTACKS[name].targetable for name in args.attacks):
        parser.error(f"{', '.join(args.attacks)}: no targeted form; leave out --targeted")
    if args.eps and not any(ATTACKS[name].eps for name in args.attacks):
        parser.error(f"{', '.join(args.attacks)}: no attack that --eps bounds")
    for name in ("attacks", "threat_model", "eps"):  # named twice is named once
        setattr(args, name, list(dict.fromkeys(getattr(args, name))))
    return args


# ---------------------------------------------------------------------------------------------------- what is attacked
@dataclass
class Victim:
    """A network under attack. name: its file name. threat: the threat model that it was adversarially trained under."""

    name: str
    method: str
    ipc: int
    model: str
    net: torch.nn.Module = None
    threat: str = None
    about: dict = field(default_factory=dict)  # where it comes from, for results.json


@dataclass
class Source:
    """A file given by the user and what its name or its meta says."""

    path: Path
    method: str
    dataset: str
    model: str
    ipc: int
    trained: str = None  # how a network was trained, as its name says
    sets: list = None  # of a synthetic set
    meta: dict = field(default_factory=dict)

    def describe(self):
        return f"{self.path} ({self.method}, {self.dataset or 'data set unknown'}, {self.ipc or '?'} images per class)"


NETWORK_NAME = re.compile(r"(?P<method>.+?)_(?P<model>[A-Za-z0-9]+)_(?P<dataset>[A-Za-z0-9]+)_(?P<ipc>\d+)_(?P<trained>[^_]+)"
                          r"(_.*)?\.pth$")
SET_NAME = re.compile(r"res_(?P<method>[^_]+)_(?P<dataset>[A-Za-z0-9]+)_(?P<model>[A-Za-z0-9]+)_(?P<ipc>\d+)ipc")


def read_sources(args):
    """The files of --synset and --networks, with what they say about themselves. Two of one name, or sets that could not be
    told apart in a table, are refused."""
    sources = []
    for i, path in enumerate(map(Path, args.synset + args.networks)):
        is_set = i < len(args.synset)
        if not path.is_file():
            raise InputError(f"{path} does not exist or is a folder")
        match = (SET_NAME.search if is_set else NETWORK_NAME.match)(path.name)
        said = match.groupdict() if match else {}
        source = Source(path, said.get("method", path.stem), said.get("dataset"), said.get("model"),
                        int(said["ipc"]) if "ipc" in said else None, said.get("trained"))
        if is_set:
            source.sets, source.meta = read_synset(path)
            flags = source.meta.get("flags", {})
            source.dataset = source.meta.get("dataset", source.dataset)
            source.model = flags.get("model", source.model)
            if source.meta.get("threat_model", "published") != "published":
                source.method += f"-{source.meta['threat_model']}"
        if args.method:
            source.method = args.method[i]
        if source.dataset not in utils.DATASETS:
            source.dataset = None
        if args.model or source.model not in NETWORKS:
            source.model = args.model or "ConvNet"
        sources.append(source)
    for one, other in itertools.combinations(sources, 2):
        if one.path.name == other.path.name and not (one.sets and other.sets):
            raise InputError(f"{one.path} and {other.path} have the same name; results are kept by file name: rename one")
        if one.sets and other.sets:
            pooled = one.method == other.method and len(one.sets[0][1]) == len(other.sets[0][1])
        else:
            pooled = ((one.method, one.ipc) == (other.method, other.ipc)
                      and (one.model, one.trained, bool(one.sets)) != (other.model, other.trained, bool(other.sets)))
        if pooled:
            raise InputError(f"{one.describe()} and {other.describe()} would be pooled: tell them apart with --method")
    return sources


def choose_dataset(args, sources):
    """The name of the data set: --dataset, or what the files say, which must not contradict it."""
    name = args.dataset or next((s.dataset for s in sources if s.dataset), "CIFAR10")
    for source in sources:
        if source.dataset not in (None, name):
            raise InputError(f"{source.describe()} is not of {name}: evaluate each data set in a run of its own")
    return name


def fit_normalisation(sources, data):
    """ZCA and normalisation are properties of a set; all sets must agree with the data."""
    zca = {bool(source.meta.get("zca")) for source in sources if source.sets}
    if len(zca) > 1:
        raise InputError("some of the sets are ZCA-whitened and some are not: evaluate them in runs of their own")
    if zca == {True}:
        data.fit_zca()
    for source in sources:
        for key in ("mean", "std"):
            ours = getattr(data, key)
            theirs = source.meta.get(key, ours)
            if len(theirs) != len(ours) or not np.allclose(theirs, ours, atol=1e-4):
                raise InputError(f"{source.path} is normalised with {key} {source.meta[key]}, {data.name} with "
                                 f"{list(ours)}")


def check_set(source, data):
    """Whether the sets of a file are images and labels of this data set, with the same number of images a class."""
    for images, labels in source.sets:
        if images.shape[1:] != (data.channel, *data.size):
            raise InputError(f"{source.path}: images are {tuple(images.shape[1:])}, {data.name} has "
                             f"{(data.channel, *data.size)}")
        if int(labels.min()) < 0 or int(labels.max()) >= data.num_classes:
            raise InputError(f"{source.path}: labels from {int(labels.min())} to {int(labels.max())}; {data.name} has "
                             f"0 to {data.num_classes - 1}")
        counts = labels.bincount(minlength=data.num_classes)
        if counts.min() != counts.max():
            raise InputError(f"{source.path}: the classes have {int(counts.min())} to {int(counts.max())} images each; "
                             "the same number is expected")


def victim_of_network(source, data):
    net = get_network(source.model, data.channel, data.num_classes, data.size, 0)
    load_into(net, source.path)
    return Victim(source.path.name, source.method, source.ipc, source.model, net.to(data.device).eval(),
                  about={"file": str(source.path), "sha256": _sha256(source.path)})


def _sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def victims_of_set(args, source, data, folder):
    """Train --num_eval networks on each set of a file (and for each threat model, with --adv_train), or read those that an
    earlier part of the run has trained."""
    folder.mkdir(exist_ok=True)
    training = {key: getattr(args, key) for key in ("seed", "epoch_eval_train", "batch_train", "lr_net", "dsa_strategy")}
    training["set_sha256"] = _sha256(source.path)
    for exp, (images, labels) in enumerate(source.sets):
        ipc, packed = len(labels) // data.num_classes, source.meta.get("packed", args.packed)
        images, labels = images.to(data.device), labels.to(data.device)
        if packed:
            images, labels = unpack(images), labels.repeat(4)  # (4N, C, H, W), (4N,)
        for threat_name, i in itertools.product(args.threat_model if args.adv_train else [None], range(args.num_eval)):
            trained = f"PGD-{threat_name}" if threat_name else "None"
            name = f"{source.method}_{source.model}_{data.name}_{ipc}_{trained}_{exp}-{i}.pth"
            key = ("evaluate", source.method, ipc, exp, trained, i)
            about = {"file": str(folder / name), "set": str(source.path), "set_index": exp, "packed": packed, **training,
                     "seed_init": stream_seed(args.seed, *key, "init"), "seed_train": stream_seed(args.seed, *key, "train")}
            net = get_network(source.model, data.channel, data.num_classes, data.size, about["seed_init"], data.device)
            notes = folder / f"{name}.json"
            if not notes.exists():
                if args.compile and not threat_name:
                    epochs = (args.epoch_eval_train + 1) * args.num_eval * len(source.sets)
                    utils.compile_planned(net, data, {}, utils.set_batches(len(labels), args.batch_train, epochs), tqdm.write)
                start = time.perf_counter()
                attack = None
                if threat_name:
                    threat = get_threat_model(threat_name, data)
                    rng = stream(args.seed, *key, "attack", device=data.device)
                    attack = lambda x, y: attack_images(net, x, y, threat, rng, targeted=False)  # noqa: B023, E731
                utils.train_on_set(net, images, labels, epochs=args.epoch_eval_train, lr_net=args.lr_net,
                                   batch_train=args.batch_train, dsa_strategy=args.dsa_strategy, attack=attack,
                                   generator=torch.Generator().manual_seed(about["seed_train"]))
                _synchronise(data.device)
                about["train_seconds"] = round(time.perf_counter() - start, 2)
                utils.check_finite({f"a weight of {name} after training on {source.path} (--lr_net {args.lr_net})":
                                    float(sum(p.detach().abs().sum() for p in net.parameters()))})
                write_tensors(folder / name, {k: v.cpu() for k, v in net.state_dict().items()})
                about["sha256"] = _sha256(folder / name)
                write_json(notes, about)
            else:
                load_into(net, folder / name)
                found = json.loads(notes.read_text())
                other = [key for key in (*training, "packed") if found.get(key) != about[key]]
                if other:
                    raise InputError(f"{folder / name} was trained with another {other[0]} ({found.get(other[0])} instead of "
                                     f"{about[other[0]]}); choose another --out")
                about = found
            yield Victim(name, source.method, ipc, source.model, net.eval(), threat_name, about)


# ------------------------------------------------------------------------------------------------------- one attack
class PassCounter(torch.nn.Module):
    """A network that counts, in images, the forward and the backward passes through it."""

    def __init__(self, net):
        super().__init__()
        self.net, self.forward_passes, self.backward_passes = net, 0, 0

    def forward(self, x):
        self.forward_passes += len(x)
        logits = forward(self.net, x)
        if logits.requires_grad:
            logits.register_hook(self._count_backward)
        return logits

    def _count_backward(self, gradient):
        self.backward_passes += len(gradient)


@dataclass(frozen=True)
class Job:
    """One attack on one network, by the keys of a row of results.json. eps: attack space; None: the attack has none."""

    crafted_on: str
    threat_model: str
    attack: str
    targeted: bool = None
    eps: float = None

    def __str__(self):
        return f"{self.crafted_on}: {self.threat_model} {label(self.attack, self.targeted, self.eps)}"

    def is_of(self, row):
        """Whether a row of results.json is a result of this job."""
        return all(row[key] == value for key, value in vars(self).items())


def label(attack, targeted, eps=None):
    """An attack as tables name it."""
    form = {None: "", True: " targeted", False: " untargeted"}[targeted]
    return f"{attack}{form}" + ("" if eps is None else f" {255 * eps:g}/255")


def plan(args, victims, threats):
    """All jobs, the quick attacks first, so that a table is soon there. threats: {name: ThreatModel}."""
    forms = [form for form, asked in ((True, args.targeted), (False, args.untargeted)) if asked] or [True, False]
    jobs = [Job(v.name, threat, attack) for attack in CONTROLS for threat in threats for v in victims
            if v.threat in (None, threat)]
    for attack, spec in ATTACKS.items():
        if attack not in args.attacks:
            continue
        for threat, targeted in itertools.product(threats, forms if spec.targetable else [False] * (False in forms)):
            radii = [eps / 255 for eps in args.eps] or [spec.eps(threats[threat])] if spec.eps else [None]
            jobs += [Job(v.name, threat, attack, targeted, eps) for eps in radii for v in crafting(args, victims, threat)]
    return jobs


def crafting(args, victims, threat):
    """The networks that adversarial examples are crafted on."""
    return [v for v in victims if v.threat in (None, threat) and (not args.craft_on or v.method in args.craft_on)]


def evaluated(args, job, victims):
    """The networks that a job's adversarial examples are evaluated on, the crafting one first."""
    own = next(v for v in victims if v.name == job.crafted_on)
    others = [v for v in victims if v is not own and v.threat in (None, job.threat_model)]
    return [own] + (others if args.transfer and job.attack not in CONTROLS else [])


def attack_options(args, attack):
    """What the flags say to an attack; no random start in the grid (SPEC 3.2)."""
    return {"PGD": {"random_start": False}, "AA": {"iterations": args.aa_iterations, "queries": args.queries},
            "Square": {"queries": args.queries}, "SPSA": {"steps": args.spsa_steps}}.get(attack, {})


def typical_cost(args, attack):
    """Image-gradients that an image takes, for the estimate at the start; what gives up images early varies widely."""
    forward = 0.45  # of an image-gradient
    return {"FGSM": 1, "PGD": PGD_STEPS, "PGD_L2": PGD_STEPS, "CW": 60, "Deepfool": 12,
            "AA": 10 * args.aa_iterations + 0.2 * forward * args.queries, "Square": 0.5 * forward * args.queries,
            "SPSA": 256 * forward * args.spsa_steps}.get(attack, forward)


def run_slice(job, number, x, labels, victims, threat, chunk, args):
    """One slice of test images: attack, evaluate, measure.

    victims: the networks to evaluate on, the crafting one first. chunk: images attacked at a time.
    Returns plain numbers: right answers by evaluated network, n, seconds (attack, and evaluation on the crafting network),
    forward and backward passes of the attack (in images), max_linf, max_l2 (attack space).
    """
    own, *others = victims
    counter = PassCounter(own.net).eval()
    rng = stream(args.seed, *map(str, vars(job).values()), number, device=x.device)
    _synchronise(x.device)
    start = time.perf_counter()
    linf = l2 = torch.zeros(1)
    if job.attack == "Clean":
        x_adv = x
    elif job.attack == "Clamp-only":
        x_adv = threat.clamp_only(x)
    else:
        x_adv, linf, l2 = craft(counter, x, labels, threat, job.attack, targeted=job.targeted, eps=job.eps, generator=rng,
                                chunk=chunk, **attack_options(args, job.attack))
    with torch.no_grad():
        correct = {own.name: int((own.net(x_adv).argmax(1) == labels).sum())}  # to int: waits for the device
        seconds = time.perf_counter() - start
        correct |= {v.name: int((v.net(x_adv).argmax(1) == labels).sum()) for v in others}
    return {"correct": correct, "n": len(labels), "seconds": seconds, "forward": counter.forward_passes,
            "backward": counter.backward_passes, "max_linf": float(linf.max()), "max_l2": float(l2.max())}


def rows_of(job, slices, victims, data, args):
    """The slices of a finished job -> rows of results.json, one for each network evaluated."""
    total = {key: sum(s[key] for s in slices) for key in ("n", "seconds", "forward", "backward")}
    largest = {key: max(s[key] for s in slices) for key in ("max_linf", "max_l2")}
    return [{"dataset": data.name, "ipc": v.ipc, "method": v.method, "crafted_on": job.crafted_on, "evaluated_on": v.name,
             "threat_model": job.threat_model, "attack": job.attack, "targeted": job.targeted, "eps": job.eps,
             "n": total["n"], "accuracy": sum(s["correct"][v.name] for s in slices) / total["n"],
             "seconds": round(total["seconds"], 3), "forward": total["forward"] / total["n"],
             "backward": total["backward"] / total["n"], **largest, "seed": args.seed} for v in victims]


def _synchronise(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def check_sanity(victim, threat, test, data, seed):
    """Signs of a broken evaluation (Carlini et al. 2019), on a few images. Returns {check: {"passed", "value", "text"}}."""
    images, labels = (part[:SANITY_IMAGES] for part in test)
    rng = stream(seed, "sanity", victim.name, threat.name, device=data.device)

    def right(attack, **options):
        x_adv = craft(victim.net, images, labels, threat, attack, targeted=False, generator=rng, **options)[0]
        return victim.net(x_adv).argmax(1) == labels

    with torch.no_grad():
        loss = float(F.cross_entropy(victim.net(images), labels))
    large = float(right("PGD", eps=64 / 255, steps=20).float().mean())
    starts = torch.stack([right("PGD") for _ in range(5)])  # (5, n)
    one, all_starts = float(starts.float().mean()), float(starts.all(0).float().mean())
    query = float(right("Square", queries=100).float().mean())
    return {
        "loss is finite": {"passed": bool(np.isfinite(loss)), "value": loss, "text": f"clean loss {loss:.4g}"},
        "large eps": {"passed": large <= 0.02, "value": large,
                      "text": f"accuracy {100 * large:.0f} % under PGD at eps 64/255, expected about 0: its gradients mislead"},
        "black box": {"passed": query >= one - 0.02, "value": query - one,
                      "text": f"accuracy {100 * query:.0f} % under Square (100 queries), {100 * one:.0f} % under PGD: a "
                              "black-box attack that is stronger means masked gradients"},
        "restarts": {"passed": one - all_starts <= 0.05, "value": one - all_starts,
                     "text": f"accuracy {100 * one:.0f} % under PGD, {100 * all_starts:.0f} % under the best of 5 starts"},
    }


# ------------------------------------------------------------------------------------------------------------- results
class Results:
    """results.json and, for the job that is not finished, unfinished.json. Both are only ever replaced whole."""

    def __init__(self, args, flags, device):
        self.folder = Path(args.out)
        self.path, self.unfinished_path = self.folder / "results.json", self.folder / "unfinished.json"
        if self.folder.exists():
            self._lock = lock(self.folder)
        self.content = {"rows": [], "metrics": [], "sanity": {}, "networks": {}, "flags": flags,
                        "versions": utils.versions(), "device": utils.device_name(device)}
        if self.path.exists():
            if not args.resume:
                raise InputError(f"{self.path} exists; go on with --resume, or choose another --out")
            self.content = self._read(self.path)
            refuse_other_flags(self.content["flags"], flags, MAY_CHANGE, f"the run in {self.folder}", "another --out")
            if self.content["rows"] and self.content["device"] != utils.device_name(device):
                raise InputError(f"the seconds in {self.path} are those of {self.content['device']}, this is "
                                 f"{utils.device_name(device)}: AE and CREI would mix them; go on there, or choose another "
                                 "--out")
            self.content |= {"flags": flags, "device": utils.device_name(device)}
        if not self.folder.exists():
            self.folder.mkdir(parents=True)
            self._lock = lock(self.folder)
        self.save()

    def close(self):
        """Let another process have the folder."""
        self._lock.close()

    def _read(self, path):
        try:
            content = json.loads(path.read_text())
            for key in ("flags", "sanity", "networks", "versions"):
                if not isinstance(content[key], dict):
                    raise TypeError(f"{key} is no object")
            content["device"]
            check_rows(content["rows"])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} is damaged or no file of ours ({type(error).__name__}: {error})") from None
        return content

    def register(self, victim):
        """Note where a network comes from. Refuses one that has changed since the run began."""
        before = self.content["networks"].setdefault(victim.name, victim.about)
        if before.get("sha256") != victim.about["sha256"]:
            raise InputError(f"{victim.about['file']} is not the file that {self.path} has results of; choose another --out")

    def has(self, job, victims):
        """Whether rows of this job are there for all networks that it is evaluated on."""
        return {v.name for v in victims} <= {row["evaluated_on"] for row in self.content["rows"] if job.is_of(row)}

    def add(self, job, rows):
        """Rows of a job that is done, in place of those that fewer evaluated networks have left."""
        self.content["rows"] = [row for row in self.content["rows"] if not job.is_of(row)] + rows
        self.save()
        if self.unfinished()["job"] == vars(job):
            self.unfinished_path.unlink()

    def save(self):
        write_json(self.path, self.content)

    def slices(self, job, victims):
        """The finished slices of `job`, if it is the one that was interrupted and was evaluated on the same networks."""
        unfinished = self.unfinished()
        same = unfinished["job"] == vars(job) and unfinished["evaluated_on"] == [v.name for v in victims]
        return unfinished["slices"] if same else []

    def unfinished(self):
        """What is known of the job that was interrupted: its fields, the networks evaluated on, its finished slices."""
        try:
            unfinished = json.loads(self.unfinished_path.read_text())
            return {key: unfinished[key] for key in ("job", "evaluated_on", "slices")}
        except (OSError, ValueError, KeyError, TypeError):
            return {"job": None, "evaluated_on": None, "slices": []}

    def save_slices(self, job, victims, slices):
        write_json(self.unfinished_path, {"job": vars(job), "evaluated_on": [v.name for v in victims], "slices": slices})


def check_rows(rows):
    """Raise KeyError, TypeError or ValueError that says what is wrong with the rows of a results.json."""
    def number(value, least=0.0, most=np.inf, kinds=(int, float)):
        return isinstance(value, kinds) and not isinstance(value, bool) and least <= value <= most and np.isfinite(value)

    checks = {
        "dataset": lambda v: v in utils.DATASETS, "ipc": lambda v: v is None or number(v, 1, kinds=int),
        **dict.fromkeys(("method", "crafted_on", "evaluated_on"), lambda v: isinstance(v, str)),
        "threat_model": lambda v: v in THREAT_MODELS, "attack": lambda v: v in (*CONTROLS, *ATTACKS),
        "targeted": lambda v: v is None or isinstance(v, bool), "eps": lambda v: v is None or number(v),
        "n": lambda v: number(v, 1, kinds=int), "accuracy": lambda v: number(v, 0, 1),
        **dict.fromkeys(("seconds", "forward", "backward", "max_linf", "max_l2", "seed"), number)}
    if not isinstance(rows, list):
        raise TypeError("rows is no list")
    for row in rows:
        for key, right in checks.items():
            if not right(row[key]):
                raise ValueError(f"a row with {key} {str(row[key])[:60]}")


def groups_of(rows):
    """White-box rows by column of a table: {(method, ipc): {(attack, targeted, eps): [row of each network]}}."""
    groups = {}
    for row in rows:
        if row["crafted_on"] == row["evaluated_on"]:
            cell = groups.setdefault((row["method"], row["ipc"]), {}).setdefault(
                (row["attack"], row["targeted"], row["eps"]), [])
            cell.append(row)
    return groups


def mean_of(rows, key="accuracy"):
    return float(np.mean([row[key] for row in rows]))


def metrics_of(rows, threats, crei_weight):
    """The metrics of SPEC 3.3 for each method, threat model and form, pooled over the IPC settings that are there.

    Only attacks at their default eps count. An accuracy is the mean over the networks of a setting. Each entry says what was
    pooled, what is missing from the published grid, and which attacks raised the accuracy.
    """
    entries = []
    for name, threat in threats.items():
        groups = groups_of([row for row in rows if row["threat_model"] == name])
        for method in dict.fromkeys(method for method, _ in groups):
            settings = {ipc: groups[m, ipc] for m, ipc in sorted(groups, key=lambda g: (g[0], g[1] or 0)) if m == method}
            settings = {ipc: cells for ipc, cells in settings.items() if ("Clean", None, None) in cells}
            for (kind, grid), targeted in itertools.product((("white-box", WHITE_BOX), ("query", QUERY)), (True, False)):
                grid = [a for a in grid if not targeted or ATTACKS[a].targetable]
                keys = [(a, targeted, ATTACKS[a].eps(threat) if ATTACKS[a].eps else None) for a in grid]
                there = [(ipc, key) for ipc, cells in settings.items() for key in keys if key in cells]
                clean = [settings[ipc]["Clean", None, None] for ipc in settings]
                if not there or not any(mean_of(cell) for cell in clean):  # nothing pooled, or metrics not defined
                    continue
                attacked = [settings[ipc][key] for ipc, key in there]
                entries.append({
                    "dataset": rows[0]["dataset"], "method": method, "threat_model": name, "targeted": targeted, "kind": kind,
                    "ipc": list(settings), "n": attacked[0][0]["n"], "networks": [len(cell) for cell in clean],
                    "attacks": list(dict.fromkeys(key[0] for _, key in there)),
                    "missing": [f"{a} at ipc {ipc}" for ipc in settings for a, key in zip(grid, keys)
                                if (ipc, key) not in there],
                    "raised": [f"{key[0]} at ipc {ipc}" for ipc, key in there if mean_of(settings[ipc][key])
                               > mean_of(settings[ipc]["Clean", None, None])],
                    **utils.robustness_metrics([mean_of(c) for c in clean], [mean_of(a) for a in attacked],
                                               [mean_of(c, "seconds") for c in clean],
                                               [mean_of(a, "seconds") for a in attacked], crei_weight)})
    return entries


def transfer_of(rows, threats):
    """I-RR (percent) by crafting and evaluated method, for each threat model, form and IPC setting (Figure 3 of the paper).

    Of a method with itself only the white-box figures count, where each network is attacked itself.
    """
    entries, clean = [], {}
    for row in rows:
        if row["attack"] == "Clean":
            clean[row["threat_model"], row["evaluated_on"]] = row["accuracy"]
    methods = {row["evaluated_on"]: (row["method"], row["ipc"]) for row in rows}
    cells = {}
    for row in rows:
        spec = ATTACKS.get(row["attack"])
        evaluated = (row["threat_model"], row["evaluated_on"])
        if spec is None or not clean.get(evaluated) or row["crafted_on"] not in methods:
            continue
        if spec.eps is None or row["eps"] == spec.eps(threats[row["threat_model"]]):
            (crafted_method, crafted_ipc), (method, ipc) = methods[row["crafted_on"]], methods[row["evaluated_on"]]
            if crafted_ipc == ipc and (crafted_method != method or row["crafted_on"] == row["evaluated_on"]):
                cell = cells.setdefault((row["threat_model"], row["targeted"], ipc, crafted_method, method), {})
                cell.setdefault(row["attack"], []).append((row["accuracy"], clean[evaluated]))
    for (threat, targeted, ipc, crafted, method), attacks in cells.items():
        accuracy = [float(np.mean([a for a, _ in pairs])) for pairs in attacks.values()]
        clean_acc = [float(np.mean([c for pairs in attacks.values() for _, c in pairs]))]
        entries.append({"threat_model": threat, "targeted": targeted, "ipc": ipc, "crafted_on": crafted, "evaluated_on": method,
                        "attacks": list(attacks),
                        "I-RR": utils.robustness_metrics(clean_acc, accuracy, [0.0], [0.0])["I-RR"]})
    return entries


# -------------------------------------------------------------------------------------------------- tables and pictures
def cell_text(rows):
    """'44.68 [43.71, 45.66]': percent and the binomial 95 % interval (Wilson) for n images; with several networks
    '44.68 +- 0.31 [...]', the standard deviation over them and the interval of the mean."""
    accuracy, n = mean_of(rows), rows[0]["n"]
    low, high = binomtest(round(accuracy * n), n).proportion_ci(method="wilson")
    spread = f" +- {100 * np.std([row['accuracy'] for row in rows]):.2f}" if len(rows) > 1 else ""
    return f"{100 * accuracy:.2f}{spread} [{100 * low:.1f}, {100 * high:.1f}]"


def markdown(content, threats):
    """results.md: a table of the grid for each threat model, the metrics, transfer, and warnings."""
    rows, lines = content["rows"], ["# Robustness", ""]
    if not rows:
        return "\n".join(lines + ["No result yet.", ""])
    lines += [f"{rows[0]['dataset']}, {rows[0]['n']} test images, seed {rows[0]['seed']}, {content['device']}, torch "
              f"{content['versions']['torch']}. Accuracy in percent; mean +- standard deviation over networks; in brackets the "
              "binomial 95 % interval for that many images. Passes: forward + backward per image.", ""]
    for name in threats:
        groups = groups_of([row for row in rows if row["threat_model"] == name])
        if not groups:
            continue
        networks = {group: max(len(cell) for cell in cells.values()) for group, cells in groups.items()}
        lines += [f"## Threat model {name}", "", "| | passes | " + " | ".join(
            f"{method}, ipc {ipc}" + (f" ({networks[method, ipc]} networks)" if networks[method, ipc] > 1 else "")
            for method, ipc in groups) + " |", "|---|---|" + "---|" * len(groups)]
        keys = dict.fromkeys(key for cells in groups.values() for key in cells)
        for title, wanted in (("controls", lambda spec: spec is None), ("bounded by eps", lambda spec: spec and spec.eps),
                              ("minimum norm, unbounded", lambda spec: spec and not spec.eps)):
            section = [key for key in keys if wanted(ATTACKS.get(key[0]))]
            if section:
                lines.append(f"| *{title}* | |" + " |" * len(groups))
            for key in section:
                cells = [groups[group].get(key) for group in groups]
                there = [cell for cell in cells if cell]
                passes = "" if key[0] in CONTROLS else "{:.0f} + {:.0f}".format(
                    *(np.mean([mean_of(cell, what) for cell in there]) for what in ("forward", "backward")))
                lines.append(f"| {label(*key)} | {passes} | " + " | ".join(cell_text(c) if c else "" for c in cells) + " |")
        lines.append("")
    metrics = content["metrics"]
    if metrics:
        names = ("RR", "I-RR", "AE", "CREI", "I-CREI")
        lines += ["## Metrics", "", "Percent, pooled over the IPC settings named. AE depends on the machine "
                  f"({content['device']}).", "",
                  "| threat model | | form | method | ipc | " + " | ".join(names) + " | attacks |",
                  "|---" * (6 + len(names)) + "|"]
        for entry in metrics:
            note = ", ".join(entry["attacks"]) + (f"; missing: {', '.join(entry['missing'])}" if entry["missing"] else "")
            lines.append("| " + " | ".join([
                entry["threat_model"], entry["kind"], "targeted" if entry["targeted"] else "untargeted", entry["method"],
                ", ".join(map(str, entry["ipc"])), *(f"{entry[name]:.2f}" for name in names), note]) + " |")
        lines.append("")
    for title, matrix, crafted, evaluated_on in transfer_matrices(content["transfer"]):
        lines += [f"## Transfer, {title}", "", "I-RR in percent; rows: crafted on, columns: evaluated on.", "",
                  "| | " + " | ".join(evaluated_on) + " |", "|---" * (1 + len(evaluated_on)) + "|"]
        lines += [f"| {method} | " + " | ".join("" if np.isnan(v) else f"{v:.2f}" for v in values) + " |"
                  for method, values in zip(crafted, matrix)] + [""]
    warnings = warnings_of(content)
    lines += ["## Warnings", "", *(f"- {warning}" for warning in warnings or ["none"]), ""]
    return "\n".join(lines)


def warnings_of(content):
    """Failed sanity checks, and attacks that raised the accuracy, as lines."""
    lines = [f"{network}, {threat}: check '{check}' failed: {result['text']}"
             for network, threats in content["sanity"].items() for threat, checks in threats.items()
             for check, result in checks.items() if not result["passed"]]
    return lines + [f"{e['method']}, {e['threat_model']}, {'targeted' if e['targeted'] else 'untargeted'}: attacked accuracy "
                    f"is above clean accuracy ({', '.join(e['raised'])})" for e in content["metrics"] if e["raised"]]


def transfer_matrices(entries):
    """Yields (title, (crafted, evaluated) array of I-RR, crafting methods, evaluated methods) where there is any transfer."""
    for group in dict.fromkeys((e["threat_model"], e["targeted"], e["ipc"]) for e in entries):
        inside = {(e["crafted_on"], e["evaluated_on"]): e["I-RR"] for e in entries
                  if (e["threat_model"], e["targeted"], e["ipc"]) == group}
        if all(crafted == evaluated for crafted, evaluated in inside):
            continue
        crafted, evaluated_on = (list(dict.fromkeys(names)) for names in zip(*inside))
        threat, targeted, ipc = group
        yield (f"{threat} {'targeted' if targeted else 'untargeted'}, ipc {ipc}",
               np.array([[inside.get((c, e), np.nan) for e in evaluated_on] for c in crafted]), crafted, evaluated_on)


def heat_map(axes, matrix, crafted, evaluated_on):
    """Draw percentages, (crafted, evaluated), with their figures. Returns the image, for a colour bar."""
    image = axes.imshow(matrix, vmin=0, vmax=100, aspect="auto")
    for (i, j), value in np.ndenumerate(matrix):
        if not np.isnan(value):
            axes.text(j, i, f"{value:.1f}", ha="center", va="center", color="w" if value < 60 else "k")
    long = max(map(len, evaluated_on)) > 8
    axes.set_xticks(range(len(evaluated_on)), evaluated_on, **({"rotation": 30, "ha": "right"} if long else {}))
    axes.set_yticks(range(len(crafted)), crafted)
    axes.set(xlabel="evaluated on", ylabel="crafted on")
    return image


def pictures(content, threats, folder):
    """grid_<threat>.png (bars), eps_<threat>.png (accuracy against eps), transfer_<threat>_<form>_<ipc>ipc.png (heat map)."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def save(figure, name):
        write_atomically(folder / name, lambda partial: figure.savefig(partial, dpi=150, bbox_inches="tight"))
        plt.close(figure)

    for name in threats:
        groups = groups_of([row for row in content["rows"] if row["threat_model"] == name])
        if not groups:
            continue
        keys = list(dict.fromkeys(key for cells in groups.values() for key in cells))
        keys.sort(key=lambda key: (*CONTROLS, *ATTACKS).index(key[0]))
        figure, axes = plt.subplots(figsize=(max(6.4, 0.5 * len(keys) * (1 + 0.3 * len(groups))), 4))
        width = 0.8 / len(groups)
        for i, ((method, ipc), cells) in enumerate(groups.items()):
            found = [(k, cells[key]) for k, key in enumerate(keys) if key in cells]
            axes.bar([k + (i - (len(groups) - 1) / 2) * width for k, _ in found], [100 * mean_of(c) for _, c in found], width,
                     yerr=[100 * np.std([row["accuracy"] for row in c]) for _, c in found], label=f"{method}, ipc {ipc}")
        axes.set_xticks(range(len(keys)), [label(*key) for key in keys], rotation=45, ha="right")
        unbounded = [k for k, key in enumerate(keys) if key[0] in ATTACKS and not ATTACKS[key[0]].eps]
        for k in unbounded:
            axes.axvspan(k - 0.5, k + 0.5, color="0.92", zorder=0)
        axes.set(ylabel="accuracy (%)", ylim=(0, 100), title=f"Threat model {name}, {content['rows'][0]['n']} test images"
                 + ("\nshaded: minimum-norm attacks, without eps" if unbounded else ""))
        axes.legend()
        save(figure, f"grid_{name}.png")

        curves = {}
        for (method, ipc), cells in groups.items():
            for (attack, targeted, eps), cell in cells.items():
                if eps is not None:
                    curves.setdefault((method, ipc, attack, targeted), {})[255 * eps] = 100 * mean_of(cell)
        curves = {key: dict(sorted(curve.items())) for key, curve in curves.items() if len(curve) > 1}
        if curves:
            figure, axes = plt.subplots(figsize=(6.4, 4))
            for (method, ipc, attack, targeted), curve in curves.items():
                axes.plot(list(curve), list(curve.values()), "o-", label=f"{method}, ipc {ipc}: {label(attack, targeted)}")
            axes.set(xlabel="eps (1/255, attack space)", ylabel="accuracy (%)", title=f"Threat model {name}")
            axes.set_ylim(bottom=0)
            axes.legend(fontsize=8)
            save(figure, f"eps_{name}.png")

    for title, matrix, crafted, evaluated_on in transfer_matrices(content["transfer"]):
        figure, axes = plt.subplots(figsize=(2.4 + 0.9 * len(evaluated_on), 1.8 + 0.7 * len(crafted)))
        figure.colorbar(heat_map(axes, matrix, crafted, evaluated_on))
        axes.set_title(f"I-RR (%), {title}")
        save(figure, f"transfer_{re.sub('[^a-z0-9]+', '_', title)}.png")


# ---------------------------------------------------------------------------------------------------------------- main
def main():
    args = parse_args()
    if (args.sanity or {"AA", "Square"} & set(args.attacks)) and find_spec("pyautoattack") is None:
        raise InputError("AA, Square and the sanity checks need the package pyautoattack; without it choose other --attacks, "
                         "with --no_sanity")
    device = utils.get_device(args.device)
    fast.set_precision("fp32")  # no doubt about the accuracies
    sources = read_sources(args)
    data = utils.load_dataset(choose_dataset(args, sources), args.data_path, device)
    if args.limit > len(data.labels["test"]):
        raise InputError(f"--limit {args.limit} is more than the {len(data.labels['test'])} test images")
    methods = list(dict.fromkeys(source.method for source in sources))
    if not set(args.craft_on) <= set(methods):
        raise InputError(f"--craft_on {' '.join(args.craft_on)}: the methods here are {', '.join(methods)}")
    fit_normalisation(sources, data)
    for source in sources:
        if source.sets:
            check_set(source, data)
    victims = [victim_of_network(source, data) for source in sources if not source.sets]

    with closing(Results(args, {**vars(args), "dataset": data.name}, device)) as results:  # nothing is written before here
        try:
            run(args, sources, victims, data, results)
        except KeyboardInterrupt:
            tqdm.write(f"{results.folder} has what was done so far; --resume goes on with it")
            raise


def run(args, sources, victims, data, results):
    """Train what is to be trained, attack everything, write tables and pictures."""
    for source in sources:
        if source.sets:
            found = victims_of_set(args, source, data, results.folder / "networks")
            victims += tqdm(found, f"training on {source.path.name}", unit="net", disable=None)
    for victim in victims:
        results.register(victim)

    threats = {name: get_threat_model(name, data) for name in args.threat_model}
    test = data.take("test", slice(args.limit or None))
    jobs = plan(args, victims, threats)
    waiting = [job for job in jobs if not results.has(job, evaluated(args, job, victims))]
    interrupted = results.unfinished()["job"]
    waiting.sort(key=lambda job: vars(job) != interrupted)  # that one first, before another one takes its place
    if args.compile:
        compile_planned(args, waiting, victims, len(test[1]), data)
    rate = utils.image_gradients_per_second(victims[0].net, data, next(iter(threats.values())))
    cost = sum(typical_cost(args, job.attack) for job in waiting) * len(test[1])
    print(f"{len(victims)} network(s) on {utils.device_name(data.device)}, {len(test[1])} test images of {data.name}: "
          f"{len(jobs)} attacks and controls, {len(jobs) - len(waiting)} of them done, about {utils.duration(cost / rate)} to "
          f"go; results in {results.folder}", flush=True)
    with tqdm(total=len(waiting) * len(test[1]), unit="img", disable=None) as bar:
        for job in waiting:
            bar.set_description(str(job))
            run_job(job, evaluated(args, job, victims), test, threats[job.threat_model], data, args, results, bar)
    for name, victim in itertools.product(threats if args.sanity else (), victims):
        checks = results.content["sanity"].setdefault(victim.name, {})
        if name not in checks and victim in crafting(args, victims, name):
            checks[name] = check_sanity(victim, threats[name], test, data, args.seed)
            results.save()

    content = results.content
    threats = {name: get_threat_model(name, data) for name in THREAT_MODELS
               if any(row["threat_model"] == name for row in content["rows"])}  # an earlier part of the run may have had more
    content["metrics"] = metrics_of(content["rows"], threats, args.crei_weight)
    content["transfer"] = transfer_of(content["rows"], threats)
    results.save()
    text = markdown(content, threats)
    write_text(results.folder / "results.md", text)
    pictures(content, threats, results.folder)
    print(text)


def compile_planned(args, jobs, victims, n, data):
    """Compile for the attacks that take one gradient of whole batches, if there are enough of them."""
    for model in dict.fromkeys(v.model for v in victims):
        nets = {v.name: v.net for v in victims if v.model == model}
        cost = sum(typical_cost(args, job.attack) for job in jobs
                   if job.crafted_on in nets and job.attack in ("FGSM", "PGD", "PGD_L2", "CW", "Deepfool"))
        batch = min(data.chunk, SLICE)
        utils.compile_planned(next(iter(nets.values())), data, {batch: cost * n}, {}, tqdm.write)


def warm_up(net, images, chunk):
    """A pass forward, and on a GPU backward, that no clock sees. images: (N, C, H, W) normalised."""
    x = images[:chunk].clone().requires_grad_(images.device.type != "cpu")
    with torch.set_grad_enabled(x.requires_grad):
        logits = forward(net, x)
    if x.requires_grad:
        torch.autograd.grad(logits.sum(), x)


def run_job(job, victims, test, threat, data, args, results, bar):
    """Attack the test images slice by slice; what an interrupted run has done of this job is taken over."""
    size = 4 * SLICE if job.attack in ATTACKS and ATTACKS[job.attack].batches else SLICE
    parts = list(zip(*(tensor.split(size) for tensor in test)))
    slices = results.slices(job, victims)
    if [s["n"] for s in slices] != [len(labels) for _, labels in parts[:len(slices)]]:
        slices = []  # of another version of this file, which cut them otherwise
    bar.update(sum(len(labels) for _, labels in parts[:len(slices)]))
    warm_up(victims[0].net, parts[0][0], data.chunk)
    for number in range(len(slices), len(parts)):
        slices.append(run_slice(job, number, *parts[number], victims, threat, data.chunk, args))
        results.save_slices(job, victims, slices)
        bar.update(len(parts[number][1]))
    rows = rows_of(job, slices, victims, data, args)
    results.add(job, rows)
    tqdm.write(f"{job}: {100 * rows[0]['accuracy']:.2f} % in {utils.duration(rows[0]['seconds'])}")


if __name__ == "__main__":
    utils.run_script(main)


