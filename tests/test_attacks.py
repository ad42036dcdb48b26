import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import random_dataset
from scipy.optimize import linprog
from torch import nn

import attacks
import utils
from attacks import (ATTACKS, attack, attack_with_norms, autoattack, cw, deepfool, fgsm,
                     get_threat_model, pgd, pgd_l2, spsa, square_attack, start_noise)
from networks import get_network
from runtime.autoattack import project_linf
from runtime.perturbation import check_perturbation, deferred_checks
from synsets import TrainConfig

EPS = 8 / 255
QUICK = {  # enough to see the direction
    "AA": {"iterations": 3, "queries": 20},
    "Square": {"queries": 300},
    "CW": {"steps": 30, "c": 1e4, "logit_floor": -torch.inf},
    "Deepfool": {"steps": 4},
    "SPSA": {"samples": 32},
}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def images(n, channels=3, size=32, seed=0):
    """Random attack-space images in double precision: in single precision a gradient near zero
    takes either sign, and two attacks part."""
    return torch.rand(n, channels, size, size, generator=seeded(seed), dtype=torch.double)


# --------------------------------------------------------------------------- gradient-sign attacks
def rank_one_network(num_classes, best, worst):
    """Linear logits a_k * <v, x>: every input gradient is a multiple of v of known sign."""
    v = torch.randn(3 * 8 * 8, generator=seeded(1))
    a = torch.linspace(-0.4, 0.4, num_classes)
    a[best], a[worst] = 1.0, -1.0
    net = nn.Sequential(nn.Flatten(), nn.Linear(len(v), num_classes, bias=False))
    net[1].weight.data = a[:, None] * v[None, :] * 0.1
    return net, v.view(1, 3, 8, 8)


@pytest.mark.parametrize("targeted", [False, True])
def test_closed_form_on_a_linear_network(targeted):
    net, v = rank_one_network(10, best=3, worst=9)
    x = images(6, size=8).float()
    labels = torch.full((6,), 9 if targeted else 3)  # both forms go along -v
    options = {"eps": EPS, "targeted": targeted}
    noise = start_noise(x, EPS, seeded())
    for x_adv in (fgsm(net, x, labels, **options),
                  pgd(net, x, labels, step_size=2 / 255, **options),
                  pgd(net, x, labels, noise, step_size=2 / 255, **options)):
        assert torch.allclose(x_adv, (x - EPS * v.sign()).clamp(0, 1), atol=1e-6)


@pytest.mark.parametrize("targeted", [False, True])
def test_equals_torchattacks(targeted):
    torchattacks = pytest.importorskip("torchattacks")
    net = get_network("LeNet", 3, 10, (32, 32), seed=0).double().eval()
    x, labels = images(8), torch.arange(8)
    options = {"steps": 10, "random_start": False}
    for theirs, run, ours in (
            (torchattacks.FGSM(net, eps=EPS), fgsm, {"eps": EPS}),
            (torchattacks.PGD(net, eps=EPS, alpha=2 / 255, **options), pgd,
             {"eps": EPS, "step_size": 2 / 255}),
            (torchattacks.PGDL2(net, eps=128 / 255, alpha=15 / 255, **options), pgd_l2,
             {"eps": 128 / 255, "step_size": 15 / 255})):
        if targeted:
            theirs.set_mode_targeted_by_label(quiet=True)
        x_adv = run(net, x, labels, targeted=targeted, **ours)
        assert torch.allclose(theirs(x, labels), x_adv, atol=1e-9)


def pixel_mlp(digits, n):
    """(an MLP, the pixel threat model, `n` digits, labels)"""
    net = get_network("MLP", 3, 10, (32, 32), 0)
    return net, get_threat_model("pixel", digits), *digits.get_batch("train", slice(n))


def test_random_start(digits):
    """It is the generator's, uniform in the eps ball, and part of PGD unless it is turned off."""
    net, threat, x, labels = pixel_mlp(digits, 4)
    noise = start_noise(x, EPS, seeded()) / EPS
    assert noise.abs().max() <= 1 and abs(noise.mean()) < 0.02 and abs(noise.var() - 1 / 3) < 0.02
    for start in (None, start_noise(x, EPS / 4, seeded())):  # the step goes with eps
        z_adv = pgd(lambda z: net.eval()(threat.decode(z)), threat.encode(x), labels, start,
                    eps=EPS / 4, step_size=0.5 / 255)
        x_adv = attack(net, x, labels, threat, targeted=False, eps=EPS / 4, generator=seeded(),
                       random_start=start is not None)
        assert torch.equal(x_adv, threat.decode(z_adv))


# ------------------------------------------------------------- threat models, checks, the registry
@pytest.mark.parametrize("threat_name, num_classes",
                         [("published", 10), ("pixel", 10), ("pixel", 100)])
@pytest.mark.parametrize("name, targeted", [(name, targeted) for name, spec in ATTACKS.items()
                                            for targeted in {False, spec.targetable}])
def test_bounds_and_direction(threat_name, name, targeted, num_classes):
    """Inside the box, within eps, and closer to the goal on average."""
    data, spec = random_dataset(num_classes, per_class=2), ATTACKS[name]
    threat = get_threat_model(threat_name, data)
    net = get_network("LeNet", 3, num_classes, (32, 32), seed=0).eval()
    x, labels = data.get_batch("train", slice(16))
    if spec.keeps_failed_input:  # it leaves an image alone that is at its goal: start elsewhere
        labels = net(threat.clamp_only(x) if name == "CW" else x).argmax(1)
    goal = threat.target_labels(labels) if targeted else labels
    eps = 0.9 if name in ("AA", "Square") else None  # so few queries need more room
    net.train()
    x_adv, linf, l2 = attack_with_norms(net, x, labels, threat, name, targeted=targeted, eps=eps,
                                        generator=seeded(), micro_batch=5, **QUICK.get(name, {}))
    assert net.training
    before, after = x, x_adv
    if threat_name == "pixel":  # without a clamp
        before, after = data.denormalize(x), data.denormalize(x_adv)
    before = before.clamp(0, 1)
    kept = spec.keeps_failed_input & ((x_adv - x).flatten(1).abs().amax(1) < 1e-5)
    after = torch.where(kept.view(-1, 1, 1, 1), before, after)
    assert after.min() >= -1e-6 and after.max() <= 1 + 1e-6
    change = (after - before).flatten(1)
    assert torch.allclose(linf, change.abs().amax(1), atol=1e-5)
    assert torch.allclose(l2, change.norm(dim=1), atol=1e-4)
    largest = (linf if spec.norm == "Linf" else l2).max()
    if spec.eps:
        assert largest <= (eps or {"Linf": EPS, "L2": 128 / 255}[spec.norm]) + 1e-6
    if spec.keeps_failed_input and (threat_name == "published" or (name, targeted) == (
            "Square", True)):
        return  # too hard on an untrained network: some images fail
    assert largest > 0
    net.eval()
    gain = F.cross_entropy(net(x_adv), goal) - F.cross_entropy(net(threat.clamp_only(x)), goal)
    assert gain < 0 if targeted else gain > 0


def test_threat_models():
    ten, hundred = random_dataset(10, 1), random_dataset(100, 1)
    labels = torch.tensor([0, 8, 9, 57, 99])
    for name, expected in (("pixel", [1, 9, 10, 58, 0]), ("published", [1, 9, 0, 8, 0])):
        assert get_threat_model(name, hundred).target_labels(labels).tolist() == expected
    published, pixel = (get_threat_model(name, ten) for name in ("published", "pixel"))
    # published: an image far below the box becomes all zeros, whatever the attack
    x, net = torch.full((1, 3, 32, 32), -1.5), get_network("MLP", 3, 10, (32, 32), seed=0)
    x_adv = attack(net, x, torch.tensor([0]), published, generator=seeded())
    assert torch.equal(x_adv, torch.zeros_like(x)) and torch.equal(published.clamp_only(x), x_adv)
    x, _ = ten.get_batch("train", slice(4))
    assert torch.allclose(pixel.clamp_only(x), x, atol=1e-5)


@pytest.mark.parametrize("call, message", [
    (lambda: get_threat_model("pixels"), "'pixels'.*published, pixel"),
    (lambda: attack(None, None, None, None, "PDG"), "'PDG'.*FGSM, PGD"),
    (lambda: attack(None, None, None, get_threat_model("pixel"), "CW", targeted=False, eps=0.1),
     "CW has no eps"),
    (lambda: attack(None, None, None, get_threat_model("pixel"), "AA"), "AA has no targeted form"),
    (lambda: attacks.check_threat_model("published", random_dataset(3)), "10 classes, random has 3")
])
def test_what_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("change, eps, error, message", [
    (0.04, EPS, RuntimeError, "eps is 0.03"), (0.51, None, RuntimeError, "1.01"),
    (float("nan"), EPS, FloatingPointError, "not finite")])
@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_a_wrong_perturbation_is_refused(norm, change, eps, error, message):
    """At once, or where checks are read together."""
    x = torch.full((2, 3, 4, 4), 0.5)
    x_adv = x.clone()
    with deferred_checks() as checks:
        check_perturbation(x, x_adv, norm, eps)
        assert checks.read([torch.tensor(2.5), torch.tensor(1.0)]) == [2.5, 1.0]
    x_adv[1, 2, 3, 3] += change
    with pytest.raises(error, match=message), deferred_checks():
        check_perturbation(x, x, norm, eps)
        check_perturbation(x, x_adv, norm, eps)
        check_perturbation(x, x, norm, eps)
    with pytest.raises(error, match=message):
        check_perturbation(x, x_adv, norm, eps)


def test_a_failed_input_may_stay_outside_the_box():
    """Only for an attack that keeps failed inputs."""
    x = torch.full((2, 3, 4, 4), 1.5)
    x_adv = torch.stack([x[0], torch.full((3, 4, 4), 0.9)])
    linf, l2 = check_perturbation(x, x_adv, "L2", None, keeps_failed_input=True)
    assert linf[0] == 0 and linf[1] == pytest.approx(0.1) and l2[1] == pytest.approx(0.1 * 48**0.5)
    with pytest.raises(RuntimeError, match="1.5"):
        check_perturbation(x, x_adv, "L2", None)


def test_every_attack_is_checked(digits, monkeypatch):
    """An attack that forgets its projection does not get through."""
    broken = attacks.Attack(lambda model, x, labels, **_: (x + 0.1).clamp(0, 1))
    monkeypatch.setitem(ATTACKS, "FGSM", broken)
    net, threat, x, labels = pixel_mlp(digits, 2)
    with pytest.raises(RuntimeError, match="bounds"):
        attack(net, x, labels, threat, "FGSM")


# ---------------------------------------------------------------------------- minimum-norm attacks
def affine_network(num_classes=10):
    """Logits W x + b on 3x4x4 images, in double precision."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, num_classes)).double()
    net[1].weight.data.normal_(generator=seeded(3))
    return net.requires_grad_(False)


def nearest_boundary(net, x):
    """The change (N, 48) that leads each image to the nearest class boundary."""
    w, b = net[1].weight.numpy(), net[1].bias.numpy()
    changes = []
    for image, own in zip(x.flatten(1).numpy(), net(x).argmax(1).numpy()):
        others = np.delete(np.arange(len(w)), own)
        directions, gaps = w[others] - w[own], (w[own] - w[others]) @ image + b[own] - b[others]
        to_each = directions * (gaps / (directions**2).sum(1))[:, None]
        changes.append(min(to_each, key=np.linalg.norm))
    return torch.from_numpy(np.array(changes))


def test_deepfool_on_an_affine_network():
    """1.02 times the exact distance; images that are misclassified stay as they are."""
    net, x = affine_network(), 0.5 + 0.1 * images(40, size=4)
    expected = x.flatten(1) + 1.02 * nearest_boundary(net, x)
    labels = net(x).argmax(1)
    labels[:5] = (labels[:5] + 1) % 10
    x_adv = deepfool(net, x, labels)
    assert torch.equal(x_adv[:5], x[:5])
    inside = ((expected > 0) & (expected < 1)).all(1)
    inside[:5] = False
    assert inside.sum() > 10
    assert torch.allclose(x_adv.flatten(1)[inside], expected[inside], atol=1e-9)
    assert (net(x_adv[5:]).argmax(1) != labels[5:]).all()


@pytest.mark.parametrize("targeted", [False, True])
def test_cw_on_an_affine_network(targeted):
    """Reaches the goal with little more than the least possible change, and never with less."""
    net, x = affine_network(), 0.5 + 0.1 * images(20, size=4)
    labels = net(x).argsort(1, descending=True)[:, int(targeted)]
    least = nearest_boundary(net, x).norm(dim=1)
    x_adv = cw(net, x, labels, steps=300, targeted=targeted)
    assert ((net(x_adv).argmax(1) == labels) == targeted).all()
    l2 = (x_adv - x).flatten(1).norm(dim=1)
    assert (l2 >= least - 1e-9).all()
    assert targeted or (l2 <= 1.15 * least + 0.01).all()


@pytest.mark.parametrize("function, options", [(cw, {}), (deepfool, {"batch": 3})])
def test_images_do_not_depend_on_their_batch(function, options):
    """Images leave the batch when they are done, and DeepFool refills it."""
    net = get_network("LeNet", 3, 10, (32, 32), seed=0).double().eval()
    x = images(8)
    labels = net(x).argmax(1)
    labels[0] = (labels[0] + 1) % 10
    alone = torch.cat([function(net, x[i:i + 1], labels[i:i + 1]) for i in range(len(x))])
    assert torch.allclose(function(net, x, labels, **options), alone, atol=1e-9)


@pytest.fixture(scope="module")
def digits_network(digits):
    """(network in double precision, 100 test images in pixels, labels). Its digits are between 0.3
    and 0.7: minimum-norm attacks on them meet no clamp."""
    class Faded(nn.Module):
        def forward(self, x):
            return digits.normalize((x - 0.3) / 0.4)

    net = get_network("LeNet", 3, 10, (32, 32), seed=0)
    utils.train_on_set(net, *digits.get_batch("train", slice(600)),
                       TrainConfig(15, 0.05, 64, "none"), seeded())
    x, labels = digits.get_batch("test", slice(100))
    assert utils.accuracy(net, x, labels) > 0.85
    x = 0.3 + 0.4 * digits.denormalize(x).clamp(0, 1)
    net = nn.Sequential(Faded(), net).requires_grad_(False).double().eval()
    return net, x.double(), labels


def test_deepfool_skips_classes_that_do_not_matter(digits_network, monkeypatch):
    net, x, labels = copy.deepcopy(digits_network)
    sizes = []
    net.register_forward_pre_hook(lambda net, inputs: sizes.append(len(inputs[0])))
    quick = deepfool(net, x, labels)
    quick_passes = sum(sizes)
    monkeypatch.setattr(attacks, "STEEPER", float("inf"))
    monkeypatch.setattr(attacks, "MARGIN", float("inf"))
    whole = deepfool(net, x, labels)
    other = ((quick - whole).abs() > 1e-9).flatten(1).any(1)
    changes = [(x_adv - x)[other].flatten(1).norm(dim=1) for x_adv in (quick, whole)]
    assert other.sum() <= 2 and (changes[0] < 1.05 * changes[1]).all()
    assert quick_passes < 2 * (sum(sizes) - quick_passes)
    sizes.clear()  # no step moves images on a flat network: one pass a class, and no more
    flat = deepfool(lambda z: 0 * net(z) + torch.eye(10).double()[labels[:2]], x[:2], labels[:2])
    assert torch.equal(flat, x[:2]) and sizes == [2] * 9


@pytest.mark.parametrize("name, targeted, steps, n", [
    ("CW", False, 100, 30), ("CW", True, 100, 30), ("Deepfool", False, 2, 100),
    ("Deepfool", False, 50, 40)])
def test_minimum_norm_attacks_equal_torchattacks(digits_network, name, targeted, steps, n):
    """The same accuracy, and nearly the same change.

    Images are inside the box: where the clamp cuts its steps, DeepFool ends on the boundary, right
    or wrong by the last bit, and torchattacks attacks images one by one.
    """
    torchattacks = pytest.importorskip("torchattacks")
    net, x, labels = digits_network[0], digits_network[1][:n], digits_network[2][:n]
    goal = (labels + 1) % 10 if targeted else labels
    if name == "CW":
        theirs = torchattacks.CW(net, c=1, kappa=0, steps=steps, lr=0.01)
        floor = 0.0 if targeted else -torch.inf
        ours = cw(net, x, goal, steps=steps, targeted=targeted, logit_floor=floor)
    else:
        theirs = torchattacks.DeepFool(net, steps=steps)
        ours = deepfool(net, x, labels, steps=steps)
    theirs.set_device("cpu")
    if targeted:
        theirs.set_mode_targeted_by_label(quiet=True)
        sharp = cw(net, x, goal, steps=steps, targeted=True)  # without the quirk it is stronger
        assert (net(sharp).argmax(1) == goal).sum() >= (net(ours).argmax(1) == goal).sum()
    theirs = theirs(x, goal)
    alone = torch.cat([net(image[None]).argmax(1) for image in theirs])
    assert abs(int((net(ours).argmax(1) == labels).sum() - (alone == labels).sum())) <= 1
    ratio = (ours - x).flatten(1).norm(dim=1).mean() / (theirs - x).flatten(1).norm(dim=1).mean()
    assert 0.95 < ratio < (1.15 if name == "CW" else 1.05)  # our CW lets images go early


# ------------------------------------------------------------------------------ AutoAttack, query
def test_autoattack_and_square_equal_pyautoattack(digits_network, monkeypatch):
    from pyautoattack import AutoAttack, fab_base
    from pyautoattack.square import SquareAttack
    net = copy.deepcopy(digits_network[0]).float()
    x, labels = digits_network[1][:10].float(), digits_network[2][:10]
    seed = int(torch.randint(2**31, (), generator=seeded(5)))

    def standard():
        with torch.random.fork_rng():
            theirs = AutoAttack(net, norm="Linf", eps=EPS, seed=seed, version="standard")
            for part in (theirs.apgd, theirs.apgd_targeted, theirs.fab):
                part.n_iter = 20
            theirs.square.n_queries, theirs.square.resc_schedule = 100, True
            return theirs.run_standard_evaluation(x, labels, batch_size=10)[0]

    theirs = standard()
    monkeypatch.setattr(fab_base, "projection_linf", project_linf)
    theirs_with_our_projection = standard()
    state = torch.get_rng_state()
    ours = autoattack(net, x, labels, eps=EPS, iterations=20, queries=100, generator=seeded(5))
    assert torch.equal(ours, theirs_with_our_projection)
    assert (ours - theirs).abs().max() <= 1e-5
    for targeted in (False, True):
        goal = (labels + 1) % 10 if targeted else labels
        with torch.random.fork_rng():
            theirs = SquareAttack(net, eps=EPS, n_queries=50, p_init=0.8, loss="margin", seed=seed,
                                  targeted=targeted, resc_schedule=True).perturb(x, goal)
        ours = square_attack(net, x, goal, queries=50, targeted=targeted, generator=seeded(5))
        assert torch.equal(ours, theirs)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("num_classes", [2, 3, 4, 5])
def test_autoattack_with_few_classes(num_classes):
    """A linear network is robust on an image exactly where each margin is more than eps times the
    L1 norm of the difference of the two classes."""
    net = affine_network(num_classes).float()
    w, x = net[1].weight, (0.3 + 0.4 * images(60, size=4)).float()  # no clamp helps
    logits = net(x)
    labels = logits.argmax(1)
    margins = logits.gather(1, labels[:, None]) - logits
    least = margins / (w[labels][:, None] - w[None]).abs().sum(2)  # (N, classes)
    least[torch.arange(60), labels] = torch.inf
    least = least.amin(1)  # the eps that each image takes
    eps = float(least.median()) + 1e-4
    x_adv = autoattack(net, x, labels, eps=eps, iterations=20, queries=50, generator=seeded())
    robust = net(x_adv).argmax(1) == labels
    clear = (least - eps).abs() > 2e-3
    assert torch.equal(robust[clear], (least > eps)[clear])
    assert clear.sum() > 40 and 15 < robust.sum() < 45


def test_projection_of_fab_is_the_nearest_point():
    """Against the linear programme: the least s with |d| <= s, w.(x + d) = b, 0 <= x + d <= 1."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        x = rng.choice([0, 1, 0.3, rng.random()], 12)
        w = rng.normal(size=12) * rng.choice([0, 1, 1], 12)
        b = w @ rng.random(12)  # the plane meets the box
        eye, one = np.eye(12), np.ones((12, 1))
        found = linprog(np.r_[np.zeros(12), 1], A_ub=np.block([[eye, -one], [-eye, -one]]),
                        b_ub=np.zeros(24), A_eq=np.r_[w, 0][None], b_eq=[b - w @ x],
                        bounds=[*zip(-x, 1 - x), (0, None)])
        d = project_linf(*(torch.tensor(t, dtype=torch.double)[None] for t in (x, w, b)))[0].numpy()
        assert found.status == 0 and np.abs(d).max() == pytest.approx(found.fun, abs=1e-9)
        assert w @ (x + d) == pytest.approx(b, abs=1e-9)
        assert (x + d).min() >= 0 and (x + d).max() <= 1
    # A plane out of reach: as close as the box allows; no plane: nothing moves.
    x, w = torch.rand(1, 12, generator=seeded()), torch.ones(1, 12)
    assert torch.allclose(x + project_linf(x, w, torch.tensor([20.0])), torch.ones(1, 12))
    assert not project_linf(x, 0 * w, torch.ones(1)).any()


def test_spsa_sees_the_gradient_of_an_affine_network():
    """With many samples a step is -lr * sign of the margin's gradient; steps stay within eps, and
    only logits are used."""
    net = affine_network(num_classes=2)
    x = torch.full((3, 3, 4, 4), 0.5, dtype=torch.double)
    labels, w = torch.tensor([0, 1, 0]), net[1].weight
    direction = (w[0] - w[1]).sign().view(1, 3, 4, 4) * torch.tensor([1, -1, 1]).view(3, 1, 1, 1)
    generator, calls = seeded(), []

    def model(z):
        calls.append(len(z))
        assert not torch.is_grad_enabled()
        return net(z)

    for targeted, sign in ((False, -1), (True, 1)):
        step = spsa(model, x, labels, samples=2000, targeted=targeted, generator=generator) - x
        assert torch.allclose(step.abs(), torch.full_like(step, 0.01), atol=1e-6)
        assert (step.sign() == sign * direction).double().mean() > 0.9
    assert sum(calls) == 2 * 3 * 2 * 2000
    change = spsa(net, x, labels, steps=10, samples=8, generator=generator) - x
    assert change.abs().max() == pytest.approx(EPS)
