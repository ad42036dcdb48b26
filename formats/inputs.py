"""Sets and networks that a user names: what their names and their meta say, and whether they fit
the data set.

What a file says of itself is believed; a flag says what it does not. What contradicts is a warning,
what cannot be is refused. `Input.taken_as` is the line that says how a file was understood,
docs/foreign_files.md the whole of it.
"""

import itertools
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from datasets import DATASETS, known_dataset
from runtime.safe_io import InputError
from formats.synset_file import SynsetFile, read_synset

NETWORK_NAME = re.compile(
    r"(?P<method>.+?)_(?P<model>[A-Za-z0-9]+)_(?P<dataset>[A-Za-z0-9-]+)_(?P<ipc>\d+)_"
    r"(?P<trained>[^_]+)"
    r"(_.*)?\.(pth|pt)$"
)
SET_NAME = re.compile(
    r"res_(?P<method>[^_]+)_(?P<dataset>[A-Za-z0-9-]+)_(?P<model>[A-Za-z0-9]+)_(?P<ipc>\d+)ipc"
)
# Data sets of the field that a name may speak of and that are none of ours.
OTHER_DATASETS = (
    "SVHN",
    "MNIST",
    "FashionMNIST",
    "KMNIST",
    "EMNIST",
    "STL10",
    "CINIC10",
    "CUB200",
    "TinyImageNet",
    "ImageNet",
    "ImageNette",
    "ImageWoof",
    "CelebA",
    "Places365",
)
ASSUMED = {"dataset": "CIFAR10", "model": "ConvNet"}  # where nothing says so


@dataclass
class Input:
    """A file that a user gave, and what it is taken as.

    dataset, model, ipc: None where nothing says so. trained: how a network was trained, as its name
    says. synset: of a set. unknown: names that are none of ours, {"data set": ..., "network": ...}.
    taken_as, warnings: for the reader.
    """

    path: Path
    method: str
    dataset: str = None
    model: str = None
    dataset_given: bool = False  # by a flag
    model_assumed: bool = False
    ipc: int = None
    trained: str = None
    synset: SynsetFile = None
    unknown: dict = field(default_factory=dict)
    notes: list = field(default_factory=list)
    taken_as: str = ""
    warnings: list = field(default_factory=list)

    def describe(self):
        dataset = self.dataset or "data set unknown"
        return f"{self.path} ({self.method}, {dataset}, {self.ipc or '?'} images per class)"


def read_input(path, models, is_set, packed=1):
    """One set or network, with what its name and its meta say. models: the names of the networks
    that there are.
    """
    path = Path(path)
    if not path.exists() or path.is_dir() and not is_set:
        raise InputError(f"{path} does not exist" + (" or is a folder" if not is_set else ""))
    match = (SET_NAME.search if is_set else NETWORK_NAME.match)(path.name)
    named = match.groupdict() if match else {}
    said = {"dataset": named.get("dataset") or _dataset_in(path.name), "model": named.get("model")}
    method = named.get("method", path.stem if path.suffix else path.name)
    one = Input(
        path,
        method,
        ipc=int(named["ipc"]) if "ipc" in named else None,
        trained=named.get("trained"),
    )
    if is_set:
        one.synset = read_synset(path, packed)
        meta = one.synset.meta
        method = meta.get("flags", {}).get("method")
        if not named and isinstance(method, str):
            one.method = method
        if meta.get("threat_model", "published") != "published":
            one.method += f"-{meta['threat_model']}"
        in_meta = {"dataset": meta.get("dataset"), "model": meta.get("flags", {}).get("model")}
        for key, value in in_meta.items():
            if value and said[key] and _plain(value) != _plain(said[key]):
                one.warnings.append(
                    f"{path}: its name says {said[key]}, its meta {value}; the meta is believed"
                )
            said[key] = value or said[key]
    plain_models = {_plain(model): model for model in models}
    for what, key, known in (
        ("data set", "dataset", known_dataset),
        ("network", "model", lambda x: plain_models.get(_plain(x))),
    ):
        if said[key] is not None:
            setattr(one, key, known(said[key]))
            if getattr(one, key) is None:
                one.unknown[what] = said[key]
    return one


def _plain(name):
    return re.sub(r"[^a-z0-9]", "", str(name).lower())


def _dataset_in(name):
    """The data set that a file's name speaks of, as one of its words."""
    names = {_plain(known): known for known in (*DATASETS, *OTHER_DATASETS)}
    words = (names.get(_plain(word)) for word in re.split(r"[_.\s]|-(?!\d)", name))
    return next((word for word in words if word), None)


def read_inputs(args, models):
    """The files of --synset and --networks. Two of one name, or sets that could not be told apart
    in a table, are refused.
    """
    inputs = []
    for i, path in enumerate(args.synset + args.networks):
        one = read_input(path, models, is_set=i < len(args.synset), packed=args.packed)
        if args.method:
            one.method = args.method[i]
        take_flags(one, args.dataset, args.model)
        one.model_assumed = one.model is None
        one.model = one.model or ASSUMED["model"]
        inputs.append(one)
    for one, other in itertools.combinations(inputs, 2):
        if one.path.name == other.path.name and not (one.synset and other.synset):
            raise InputError(
                f"{one.path} and {other.path} have the same name; results are kept by file name: "
                "rename one"
            )
        if one.synset and other.synset:
            pooled = one.method == other.method and len(one.synset.sets[0][1]) == len(
                other.synset.sets[0][1]
            )
        else:
            pooled = (one.method, one.ipc) == (other.method, other.ipc) and (
                one.model,
                one.trained,
                bool(one.synset),
            ) != (other.model, other.trained, bool(other.synset))
        if pooled:
            raise InputError(
                f"{one.describe()} and {other.describe()} would be pooled: tell them apart with "
                "--method"
            )
    return inputs


def take_flags(one, dataset=None, model=None):
    """What an unknown name is taken as: the flags say so, or the file is refused."""
    for what, flag, value in (("data set", "dataset", dataset), ("network", "model", model)):
        if what in one.unknown and not value:
            choices = (
                ", ".join(DATASETS) + ", or the file of its data"
                if flag == "dataset"
                else "--help lists them"
            )
            raise InputError(
                f"{one.path} is of the {what} {one.unknown[what]!r}, which is none of those here; "
                f"say what to take it for with --{flag} ({choices})"
            )
        if what in one.unknown and _plain(one.unknown[what]) != _plain(Path(str(value)).stem):
            one.warnings.append(
                f"{one.path} says {one.unknown[what]}, taken as {Path(str(value)).stem} as "
                f"--{flag} says"
            )
    one.model, one.dataset_given = model or one.model, bool(dataset)


def choose_dataset(given, inputs):
    """The data set: --dataset, or what the files say, which must not contradict it; CIFAR10 where
    nothing says so.
    """
    name = given or next((one.dataset for one in inputs if one.dataset), ASSUMED["dataset"])
    for one in inputs:
        if one.dataset not in (None, name):
            raise InputError(
                f"{one.describe()} is not of {name}: evaluate each data set in a run of its own"
            )
    return name


# ------------------------------------------------------------------------------------ normalisation
def normalisation_of(one, default, zca=False, network=None):
    """What the images of an input went through: (mean, std, whether ZCA-whitened).

    default: (mean, std) of the data set, for what says nothing. zca: whether --zca says so of what
    does not. network: (mean, std) of --network_mean, --network_std. Raises InputError if a file
    contradicts --zca.
    """
    if one.synset is None:
        mean, std = network or default
        return tuple(mean), tuple(std), zca
    meta = one.synset.meta
    says = one.synset.says_zca()
    if zca and says is False:
        raise InputError(f"{one.path} says that it is not ZCA-whitened; leave out --zca")
    whitened = zca if says is None else says
    if whitened:
        return (0.0,) * len(default[0]), (1.0,) * len(default[0]), True
    mean, std = (tuple(meta.get(key, value)) for key, value in zip(("mean", "std"), default))
    if len(mean) != len(default[0]) or len(std) != len(default[0]):
        raise InputError(
            f"{one.path} is normalised with mean {list(mean)}, std {list(std)}; images here have "
            f"{len(default[0])} channel(s)"
        )
    return mean, std, False


def choose_normalisation(inputs, data, zca=False, network=None):
    """Let `data` normalise as the inputs are normalised. Raises InputError where they differ: of a
    run of several, each network must see what it was made for. zca, network: see
    `normalisation_of`.
    """
    chosen = [normalisation_of(one, (data.mean, data.std), zca, network) for one in inputs]
    for one, its in zip(inputs, chosen):
        first = chosen[0]
        if its[2] != first[2] or not np.allclose(its[:2], first[:2], atol=1e-4):
            raise InputError(
                f"{inputs[0].path} is {_normalised(*first)}, {one.path} is {_normalised(*its)}: "
                "evaluate them in "
                "runs of their own" + (" (--zca says it of networks)" if its[2] != first[2] else "")
            )
    mean, std, whitened = chosen[0]
    if whitened:
        data.fit_zca()
    elif not np.allclose((mean, std), (data.mean, data.std), atol=1e-4):
        data.set_normalisation(mean, std)


def _normalised(mean, std, zca):
    return "ZCA-whitened" if zca else f"normalised with mean {list(mean)}, std {list(std)}"


def same_normalisation(one, data):
    """Raise InputError if a set is not normalised as `data` is, for --init."""
    mean, std, zca = normalisation_of(one, (data.mean, data.std), data.zca)
    if zca != data.zca or not np.allclose((mean, std), (data.mean, data.std), atol=1e-4):
        raise InputError(
            f"--init {one.path} is {_normalised(mean, std, zca)}, this run's images are "
            f"{_normalised(data.mean, data.std, data.zca)}"
        )


# --------------------------------------------------------------------------------------- the checks
def understand(one, data, images=None):
    """Check an input against a data set, bring its images into normalised units, and write its line
    `taken_as`.

    images: what the user says that the images of sets are, see SynsetFile.normalise.
    """
    said = one.dataset or one.dataset_given or "data set" in one.unknown
    name = data.name if said or data.name not in DATASETS else f"{data.name} (assumed)"
    if one.synset is None:
        model = f"{one.model} (assumed)" if one.model_assumed else one.model
        takes = f"for images {_normalised(data.mean, data.std, data.zca)}"
        one.taken_as = ", ".join([name, model, takes, *one.notes, "ZCA" if data.zca else "no ZCA"])
        return
    check_set(one, data)
    one.synset.normalise(data.normalize, images, data.zca)
    one.warnings += one.synset.warnings
    one.taken_as = one.synset.describe(name, data.mean, data.std, data.zca)


def check_set(one, data):
    """Whether the sets of a file are images and labels of this data set, with the same number of
    images a class (but where the classes are only the largest of soft labels).
    """
    for images, labels, soft_labels in one.synset.sets:
        if images.shape[1:] != (data.channel, *data.size):
            raise InputError(
                f"{one.path}: images are {tuple(images.shape[1:])}, {data.name} has "
                f"{(data.channel, *data.size)}"
            )
        if int(labels.min()) < 0 or int(labels.max()) >= data.num_classes:
            raise InputError(
                f"{one.path}: labels from {int(labels.min())} to {int(labels.max())}; {data.name} "
                f"has 0 to {data.num_classes - 1}"
            )
        if soft_labels is not None and soft_labels.shape[1] != data.num_classes:
            raise InputError(
                f"{one.path}: soft labels of {soft_labels.shape[1]} classes; {data.name} has "
                f"{data.num_classes}"
            )
        counts = labels.bincount(minlength=data.num_classes)
        if counts.min() != counts.max() and not one.synset.derived:
            raise InputError(
                f"{one.path}: the classes have {int(counts.min())} to {int(counts.max())} images "
                "each; the same number is expected"
            )
    _match_classes(one, data)


def _match_classes(one, data):
    """Number the classes of a set as `data` does, where it names them; a warning where the names
    are others.
    """
    theirs = [str(name).lower() for name in one.synset.meta.get("classes", data.classes)]
    ours = [str(name).lower() for name in data.classes]
    if theirs == ours:
        return
    if sorted(theirs) != sorted(ours):
        one.warnings.append(
            f"{one.path}: its classes are {', '.join(theirs[:3])} ..., those of {data.name} "
            f"{', '.join(ours[:3])} ...; taken in this order"
        )
        return
    number = torch.tensor([ours.index(name) for name in theirs])
    columns = number.argsort()
    one.synset.sets = [
        type(part)(
            part.images,
            number[part.labels],
            None if part.soft_labels is None else part.soft_labels[:, columns],
        )
        for part in one.synset.sets
    ]
    one.synset.notes.append("classes numbered by their names")
