"""Files of synthetic sets: read and checked, normalised, described, written. Source: SPEC 3.5."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from formats.image_checks import ORDINARY_DEVIATION, PACKS, PIXEL_SCALES, likely_space, seams
from formats.layouts import read_layout
from runtime.measures import by_model
from runtime.safe_io import InputError, reason, sha256, write_tensors

SPACES = ("normalised", "pixels")  # of images, --images
SUM_TOLERANCE = 0.01  # of a row of probabilities, which may be stored as bfloat16
SEAM_IMAGES = 1000  # that are looked at
ADVICE = {kind: "; --images pixels converts them" for kind in PIXEL_SCALES}
ADVICE["ZCA-whitened images"] = "; --zca declares it"


class SyntheticSet(NamedTuple):
    """One synthetic set. Networks train on the pack*pack sub-images of each stored image.

    images: (N, C, H, W) float32, normalised. labels: (N,) int64. soft_labels: logits (N*pack*pack,
    classes) float32, a row for each sub-image in the order of `augment.unpack`; or None.
    """

    images: torch.Tensor
    labels: torch.Tensor
    soft_labels: torch.Tensor = None


@dataclass
class SynsetFile:
    """The synthetic sets of a file.

    sets: [SyntheticSet, ...]; until `normalise` their images are floats or bytes as stored. meta:
    what the file declares. files: all that was read. pack: sub-images along each side of an image.
    labels: their kind, as text. labels_from_soft: the classes are the largest soft labels.
    """

    path: Path
    sets: list
    meta: dict
    files: list
    pack: int
    labels: str
    labels_from_soft: bool
    notes: list
    warnings: list = field(default_factory=list)
    converted_from: str = ""  # a key of PIXEL_SCALES

    def declared_zca(self):
        """Whether the meta declares whitened images; None if it declares nothing."""
        return self.meta.get("zca", False if "mean" in self.meta else None)

    def normalise(self, normalize, space=None, zca=False):
        """Convert pixels to normalised images; add warnings where images look like others.

        normalize: pixels (N, C, H, W) in [0, 1] -> normalised images. space: one of SPACES; None:
        bytes are pixels, floats normalised. zca: normalised means whitened. Raises InputError.
        """
        kind, values = likely_space([one.images.float() for one in self.sets])
        are_bytes = any(one.images.dtype == torch.uint8 for one in self.sets)
        if are_bytes:
            kind = "pixels from 0 to 255"  # also where all of them are dark
        wrong = None
        if are_bytes and space == "normalised":
            wrong = "bytes, which are pixels"
        elif space == "pixels" and kind not in PIXEL_SCALES:
            wrong = f"no pixels, with values {values}"
        if wrong:
            raise InputError(f"{self.path}: its images are {wrong}; leave out --images {space}")
        if are_bytes or space == "pixels":
            scale, self.converted_from = PIXEL_SCALES[kind], kind
            self.sets = [one._replace(images=normalize(one.images / scale)) for one in self.sets]
        elif space is None:
            self._check_values(kind, values, zca)
        if not zca:  # whitening hides seams (ratio 1.2 to 1.5), and makes others
            self._check_seams()

    def _check_values(self, kind, values, zca):
        """Warn where floats look like something else than normalised, or whitened, images."""
        taken = "ZCA-whitened images" if zca else "normalised images"
        if zca:
            are_small = float(self.sets[0].images.std()) < ORDINARY_DEVIATION
            kind = taken if self.declared_zca() or are_small else "ordinary ones"
        if kind != taken:
            warning = f"taken as {taken}, but its values {values} look like {kind}"
            self.warnings.append(f"{self.path}: {warning}{ADVICE.get(kind, '')}")

    def _check_seams(self):
        found, ratio = seams(self.sets[0].images[:SEAM_IMAGES])
        if found not in (1, self.pack):
            self.warnings.append(
                f"{self.path}: taken as {self._packing()}, but its images look packed "
                f"{found}x{found} (neighbouring pixels differ {ratio:.1f} times as much across the "
                f"seams); --packed {found} unpacks them"
            )

    def _packing(self):
        return f"packed {self.pack}x{self.pack}" if self.pack > 1 else "not packed"

    def describe(self, dataset, mean, std, zca):
        """The line that says what the file was taken as. dataset: its name, with "(assumed)"."""
        pixels = f"from {self.converted_from} " if self.converted_from else ""
        space = f"normalised {pixels}with mean {list(mean)}, std {list(std)}"
        parts = [dataset, "ZCA-whitened" if zca else space, self._packing(), self.labels]
        return ", ".join([*parts, *self.notes, "ZCA" if zca else "no ZCA"])

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
    pack, sets, kinds, from_soft = pack_of(meta, packed), [], [], False
    for i, (pair, soft) in enumerate(stored):
        name = f"{path}, set {i}"
        try:
            images, labels = map(_tensor, pair)
            soft = None if soft is None else _tensor(soft)
        except (AttributeError, TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"{name} is no pair of images and labels ({reason(error)})") from None
        images = _images(name, images, pack)
        if labels.dim() == 2 and labels.shape[1] > 1 and labels.is_floating_point():
            from_soft, soft = True, labels if soft is None else soft
            labels = labels.argmax(1)[: len(images)]  # a packed set has more rows than images
        labels = _labels(name, labels, len(images))
        soft, kind = _logits(name, soft, len(images) * pack**2)
        sets.append(SyntheticSet(images, labels, soft))
        kinds.append(kind)
    if len(set(kinds)) > 1:
        both = " and ".join(sorted(set(kinds)))
        raise InputError(f"{path}: its sets have {both}; expected the same in all")
    if "recipe" in meta and not any(" from " in note for note in notes):
        keys = ("epochs", "lr_net", "batch_train", "lr_schedule", "temperature")
        values = [f"{key} {meta['recipe'][key]}" for key in keys if meta["recipe"].get(key)]
        notes.append(f"recipe {', '.join(values)}")
    return SynsetFile(path, sets, meta, files, pack, kinds[0], from_soft, notes)


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
        isinstance(value, (int, float)) and value > least for value in x
    )


def _at_least(least, *types):
    return lambda x: isinstance(x, types) and type(x) is not bool and least <= x < float("inf")


# What the scripts read of a meta: keys, what is expected, a check.
META = (
    ("flags recipe", "a dict", _is(dict)),
    ("dataset threat_model run method model flags.method flags.model", "a string", _is(str)),
    ("recipe.dsa_strategy recipe.lr_schedule", "a string", _is(str)),
    ("classes recipe.teachers", "a list", _is(list)),
    ("packed zca", "True or False", _is(bool)),
    ("pack", "1, 2, 4 or 8", lambda x: type(x) is int and x in (1, *PACKS)),
    ("mean", "a list of numbers", _are_above(-float("inf"))),
    ("std", "a list of numbers above 0", _are_above(0)),
    ("recipe.epochs recipe.batch_train recipe.pack", "an int above 0", _at_least(1, int)),
    ("recipe.lr_net", "a number of at least 0", _at_least(0, int, float)),
    ("recipe.temperature", "a number of at least 0.01", _at_least(0.01, int, float)),
)


def check_meta(path, meta):
    """Raise InputError if the meta of a file has another value than the scripts expect."""
    for keys, expected, is_valid in META:
        for key in keys.split():
            *outer, inner = key.split(".")
            values = meta.get(outer[0], {}) if outer else meta
            if inner in values and not is_valid(values[inner]):
                found = f"{key} of its meta is {str(values[inner])[:60]!r}"
                raise InputError(f"{path}: {found}; expected {expected}")
    pack = pack_of(meta)
    trained = meta.get("recipe", {}).get("pack", pack)
    if trained != pack:
        found = f"its recipe trains on images packed {trained}x{trained}"
        raise InputError(f"{path}: {found}, its meta has {pack}x{pack}")


def _tensor(array):
    """No lists: those of a hostile file may be endless."""
    return torch.from_numpy(array) if isinstance(array, np.ndarray) else array.detach()


def _images(name, images, pack):
    """Images as they are stored, bytes or float32; checked."""
    are_bytes = images.dtype == torch.uint8
    if images.dim() != 4 or not (images.is_floating_point() or are_bytes) or not len(images):
        found = f"images are {images.dtype} {tuple(images.shape)}"
        raise InputError(f"{name}: {found}; expected floats or bytes (N, C, H, W)")
    _check_finite(name, "images", images)
    height, width = images.shape[2:]
    if height % pack or width % pack:
        raise InputError(f"{name}: images of {height}x{width} cannot be packed {pack}x{pack}")
    return (images if are_bytes else images.float()).contiguous()


def _labels(name, labels, count):
    """Classes, (count,) int64."""
    if labels.dim() == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.shape != (count,):
        found = f"labels {tuple(labels.shape)} for {count} images"
        raise InputError(f"{name}: {found}; expected (N,), or soft labels (N, classes)")
    if labels.is_complex() or (labels != labels.long()).any():
        expected = "soft labels have a column for each class"
        raise InputError(f"{name}: labels are no whole numbers; {expected}")
    return labels.long()


def _check_finite(name, what, values):
    if wrong := int((~values.isfinite()).sum()):
        raise InputError(f"{name}: {wrong} values of the {what} are not finite")


def _logits(name, soft, count):
    """(logits, kind) of the soft labels of `count` training images; probabilities become logs."""
    if soft is None:
        return None, "hard labels"
    if soft.dim() != 2 or not soft.is_floating_point() or len(soft) != count or soft.shape[1] < 2:
        raise InputError(
            f"{name}: soft labels are {soft.dtype} {tuple(soft.shape)}; expected floats ({count}, "
            "classes), one row for each training image (sub-image, where packed)"
        )
    _check_finite(name, "soft labels", soft)
    soft = soft.float().contiguous()
    total = soft.sum(1, keepdim=True)
    if (soft >= 0).all() and (total - 1).abs().max() < SUM_TOLERANCE:
        return (soft / total).clamp(min=1e-12).log(), "soft labels (probabilities)"
    return soft, "soft labels (logits)"


# ------------------------------------------------------------------------------------------ writing
def save_synset(path, sets, rows, meta):
    """Write synthetic sets in the DC layout, which torch.load(path, weights_only=True) reads.

    sets: a SyntheticSet for each experiment, all with soft labels or none. rows: of an Evaluator;
    their robust accuracy is `accs_all_exps`, as in published files, the clean one goes into the
    meta. meta: plain Python values.
    """

    def copy(tensor):
        return tensor.detach().cpu().clone()

    content = {"data": [[copy(one.images).float(), copy(one.labels)] for one in sets]}
    if sets[0].soft_labels is not None:
        content["soft_labels"] = [copy(one.soft_labels).float() for one in sets]
    models = by_model(rows)
    content["accs_all_exps"] = {name: model["robust_acc"] for name, model in models.items()}
    clean_accs = {name: model["clean_acc"] for name, model in models.items()}
    write_tensors(path, {**content, "meta": {**meta, "clean_accs": clean_accs}})
