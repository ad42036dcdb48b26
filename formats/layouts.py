"""The layouts in which the field stores synthetic sets: what stands where. What it means is
formats.synset_file' work.

| layout | from |
|---|---|
| `.pt`, a dict with `data`: [[images, labels], ...] | DC, DSA, DM, IDM, BEARD |
| the same with `soft_labels` and `meta` | ours |
| `.pkl`, a pair (images, labels) | IDM, BACON, ROME |
| `images*.pt` beside `labels*.pt`, perhaps `lr*.pt` | MTT, DATM, DD-Ranking |
| `set.safetensors` | `export.py --to safetensors` |
| a folder of pictures with `labels.csv` | `export.py --to folder` |
| a folder of pictures for each class | SRe2L, RDED |
| a folder that holds one of the first four | |

`meta.json` beside images, as export.py writes it, is the meta of those layouts that have no place
for it.
"""

import csv
import json
import re
from pathlib import Path

import numpy as np
import torch

from formats.arrays import read_class_folders, read_pictures
from runtime.safe_io import MAX_BYTES, InputError, keys_of, read_tensors

LAYOUT_NAMES = (
    "the DC layout, a pair (images, labels), images*.pt beside labels*.pt, .safetensors, and a "
    "folder of any of these or of pictures"
)


def read_layout(path):
    """What a file or folder of synthetic sets holds.

    Returns (sets, meta, files, notes): sets, [(images, labels, soft labels or None), ...], tensors
    or arrays as they are stored; meta, a dict; files, the paths that were read; notes, sentences on
    what was found beside the images. Raises InputError for what is none of the layouts above.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    content = read_tensors(path)
    if isinstance(content, dict):
        return *_read_dict(path, content), [path], []
    if isinstance(content, (torch.Tensor, np.ndarray)) and path.name.startswith("images"):
        return _read_pair_of_files(path, content)
    if isinstance(content, (tuple, list)) and len(content) == 2:
        return [_pair(f"{path}, set 0", content)], {}, [path], []
    raise InputError(
        f"{path} holds a {type(content).__name__}, no synthetic set; known are {LAYOUT_NAMES}"
    )


def _pair(name, one, soft=None):
    """(images, labels, soft labels) of one set, each a tensor or an array."""
    parts = [*one, *([] if soft is None else [soft])] if isinstance(one, (list, tuple)) else [one]
    if len(parts) != 2 + (soft is not None) or not all(
        isinstance(part, (torch.Tensor, np.ndarray)) for part in parts
    ):
        held = " and ".join(type(part).__name__ for part in parts)
        raise InputError(f"{name} is no pair of images and labels (it holds {held})")
    return parts[0], parts[1], soft


def _read_dict(path, content):
    """The DC layout: (sets, meta)."""
    meta, sets, soft = content.get("meta", {}), content.get("data"), content.get("soft_labels")
    if not isinstance(sets, (list, tuple)) or not sets or not isinstance(meta, dict):
        raise InputError(
            f"{path} is a dict without a list 'data' of [images, labels]; its keys are "
            f"{keys_of(content)}"
        )
    if soft is not None and (not isinstance(soft, (list, tuple)) or len(soft) != len(sets)):
        raise InputError(
            f"{path}: soft_labels is no list with an entry for each of the {len(sets)} sets"
        )
    return [_pair(f"{path}, set {i}", one, soft and soft[i]) for i, one in enumerate(sets)], meta


def _read_pair_of_files(path, images):
    """images*.pt: its labels, its learning rate and what export.py says of it lie beside it."""
    ending = path.name.removeprefix("images")
    labels = path.with_name(f"labels{ending}")
    one = _pair(f"{path}, set 0", (images, read_tensors(labels)))
    meta, files, notes = _meta_beside(path.parent)
    files = [path, labels, *files]
    rate = next(
        (lr for lr in (path.with_name(f"lr{ending}"), path.with_name("lr.pt")) if lr.is_file()),
        None,
    )
    if rate:
        value = read_tensors(rate)
        try:
            value = float(f"{float(value):.7g}")  # a float32 of 0.03 is no 0.0299999993
        except (TypeError, ValueError, RuntimeError):
            value = -1.0
        if not 0 < value < float("inf"):
            raise InputError(f"{rate} is no learning rate; expected one number above 0")
        meta = {**meta, "recipe": {**meta.get("recipe", {}), "lr_net": value}}
        files, notes = [*files, rate], [*notes, f"lr {value:g} from {rate.name}"]
    return [one], meta, files, notes


def _meta_beside(folder):
    """meta.json of a folder: (meta, [its path], notes)."""
    path = folder / "meta.json"
    if not path.is_file():
        return {}, [], []
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(meta, dict) or not isinstance(meta.get("recipe", {}), dict):
            raise ValueError("no object, or its recipe is none")
    except ValueError as error:
        raise InputError(f"{path} is damaged or no meta of a set ({error})") from None
    return meta, [path], ["recipe from meta.json"] if "recipe" in meta else []


def _read_safetensors(path):
    """Tensors images, labels and perhaps soft_labels, meta as JSON in the header."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise InputError(
            f"{path}: .safetensors needs the package safetensors (pip install safetensors)"
        ) from None
    try:
        if path.stat().st_size > MAX_BYTES:
            raise InputError(f"{path}: more than {MAX_BYTES >> 30} GiB is refused")
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            meta = json.loads((file.metadata() or {}).get("meta", "{}"))
    except (OSError, ValueError, SafetensorError) as error:
        raise (
            error if isinstance(error, InputError) else InputError(f"{path} is damaged ({error})")
        ) from None
    if not {"images", "labels"} <= set(tensors) or not isinstance(meta, dict):
        raise InputError(f"{path} has the tensors {keys_of(tensors)}; expected images and labels")
    return [(tensors["images"], tensors["labels"], tensors.get("soft_labels"))], meta, [path], []


# ------------------------------------------------------------------------------------------ folders
def _read_folder(folder):
    """A folder that holds one set in another layout, or pictures."""
    if (folder / "labels.csv").is_file():
        return _read_listed_pictures(folder)
    found = [
        folder / "set.safetensors",
        *sorted(folder.glob("images*.pt")),
        *sorted(folder.glob("*res_*.pt")),
    ]
    found = [path for path in found if path.is_file()]
    if len(found) > 1:
        raise InputError(
            f"{folder} holds several sets: {', '.join(path.name for path in found)}; name one of "
            "them"
        )
    if found:
        return read_layout(found[0])
    images, labels, classes = read_class_folders(folder)
    meta, files, notes = _meta_beside(folder)
    numbers = [re.fullmatch(r"\D*(\d+)", name) for name in classes]
    if all(numbers):  # 0, 1, ..., 10, or new000: by number, not as text
        numbers = [int(match[1]) for match in numbers]
        labels = np.array(numbers)[labels]
        notes.append("classes by the numbers of their folders")
    else:
        meta = {"classes": classes, **meta}
        notes.append(f"classes by the names of their folders, {', '.join(classes[:3])} ...")
    images = torch.from_numpy(images).permute(0, 3, 1, 2)
    files += [path for path in sorted(folder.rglob("*")) if path.is_file() and path not in files]
    return (
        [(images, torch.from_numpy(labels), None)],
        meta,
        files,
        [f"{len(images)} pictures", *notes],
    )


def _read_listed_pictures(folder):
    """Pictures that labels.csv names, with their labels and perhaps soft ones."""
    table = folder / "labels.csv"
    try:
        with open(table, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        paths = [folder / row["file"] for row in rows]
        labels = torch.tensor([int(row["label"]) for row in rows])
        columns = [name for name in (rows[0] if rows else {}) if name and name.startswith("logit_")]
        soft = (
            torch.tensor([[float(row[name]) for name in columns] for row in rows])
            if columns
            else None
        )
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        raise InputError(
            f"{table} is damaged or no list of pictures ({type(error).__name__}: {error}); "
            "expected the columns file, label, and perhaps logit_0 ..."
        ) from None
    inside = folder.resolve()
    for path in paths:
        if not path.resolve().is_relative_to(inside) or not path.is_file():
            raise InputError(
                f"{table} names {path.relative_to(folder)}, which is no file in {folder}"
            )
    if not paths:
        raise InputError(f"{table} names no picture")
    meta, files, notes = _meta_beside(folder)
    images = torch.from_numpy(read_pictures(paths)).permute(0, 3, 1, 2)
    return (
        [(images, labels, soft)],
        meta,
        [table, *files, *paths],
        [f"{len(paths)} pictures", *notes],
    )
