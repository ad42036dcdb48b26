"""Files of synthetic sets, in the layouts of the field: what is read is checked, and how it was
understood is said.

`read_synset` reads a file or a folder; `SynsetFile.normalise` then makes sure that its images are
normalised ones, and `SynsetFile.describe` says in a line what the file was taken as. Source: SPEC
3.5.
"""

import dataclasses
import hashlib
from pathlib import Path
from typing import NamedTuple

import torch

from formats.layouts import read_layout
from runtime.measures import by_model
from runtime.safe_io import InputError, reason, sha256, write_tensors

PACKS = (2, 4, 8)  # sub-images along each side of a stored image; 1 is a set that is not packed
SPACES = ("normalised", "pixels")  # of images, --images
TOLERANCE = 0.01  # of a sum of probabilities, which may be stored as bfloat16
WHITENED_DEVIATION, ORDINARY_DEVIATION = 0.38, 0.9  # see `likely_space`
SEAM_RATIO, SEAM_DEVIATIONS, SEAM_IMAGES = 1.75, 4.0, 1000  # see `seams`


class SyntheticSet(NamedTuple):
    """One synthetic set. The `pack`*`pack` sub-images of each stored image are what a network
    trains on.

    images: (N, C, H, W) float32, normalised. labels: (N,) int64. soft_labels: (N*pack*pack,
    classes) float32 logits, one row for each training image in the order of `augment.unpack`, or
    None.
    """

    images: torch.Tensor
    labels: torch.Tensor
    soft_labels: torch.Tensor = None


# ------------------------------------------------------------------------- how a file is understood
@dataclasses.dataclass
class SynsetFile:
    """The synthetic sets of a file, and how it was understood.

    sets: [SyntheticSet, ...]; their images are as stored until `normalise`. meta: what the file
    says of itself, what lies beside it included; empty if nothing. files: what was read. pack: how
    many sub-images stand along each side of an image. bytes: whether the images are stored as
    bytes. labels: "hard labels", "soft labels (logits)" or "(probabilities)". derived: whether the
    classes are only the largest of the soft labels. notes, warnings: sentences.
    """

    path: Path
    sets: list
    meta: dict
    files: list
    pack: int
    bytes: bool
    labels: str
    derived: bool
    notes: list
    warnings: list = dataclasses.field(default_factory=list)
    space: str = ""

    def says_zca(self):
        """True or False as its meta says; None if it does not."""
        return self.meta.get("zca", False if "mean" in self.meta else None)

    def normalise(self, normalize, space=None, zca=False):
        """Images as normalised ones, warnings where they look like something else.

        normalize: (N, C, H, W) pixels in [0, 1] -> normalised units. space: one of SPACES, what the
        user says the images are; None: bytes are pixels, floats normalised. zca: whether normalised
        means whitened. Raises InputError if they cannot be that.
        """
        likely, spread = likely_space([one.images for one in self.sets])
        if space == "pixels" or space is None and self.bytes:
            scales = {"pixels in [0, 1]": 1.0, "pixels from 0 to 255": 255.0}
            if self.bytes:
                likely = "pixels from 0 to 255"  # also where they are all dark
            if likely not in scales:
                raise InputError(
                    f"{self.path}: its images are no pixels, with values {spread}; leave out "
                    "--images pixels"
                )
            self.sets = [
                one._replace(images=normalize(one.images / scales[likely])) for one in self.sets
            ]
            self.space = f"from {likely} "
        elif self.bytes:
            raise InputError(
                f"{self.path}: its images are bytes, which are pixels; leave out --images {space}"
            )
        elif space is None:
            self._check_values(likely, spread, zca)
        if not zca:  # whitening hides seams, 1.2 to 1.5 as in `seams`, and shows others
            self._check_seams()
        return self

    def _check_values(self, likely, spread, zca):
        """A warning where floats that are taken as normalised, or whitened, look like something
        else.
        """
        taken, advice = ("ZCA-whitened" if zca else "normalised"), ""
        if zca:
            if self.says_zca() or float(self.sets[0].images.std()) < ORDINARY_DEVIATION:
                return
            likely = "ordinary ones"
        elif likely == "normalised":
            return
        elif "pixels" in likely:
            advice = "; --images pixels converts them"
        elif "ZCA" in likely:
            advice = "; --zca says so"
        self.warnings.append(
            f"{self.path}: taken as {taken} images, but its values {spread} look like "
            f"{likely}{advice}"
        )

    def _check_seams(self):
        found, ratio = seams(self.sets[0].images[:SEAM_IMAGES])
        if found not in (1, self.pack):
            taken = f"packed {self.pack}x{self.pack}" if self.pack > 1 else "not packed"
            self.warnings.append(
                f"{self.path}: taken as {taken}, but its images look packed {found}x{found} "
                "(neighbouring "
                f"pixels differ {ratio:.1f} times as much across the seams); --packed {found} "
                "unpacks them"
            )

    def describe(self, dataset, mean, std, zca):
        """What the file was taken as, in a line. dataset: its name, with "(assumed)" if nothing
        says so.
        """
        normalised = (
            "ZCA-whitened"
            if zca
            else f"normalised {self.space}with mean {list(mean)}, std {list(std)}"
        )
        packed = f"packed {self.pack}x{self.pack}" if self.pack > 1 else "not packed"
        parts = [dataset, normalised, packed, self.labels, *self.notes]
        return ", ".join([*parts, "ZCA" if zca else "no ZCA"])

    def sha256(self):
        """The checksum of all that was read: of a single file its own."""
        digests = [sha256(path) for path in self.files]
        return (
            digests[0]
            if len(digests) == 1
            else hashlib.sha256(" ".join(digests).encode()).hexdigest()
        )


def likely_space(images):
    """What a list of images probably is by its values: ("normalised", "pixels in [0, 1]", ...,
    their range as text).

    Standard deviations: about 1.2 for normalised CIFAR-10 images, 0.5 for images in [-1, 1], 0.25
    for ZCA-whitened ones.
    """
    low, high = min(float(x.min()) for x in images), max(float(x.max()) for x in images)
    spread, deviation = f"from {low:.4g} to {high:.4g}", float(images[0].std())
    if low >= -1e-3:
        if high <= 1 + 1e-3:
            kind = "pixels in [0, 1]"
        elif 5 < high <= 255.5:
            kind = "pixels from 0 to 255"
        else:
            kind = "something else: normalised images have negative values"
    elif deviation < WHITENED_DEVIATION:
        kind = "ZCA-whitened images"
    elif -1.001 <= low and high <= 1.001:
        kind = "images in [-1, 1]"
    else:
        kind = "normalised"
    return kind, f"{spread} (standard deviation {deviation:.2g})"


def seams(images):
    """How images (N, C, H, W) seem to be packed: (K, ratio), K of PACKS, or 1 if no seams are seen.

    ratio: the mean difference of neighbouring pixels across the seams that only K x K sub-images
    have, relative to that where no packing has any. CIFAR-10: 1.9 to 4.0 where packed, 0.9 to 1.3
    where not (sets of 10 to 500 images). It must also be larger than 1 by `SEAM_DEVIATIONS`
    standard deviations of its mean over images.
    """
    side, found = images.shape[-1], (1, 1.0)
    if images.shape[2] != side or side % (2 * PACKS[-1]):
        return found
    rows, columns = images.diff(dim=2).abs().mean((1, 3)), images.diff(dim=3).abs().mean((1, 2))
    differences = (rows + columns) / 2  # (N, side - 1)
    position = torch.arange(1, side)
    inside = differences[:, position % (side // PACKS[-1]) != 0].mean(1)
    for pack in PACKS:
        step = side // pack
        new = (
            (position % step == 0) & (position % (2 * step) != 0) if pack > 2 else position == step
        )
        across = differences[:, new].mean(1)
        ratio = float(across.mean() / inside.mean().clamp(min=1e-12))
        logs = ((across + 1e-6) / (inside + 1e-6)).log()
        if (
            ratio > SEAM_RATIO
            and logs.mean() > SEAM_DEVIATIONS * logs.std(correction=0) / len(logs) ** 0.5
        ):
            found = (pack, ratio)
    return found


# ------------------------------------------------------------------------------------------ reading
def read_synset(path, packed=1):
    """Synthetic sets in any of the published layouts (formats.layouts), as a SynsetFile.

    Labels are whole numbers (N,), or soft ones (N, classes): rows of probabilities, or whatever
    else, which is taken for logits. packed: that of a file that does not say it. Raises InputError
    for anything else. Source: SPEC 3.5.
    """
    path = Path(path)
    pairs, meta, files, notes = read_layout(path)
    _check_meta(path, meta)
    pack = pack_of(meta, packed)
    sets, kinds, derived, are_bytes = [], [], False, False
    for i, (images, labels, soft) in enumerate(pairs):
        name = f"{path}, set {i}"
        one, kind, from_soft, as_bytes = _checked_set(name, images, labels, soft, pack)
        sets.append(one)
        kinds.append(kind)
        derived, are_bytes = derived or from_soft, are_bytes or as_bytes
    if len(set(kinds)) > 1:
        raise InputError(
            f"{path}: its sets have {' and '.join(sorted(set(kinds)))}; expected the same in all"
        )
    if "recipe" in meta and not any(" from " in note for note in notes):
        said = meta["recipe"]
        notes = [
            *notes,
            "recipe "
            + ", ".join(f"{key} {said[key]}" for key in RECIPE if said.get(key) and key in SAID),
        ]
    return SynsetFile(path, sets, meta, files, pack, are_bytes, kinds[0], derived, notes)


def pack_of(meta, default=1):
    """How many sub-images stand along each side of a stored image, as the meta of a file says; 1 if
    it is not packed.
    """
    return meta.get("pack", 2 if meta.get("packed") else default)


def mean_and_std(meta):
    """The normalisation that the meta of a file says: (mean, std), (1, C, 1, 1) each."""
    return tuple(torch.tensor(meta[key]).view(1, -1, 1, 1) for key in ("mean", "std"))


# What `meta["recipe"]` may say of training on a set: the name of each setting, its kind, its least
# value.
RECIPE = {
    "epochs": (int, 1),
    "lr_net": (float, 0),
    "batch_train": (int, 1),
    "dsa_strategy": (str, ""),
    "lr_schedule": (str, ""),
    "temperature": (float, 0.01),
    "pack": (int, 1),
    "teachers": (list, []),
}
SAID = ("epochs", "lr_net", "batch_train", "temperature", "lr_schedule")


def _check_meta(path, meta):
    """What the scripts read of `meta` must be of its kind, where it is there."""
    kinds = {
        "flags": dict,
        "dataset": str,
        "threat_model": str,
        "packed": bool,
        "pack": int,
        "zca": bool,
        "mean": list,
        "std": list,
        "recipe": dict,
        "classes": list,
        "run": str,
        "method": str,
        "model": str,
    }
    flags = meta.get("flags", {})
    found = {key: (meta[key], kind) for key, kind in kinds.items() if key in meta}
    if isinstance(flags, dict) and "model" in flags:
        found["flags.model"] = flags["model"], str
    for key, (value, kind) in found.items():
        numbers = kind is list and key != "classes"
        if (
            not isinstance(value, kind)
            or numbers
            and not all(isinstance(x, (int, float)) for x in value)
            or key == "pack"
            and (isinstance(value, bool) or value not in (1, *PACKS))
        ):
            raise InputError(
                f"{path}: {key} of its meta is {str(value)[:60]!r}, no {kind.__name__}"
                + (" of numbers" if numbers else " of 1, 2, 4, 8" if key == "pack" else "")
            )
    if min(meta.get("std", [1])) <= 0:
        raise InputError(f"{path}: std of its meta is {meta['std']}; expected numbers above 0")
    recipe = meta.get("recipe", {})
    for key, (kind, least) in RECIPE.items():
        value, number = recipe.get(key, least), kind in (int, float)
        if (
            not isinstance(value, (int, float) if kind is float else kind)
            or isinstance(value, bool)
            or number
            and not least <= value < float("inf")
        ):
            raise InputError(
                f"{path}: {key} of its recipe is {str(value)[:60]!r}; expected {kind.__name__}"
                + (f" of at least {least}" if number else "")
            )
    if recipe.get("pack", pack_of(meta)) != pack_of(meta):
        raise InputError(
            f"{path}: its recipe trains on images packed {recipe['pack']}x{recipe['pack']}, its "
            f"meta says {pack_of(meta)}x{pack_of(meta)}"
        )


def _checked_set(name, images, labels, soft, pack):
    """(SyntheticSet, the kind of its labels, whether its classes are derived, whether its images
    are bytes).
    """
    try:
        images, labels = torch.as_tensor(images).detach(), torch.as_tensor(labels).detach()
        soft = None if soft is None else torch.as_tensor(soft).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{name} is no pair of images and labels ({reason(error)})") from None
    derived = labels.dim() == 2 and labels.is_floating_point() and labels.shape[1] > 1
    if derived:  # soft labels in place of the hard ones
        soft, labels = (labels if soft is None else soft), labels.argmax(1)[: len(images)]
    labels = labels.flatten() if labels.dim() == 2 and labels.shape[1] == 1 else labels
    as_bytes = images.dtype == torch.uint8
    if (
        images.dim() != 4
        or not (images.is_floating_point() or as_bytes)
        or labels.shape != images.shape[:1]
        or len(labels) == 0
    ):
        raise InputError(
            f"{name}: images are {images.dtype} {tuple(images.shape)}, labels "
            f"{tuple(labels.shape)}; expected "
            "floats or bytes (N, C, H, W) and (N,), or soft labels (N, classes)"
        )
    if (
        labels.is_floating_point()
        and not torch.equal(labels, labels.round())
        or labels.is_complex()
    ):
        raise InputError(
            f"{name}: labels are no whole numbers; soft labels have a column for each class"
        )
    if not images.isfinite().all():
        raise InputError(
            f"{name}: {int((~images.isfinite()).sum())} values of the images are not finite"
        )
    if images.shape[2] % pack or images.shape[3] % pack:
        raise InputError(
            f"{name}: images of {images.shape[2]}x{images.shape[3]} cannot be packed {pack}x{pack}"
        )
    soft, kind = _logits(name, soft, len(images) * pack**2, pack)
    return SyntheticSet(images.float().contiguous(), labels.long(), soft), kind, derived, as_bytes


def _logits(name, soft, count, pack):
    """Soft labels as logits, checked, and what they were: rows of probabilities become their
    logarithms.
    """
    if soft is None:
        return None, "hard labels"
    if soft.dim() != 2 or not soft.is_floating_point() or len(soft) != count or soft.shape[1] < 2:
        raise InputError(
            f"{name}: soft labels are {soft.dtype} {tuple(soft.shape)}; expected floats ({count}, "
            f"classes), one row for each training image"
            + (f" ({pack}x{pack} in each stored image)" if pack > 1 else "")
        )
    if not soft.isfinite().all():
        raise InputError(
            f"{name}: {int((~soft.isfinite()).sum())} values of the soft labels are not finite"
        )
    soft = soft.float().contiguous()
    total = soft.sum(1, keepdim=True)
    if (soft >= 0).all() and (total - 1).abs().max() < TOLERANCE:
        return (soft / total).clamp(min=1e-12).log(), "soft labels (probabilities)"
    return soft, "soft labels (logits)"


# ------------------------------------------------------------------------------------------ writing
def save_synset(path, sets, rows, meta):
    """Write synthetic sets in the DC layout, soft labels beside it, plus `meta`; read it with
    torch.load(path, weights_only=True).

    sets: a SyntheticSet an experiment, all of them with soft labels or none. rows: of an Evaluator;
    their robust accuracy is `accs_all_exps`, as in the published files, the clean one is in `meta`.
    meta: plain Python values. Source: SPEC 3.5.
    """
    accs = {
        key: {model: columns[key] for model, columns in by_model(rows).items()}
        for key in ("robust_acc", "clean_acc")
    }
    content = {
        "data": [
            [one.images.detach().float().cpu().clone(), one.labels.cpu().clone()] for one in sets
        ]
    }
    if sets[0].soft_labels is not None:
        content["soft_labels"] = [one.soft_labels.detach().float().cpu().clone() for one in sets]
    write_tensors(
        path,
        {
            **content,
            "accs_all_exps": accs["robust_acc"],
            "meta": {**meta, "clean_accs": accs["clean_acc"]},
        },
    )
