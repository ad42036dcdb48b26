"""Files of synthetic sets and of networks, in the layouts of the field. What is read is checked. Source: SPEC 3.5."""
from pathlib import Path

import numpy as np
import torch

from engine.results import by_model
from engine.safe_files import InputError, read_tensors, reason, write_tensors


# --------------------------------------------------------------------------------------------------------- synthetic sets
def read_synset(path):
    """A synthetic set in any of the published formats.

    path: a `.pt` in the DC layout ({'data': [[images, labels], ...]}), a `.pkl` of (images, labels), or a `.pt` of bare images
    named images*.pt beside its labels*.pt. Returns ([(images (N, C, H, W) float32, labels (N,) int64), ...], meta), with meta
    an empty dict where the file has none. Raises InputError for anything else. Source: SPEC 3.5.
    """
    path = Path(path)
    content, meta = read_tensors(path), {}
    if isinstance(content, dict):
        meta = content.get("meta", {})
        sets = content.get("data")
        if not isinstance(sets, (list, tuple)) or not sets or not isinstance(meta, dict):
            raise InputError(f"{path} is a dict without a list 'data' of [images, labels]; its keys are {_keys(content)}")
        _check_meta(path, meta)
    elif isinstance(content, torch.Tensor) and path.name.startswith("images"):
        labels = path.with_name("labels" + path.name.removeprefix("images"))
        sets = [(content, read_tensors(labels))]
    elif isinstance(content, (tuple, list)) and len(content) == 2:
        sets = [content]
    else:
        raise InputError(f"{path} holds a {type(content).__name__}, no synthetic set; known are the DC layout, a pair (images, "
                         "labels), and images*.pt beside labels*.pt")
    return [_checked_set(f"{path}, set {i}", one) for i, one in enumerate(sets)], meta


def _check_meta(path, meta):
    """What the scripts read of `meta` must be of its kind, where it is there."""
    kinds = {"flags": dict, "dataset": str, "threat_model": str, "packed": bool, "zca": bool, "mean": list, "std": list}
    flags = meta.get("flags", {})
    found = {key: (meta[key], kind) for key, kind in kinds.items() if key in meta}
    if isinstance(flags, dict) and "model" in flags:
        found["flags.model"] = flags["model"], str
    for key, (value, kind) in found.items():
        if not isinstance(value, kind) or kind is list and not all(isinstance(x, (int, float)) for x in value):
            raise InputError(f"{path}: {key} of its meta is {str(value)[:60]!r}, no {kind.__name__}"
                             + (" of numbers" if kind is list else ""))


def _checked_set(name, one):
    try:
        if not all(isinstance(part, (torch.Tensor, np.ndarray)) for part in one):
            raise TypeError("it holds " + " and ".join(type(part).__name__ for part in one))
        images, labels = (torch.as_tensor(part) for part in one)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{name} is no pair of images and labels ({reason(error)})") from None
    if images.dim() != 4 or not images.is_floating_point() or labels.shape != images.shape[:1] or len(labels) == 0:
        raise InputError(f"{name}: images are {images.dtype} {tuple(images.shape)}, labels {tuple(labels.shape)}; expected "
                         "floats (N, C, H, W) and (N,)")
    if labels.is_floating_point() and not torch.equal(labels, labels.round()) or labels.is_complex():
        raise InputError(f"{name}: labels are no whole numbers; soft labels are not supported")
    if not images.isfinite().all():
        raise InputError(f"{name}: {int((~images.isfinite()).sum())} values of the images are not finite")
    return images.detach().float().contiguous(), labels.long()


def save_synset(path, sets, rows, meta):
    """Write synthetic sets in the DC layout plus `meta`; read it with torch.load(path, weights_only=True).

    sets: one (images (N, C, H, W) normalised, labels (N,)) an experiment. rows: of an Evaluator; their robust accuracy is
    `accs_all_exps`, as in the published files, the clean one is in `meta`. meta: plain Python values. Source: SPEC 3.5.
    """
    accs = {key: {model: columns[key] for model, columns in by_model(rows).items()} for key in ("robust_acc", "clean_acc")}
    data = [[images.detach().float().cpu().clone(), labels.cpu().clone()] for images, labels in sets]
    write_tensors(path, {"data": data, "accs_all_exps": accs["robust_acc"], "meta": {**meta, "clean_accs": accs["clean_acc"]}})


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
