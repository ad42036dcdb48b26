"""The method: losses, a matching step against a slow literal loop, the pool step, the loop."""
import contextlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import random_dataset

import experiment
import rome
import ROME_cifar10
from attacks import get_threat_model
from augment import dsa_apply, dsa_draw, unpack
from network_pool import NetworkPool, PoolMember
from networks import get_network
from runtime.progress import ProgressTimer


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def small_args(flags, **changes):
    """The flags of ROME_cifar10.py, and values that it has no flag for."""
    args = ROME_cifar10.parse_args(["--dataset", "Digits", "--model", "MLP", *flags.split()])
    return SimpleNamespace(**{**vars(args), **changes})


# ------------------------------------------------------------------------------------- the losses
def test_losses_against_numpy():
    rng = np.random.default_rng(0)
    syn, adv = rng.normal(size=(7, 20)), rng.normal(size=(11, 20))
    difference = syn.mean(0) - adv.mean(0)
    for distance, expected in (("tv", (0.5 * np.abs(difference).sum()) ** 2),
                               ("l2", (difference**2).sum())):
        loss = rome.robustness_aligned_loss(torch.from_numpy(syn), torch.from_numpy(adv.mean(0)),
                                            distance)
        assert loss.item() == pytest.approx(expected)
    logits = rng.normal(size=(6, 4))
    loss = -np.log(np.exp(logits[:, 2]) / np.exp(logits).sum(1))
    wrong = logits.argmax(1) != 2
    x = torch.from_numpy(logits)
    assert rome.performance_aligned_loss(x, 2).item() == pytest.approx(loss.mean())
    assert rome.performance_aligned_loss(x, 2, True).item() == pytest.approx((loss * wrong).mean())
    assert 0 < wrong.sum() < 6


# ------------------------------------------------ a matching step against the slow literal loop
@pytest.fixture
def double():
    """In double precision a rounding error does not turn the sign of a gradient."""
    torch.set_default_dtype(torch.double)
    yield
    torch.set_default_dtype(torch.float)


def literal_attack(net, x, c, threat, data, args, rng):
    """PGD, targeted at the next class, line by line; without --attack_prior the images as given."""
    pixel = threat == "pixel"
    if not args.attack_prior:  # not even clamped
        return x
    z = data.denormalize(x).clamp(0, 1) if pixel else x
    eps, step = args.attack_eps / 255, 2 / 255 if pixel else 2 / 225
    if args.attack_step_size:
        step = args.attack_step_size / 255
    noise = torch.empty_like(z).uniform_(-eps, eps, generator=rng["attack"])
    z_adv = (z + noise).clamp(0, 1)
    for _ in range(args.attack_steps):
        z_adv = z_adv.detach().requires_grad_()
        scores = net(data.normalize(z_adv) if pixel else z_adv)
        target = torch.full((len(z),), (c + 1) % (3 if pixel else 10))
        F.cross_entropy(scores, target).backward()
        z_adv = z_adv.detach() - step * z_adv.grad.sign()  # targeted: downhill
        z_adv = torch.max(torch.min(z_adv, z + eps), z - eps).clamp(0, 1)
    return data.normalize(z_adv) if pixel else z_adv


def literal_matching(image_syn, net, data, args, w_f, rng, rounds, threat):
    """SPEC 1.1 step 3, class after class, every line spelled out."""
    velocity, ipc = torch.zeros_like(image_syn), args.ipc
    for _ in range(rounds):
        drawn = []
        for c in range(3):  # the draws, in the order of the classes
            index = data.sample_class_indices(c, args.batch_real, rng["data"])
            img_real, _ = data.get_batch("train", index)
            drawn.append((img_real, dsa_draw(args.dsa_strategy, data.size, rng["dsa"])))
        for c, (img_real, draw) in enumerate(drawn):
            x = dsa_apply(img_real, draw)
            if args.real_kept and ipc == 1 and args.pack == 1:
                losses = [F.cross_entropy(net(image[None]), torch.tensor([c])).item()
                          for image in x]
                order = sorted(range(len(x)), key=losses.__getitem__)
                x = torch.stack([x[i] for i in order[:args.real_kept]])
            x_adv = literal_attack(net, x, c, threat, data, args, rng)
            emb_adv = net.features(x_adv).flatten(1).mean(0)

            leaf = image_syn.clone().requires_grad_()
            img_syn = dsa_apply(unpack(leaf[c * ipc:(c + 1) * ipc], args.pack), draw)
            difference = net.features(img_syn).flatten(1).mean(0) - emb_adv
            if args.align_distance == "tv":
                loss = 0.2 * sum(d.abs() for d in difference) ** 2 / 4
            else:
                loss = 0.2 * sum(d * d for d in difference)
            if args.syn_ce:
                scores = net(img_syn)
                labels = torch.full((len(scores),), c)
                perf = F.cross_entropy(scores, labels, reduction="none")
                if ipc == 1 and args.pack == 1:
                    perf = perf * (scores.argmax(1) != c)
                loss = loss + 0.8 * args.ce_weight * w_f * perf.mean()
            gradient, = torch.autograd.grad(loss, leaf)
            velocity = 0.5 * velocity + gradient
            image_syn = image_syn - args.lr_img * velocity
    return image_syn


@pytest.mark.parametrize("threat", ["pixel", "published"])
@pytest.mark.parametrize("classes_at_once, flags", [
    (3, "--ipc 2"), (1, "--ipc 2 --pack 2"), (3, "--ipc 1"), (2, "--ipc 1 --real_kept 4"),
    (2, "--ipc 1 --pack 2 --no_syn_ce"), (3, "--ipc 2 --pack 2 --no_attack_prior"),
    (3, "--ipc 2 --align_distance l2"),
    (2, "--ipc 2 --attack_eps 4 --attack_step_size 1.5 --attack_steps 3")])
def test_matching_step_against_the_literal_loop(double, threat, classes_at_once, flags):
    args = small_args("--ce_weight 0.5 --batch_real 6 --lr_img 0.2 --embed_last 1000 "
                      "--dsa_strategy color_crop_cutout_flip --real_kept 0 " + flags)
    data = random_dataset(num_classes=3)
    # The targets of `published` need ten outputs: its 10 classes are a quirk.
    net = get_network("MLP", 3, 3 if threat == "pixel" else 10, (32, 32), seed=1)
    start = torch.randn(3 * args.ipc, 3, 32, 32, generator=seeded(5))

    def generators():
        return {name: seeded(i) for i, name in enumerate(("data", "dsa", "attack"))}
    expected = literal_matching(start, net, data, args, 40.0, generators(), 3, threat)
    image_syn, rng = start.clone().requires_grad_(), generators()
    member = PoolMember(net, None, torch.tensor(4.0), seen=10)  # w_f = 40 percent
    optimizer = rome.image_optimizer(args, image_syn)
    for _ in range(3):
        rome.matching_step(image_syn, optimizer, member, data, get_threat_model(threat, data), args,
                           rng, 256, classes_at_once)
    assert (expected - start).abs().flatten(1).amax(1).min() > 1e-3  # every image moved
    assert torch.allclose(image_syn, expected, atol=1e-9)


@pytest.mark.parametrize("make", [lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.5),
                                  lambda p: torch.optim.SGD(p, lr=0.3),
                                  lambda p: torch.optim.Adam(p, lr=0.1)])
def test_one_pass_equals_class_after_class(double, make):
    """Three classes of two images, four rounds. The gradient of an image here is its sine."""
    start = torch.randn(6, 1, 2, 2)
    ours, literal = start.clone().requires_grad_(), start.clone().requires_grad_()
    optimizer, reference = make([ours]), make([literal])
    for _ in range(4):
        for c in range(3):
            literal.grad = torch.zeros_like(start)
            literal.grad[2 * c:2 * c + 2] = literal.detach()[2 * c:2 * c + 2].sin()
            reference.step()
        before = ours.detach().clone()
        found = rome.lookahead_images(ours, optimizer, 3)
        assert torch.equal(ours, before) and torch.equal(found[:2], before[:2])
        rome.step_per_class(ours, optimizer, found.sin(), 3)
    assert torch.equal(ours, literal)


# ------------------------------------------------------------------------------------ the pool
def test_pool_step_counts_and_learns(digits):
    """model_train_steps batches for each network; the running accuracy is that of these."""
    args = small_args("--model ConvNetW32 --model_train_steps 3 --trained_bs 64 --attack_steps 3 "
                      "--net_decay")
    pool = rome.make_pool(args, 0, digits, [])
    rng = {name: seeded() for name in ("data", "pool", "attack")}
    threat = get_threat_model("pixel", digits)
    losses = [rome.pool_step(pool.sample(2, rng["pool"]), digits, threat, args, rng, 64).item()
              for _ in range(4)]
    assert sum(member.seen for member in pool.members) == 4 * 2 * 3 * 64
    assert losses[0] > 2 and losses[-1] < 0.8 * losses[0]
    assert 15 < max(member.running_accuracy().item() for member in pool.members) < 100


def test_a_clean_pool_is_trained_on_clean_images(digits, monkeypatch):
    monkeypatch.setattr(rome, "attack", lambda *a, **k: pytest.fail("attacked"))
    args, seen = small_args("--model_train_steps 1 --no_attack_pool --net_start 1"), []
    pool = rome.make_pool(args, 0, digits, [])
    pool.members[0].net.register_forward_hook(lambda module, inputs, _: seen.append(inputs[0]))
    rome.pool_step(pool.members, digits, get_threat_model("pixel", digits), args,
                   {"data": seeded()}, 64)
    assert torch.equal(seen[0], digits.sample(256, seeded())[0])


def test_the_optimizers_and_the_pool_are_those_of_the_flags(digits):
    image = torch.zeros(1).requires_grad_()
    for flags, kind, expected in (
            ("", torch.optim.SGD, {"lr": 1.0, "momentum": 0.5}),
            ("--momentum_img 0.7 --lr_img 0.2", torch.optim.SGD, {"lr": 0.2, "momentum": 0.7}),
            ("--optim adam --lr_img 0.3", torch.optim.Adam, {"lr": 0.3})):
        optimizer = rome.image_optimizer(small_args(flags), image)
        assert isinstance(optimizer, kind) and expected.items() <= optimizer.param_groups[0].items()
    for flags, *expected in (("", 0.01, 0, 0, 3, 10),
                             ("--net_decay --lr_net 0.05 --net_start 5 --net_slice_min 2",
                              0.05, 0.9, 5e-4, 5, 2)):
        pool = rome.make_pool(small_args(flags), 0, digits, [])
        group = pool.members[0].optimizer.param_groups[0]
        assert [group["lr"], group["momentum"], group["weight_decay"], len(pool.members),
                pool.slice_min] == expected


# ------------------------------------------------------------------------------- the outer loop
class FakeRun:
    """A run that writes nothing."""

    def register_state(self, state):
        return False

    def save_if_due(self, it):
        pass

    delay_signals = staticmethod(contextlib.nullcontext)
    log = log_metrics = save_grid = lambda self, *args, **options: None


def distill(flags, data, evaluator):
    """The loop of ROME_cifar10.py; its best set."""
    timer = ProgressTimer()
    for phase in ("iteration", "evaluation", "report"):
        timer.add_phase(phase, 10, 1.0)
    setup = experiment.Setup(data, get_threat_model("pixel", data), [], evaluator, FakeRun(), timer,
                             64)
    return ROME_cifar10.distill(small_args("--ipc 1 " + flags), 0, setup)


def test_a_round_is_repeated_with_the_same_networks(digits, monkeypatch):
    calls = []

    def match(image_syn, optimizer_img, member, *rest):
        calls.append(member)
        return torch.zeros(2)

    def train(members, *rest):
        calls.append(members)
        return torch.zeros(())
    monkeypatch.setattr(rome, "matching_step", match)
    monkeypatch.setattr(rome, "pool_step", train)
    monkeypatch.setattr(experiment.Distillation, "save_best", lambda self: None)
    rows = [{"model": "MLP", "robust_acc": 0.5, "select_acc": 0.5, "n": 1}]
    distill("--outer_loop 3 --fetch_net_num 4 --Iteration 1 --net_start 20 --inner_loop 5 "
            "--select last", digits, lambda *key, select=False: rows)  # --inner_loop has no effect
    assert len(calls) == 3 * (2 + 1) and len({id(member) for member in calls[:2]}) == 2
    assert len(calls[2]) == 4 and calls[3:6] == calls[:3] and calls[6:] == calls[:3]


@pytest.mark.parametrize("select, evaluations, kept, reported", [
    ("train", [2, 4, 6, "final"], [2, 4], 0.9), ("test", [2, 4, 6], [2, 4], 0.4),
    ("last", [2, 4, 6], [2, 4, 6], 0.5)])
def test_distill_evaluates_resets_renews_and_keeps_a_set(digits, monkeypatch, select, evaluations,
                                                         kept, reported):
    """The order of SPEC 1.1. Evaluation 2 of 3 is the best; --select train reports fresh ones."""
    evaluated, saved, pushed, resets = [], [], [], []
    accs = {2: 0.3, 4: 0.6, 6: 0.5, "final": 0.1}

    def evaluate(synset, pack, exp, it, select=False):
        evaluated.append((it, synset.images.clone()))
        assert select == (it != "final") and pack == 1 and synset.soft_labels is None
        return [{"model": "MLP", "robust_acc": 1 - accs[it], "select_acc": accs[it], "n": 1}]
    push = NetworkPool.push
    monkeypatch.setattr(NetworkPool, "push", lambda self, n: (pushed.append(n), push(self, n)))
    monkeypatch.setattr(NetworkPool, "reset_running_accuracy",
                        lambda self: resets.append(len(evaluated)))
    monkeypatch.setattr(experiment.Distillation, "save_best",
                        lambda self: saved.append(self.best["iteration"]))
    best = distill("--Iteration 6 --batch_real 4 --eval_interval 2 --net_generate_interval 3 "
                   f"--trained_bs 4 --model_train_steps 1 --lr_img 0.1 --select {select}", digits,
                   evaluate)
    assert [it for it, _ in evaluated] == evaluations
    assert saved == kept and best["iteration"] == kept[-1]
    assert torch.equal(best["set"][0], evaluated[len(kept) - 1][1])
    assert resets == [1, 2, 3] and pushed == [3, 1, 1]  # at the start, at iterations 0 and 3
    assert not torch.equal(evaluated[0][1], evaluated[1][1])
    assert best["rows"][0]["robust_acc"] == pytest.approx(reported)


@pytest.mark.parametrize("flags, expected", [
    ("", [100, 200, 300]), ("--Iteration 250 --eval_mode SS", [100, 200, 250]),
    ("--eval_mode M", [300]), ("--Iteration 0", [0])])
def test_evaluation_iterations(flags, expected):
    """Not 0; the last one included."""
    args = small_args("--Iteration 300 --eval_interval 100 " + flags)
    assert sorted(experiment.evaluation_iterations(args)) == expected
