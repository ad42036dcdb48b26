"""The files given to evaluate.py: what their names and their metadata say, and whether they fit the data set."""
import itertools
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from engine.datasets import DATASETS
from engine.formats import read_synset
from engine.safe_files import InputError


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


def read_sources(args, models):
    """The files of --synset and --networks, with what they say about themselves. Two of one name, or sets that could not be
    told apart in a table, are refused. models: the names of the networks that there are."""
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
            source.sets, source.meta = read_synset(path, args.packed)
            flags = source.meta.get("flags", {})
            source.dataset = source.meta.get("dataset", source.dataset)
            source.model = flags.get("model", source.model)
            if source.meta.get("threat_model", "published") != "published":
                source.method += f"-{source.meta['threat_model']}"
        if args.method:
            source.method = args.method[i]
        if source.dataset not in DATASETS:
            source.dataset = None
        if args.model or source.model not in models:
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
    for images, labels, soft_labels in source.sets:
        if images.shape[1:] != (data.channel, *data.size):
            raise InputError(f"{source.path}: images are {tuple(images.shape[1:])}, {data.name} has "
                             f"{(data.channel, *data.size)}")
        if int(labels.min()) < 0 or int(labels.max()) >= data.num_classes:
            raise InputError(f"{source.path}: labels from {int(labels.min())} to {int(labels.max())}; {data.name} has "
                             f"0 to {data.num_classes - 1}")
        if soft_labels is not None and soft_labels.shape[1] != data.num_classes:
            raise InputError(f"{source.path}: soft labels of {soft_labels.shape[1]} classes; {data.name} has "
                             f"{data.num_classes}")
        counts = labels.bincount(minlength=data.num_classes)
        if counts.min() != counts.max():
            raise InputError(f"{source.path}: the classes have {int(counts.min())} to {int(counts.max())} images each; "
                             "the same number is expected")
