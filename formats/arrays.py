"""Images and labels of anybody's data set, in one form: bytes, height x width x channels, labels
from 0.

`standard_arrays` is passed by every loader of datasets; it says what it changed and refuses
what is not clear.
"""

from pathlib import Path

import numpy as np

from runtime.safe_io import InputError, read_npz

SPLITS = ("train", "test")
CHANNELS = (1, 3)
TEST_FOLDERS = ("test", "val", "valid", "validation")
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


def standard_arrays(where, arrays):
    """Images and labels as all loaders return them.

    where: the name of the file, for messages. arrays: x_train, y_train, x_test, y_test and, if
    there are names, classes.
        Images are (N, H, W, C), (N, C, H, W) or, grey, (N, H, W), with 1 or 3 channels: bytes, or
        floats in [0, 1] or whole ones up to 255. Labels are whole numbers from 0, (N,) or (N, 1).
    Returns (arrays, notes): x_* uint8 (N, H, W, C), y_* int64 (N,), classes a list of str; a
    sentence for each change. Raises InputError that names the array and what is expected.
    """
    found, notes = {}, []
    for split in SPLITS:
        images, its_notes = _images(f"{where}: x_{split}", np.asarray(arrays[f"x_{split}"]))
        found[f"x_{split}"] = images
        found[f"y_{split}"] = _labels(
            f"{where}: y_{split}", np.asarray(arrays[f"y_{split}"]), len(images)
        )
        notes += [note for note in its_notes if note not in notes]
    if found["x_train"].shape[1:] != found["x_test"].shape[1:]:
        raise InputError(
            f"{where}: training images are {found['x_train'].shape[1:]}, test images "
            f"{found['x_test'].shape[1:]}"
        )
    largest = max(int(found[f"y_{split}"].max()) for split in SPLITS)
    classes = np.asarray(arrays.get("classes", range(largest + 1))).astype(str).ravel().tolist()
    for split in SPLITS:
        labels = found[f"y_{split}"]
        if labels.min() < 0 or labels.max() >= len(classes):
            raise InputError(
                f"{where}: y_{split} has labels outside 0..{len(classes) - 1}: {labels.min()} to "
                f"{labels.max()}"
            )
    missing = sorted(set(range(len(classes))) - set(found["y_train"].tolist()))
    if missing or len(classes) < 2:
        raise InputError(
            f"{where}: {len(classes)} class(es), "
            + (
                f"class {classes[missing[0]]} has no training image"
                if missing
                else "at least 2 are needed"
            )
        )
    return {**found, "classes": classes}, notes


def _images(name, x):
    """One array of images in standard form, and notes."""
    notes, expected = [], "expected images (N, H, W, 3), (N, H, W, 1), (N, H, W) or (N, C, H, W)"
    if x.ndim == 3:
        x = x[..., None]
    if x.ndim != 4 or len(x) == 0:
        raise InputError(f"{name} is {x.dtype} {x.shape}; {expected}")
    if x.shape[3] not in CHANNELS:
        if x.shape[1] not in CHANNELS:
            raise InputError(f"{name} is {x.dtype} {x.shape}; {expected}")
        x = x.transpose(0, 2, 3, 1)
        notes.append("images given as (N, C, H, W)")
    if x.dtype != np.uint8:
        if not (np.issubdtype(x.dtype, np.number) and np.isrealobj(x) and np.isfinite(x).all()):
            raise InputError(
                f"{name} is {x.dtype}, or has values that are not finite; expected bytes, or "
                "floats in [0, 1]"
            )
        low, high = float(x.min()), float(x.max())
        whole = bool((x == np.round(x)).all())
        if low < 0 or high > 255 or high > 1 and not whole:
            raise InputError(
                f"{name} is {x.dtype} with values from {low:.4g} to {high:.4g}; expected bytes, "
                "floats in [0, 1], or whole numbers up to 255, without a normalisation"
            )
        if high <= 1:
            x = np.asarray(x, np.float64) * 255
            notes.append("pixels given in [0, 1]")
        x = np.round(x).astype(np.uint8)
    return np.ascontiguousarray(x), notes


def _labels(name, y, count):
    """Labels as int64 (count,)."""
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.shape != (count,):
        raise InputError(f"{name} is {y.dtype} {y.shape} for {count} images; expected ({count},)")
    if not np.issubdtype(y.dtype, np.number) or not np.isrealobj(y) or not (y == np.round(y)).all():
        raise InputError(f"{name} is {y.dtype}; expected whole numbers from 0")
    return y.astype(np.int64)


def read_arrays(path):
    """The arrays of a `.npz` file, or of a folder of pictures, as `standard_arrays` takes them.

    path: a file with x_train, y_train, x_test, y_test and perhaps classes; or a folder
    train/<class>/*.png beside
        test/<class>/*.png (or val/).
    """
    path = Path(path)
    if not path.is_dir():
        return read_npz(path, ("x_train", "y_train", "x_test", "y_test"), optional=("classes",))
    tests = [path / name for name in TEST_FOLDERS if (path / name).is_dir()]
    if not (path / "train").is_dir() or not tests:
        raise InputError(
            f"--dataset {path}: a folder of pictures has train/<class>/ and test/<class>/"
        )
    x_train, y_train, classes = read_class_folders(path / "train")
    x_test, y_test, test_classes = read_class_folders(tests[0])
    if classes != test_classes:
        raise InputError(f"--dataset {path}: the classes of {tests[0].name} are not those of train")
    return {
        "x_train": x_train,
        "y_train": y_train,
        "x_test": x_test,
        "y_test": y_test,
        "classes": classes,
    }


def read_class_folders(folder):
    """Pictures in a folder for each class: ((N, H, W, C) uint8, (N,) int64, names of the classes,
    sorted).

    Pictures are grey if all of them are, else RGB. Raises InputError for a folder without any, one
    that is no picture, or pictures of different sizes.
    """
    classes = sorted(
        entry.name
        for entry in folder.iterdir()
        if entry.is_dir() and not entry.name.startswith(".")
    )
    files = [
        (path, c)
        for c, name in enumerate(classes)
        for path in sorted((folder / name).iterdir())
        if path.suffix.lower() in PICTURES
    ]
    if not files:
        raise InputError(
            f"{folder} has no folders of pictures ({', '.join(PICTURES)}), one for each class"
        )
    images = read_pictures([path for path, _ in files])
    return images, np.array([c for _, c in files]), classes


def read_pictures(paths):
    """Pictures of one size as an array, (N, H, W, C) uint8; C is 1 if all of them are grey."""
    from PIL import Image

    opened = []
    for path in paths:
        try:
            with Image.open(path) as picture:
                opened.append(picture.convert("L" if picture.mode in ("1", "L") else "RGB"))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise InputError(f"{path} is no picture ({error})") from None
        if opened[-1].size != opened[0].size:
            raise InputError(
                f"{path} is {opened[-1].size[0]}x{opened[-1].size[1]} pixels, {paths[0]} "
                f"{opened[0].size[0]}x{opened[0].size[1]}; all must be of one size"
            )
    mode = "L" if all(picture.mode == "L" for picture in opened) else "RGB"
    images = np.stack([np.asarray(picture.convert(mode)) for picture in opened])
    return images if images.ndim == 4 else images[..., None]
