"""export.py: what reads each layout elsewhere finds the same images and labels in it."""
import csv
import importlib.machinery
import sys
import types

import numpy as np
import pytest
import torch
from conftest import sets_and_meta
from PIL import Image

import export
from augment import pack, unpack
from formats.synset_file import SyntheticSet, save_synset
from runtime.safe_io import InputError

MEAN, STD = [0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010]


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """The path of two sets, ipc 1, packed 2x2, with soft labels and a recipe; the second set."""
    sets = []
    for _ in range(2):
        pixels = torch.rand(40, 3, 32, 32)
        images = (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
        sets.append(SyntheticSet(pack(images), torch.arange(10), torch.randn(40, 10)))
    teacher = {"model": "ConvNetW32", "sha256": "ab" * 32, "clean_acc": 0.57}
    recipe = {"epochs": 50, "lr_net": 0.05, "batch_train": 64, "dsa_strategy": "flip_crop",
              "temperature": 3.0, "lr_schedule": "cosine", "pack": 2,
              "teachers": [[teacher], [teacher, teacher]]}
    meta = {"dataset": "CIFAR10", "packed": True, "pack": 2, "zca": False, "mean": MEAN, "std": STD,
            "threat_model": "pixel", "classes": [f"class {c}" for c in range(10)],
            "flags": {"method": "ROME", "model": "ConvNetW32"}, "recipe": recipe}
    path = tmp_path_factory.mktemp("set") / "res.pt"
    save_synset(path, sets, [], meta)
    return path, sets[1]


@pytest.fixture
def run(stored, tmp_path, monkeypatch):
    """Call export.py in this process, for the second set; returns its folder."""
    def run(*arguments, path=stored[0]):
        argv = ["export.py", str(path), str(tmp_path / "out"), "--index", "1", *arguments]
        monkeypatch.setattr(sys, "argv", argv)
        export.main()
        return tmp_path / "out"
    return run


@pytest.mark.parametrize("layout", export.LAYOUTS)
def test_hard_labels(stored, run, layout):
    out = run("--to", layout, "--hard")
    (read,), meta = sets_and_meta(out)
    assert layout == "folder" or torch.equal(read.images, unpack(stored[1].images))
    assert torch.equal(read.labels, stored[1].labels.repeat(4)) and read.soft_labels is None
    assert (meta["pack"], meta["packed"], meta["recipe"]["pack"]) == (1, False, 1)
    assert (meta["stored"], meta["stored_pack"]) == (10, 2)
    assert len(meta["recipe"]["teachers"]) == 1  # of this set
    card = (out / "README.md").read_text()
    assert card.count("ab" * 32) == 2 and "10 images, each of 2x2 sub-images" in card


def test_dc(stored, run, tmp_path):
    """As DC and BEARD read it; kept packed; into a folder that is empty, and no other."""
    (tmp_path / "out").mkdir()
    out = run("--to", "dc", "--keep_packed")
    content = torch.load(out / "res_ROME_CIFAR10_ConvNetW32_1ipc.pt")
    images, labels = content["data"][0]
    assert torch.equal(images, stored[1].images) and labels.dtype == torch.int64
    (read,), meta = sets_and_meta(out)
    assert all(torch.equal(a, b) for a, b in zip(read, stored[1]))
    assert (meta["pack"], meta["packed"], meta["recipe"]["pack"]) == (2, True, 2)
    with pytest.raises(InputError, match="exists and is not empty"):
        run("--to", "dc")


def test_ddranking(run, monkeypatch):
    """The package's loss on the files has the gradient of ours.

    It imports timm, pandas and yaml, but does not call them here.
    """
    for name in ("timm", "pandas", "yaml"):
        stand_in = types.ModuleType(name)
        stand_in.__spec__ = importlib.machinery.ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, stand_in)
    from ddranking import KLDivergenceLoss

    from synsets import label_loss
    out = run("--to", "ddranking")
    images, labels, lr = (torch.load(out / f"{name}.pt") for name in ("images", "labels", "lr"))
    assert float(lr) == pytest.approx(0.05)
    logits = torch.nn.Linear(3072, 10)(images.flatten(1)).detach().requires_grad_()
    losses = [label_loss(logits, labels, temperature=3.0),
              KLDivergenceLoss(temperature=3.0, scale_loss=True)(logits, labels)]
    ours, theirs = (torch.autograd.grad(loss, logits)[0] for loss in losses)
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_folder(stored, run):
    out = run("--to", "folder")
    rows = list(csv.DictReader((out / "labels.csv").open()))
    pixels = np.stack([np.asarray(Image.open(out / row["file"])) for row in rows]) / 255
    expected = unpack(stored[1].images).permute(0, 2, 3, 1).numpy() * STD + MEAN
    assert np.abs(pixels - expected).max() <= 0.5 / 255 + 1e-6
    assert (rows[3]["label"], rows[3]["class"]) == ("3", "class 3")
    assert float(rows[5]["logit_7"]) == pytest.approx(stored[1].soft_labels[5, 7].item())


@pytest.mark.parametrize("flags, message", [
    ([], "is unknown; .*--dataset"),
    (["--dataset", "CIFAR10", "--index", "1"], "--index 1: .* has 1 set"),
    (["--dataset", "grey.npz"], "its images have 3 channel"),
    (["--dataset", "CIFAR10", "--keep_packed"], "folder cannot"),
    (["--dataset", "CIFAR10", "--zca"], "no pixels"),
    (["--dataset", "CIFAR10", "--zca", "--images", "pixels"], "holds pixels and does not say"),
])
def test_refused(run, tmp_path, tmp_path_factory, monkeypatch, flags, message):
    torch.save({"data": [[torch.rand(10, 3, 32, 32), torch.arange(10)]]}, tmp_path / "res.pt")
    pixels, labels = np.random.rand(10, 8, 8), np.arange(10)
    monkeypatch.chdir(tmp_path_factory.mktemp("data"))
    np.savez("grey.npz", x_train=pixels, y_train=labels, x_test=pixels, y_test=labels)
    with pytest.raises(InputError, match=message):
        run("--to", "folder", "--index", "0", *flags, path=tmp_path / "res.pt")
    assert len(list(tmp_path.iterdir())) == 1  # nothing that would block the next try
