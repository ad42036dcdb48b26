"""Fixtures. No network and no data file is needed; what lies in ../shared or data/ is used."""
import os
import random
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
sys.path.insert(0, str(ROOT))
if "ROME_TESTS_ON_GPU" not in os.environ:  # tests/gpu.py sets it; all others are for a CPU
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

from datasets import DATASETS, Dataset, load_dataset  # noqa: E402
from formats.synset_file import read_synset  # noqa: E402
from runtime.compilation import keep_freed_memory  # noqa: E402

keep_freed_memory()  # as the scripts do; a third of the time
SEED = 1729  # of no generator in the tests


def pytest_fixture_setup():
    """Fixtures and tests draw the same numbers in any order and on any worker."""
    torch.manual_seed(SEED)
    np.random.seed(SEED)
    random.seed(SEED)


pytest_runtest_call = pytest_fixture_setup


def random_dataset(num_classes=10, per_class=8, seed=0, device="cpu"):
    """A Dataset of random images, with CIFAR's normalisation."""
    rng = np.random.default_rng(seed)
    labels = torch.arange(num_classes).repeat(per_class)
    images = {split: torch.from_numpy(rng.integers(0, 256, (len(labels), 3, 32, 32), np.uint8))
              for split in ("train", "test")}
    return Dataset("random", images, {"train": labels, "test": labels},
                   [str(c) for c in range(num_classes)], device=device, **DATASETS["CIFAR10"])


def sets_and_meta(path, packed=1):
    """What a file of sets holds, before its images are looked at."""
    file = read_synset(path, packed)
    return file.sets, file.meta


def run_main(script, *arguments):
    """A script in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, arguments)])
        script.main()


def real_images(data, ipc):
    """The same training images of each class, class-major."""
    return torch.cat([data.sample_class(c, ipc, torch.Generator().manual_seed(c))
                      for c in range(data.num_classes)])


def write_set(path, images, labels, **meta):
    """A file of one set in the DC layout."""
    torch.save({"data": [[images, labels]], "meta": meta}, path)
    return path


def run_in(monkeypatch, script, folder, *flags):
    """The main of a script in this process, its files under `folder`."""
    folder.mkdir(exist_ok=True)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, flags)])
    script.main()


def call_before(setattr, owner, name, calls, action):
    """action() before those calls, from 1, of the function `name` of `owner`.

    setattr: that of a monkeypatch. Returns a list that grows with each call.
    """
    function, done = getattr(owner, name), []

    def disturbed(*args, **options):
        done.append(args)
        if len(done) in calls:
            action()
        return function(*args, **options)
    setattr(owner, name, disturbed)
    return done


def sigterm_at(monkeypatch, owner, name, call):
    """SIGTERM to this process before that call (from 1) of the function `name` of `owner`."""
    call_before(monkeypatch.setattr, owner, name, [call],
                lambda: os.kill(os.getpid(), signal.SIGTERM))


@pytest.fixture(scope="session")
def digits():
    return load_dataset("Digits", "no folder needed")


@pytest.fixture(scope="session")
def cifar_like(tmp_path_factory):
    """A data folder: a cifar10.npz of 200 training and 100 test images of ten easy classes."""
    return write_cifar_like(tmp_path_factory.mktemp("data"), 200, 100)


def write_cifar_like(folder, train, test, classes=10):
    """Write `folder`/cifar<classes>.npz: so many images of easy classes."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    arrays = {"classes": np.array([f"class{c}" for c in range(classes)])}
    base = rng.integers(40, 216, (classes, 4, 4, 3)).repeat(8, 1).repeat(8, 2)  # (., 32, 32, 3)
    for split, n in (("train", train), ("test", test)):
        y = np.arange(n) % classes
        noise = rng.integers(-40, 40, (n, 32, 32, 3))
        arrays[f"x_{split}"] = (base[y] + noise).astype(np.uint8)
        arrays[f"y_{split}"] = y.astype(np.uint8)
    np.savez(folder / f"cifar{classes}.npz", **arrays)
    return folder


@pytest.fixture(scope="session")
def cifar10_npz(tmp_path_factory):
    """The folder of the real cifar10.npz, unpacked from ../shared if need be, or skip."""
    if (ROOT / "data" / "cifar10.npz").exists():
        return ROOT / "data"
    if not (SHARED / "data" / "unpack.py").exists():
        pytest.skip("no data/cifar10.npz and no ../shared/data here")
    import subprocess
    folder = tmp_path_factory.mktemp("cifar10")
    subprocess.run([sys.executable, SHARED / "data" / "unpack.py", "--out", folder, "--dataset",
                    "cifar10"], check=True)
    return folder
