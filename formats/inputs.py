"""Sets and networks that a user gives: what they declare of themselves, how they fit the data.

What a file declares is believed; a flag adds what it does not declare. A contradiction is a
warning; what cannot be is refused. The rules: docs/foreign_files.md.
"""

import itertools
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from datasets import DATASETS, known_dataset
from formats.synset_file import SynsetFile, read_synset
from runtime.safe_io import InputError

NETWORK_NAME = re.compile(
    r"(?P<method>.+?)_(?P<model>[A-Za-z0-9]+)_(?P<dataset>[A-Za-z0-9-]+)_(?P<ipc>\d+)_"
    r"(?P<trained>[^_]+)(_.*)?\.(pth|pt)$"
)
SET_NAME = re.compile(
    r".*?res_(?P<method>[^_]+)_(?P<dataset>[A-Za-z0-9-]+)_(?P<model>[A-Za-z0-9]+)_(?P<ipc>\d+)ipc"
)
OTHER_DATASETS = (  # of the field, as words of file names; none of ours
    "SVHN MNIST FashionMNIST KMNIST EMNIST STL10 CINIC10 CUB200 TinyImageNet ImageNet ImageNette "
    "ImageWoof CelebA Places365"
).split()
CHOICES = {  # where a file names one that is unknown here
    "dataset": ("data set", f"{', '.join(DATASETS)}, or the file of its data"),
    "model": ("network", "--help lists them"),
}


@dataclass
class Input:
    """A file that a user gives, and what it is taken as.

    dataset, model, ipc: None where nothing declares them. trained: how a network was, by its name.
    synset: the content of a set. unknown: {"dataset" or "model": a name that is none of ours}.
    assumed: which of the two nothing declares. notes: how a network was read.
    """

    path: Path
    method: str
    dataset: str = None
    model: str = None
    ipc: int = None
    trained: str = None
    synset: SynsetFile = None
    unknown: dict = field(default_factory=dict)
    assumed: set = field(default_factory=set)
    notes: list = field(default_factory=list)
    description: str = ""
    warnings: list = field(default_factory=list)

    def __str__(self):
        dataset = self.dataset or "data set unknown"
        return f"{self.path} ({self.method}, {dataset}, {self.ipc or '?'} images per class)"


# ------------------------------------------------------------------------------------- names, flags
def read_input(path, models, is_set, packed=1):
    """Read one set or network as an Input.

    models: the names of the architectures. packed: of a set that does not declare it.
    """
    path = Path(path)
    if not path.exists() or path.is_dir() and not is_set:
        raise InputError(f"{path} does not exist" + ("" if is_set else " or is a folder"))
    match = (SET_NAME if is_set else NETWORK_NAME).match(path.name)
    parts = match.groupdict() if match else {}
    entry = Input(path, parts.get("method", path.stem), trained=parts.get("trained"))
    entry.ipc = int(parts["ipc"]) if match else None
    names = {"dataset": parts.get("dataset") or _dataset_in(path.name), "model": parts.get("model")}
    if is_set:
        entry.synset = read_synset(path, packed)
        meta = entry.synset.meta
        flags, threat = meta.get("flags", {}), meta.get("threat_model", "published")
        if not match:
            entry.method = flags.get("method", entry.method)
        entry.method += f"-{threat}" if threat != "published" else ""
        for key, declared in ("dataset", meta.get("dataset")), ("model", flags.get("model")):
            if declared and names[key] and _plain(declared) != _plain(names[key]):
                both = f"its name says {names[key]}, its meta {declared}"
                entry.warnings.append(f"{path}: {both}; the meta is believed")
            names[key] = declared or names[key]
    entry.dataset = known_dataset(names["dataset"])
    entry.model = {_plain(model): model for model in models}.get(_plain(names["model"]))
    entry.assumed = {key for key, name in names.items() if name is None}
    entry.unknown = {key: x for key, x in names.items() if x and getattr(entry, key) is None}
    return entry


def _plain(name):
    return re.sub(r"[^a-z0-9]", "", str(name).lower())


def _dataset_in(name):
    """The data set that is a word of a file's name, or None."""
    known = {_plain(dataset): dataset for dataset in (*DATASETS, *OTHER_DATASETS)}
    words = map(_plain, re.split(r"[_.\s]|-(?!\d)", name))
    return next((known[word] for word in words if word in known), None)


def read_inputs(synsets, networks, models, methods=(), dataset=None, model=None, packed=1):
    """Read files of sets and of networks as Inputs.

    models: the names of the architectures. methods: a name for each file. dataset, model, packed:
    of files that do not declare them. Raises InputError for names that results cannot keep apart.
    """
    inputs = [read_input(path, models, is_set=True, packed=packed) for path in synsets]
    inputs += [read_input(path, models, is_set=False) for path in networks]
    for entry, method in itertools.zip_longest(inputs, methods):
        entry.method = method or entry.method
        take_flags(entry, dataset, model)
        entry.model = entry.model or "ConvNet"
    for one, other in itertools.combinations(inputs, 2):
        if one.path.name == other.path.name and not (one.synset and other.synset):
            both = f"{one.path} and {other.path} have the same name"
            raise InputError(f"{both}; results are kept by file name: rename one")
        if _are_pooled(one, other):
            raise InputError(f"{one} and {other} would be pooled: tell them apart with --method")
    return inputs


def _are_pooled(one, other):
    """Whether tables would take different inputs for runs of one thing."""
    if one.synset and other.synset:
        counts = {len(entry.synset.sets[0].labels) for entry in (one, other)}
        return one.method == other.method and len(counts) == 1
    kinds = {(entry.model, entry.trained, bool(entry.synset)) for entry in (one, other)}
    return (one.method, one.ipc) == (other.method, other.ipc) and len(kinds) == 2


def take_flags(entry, dataset=None, model=None):
    """Let --dataset and --model declare what a file does not.

    Raises InputError for an unknown name without its flag.
    """
    for key, value in (("dataset", dataset), ("model", model)):
        name, chosen = entry.unknown.get(key), Path(str(value)).stem
        if name and not value:
            kind, choices = CHOICES[key]
            raise InputError(
                f"{entry.path} is of the {kind} {name!r}, which is none of those here; say what to "
                f"take it for with --{key} ({choices})"
            )
        if name and _plain(name) != _plain(chosen):
            entry.warnings.append(f"{entry.path} says {name}, taken as {chosen} as --{key} says")
        if value:
            entry.assumed.discard(key)
    entry.model = model or entry.model


def choose_dataset(flag, inputs):
    """The data set of --dataset, else of the files, else CIFAR10. Refuses files of another one."""
    name = flag or next((entry.dataset for entry in inputs if entry.dataset), "CIFAR10")
    for entry in inputs:
        if entry.dataset not in (None, name):
            raise InputError(f"{entry} is not of {name}: evaluate each data set by itself")
    return name


# ------------------------------------------------------------------------------------ normalisation
class Normalisation(NamedTuple):
    """How images are normalised: by the mean and std of each channel, or by ZCA whitening."""

    mean: tuple
    std: tuple
    zca: bool = False

    def matches(self, other):
        return self.zca == other.zca and np.allclose(self[:2], other[:2], atol=1e-4)

    def __str__(self):
        if self.zca:
            return "ZCA-whitened"
        return f"normalised with mean {list(self.mean)}, std {list(self.std)}"


def _normalisation_of(entry, data, zca, network=None):
    """The Normalisation of an input. For the arguments see `choose_normalisation`."""
    if entry.synset is None:
        return Normalisation(*(network or (data.mean, data.std)), zca)
    meta, declared = entry.synset.meta, entry.synset.declared_zca()
    if zca and declared is False:
        raise InputError(f"{entry.path} says that it is not ZCA-whitened; leave out --zca")
    if zca or declared:
        return Normalisation((0.0,) * data.channel, (1.0,) * data.channel, True)
    own = Normalisation(meta.get("mean", data.mean), meta.get("std", data.std))
    if {len(own.mean), len(own.std)} != {data.channel}:
        raise InputError(f"{entry.path} is {own}; images here have {data.channel} channel(s)")
    return own


def choose_normalisation(inputs, data, zca=False, network=None):
    """Let `data` normalise as the inputs are normalised, all of them in the same way.

    zca: what declares nothing is whitened. network: (mean, std) of networks. Raises InputError.
    """
    found = [_normalisation_of(entry, data, zca, network) for entry in inputs]
    first = found[0]
    for entry, own in zip(inputs, found):
        if not own.matches(first):
            hint = " (--zca says it of networks)" if own.zca != first.zca else ""
            both = f"{inputs[0].path} is {first}, {entry.path} is {own}"
            raise InputError(f"{both}: evaluate them in runs of their own{hint}")
    if first.zca:
        data.fit_zca()
    elif not first.matches(Normalisation(data.mean, data.std)):
        data.set_normalisation(first.mean, first.std)


def same_normalisation(entry, data):
    """Raise InputError if a set is not normalised as `data` is, for --init."""
    ours = Normalisation(data.mean, data.std, data.zca)
    theirs = _normalisation_of(entry, data, data.zca)
    if not theirs.matches(ours):
        raise InputError(f"--init {entry.path} is {theirs}, this run's images are {ours}")


# --------------------------------------------------------------------------------------- the checks
def check_and_normalise(entry, data, images=None):
    """Check an input against a data set, normalise its images, and write its description.

    images: of SPACES, what the images of sets are; see SynsetFile.normalise. Raises InputError.
    """
    dataset, model = (" (assumed)" if key in entry.assumed else "" for key in ("dataset", "model"))
    if entry.synset is None:
        space = f"for images {Normalisation(data.mean, data.std, data.zca)}"
        parts = [data.name + dataset, entry.model + model, space, *entry.notes]
        entry.description = ", ".join([*parts, "ZCA" if data.zca else "no ZCA"])
        return
    synset = entry.synset
    for one in synset.sets:
        if problem := _misfit(one, data, synset.labels_from_soft):
            raise InputError(f"{entry.path}: {problem}")
    _match_classes(entry, data)
    synset.normalise(data.normalize, images, data.zca)
    entry.warnings += synset.warnings
    entry.description = synset.describe(data.name + dataset, data.mean, data.std, data.zca)


def _misfit(one, data, labels_from_soft):
    """Why a SyntheticSet does not fit the data set, or None."""
    shape, wanted = tuple(one.images.shape[1:]), (data.channel, *data.size)
    if shape != wanted:
        return f"images are {shape}, {data.name} has {wanted}"
    low, high, classes = int(one.labels.min()), int(one.labels.max()), data.num_classes
    if low < 0 or high >= classes:
        return f"labels from {low} to {high}; {data.name} has 0 to {classes - 1}"
    if one.soft_labels is not None and one.soft_labels.shape[1] != classes:
        return f"soft labels of {one.soft_labels.shape[1]} classes; {data.name} has {classes}"
    counts = one.labels.bincount(minlength=classes)
    if counts.min() != counts.max() and not labels_from_soft:
        return f"the classes have {counts.min()} to {counts.max()} images; expected the same number"
    return None


def _match_classes(entry, data):
    """Number the classes of a set as `data` does, where it names them; warn of other names."""
    synset = entry.synset
    theirs = [str(name).lower() for name in synset.meta.get("classes", data.classes)]
    ours = [name.lower() for name in data.classes]
    if theirs == ours:
        return
    if sorted(theirs) != sorted(ours):
        names = f"{', '.join(theirs[:3])} ..., those of {data.name} {', '.join(ours[:3])} ..."
        entry.warnings.append(f"{entry.path}: its classes are {names}; taken in this order")
        return
    number = torch.tensor([ours.index(name) for name in theirs])
    for i, one in enumerate(synset.sets):
        soft = None if one.soft_labels is None else one.soft_labels[:, number.argsort()]
        synset.sets[i] = one._replace(labels=number[one.labels], soft_labels=soft)
    synset.notes.append("classes numbered by their names")
