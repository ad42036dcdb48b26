import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import random_dataset
from torch import nn

import attacks
from attacks import ATTACKS, THREAT_MODELS, attack_images, audit, fgsm, get_threat_model, pgd
from networks import get_network


def rank_one_network(num_classes, best, worst):
    """Linear logits a_k * <v, x>: the input gradient of any cross-entropy is a multiple of v of known sign."""
    v = torch.randn(3 * 8 * 8, generator=torch.Generator().manual_seed(1))
    a = torch.linspace(-0.4, 0.4, num_classes)
    a[best], a[worst] = 1.0, -1.0
    net = nn.Sequential(nn.Flatten(), nn.Linear(len(v), num_classes, bias=False))
    net[1].weight.data = a[:, None] * v[None, :] * 0.1
    return net, v.view(1, 3, 8, 8)


@pytest.mark.parametrize("num_classes", [10, 100])
@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("attack, options", [
    (fgsm, {}),
    (pgd, {"step_size": 2 / 255, "random_start": False}),
    (pgd, {"step_size": 2 / 255, "generator": torch.Generator().manual_seed(0)}),
], ids=["FGSM", "PGD", "PGD random start"])
def test_closed_form_on_a_linear_network(attack, options, targeted, num_classes):
    best, worst = 3, num_classes - 1
    net, v = rank_one_network(num_classes, best, worst)
    x = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    labels = torch.full((6,), worst if targeted else best)  # away from `best`, or towards `worst`: both along -v
    expected = (x - 8 / 255 * v.sign()).clamp(0, 1)
    assert torch.allclose(attack(net, x, labels, eps=8 / 255, targeted=targeted, **options), expected, atol=1e-6)


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("num_classes", [10, 100])
def test_equals_torchattacks(num_classes, targeted):
    torchattacks = pytest.importorskip("torchattacks")
    net = get_network("ConvNetW32", 3, num_classes, (32, 32), seed=0).eval()
    x = torch.rand(12, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(12) * 7 % num_classes
    for theirs, ours in (
            (torchattacks.FGSM(net, eps=8 / 255), fgsm(net, x, labels, eps=8 / 255, targeted=targeted)),
            (torchattacks.PGD(net, eps=8 / 255, alpha=2 / 255, steps=10, random_start=False),
             pgd(net, x, labels, eps=8 / 255, step_size=2 / 255, targeted=targeted, random_start=False))):
        if targeted:
            theirs.set_mode_targeted_by_label(quiet=True)
        # A gradient of about 0 may take either sign; those pixels are few and the rest is equal.
        difference = (theirs(x, labels) - ours).abs()
        assert (difference > 1e-5).float().mean() < 1e-4


@pytest.mark.parametrize("num_classes", [10, 100])
@pytest.mark.parametrize("name", THREAT_MODELS)
@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("targeted", [False, True])
def test_bounds_and_direction(name, attack, targeted, num_classes):
    """Both threat models: inside the box, within eps, and the loss that the attack works on got the better of."""
    data = random_dataset(num_classes, per_class=2)
    threat = get_threat_model(name, data)
    net = get_network("ConvNetW32", 3, num_classes, (32, 32), seed=0).train()
    x, labels = data.take("train", slice(16))
    x_adv = attack_images(net, x, labels, threat, torch.Generator().manual_seed(0), attack=attack, targeted=targeted, chunk=5)
    assert net.training
    if name == "pixel":
        mean, std = (torch.tensor(data_stat).view(1, 3, 1, 1) for data_stat in (data.mean, data.std))
        before, after = x * std + mean, x_adv * std + mean
    else:
        before, after = x.clamp(0, 1), x_adv
    assert after.min() >= -1e-6 and after.max() <= 1 + 1e-6
    assert 0 < (after - before).abs().max() <= 8 / 255 + 1e-6
    goal = threat.target_labels(labels) if targeted else labels
    net.eval()
    before_loss, after_loss = F.cross_entropy(net(threat.clamp_only(x)), goal), F.cross_entropy(net(x_adv), goal)
    assert after_loss < before_loss if targeted else after_loss > before_loss


def test_target_labels():
    labels = torch.tensor([0, 8, 9, 57, 99])
    hundred = random_dataset(100, per_class=1)
    assert get_threat_model("pixel", hundred).target_labels(labels).tolist() == [1, 9, 10, 58, 0]
    assert get_threat_model("published", hundred).target_labels(labels).tolist() == [1, 9, 0, 8, 0]  # the quirk
    assert get_threat_model("pixel", random_dataset(10, 1)).target_labels(torch.tensor([9])).tolist() == [0]


def test_threat_model_constants():
    data = random_dataset(10, 1)
    published, pixel = (get_threat_model(name, data) for name in ("published", "pixel"))
    assert (published.eps, published.step_size) == (8 / 255, 2 / 225)
    assert (pixel.eps, pixel.step_size) == (8 / 255, 2 / 255)
    x = torch.full((1, 3, 32, 32), -1.5)  # published: an image far below the box becomes all zeros, whatever the attack
    net = get_network("ConvNetW32", 3, 10, (32, 32), seed=0)
    x_adv = attack_images(net, x, torch.tensor([0]), published, torch.Generator().manual_seed(0))
    assert torch.equal(x_adv, torch.zeros_like(x))
    assert torch.equal(published.clamp_only(x), torch.zeros_like(x))
    x, _ = data.take("train", slice(4))
    assert torch.allclose(pixel.clamp_only(x), x, atol=1e-5)  # images survive pixel's control


def test_published_projects_around_the_unclamped_image():
    """One pixel at -0.02: its ball of 8/255 reaches 0.0114, not 8/255."""
    net, v = rank_one_network(10, best=3, worst=9)
    x = torch.full((1, 3, 8, 8), -0.02)
    x_adv = pgd(net, x, torch.tensor([3]), eps=8 / 255, step_size=2 / 225, random_start=False)
    expected = torch.where(v < 0, torch.tensor(8 / 255 - 0.02), torch.tensor(0.0))
    assert torch.allclose(x_adv, expected, atol=1e-6)


def test_random_start_is_the_generators():
    net = get_network("ConvNetW32", 3, 10, (32, 32), seed=0).eval()
    x, labels = torch.rand(4, 3, 32, 32), torch.arange(4)
    state = torch.get_rng_state()
    first, again, other = (pgd(net, x, labels, step_size=1 / 255, steps=1, generator=torch.Generator().manual_seed(s))
                           for s in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(state, torch.get_rng_state())
    starts = pgd(net, x, labels, step_size=0.0, steps=1, generator=torch.Generator().manual_seed(0)) - x
    inner = starts[(x > 0.05) & (x < 0.95)] * 255 / 8
    assert inner.abs().max() <= 1 + 1e-4 and abs(inner.mean()) < 0.02 and abs(inner.var() - 1 / 3) < 0.02  # uniform


@pytest.mark.parametrize("broken, error", [(0.04, RuntimeError), (float("nan"), FloatingPointError)])
def test_audit_refuses(broken, error):
    x = torch.full((2, 3, 4, 4), 0.5)
    x_adv = x.clone()
    assert audit(x, x_adv, 8 / 255) == 0
    x_adv[1, 2, 3, 3] += broken
    with pytest.raises(error):
        audit(x, x_adv, 8 / 255)


def test_audit_refuses_values_outside_the_box():
    x = torch.ones(1, 3, 4, 4)
    with pytest.raises(RuntimeError, match="1.01"):
        audit(x, x + 0.01, 8 / 255)


def test_every_attack_is_audited(monkeypatch):
    """An attack that forgets its projection does not get through attack_images."""
    data = random_dataset(10, 1)
    monkeypatch.setitem(attacks.ATTACKS, "FGSM", lambda model, x, labels, **_: (x + 0.1).clamp(0, 1))
    x, labels = data.take("train", slice(2))
    with pytest.raises(RuntimeError, match="bounds"):
        attack_images(get_network("MLP", 3, 10, (32, 32), 0), x, labels, get_threat_model("pixel", data), None, attack="FGSM")


def test_unknown_names():
    data = random_dataset(10, 1)
    with pytest.raises(ValueError, match="'pixels'.*published, pixel"):
        get_threat_model("pixels", data)
    with pytest.raises(ValueError, match="'PDG'.*FGSM, PGD"):
        attack_images(None, None, None, None, None, attack="PDG")


def test_pgd_against_a_step_by_step_numpy_loop():
    """Ten steps of projected sign ascent with a numpy gradient, on a two-layer network."""
    rng = np.random.default_rng(0)
    w1, w2 = rng.normal(size=(12, 48)) / 4, rng.normal(size=(10, 12))
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 12, bias=False), nn.Tanh(), nn.Linear(12, 10, bias=False)).double()
    net[1].weight.data, net[3].weight.data = torch.from_numpy(w1), torch.from_numpy(w2)
    x, y = rng.random(48), 4
    z = x.copy()
    for _ in range(10):
        hidden = np.tanh(w1 @ z)
        p = np.exp(w2 @ hidden)
        p = p / p.sum()
        gradient = w1.T @ ((w2.T @ (p - np.eye(10)[y])) * (1 - hidden**2))
        z = np.clip(x + np.clip(z + 2 / 255 * np.sign(gradient) - x, -8 / 255, 8 / 255), 0, 1)
    ours = pgd(net, torch.from_numpy(x).view(1, 3, 4, 4), torch.tensor([y]), step_size=2 / 255, random_start=False)
    assert np.allclose(ours.flatten().numpy(), z, atol=1e-12)
