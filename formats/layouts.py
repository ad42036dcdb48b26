"""The layouts in which the field stores synthetic sets (docs/foreign_files.md has the table).

Each reader returns (sets, meta, files, notes): [(images, labels, soft labels or None), ...] as
stored, perhaps each with labellers; a dict, what the file declares; the paths that were read;
sentences on what was found.
"""

import csv
import json
import re
from pathlib import Path

import numpy as np
import torch

from formats.arrays import read_class_folders, read_pictures
from runtime.safe_io import InputError, keys_of, read_safetensors, read_tensors


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
        return [(*content, None)], {}, [path], []
    raise InputError(f"{path} holds a {type(content).__name__}, no synthetic set in a layout of "
                     "docs/foreign_files.md")


def _read_dict(path, content):
    """The DC layout: data, and of these scripts soft_labels, labellers and meta."""
    meta, pairs = content.get("meta", {}), content.get("data")
    if not isinstance(pairs, (list, tuple)) or not pairs or not isinstance(meta, dict):
        keys = keys_of(content)
        raise InputError(f"{path}: a dict without a list 'data' of [images, labels], but {keys}")
    soft = content.get("soft_labels")
    soft = [None] * len(pairs) if soft is None else soft
    labellers = content.get("labellers", [[]] * len(pairs))
    try:
        sets = [(*pair, *more) for pair, *more in zip(pairs, soft, labellers, strict=True)]
    except (TypeError, ValueError):
        raise InputError(f"{path}: data, soft_labels or labellers is no list of all sets") from None
    return sets, meta, [path], []


def _read_safetensors(path):
    """Tensors images, labels and perhaps soft_labels; the meta as JSON in the header. Parameters
    of labeller i are labellers.<i>.<name>; its architecture is number i of the meta's labellers."""
    tensors, header = read_safetensors(path)
    meta = _meta_from_json(path, header.get("meta", "{}"))
    if not {"images", "labels"} <= set(tensors):
        raise InputError(f"{path} has the tensors {keys_of(tensors)}; expected images and labels")
    labellers = []
    for i, model in enumerate(meta.get("labellers", [])):
        prefix = f"labellers.{i}."
        state = {key.removeprefix(prefix): value for key, value in tensors.items()
                 if key.startswith(prefix)}
        labellers.append({"model": model, "state": state})
    one = tensors["images"], tensors["labels"], tensors.get("soft_labels"), labellers
    return [one], meta, [path], []


def _read_pair_of_files(path, images):
    """images*.pt, with labels*.pt, perhaps lr*.pt (or lr.pt) and meta.json beside it."""
    labels, rate = (path.with_name(path.name.replace("images", x, 1)) for x in ("labels", "lr"))
    sets = [(images, read_tensors(labels), None)]
    meta, files = _read_meta_json(path.parent)
    files = [path, labels, *files]
    rate = rate if rate.is_file() else path.with_name("lr.pt")
    if rate.is_file():
        try:
            lr_net = float(f"{float(read_tensors(rate)):.7g}")  # 0.03 in float32 is 0.0299999993
        except (TypeError, ValueError, RuntimeError):
            lr_net = -1.0
        if not 0 < lr_net < float("inf"):
            raise InputError(f"{rate} is no learning rate; expected one number above 0")
        meta["recipe"] = {**meta.get("recipe", {}), "lr_net": lr_net}
        files.append(rate)
    return sets, meta, files, []


def _read_meta_json(folder):
    """meta.json, which export.py writes beside images: (meta, [its path])."""
    path = folder / "meta.json"
    if not path.is_file():
        return {}, []
    return _meta_from_json(path, path.read_bytes()), [path]


def _meta_from_json(path, text):
    try:
        meta = json.loads(text)
        {**meta, **meta.get("recipe", {})}  # raises an error unless both are dicts
    except (AttributeError, TypeError, ValueError) as error:
        raise InputError(f"{path} is damaged or no meta of a set ({error})") from None
    return meta


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
    meta, files = _read_meta_json(folder)
    numbers = [re.fullmatch(r"\D*(\d+)", name) for name in classes]
    if all(numbers):
        labels = np.array([int(number[1]) for number in numbers])[labels]
        note = "classes by the numbers of their folders"
    else:
        meta = {"classes": classes, **meta}
        note = f"classes by the names of their folders, {', '.join(classes[:3])} ..."
    files += [path for path in sorted(folder.rglob("*")) if path.is_file() and path not in files]
    sets = [(torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(labels), None)]
    return sets, meta, files, [f"{len(images)} pictures", note]


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
        raise InputError(f"{table} is damaged or no list of pictures, file,label[,logit_0, ...] "
                         f"({type(error).__name__}: {error})") from None
    for path in paths:
        if not path.resolve().is_relative_to(folder.resolve()) or not path.is_file():
            raise InputError(f"{table} names {path}, which is no file in {folder}")
    meta, files = _read_meta_json(folder)
    images = torch.from_numpy(read_pictures(paths)).permute(0, 3, 1, 2)
    sets = [(images, labels, soft if logits else None)]
    return sets, meta, [table, *files, *paths], [f"{len(paths)} pictures"]
