"""Files of synthetic sets and of networks, in the layouts of the field. What is read is checked. Source: SPEC 3.5."""
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from engine.results import by_model
from engine.safe_files import InputError, read_tensors, reason, write_tensors


# --------------------------------------------------------------------------------------------------------- synthetic sets
class SyntheticSet(NamedTuple):
    """One synthetic set. The `pack`*`pack` sub-images of each stored image are what a network trains on.

    images: (N, C, H, W) float32, normalised. labels: (N,) int64. soft_labels: (N*pack*pack, classes) float32 logits, one row
    for each training image in the order of `augment.unpack`, or None.
    """

    images: torch.Tensor
    labels: torch.Tensor
    soft_labels: torch.Tensor = None


def read_synset(path, pack=1):
    """Synthetic sets in any of the published formats.

    path: a `.pt` in the DC layout ({'data': [[images, labels], ...]}, ours with 'soft_labels'), a `.pkl` of (images, labels),
    or a `.pt` of bare images named images*.pt beside its labels*.pt. Labels are whole numbers (N,), or soft ones (N, classes):
    probabilities, or whatever else, which is taken for logits. pack: that of a file that does not say it.
    Returns ([SyntheticSet, ...], meta), with meta an empty dict where the file has none. Raises InputError for anything else.
    Source: SPEC 3.5.
    """
    path = Path(path)
    content, meta, soft = read_tensors(path), {}, None
    if isinstance(content, dict):
        meta = content.get("meta", {})
        sets, soft = content.get("data"), content.get("soft_labels")
        if not isinstance(sets, (list, tuple)) or not sets or not isinstance(meta, dict):
            raise InputError(f"{path} is a dict without a list 'data' of [images, labels]; its keys are {_keys(content)}")
        _check_meta(path, meta)
        if soft is not None and (not isinstance(soft, (list, tuple)) or len(soft) != len(sets)):
            raise InputError(f"{path}: soft_labels is no list with an entry for each of the {len(sets)} sets")
    elif isinstance(content, torch.Tensor) and path.name.startswith("images"):
        labels = path.with_name("labels" + path.name.removeprefix("images"))
        sets = [(content, read_tensors(labels))]
    elif isinstance(content, (tuple, list)) and len(content) == 2:
        sets = [content]
    else:
        raise InputError(f"{path} holds a {type(content).__name__}, no synthetic set; known are the DC layout, a pair (images, "
                         "labels), and images*.pt beside labels*.pt")
    pack = pack_of(meta, pack)
    return [_checked_set(f"{path}, set {i}", one, soft and soft[i], pack) for i, one in enumerate(sets)], meta


def pack_of(meta, default=1):
    """How many sub-images stand along each side of a stored image, as the meta of a file says; 1 if it is not packed."""
    return meta.get("pack", 2 if meta.get("packed") else default)


# What `meta["recipe"]` may say of training on a set: the name of each setting, its kind, its least value.
RECIPE = {"epochs": (int, 1), "lr_net": (float, 0), "batch_train": (int, 1), "dsa_strategy": (str, ""),
          "lr_schedule": (str, ""), "temperature": (float, 0.01), "pack": (int, 1), "teachers": (list, [])}


def _check_meta(path, meta):
    """What the scripts read of `meta` must be of its kind, where it is there."""
    kinds = {"flags": dict, "dataset": str, "threat_model": str, "packed": bool, "pack": int, "zca": bool, "mean": list,
             "std": list, "recipe": dict}
    flags = meta.get("flags", {})
    found = {key: (meta[key], kind) for key, kind in kinds.items() if key in meta}
    if isinstance(flags, dict) and "model" in flags:
        found["flags.model"] = flags["model"], str
    for key, (value, kind) in found.items():
        if (not isinstance(value, kind) or kind is list and not all(isinstance(x, (int, float)) for x in value)
                or key == "pack" and (isinstance(value, bool) or value not in (1, 2, 4, 8))):
            raise InputError(f"{path}: {key} of its meta is {str(value)[:60]!r}, no {kind.__name__}"
                             + (" of numbers" if kind is list else " of 1, 2, 4, 8" if key == "pack" else ""))
    recipe = meta.get("recipe", {})
    for key, (kind, least) in RECIPE.items():
        value, number = recipe.get(key, least), kind in (int, float)
        if (not isinstance(value, (int, float) if kind is float else kind) or isinstance(value, bool)
                or number and not least <= value < float("inf")):
            raise InputError(f"{path}: {key} of its recipe is {str(value)[:60]!r}; expected {kind.__name__}"
                             + (f" of at least {least}" if number else ""))
    if recipe.get("pack", pack_of(meta)) != pack_of(meta):
        raise InputError(f"{path}: its recipe trains on images packed {recipe['pack']}x{recipe['pack']}, its meta says "
                         f"{pack_of(meta)}x{pack_of(meta)}")


def _checked_set(name, one, soft, pack):
    try:
        parts = [*one, *([] if soft is None else [soft])]
        if not all(isinstance(part, (torch.Tensor, np.ndarray)) for part in parts):
            raise TypeError("it holds " + " and ".join(type(part).__name__ for part in parts))
        images, labels = (torch.as_tensor(part) for part in one)
        soft = None if soft is None else torch.as_tensor(soft)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{name} is no pair of images and labels ({reason(error)})") from None
    if labels.dim() == 2 and labels.is_floating_point():  # soft labels in place of the hard ones
        soft, labels = (labels if soft is None else soft), labels.argmax(1)[:len(images)]
    if images.dim() != 4 or not images.is_floating_point() or labels.shape != images.shape[:1] or len(labels) == 0:
        raise InputError(f"{name}: images are {images.dtype} {tuple(images.shape)}, labels {tuple(labels.shape)}; expected "
                         "floats (N, C, H, W) and (N,), or soft labels (N, classes)")
    if labels.is_floating_point() and not torch.equal(labels, labels.round()) or labels.is_complex():
        raise InputError(f"{name}: labels are no whole numbers; soft labels have a column for each class")
    if not images.isfinite().all():
        raise InputError(f"{name}: {int((~images.isfinite()).sum())} values of the images are not finite")
    if images.shape[2] % pack or images.shape[3] % pack:
        raise InputError(f"{name}: images of {images.shape[2]}x{images.shape[3]} cannot be packed {pack}x{pack}")
    return SyntheticSet(images.detach().float().contiguous(), labels.long(), _logits(name, soft, len(images) * pack**2, pack))


def _logits(name, soft, count, pack):
    """Soft labels as logits, checked. Rows of probabilities become their logarithms."""
    if soft is None:
        return None
    if soft.dim() != 2 or not soft.is_floating_point() or len(soft) != count or soft.shape[1] < 2:
        raise InputError(f"{name}: soft labels are {soft.dtype} {tuple(soft.shape)}; expected floats ({count}, classes), one "
                         f"row for each training image" + (f" ({pack}x{pack} in each stored image)" if pack > 1 else ""))
    if not soft.isfinite().all():
        raise InputError(f"{name}: {int((~soft.isfinite()).sum())} values of the soft labels are not finite")
    soft = soft.detach().float().contiguous()
    probabilities = bool((soft >= 0).all() and (soft.sum(1) - 1).abs().max() < 1e-3)
    return soft.clamp(min=1e-12).log() if probabilities else soft


def save_synset(path, sets, rows, meta):
    """Write synthetic sets in the DC layout, soft labels beside it, plus `meta`; read it with torch.load(path,
    weights_only=True).

    sets: a SyntheticSet an experiment, all of them with soft labels or none. rows: of an Evaluator; their robust accuracy is
    `accs_all_exps`, as in the published files, the clean one is in `meta`. meta: plain Python values. Source: SPEC 3.5.
    """
    accs = {key: {model: columns[key] for model, columns in by_model(rows).items()} for key in ("robust_acc", "clean_acc")}
    content = {"data": [[one.images.detach().float().cpu().clone(), one.labels.cpu().clone()] for one in sets]}
    if sets[0].soft_labels is not None:
        content["soft_labels"] = [one.soft_labels.detach().float().cpu().clone() for one in sets]
    write_tensors(path, {**content, "accs_all_exps": accs["robust_acc"], "meta": {**meta, "clean_accs": accs["clean_acc"]}})


# --------------------------------------------------------------------------------------------------------------- networks
def read_state_dict(path):
    """A network's parameters, {name: tensor}; a 'module.' in front of every name (several GPUs) is dropped.

    Raises InputError if the file holds anything else, or values that are not finite.
    """
    content = read_tensors(path)
    if not isinstance(content, dict) or not content or not all(
            isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in content.items()):
        what = f"a dict with the keys {_keys(content)}" if isinstance(content, dict) else f"a {type(content).__name__}"
        raise InputError(f"{path} holds {what}; expected a state_dict, {{name: tensor}}")
    for name, value in content.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise InputError(f"{path}: {name} has values that are not finite")
    if all(name.startswith("module.") for name in content):
        content = {name.removeprefix("module."): value for name, value in content.items()}
    return dict(content)


def load_into(net, path):
    """Put the parameters of a file into `net`. Raises InputError that names what is missing, unknown or of another shape."""
    given, wanted = read_state_dict(path), net.state_dict()
    wrong = [f"{name} is missing" for name in wanted if name not in given]
    wrong += [f"{name} is unknown" for name in given if name not in wanted]
    wrong += [f"{name} is {tuple(given[name].shape)}, expected {tuple(wanted[name].shape)}"
              for name in wanted if name in given and given[name].shape != wanted[name].shape]
    if wrong:
        raise InputError(f"{path} is another network: {'; '.join(wrong[:3])}" + (" ..." if len(wrong) > 3 else ""))
    net.load_state_dict(given)
    return net


def _keys(content):
    return ", ".join(map(repr, list(content)[:5])) + (" ..." if len(content) > 5 else "")
