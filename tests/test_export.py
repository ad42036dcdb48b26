"""export.py: every layout is read back equal, by what reads it elsewhere."""
import csv
import importlib.machinery
import json
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
def synset(tmp_path_factory):
    """Two sets of one image a class, 2x2 packed, with soft labels and a recipe. Returns the path and the second set."""
    g = torch.Generator().manual_seed(0)
    made = []
    for _ in range(2):
        pixels = torch.rand(40, 3, 32, 32, generator=g)
        images = pack((pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1))
        made.append(SyntheticSet(images, torch.arange(10), torch.randn(40, 10, generator=g)))
    teacher = {"model": "ConvNetW32", "sha256": "ab" * 32, "clean_acc": 0.57, "robust_acc": 0.25, "aa_acc": 0.2}
    meta = {"dataset": "CIFAR10", "packed": True, "pack": 2, "zca": False, "mean": MEAN, "std": STD, "threat_model": "pixel",
            "classes": [f"class {c}" for c in range(10)], "flags": {"method": "ROME", "model": "ConvNetW32"},
            "recipe": {"epochs": 50, "lr_net": 0.05, "batch_train": 64, "dsa_strategy": "flip_crop", "temperature": 3.0,
                       "lr_schedule": "cosine", "pack": 2, "teachers": [[teacher], [teacher]]}}
    path = tmp_path_factory.mktemp("set") / "res.pt"
    save_synset(path, made, [], meta)
    return path, made[1]


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["export.py", *map(str, arguments)])
    export.main()


def same(read, one):
    assert torch.equal(read.images, unpack(one.images)) and torch.equal(read.labels, one.labels.repeat(4))
    assert torch.equal(read.soft_labels, one.soft_labels)


def test_dc(synset, tmp_path, monkeypatch):
    path, one = synset
    run(monkeypatch, path, "--to", "dc", tmp_path / "out", "--index", 1)
    (file,) = (tmp_path / "out").glob("*.pt")
    assert file.name == "res_ROME_CIFAR10_ConvNetW32_4ipc.pt" and file.name in (tmp_path / "out" / "README.md").read_text()
    (read,), meta = sets_and_meta(file)
    same(read, one)
    assert (meta["pack"], meta["packed"], meta["recipe"]["pack"], meta["recipe"]["lr_schedule"]) == (1, False, 1, "cosine")
    images, labels = torch.load(file, weights_only=True)["data"][0]  # as DC and BEARD read it
    assert torch.equal(images, read.images) and labels.dtype == torch.int64


def test_dc_as_it_is_stored(synset, tmp_path, monkeypatch):
    path, one = synset
    run(monkeypatch, path, "--to", "dc", tmp_path / "out", "--index", 1, "--keep_packed")
    (read,), meta = sets_and_meta(tmp_path / "out" / "res_ROME_CIFAR10_ConvNetW32_1ipc.pt")
    assert all(torch.equal(a, b) for a, b in zip(read, one)) and (meta["pack"], meta["packed"]) == (2, True)
    assert len(meta["recipe"]["teachers"]) == 1 and meta["recipe"]["pack"] == 2
    assert "each of 2x2 sub-images" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("layout, name", [("mtt", "images_best.pt"), ("ddranking", "images.pt")])
def test_pairs(synset, tmp_path, monkeypatch, layout, name):
    path, one = synset
    run(monkeypatch, path, "--to", layout, tmp_path / "out", "--index", 1)
    (read,), meta = sets_and_meta(tmp_path / "out" / name)
    same(SyntheticSet(read.images, one.labels.repeat(4), read.soft_labels), one)
    run(monkeypatch, path, "--to", layout, tmp_path / "hard", "--index", 1, "--hard")
    (read,), _ = sets_and_meta(tmp_path / "hard" / name)
    assert read.soft_labels is None and torch.equal(read.labels, one.labels.repeat(4))


def test_ddranking_trains_on_it(synset, tmp_path, monkeypatch):
    """The package's own data set, loss and training loop take the three files; the gradient of its loss is that of ours.
    (It imports timm, pandas and yaml, which this part of it never calls: they need not be there.)"""
    for name in ("timm", "pandas", "yaml"):
        stand_in = types.ModuleType(name)
        stand_in.__spec__ = importlib.machinery.ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, stand_in)
    import ddranking
    from ddranking.utils.data import TensorDataset
    from ddranking.utils.train_and_eval import train_one_epoch

    from synsets import label_loss
    path, one = synset
    run(monkeypatch, path, "--to", "ddranking", tmp_path / "out", "--index", 1)
    images, labels, lr = (torch.load(tmp_path / "out" / f"{name}.pt", weights_only=True) for name in ("images", "labels", "lr"))
    assert float(lr) == pytest.approx(0.05)
    loss = ddranking.KLDivergenceLoss(temperature=3.0, scale_loss=True)
    logits = torch.randn(40, 10, requires_grad=True)
    ours, theirs = (torch.autograd.grad(f, logits)[0] for f in (label_loss(logits, labels, 3.0), loss(logits, labels)))
    assert torch.allclose(ours, theirs, atol=1e-6)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 10))
    before = loss(net(images), labels).item()
    loader = torch.utils.data.DataLoader(TensorDataset(images, labels), batch_size=8)
    train_one_epoch(0, net, loader, loss, torch.optim.SGD(net.parameters(), lr=1e-4), aug_func=lambda x: x, device="cpu")
    assert loss(net(images), labels).item() < before


def test_folder(synset, tmp_path, monkeypatch):
    path, one = synset
    run(monkeypatch, path, "--to", "folder", tmp_path / "out", "--index", 1)
    rows = list(csv.DictReader(open(tmp_path / "out" / "labels.csv")))
    pixels = np.stack([np.asarray(Image.open(tmp_path / "out" / row["file"])) for row in rows]).transpose(0, 3, 1, 2) / 255
    expected = unpack(one.images) * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    assert np.abs(pixels - expected.numpy()).max() <= 0.5 / 255 + 1e-6
    assert [int(row["label"]) for row in rows] == one.labels.repeat(4).tolist() and rows[3]["class"] == "class 3"
    read = torch.tensor([[float(row[f"logit_{c}"]) for c in range(10)] for row in rows])
    assert torch.equal(read, one.soft_labels)


def test_safetensors_with_its_card(synset, tmp_path, monkeypatch):
    from safetensors import safe_open
    from safetensors.torch import load_file
    path, one = synset
    run(monkeypatch, path, "--to", "safetensors", tmp_path / "out", "--index", 1)
    tensors = load_file(tmp_path / "out" / "set.safetensors")
    same(SyntheticSet(tensors["images"], tensors["labels"], tensors["soft_labels"]), one)
    with safe_open(tmp_path / "out" / "set.safetensors", "pt") as file:
        assert json.loads(file.metadata()["meta"])["stored_pack"] == 2
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlicense") and "stored as 10 images of 2x2 sub-images" in card
    for phrase in ("51 epochs, batch 64, learning rate 0.05 (cosine)", "times 9", "| ConvNetW32 | `abababababababab` | 57.0 |",
                   'load_synset("set.safetensors")'):
        assert phrase in card, phrase
    assert card.count("abababab") == 2  # once, 16 digits of it


@pytest.mark.parametrize("arguments, message", [
    (["--to", "dc", "OUT", "--index", "2"], "--index 2: .* has 2 set"),
    (["--to", "dc", "FULL"], "exists and is not empty"),
    (["--to", "mtt", "OUT", "--keep_packed"], "mtt cannot say that images are packed"),
])
def test_wrong_on_purpose(synset, tmp_path, monkeypatch, arguments, message):
    (tmp_path / "FULL").mkdir()
    (tmp_path / "FULL" / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        run(monkeypatch, synset[0], *arguments)
    assert not (tmp_path / "OUT").exists()


def test_no_pixels_without_a_normalisation(tmp_path, monkeypatch):
    torch.save({"data": [[torch.rand(10, 3, 32, 32), torch.arange(10)]]}, tmp_path / "res.pt")
    for flags, message in (([], "nothing says of which data set .*--dataset"),
                           (["--dataset", "CIFAR10", "--zca"], "no pixels")):
        with pytest.raises(InputError, match=message):
            run(monkeypatch, tmp_path / "res.pt", "--to", "folder", tmp_path / "out", *flags)
        assert [path.name for path in tmp_path.iterdir()] == ["res.pt"]  # nothing that would block the next try
