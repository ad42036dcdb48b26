"""Attacks of torchattacks by their names (runtime/torchattacks_attack.py)."""
import json
import random
import sys

import numpy as np
import pytest
import torch
from conftest import run_main

import evaluate
from attacks import attack, find_attack, get_threat_model
from networks import get_network
from runtime.safe_io import InputError

torchattacks = pytest.importorskip("torchattacks")


@pytest.fixture
def attacked(digits):
    x, labels = digits.get_batch("test", slice(12))
    net = get_network("MLP", 3, 10, (32, 32), seed=0)
    return net, x, labels, get_threat_model("pixel", digits)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_attacks_that_we_have_too(attacked, digits):
    """Theirs under our threat model is theirs on a network with the normalisation inside."""
    net, x, labels, threat = attacked
    ours = attack(net, x, labels, threat, "FGSM", targeted=False)
    theirs = attack(net, x, labels, threat, "torchattacks:FGSM", targeted=False)
    assert torch.allclose(ours, theirs, atol=1e-6) and not torch.equal(theirs, x)

    class Inside(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, pixels):
            return self.net(digits.normalize(pixels))

    pixels = digits.denormalize(x).clamp(0, 1)
    wanted = torchattacks.BIM(Inside(), eps=4 / 255)(pixels, labels)
    theirs = attack(net, x, labels, threat, "torchattacks:BIM", targeted=False, eps=4 / 255)
    assert torch.allclose(digits.denormalize(theirs), wanted, atol=1e-6)


@pytest.mark.parametrize("name", ["Jitter", "Pixle", "APGD"])
def test_random_numbers_are_ours(attacked, name):
    """Equal seeds, equal images; the global generators are not touched."""
    net, x, labels, threat = attacked
    states = [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]

    def run(seed):
        return attack(net, x, labels, threat, f"torchattacks:{name}", targeted=False,
                      generator=seeded(seed))
    first = run(0)
    assert torch.equal(first, run(0)) and (name == "APGD" or not torch.equal(first, run(1)))
    assert states == [random.getstate(), np.random.get_state()[1].tolist(),
                      torch.get_rng_state().tolist()]


def test_what_it_returns_is_checked(attacked, monkeypatch):
    net, x, labels, threat = attacked
    monkeypatch.setattr(torchattacks.FGSM, "forward",
                        lambda self, images, labels: (images + 0.1).clamp(0, 1))
    with pytest.raises(RuntimeError, match="left its bounds"):
        attack(net, x, labels, threat, "torchattacks:FGSM", targeted=False)


@pytest.mark.parametrize("name, message", [
    ("LGV", "has .*FGSM"), ("MultiAttack", "has "), ("os", "has "), ("__class__", "has ")])
def test_names_that_are_no_attack(name, message):
    with pytest.raises(InputError, match=message):
        find_attack(f"torchattacks:{name}")
    with pytest.raises(InputError, match="unknown attack"):
        find_attack(name)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchattacks", None)
    with pytest.raises(InputError, match="needs the package torchattacks"):
        find_attack("torchattacks:FGSM")


def test_the_grid_of_dd_robustbench(tmp_path, monkeypatch):
    """Its five attacks, at 2/255 in pixels; a flag that is given wins."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "DC_MLP_Digits_10_None_0.8.pth"
    torch.save(get_network("MLP", 3, 10, (32, 32), seed=0).state_dict(), path)
    command = ["--networks", path, "--limit", 8, "--no_sanity", "--no_compile"]
    run_main(evaluate, *command, "--grid", "ddrobustbench", "--out", tmp_path / "out")
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert {(row["attack"].partition(":")[2], row["eps"]) for row in rows if row["eps"]} == {
        (name, 2 / 255) for name in ("FGSM", "PGD", "VMIFGSM", "Jitter")}
    assert {row["threat_model"] for row in rows} == {"pixel"}
    assert "torchattacks:CW" in {row["attack"] for row in rows}
    assert "torchattacks:VMIFGSM" in (tmp_path / "out" / "results.md").read_text()
    args = evaluate.parse_args(["--networks", "x", "--grid", "beard", "--attacks", "FGSM"])
    assert (args.threat_model, args.attacks, args.aa_iterations) == (["published"], ["FGSM"], 10)
    with pytest.raises(InputError, match="add --threat_model pixel"):
        run_main(evaluate, *command, "--attacks", "torchattacks:FGSM", "--out", tmp_path / "no")
