"""Export a synthetic set, unpacked and with its soft labels, to a layout of the field.

    python export.py result/ROME_res_ROME_CIFAR10_ConvNet_10ipc.pt --to ddranking exported/

Writes the files, a data set card, and meta.json where the layout has no place for it. evaluate.py
reads all layouts (docs/foreign_files.md). Source: SPEC 3.5. MIT licence.
"""
import argparse
import csv
import functools
import itertools
import json
import os
import tempfile
from pathlib import Path

import torch
from PIL import Image

from augment import unpack
from datasets import DATASETS, add_dataset_flag, dataset_name, load_dataset
from formats.inputs import read_input, take_flags
from formats.synset_file import PACKS, SPACES, SyntheticSet, mean_and_std, save_synset
from networks import NETWORKS
from runtime.command_line import add_switch, at_least, method_name, run_script
from runtime.safe_io import InputError, write_json, write_tensors, write_text
from synsets import TrainConfig, training_set


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
    add_dataset_flag(group, None, "; default: as the file tells")
    add("--method", type=method_name, help="default: as the file tells, else its name")
    add("--packed", type=int, choices=PACKS, default=1, metavar="K",
        help="an image holds KxK sub-images (default: 1)")
    add("--images", choices=SPACES, help="default: bytes are pixels, floats normalised")
    add_switch(group, "zca", False, "images are ZCA-whitened")
    return parser.parse_args(argv)


# The layouts: each function writes a SyntheticSet and its meta into a folder, and returns the name
# there that `synsets.load_synset` reads.
def write_dc(folder, synset, meta):
    ipc = images_per_class(synset)
    name = f"res_{meta['method']}_{meta['dataset']}_{meta['model']}_{ipc}ipc.pt"
    save_synset(folder / name, [synset], [], meta)
    return name


def write_tensor_files(folder, synset, meta, suffix):
    """Images, labels (soft if there are any) and learning rate: images.pt, labels.pt, lr.pt."""
    images, labels = training_set(synset, 1)
    rate = torch.tensor(float(TrainConfig.from_meta(meta).lr_net))
    for name, tensor in (("images", images), ("labels", labels), ("lr", rate)):
        write_tensors(folder / f"{name}{suffix}.pt", tensor)
    write_json(folder / "meta.json", meta)
    return f"images{suffix}.pt"


def write_folder(folder, synset, meta):
    """PNG files, and labels.csv with a row for each: file, label, class name, soft label."""
    if meta["zca"]:
        raise InputError("the set is ZCA-whitened: it has no pixels; choose another layout")
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
    """Tensors images, labels, soft_labels; meta as JSON in the header."""
    from safetensors.torch import save_file
    tensors = {key: x.contiguous() for key, x in synset._asdict().items() if x is not None}
    save_file(tensors, folder / "set.safetensors", {"meta": json.dumps(meta, sort_keys=True)})
    return "set.safetensors"


LAYOUTS = {
    "dc": write_dc,
    "mtt": functools.partial(write_tensor_files, suffix="_best"),
    "ddranking": functools.partial(write_tensor_files, suffix=""),
    "folder": write_folder,
    "safetensors": write_safetensors,
}


def images_per_class(synset):
    return max(1, len(synset.labels) // (int(synset.labels.max()) + 1))


CARD = """\
---
license: other
task_categories:
- image-classification
tags:
- dataset-distillation
- adversarial-robustness
size_categories:
- {size_category}
---

# {meta[method]} of {meta[dataset]}

{count} images of {shape}, {ipc} a class{packing}. Made from {meta[dataset]}, whose terms apply to \
the images.

| what | value |
|---|---|
| normalisation | {normalisation} |
| labels | {labels} |
| training | SGD, momentum 0.9, weight decay 5e-4, {epochs} epochs, batch {config.batch_train}, \
learning rate {config.lr_net} ({config.lr_schedule}), augmentation {config.dsa_strategy} |
{loss}| threat model of the labels | {threat_model} |

{teachers}To train on it, with the project's folder on the path:

```python
from networks import get_network
from synsets import load_synset
from utils import train_on_set

images, labels, config = load_synset("{name}")
net = get_network("{meta[model]}", {shape[0]}, {num_classes}, {size}, seed=0)
train_on_set(net, images, labels, config)
```

`python evaluate.py --synset {name}` does that and attacks the networks.
"""
SOFT_LOSS = ("| loss | cross-entropy of softmax(soft label / {t:g}) and softmax(logits / {t:g}), "
             "times {square:g} |\n")
WHITENING = "ZCA whitening of the pixels in [0, 1] (eps 0.1), fitted on the training images"
TEACHER_COLUMNS = {
    "clean_acc": "clean",
    "robust_2_acc": "PGD-20 2/255",
    "robust_4_acc": "PGD-20 4/255",
    "robust_acc": "PGD 8/255",
    "aa_acc": "AutoAttack 8/255",
    "running_acc": "on its training batches",
}


def card(synset, meta, name):
    """The data set card, as Markdown. name: what `load_synset` reads in its folder."""
    config, shape = TrainConfig.from_meta(meta), tuple(synset.images.shape[1:])
    count = len(synset.labels)
    labels, loss, num_classes = "classes", "", int(synset.labels.max()) + 1
    if synset.soft_labels is not None:
        labels, num_classes = "classes, and soft labels: logits", synset.soft_labels.shape[1]
        loss = SOFT_LOSS.format(t=config.temperature, square=config.temperature**2)
    normalisation = WHITENING if meta["zca"] else f"mean {meta['mean']}, std {meta['std']}"
    packing, pack, stored_pack = "", meta["pack"], meta["stored_pack"]
    if pack > 1:
        packing = f", each of {pack}x{pack} sub-images (`load_synset` below cuts them out)"
    elif stored_pack > 1:
        packing = f", stored as {meta['stored']} images of {stored_pack}x{stored_pack} sub-images"
    return CARD.format(
        name=name, meta=meta, config=config, epochs=config.epochs + 1, count=count,
        size_category="n<1K" if count < 1000 else "1K<n<10K", shape=shape, size=shape[1:],
        ipc=images_per_class(synset), packing=packing, normalisation=normalisation, labels=labels,
        loss=loss, threat_model=meta.get("threat_model", "unknown"), num_classes=num_classes,
        teachers=teacher_table(meta))


def teacher_table(meta):
    """The networks that gave the soft labels, each once, and their accuracies; "" if unknown."""
    recorded = itertools.chain(*meta.get("recipe", {}).get("teachers", []))
    teachers = {teacher["sha256"]: teacher for teacher in recorded}
    if not teachers:
        return ""
    keys = [key for key in TEACHER_COLUMNS if any(key in one for one in teachers.values())]
    lines = ["The networks that gave the soft labels (accuracy in percent):", "",
             "| network | SHA-256 | " + " | ".join(TEACHER_COLUMNS[key] for key in keys) + " |",
             "|---" * (2 + len(keys)) + "|"]
    for sha256, teacher in teachers.items():
        cells = [f"{100 * teacher[key]:.1f}" if key in teacher else "" for key in keys]
        lines.append(f"| {teacher['model']} | `{sha256[:16]}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n\n"


def complete_meta(given, args):
    """The meta of an Input, with its data set, normalisation, method and network filled in."""
    meta, zca = given.synset.meta, given.synset.declared_zca()
    dataset = given.dataset or given.unknown.get("dataset")
    if args.dataset:
        dataset = dataset_name(args.dataset)
    if dataset is None:
        raise InputError(f"the data set of {args.set} is unknown; give it with --dataset "
                         f"({', '.join(DATASETS)}, or the file of its data)")
    if given.dataset not in (None, dataset):
        raise InputError(f"{given} is not of {dataset}")
    zca = args.zca if zca is None else zca
    if zca:
        channels = given.synset.sets[0].images.shape[1]
        normalisation = {"mean": [0.0] * channels, "std": [1.0] * channels}
    elif {"mean", "std"} <= set(meta):
        normalisation = meta
    else:
        normalisation = DATASETS.get(dataset) or vars(load_dataset(args.dataset or dataset, "."))
    method = args.method or given.method.removesuffix(f"-{meta.get('threat_model')}")
    return {**meta, "mean": list(normalisation["mean"]), "std": list(normalisation["std"]),
            "dataset": dataset, "zca": zca, "method": method, "model": given.model or "ConvNet"}


def read_set(args):
    """The SynsetFile, its images normalised, and its meta, completed by the flags."""
    given = read_input(args.set, NETWORKS, is_set=True, packed=args.packed)
    given.unknown.pop("model", None)  # any network may train on the set
    file = given.synset
    if "mean" not in file.meta:
        take_flags(given, args.dataset)
    meta = complete_meta(given, args)
    if args.index >= len(file.sets):
        raise InputError(f"--index {args.index}: {args.set} has {len(file.sets)} set(s), from 0")
    if meta["zca"] and (file.sets[0].images.dtype == torch.uint8 or args.images == "pixels"):
        raise InputError(f"{args.set} holds pixels; --zca is for whitened images")
    mean, std = mean_and_std(meta)
    file.normalise(lambda pixels: (pixels - mean) / std, args.images, meta["zca"])
    description = file.describe(meta["dataset"], meta["mean"], meta["std"], meta["zca"])
    print(f"{args.set} taken as: {description}")
    for warning in given.warnings + file.warnings:
        print(f"warning: {warning}")
    return file, meta


def export(args, folder):
    """Write a set and its card into an empty folder. Returns (number of images, kind of labels)."""
    file, meta = read_set(args)
    images, labels, soft_labels = file.sets[args.index]
    stored, pack = len(labels), file.pack
    if args.hard and file.labels_from_soft:
        raise InputError(f"--hard: {args.set} has soft labels only, no classes of its own")
    if args.hard:
        soft_labels = None
    if not args.keep_packed:
        images, labels, pack = unpack(images, pack), labels.repeat(pack**2), 1
    meta |= {"packed": pack > 1, "pack": pack, "stored": stored, "stored_pack": file.pack,
             "exported_from": Path(args.set).name, "exported_sha256": file.sha256()}
    if "recipe" in meta:
        teachers = meta["recipe"].get("teachers", [])[args.index : args.index + 1]
        meta["recipe"] = {**meta["recipe"], "pack": pack, "teachers": teachers}
    meta["flags"] = {**meta.get("flags", {}), "method": meta["method"], "model": meta["model"]}
    synset = SyntheticSet(images, labels, soft_labels)
    name = LAYOUTS[args.to](folder, synset, meta)
    write_text(folder / "README.md", card(synset, meta, name))
    return len(labels), "hard" if soft_labels is None else "soft"


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
