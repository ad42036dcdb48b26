"""export.py: what reads each layout, here or elsewhere, finds the same images and labels in it."""
import csv
import importlib.machinery
import itertools
import json
import re
import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import real_images, run_main, sets_and_meta, write_set
from PIL import Image

import evaluate
import export
import utils
from augment import pack, unpack
from formats.inputs import read_inputs
from formats.synset_file import SyntheticSet, read_synset, save_synset
from networks import NETWORKS
from runtime.safe_io import InputError
from synsets import TrainConfig, label_loss

LABELS = torch.arange(10).repeat_interleave(10)
RECIPE = {"epochs": 12, "lr_net": 0.03, "batch_train": 64, "dsa_strategy": "none",
          "temperature": 2.0, "lr_schedule": "cosine"}


@pytest.fixture(scope="module")
def exported(digits, tmp_path_factory):
    """Of a file of two packed sets, the second, whose soft labels have largest classes that are not
    balanced: the set, and a folder with that file, all exports, <layout> and <layout>-hard, and
    what evaluate.py finds for the layouts in one run."""
    soft = 3 * F.one_hot(LABELS.repeat(4), 10).float() + torch.randn(400, 10)
    soft[:20, 9] += 10
    images = torch.cat([pack(images_c) for images_c in real_images(digits, 40).split(40)])
    one = SyntheticSet(images, LABELS, soft)
    teacher = {"model": "ConvNetW32", "sha256": "ab" * 32, "clean_acc": 0.57}
    meta = {
        "dataset": "Digits", "classes": [f"class {c}" for c in range(10)], "zca": False,
        "mean": list(digits.mean), "std": list(digits.std), "packed": True, "pack": 2,
        "threat_model": "pixel", "flags": {"method": "DM", "model": "MLP"},
        "recipe": {**RECIPE, "pack": 2, "teachers": [[teacher], [teacher, teacher]]},
    }
    folder = tmp_path_factory.mktemp("exported")
    path = folder / "res_DM_Digits_MLP_10ipc.pt"
    save_synset(path, [SyntheticSet(images.flip(0), LABELS, -soft), one], [], meta)
    for layout, hard in itertools.product(export.LAYOUTS, ([], ["--hard"])):
        out = folder / "".join([layout, *hard]).replace("--", "-")
        run_main(export, path, out, "--to", layout, "--index", 1, *hard)
    flags = ("--grid headline --eps 2 --aa_iterations 1 --queries 2 --no_sanity --limit 20 "
             "--num_eval 1 --labels own hard").split()
    flags = [*flags, "--method", *export.LAYOUTS, "--out", folder / "evaluated"]
    run_main(evaluate, "--synset", *(folder / layout for layout in export.LAYOUTS), *flags)
    return one, folder


@pytest.mark.parametrize("layout", export.LAYOUTS)
def test_every_export_is_read_back(exported, monkeypatch, layout):
    """As it was: images, labels, recipe, method; each card's lines of Python train on just that."""
    one, folder = exported
    content = json.loads((folder / "evaluated" / "results.json").read_text())
    (entry,) = read_inputs([folder / layout], [], NETWORKS)
    assert (entry.dataset, entry.model, entry.method) == ("Digits", "MLP", "DM-pixel")
    taken = content["inputs"][str(folder / layout)]["taken_as"]
    assert "soft labels (logits)" in taken and "epochs 12" in taken
    methods = {row["method"] for row in content["rows"]
               if row["method"].startswith(layout) and row["attack"] == "AA"}
    methods.remove(f"{layout}-random-hard")  # the control: nobody named the teachers
    soft_alone = layout in ("mtt", "ddranking")  # no classes of their own there
    assert methods == ({layout} if soft_alone else {layout, f"{layout}-hard"})
    for about in content["networks"].values():
        assert {key: about[key] for key in RECIPE} == RECIPE

    trained = []
    monkeypatch.setattr(utils, "train_on_set", lambda *given: trained.append(given))
    monkeypatch.chdir(folder / layout)
    (code,) = re.findall(r"```python\n(.*?)```", open("README.md").read(), flags=re.DOTALL)
    exec(code, {})
    ((net, images, labels, config),) = trained
    tolerance = 1.01 / 255 / 0.3237 / 2 if layout == "folder" else 0
    assert torch.allclose(images, unpack(one.images), atol=tolerance)
    assert torch.equal(labels, one.soft_labels) and config == TrainConfig(**RECIPE)
    assert net.architecture == ("MLP", 3, 10, (32, 32))


@pytest.mark.parametrize("layout", export.LAYOUTS)
def test_hard_labels(exported, layout):
    one, out = exported[0], exported[1] / f"{layout}-hard"
    (read,), meta = sets_and_meta(out)
    assert layout == "folder" or torch.equal(read.images, unpack(one.images))
    assert torch.equal(read.labels, one.labels.repeat(4)) and read.soft_labels is None
    assert (meta["pack"], meta["packed"], meta["recipe"]["pack"]) == (1, False, 1)
    assert (meta["stored"], meta["stored_pack"]) == (100, 2)
    assert len(meta["recipe"]["teachers"]) == 1  # of this set
    card = (out / "README.md").read_text()
    assert card.count("ab" * 32) == 2 and "100 images, each of 2x2 sub-images" in card


def test_dc(exported, tmp_path):
    """As DC and BEARD read it; kept packed; into a folder that is empty, and no other."""
    (one, folder), name = exported, "res_DM_Digits_MLP_10ipc.pt"
    command = folder / name, tmp_path, "--to", "dc", "--index", 1
    run_main(export, *command, "--keep_packed")
    images, labels = torch.load(tmp_path / name)["data"][0]
    assert torch.equal(images, one.images) and labels.dtype == torch.int64
    (read,), meta = sets_and_meta(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(read[:3], one))
    assert (meta["pack"], meta["packed"], meta["recipe"]["pack"]) == (2, True, 2)
    with pytest.raises(InputError, match="exists and is not empty"):
        run_main(export, *command)


def test_ddranking(exported, monkeypatch):
    """The package's loss on the files has the gradient of ours.

    It imports timm, pandas and yaml, but does not call them here.
    """
    for name in ("timm", "pandas", "yaml"):
        stand_in = types.ModuleType(name)
        stand_in.__spec__ = importlib.machinery.ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, stand_in)
    from ddranking import KLDivergenceLoss
    folder = exported[1] / "ddranking"
    images, labels, lr = (torch.load(folder / f"{name}.pt") for name in ("images", "labels", "lr"))
    assert float(lr) == pytest.approx(0.03)
    logits = torch.nn.Linear(3072, 10)(images.flatten(1)).detach().requires_grad_()
    losses = [label_loss(logits, labels, temperature=3.0),
              KLDivergenceLoss(temperature=3.0, scale_loss=True)(logits, labels)]
    ours, theirs = (torch.autograd.grad(loss, logits)[0] for loss in losses)
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_folder(exported):
    one, out = exported[0], exported[1] / "folder"
    rows = list(csv.DictReader((out / "labels.csv").open()))
    pixels = np.stack([np.asarray(Image.open(out / row["file"])) for row in rows]) / 255
    expected = unpack(one.images).permute(0, 2, 3, 1).numpy() * 0.3237 + 0.3054
    assert np.abs(pixels - expected.clip(0, 1)).max() <= 0.5 / 255 + 1e-6
    assert (rows[30]["label"], rows[30]["class"]) == ("3", "class 3")
    assert float(rows[5]["logit_7"]) == pytest.approx(one.soft_labels[5, 7].item())


def test_a_whitened_set(tmp_path):
    path = write_set(tmp_path / "res.pt", torch.randn(10, 3, 32, 32) / 4, torch.arange(10))
    run_main(export, path, tmp_path / "dc", "--to", "dc", "--dataset", "CIFAR10", "--zca")
    assert "CIFAR10, ZCA-whitened" in (tmp_path / "dc" / "README.md").read_text()
    again = read_synset(tmp_path / "dc")
    assert again.declared_zca()
    assert torch.equal(again.sets[0].images, read_synset(path).sets[0].images)


@pytest.mark.parametrize("flags, message", [
    ([], "is unknown; .*--dataset"),
    (["--dataset", "CIFAR10", "--index", "1"], "has 1 set.*there is no 1"),
    (["--dataset", "grey.npz"], "its images have 3 channel"),
    (["--dataset", "CIFAR10", "--keep_packed"], "folder cannot"),
    (["--dataset", "CIFAR10", "--zca"], "no pixels"),
    (["--dataset", "CIFAR10", "--zca", "--images", "pixels"], "holds pixels and does not say"),
])
def test_refused(tmp_path, tmp_path_factory, monkeypatch, flags, message):
    path = write_set(tmp_path / "res.pt", torch.rand(10, 3, 32, 32), torch.arange(10))
    pixels, labels = np.random.rand(10, 8, 8), np.arange(10)
    monkeypatch.chdir(tmp_path_factory.mktemp("data"))
    np.savez("grey.npz", x_train=pixels, y_train=labels, x_test=pixels, y_test=labels)
    with pytest.raises(InputError, match=message):
        run_main(export, path, tmp_path / "out", "--to", "folder", *flags)
    assert len(list(tmp_path.iterdir())) == 1  # nothing that would block the next try
