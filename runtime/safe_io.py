"""Reading files that somebody else wrote, without executing anything in them, and writing ours, never half.

Sets and networks travel as `.pt`, `.pth` and `.pkl` files, which are pickles and may hold code. Here a `.pt` is read by torch's
restricted loader, a `.pkl` by an unpickler that admits tensors, arrays, numbers and containers; what else is in a file is
refused by its name. Formats: SPEC 3.5.
"""
import collections
import hashlib
import io
import json
import math
import os
import pickle
import pickletools
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch

MAX_BYTES = 2 << 30  # of a file, packed or unpacked; CIFAR-100 at 50 images a class is 61 MB


class InputError(ValueError):
    """Something a user gave cannot be used; the message names the value and the choices."""


# ------------------------------------------------------------------------------------------------------ untrusted pickles
def _numpy_scalar(dtype, data=None):
    if not isinstance(dtype, np.dtype) or dtype.hasobject:
        raise pickle.UnpicklingError("a numpy scalar of objects")
    return np.frombuffer(data, dtype, 1)[0]


def _empty_array(kind, shape, typecode):
    """numpy's first step of reading an array: always empty, the contents follow."""
    return np.ndarray.__new__(np.ndarray, (0,), "b")


def _latin1(text, encoding):
    """How old pickle protocols write bytes."""
    return text.encode("latin1")


def _storage(data):
    """A tensor's storage inside a pickle is a torch file of its own."""
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


# What a .pkl may call: (module, name) -> what is called for it.
ADMITTED = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("_codecs", "encode"): _latin1,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch.storage", "_load_from_bytes"): _storage,
    ("torch", "Size"): torch.Size,
    ("numpy", "ndarray"): "the type to reconstruct",  # an argument of _reconstruct; as a class it could ask for any memory
    ("numpy", "dtype"): np.dtype,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _empty_array for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _numpy_scalar for core in ("core", "_core")},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module, name):
        if (module, name) not in ADMITTED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return ADMITTED[module, name]


def _read_pickle(path):
    with open(path, "rb") as file:
        # The unpickler makes its memo as long as the largest index in the file: one wrong bit, and that is gigabytes.
        for opcode, index, _ in pickletools.genops(file):
            if "PUT" in opcode.name and index > path.stat().st_size:
                raise pickle.UnpicklingError(f"its memo has an entry {index}, the file is shorter")
        file.seek(0)
        return _Unpickler(file).load()


class _Array:
    """A numpy array in a torch file, while it is read: takes the state that numpy pickles, and no memory before that."""

    def __init__(self, *ignored):
        self.array = np.zeros(0)

    def __setstate__(self, state):
        _, shape, dtype, fortran, data = state
        if not isinstance(dtype, np.dtype) or dtype.hasobject or not isinstance(data, bytes):
            raise pickle.UnpicklingError("a numpy array of objects")
        self.array = np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C").copy()


def _admitted_in_torch_files():
    """numpy numbers, which the published files keep their accuracies in, and numpy arrays."""
    scalar, kinds = np.float64(0).__reduce__()[0], {type(np.dtype(code)) for code in "?bBhHiIlLqQefd"}
    return [np.dtype, *kinds, (_Array, "numpy.ndarray"),
            *((scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
            *((_Array, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core"))]


def _with_arrays(content, done):
    """`content` with numpy arrays in place of each _Array. done: {id: the result}, each object once."""
    if id(content) not in done:
        if isinstance(content, _Array):
            done[id(content)] = content.array
        elif type(content) in (list, tuple):
            done[id(content)] = type(content)(_with_arrays(part, done) for part in content)
        elif type(content) is dict:
            done[id(content)] = {key: _with_arrays(value, done) for key, value in content.items()}
        else:
            done[id(content)] = content
    return done[id(content)]


def _bytes_of_tensors(content, seen):
    """Each object once: lists of lists of the same list would otherwise take for ever. seen: ids, grows."""
    if id(content) in seen:
        return 0
    seen.add(id(content))
    if isinstance(content, torch.Tensor):
        return content.numel() * content.element_size()
    if isinstance(content, dict):
        content = content.values()
    elif not isinstance(content, (list, tuple)):
        return 0
    return sum(_bytes_of_tensors(part, seen) for part in content)


def _check_archive(path, max_bytes, checksums=True):
    """Refuse an empty or too large file, an archive that would unpack to more than max_bytes, and one with wrong checksums
    (torch does not look at them; zipfile does, of what it reads to the end)."""
    size = path.stat().st_size
    if size == 0:
        raise InputError(f"{path} is damaged: it is empty")
    declared = size
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            declared = sum(entry.file_size for entry in archive.infolist())
    if max(size, declared) > max_bytes:
        raise InputError(f"{path} would take {max(size, declared) / 2**30:.1f} GiB; more than {max_bytes >> 30} GiB is refused")
    if checksums and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            wrong = archive.testzip()
        if wrong:
            raise InputError(f"{path} is damaged: the checksum of {wrong} in it is wrong")


def read_tensors(path, max_bytes=None):
    """The content of a .pt, .pth or .pkl file, on the CPU. Nothing in the file is executed.

    max_bytes: of the file, packed or unpacked; default MAX_BYTES.
    Raises InputError, with what was refused, if the file is missing, damaged, too large, or holds anything but tensors,
    arrays, numbers, strings and containers.
    """
    path = Path(path)
    try:
        _check_archive(path, max_bytes or MAX_BYTES)
        if path.suffix == ".pkl":
            content = _read_pickle(path)
        else:
            with torch.serialization.safe_globals(_admitted_in_torch_files()):
                content = _with_arrays(torch.load(path, map_location="cpu", weights_only=True), {})
        claimed = _bytes_of_tensors(content, set())
        if claimed > (max_bytes or MAX_BYTES):  # strides of 0 make much of little
            raise InputError(f"{path} is refused: its tensors would take {claimed / 2**30:.1f} GiB")
        return content
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except pickle.UnpicklingError as error:
        raise InputError(f"{path} is refused, nothing in it was executed: {reason(error)}") from None
    except Exception as error:  # a damaged pickle may raise anything
        raise InputError(f"{path} cannot be read ({type(error).__name__}: {reason(error)}); it may be damaged, or "
                         "another kind of file") from None


def read_npz(path, names, optional=(), max_bytes=None):
    """The arrays called `names` of a .npz file, and those of `optional` that are there, {name: array}. Raises InputError if it
    is damaged, has not all of them, holds objects, or declares another size than it has."""
    path = Path(path)
    try:
        _check_archive(path, max_bytes or MAX_BYTES, checksums=False)
        arrays = {}
        with zipfile.ZipFile(path) as archive:
            there = archive.namelist()
            for name in (*names, *(name for name in optional if f"{name}.npy" in there)):
                with archive.open(f"{name}.npy") as member:
                    version = np.lib.format.read_magic(member)
                    read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
                    shape, _, dtype = read_header[version](member)
                    size = archive.getinfo(f"{name}.npy").file_size - member.tell()
                    if dtype.hasobject or math.prod(shape) * dtype.itemsize != size:
                        raise ValueError(f"{name} is declared as {dtype} {shape}, {size} bytes follow")
                with archive.open(f"{name}.npy") as member:
                    arrays[name] = np.lib.format.read_array(member, allow_pickle=False)
        return arrays
    except InputError:
        raise
    except Exception as error:  # a damaged archive may raise anything
        raise InputError(f"{path} is damaged or no data file of ours ({reason(error)})") from None


def keys_of(content):
    """The first keys of a dict, for a message."""
    return ", ".join(map(repr, list(content)[:5])) + (" ..." if len(content) > 5 else "")


def reason(error):
    """The telling line of an error message; torch's run over a page."""
    text = str(error).split("WeightsUnpickler error:")[-1]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    telling = [line for line in lines if "GLOBAL" in line or "asks for" in line or "Unsupported" in line]
    return (telling or lines or ["no reason given"])[0][:300]


def sha256(path):
    """The checksum of a file."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


# ---------------------------------------------------------------------------------------------------------------- writing
def write_atomically(path, write):
    """Call `write(partial path)` and then give the file its name, so that `path` is never half written.

    The partial name ends as `path` does, since some writers look at the ending.
    """
    path = Path(path)
    partial = path.with_name(f".partial-{os.getpid()}-{path.name}")
    try:
        write(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def reason_of_failed_write(error):
    """Why the system could not write. torch hides it: its RuntimeError has the system's error among its causes."""
    cause = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror[0].lower() + cause.strerror[1:]
        cause = cause.__cause__ or cause.__context__
    return str(error).splitlines()[0]


def write_tensors(path, content):
    """torch.save, atomically, with the same bytes for the same content: torch puts the name of a file into it, and pickle
    which equal strings are one object. Raises OSError, with the system's reason, if it cannot be written."""
    def write(partial):
        with open(partial, "wb") as file:
            torch.save(_canonical(content), file)
    try:
        write_atomically(path, write)
    except RuntimeError as error:
        raise OSError(f"cannot write {path} ({reason_of_failed_write(error)})") from None


def _canonical(content):
    """Fresh containers, one object for equal strings."""
    if isinstance(content, dict):
        return {_canonical(key): _canonical(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return type(content)(_canonical(value) for value in content)
    return sys.intern(content) if isinstance(content, str) else content


def write_text(path, text):
    """Write a text file, atomically."""
    write_atomically(path, lambda partial: partial.write_text(text, encoding="utf-8", errors="backslashreplace"))


def write_json(path, content):
    """Write `content` as JSON, atomically."""
    write_text(path, json.dumps(content, indent=1) + "\n")
