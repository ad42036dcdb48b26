"""Random streams, training on a set, accuracy, the evaluation of a set, metrics of robustness."""
import argparse
import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, random_dataset

import attacks
import utils
from attacks import get_threat_model
from datasets import load_dataset
from formats.synset_file import SyntheticSet
from runtime.seeding import make_generator, derive_seed
from networks import get_network


# --------------------------------------------------------------------------------------------------------- random streams
def test_streams_are_repeatable_and_differ():
    keys = [(0, "data"), (0, "dsa"), (1, "data"), ("data",), (0, "data", 0), (0, "data", 1)]
    seeds = [derive_seed(seed, *key) for seed in (0, 1) for key in keys]
    assert len(set(seeds)) == len(seeds) and all(0 <= s < 2**63 for s in seeds)
    draws = [torch.rand(4, generator=make_generator(7, "data", 3)) for _ in range(2)]
    assert torch.equal(*draws) and not torch.equal(draws[0], torch.rand(4, generator=make_generator(7, "data", 4)))


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


def test_the_cosine_against_a_literal_loop():
    """lr_net times half a cosine, a value a step, momentum kept; with soft labels, of which rows go with their images."""
    g = torch.Generator().manual_seed(0)
    x, soft = torch.randn(10, 3, 4, 4, generator=g), torch.randn(10, 3, generator=g)
    nets = [torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 3)) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    utils.train_on_set(nets[0], x, soft, epochs=3, lr_net=0.1, batch_train=4, dsa_strategy="none", temperature=2.0,
                       lr_schedule="cosine", generator=torch.Generator().manual_seed(1))
    generator, step = torch.Generator().manual_seed(1), 0
    weights = list(nets[1].parameters())
    velocity = [torch.zeros_like(w) for w in weights]
    for epoch in range(4):
        order = torch.randperm(10, generator=generator)
        for start in (0, 4, 8):
            index = order[start:start + 4]
            p = (soft[index] / 2).exp() / (soft[index] / 2).exp().sum(1, keepdim=True)
            loss = 4 * -(p * (nets[1](x[index]) / 2).log_softmax(1)).sum(1).mean()
            gradients = torch.autograd.grad(loss, weights)
            for w, v, gradient in zip(weights, velocity, gradients):
                v.mul_(0.9).add_(gradient + 5e-4 * w.data)
                w.data -= 0.1 * 0.5 * (1 + math.cos(math.pi * step / 12)) * v
            step += 1
    for ours, theirs in zip(nets[0].parameters(), nets[1].parameters()):
        assert torch.allclose(ours, theirs, atol=1e-6)
    with pytest.raises(ValueError, match="'linear'.*step, cosine"):
        utils.train_on_set(nets[0], x, soft, epochs=1, lr_net=0.1, batch_train=4, dsa_strategy="none", lr_schedule="linear",
                           generator=generator)


def test_accuracy_counts():
    class Echo(torch.nn.Module):
        def forward(self, x):
            return x.flatten(1)[:, :4]
    x = F.one_hot(torch.arange(7) % 4, 4).float().view(7, 1, 2, 2)
    assert utils.accuracy(Echo(), x, torch.arange(7) % 4, micro_batch=3) == 1
    assert utils.accuracy(Echo(), x, torch.tensor([0, 1, 2, 0, 0, 0, 0]), micro_batch=3) == pytest.approx(4 / 7)


@pytest.mark.parametrize("name, targeted, steps, radii", [("published", True, 10, {"robust_acc": 8}),
                                                         ("pixel", False, 20, {"robust_2_acc": 2, "robust_4_acc": 4,
                                                                               "robust_acc": 8})])
def test_how_robustness_is_judged(digits, monkeypatch, name, targeted, steps, radii):
    """PGD with a random start, the steps, form and radii of the threat model, and a step size that goes with the radius."""
    asked, threat = [], get_threat_model(name, digits)
    net, generator = get_network("MLP", 3, 10, (32, 32), 0), torch.Generator().manual_seed(0)

    def pgd(model, x, labels, noise, **options):
        asked.append((options, labels))
        return x.clamp(0, 1)
    monkeypatch.setitem(attacks.ATTACKS, "PGD", dataclasses.replace(attacks.ATTACKS["PGD"], run=pgd))
    images, labels = digits.get_batch("test", slice(20))
    measured = utils.robust_accuracies(net, images, labels, threat, generator)
    assert list(measured) == list(radii) and threat.eval_cost == steps * len(radii)
    for (options, goal), (column, radius) in zip(asked, radii.items(), strict=True):
        assert options == {"eps": radius / 255, "step_size": threat.step_size * radius / 8, "steps": steps,
                           "targeted": targeted}
        assert torch.equal(goal, (labels + 1) % 10 if targeted else labels)
        assert measured[column] == utils.accuracy(net, threat.clamp_only(images), labels)


def flags(**changes):
    values = {"eval_mode": "S", "model": "ConvNetW32", "num_eval": 2, "test_limit": 0, "select": "train", "seed": 0,
              "epoch_eval_train": 20, "lr_net": 0.01, "batch_train": 64, "dsa_strategy": "none",
              "label_temperature": 1.0, "lr_schedule": "step"}
    return argparse.Namespace(**{**values, **changes})


def test_evaluator(digits, monkeypatch):
    """Trained on ten real digits a class, networks know most of the others; the rows are complete and repeatable."""
    monkeypatch.setattr(utils, "SELECT_IMAGES", 60)
    threat = get_threat_model("pixel", digits)
    x = torch.cat([digits.sample_class(c, 10, torch.Generator().manual_seed(0)) for c in range(10)])
    y = torch.arange(10).repeat_interleave(10)
    evaluate = utils.Evaluator(flags(test_limit=50), digits, threat)
    rows = evaluate(SyntheticSet(x, y), 1, 0, "test", select=True)
    assert len(rows) == 2 and rows[0]["robust_acc"] != rows[1]["robust_acc"]  # two networks, not one twice
    for row in rows:
        assert row["clean_acc"] > 0.8 and row["n"] == 50
        assert row["clamp_acc"] == row["clean_acc"]  # pixel: the clamp does nothing
        assert row["clean_acc"] >= row["robust_2_acc"] >= row["robust_4_acc"] >= row["robust_acc"]
    again = utils.Evaluator(flags(test_limit=50, select="test"), digits, threat)(SyntheticSet(x, y), 1, 0, "test", select=True)
    for row, same in zip(rows, again):
        assert same["select_acc"] == pytest.approx(np.mean([same[k] for k in ("robust_2_acc", "robust_4_acc", "robust_acc")]))
        assert row["select_acc"] > 0.5 and row["select_acc"] != same["select_acc"]
        assert [row[k] for k in ("clean_acc", "robust_acc")] == [same[k] for k in ("clean_acc", "robust_acc")]
    other = utils.Evaluator(flags(test_limit=50, seed=1, num_eval=1), digits, threat)(SyntheticSet(x, y), 1, 0, "test")
    assert other[0]["select_acc"] is None
    assert [r["robust_acc"] for r in other] != [r["robust_acc"] for r in rows]


def test_selection_images_are_fixed_training_images(digits):
    first, second = (utils.Evaluator(flags(seed=seed), random_dataset(10, 300), None).select_set for seed in (0, 1))
    assert len(first[0]) == 2000 and torch.equal(first[0], second[0])
    assert len(utils.Evaluator(flags(), digits, None).select_set[0]) == 1437


# -------------------------------------------------------------------------------------------------- metrics of robustness
# What the published benchmark logged for BACON on CIFAR-10 at ipc 1, 10, 50: clean (accuracy, seconds of the targeted and of
# the untargeted pass), then (accuracy, seconds) by attack. Percent.
BACON_CLEAN = [(44.95, 2.5, 2.25), (61.73, 3.06, 2.29), (69.95, 3.04, 2.31)]
BACON_TARGETED = [(29.59, 3.01), (30.61, 8.52), (33.73, 8.71), (36.58, 73.94), (39.13, 2.85), (40.1, 8.32), (44.06, 8.5),
                  (44.93, 73.75), (44.68, 3.01), (45.59, 11.96), (50.81, 12.22), (44.71, 75.82)]
BACON_UNTARGETED = [(24.51, 3.12), (20.78, 8.79), (33.72, 8.77), (11.49, 1647.63), (13.68, 74.66), (17.64, 762.71),
                    (33.27, 2.84), (26.45, 8.29), (44.05, 8.46), (16.11, 2102.68), (11.84, 73.91), (23.85, 1086.94),
                    (38.16, 3.68), (28.86, 12.21), (50.8, 9.18), (18.28, 2374.8), (8.31, 76.49), (27.0, 968.53)]


@pytest.mark.parametrize("attacked, expected", [
    (BACON_TARGETED, {"RR": 36.83, "I-RR": 84.37, "AE": 29.83}),
    (BACON_UNTARGETED, {"RR": 32.87, "I-RR": 50.49, "AE": 21.53, "CREI": 27.20, "I-CREI": 36.01}),
])
def test_golden_metrics(attacked, expected):
    metrics = utils.robustness_metrics([c[0] / 100 for c in BACON_CLEAN], [a[0] / 100 for a in attacked],
                                       [min(c[1:]) for c in BACON_CLEAN], [a[1] for a in attacked])
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, abs=0.01), name


def test_metrics_at_their_edges():
    same = utils.robustness_metrics([0.5], [0.5, 0.5], [1.0], [1.0, 1.0])
    assert same["RR"] == 0 and same["I-RR"] == 100 and same["AE"] == 0
    assert utils.robustness_metrics([0.5], [0.6, 0.4], [1.0], [2.0, 3.0], crei_weight=1.0)["CREI"] == pytest.approx(100)
    assert utils.robustness_metrics([0.5], [0.6, 0.58, 0.45], [1.0], [2.0, 3.0, 4.0])["RR"] > 100
    for clean, attacked in (([], [0.5]), ([0.5], []), ([0.0], [0.0])):
        with pytest.raises(ValueError):
            utils.robustness_metrics(clean, attacked, [1.0], [1.0])


def test_recorded_results_agree_with_the_published_logs():
    """All 10 000 test images: BACON as crafting network, on BACON and transferred to IDM and MTT, targeted and untargeted."""
    path = ROOT / "result" / "recorded" / "released_published" / "results.json"
    if not path.exists():
        pytest.advance("not recorded yet")
    logs = json.loads((ROOT / "published.json").read_text())["log_transfer_accuracy_fraction_crafted_on_BACON_ipc50"]
    tolerance = {"Clean": 0.05, "FGSM": 0.1, "PGD_L2": 0.1, "PGD": 0.2, "CW": 1.0}  # points
    compared = 0
    for row in json.loads(path.read_text())["rows"]:
        if row["attack"] in tolerance and (row["crafted_on"].startswith("BACON") or row["attack"] == "Clean"):
            form = "untargeted" if row["targeted"] is False else "targeted"
            difference = 100 * (row["accuracy"] - logs[row["attack"]][form][row["method"]])
            assert abs(difference) <= tolerance[row["attack"]] + 0.005, (row, difference)
            assert row["n"] == 10000
            compared += 1
    assert compared == 3 + 4 * 2 * 3

    path = ROOT / "result" / "recorded" / "released_published_1000" / "results.json"
    slow = {(row["attack"], row["method"]): row["accuracy"] for row in json.loads(path.read_text())["rows"]}
    for attack, method in itertools.product(("Deepfool", "AA"), ("BACON", "IDM", "MTT")):
        # DeepFool on its own network leaves its examples on the boundary: see docs/earlier_results.md.
        if (attack, method) != ("Deepfool", "BACON"):
            assert abs(slow[attack, method] - logs[attack]["untargeted"][method]) <= 0.03


def test_the_diagonal_of_the_transfer_is_white_box():
    """Two networks a method: attacked itself, 10 %; from its sister, 30 %; from another method, 40 %."""
    rows = []
    for evaluated_on in ("A0", "A1", "B0", "B1"):
        common = {"threat_model": "pixel", "n": 10, "ipc": 1, "method": evaluated_on[0], "evaluated_on": evaluated_on}
        rows.append({**common, "attack": "Clean", "targeted": None, "eps": None, "crafted_on": evaluated_on, "accuracy": 0.5})
        for crafted_on in ("A0", "A1", "B0", "B1"):
            accuracy = 0.1 if crafted_on == evaluated_on else 0.3 if crafted_on[0] == evaluated_on[0] else 0.4
            rows.append({**common, "attack": "PGD", "targeted": False, "eps": 8 / 255, "crafted_on": crafted_on,
                         "accuracy": accuracy})
    threats = {"pixel": get_threat_model("pixel", load_dataset("Digits", "."))}
    cells = {(e["crafted_on"], e["evaluated_on"]): e["I-RR"] for e in utils.transfer_of(rows, threats)}
    white_box, transfer = (100 * (1 - (0.5 - a) ** 2 / 0.5**2) for a in (0.1, 0.4))
    assert cells == pytest.approx({("A", "A"): white_box, ("B", "B"): white_box, ("A", "B"): transfer, ("B", "A"): transfer})
