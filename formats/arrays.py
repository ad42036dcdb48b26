"""Images and labels of any data set in one form: uint8 (N, H, W, C), class numbers from 0."""

from pathlib import Path

import numpy as np

from runtime.safe_io import InputError, read_npz

CHANNELS = (1, 3)
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


def standard_arrays(where, arrays):
    """Convert the arrays of a data set to the form that all loaders return.

    where: the name of the file. arrays: x_train, y_train, x_test, y_test and perhaps classes.
    Returns x_* uint8 (N, H, W, C), y_* int64 (N,), classes [str]; and a sentence for each
    conversion. Raises InputError that names the array.
    """
    result, notes = {}, []
    for split in ("train", "test"):
        x, y = f"x_{split}", f"y_{split}"
        result[x] = _images(f"{where}: {x}", np.asarray(arrays[x]), notes)
        result[y] = _labels(f"{where}: {y}", np.asarray(arrays[y]), len(result[x]))
    train, test = result["x_train"].shape[1:], result["x_test"].shape[1:]
    if train != test:
        raise InputError(f"{where}: training images are {train}, test images {test}")
    labels = np.concatenate([result["y_train"], result["y_test"]])
    low, high = labels.min(), labels.max()
    classes = np.asarray(arrays.get("classes", range(high + 1))).astype(str).ravel().tolist()
    if low < 0 or high >= len(classes) or len(classes) < 2:
        raise InputError(f"{where}: labels from {low} to {high}, {len(classes)} class(es)")
    counts = np.bincount(result["y_train"], minlength=len(classes))
    if not counts.all():
        raise InputError(f"{where}: class {classes[counts.argmin()]} has no training image")
    return {**result, "classes": classes}, list(dict.fromkeys(notes))


def _images(name, x, notes):
    """Images as uint8 (N, H, W, C)."""
    given = f"{name} is {x.dtype} {x.shape}"
    if x.ndim == 3:
        x = x[..., None]
    if x.ndim != 4 or len(x) == 0 or not {x.shape[1], x.shape[3]} & set(CHANNELS):
        raise InputError(f"{given}; expected (N, H, W, C), (N, C, H, W) or (N, H, W), C 1 or 3")
    if x.shape[3] not in CHANNELS:
        x = x.transpose(0, 2, 3, 1)
        notes.append("images given as (N, C, H, W)")
    if x.dtype == np.uint8:
        return np.ascontiguousarray(x)
    low, high = (x.min(), x.max()) if x.dtype.kind in "iuf" else (np.nan, np.nan)
    if not 0 <= low <= high <= 255 or high > 1 and (x != np.round(x)).any():
        expected = "bytes, floats in [0, 1] or whole numbers up to 255, not normalised"
        raise InputError(f"{given} with values from {low:.4g} to {high:.4g}; expected {expected}")
    if high <= 1:
        x = np.asarray(x, np.float64) * 255
        notes.append("pixels given in [0, 1]")
    return np.ascontiguousarray(np.round(x), np.uint8)


def _labels(name, y, count):
    """Labels as int64 (count,)."""
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.shape != (count,) or y.dtype.kind not in "iuf" or (y != np.round(y)).any():
        raise InputError(f"{name} is {y.dtype} {y.shape}; expected ({count},) whole numbers from 0")
    return y.astype(np.int64)


def read_arrays(path):
    """What `standard_arrays` takes, of a .npz file, or of a folder of pictures,
    train/<class>/*.png and test/<class>/*.png (or val/)."""
    path, splits = Path(path), ("x_train", "y_train", "x_test", "y_test")
    if not path.is_dir():
        return read_npz(path, splits, optional=("classes",))
    test = path / ("test" if (path / "test").is_dir() else "val")
    if not (test.is_dir() and (path / "train").is_dir()):
        raise InputError(f"--dataset {path}: a folder has train/<class>/ and test/<class>/")
    *arrays, classes = read_class_folders(path / "train")
    *test_arrays, test_classes = read_class_folders(test)
    if classes != test_classes:
        raise InputError(f"--dataset {path}: the classes of {test.name} are not those of train")
    return {**dict(zip(splits, [*arrays, *test_arrays])), "classes": classes}


def read_class_folders(folder):
    """Pictures in a folder for each class: images (N, H, W, C), labels (N,), sorted class names."""
    folders = [x for x in sorted(folder.iterdir()) if x.is_dir() and not x.name.startswith(".")]
    paths, labels = [], []
    for c, entry in enumerate(folders):
        pictures = [path for path in sorted(entry.iterdir()) if path.suffix.lower() in PICTURES]
        paths += pictures
        labels += [c] * len(pictures)
    if not paths:
        raise InputError(f"{folder} has no folders of pictures ({', '.join(PICTURES)}) for classes")
    return read_pictures(paths), np.array(labels), [entry.name for entry in folders]


def read_pictures(paths):
    """Pictures of one size as (N, H, W, C) uint8; C is 1 if all of them are grey, else 3."""
    from PIL import Image

    pictures = []
    for path in paths:
        try:
            with Image.open(path) as picture:
                pictures.append(picture.convert("L" if picture.mode in ("1", "L") else "RGB"))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise InputError(f"{path} is no picture ({error})") from None
        size, first = pictures[-1].size, pictures[0].size
        if size != first:
            raise InputError(f"{path} has {size} pixels, {paths[0]} {first}; expected one size")
    mode = "L" if all(picture.mode == "L" for picture in pictures) else "RGB"
    images = np.stack([np.asarray(picture.convert(mode)) for picture in pictures])
    return images[..., None] if images.ndim == 3 else images
