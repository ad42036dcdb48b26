"""Reads files that somebody else wrote without executing anything in them; writes files whole.

Sets and networks are pickles, which may hold code: torch's restricted loader reads .pt and .pth,
an unpickler that admits only data reads .pkl. Source: SPEC 3.5.
"""
import collections
import hashlib
import io
import json
import os
import pickle
import pickletools
import re
import sys
import zipfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

MAX_BYTES = 2 << 30  # of a file, packed or unpacked; CIFAR-100 at 50 images a class is 61 MB


class InputError(ValueError):
    """Something that a user gave cannot be used; the message names the value and the choices."""


class _Array(np.ndarray):
    """A numpy array that takes no memory before there is data, and holds no objects."""

    def __new__(cls, *ignored):
        return super().__new__(cls, 0)

    def __setstate__(self, state):
        for part in state:
            if isinstance(part, np.dtype):
                _check_dtype(part)
        super().__setstate__(state)


def _numpy_scalar(dtype, data):
    return np.frombuffer(data, _check_dtype(dtype), 1)[0]


def _check_dtype(dtype):
    if dtype.kind not in "biufcSU":
        raise pickle.UnpicklingError(f"it holds numpy objects of type {dtype}")
    return dtype


# What a file may ask for: {name: what it gets}. torch's loader admits tensors by itself.
NUMPY = {"numpy.dtype": np.dtype, "numpy.ndarray": _Array}
for _core in ("core", "_core"):  # numpy 1 and 2
    NUMPY[f"numpy.{_core}.multiarray._reconstruct"] = _Array
    NUMPY[f"numpy.{_core}.multiarray.scalar"] = _numpy_scalar
IN_PICKLES = {
    **NUMPY,
    "collections.OrderedDict": collections.OrderedDict,
    "_codecs.encode": lambda text, encoding: text.encode("latin1"),  # bytes of old protocols
    "torch.Size": torch.Size,
    "torch._utils._rebuild_tensor_v2": torch._utils._rebuild_tensor_v2,
    "torch.storage._load_from_bytes":  # a storage in a pickle is a torch file of its own
        lambda data: torch.load(io.BytesIO(data), map_location="cpu", weights_only=True),
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module, name):
        if f"{module}.{name}" not in IN_PICKLES:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return IN_PICKLES[f"{module}.{name}"]


def _read_pickle(path):
    with open(path, "rb") as file:
        # The unpickler's memo is as long as the largest index in the file, however large that is.
        for opcode, index, _ in pickletools.genops(file):
            if "PUT" in opcode.name and index > path.stat().st_size:
                raise pickle.UnpicklingError(f"its memo has an entry {index}, the file is shorter")
        file.seek(0)
        return _Unpickler(file).load()


def _read_torch(path):
    admitted = [(value, name) for name, value in NUMPY.items()]
    admitted += {type(np.dtype(code)) for code in "?bBhHiIlLqQefd"}
    with torch.serialization.safe_globals(admitted):
        return torch.load(path, map_location="cpu", weights_only=True)


def _tensor_bytes(content, seen):
    """Bytes of all tensors. seen: ids; nested lists of one list would take for ever without."""
    if id(content) in seen:
        return 0
    seen.add(id(content))
    if isinstance(content, torch.Tensor):
        return content.numel() * content.element_size()
    if isinstance(content, dict):
        content = content.values()
    elif not isinstance(content, (list, tuple)):
        return 0
    return sum(_tensor_bytes(part, seen) for part in content)


def _check_size(path, size, max_bytes=None):
    limit = max_bytes or MAX_BYTES
    if size > limit:
        raise InputError(f"{path} would take {size / 2**30:.1f} GiB; more than {limit / 2**30:g} "
                         "GiB is refused")


def _check_file(path, max_bytes=None, checksums=False):
    """Refuse an empty file, one that is or unpacks to more than max_bytes, and a wrong checksum."""
    size = path.stat().st_size
    if size == 0:
        raise InputError(f"{path} is damaged: it is empty")
    _check_size(path, size, max_bytes)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            _check_size(path, sum(entry.file_size for entry in archive.infolist()), max_bytes)
            wrong = checksums and archive.testzip()  # torch does not look at them
        if wrong:
            raise InputError(f"{path} is damaged: the checksum of {wrong} in it is wrong")


@contextmanager
def _input_errors(path):
    """Turn whatever a damaged file raises into one InputError."""
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except pickle.UnpicklingError as error:
        raise InputError(f"{path} is refused, nothing was executed: {reason(error)}") from None
    except Exception as error:
        why = f"{type(error).__name__}: {reason(error)}"
        raise InputError(f"{path} is damaged or another kind of file ({why})") from None


def read_tensors(path, max_bytes=None):
    """The content of a .pt, .pth or .pkl file, on the CPU. Nothing in the file is executed.

    max_bytes: of the file, packed or unpacked; default MAX_BYTES. Raises InputError, which names
    the file, if it is missing, damaged or too large, or holds anything but tensors, arrays,
    numbers, strings and containers.
    """
    path = Path(path)
    with _input_errors(path):
        _check_file(path, max_bytes, checksums=True)
        content = _read_pickle(path) if path.suffix == ".pkl" else _read_torch(path)
        _check_size(path, _tensor_bytes(content, set()), max_bytes)  # strides of 0 are cheap
        return content


def read_npz(path, names, optional=()):
    """{name: array} of a .npz file: all of `names`, and those of `optional` that are there.

    Raises InputError if the file is damaged, too large, lacks a name or holds objects.
    """
    path = Path(path)
    with _input_errors(path):
        _check_file(path)
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in (*names, *optional)
                    if name in names or name in file}


def read_safetensors(path):
    """({name: tensor}, {name: text} of the header) of a .safetensors file. Raises InputError."""
    from safetensors import safe_open

    path = Path(path)
    with _input_errors(path):
        _check_file(path)
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}


def keys_of(content):
    """The first keys of a dict, for a message."""
    return ", ".join(map(repr, list(content)[:5])) + " ..." * (len(content) > 5)


def reason(error):
    """The telling line of an error message; torch's fill a page."""
    text = str(error).split("WeightsUnpickler error:")[-1]
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["no reason given"]
    telling = [line for line in lines if re.search("GLOBAL|asks for|Unsupported", line)]
    return (telling or lines)[0][:300]


def sha256(path):
    """The checksum of a file."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def sha256_of_tensors(tensors):
    """The checksum of the values of tensors, in order."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().numpy())
    return digest.hexdigest()


def write_atomically(path, write):
    """Call write(partial path), which ends as `path` does, then give that file its name."""
    path = Path(path)
    partial = path.with_name(f".partial-{os.getpid()}-{path.name}")
    try:
        write(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def reason_of_failed_write(error):
    """Why the system could not write: torch hides its error among the causes of a RuntimeError."""
    cause = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror[0].lower() + cause.strerror[1:]
        cause = cause.__cause__ or cause.__context__
    return str(error).splitlines()[0]


def write_tensors(path, content):
    """torch.save, atomically; the same content gives the same bytes. Raises OSError if it fails."""
    def write(partial):
        with open(partial, "wb") as file:  # torch would put the name of a path into the file
            torch.save(_canonical(content), file)
    try:
        write_atomically(path, write)
    except RuntimeError as error:
        raise OSError(f"cannot write {path} ({reason_of_failed_write(error)})") from None


def _canonical(content):
    """Fresh containers and one object for equal strings: pickle notes which are one object."""
    if isinstance(content, dict):
        return {_canonical(key): _canonical(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return type(content)(_canonical(value) for value in content)
    return sys.intern(content) if isinstance(content, str) else content


def write_text(path, text):
    """Write a text file, atomically."""
    write_atomically(path, lambda partial: partial.write_text(text, encoding="utf-8",
                                                              errors="backslashreplace"))


def write_json(path, content):
    """Write `content` as JSON, atomically."""
    write_text(path, json.dumps(content, indent=1) + "\n")
