"""Files of strangers: nothing is executed, nothing fills the memory; ours are written whole."""
import io
import os
import pickle
import re
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import sets_and_meta
from test_formats import IMAGES, LABELS

from datasets import load_dataset
from formats.network_file import load_into
from networks import get_network
from runtime import safe_io
from runtime.checkpoint import CheckpointFile
from runtime.safe_io import InputError, read_tensors, write_atomically, write_text


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("where", ["pkl", "pt", "old pt", "storage in pkl", "in a list"])
def test_code_is_refused_by_name_and_not_executed(tmp_path, where):
    evil = Call(os.system, f"touch {tmp_path / 'executed'}")
    path = tmp_path / ("set.pkl" if "pkl" in where else "set.pt")
    if "pkl" in where:
        inner = io.BytesIO()
        torch.save(evil, inner)
        storage = Call(torch.storage._load_from_bytes, inner.getvalue())
        path.write_bytes(pickle.dumps((IMAGES, evil if where == "pkl" else storage)))
    else:
        content = {"data": [[IMAGES, LABELS]], "evil": [evil] if where == "in a list" else evil}
        torch.save(content, path, _use_new_zipfile_serialization=where != "old pt")
    with pytest.raises(InputError, match=r"set\.(pkl|pt) .*(posix|nt)\.system"):
        read_tensors(path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("function", [eval, getattr, torch.load, np.fromfile, subprocess.Popen])
def test_nothing_but_data_is_admitted(tmp_path, function):
    (tmp_path / "set.pkl").write_bytes(pickle.dumps(Call(function, "x")))
    with pytest.raises(InputError, match=f"refused.*{function.__name__}"):
        read_tensors(tmp_path / "set.pkl")


@pytest.mark.parametrize("call", [
    Call(np.zeros(1).__reduce__()[0], np.ndarray, (1 << 40,), b"b"),
    Call(np.ndarray, (1 << 40,), "b"),
])
def test_an_array_cannot_ask_for_memory(tmp_path, call):
    """numpy's function and its class take a shape; ours are empty until the bytes are there."""
    (tmp_path / "set.pkl").write_bytes(pickle.dumps(call))
    assert read_tensors(tmp_path / "set.pkl").size == 0


def test_a_memo_index_cannot_ask_for_memory(tmp_path):
    """The C unpickler allocates its memo up to the largest index: 2**31 would be 32 GB."""
    (tmp_path / "set.pkl").write_bytes(b"\x80\x02]r" + (1 << 31).to_bytes(4, "little") + b".")
    with pytest.raises(InputError, match="memo has an entry 2147483648"):
        read_tensors(tmp_path / "set.pkl")


@pytest.mark.parametrize("suffix", ["pkl", "pt"])
def test_lists_of_lists_of_the_same_list(tmp_path, suffix):
    content = [torch.zeros(2)]
    for _ in range(60):
        content = [content, content]
    path = tmp_path / f"set.{suffix}"
    with open(path, "wb") as file:
        (pickle.dump if suffix == "pkl" else torch.save)(content, file)
    with pytest.raises(InputError, match=path.name):
        sets_and_meta(path)


def test_declared_sizes_are_checked_before_reading(tmp_path, monkeypatch):
    monkeypatch.setattr(safe_io, "MAX_BYTES", 1 << 20)
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/data.pkl", b"\0" * (8 << 20))
    assert (tmp_path / "bomb.pt").stat().st_size < 1 << 20
    with pytest.raises(InputError, match="bomb.pt would take"):
        read_tensors(tmp_path / "bomb.pt")


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.txt"
    write_text(path, "old")

    def fail(partial):
        partial.write_text("half")
        raise OSError("disk full")
    with pytest.raises(OSError):
        write_atomically(path, fail)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


# ---------------------------------------------------------------------------- 2 000 damaged files
def damaged(content, rng):
    """A random mutation of some bytes: cut off or out, noise, zeros, a piece doubled, flips."""
    bad = bytearray(content)
    at, length = int(rng.integers(len(bad))), int(rng.integers(1, 200))
    pieces = [(len(bad), b""), (length, b""), (length, rng.bytes(length)), (length, bytes(length)),
              (0, bad[at // 2:at // 2 + length])]
    kind = rng.integers(len(pieces) + 1)
    if kind < len(pieces):
        replaced, piece = pieces[kind]
        bad[at:at + replaced] = piece
    else:
        for i in rng.integers(0, len(bad), rng.integers(1, 9)):
            bad[i] ^= 1 << int(rng.integers(8))
    return bytes(bad)


def peak_memory(reset=False):
    """The largest resident memory of this process, in KiB, since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="reads Linux's /proc")
def test_two_thousand_damaged_files(tmp_path):
    """Every loader, every format: a clear error or a correct load, in less than 1 GB."""
    images, labels = IMAGES[:10, :, :8, :8].clone(), torch.arange(10)
    net = get_network("MLP", 3, 10, (8, 8), 0)
    data = {"data": [[images, labels]], "accs_all_exps": {"MLP": [np.float64(0.5)]}}
    for new, old, content in (("set.pt", "old.pt", data), ("net.pth", "old.pth", net.state_dict())):
        torch.save(content, tmp_path / new)
        torch.save(content, tmp_path / old, _use_new_zipfile_serialization=False)
    torch.save({"x": images, "progress": {}}, tmp_path / "state.pt")
    (tmp_path / "set.pkl").write_bytes(pickle.dumps((images, labels)))
    (tmp_path / "arrays.pkl").write_bytes(pickle.dumps((images.numpy(), labels.numpy())))
    pixels = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3)).astype(np.uint8)
    np.savez(tmp_path / "cifar10.npz", x_train=pixels, x_test=pixels[:5], y_test=np.arange(5),
             y_train=np.arange(20) % 10, classes=np.array(list("abcdefghij")))
    folder = tmp_path / "bad"
    folder.mkdir()
    loaders = {
        **dict.fromkeys(("set.pt", "old.pt", "set.pkl", "arrays.pkl"), sets_and_meta),
        **dict.fromkeys(("net.pth", "old.pth"), lambda path: load_into(net, path)),
        "state.pt": lambda path: CheckpointFile(path.parent).load(),
        "cifar10.npz": lambda path: load_dataset("CIFAR10", path.parent),
    }
    rng, before = np.random.default_rng(1), peak_memory(reset=True)
    refused = dict.fromkeys(loaders, 0)
    for name, load in loaders.items():
        content = (tmp_path / name).read_bytes()
        load(tmp_path / name)
        for _ in range(250):
            (folder / name).write_bytes(damaged(content, rng))
            try:
                load(folder / name)
            except InputError as error:
                refused[name] += 1
                assert name in str(error) and "\n" not in str(error)
        (folder / name).unlink()
    assert peak_memory() - before < 1 << 20
    # A format with checksums refuses nearly all of the 250, a bare pickle fewer.
    assert all(count > 25 for count in refused.values()), refused
    assert min(refused[name] for name in ("set.pt", "net.pth", "state.pt")) > 230
