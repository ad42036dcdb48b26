"""Data, random streams, the pool, training on a set, and the files of a run."""
import argparse
import dataclasses
import json
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import random_dataset

import attacks
import utils
from attacks import get_threat_model
from networks import get_network
from utils import InputError


# ------------------------------------------------------------------------------------------------------------------ data
def test_digits(digits):
    from sklearn.datasets import load_digits
    assert [len(digits.labels[s]) for s in ("train", "test")] == [1437, 360]
    assert digits.images["train"].shape == (1437, 3, 32, 32) and digits.images["train"].dtype == torch.uint8
    x, _ = digits.take("train", slice(None))
    assert abs(x.mean()) < 1e-3 and abs(x.std() - 1) < 1e-3  # the constants of DATASETS
    # The images are scikit-learn's: the brightest pixel of each quarter and the total are kept by the enlargement.
    totals = sorted(image.sum() for image in load_digits().images)
    ours = torch.cat([digits.images[s][:, 0].float().sum((1, 2)) / 255 for s in ("train", "test")])
    assert np.allclose(sorted(ours.numpy()), totals, rtol=0.01)
    assert torch.bincount(digits.labels["test"]).min() >= 34


def test_normalisation():
    data = random_dataset()
    x, labels = data.take("train", torch.tensor([3, 1]))
    raw = data.images["train"][[3, 1]].numpy() / 255
    mean, std = (np.array(v).reshape(1, 3, 1, 1) for v in ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)))
    assert np.allclose(x.numpy(), (raw - mean) / std, atol=1e-5) and labels.tolist() == [3, 1]
    assert np.allclose(data.denormalize(x).numpy(), raw, atol=1e-6)


def test_zca():
    pytest.importorskip("kornia")
    rng = np.random.default_rng(0)
    labels = torch.arange(400) % 4
    images = torch.from_numpy(rng.integers(0, 256, (400, 3, 4, 4), dtype=np.uint8))
    images[:, :, :, 1:] = images[:, :, :, :1] // 2 + images[:, :, :, 1:] // 2  # correlated
    data = utils.Dataset("d", {"train": images, "test": images}, {"train": labels, "test": labels}, "abcd",
                         mean=(0.5,) * 3, std=(0.25,) * 3)
    plain = images.flatten(1).double().numpy() / 255  # the pixels: whitening takes the place of the normalisation
    data.fit_zca()
    x, _ = data.take("train", slice(None))
    centred = plain - plain.mean(0)
    values, vectors = np.linalg.eigh(np.cov(centred.T))
    assert np.allclose(x.flatten(1).numpy(), centred @ vectors @ np.diag((values + 0.1) ** -0.5) @ vectors.T, atol=1e-3)
    assert np.allclose(data.denormalize(x).numpy(), images.numpy() / 255, atol=1e-3)


def test_sampling():
    data, generator = random_dataset(num_classes=10, per_class=8), torch.Generator().manual_seed(0)
    everything = data.take("train", slice(None))[0]
    batch = data.sample_class(4, 5, generator)
    positions = [int((everything == image).flatten(1).all(1).nonzero()) for image in batch]
    assert len(set(positions)) == 5 and all(p % 10 == 4 for p in positions)  # without replacement, of the class
    assert len(data.sample_class(4, 5000, generator)) == 8  # the whole class
    x, labels = data.sample(80, generator)
    assert sorted(labels.tolist()) == sorted(data.labels["train"].tolist())
    assert all(torch.equal(x[i], everything[(everything == x[i]).flatten(1).all(1)][0]) for i in range(3))


def write_npz(path, **changes):
    x, y = np.zeros((20, 32, 32, 3), np.uint8), np.arange(20, dtype=np.uint8) % 10
    arrays = {"x_train": x, "y_train": y, "x_test": x, "y_test": y, "classes": np.array(list("abcdefghij")), **changes}
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})


@pytest.mark.parametrize("changes, says", [
    ({"x_test": None}, "x_test"),
    ({"x_train": np.zeros((20, 32, 32, 3), np.float32)}, "float32"),
    ({"x_train": np.zeros((20, 3, 32, 32), np.uint8)}, r"\(20, 3, 32, 32\)"),
    ({"y_train": np.zeros(19, np.uint8)}, r"\(19,\)"),
    ({"y_test": np.full(20, 10)}, "labels outside 0..9"),
    ({"y_test": np.array([{}] * 20)}, "damaged"),  # a pickled object is not read
])
def test_data_file_with_wrong_content(tmp_path, changes, says):
    write_npz(tmp_path / "cifar10.npz", **changes)
    with pytest.raises(InputError, match=says) as error:
        utils.load_dataset("CIFAR10", tmp_path)
    assert "cifar10.npz" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("damage", [lambda b: b[:-1000], lambda b: b"", lambda b: b"no zip" * 100,
                                    lambda b: b[:5000] + bytes([b[5000] ^ 255]) + b[5001:]],
                         ids=["truncated", "empty", "text", "bit flip"])
def test_damaged_data_file(tmp_path, damage):
    write_npz(tmp_path / "good.npz")
    (tmp_path / "cifar10.npz").write_bytes(damage((tmp_path / "good.npz").read_bytes()))
    with pytest.raises(InputError, match="cifar10.npz is damaged"):
        utils.load_dataset("CIFAR10", tmp_path)


def test_no_data_and_no_download(tmp_path, monkeypatch):
    import torchvision

    def no_network(*args, **kwargs):
        raise OSError("no network")
    monkeypatch.setattr(torchvision.datasets, "CIFAR100", no_network)
    with pytest.raises(InputError, match="internet.*cifar100.npz") as error:
        utils.load_dataset("CIFAR100", tmp_path)
    assert "\n" not in str(error.value) and list(tmp_path.iterdir()) == []


def test_download_is_kept_as_npz(tmp_path, monkeypatch):
    """torchvision's data set becomes the npz, which is then enough on its own."""
    import torchvision

    class Fake:
        classes = list("abcdefghij")

        def __init__(self, root, train, download):
            assert download
            rng = np.random.default_rng(int(train))
            self.data, self.targets = rng.integers(0, 256, (20, 32, 32, 3), dtype=np.uint8), list(range(10)) * 2
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Fake)
    first = utils.load_dataset("CIFAR10", tmp_path)
    monkeypatch.delattr(torchvision.datasets, "CIFAR10")
    second = utils.load_dataset("CIFAR10", tmp_path)
    assert torch.equal(first.images["train"], second.images["train"]) and second.classes == Fake.classes
    assert not torch.equal(first.images["train"], first.images["test"])
    assert [p.name for p in tmp_path.iterdir()] == ["cifar10.npz"]


def test_fingerprint_tells_data_apart():
    """It is the same for the same arrays and another one after a change of one value."""
    def fingerprint(change=None):
        images = {split: torch.zeros(4, 3, 32, 32, dtype=torch.uint8) for split in ("train", "test")}
        labels = {split: torch.arange(4) for split in ("train", "test")}
        if change:
            (images if change[0] == "images" else labels)[change[1]][2] += 1
        return utils.Dataset("CIFAR10", images, labels, "abcdefghij", **utils.DATASETS["CIFAR10"]).fingerprint()
    prints = [fingerprint(), *(fingerprint((what, split)) for what in ("images", "labels") for split in ("train", "test"))]
    assert len(set(prints)) == 5 and fingerprint() == prints[0]


def test_deterministic_is_handed_to_pytorch(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        assert utils.get_device("cpu", deterministic=True).type == "cpu"
        assert torch.are_deterministic_algorithms_enabled() and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)


def test_unknown_dataset():
    with pytest.raises(InputError, match="'MNIST'.*CIFAR10, CIFAR100, Digits"):
        utils.load_dataset("MNIST", ".")


# --------------------------------------------------------------------------------------------------------- random streams
def test_streams_are_repeatable_and_differ():
    keys = [(0, "data"), (0, "dsa"), (1, "data"), ("data",), (0, "data", 0), (0, "data", 1)]
    seeds = [utils.stream_seed(seed, *key) for seed in (0, 1) for key in keys]
    assert len(set(seeds)) == len(seeds) and all(0 <= s < 2**63 for s in seeds)
    draws = [torch.rand(4, generator=utils.stream(7, "data", 3)) for _ in range(2)]
    assert torch.equal(*draws) and not torch.equal(draws[0], torch.rand(4, generator=utils.stream(7, "data", 4)))


# ------------------------------------------------------------------------------------------------------------------- pool
def make_pool(limit=100):
    return utils.NetPool(lambda k: torch.nn.Linear(1, 1, bias=False),
                         lambda net: torch.optim.SGD(net.parameters(), lr=0.1), limit)


def test_pool_starts_with_three_and_drops_the_oldest():
    pool = make_pool(limit=5)
    assert len(pool.members) == 3
    first = pool.members[:3]
    pool.push(2)
    assert pool.members[:3] == first
    pool.push(1)
    assert len(pool.members) == 5 and pool.members[:2] == first[1:] and pool.made == 6


def test_pool_choice():
    pool, generator = make_pool(), torch.Generator().manual_seed(0)
    assert len(pool.choose(2, generator)) == 2 and len(pool.choose(50, generator)) == 3
    pool.push(27)
    seen = {id(m) for _ in range(200) for m in pool.choose(2, generator, begin=5, end=20)}
    assert seen == {id(m) for m in pool.members[5:20]}
    seen = {id(m) for _ in range(400) for m in pool.choose(2, generator, begin=5, end=15)}  # 10 remain: the slice is ignored
    assert seen == {id(m) for m in pool.members}
    assert all(len({id(m) for m in pool.choose(4, generator)}) == 4 for _ in range(50))


def test_running_accuracy_is_a_percentage():
    pool = make_pool()
    member = pool.members[0]
    assert member.running_accuracy() == 0
    member.record(torch.eye(4), torch.tensor([0, 1, 2, 0]))
    member.record(torch.eye(4), torch.tensor([0, 0, 0, 0]))
    assert member.running_accuracy() == 50  # 4 of 8
    pool.reset_running_accuracy()
    assert member.running_accuracy() == 0


# ------------------------------------------------------------------------------------------------ training and measuring
def test_training_against_a_literal_loop():
    """SPEC 3.1: epochs + 1 passes, momentum 0.9, weight decay 5e-4, a tenth of lr_net and no momentum after the middle."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(10, 3, 4, 4, generator=g), torch.arange(10) % 3
    nets = [torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 3)) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    utils.train_on_set(nets[0], x, y, epochs=5, lr_net=0.1, batch_train=4, dsa_strategy="none",
                       generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(1)
    weights, lr = list(nets[1].parameters()), 0.1
    velocity = [torch.zeros_like(w) for w in weights]
    for epoch in range(6):
        order = torch.randperm(10, generator=generator)
        for start in (0, 4, 8):
            index = order[start:start + 4]
            gradients = torch.autograd.grad(F.cross_entropy(nets[1](x[index]), y[index]), weights)
            for w, v, gradient in zip(weights, velocity, gradients):
                v.mul_(0.9).add_(gradient + 5e-4 * w.data)
                w.data -= lr * v
        if epoch == 3:
            lr, velocity = 0.01, [torch.zeros_like(w) for w in weights]
    for ours, theirs in zip(nets[0].parameters(), nets[1].parameters()):
        assert torch.allclose(ours, theirs, atol=1e-6)


def test_accuracy_counts():
    class Echo(torch.nn.Module):
        def forward(self, x):
            return x.flatten(1)[:, :4]
    x = F.one_hot(torch.arange(7) % 4, 4).float().view(7, 1, 2, 2)
    assert utils.accuracy(Echo(), x, torch.arange(7) % 4, chunk=3) == 1
    assert utils.accuracy(Echo(), x, torch.tensor([0, 1, 2, 0, 0, 0, 0]), chunk=3) == pytest.approx(4 / 7)


@pytest.mark.parametrize("name, targeted, steps, radii", [("published", True, 10, {"robust_acc": 8}),
                                                         ("pixel", False, 20, {"robust_2_acc": 2, "robust_4_acc": 4,
                                                                               "robust_acc": 8})])
def test_how_robustness_is_judged(digits, monkeypatch, name, targeted, steps, radii):
    """PGD with a random start, the steps, form and radii of the threat model, and a step size that goes with the radius."""
    asked, threat = [], get_threat_model(name, digits)
    net, generator = get_network("MLP", 3, 10, (32, 32), 0), torch.Generator().manual_seed(0)

    def pgd(model, x, labels, **options):
        asked.append((options, labels))
        return x.clamp(0, 1)
    monkeypatch.setitem(attacks.ATTACKS, "PGD", dataclasses.replace(attacks.ATTACKS["PGD"], run=pgd))
    images, labels = digits.take("test", slice(20))
    measured = utils.robust_accuracies(net, images, labels, threat, generator)
    assert list(measured) == list(radii) and utils.judge_cost(threat) == steps * len(radii)
    for (options, goal), (column, radius) in zip(asked, radii.items(), strict=True):
        assert options == {"eps": radius / 255, "step_size": threat.step_size * radius / 8, "steps": steps,
                           "targeted": targeted, "generator": generator}
        assert torch.equal(goal, (labels + 1) % 10 if targeted else labels)
        assert measured[column] == utils.accuracy(net, threat.clamp_only(images), labels)


def flags(**changes):
    values = {"eval_mode": "S", "model": "ConvNetW32", "num_eval": 2, "test_limit": 0, "select": "train", "seed": 0,
              "epoch_eval_train": 20, "lr_net": 0.01, "batch_train": 64, "dsa_strategy": "none"}
    return argparse.Namespace(**{**values, **changes})


def test_evaluator(digits, monkeypatch):
    """Trained on ten real digits a class, networks know most of the others; the rows are complete and repeatable."""
    monkeypatch.setattr(utils, "SELECT_IMAGES", 60)
    threat = get_threat_model("pixel", digits)
    x = torch.cat([digits.sample_class(c, 10, torch.Generator().manual_seed(0)) for c in range(10)])
    y = torch.arange(10).repeat_interleave(10)
    evaluate = utils.Evaluator(flags(test_limit=50), digits, threat)
    rows = evaluate(x, y, False, 0, "test", select=True)
    assert len(rows) == 2 and rows[0]["robust_acc"] != rows[1]["robust_acc"]  # two networks, not one twice
    for row in rows:
        assert row["clean_acc"] > 0.8 and row["n"] == 50
        assert row["clamp_acc"] == row["clean_acc"]  # pixel: the clamp does nothing
        assert row["clean_acc"] >= row["robust_2_acc"] >= row["robust_4_acc"] >= row["robust_acc"]
    again = utils.Evaluator(flags(test_limit=50, select="test"), digits, threat)(x, y, False, 0, "test", select=True)
    for row, same in zip(rows, again):
        assert same["select_acc"] == pytest.approx(np.mean([same[k] for k in ("robust_2_acc", "robust_4_acc", "robust_acc")]))
        assert row["select_acc"] > 0.5 and row["select_acc"] != same["select_acc"]
        assert [row[k] for k in ("clean_acc", "robust_acc")] == [same[k] for k in ("clean_acc", "robust_acc")]
    other = utils.Evaluator(flags(test_limit=50, seed=1, num_eval=1), digits, threat)(x, y, False, 0, "test")
    assert other[0]["select_acc"] is None
    assert [r["robust_acc"] for r in other] != [r["robust_acc"] for r in rows]


def test_selection_images_are_fixed_training_images(digits):
    first, second = (utils.Evaluator(flags(seed=seed), random_dataset(10, 300), None).select_set for seed in (0, 1))
    assert len(first[0]) == 2000 and torch.equal(first[0], second[0])
    assert len(utils.Evaluator(flags(), digits, None).select_set[0]) == 1437


# ------------------------------------------------------------------------------------------------------------------ files
def test_synset_file_is_in_the_dc_layout(tmp_path):
    """Read as BEARD (data[0]) and others (data[-1]) do, and without executing anything."""
    x, y = torch.randn(10, 3, 32, 32), torch.arange(10)
    rows = [{"model": "ConvNet", "n": 5, "clean_acc": 0.5 + i, "clamp_acc": 0, "robust_acc": 0.25 + i, "select_acc": None}
            for i in range(2)]
    utils.save_synset(tmp_path / "res.pt", [(x, y), (2 * x, y)], rows, {"packed": True, "mean": [0.1]})
    file = torch.load(tmp_path / "res.pt", weights_only=True)
    assert set(file) == {"data", "accs_all_exps", "meta"}
    assert torch.equal(file["data"][0][0], x) and torch.equal(file["data"][-1][0], 2 * x)
    assert file["data"][0][0].dtype == torch.float32 and file["data"][0][1].dtype == torch.int64
    assert file["accs_all_exps"] == {"ConvNet": [0.25, 1.25]} and file["meta"]["clean_accs"] == {"ConvNet": [0.5, 1.5]}
    assert [p.name for p in tmp_path.iterdir()] == ["res.pt"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    (tmp_path / "f.txt").write_text("old")

    def fail(partial):
        partial.write_text("half")
        raise OSError("disk full")
    with pytest.raises(OSError, match="disk full"):
        utils.write_atomically(tmp_path / "f.txt", fail)
    assert [p.read_text() for p in tmp_path.iterdir()] == ["old"]


def test_grid(tmp_path):
    """De-normalised, in order, one row per class."""
    from PIL import Image
    data = random_dataset()
    pixels = torch.linspace(0, 1, 6).view(6, 1, 1, 1).expand(6, 3, 32, 32)
    utils.save_grid(tmp_path / "grid.png", data.normalize(pixels), data, per_row=3)
    image = np.asarray(Image.open(tmp_path / "grid.png"))
    factor = image.shape[1] // (3 * 34 + 2)
    assert image.shape[1] >= 960 and image.shape[0] == factor * (2 * 34 + 2)
    centres = image[factor * 18::factor * 34, factor * 18::factor * 34, 0]  # (2, 3)
    assert np.allclose(centres.astype(int), [[0, 51, 102], [153, 204, 255]], atol=1)


def test_clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(utils.time, "perf_counter", lambda: now[0])
    clock = utils.Clock()
    clock.expect("iteration", 100, 2.0)
    clock.expect("evaluation", 3, 50.0)
    assert clock.eta() == 350
    for seconds, phase in ((30, "evaluation"), (1, "iteration"), (3, "iteration")):
        now[0] += seconds
        clock.lap(phase)
    assert clock.seconds("iteration") == 2 and clock.eta() == 98 * 2 + 2 * 30
    assert str(clock) == "2 s/iteration, ETA 4 min"


def test_versions_are_plain():
    assert json.loads(json.dumps(utils.versions())) == utils.versions()
    assert all(type(value) is str for value in utils.versions().values())


def test_network_is_the_same_after_the_cost_estimate():
    net = get_network("ConvNetBN", 3, 10, (32, 32), 0)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    utils.forward_flops(net, 3, (32, 32))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
