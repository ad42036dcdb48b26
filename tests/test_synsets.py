"""Controls, soft labels, recipes: what a set is and how it is trained on."""
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, random_dataset, sets_and_meta

import ROME_cifar10 as rome
import synsets
from augment import unpack
from formats.network_file import load_into
from formats.synset_file import SyntheticSet, pack_of
from network_pool import NetworkPool
from runtime.safe_io import InputError, sha256, write_tensors
from networks import get_network


def test_controls_are_real_images_at_the_same_number_of_stored_ones():
    data = random_dataset(per_class=40)
    args = SimpleNamespace(ipc=2, pack=4, seed=0, baseline=True)
    controls = synsets.baseline_sets(args, 0, data)
    assert {name: pack for name, (_, pack) in controls.items()} == {"random real": 1, "random real, 4x4 packed": 4}
    x, y = data.get_batch("train", slice(None))
    real, packed = (one for one, _ in controls.values())
    assert real.images.shape == packed.images.shape == (20, 3, 32, 32)
    for image, label in zip(real.images, real.labels):
        assert label == y[(x == image).flatten(1).all(1)]
    first = packed.images[0, :, :8, :8]  # a real image of class 0, shrunk to the mean of 4x4 pixels
    shrunk = x[y == 0].reshape(-1, 3, 8, 4, 8, 4).mean((3, 5))
    assert (shrunk - first).abs().amax((1, 2, 3)).min() < 1e-6
    again, other = synsets.baseline_sets(args, 0, data), synsets.baseline_sets(args, 1, data)
    assert torch.equal(again["random real"][0].images, real.images)
    assert not torch.equal(other["random real"][0].images, real.images)
    assert list(synsets.baseline_sets(SimpleNamespace(**{**vars(args), "pack": 1}), 0, data)) == ["random real"]
    assert synsets.baseline_sets(SimpleNamespace(**{**vars(args), "baseline": False}), 0, data) == {}


def test_soft_labels_are_the_mean_logits_of_the_sub_images():
    nets = [get_network("MLP", 3, 10, (32, 32), seed) for seed in (0, 1, 2)]
    x = torch.randn(3, 3, 32, 32)
    labels = synsets.soft_labels(nets, unpack(x, 2), micro_batch=5)
    assert labels.shape == (12, 10) and all(net.training for net in nets)
    assert torch.allclose(labels, torch.stack([net(unpack(x, 2)) for net in nets]).mean(0), atol=1e-6)
    images, target = synsets.training_set(SyntheticSet(x, torch.tensor([3, 1, 2]), labels), 2)
    assert torch.equal(images, unpack(x, 2)) and target is labels
    _, target = synsets.training_set(SyntheticSet(x, torch.tensor([3, 1, 2])), 2)
    assert target.tolist() == [3, 1, 2] * 4
    major = synsets.class_major(target, 3)
    assert major.tolist() == [3] * 4 + [1] * 4 + [2] * 4


def test_label_loss_against_numpy():
    logits, soft = np.random.default_rng(0).normal(size=(2, 6, 4))
    def softmax(z):
        return np.exp(z) / np.exp(z).sum(1, keepdims=True)
    hard = np.array([0, 1, 2, 3, 0, 1])
    assert synsets.label_loss(torch.tensor(logits), torch.tensor(hard)).item() == pytest.approx(
        -np.log(softmax(logits)[range(6), hard]).mean())
    for t in (1.0, 3.0):
        expected = -t * t * (softmax(soft / t) * np.log(softmax(logits / t))).sum(1).mean()
        assert synsets.label_loss(torch.tensor(logits), torch.tensor(soft), t).item() == pytest.approx(expected)
    x = torch.tensor(logits, requires_grad=True)  # at a high temperature: logits are matched, up to their mean
    (gradient,) = torch.autograd.grad(synsets.label_loss(x, torch.tensor(soft), 1e4), x)
    centred = (logits - logits.mean(1, keepdims=True)) - (soft - soft.mean(1, keepdims=True))
    assert np.allclose(gradient, centred / 4 / 6, atol=1e-4)


def test_what_hard_labels_leave(digits):
    args = rome.parse_args(["--dataset", "Digits"])
    found = synsets.with_soft_labels("images", "labels", None, args, 0, digits)
    assert found == {"set": ["images", "labels", None], "controls": {}, "teachers": []}


def test_labels_of_the_pool(digits):
    """All networks of the pool, for the set and for the controls; what is said of them."""
    args = rome.parse_args(["--dataset", "Digits", "--model", "MLP", "--ipc", "1", "--aug", "--labels", "prior"])
    pool = NetworkPool(lambda k: get_network("MLP", 3, 10, (32, 32), k), lambda net: None, limit=5)
    pool.members[0].record(torch.tensor(3), 4)
    images, labels = synsets.initial_set(args, digits, torch.Generator().manual_seed(0), "real", 2)
    found = synsets.with_soft_labels(images, labels, pool, args, 0, digits)
    nets = [member.net for member in pool.members]
    assert torch.equal(found["set"][2], synsets.soft_labels(nets, unpack(images))) and found["set"][2].shape == (40, 10)
    assert {name: len(soft) for name, soft in found["controls"].items()} == {"random real": 10, "random real, 2x2 packed": 40}
    control, pack = synsets.baseline_sets(args, 0, digits)["random real, 2x2 packed"]
    assert torch.equal(found["controls"]["random real, 2x2 packed"], synsets.soft_labels(nets, unpack(control.images, pack)))
    assert [t["running_acc"] for t in found["teachers"]] == [0.75, 0, 0]
    assert len({t["sha256"] for t in found["teachers"]}) == 3 and found["teachers"][0]["model"] == "MLP"


def test_teachers_from_files(tmp_path):
    write_tensors(tmp_path / "net.pth", {"w": torch.ones(2)})
    about = {"model": "LeNet", "threat_model": "pixel", "clean_acc": 0.5, "robust_acc": 0.25, "aa_acc": 0.2, "aa_n": 100,
             "n": 360, "seed": 3}
    (tmp_path / "net.pth.json").write_text(json.dumps(about))
    (said,) = synsets.describe_teachers(SimpleNamespace(robust_prior=[str(tmp_path / "net.pth")]), None)
    assert said == {"file": "net.pth", "sha256": sha256(tmp_path / "net.pth"),
                    **{key: value for key, value in about.items() if key != "seed"}}


EXPERIMENTS = ROOT / "experiments" / "robust_labels"


@pytest.mark.parametrize("path", sorted(EXPERIMENTS.glob("ready/*/*.pt")), ids=lambda path: path.parent.name)
def test_the_sets_that_are_here(path):
    """Small, readable by others and by us, with a recipe, and with labels of the networks that lie beside them."""
    assert path.stat().st_size < 2e6 and (path.parent / "README.md").is_file()
    ((images, labels, soft),), meta = sets_and_meta(path)
    assert torch.equal(labels, torch.arange(10).repeat_interleave(10)) and meta["recipe"]["labels"] == "prior"
    (teachers,) = meta["recipe"]["teachers"]
    found = [EXPERIMENTS / "teachers" / teacher["file"] for teacher in teachers]
    assert [sha256(file) for file in found] == [teacher["sha256"] for teacher in teachers]
    nets = [load_into(get_network("ConvNetW32", 3, 10, (32, 32), 0), file) for file in found]
    again = synsets.soft_labels(nets, unpack(images, pack_of(meta)))
    assert (again - soft).abs().max() < 1e-3  # another processor adds in another order


def test_a_recipe_says_how_to_train():
    args = rome.parse_args(["--epoch_eval_train", "7", "--lr_schedule", "cosine", "--label_temperature", "2", "--pack", "4"])
    recipe = synsets.recipe(args, [[]])
    assert (recipe["epochs"], recipe["lr_schedule"], recipe["temperature"], recipe["pack"]) == (7, "cosine", 2.0, 4)
    meta = {"recipe": recipe}
    assert synsets.protocol_of(meta) == synsets.protocol(args)
    assert synsets.protocol_of({}) == synsets.PROTOCOL  # SPEC 3.1
    given = {**dict.fromkeys(synsets.PROTOCOL), "epochs": 3, "lr_net": 0.0}
    assert synsets.protocol_of(meta, given) == {**synsets.protocol(args), "epochs": 3, "lr_net": 0.0}
    for key, value, message in (("dsa_strategy", "flip_blur", "blur"), ("lr_schedule", "linear", "linear.*step, cosine")):
        with pytest.raises(InputError, match=message):
            synsets.protocol_of({"recipe": {**recipe, key: value}})
