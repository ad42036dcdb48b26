"""Sets and networks that a user gives: what they declare of themselves, how they fit the data.

What a file declares is believed; a flag adds what it does not declare. A contradiction is a
warning; what cannot be is refused. The rules: docs/foreign_files.md.
"""

import itertools
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch

from datasets import DATASETS, Normalisation, known_dataset
from formats.synset_file import SynsetFile, mean_and_std, read_synset
from runtime.safe_io import InputError

NETWORK_NAME = re.compile(
    r"(?P<method>.+?)_(?P<model>[A-Za-z0-9]+)_(?P<dataset>[A-Za-z0-9-]+)_(?P<ipc>\d+)_"
    r"(?P<trained>[^_]+)(_.*)?\.(pth|pt)$"
)
SET_NAME = re.compile(
    r".*?res_(?P<method>[^_]+)_(?P<dataset>[A-Za-z0-9-]+)_(?P<model>[A-Za-z0-9]+)_\d+ipc"
)


@dataclass
class Input:
    """A file that a user gives, and what it is taken as.

    names: {"dataset", "model": what the file or a flag says, or None}; dataset, model: that, if it
    is one of ours. trained: how a network was, by its name. notes: how a network was read.
    control: whether the set holds random images in place of those of the file.
    """

    path: Path
    method: str
    names: dict
    dataset: str = None
    model: str = None
    ipc: int = None
    trained: str = None
    synset: SynsetFile = None
    control: bool = False
    notes: list = field(default_factory=list)
    description: str = ""
    warnings: list = field(default_factory=list)

    def __str__(self):
        dataset = self.dataset or "data set unknown"
        return f"{self.path} ({self.method}, {dataset}, {self.ipc or '?'} images per class)"


# ------------------------------------------------------------------------------------- names, flags
def read_input(path, models, is_set, packed=1):
    """A set, or what the name of a network says, as an Input. For the arguments: `read_inputs`."""
    path = Path(path)
    match = (SET_NAME if is_set else NETWORK_NAME).match(path.name)
    parts = match.groupdict() if match else {}
    words = re.split(r"[_.\s]|-(?!\d)", path.name)
    in_name = next(filter(None, map(known_dataset, words)), None)
    names = {"dataset": parts.get("dataset", in_name), "model": parts.get("model")}
    entry = Input(path, parts.get("method", path.stem), names, trained=parts.get("trained"))
    entry.ipc = int(parts["ipc"]) if "ipc" in parts else None
    if is_set:
        entry.synset = read_synset(path, packed)
        entry.ipc = entry.synset.sets[0].images_per_class()
        _believe_meta(entry, has_method="method" in parts)
    entry.dataset = known_dataset(names["dataset"])
    entry.model = {_plain(model): model for model in models}.get(_plain(names["model"]))
    return entry


def _believe_meta(entry, has_method):
    """Let the meta of a set overrule the name of its file, with a warning."""
    meta, names = entry.synset.meta, entry.names
    flags, threat = meta.get("flags", {}), meta.get("threat_model", "published")
    if not has_method:
        entry.method = str(flags.get("method", entry.method))
    entry.method += f"-{threat}" if threat != "published" else ""
    for key, declared in ("dataset", meta.get("dataset")), ("model", flags.get("model")):
        if declared and names[key] and _plain(declared) != _plain(names[key]):
            both = f"its name says {names[key]}, its meta {declared}"
            entry.warnings.append(f"{entry.path}: {both}; the meta is believed")
        names[key] = declared or names[key]


def _plain(name):
    return re.sub(r"[^a-z0-9]", "", str(name).lower())


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
        are_networks = not (one.synset or other.synset)
        if are_networks and one.path.name == other.path.name:
            raise InputError(f"{one.path} and {other.path} have the same name; rename one")
        are_alike = are_networks and (one.model, one.trained) == (other.model, other.trained)
        if (one.method, one.ipc) == (other.method, other.ipc) and not are_alike:
            raise InputError(f"{one} and {other} would be pooled: tell them apart with --method")
    return inputs


def take_flags(entry, dataset=None, model=None):
    """Let --dataset and --model declare what a file does not.

    Raises InputError for an unknown name without its flag.
    """
    for key, value in (("dataset", dataset), ("model", model)):
        name, chosen = entry.names[key], Path(str(value)).stem
        is_unknown = name and getattr(entry, key) is None
        if is_unknown and not value:
            raise InputError(f"{entry.path} is of the {key} {name!r}, which is unknown here; say "
                             f"with --{key} what to take it for")
        if is_unknown and _plain(name) != _plain(chosen):
            entry.warnings.append(f"{entry.path} says {name}, taken as {chosen} as --{key} says")
        entry.names[key] = name or value
    entry.model = model or entry.model


def choose_dataset(flag, inputs):
    """The data set of --dataset, else of the files, else CIFAR10. Refuses files of another one."""
    name = flag or next((entry.dataset for entry in inputs if entry.dataset), "CIFAR10")
    for entry in inputs:
        if entry.dataset not in (None, name):
            raise InputError(f"{entry} is not of {name}: evaluate each data set by itself")
    return name


# ------------------------------------------------------------------------------------ normalisation
def normalisation_of(entry, default, zca=False):
    """The Normalisation that a set declares, else `default`, whitened with `zca`."""
    meta, declared = entry.synset.meta, entry.synset.declared_zca()
    if zca and declared is False:
        raise InputError(f"{entry.path} says that it is not ZCA-whitened; leave out --zca")
    mean, std = meta.get("mean", default.mean), meta.get("std", default.std)
    own, channels = Normalisation(mean, std, bool(zca or declared)), len(default.mean)
    if {len(mean), len(std)} != {channels}:
        raise InputError(f"{entry.path} is {own}; images here have {channels} channel(s)")
    return own


def choose_normalisation(inputs, data, zca=False, network=None):
    """Let `data` normalise as the inputs are normalised, all of them in the same way.

    zca: what declares nothing is whitened. network: (mean, std) of networks. Raises InputError.
    """
    of_networks = Normalisation(*(network or (data.mean, data.std)), zca)
    found = [normalisation_of(entry, data.normalisation, zca) if entry.synset else of_networks
             for entry in inputs]
    for entry, own in zip(inputs, found):
        if not own.matches(found[0]):
            both = f"{inputs[0].path} is {found[0]}, {entry.path} is {own}"
            raise InputError(f"{both}: evaluate them in runs of their own (networks: --zca)")
    if found[0].zca:
        data.fit_zca()
    elif not found[0].matches(data.normalisation):
        data.set_normalisation(found[0].mean, found[0].std)


def normalise_alone(entry, default=None, images=None, zca=False):
    """Normalise the images of a set without its data set, as its meta declares.

    default: the Normalisation of a set that declares nothing; None: that of a known data set.
    images, zca: see SynsetFile.normalise. Returns the Normalisation. Raises InputError.
    """
    known = {"mean", "std"} <= entry.synset.meta.keys() or default or entry.dataset
    channels = entry.synset.sets[0].images.shape[1]
    if not default:
        unknown = {"mean": (0.0,) * channels, "std": (1.0,) * channels}
        default = Normalisation(**DATASETS.get(entry.dataset, unknown))
    own = normalisation_of(entry, default, zca)
    if len(own.mean) != channels:
        raise InputError(f"{entry.path} is {own}; its images have {channels} channel(s)")

    def normalize(pixels):
        if own.zca or not known:
            raise InputError(f"{entry.path} holds pixels and does not say how they are normalised")
        mean, std = mean_and_std(own._asdict())
        return (pixels - mean) / std

    entry.synset.normalise(normalize, images, own.zca)
    entry.warnings += entry.synset.warnings
    return own


# --------------------------------------------------------------------------------------- the checks
def check_and_normalise(entry, data, images=None):
    """Check an input against a data set, normalise its images, and write its description.

    images: see SynsetFile.normalise. Raises InputError.
    """
    dataset, model = ("" if entry.names[key] else " (assumed)" for key in ("dataset", "model"))
    if entry.synset is None:
        space = f"for images {data.normalisation}"
        parts = [data.name + dataset, entry.model + model, space, *entry.notes]
        entry.description = ", ".join(parts)
        return
    synset = entry.synset
    for one in synset.sets:
        if problem := _misfit(one, data, synset.labels_from_soft):
            raise InputError(f"{entry.path}: {problem}")
    _match_classes(entry, data)
    synset.normalise(data.normalize, images, data.zca)
    entry.warnings += synset.warnings
    entry.description = synset.describe(data.name + dataset, *data.normalisation)


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
    """Number the classes of a set as `data` does; warn of other names."""
    synset = entry.synset
    theirs = [str(name).lower() for name in synset.meta.get("classes", data.classes)]
    ours = [name.lower() for name in data.classes]
    if theirs == ours:
        return
    if sorted(theirs) != sorted(ours):
        names = f"{', '.join(theirs[:3])} ..., not {', '.join(ours[:3])} ..."
        entry.warnings.append(f"{entry.path}: its classes are {names}; taken in this order")
        return
    number = torch.tensor([ours.index(name) for name in theirs])
    for i, one in enumerate(synset.sets):
        soft = None if one.soft_labels is None else one.soft_labels[:, number.argsort()]
        labellers = [_permuted(labeller, number.argsort()) for labeller in one.labellers]
        synset.sets[i] = one._replace(labels=number[one.labels], soft_labels=soft,
                                      labellers=labellers)
    synset.notes.append("classes numbered by their names")


def _permuted(labeller, order):
    """A labeller whose class scores come in another order."""
    state = {key: value[order] if key.startswith("classifier.") else value
             for key, value in labeller["state"].items()}
    return {**labeller, "state": state}
