"""Baselines, soft labels, configs: what a synthetic set is and how it is trained on."""
import numpy as np
import pytest
import torch
from conftest import ROOT, random_dataset, sets_and_meta, write_set
from scipy.special import log_softmax, softmax

import experiment
import ROME_cifar10
import synsets
from augment import unpack
from formats.network_file import load_into
from formats.synset_file import SyntheticSet, pack_of, save_synset
from networks import get_network
from runtime.safe_io import InputError, sha256
from synsets import TrainConfig, initial_set


# -------------------------------------------------------------------------- starts and baselines
def test_baselines_are_real_images_at_the_same_number_of_stored_ones():
    data = random_dataset(per_class=40)

    def baselines(exp, *flags):
        args = ROME_cifar10.parse_args(["--ipc", "2", "--pack", "4", *flags])
        return {name: (one, pack) for name, one, pack in experiment.baselines(args, exp, data)}
    found = baselines(0)
    assert {name: pack for name, (_, pack) in found.items()} == {
        "random real": 1, "random real, 4x4 packed": 4}
    x, y = data.get_batch("train", slice(None))
    real, packed = (one for one, _ in found.values())
    assert real.images.shape == packed.images.shape == (20, 3, 32, 32)
    assert real.labels.tolist() == sorted(list(range(10)) * 2)
    for image, label in zip(real.images, real.labels):
        assert label == y[(x == image).flatten(1).all(1)]
    first = packed.images[0, :, :8, :8]  # an image of class 0, shrunk to the mean of 4x4 pixels
    shrunk = x[y == 0].reshape(-1, 3, 8, 4, 8, 4).mean((3, 5))
    assert (shrunk - first).abs().amax((1, 2, 3)).min() < 1e-6
    assert torch.equal(baselines(0)["random real"][0].images, real.images)
    assert not torch.equal(baselines(1)["random real"][0].images, real.images)
    assert baselines(0, "--no_baseline") == {}
    assert list(synsets.baseline_packs(1)) == ["random real"]
    noise, _ = initial_set(data, 2, 2, "noise", torch.Generator().manual_seed(0))
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02


def test_a_set_as_the_start(digits, tmp_path):
    """The images of a file, experiment by experiment; refused where they are not like the run's."""
    labels, path = torch.arange(10).repeat_interleave(2), tmp_path / "set.pt"
    made = [SyntheticSet(torch.randn(20, 3, 32, 32), labels) for _ in range(2)]
    save_synset(path, made, [], {"pack": 4, "dataset": "Digits"})
    for exp in (0, 1, 2):
        images, same = initial_set(digits, 2, 4, str(path), None, exp)
        assert torch.equal(images, made[exp % 2].images) and torch.equal(same, labels)
    unlike = "--init .*set.pt: images .*this run has .*class aft"
    for message, pack, ipc, target, meta in (
            (unlike, 2, 2, labels, {}), (unlike, 4, 1, labels, {}),
            (unlike, 4, 2, labels.flip(0), {}), (unlike, 4, 2, labels, {"dataset": "CIFAR10"}),
            ("dataset 'SVHN', which is unknown here", 4, 2, labels, {"dataset": "SVHN"}),
            ("set.pt is ZCA-whitened, this run's .* normalised", 4, 2, labels, {"zca": True}),
            (r"set.pt is normalised with mean \[0.5, 0.5, 0.5\].*this run's", 4, 2, labels,
             {"mean": [0.5] * 3, "std": [0.25] * 3}),
            ("images here have 3 channel", 4, 2, labels, {"mean": [0.5], "std": [0.25]})):
        write_set(path, made[0].images, target, **{"pack": 4, **meta})
        with pytest.raises(InputError, match=message):
            initial_set(digits, ipc, pack, path, None)


# ----------------------------------------------------------------------------------- soft labels
def test_soft_labels_are_the_mean_logits_of_the_sub_images():
    nets = [get_network("MLP", 3, 10, (32, 32), seed) for seed in (0, 1, 2)]
    x, classes = torch.randn(3, 3, 32, 32), torch.tensor([3, 1, 2])
    labels = synsets.soft_labels(nets, unpack(x, 2), micro_batch=5)
    assert labels.shape == (12, 10) and all(net.training for net in nets)
    expected = torch.stack([net(unpack(x, 2)) for net in nets]).mean(0)
    assert torch.allclose(labels, expected, atol=1e-6)
    images, target = synsets.training_set(SyntheticSet(x, classes, labels), 2)
    assert torch.equal(images, unpack(x, 2)) and target is labels
    _, target = synsets.training_set(SyntheticSet(x, classes), 2)
    assert target.tolist() == [3, 1, 2] * 4
    assert synsets.class_major(target, 3).tolist() == [3] * 4 + [1] * 4 + [2] * 4


def test_label_loss_against_numpy():
    logits, soft = np.random.default_rng(0).normal(size=(2, 6, 4))
    hard = np.array([0, 1, 2, 3, 0, 1])
    loss = synsets.label_loss(torch.tensor(logits), torch.tensor(hard)).item()
    assert loss == pytest.approx(-log_softmax(logits, 1)[range(6), hard].mean())
    for t in (1.0, 3.0):
        expected = -t * t * (softmax(soft / t, 1) * log_softmax(logits / t, 1)).sum(1).mean()
        loss = synsets.label_loss(torch.tensor(logits), torch.tensor(soft), t).item()
        assert loss == pytest.approx(expected)


READY = ROOT / "experiments" / "robust_labels"


@pytest.mark.parametrize("path", sorted(READY.glob("ready/*/*.pt")), ids=lambda p: p.parent.name)
def test_the_sets_that_are_here(path):
    """Small, readable, with labels of the networks that lie beside them, and what these are."""
    assert path.stat().st_size < 2e6 and (path.parent / "README.md").is_file()
    ((images, labels, soft, *_),), meta = sets_and_meta(path)
    assert torch.equal(labels, torch.arange(10).repeat_interleave(10))
    (teachers,) = meta["recipe"]["teachers"]
    files = [READY / "teachers" / teacher["file"] for teacher in teachers]
    assert synsets.describe_prior_networks(files) == teachers
    assert [sha256(file) for file in files] == [teacher["sha256"] for teacher in teachers]
    nets = [load_into(get_network("ConvNetW32", 3, 10, (32, 32), 0), file) for file in files]
    again = synsets.soft_labels(nets, unpack(images, pack_of(meta)))
    assert (again - soft).abs().max() < 1e-3  # another processor adds in another order


# ------------------------------------------------------------------------------ how to train on it
def test_the_config_of_a_file_and_of_the_flags():
    args = ROME_cifar10.parse_args(["--epoch_eval_train", "7", "--lr_schedule", "cosine",
                                    "--label_temperature", "2", "--pack", "4"])
    recipe = experiment.recipe(args, [[]])
    config = TrainConfig(epochs=7, lr_schedule="cosine", temperature=2.0)
    assert recipe["pack"] == 4 and TrainConfig.from_meta({"recipe": recipe}) == config
    assert TrainConfig.from_meta({}) == TrainConfig()  # SPEC 3.1
    given = TrainConfig.from_meta({"recipe": recipe}, epochs=3, lr_net=0.0, batch_train=None)
    assert given == TrainConfig(3, 0.0, lr_schedule="cosine", temperature=2.0)


@pytest.mark.parametrize("key, value, message", [
    ("dsa_strategy", "flip_blur", "blur"),
    ("lr_schedule", "linear", "linear.*step, cosine"),
    ("epochs", 0, "epochs is 0; expected a number of at least 1"),
    ("batch_train", 2.5, "batch_train is 2.5"),
    ("lr_net", "fast", "lr_net is 'fast'"),
    ("temperature", float("inf"), "temperature is inf"),
])
def test_a_wrong_recipe(key, value, message):
    with pytest.raises(InputError, match=f"the recipe of the set: .*{message}"):
        TrainConfig.from_meta({"recipe": {key: value}})
