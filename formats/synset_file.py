"""Files of synthetic sets: read and checked, normalised, described, written. Source: SPEC 3.5."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from datasets import Normalisation
from formats.image_checks import PACKS, PIXEL_SCALES, likely_space, seams
from formats.layouts import read_layout
from runtime.measures import by_model
from runtime.safe_io import InputError, reason, sha256, write_tensors

SPACES = ("normalised", "pixels")  # of images, --images
MAX_LABELLERS = 16
SUM_TOLERANCE = 0.01  # of a row of probabilities, which may be stored as bfloat16
ADVICE = {kind: "; --images pixels converts them" for kind in PIXEL_SCALES}
ADVICE["ZCA-whitened images"] = "; --zca declares it"


class SyntheticSet(NamedTuple):
    """One synthetic set. Networks train on the pack*pack sub-images of each stored image.

    images: (N, C, H, W) float32, normalised. labels: (N,) int64. soft_labels: logits (N*pack*pack,
    classes) float32, a row for each sub-image in the order of `augment.unpack`; or None.
    labellers: networks that label what a student sees, [{"model": name, "state": state_dict}, ...].
    """

    images: torch.Tensor
    labels: torch.Tensor
    soft_labels: torch.Tensor = None
    labellers: list = ()

    def to(self, device):
        """The same set, with its tensors on the device; labellers stay."""
        images, labels, soft_labels = (x if x is None else x.to(device) for x in self[:3])
        return self._replace(images=images, labels=labels, soft_labels=soft_labels)

    def stored_bytes(self):
        """{"images", "labels", "labellers"}: bytes of pixels; one for a class, four for a logit; of
        the parameters of the networks."""
        parameters = (x for labeller in self.labellers for x in labeller["state"].values())
        soft = self.soft_labels
        return {"images": self.images.numel(),
                "labels": len(self.labels) if soft is None else 4 * soft.numel(),
                "labellers": sum(x.numel() * x.element_size() for x in parameters)}

    def images_per_class(self):
        """Stored images of each class, at least 1, if the classes are balanced."""
        return max(1, len(self.labels) // max(1, int(self.labels.max()) + 1))


@dataclass
class SynsetFile:
    """The synthetic sets of a file.

    sets: [SyntheticSet, ...]; until `normalise` their images are as stored. meta: what the file
    declares. files: all that was read. pack: sub-images along each side of an image.
    labels_from_soft: the classes are the largest soft labels. notes: what it was taken as.
    """

    path: Path
    sets: list
    meta: dict
    files: list
    pack: int
    labels_from_soft: bool
    notes: list
    warnings: list = field(default_factory=list)

    def declared_zca(self):
        """Whether the meta declares whitened images; None if it declares nothing."""
        return self.meta.get("zca", False if "mean" in self.meta else None)

    def normalise(self, normalize, space=None, zca=False):
        """Convert pixels to normalised images; add warnings where images look like others.

        normalize: pixels (N, C, H, W) in [0, 1] -> normalised images. space: one of SPACES; None:
        bytes are pixels, floats normalised. zca: normalised means whitened. Raises InputError.
        """
        kind, values = likely_space([one.images.float() for one in self.sets], zca)
        are_bytes = any(one.images.dtype == torch.uint8 for one in self.sets)
        if are_bytes:
            kind = "pixels from 0 to 255"  # also where all of them are dark
        if are_bytes and space == "normalised" or space == "pixels" and kind not in PIXEL_SCALES:
            raise InputError(f"{self.path} holds {kind}, {values}; leave out --images {space}")
        taken = "ZCA-whitened images" if zca else "normalised images"
        if are_bytes or space == "pixels":
            scale = PIXEL_SCALES[kind]
            self.sets = [one._replace(images=normalize(one.images / scale)) for one in self.sets]
            self.notes.append(f"from {kind}")
        elif space is None and kind != taken and not (zca and self.declared_zca()):
            warning = f"taken as {taken}, but its values {values} look like {kind}"
            self.warnings.append(f"{self.path}: {warning}{ADVICE.get(kind, '')}")
        found, ratio = seams(self.sets[0].images)
        if found not in (1, self.pack) and not zca:  # whitening hides seams, and makes others
            difference = f"neighbouring pixels differ {ratio:.1f} times as much across the seams"
            self.warnings.append(
                f"{self.path}: taken as {self._packing()}, but its images look packed "
                f"{found}x{found} ({difference}); --packed {found} unpacks them"
            )

    def _packing(self):
        return f"packed {self.pack}x{self.pack}" if self.pack > 1 else "not packed"

    def describe(self, dataset, mean, std, zca):
        """The line that says what the file was taken as. dataset: its name, with "(assumed)"."""
        space = str(Normalisation(mean, std, zca))
        return ", ".join([dataset, space, self._packing(), *self.notes])

    def sha256(self):
        """The checksum of a single file, or of the checksums of all that were read."""
        digests = [sha256(path) for path in self.files]
        if len(digests) == 1:
            return digests[0]
        return hashlib.sha256(" ".join(digests).encode()).hexdigest()


# ------------------------------------------------------------------------------------------ reading
def read_synset(path, packed=1):
    """Read synthetic sets in any layout (formats.layouts) as a SynsetFile. Raises InputError.

    packed: sub-images along each side of an image, if the file does not declare it.
    """
    path = Path(path)
    stored, meta, files, notes = read_layout(path)
    check_meta(path, meta)
    pack = pack_of(meta, packed)
    sets, kinds, from_soft = zip(*(_checked(f"{path}, set {i}", one, pack)
                                   for i, one in enumerate(stored)))
    if len(set(kinds)) > 1:
        raise InputError(f"{path} has {' and '.join(sorted(set(kinds)))}; expected one kind")
    notes.insert(0, kinds[0])
    recipe = meta.get("recipe", {})
    keys = ("epochs", "lr_net", "batch_train", "lr_schedule", "temperature")
    if values := [f"{key} {recipe[key]}" for key in keys if recipe.get(key)]:
        notes.append(f"recipe {', '.join(values)}")
    return SynsetFile(path, list(sets), meta, files, pack, any(from_soft), notes)


def pack_of(meta, default=1):
    """Sub-images along each side of a stored image, as the meta declares; 1 if it is not packed."""
    return meta.get("pack", 2 if meta.get("packed") else default)


def mean_and_std(meta):
    """The normalisation that the meta of a file declares: (mean, std), (1, C, 1, 1) each."""
    return tuple(torch.tensor(meta[key]).view(1, -1, 1, 1) for key in ("mean", "std"))


def _is(kind):
    return lambda x: isinstance(x, kind)


def _are_above(least):
    return lambda x: isinstance(x, list) and all(
        isinstance(value, (int, float)) and least < value < float("inf") for value in x)


# What the scripts read of a meta, beside names: what is expected, a check.
META = {
    "flags": ("a dict", _is(dict)),
    "recipe": ("a dict", lambda x: isinstance(x, dict) and isinstance(x.get("teachers", []), list)),
    "classes": ("a list", _is(list)),
    "labellers": ("a list", _is(list)),
    "packed": ("True or False", _is(bool)),
    "zca": ("True or False", _is(bool)),
    "pack": ("1, 2, 4 or 8", lambda x: type(x) is int and x in (1, *PACKS)),
    "mean": ("a list of numbers", _are_above(-float("inf"))),
    "std": ("a list of numbers above 0", _are_above(0)),
}


def check_meta(path, meta):
    """Raise InputError if the meta of a file has another value than the scripts expect."""
    for key, (expected, is_valid) in META.items():
        if key in meta and not is_valid(meta[key]):
            found = f"{key} of its meta is {str(meta[key])[:60]!r}"
            raise InputError(f"{path}: {found}; expected {expected}")


def _tensor(array):
    """No lists: those of a hostile file may be endless."""
    return torch.from_numpy(array) if isinstance(array, np.ndarray) else array.detach()


def _checked(name, stored, pack):
    """(SyntheticSet, kind of its labels, whether its classes come from soft ones)."""
    try:
        images, labels, soft, *labellers = stored
        images, labels = _tensor(images), _tensor(labels)
        soft = None if soft is None else _tensor(soft)
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{name} is no pair of images and labels ({reason(error)})") from None
    is_numeric = images.is_floating_point() or images.dtype == torch.uint8
    if images.dim() != 4 or not is_numeric or not len(images):
        found = f"images are {images.dtype} {tuple(images.shape)}"
        raise InputError(f"{name}: {found}; expected floats or bytes (N, C, H, W)")
    _check_finite(name, "images", images)
    height, width = images.shape[2:]
    if height % pack or width % pack:
        raise InputError(f"{name}: images of {height}x{width} cannot be packed {pack}x{pack}")
    if images.is_floating_point():
        images = images.float()
    from_soft = labels.dim() == 2 and labels.shape[1] > 1 and labels.is_floating_point()
    if from_soft:
        soft = labels if soft is None else soft
        labels = labels.argmax(1)[: len(images)]  # a packed set has more rows than images
    if labels.dim() == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    is_whole = not labels.is_complex() and bool((labels == labels.long()).all())
    if labels.shape != (len(images),) or not is_whole:
        found = f"labels {labels.dtype} {tuple(labels.shape)} for {len(images)} images"
        raise InputError(f"{name}: {found}; expected whole numbers (N,), or floats (N, classes)")
    soft, kind = _logits(name, soft, len(images) * pack**2)
    labellers = _checked_labellers(name, *labellers)
    if labellers:
        kind += f" and {len(labellers)} labeller(s), {labellers[0]['model']}"
    return SyntheticSet(images.contiguous(), labels.long(), soft, labellers), kind, from_soft


def _checked_labellers(name, given=()):
    """The networks of a set; whether they are networks of ours, `synsets.build_labellers` sees."""
    if not isinstance(given, (list, tuple)) or len(given) > MAX_LABELLERS:
        raise InputError(f"{name}: expected a list of at most {MAX_LABELLERS} labellers")
    for labeller in given:
        state = labeller.get("state") if isinstance(labeller, dict) else None
        if not isinstance(state, dict) or not isinstance(labeller.get("model"), str):
            raise InputError(f"{name}: a labeller is no dict of model and state")
        for key, value in state.items():
            if not isinstance(key, str) or not isinstance(value, torch.Tensor):
                raise InputError(f"{name}: the state of a labeller is no state_dict")
            _check_finite(name, f"labeller's {key}", value)
    return list(given)


def _check_finite(name, what, values):
    if wrong := int((~values.isfinite()).sum()):
        raise InputError(f"{name}: {wrong} values of the {what} are not finite")


def _logits(name, soft, count):
    """(logits, kind) of the soft labels of `count` training images; probabilities become logs."""
    if soft is None:
        return None, "hard labels"
    if soft.dim() != 2 or not soft.is_floating_point() or len(soft) != count or soft.shape[1] < 2:
        found = f"soft labels are {soft.dtype} {tuple(soft.shape)}"
        raise InputError(f"{name}: {found}; expected floats ({count}, classes), of all sub-images")
    _check_finite(name, "soft labels", soft)
    soft = soft.float().contiguous()
    total = soft.sum(1, keepdim=True)
    if (soft >= 0).all() and (total - 1).abs().max() < SUM_TOLERANCE:
        return (soft / total).clamp(min=1e-12).log(), "soft labels (probabilities)"
    return soft, "soft labels (logits)"


# ------------------------------------------------------------------------------------------ writing
def save_synset(path, sets, rows, meta):
    """Write synthetic sets in the DC layout, which torch.load(path, weights_only=True) reads.

    sets: a SyntheticSet for each experiment, all with soft labels, with labellers, or neither.
    rows: of an Evaluator; their robust accuracy is `accs_all_exps`, as in published files, the
    clean one goes into the meta. meta: plain Python values.
    """
    def copy(tensor):
        return tensor.detach().cpu().clone()

    content = {"data": [[copy(one.images).float(), copy(one.labels)] for one in sets]}
    if sets[0].soft_labels is not None:
        content["soft_labels"] = [copy(one.soft_labels).float() for one in sets]
    if sets[0].labellers:
        content["labellers"] = [list(one.labellers) for one in sets]
    models = by_model(rows)
    content["accs_all_exps"] = {name: model["robust_acc"] for name, model in models.items()}
    clean_accs = {name: model["clean_acc"] for name, model in models.items()}
    write_tensors(path, {**content, "meta": {**meta, "clean_accs": clean_accs}})
