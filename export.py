"""A synthetic set in the layouts of the field, its sub-images unpacked, its soft labels with it.

    python export.py result/ROME_res_ROME_CIFAR10_ConvNet_10ipc.pt --to ddranking exported/

dc: res_*.pt, as DC, DSA, DM, IDM, BEARD and these scripts read it. mtt: images_best.pt, labels_best.pt. ddranking: images.pt,
labels.pt, lr.pt. folder: PNG files and labels.csv. safetensors: set.safetensors. dc and safetensors come with a data set card,
README.md, for a hub. Source: SPEC 3.5. Distributed under the MIT licence.
"""
import argparse
import csv
import io
import json
from pathlib import Path

import torch

from augment import PACKS
from engine.command_line import at_least, run_script
from engine.formats import SyntheticSet, pack_of, read_synset, save_synset
from engine.safe_files import InputError, sha256, write_atomically, write_tensors, write_text
from sets import protocol_of, training_set


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("set", metavar="SET", help="a synthetic set of these scripts or of others")
    add("out", metavar="DIR", help="folder for the result; one that exists and is not empty is refused")
    add("--to", choices=LAYOUTS, required=True)
    add("--index", type=at_least(0), default=0, help="which set of the file")
    add("--packed", type=int, choices=PACKS, default=1, metavar="K",
        help="a file that does not say so holds KxK sub-images in each image")
    add("--hard", action="store_true", help="leave the soft labels out")
    add("--keep_packed", action="store_true", help="for dc, which can say how images are packed: leave them as they are stored")
    return parser.parse_args(argv)


# ------------------------------------------------------------------------------------------------------------ the layouts
# Each: (folder, SyntheticSet of unpacked images, its meta).
def write_dc(folder, one, meta):
    name = "_".join(["res", meta.get("flags", {}).get("method", "ROME"), meta.get("dataset", "unknown"),
                     meta.get("flags", {}).get("model", "ConvNet"), f"{_per_class(one)}ipc.pt"])
    save_synset(folder / name, [one], [], meta)
    reading = f'images, labels = torch.load("{name}", weights_only=True)["data"][0]'
    training = f"`python evaluate.py --synset {name}` of the project trains on it as said above and attacks the networks."
    write_text(folder / "README.md", card(one, meta, reading) + training + "\n")


def write_mtt(folder, one, meta):
    for name, part in zip(("images_best.pt", "labels_best.pt"), training_set(one, 1)):
        write_tensors(folder / name, part)


def write_ddranking(folder, one, meta):
    for name, part in zip(("images.pt", "labels.pt"), training_set(one, 1)):
        write_tensors(folder / name, part)
    write_tensors(folder / "lr.pt", torch.tensor(float(protocol_of(meta)["lr_net"])))


def write_folder(folder, one, meta):
    """Pixels rounded to 1/255; labels.csv has the file, the label, the name of the class, and the soft label."""
    from PIL import Image
    (folder / "images").mkdir()
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    columns = 0 if one.soft_labels is None else one.soft_labels.shape[1]
    writer.writerow(["file", "label", "class", *(f"logit_{c}" for c in range(columns))])
    pixels = (_pixels(one.images, meta) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)  # (M, H, W, C)
    classes = meta.get("classes", [])
    for i, label in enumerate(one.labels.tolist()):
        name = f"images/{i:05d}.png"
        image = Image.fromarray(pixels[i].numpy())
        write_atomically(folder / name, lambda partial: image.save(partial))  # noqa: B023
        soft = [] if one.soft_labels is None else [f"{value:.9g}" for value in one.soft_labels[i].tolist()]
        writer.writerow([name, label, classes[label] if label < len(classes) else label, *soft])
    write_text(folder / "labels.csv", table.getvalue())


def write_safetensors(folder, one, meta):
    """Tensors images, labels, soft_labels; meta as JSON in the header; README.md is the card."""
    try:
        from safetensors.torch import save_file
    except ImportError:
        raise InputError("--to safetensors needs the package safetensors (pip install safetensors)") from None
    tensors = {"images": one.images, "labels": one.labels}
    if one.soft_labels is not None:
        tensors["soft_labels"] = one.soft_labels
    write_atomically(folder / "set.safetensors", lambda partial: save_file(
        {key: value.contiguous() for key, value in tensors.items()}, partial, {"meta": json.dumps(meta, sort_keys=True)}))
    reading = f'tensors = safetensors.torch.load_file("set.safetensors")  # {", ".join(tensors)}'
    write_text(folder / "README.md", card(one, meta, reading))


LAYOUTS = {"dc": write_dc, "mtt": write_mtt, "ddranking": write_ddranking, "folder": write_folder,
           "safetensors": write_safetensors}


def _pixels(images, meta):
    """Normalised images -> pixels in [0, 1]. Raises InputError if the file does not say how it is normalised."""
    if meta.get("zca") or not {"mean", "std"} <= set(meta):
        raise InputError("the set is ZCA-whitened, or does not say its normalisation: it has no pixels; choose another layout")
    mean, std = (torch.tensor(meta[key]).view(1, -1, 1, 1) for key in ("mean", "std"))
    return (images * std + mean).clamp(0, 1)


def _per_class(one):
    return len(one.labels) // (int(one.labels.max()) + 1)


# ---------------------------------------------------------------------------------------------------------------- the card
def card(one, meta, reading):
    """A data set card: what it is, how to train on it, which networks gave the labels, how robust they are, and where from.

    reading: a line of Python that reads the file.
    """
    recipe, options = meta.get("recipe", {}), protocol_of(meta)
    teachers = [teacher for experiment in recipe.get("teachers", []) for teacher in experiment]
    soft = one.soft_labels is not None
    source = f"{meta.get('dataset', 'an unknown data set')}"
    lines = ["---", "license: other", "task_categories:", "- image-classification", "tags:", "- dataset-distillation",
             "- adversarial-robustness", f"size_categories:\n- {'n<1K' if len(one.labels) < 1000 else '1K<n<10K'}", "---", "",
             f"# {meta.get('flags', {}).get('method', 'A synthetic set')} of {source}", "",
             f"{len(one.labels)} images of {tuple(one.images.shape[1:])}, {_per_class(one)} a class"
             + (f", each of {meta['pack']}x{meta['pack']} sub-images (`augment.unpack` of the project cuts them out)"
                if meta["pack"] > 1 else f", stored as {meta['stored']} images of {meta['stored_pack']}x{meta['stored_pack']} "
                "sub-images" if meta["stored_pack"] > 1 else "")
             + f". Made from {source}, whose terms apply to the images.", "",
             "| what | value |", "|---|---|",
             f"| normalisation | mean {meta.get('mean', 'unknown')}, std {meta.get('std', 'unknown')} |",
             f"| labels | {'`labels`, and `soft_labels`: logits' if soft else '`labels`'} |",
             f"| training | SGD, momentum 0.9, weight decay 5e-4, {options['epochs'] + 1} epochs, batch "
             f"{options['batch_train']}, learning rate {options['lr_net']} ({options['lr_schedule']}), augmentation "
             f"{options['dsa_strategy']} |"]
    if soft:
        t = options["temperature"]
        lines.append(f"| loss | cross-entropy of softmax(soft label / {t:g}) and softmax(logits / {t:g}), times {t * t:g} |")
    lines += [f"| threat model of the labels | {meta.get('threat_model', 'unknown')} |", ""]
    if teachers:
        keys = [key for key in ("clean_acc", "robust_2_acc", "robust_4_acc", "robust_acc", "aa_acc", "running_acc")
                if any(key in teacher for teacher in teachers)]
        names = {"clean_acc": "clean", "robust_2_acc": "PGD-20 2/255", "robust_4_acc": "PGD-20 4/255",
                 "robust_acc": "PGD 8/255", "aa_acc": "AutoAttack 8/255", "running_acc": "on its training batches"}
        lines += ["The networks that gave the soft labels (accuracy in percent):", "",
                  "| network | SHA-256 | " + " | ".join(names[key] for key in keys) + " |", "|---" * (2 + len(keys)) + "|"]
        unique = {teacher["sha256"]: teacher for teacher in teachers}
        lines += [f"| {teacher['model']} | `{digest[:16]}` | " + " | ".join(
            f"{100 * teacher[key]:.1f}" if key in teacher else "" for key in keys) + " |" for digest, teacher in unique.items()]
        lines.append("")
    return "\n".join([*lines, "```python", reading, "```", ""])


# -------------------------------------------------------------------------------------------------------------------- main
def main():
    args = parse_args()
    sets, meta = read_synset(args.set, args.packed)
    if args.index >= len(sets):
        raise InputError(f"--index {args.index}: {args.set} has {len(sets)} set(s), from 0")
    one, pack = sets[args.index], pack_of(meta, args.packed)
    if args.keep_packed and args.to != "dc":
        raise InputError(f"--keep_packed: {args.to} cannot say that images are packed; choose --to dc")
    kept = pack if args.keep_packed else 1
    images = one.images if args.keep_packed else training_set(one, pack)[0]
    meta = {**meta, "packed": kept > 1, "pack": kept, "stored": len(one.labels), "stored_pack": pack,
            "exported_from": Path(args.set).name, "exported_sha256": sha256(args.set)}
    one = SyntheticSet(images, one.labels.repeat((pack // kept)**2), None if args.hard else one.soft_labels)
    if "recipe" in meta:
        experiment = meta["recipe"].get("teachers", [])[args.index:args.index + 1]
        meta["recipe"] = {**meta["recipe"], "pack": kept, "teachers": experiment}
    folder = Path(args.out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists and is not empty; choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    LAYOUTS[args.to](folder, one, meta)
    print(f"{args.to}: {len(one.labels)} images, {'soft' if one.soft_labels is not None else 'hard'} labels, in {folder}")


if __name__ == "__main__":
    run_script(main)
