"""A synthetic set in the layouts of the field, its sub-images unpacked, its soft labels with it.

    python export.py result/ROME_res_ROME_CIFAR10_ConvNet_10ipc.pt --to ddranking exported/

dc: res_*.pt, as DC, DSA, DM, IDM, BEARD and these scripts read it. mtt: images_best.pt,
labels_best.pt, lr_best.pt. ddranking: images.pt, labels.pt, lr.pt. folder: PNG files and
labels.csv. safetensors: set.safetensors. Each comes with a data set card, README.md, and, where the
layout has no place for it, meta.json: all of them are read back by evaluate.py. Source: SPEC 3.5.
Distributed under the MIT licence.
"""

import argparse
import csv
import io
import json
import os
import shutil
from pathlib import Path

import torch

from runtime.command_line import add_dataset_flag, add_switch, at_least, method_name, run_script
from datasets import DATASETS, dataset_name, load_dataset
from formats.inputs import read_input, take_flags
from runtime.safe_io import (
    InputError,
    write_atomically,
    write_json,
    write_tensors,
    write_text,
)
from formats.synset_file import PACKS, SPACES, SyntheticSet, mean_and_std, save_synset
from networks import NETWORKS
from synsets import protocol_of, training_set


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add(
        "set",
        metavar="SET",
        help="a synthetic set of these scripts or of others, a file or a folder",
    )
    add(
        "out",
        metavar="DIR",
        help="folder for the result; one that exists and is not empty is refused",
    )
    add("--to", choices=LAYOUTS, required=True)
    add("--index", type=at_least(0), default=0, help="which set of the file")
    add("--hard", action="store_true", help="leave the soft labels out")
    add(
        "--keep_packed",
        action="store_true",
        help="for dc, which can say how images are packed: leave them as they are stored",
    )

    said = parser.add_argument_group("what the file does not say itself (docs/foreign_files.md)")
    add = said.add_argument
    add_dataset_flag(said, None, "; default: what the file says")
    add("--method", type=method_name, help="default: what the file says, else its name")
    add(
        "--packed",
        type=int,
        choices=PACKS,
        default=1,
        metavar="K",
        help="it holds KxK sub-images in each image",
    )
    add(
        "--images",
        choices=SPACES,
        help="what its images are; default: bytes are pixels, floats normalised",
    )
    add_switch(said, "zca", False, "its images are ZCA-whitened")
    return parser.parse_args(argv)


# -------------------------------------------------------------------------------------- the layouts
# Each: (folder, SyntheticSet of unpacked images, its meta) -> what in the folder is read back.
def write_dc(folder, one, meta):
    name = "_".join(
        ["res", meta["method"], meta["dataset"], meta["model"], f"{_per_class(one)}ipc.pt"]
    )
    save_synset(folder / name, [one], [], meta)
    return name


def write_mtt(folder, one, meta):
    return _write_tensors(folder, one, meta, "_best")


def write_ddranking(folder, one, meta):
    return _write_tensors(folder, one, meta, "")


def _write_tensors(folder, one, meta, ending):
    images, labels = training_set(one, 1)
    rate = torch.tensor(float(protocol_of(meta)["lr_net"]))
    for name, part in (("images", images), ("labels", labels), ("lr", rate)):
        write_tensors(folder / f"{name}{ending}.pt", part)
    write_json(folder / "meta.json", meta)
    return f"images{ending}.pt"


def write_folder(folder, one, meta):
    """Pixels rounded to 1/255; labels.csv has the file, the label, the name of the class, and the
    soft label.
    """
    from PIL import Image

    pixels = (
        (_pixels(one.images, meta) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    )  # (M, H, W, C)
    (folder / "images").mkdir()
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    columns = 0 if one.soft_labels is None else one.soft_labels.shape[1]
    writer.writerow(["file", "label", "class", *(f"logit_{c}" for c in range(columns))])
    classes = meta.get("classes", [])
    for i, label in enumerate(one.labels.tolist()):
        name = f"images/{i:05d}.png"
        image = Image.fromarray(
            pixels[i].squeeze(2).numpy() if pixels.shape[3] == 1 else pixels[i].numpy()
        )
        write_atomically(folder / name, lambda partial: image.save(partial))  # noqa: B023
        soft = (
            []
            if one.soft_labels is None
            else [f"{value:.9g}" for value in one.soft_labels[i].tolist()]
        )
        writer.writerow([name, label, classes[label] if label < len(classes) else label, *soft])
    write_text(folder / "labels.csv", table.getvalue())
    write_json(folder / "meta.json", meta)
    return "."


def write_safetensors(folder, one, meta):
    """Tensors images, labels, soft_labels; meta as JSON in the header."""
    try:
        from safetensors.torch import save_file
    except ImportError:
        raise InputError(
            "--to safetensors needs the package safetensors (pip install safetensors)"
        ) from None
    tensors = {"images": one.images, "labels": one.labels}
    if one.soft_labels is not None:
        tensors["soft_labels"] = one.soft_labels
    write_atomically(
        folder / "set.safetensors",
        lambda partial: save_file(
            {key: value.contiguous() for key, value in tensors.items()},
            partial,
            {"meta": json.dumps(meta, sort_keys=True)},
        ),
    )
    return "set.safetensors"


LAYOUTS = {
    "dc": write_dc,
    "mtt": write_mtt,
    "ddranking": write_ddranking,
    "folder": write_folder,
    "safetensors": write_safetensors,
}


def _pixels(images, meta):
    """Normalised images -> pixels in [0, 1]."""
    if meta["zca"]:
        raise InputError("the set is ZCA-whitened: it has no pixels; choose another layout")
    mean, std = mean_and_std(meta)
    return (images * std + mean).clamp(0, 1)


def _per_class(one):
    return max(1, len(one.labels) // (int(one.labels.max()) + 1))


# ----------------------------------------------------------------------------------------- the card
CARD_KEYS = {
    "clean_acc": "clean",
    "robust_2_acc": "PGD-20 2/255",
    "robust_4_acc": "PGD-20 4/255",
    "robust_acc": "PGD 8/255",
    "aa_acc": "AutoAttack 8/255",
    "running_acc": "on its training batches",
}


def card(one, meta, name):
    """A data set card: what it is, how to train on it, which networks gave the labels, how robust
    they are, and where from.

    name: of the file in its folder that `sets.load_synset` reads; "." for the folder itself.
    """
    options = protocol_of(meta)
    normalisation = (
        "ZCA whitening of the pixels in [0, 1] (eps 0.1), fitted on the training images"
        if meta["zca"]
        else (f"mean {meta['mean']}, std {meta['std']}")
    )
    packed = ""
    if meta["pack"] > 1:
        packed = (
            f", each of {meta['pack']}x{meta['pack']} sub-images "
            "(`load_synset` below cuts them out)"
        )
    elif meta["stored_pack"] > 1:
        stored = f"{meta['stored_pack']}x{meta['stored_pack']} sub-images"
        packed = f", stored as {meta['stored']} images of {stored}"
    lines = [
        "---",
        "license: other",
        "task_categories:",
        "- image-classification",
        "tags:",
        "- dataset-distillation",
        "- adversarial-robustness",
        f"size_categories:\n- {'n<1K' if len(one.labels) < 1000 else '1K<n<10K'}",
        "---",
        "",
        f"# {meta['method']} of {meta['dataset']}",
        "",
        f"{len(one.labels)} images of {tuple(one.images.shape[1:])}, {_per_class(one)} a "
        f"class{packed}. Made from "
        f"{meta['dataset']}, whose terms apply to the images.",
        "",
        "| what | value |",
        "|---|---|",
        f"| normalisation | {normalisation} |",
        "| labels | "
        f"{'classes, and soft labels: logits' if one.soft_labels is not None else 'classes'} |",
        f"| training | SGD, momentum 0.9, weight decay 5e-4, {options['epochs'] + 1} epochs, batch "
        f"{options['batch_train']}, learning rate {options['lr_net']} ({options['lr_schedule']}), "
        f"augmentation {options['dsa_strategy']} |",
    ]
    if one.soft_labels is not None:
        t = options["temperature"]
        lines.append(
            f"| loss | cross-entropy of softmax(soft label / {t:g}) and softmax(logits / {t:g}), "
            f"times {t * t:g} |"
        )
    lines += [f"| threat model of the labels | {meta.get('threat_model', 'unknown')} |", ""]
    lines += _teachers(meta)
    classes = one.soft_labels.shape[1] if one.soft_labels is not None else int(one.labels.max()) + 1
    return "\n".join(
        [
            *lines,
            "To train on it, with the project's folder on the path:",
            "",
            "```python",
            "from networks import get_network",
            "from synsets import load_synset",
            "from utils import train_on_set",
            "",
            f'images, labels, recipe = load_synset("{name}")',
            f'net = get_network("{meta["model"]}", {one.images.shape[1]}, {classes}, '
            f"{tuple(one.images.shape[2:])}, "
            "seed=0)",
            "train_on_set(net, images, labels, **recipe)",
            "```",
            "",
            f"`python evaluate.py --synset {name}` does that and attacks the networks.",
            "",
        ]
    )


def _teachers(meta):
    """The table of the networks that gave the soft labels, as lines; none for none."""
    teachers = [
        teacher
        for experiment in meta.get("recipe", {}).get("teachers", [])
        for teacher in experiment
    ]
    if not teachers:
        return []
    keys = [key for key in CARD_KEYS if any(key in teacher for teacher in teachers)]
    lines = [
        "The networks that gave the soft labels (accuracy in percent):",
        "",
        "| network | SHA-256 | " + " | ".join(CARD_KEYS[key] for key in keys) + " |",
        "|---" * (2 + len(keys)) + "|",
    ]
    for digest, teacher in {teacher["sha256"]: teacher for teacher in teachers}.items():
        figures = " | ".join(f"{100 * teacher[key]:.1f}" if key in teacher else "" for key in keys)
        lines.append(f"| {teacher['model']} | `{digest[:16]}` | {figures} |")
    return [*lines, ""]


# --------------------------------------------------------------------------------------------- main
def meta_of(one, args):
    """What is known of a set, from its file, its name and the flags. one: an Input."""
    said, given = one.synset.meta, dataset_name(args.dataset) if args.dataset else None
    dataset = given or one.dataset or one.unknown.get("dataset")
    if dataset is None:
        raise InputError(
            f"nothing says of which data set {args.set} is; say it with --dataset "
            f"({', '.join(DATASETS)}, or the "
            "file of its data)"
        )
    if one.dataset not in (None, dataset):
        raise InputError(f"{one} is not of {dataset}")
    zca = bool(args.zca if one.synset.declared_zca() is None else one.synset.declared_zca())
    own = given not in (None, *DATASETS) and not {"mean", "std"} <= set(said)
    normalisation = vars(load_dataset(args.dataset, ".")) if own else DATASETS.get(dataset, {})
    channels = one.synset.sets[0].images.shape[1]
    constants = (
        {"mean": [0.0] * channels, "std": [1.0] * channels}
        if zca
        else {key: list(said.get(key, normalisation.get(key, []))) for key in ("mean", "std")}
    )
    if not all(constants.values()):
        raise InputError(
            f"{args.set} does not say its normalisation, and {dataset} is none of "
            f"{', '.join(DATASETS)}; give the "
            "file of its data as --dataset"
        )
    method = args.method or one.method.removesuffix(f"-{said.get('threat_model')}")
    return {
        **said,
        **constants,
        "dataset": dataset,
        "zca": zca,
        "method": method,
        "model": one.model or "ConvNet",
    }


def export(args, folder):
    """Write the set into an empty folder. Returns how many images, and the kind of their labels."""
    one = read_input(args.set, NETWORKS, is_set=True, packed=args.packed)
    one.unknown.pop("model", None)  # the set is trained on whatever the user likes
    if "mean" not in one.synset.meta:
        take_flags(one, args.dataset)
    meta, file = meta_of(one, args), one.synset
    if args.index >= len(file.sets):
        raise InputError(f"--index {args.index}: {args.set} has {len(file.sets)} set(s), from 0")
    mean, std = mean_and_std(meta)

    def normalize(pixels):
        if meta["zca"]:
            raise InputError(f"{args.set} holds pixels, which --zca says are whitened")
        return (pixels - mean) / std

    file.normalise(normalize, args.images, meta["zca"])
    print(
        f"{args.set} taken as: "
        f"{file.describe(meta['dataset'], meta['mean'], meta['std'], meta['zca'])}",
        *(f"warning: {warning}" for warning in one.warnings + file.warnings),
        sep="\n",
    )
    stored, kept = file.sets[args.index], file.pack if args.keep_packed else 1
    images = stored.images if args.keep_packed else training_set(stored, file.pack)[0]
    labels = stored.labels.repeat((file.pack // kept) ** 2)
    hard = args.hard or stored.soft_labels is None
    if args.hard and file.labels_from_soft:
        raise InputError(f"--hard: {args.set} has soft labels alone, no classes of its own")
    meta |= {
        "packed": kept > 1,
        "pack": kept,
        "stored": len(stored.labels),
        "stored_pack": file.pack,
        "exported_from": Path(args.set).name,
        "exported_sha256": file.sha256(),
    }
    if "recipe" in meta:
        experiment = meta["recipe"].get("teachers", [])[args.index : args.index + 1]
        meta["recipe"] = {**meta["recipe"], "pack": kept, "teachers": experiment}
    flags = meta.get("flags", {})
    meta["flags"] = {**flags, "method": meta["method"], "model": meta["model"]}
    exported = SyntheticSet(images, labels, None if hard else stored.soft_labels)
    name = LAYOUTS[args.to](folder, exported, meta)
    write_text(folder / "README.md", card(exported, meta, name))
    return len(labels), "hard" if hard else "soft"


def main():
    args = parse_args()
    if args.keep_packed and args.to != "dc":
        raise InputError(
            f"--keep_packed: {args.to} cannot say that images are packed; choose --to dc"
        )
    folder = Path(args.out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists and is not empty; choose another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".partial-{os.getpid()}-{folder.name}")
    partial.mkdir()
    try:
        count, kind = export(args, partial)
        if folder.exists():
            folder.rmdir()
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"{args.to}: {count} images, {kind} labels, in {folder}")


if __name__ == "__main__":
    run_script(main)
