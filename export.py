"""Export a synthetic set, unpacked and with its soft labels, to a layout of the field.

    python export.py result/ROME_res_ROME_CIFAR10_ConvNet_10ipc.pt --to ddranking exported/

Writes the files, a card, and meta.json where the layout has no place for it; evaluate.py reads all
of them (docs/foreign_files.md). Source: SPEC 3.5. MIT licence.
"""
import argparse
import csv
import dataclasses
import functools
import json
import os
import shutil
import tempfile
from pathlib import Path

import torch
from PIL import Image

from augment import unpack
from datasets import DATASETS, Normalisation, add_dataset_flag, dataset_name, load_dataset
from formats.inputs import choose_dataset, normalise_alone, take_flags
from formats.synset_file import PACKS, SPACES, SyntheticSet, mean_and_std, save_synset
from runtime.command_line import add_switch, at_least, method_name, run_script
from runtime.measures import kilobytes
from runtime.safe_io import InputError, write_json, write_tensors, write_text
from synsets import TrainConfig, build_labellers, read_sets, soft_labels, training_set


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("set", metavar="SET", help="a synthetic set of any method, a file or a folder")
    add("out", metavar="DIR", help="folder for the result, new or empty")
    add("--to", choices=LAYOUTS, required=True)
    add("--index", type=at_least(0), default=0, help="which set of the file, from 0")
    add("--hard", action="store_true", help="leave the soft labels out")
    add("--keep_packed", action="store_true", help="keep images packed, with --to dc")

    group = parser.add_argument_group("what the file does not tell (docs/foreign_files.md)")
    add = group.add_argument
    add_dataset_flag(group, None)
    add("--method", type=method_name, help="default: the file's name")
    add("--packed", type=int, choices=PACKS, default=1, help="sub-images along a side of an image")
    add("--images", choices=SPACES, help="default: bytes are pixels, floats normalised")
    add_switch(group, "zca", False, "images are ZCA-whitened")
    return parser.parse_args(argv)


# Each function writes a SyntheticSet and its meta into a folder, and returns the name there that
# `synsets.load_synset` reads.
def write_dc(folder, synset, meta):
    ipc = synset.images_per_class()
    name = f"res_{meta['method']}_{meta['dataset']}_{meta['model']}_{ipc}ipc.pt"
    save_synset(folder / name, [synset], [], meta)
    return name


def write_tensor_files(folder, synset, meta, suffix):
    """images.pt, labels.pt (soft if there are any) and lr.pt."""
    images, labels = training_set(synset, 1)
    rate = torch.tensor(float(TrainConfig.from_meta(meta).lr_net))
    for name, tensor in (("images", images), ("labels", labels), ("lr", rate)):
        write_tensors(folder / f"{name}{suffix}.pt", tensor)
    write_json(folder / "meta.json", meta)
    return f"images{suffix}.pt"


def write_folder(folder, synset, meta):
    """PNG files, and labels.csv with a row for each."""
    if meta["zca"]:
        raise InputError("a ZCA-whitened set has no pixels; choose another layout")
    mean, std = mean_and_std(meta)
    pixels = ((synset.images * std + mean).clamp(0, 1) * 255).round().to(torch.uint8)
    pixels = pixels.permute(0, 2, 3, 1).squeeze(3).numpy()  # grey (M, H, W), else (M, H, W, 3)
    labels = synset.labels.tolist()
    soft = [[]] * len(labels) if synset.soft_labels is None else synset.soft_labels.tolist()
    names = dict(enumerate(meta.get("classes", [])))
    (folder / "images").mkdir()
    with open(folder / "labels.csv", "w", encoding="utf-8") as table:
        writer = csv.writer(table, lineterminator="\n")
        writer.writerow(["file", "label", "class", *(f"logit_{c}" for c in range(len(soft[0])))])
        for i, (label, logits) in enumerate(zip(labels, soft)):
            file = f"images/{i:05d}.png"
            Image.fromarray(pixels[i]).save(folder / file)
            logits = [f"{value:.9g}" for value in logits]
            writer.writerow([file, label, names.get(label, label), *logits])
    write_json(folder / "meta.json", meta)
    return "."


def write_safetensors(folder, synset, meta):
    from safetensors.torch import save_file
    tensors = {key: x.contiguous() for key, x in synset._asdict().items()
               if isinstance(x, torch.Tensor)}
    for i, labeller in enumerate(synset.labellers):
        tensors |= {f"labellers.{i}.{key}": x for key, x in labeller["state"].items()}
    if synset.labellers:
        meta = {**meta, "labellers": [labeller["model"] for labeller in synset.labellers]}
    save_file(tensors, folder / "set.safetensors", {"meta": json.dumps(meta, sort_keys=True)})
    return "set.safetensors"


LAYOUTS = {
    "dc": write_dc,
    "mtt": functools.partial(write_tensor_files, suffix="_best"),
    "ddranking": functools.partial(write_tensor_files, suffix=""),
    "folder": write_folder,
    "safetensors": write_safetensors,
}

WITH_LABELLERS = ("dc", "safetensors")  # the other layouts have no place for networks
TRAIN_ONLINE = Path(__file__).parent / "formats" / "train_online.py"
CONVNETS = {"ConvNet", "ConvNetW32", "ConvNetW64", "ConvNetW128", "ConvNetW256"}  # that it knows
TRAIN_ONLINE_RECIPE = {"dsa_strategy": "crop_flip_scale_rotate", "lr_schedule": "cosine",
                       "mix": "cutmix_mixup", "noise": 0.0, "ema": 0.0, "warm_up": 0.1}

CARD = """\
---
license: other
tags:
- dataset-distillation
- adversarial-robustness
---

# {meta[method]} of {meta[dataset]}

{count} images of {shape}, made from {meta[dataset]}, whose terms apply to them.

| what | value |
|---|---|
| stored as | {meta[stored]} images, each of {pack}x{pack} sub-images |
| images | {description} |
| training | {training}; SGD, momentum 0.9, weight decay 5e-4, one epoch more than `epochs` |
| kB | {kilobytes}: images as bytes of pixels, labels, labellers |
| threat model of the labels | {threat_model} |

To train on it, with the project's folder on the path:

```python
from networks import get_network
from synsets import {loaders}
from utils import train_on_set

images, labels, config = load_synset("{name}")
net = get_network("{meta[model]}", {shape[0]}, {num_classes}, {size}, seed=0)
train_on_set(net, images, labels, config{labellers})
```
{own_loop}
`python evaluate.py --synset {name}` does that and attacks the networks.

The networks that gave the soft labels, of each set, and their accuracies (fractions):

```json
{teachers}
```
"""


OWN_LOOP = """
Its labellers label every batch as the network sees it. In a loop of your own:

```python
from synsets import label_loss
from utils import augmented_batches

labellers = load_labellers("{name}")
for epoch in augmented_batches(images, labels, config, generator, labellers):
    for x, y in epoch:  # augmented, mixed, with noise; y: logits
        loss = label_loss(net(x), y, config.temperature)
```
"""
ALONE = """
Without the project, with PyTorch and `{script}` of this folder:

```python
from train_online import read_set, train

images, labellers, recipe = read_set("{name}")
train(net, images, labellers, **recipe)  # your network, for images normalised like these
```
"""


def card(synset, meta, name, description, has_script):
    """The data set card, as Markdown. name: what `load_synset` reads in its folder. has_script:
    that trains without the project."""
    labellers, own_loop, loaders = "", "", "load_synset"
    if synset.labellers:
        loaders = "load_labellers, load_synset"
        labellers = f', labellers=load_labellers("{name}")'
        own_loop = OWN_LOOP.format(name=name)
        if has_script:
            own_loop += ALONE.format(name=name, script=TRAIN_ONLINE.name)
    shape, num_classes = tuple(synset.images.shape[1:]), int(synset.labels.max()) + 1
    if synset.soft_labels is not None:
        num_classes = synset.soft_labels.shape[1]
    config = dataclasses.asdict(TrainConfig.from_meta(meta))
    return CARD.format(
        name=name, meta=meta, count=len(synset.labels), shape=shape, size=shape[1:],
        pack=meta["stored_pack"], description=description,
        training=", ".join(f"`{option}` {value}" for option, value in config.items()),
        num_classes=num_classes, labellers=labellers, own_loop=own_loop, loaders=loaders,
        threat_model=meta.get("threat_model", "unknown"),
        kilobytes=kilobytes(synset.stored_bytes()),
        teachers=json.dumps(meta.get("recipe", {}).get("teachers", []), indent=1))


def train_online_fits(synset, meta):
    """Whether formats/train_online.py trains as the set's recipe says."""
    models = {labeller["model"] for labeller in synset.labellers}
    recipe = dataclasses.asdict(TrainConfig.from_meta(meta))
    return bool(models) and models <= CONVNETS and TRAIN_ONLINE_RECIPE.items() <= recipe.items()


def read_set(args):
    """The normalised SynsetFile, its meta, completed by the flags, and its description."""
    given = read_sets(args.set, args.index, args.packed)
    given.names["model"] = None  # any network may train on the set
    file, meta = given.synset, given.synset.meta
    has_constants = {"mean", "std"} <= meta.keys()
    if not has_constants:
        take_flags(given, args.dataset)
    declared = given.dataset or given.names["dataset"]
    if not (args.dataset or declared):
        raise InputError(f"the data set of {args.set} is unknown; give it with --dataset")
    dataset = choose_dataset(dataset_name(args.dataset) if args.dataset else declared, [given])
    default = None
    if dataset in DATASETS:
        default = Normalisation(**DATASETS[dataset])
    elif not has_constants:
        default = load_dataset(args.dataset or dataset, ".").normalisation
    mean, std, zca = normalise_alone(given, default, args.images, args.zca)
    if zca:
        mean, std = [0.0] * len(mean), [1.0] * len(std)
    description = file.describe(dataset, mean, std, zca)
    print(f"{args.set} taken as: {description}")
    for warning in given.warnings:
        print(f"warning: {warning}")
    method = args.method or given.method.removesuffix(f"-{meta.get('threat_model')}")
    meta = {**meta, "mean": list(mean), "std": list(std), "dataset": dataset, "zca": zca,
            "method": method, "model": given.model or "ConvNet"}
    return file, meta, description


def export(args, folder):
    """Write a set and its card into an empty folder. Returns (number of images, kind of labels)."""
    file, meta, description = read_set(args)
    images, labels, soft, labellers = file.sets[args.index]
    stored, pack = len(labels), file.pack
    if args.hard and file.labels_from_soft:
        raise InputError(f"--hard: {args.set} has soft labels only, no classes of its own")
    if not args.keep_packed:
        images, labels, pack = unpack(images, pack), labels.repeat(pack**2), 1
    meta |= {"packed": pack > 1, "pack": pack, "stored": stored, "stored_pack": file.pack,
             "exported_from": Path(args.set).name, "exported_sha256": file.sha256()}
    if "recipe" in meta:
        teachers = meta["recipe"].get("teachers", [])[args.index : args.index + 1]
        meta["recipe"] = {**meta["recipe"], "pack": pack, "teachers": teachers}
    meta["flags"] = {**meta.get("flags", {}), "method": meta["method"], "model": meta["model"]}
    if labellers and not args.hard and args.to not in WITH_LABELLERS:
        soft = soft_labels(build_labellers(file.sets[args.index]), images)
        description += ", soft labels of the images themselves in place of its labellers"
        labellers = []
    synset = SyntheticSet(images, labels, *((None, []) if args.hard else (soft, labellers)))
    name = LAYOUTS[args.to](folder, synset, meta)
    has_script = args.to == "dc" and train_online_fits(synset, meta)
    if has_script:
        shutil.copy(TRAIN_ONLINE, folder)
    write_text(folder / "README.md", card(synset, meta, name, description, has_script))
    if synset.labellers:
        return len(labels), "online"
    return len(labels), "hard" if synset.soft_labels is None else "soft"


def main():
    args = parse_args()
    if args.keep_packed and args.to != "dc":
        raise InputError(f"--keep_packed: {args.to} cannot tell packed images; choose --to dc")
    folder = Path(args.out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists and is not empty; choose another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder.parent) as temporary:
        partial = Path(temporary) / folder.name
        partial.mkdir()
        count, kind = export(args, partial)
        os.replace(partial, folder)  # never half written
    print(f"{args.to}: {count} images, {kind} labels, in {folder}")


if __name__ == "__main__":
    run_script(main)
