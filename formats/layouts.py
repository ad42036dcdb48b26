"""The layouts in which the field stores synthetic sets (docs/foreign_files.md has the table).

Each reader returns (sets, meta, files, notes): [((images, labels), soft labels or None), ...] as
they are stored; a dict, what the file declares; the paths that were read; sentences on what was
found beside the images.
"""

import csv
import json
import re
from pathlib import Path

import numpy as np
import torch

from formats.arrays import read_class_folders, read_pictures
from runtime.safe_io import MAX_BYTES, InputError, keys_of, read_tensors

KNOWN_LAYOUTS = (
    "known are the DC layout, a pair (images, labels), images*.pt beside labels*.pt, .safetensors, "
    "and a folder of any of these or of pictures"
)


def read_layout(path):
    """Read a file or folder of synthetic sets in any layout. Raises InputError."""
    path = Path(path)
    if path.is_dir():
        return _read_folder(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    content = read_tensors(path)
    if isinstance(content, dict):
        return _read_dict(path, content)
    if isinstance(content, (torch.Tensor, np.ndarray)) and path.name.startswith("images"):
        return _read_pair_of_files(path, content)
    if isinstance(content, (tuple, list)) and len(content) == 2:
        return [(content, None)], {}, [path], []
    raise InputError(f"{path} holds a {type(content).__name__}, no synthetic set; {KNOWN_LAYOUTS}")


def _read_dict(path, content):
    """The DC layout: data, and of these scripts soft_labels and meta."""
    meta, sets = content.get("meta", {}), content.get("data")
    if not isinstance(sets, (list, tuple)) or not sets or not isinstance(meta, dict):
        keys = keys_of(content)
        raise InputError(f"{path}: a dict without a list 'data' of [images, labels], but {keys}")
    soft = content.get("soft_labels")
    soft = [None] * len(sets) if soft is None else soft
    if not isinstance(soft, (list, tuple)) or len(soft) != len(sets):
        raise InputError(f"{path}: soft_labels is no list of {len(sets)} entries, one for each set")
    return list(zip(sets, soft)), meta, [path], []


def _read_pair_of_files(path, images):
    """images*.pt, with labels*.pt, perhaps lr*.pt (or lr.pt) and meta.json beside it."""
    labels, rate = (path.with_name(path.name.replace("images", x, 1)) for x in ("labels", "lr"))
    sets = [((images, read_tensors(labels)), None)]
    meta, files, notes = _read_meta_json(path.parent)
    files = [path, labels, *files]
    rate = rate if rate.is_file() else path.with_name("lr.pt")
    if rate.is_file():
        lr_net = _read_learning_rate(rate)
        meta["recipe"] = {**meta.get("recipe", {}), "lr_net": lr_net}
        files.append(rate)
        notes.append(f"lr {lr_net:g} from {rate.name}")
    return sets, meta, files, notes


def _read_learning_rate(path):
    try:
        value = float(f"{float(read_tensors(path)):.7g}")  # 0.03 in float32 is 0.0299999993
    except (TypeError, ValueError, RuntimeError):
        value = -1.0
    if not 0 < value < float("inf"):
        raise InputError(f"{path} is no learning rate; expected one number above 0")
    return value


def _read_meta_json(folder):
    """meta.json, which export.py writes beside images: (meta, [its path], notes)."""
    path = folder / "meta.json"
    if not path.is_file():
        return {}, [], []
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        {**meta.get("recipe", {})}  # raises an error if it is no dict
    except (AttributeError, TypeError, ValueError) as error:
        raise InputError(f"{path} is damaged or no meta of a set ({error})") from None
    return meta, [path], ["recipe from meta.json"] if "recipe" in meta else []


def _read_safetensors(path):
    """Tensors images, labels and perhaps soft_labels; the meta as JSON in the header."""
    from safetensors import SafetensorError, safe_open

    if path.is_file() and path.stat().st_size > MAX_BYTES:
        raise InputError(f"{path}: more than {MAX_BYTES >> 30} GiB is refused")
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            meta = json.loads((file.metadata() or {}).get("meta", "{}"))
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"{path} is damaged ({error})") from None
    if not {"images", "labels"} <= set(tensors) or not isinstance(meta, dict):
        raise InputError(f"{path} has the tensors {keys_of(tensors)}; expected images and labels")
    pair = tensors["images"], tensors["labels"]
    return [(pair, tensors.get("soft_labels"))], meta, [path], []


# ------------------------------------------------------------------------------------------ folders
def _read_folder(folder):
    """A folder that holds one set in another layout, or pictures."""
    if (folder / "labels.csv").is_file():
        return _read_listed_pictures(folder)
    patterns = ("set.safetensors", "images*.pt", "*res_*.pt")
    found = [path for x in patterns for path in sorted(folder.glob(x)) if path.is_file()]
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise InputError(f"{folder} holds several sets: {names}; name one of them")
    return read_layout(found[0]) if found else _read_class_folders(folder)


def _read_class_folders(folder):
    """A folder of pictures for each class, named by its class or a number (0, 10, new003)."""
    images, labels, classes = read_class_folders(folder)
    meta, files, notes = _read_meta_json(folder)
    numbers = [re.fullmatch(r"\D*(\d+)", name) for name in classes]
    if all(numbers):
        labels = np.array([int(number[1]) for number in numbers])[labels]
        notes.append("classes by the numbers of their folders")
    else:
        meta = {"classes": classes, **meta}
        notes.append(f"classes by the names of their folders, {', '.join(classes[:3])} ...")
    files += [path for path in sorted(folder.rglob("*")) if path.is_file() and path not in files]
    pair = torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(labels)
    return [(pair, None)], meta, files, [f"{len(images)} pictures", *notes]


def _read_listed_pictures(folder):
    """Pictures that labels.csv lists, with their labels and perhaps soft ones."""
    table = folder / "labels.csv"
    try:
        with open(table, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        paths = [folder / row["file"] for row in rows]
        labels = torch.tensor([int(row["label"]) for row in rows])
        logits = [key for key in rows[0] if key and key.startswith("logit_")]
        soft = torch.tensor([[float(row[key]) for key in logits] for row in rows])
    except (ValueError, LookupError, TypeError, csv.Error) as error:
        raise InputError(
            f"{table} is damaged or no list of pictures ({type(error).__name__}: {error}); "
            "expected the columns file, label, and perhaps logit_0 ..."
        ) from None
    for path in paths:
        if not path.resolve().is_relative_to(folder.resolve()) or not path.is_file():
            raise InputError(f"{table} names {path}, which is no file in {folder}")
    meta, files, notes = _read_meta_json(folder)
    pair = torch.from_numpy(read_pictures(paths)).permute(0, 3, 1, 2), labels
    notes = [f"{len(paths)} pictures", *notes]
    return [(pair, soft if logits else None)], meta, [table, *files, *paths], notes
