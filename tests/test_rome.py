"""The method: losses, one outer iteration against a slow literal loop, and the script as its users run it."""
import contextlib
import json
import os
import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, random_dataset
from PIL import Image

import evaluate
import pretrain
import report
import ROME_cifar10 as rome
import ROME_cifar100
import utils
from attacks import get_threat_model
from augment import dsa_apply, dsa_draw, unpack
import datasets
from runtime.command_line import run_script
from datasets import DATASETS
from formats.synset_file import SyntheticSet, save_synset
from network_pool import NetworkPool, PoolMember
from runtime.measures import percent
from runtime.safe_io import InputError
from networks import get_network


# ------------------------------------------------------------------------------------------------------------- the losses
def test_robustness_aligned_loss_against_numpy():
    rng = np.random.default_rng(0)
    syn, adv = rng.normal(size=(7, 20)), rng.normal(size=(11, 20))
    expected = (0.5 * np.abs(syn.mean(0) - adv.mean(0)).sum()) ** 2
    assert rome.robustness_aligned_loss(torch.from_numpy(syn), torch.from_numpy(adv.mean(0))).item() == pytest.approx(expected)


def test_performance_aligned_loss_against_numpy():
    logits = np.random.default_rng(0).normal(size=(6, 4))
    loss = -np.log(np.exp(logits[:, 2]) / np.exp(logits).sum(1))
    x = torch.from_numpy(logits)
    assert rome.performance_aligned_loss(x, 2, False).item() == pytest.approx(loss.mean())
    assert rome.performance_aligned_loss(x, 2, True).item() == pytest.approx((loss * (logits.argmax(1) != 2)).mean())
    assert rome.performance_aligned_loss(torch.tensor([[0.0, 3.0]]), 1, True) == 0


def test_lowest_loss():
    net = get_network("MLP", 3, 10, (32, 32), 0)
    x, _ = random_dataset().get_batch("train", slice(40))
    losses = F.cross_entropy(net(x), torch.full((40,), 6), reduction="none").detach().numpy()
    expected = {image.numpy().tobytes() for image in x[np.argsort(losses)[:7]]}
    assert {image.numpy().tobytes() for image in rome.lowest_loss(net, x, 6, 7)} == expected


# -------------------------------------------------------------------------- one outer iteration against the slow literal loop
class SmallData:
    """Three classes of 8x8 images in double precision, so that a rounding error does not turn a sign."""

    num_classes, size, device, channel, micro_batch = 3, (8, 8), torch.device("cpu"), 1, 256

    def class_size(self, c):
        return 10

    class_groups = datasets.Dataset.class_groups

    def __init__(self):
        self.x = torch.randn(30, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        self.y = torch.arange(30) % 3

    def sample_class_indices(self, c, n, generator):
        index = (self.y == c).nonzero().flatten()
        return index[torch.randperm(len(index), generator=generator)[:n]]

    def get_batch(self, split, index):
        return self.x[index], self.y[index]

    def sample_class(self, c, n, generator):
        return self.get_batch("train", self.sample_class_indices(c, n, generator))[0]

    def normalize(self, z):
        return (z - 0.4) / 0.3

    def denormalize(self, x):
        return x * 0.3 + 0.4


def small_network():
    g = torch.Generator().manual_seed(1)
    net = SimpleNamespace(w1=torch.randn(5, 64, generator=g, dtype=torch.float64) / 8,
                          w2=torch.randn(3, 5, generator=g, dtype=torch.float64))

    class Net(torch.nn.Module):
        def forward(self, x):
            return self.embed_and_classify(x)[1]

        def embed_and_classify(self, x, last=None):
            embedding = torch.tanh(x.flatten(1) @ net.w1.T)
            return embedding, embedding @ net.w2.T
    return Net()


def slow_updates(image_syn, ipc, net, data, args, w_f, rng, passes, threat, kept=None):
    """SPEC 1.1 step 3, class after class, every line spelled out; SGD with momentum 0.5 on the whole set at every step."""
    velocity = torch.zeros_like(image_syn)
    for _ in range(passes):
        batches = []
        for c in range(3):  # the draws, in the order of the classes
            img_real = data.sample_class(c, args.batch_real, rng["data"])
            batches.append((img_real, dsa_draw(args.dsa_strategy, data.size, rng["dsa"])))
        for c, (img_real, draw) in enumerate(batches):
            x = dsa_apply(img_real, draw)
            if kept:  # the augmented images on which the network is most certain of their class
                losses = [float(F.cross_entropy(net(image[None]), torch.tensor([c]))) for image in x]
                x = torch.stack([x[i] for i in sorted(range(len(x)), key=losses.__getitem__)[:kept]])
            z = data.denormalize(x).clamp(0, 1) if threat == "pixel" else x
            eps, step = 8 / 255, 2 / 255 if threat == "pixel" else 2 / 225
            z_adv = (z + torch.empty_like(z).uniform_(-eps, eps, generator=rng["attack"])).clamp(0, 1)
            if not args.attack_prior:  # the images themselves, not even clamped
                z_adv = data.denormalize(x) if threat == "pixel" else x
            for _ in range(10 if args.attack_prior else 0):
                z_adv = z_adv.detach().requires_grad_()
                scores = net(data.normalize(z_adv) if threat == "pixel" else z_adv)
                target = torch.full((len(z),), (c + 1) % (3 if threat == "pixel" else 10))
                F.cross_entropy(scores, target).backward()
                z_adv = z_adv.detach() - step * z_adv.grad.sign()  # targeted: downhill
                z_adv = torch.max(torch.min(z_adv, z + eps), z - eps).clamp(0, 1)
            emb_adv = net.embed_and_classify(data.normalize(z_adv) if threat == "pixel" else z_adv)[0].mean(0)

            leaf = image_syn.clone().requires_grad_()
            img_syn = leaf[c * ipc:(c + 1) * ipc]
            img_syn = dsa_apply(unpack(img_syn) if args.aug else img_syn, draw)
            emb_syn, scores = net.embed_and_classify(img_syn)
            difference = emb_syn.mean(0) - emb_adv
            loss = 0.2 * (sum(d.abs() for d in difference) ** 2 / 4 if args.align_distance == "tv" else
                          sum(d * d for d in difference))
            if args.syn_ce:
                perf = F.cross_entropy(scores, torch.full((len(scores),), c), reduction="none")
                if ipc == 1 and not args.aug:
                    perf = perf * (scores.argmax(1) != c)
                loss = loss + 0.8 * args.ce_weight * w_f * perf.mean()
            loss.backward()
            velocity = 0.5 * velocity + leaf.grad
            image_syn = image_syn - args.lr_img * velocity
    return image_syn


@pytest.mark.parametrize("threat", ["pixel", "published"])
@pytest.mark.parametrize("ipc, aug, syn_ce, attack, distance, group, kept", [
    (2, False, True, True, "tv", 3, None), (2, True, True, True, "tv", 1, None), (1, False, True, True, "tv", 3, None),
    (1, False, True, True, "tv", 2, 4), (1, True, False, True, "tv", 2, None), (2, True, True, False, "tv", 3, None),
    (2, False, True, True, "l2", 3, None)])
def test_update_against_the_literal_loop(monkeypatch, threat, ipc, aug, syn_ce, attack, distance, group, kept):
    data, net = SmallData(), small_network()
    args = SimpleNamespace(ipc=ipc, aug=aug, pack=2 if aug else 1, syn_ce=syn_ce, ce_weight=0.5, align_weight=0.2,
                           batch_real=6, lr_img=0.2, embed_last=1000, dsa_strategy="color_crop_cutout_flip", optim="sgd",
                           attack_prior=attack, align_distance=distance)
    monkeypatch.setattr(datasets, "CLASS_GROUP_IMAGES", 6 * group)
    monkeypatch.setattr(rome, "REAL_KEPT", kept)
    model = get_threat_model(threat, data)
    if threat == "published":  # ten target classes by quirk; this network has three, and classes 1 and 2 aim at 2 and 3
        net_three = net
        net = small_network()
        net.embed_and_classify = lambda x, last=None: (lambda e, s: (e, F.pad(s, (0, 7))))(*net_three.embed_and_classify(x))
    start = torch.randn(3 * ipc, 1, 8, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64)

    def streams():
        return {name: torch.Generator().manual_seed(i) for i, name in enumerate(("data", "dsa", "attack"))}
    passes = 3
    expected = slow_updates(start, ipc, net, data, args, 40.0, streams(), passes, threat, kept)

    image_syn, rng = start.clone().requires_grad_(), streams()
    member = PoolMember(net, None, torch.tensor(4.0, dtype=torch.float64), seen=10)  # w_f = 40 percent
    optimizer = rome.image_optimizer(args, image_syn)
    for _ in range(passes):
        rome.matching_step(image_syn, optimizer, member, data, model, args, rng)
    assert (expected - start).abs().min() > 0  # every image moved
    assert torch.allclose(image_syn, expected, atol=1e-9)


def test_momentum_moves_the_other_classes():
    """In the second pass class 0's images also move, by momentum alone, while classes 1 and 2 take their steps."""
    data, net = SmallData(), small_network()
    args = SimpleNamespace(ipc=1, aug=False, pack=1, syn_ce=False, ce_weight=0, align_weight=0.2, batch_real=6, lr_img=0.2,
                           embed_last=1000, dsa_strategy="none", optim="sgd", attack_prior=True, align_distance="tv")
    image_syn = torch.randn(3, 1, 8, 8, dtype=torch.float64).requires_grad_()
    optimizer = rome.image_optimizer(args, image_syn)
    steps = []
    step = optimizer.step
    optimizer.step = lambda: (step(), steps.append(image_syn.detach().clone()))
    member = PoolMember(net, None, torch.zeros(()))
    rome.matching_step(image_syn, optimizer, member, data, get_threat_model("pixel", data), args,
                       {name: torch.Generator().manual_seed(0) for name in ("data", "dsa", "attack")})
    assert len(steps) == 6  # three to see where the turns find the images, and three turns
    first, second = steps[4][0] - steps[3][0], steps[5][0] - steps[4][0]
    assert first.abs().max() > 0 and torch.allclose(second, 0.5 * first)


def test_train_pool_counts_and_learns(digits):
    """model_train_steps batches for each network; the running accuracy is that of the attacked batches."""
    args = SimpleNamespace(model_train_steps=3, trained_bs=64, attack_pool=True)
    pool = NetworkPool(lambda k: get_network("ConvNetW32", 3, 10, (32, 32), k),
                         lambda net: torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9), limit=100)
    rng = {name: torch.Generator().manual_seed(0) for name in ("data", "pool", "attack")}
    threat = get_threat_model("pixel", digits)
    losses = [rome.pool_step(pool.sample(2, rng["pool"]), digits, threat, args, rng).item() for _ in range(4)]
    assert sum(member.seen for member in pool.members) == 4 * 2 * 3 * 64
    assert losses[0] > 2 and losses[-1] < 0.8 * losses[0]
    assert 15 < max(member.running_accuracy().item() for member in pool.members) < 100


def test_the_optimisers_are_the_ones_of_the_flags(digits):
    pools = [utils.new_pool(rome.parse_args(["--model", "MLP", *flags]), 0, digits, [])
             for flags in ([], ["--net_decay", "--lr_net", "0.05"])]
    plain, decay = (pool.members[0].optimizer.param_groups[0] for pool in pools)
    assert (plain["lr"], plain["momentum"], plain["weight_decay"]) == (0.01, 0, 0)
    assert (decay["lr"], decay["momentum"], decay["weight_decay"]) == (0.05, 0.9, 5e-4)
    adam = rome.image_optimizer(rome.parse_args(["--optim", "adam", "--lr_img", "0.3"]), torch.zeros(1).requires_grad_())
    assert isinstance(adam, torch.optim.Adam) and adam.param_groups[0]["lr"] == 0.3


def test_outer_loop_repeats_image_updates_and_pool_training_with_the_same_networks(digits, monkeypatch):
    args = rome.parse_args(["--dataset", "Digits", "--model", "MLP", "--outer_loop", "3", "--train_net_num", "2",
                            "--fetch_net_num", "4", "--inner_loop", "5"])  # the last one has no effect
    pool, rng, calls = utils.new_pool(args, 0, digits, []), {"pool": torch.Generator().manual_seed(0)}, []
    pool.push(20)

    def update(image_syn, optimizer_img, member, *rest):
        calls.append(member)
        return torch.zeros(2)
    monkeypatch.setattr(rome, "matching_step", update)
    monkeypatch.setattr(rome, "pool_step", lambda members, *rest: (calls.append(members), torch.zeros(()))[1])
    rome.outer_iteration(1, None, None, pool, digits, None, args, rng)
    assert len(calls) == 3 * (2 + 1) and len({id(member) for member in calls[:2]}) == 2 and len(calls[2]) == 4
    assert calls[3:6] == calls[:3] and calls[6:] == calls[:3]


@pytest.mark.parametrize("select, evaluations, kept", [("train", [2, 4, 6, "final"], [2, 4]), ("test", [2, 4, 6], [2, 4]),
                                                       ("last", [2, 4, 6], [2, 4, 6])])
def test_distill_evaluates_resets_renews_and_keeps_a_set(digits, monkeypatch, select, evaluations, kept):
    """The order of SPEC 1.1; evaluation 2 of 3 is the best; with --select train the final figures are of fresh networks."""
    args = rome.parse_args(["--dataset", "Digits", "--model", "MLP", "--ipc", "1", "--Iteration", "6", "--eval_interval", "2",
                            "--net_generate_interval", "3", "--batch_real", "4", "--trained_bs", "4", "--model_train_steps",
                            "1", "--lr_img", "0.1", "--select", select])
    evaluated, saved, pushed, resets = [], [], [], []
    accs = {2: 0.3, 4: 0.6, 6: 0.5, "final": 0.1}

    def evaluate(one, pack, exp, it, select=False):
        evaluated.append((it, one.images.clone()))
        assert select == (it != "final") and pack == 1 and one.soft_labels is None
        return [{"model": "MLP", "robust_acc": 1 - accs[it], "select_acc": accs[it]}]
    monkeypatch.setattr(NetworkPool, "push", lambda self, n, push=NetworkPool.push: (pushed.append(n), push(self, n)))
    monkeypatch.setattr(NetworkPool, "reset_running_accuracy", lambda self: resets.append(len(evaluated)))
    run_ = SimpleNamespace(report_evaluation=lambda *a, **k: None, save_grid=lambda *a: None,
                           report_iteration=lambda *a: None,
                           save_best=lambda exp, best, recipe: saved.append(best["iteration"]),
                           experiment=None, register_state=lambda state: None, checkpoint=lambda it: None,
                           delay_signals=contextlib.nullcontext)
    timer = SimpleNamespace(step=lambda phase: None)
    best = rome.distill(args, 0, digits, get_threat_model("pixel", digits), [], evaluate, run_, timer)
    assert [it for it, _ in evaluated] == evaluations
    assert saved == kept and best["iteration"] == kept[-1] and torch.equal(best["set"][0], evaluated[len(kept) - 1][1])
    assert resets == [1, 2, 3] and pushed == [3, 1, 1]  # the first three, then at iterations 0 and 3
    assert not torch.equal(evaluated[0][1], evaluated[1][1])
    assert best["rows"][0]["robust_acc"] == pytest.approx({"train": 0.9, "test": 0.4, "last": 0.5}[select])


def test_evaluation_iterations():
    def args(**k):
        return SimpleNamespace(**{"Iteration": 300, "eval_interval": 100, "eval_mode": "S", **k})
    assert sorted(utils.evaluation_iterations(args())) == [100, 200, 300]  # not 0; the last one included
    assert sorted(utils.evaluation_iterations(args(Iteration=250, eval_mode="SS"))) == [100, 200, 250]
    assert sorted(utils.evaluation_iterations(args(eval_mode="M"))) == [300]
    assert sorted(utils.evaluation_iterations(args(Iteration=0))) == [0]


def test_initial_set(digits):
    args = SimpleNamespace(ipc=2)
    real, labels = rome.initial_set(args, digits, torch.Generator().manual_seed(0), "real", 1)
    assert real.shape == (20, 3, 32, 32) and labels.tolist() == sorted(list(range(10)) * 2)
    x, y = digits.get_batch("train", slice(None))
    for image, label in zip(real, labels):
        assert label in y[(x == image).flatten(1).all(1)]
    packed, _ = rome.initial_set(args, digits, torch.Generator().manual_seed(0), "real", 2)
    assert packed.shape == (20, 3, 32, 32)
    noise, _ = rome.initial_set(args, digits, torch.Generator().manual_seed(0), "noise", 2)
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02


def test_a_set_as_the_start(digits, tmp_path):
    """The images of a file, experiment by experiment; nothing that would be read otherwise than it was meant."""
    args, labels = SimpleNamespace(ipc=2), torch.arange(10).repeat_interleave(2)
    made = [SyntheticSet(torch.randn(20, 3, 32, 32), labels) for _ in range(2)]
    path = str(tmp_path / "set.pt")
    save_synset(path, made, [], {"pack": 4, "dataset": "Digits"})
    for exp in (0, 1, 2):
        images, same = rome.initial_set(args, digits, None, path, 4, exp)
        assert torch.equal(images, made[exp % 2].images) and torch.equal(same, labels)
    for pack, ipc, meta, target in ((2, 2, {"pack": 4}, labels), (4, 1, {"pack": 4}, labels),
                                    (4, 2, {"pack": 4, "dataset": "CIFAR10"}, labels), (4, 2, {"pack": 4}, labels.flip(0))):
        save_synset(path, [SyntheticSet(made[0].images, target)], [], meta)
        with pytest.raises(InputError, match="--init .*set.pt: images .*this run has .*class after class"):
            rome.initial_set(SimpleNamespace(ipc=ipc), digits, None, path, pack)


@pytest.mark.parametrize("flags, message", [
    (["--model", "ConvNetBN"], "--model ConvNetBN has BatchNorm.*choose one of MLP.*ConvNetGN.*--robust_prior"),
    (["--model", "ConvNetW32", "--embed_last", "0"], "--embed_last 0 leaves none of the 12 layers of ConvNetW32"),
    (["--model", "ConvNetW32", "--embed_last", "-12"], "--embed_last -12 leaves none"),
])
def test_what_the_pool_does_not_admit(digits, flags, message):
    with pytest.raises(InputError, match=message):
        utils.check_sizes(rome.parse_args(["--dataset", "Digits", "--ipc", "1", *flags]), digits)
    utils.check_sizes(rome.parse_args(["--dataset", "Digits", "--ipc", "1", "--embed_last", "-11"]), digits)
    utils.check_sizes(rome.parse_args(["--dataset", "Digits", "--ipc", "1", "--model", "ConvNetBN", "--robust_prior", "f"]),
                      digits)


# -------------------------------------------------------------------------------------------------------------- commands
def commands():
    """The commands of command.txt, one a line."""
    text = (ROOT / "command.txt").read_text()
    return [line.strip() for line in text.splitlines() if re.match(r"\s*python", line)]


@pytest.mark.parametrize("command", commands(), ids=lambda c: re.sub(r"\W+", "-", c)[-60:])
def test_commands_parse(command):
    words = shlex.split(command)
    script = next(word for word in words if word.endswith(".py"))
    modules = {"ROME_cifar10.py": rome, "ROME_cifar100.py": ROME_cifar100, "pretrain.py": pretrain, "evaluate.py": evaluate,
               "report.py": report}
    args = modules[script].parse_args(words[words.index(script) + 1:])
    if script.startswith("ROME"):
        assert args.aug == ("-unpacked" not in args.method) and args.lr_img == 0.2 and args.dataset.lower() in script


def test_the_two_scripts_differ_in_header_and_dataset_block_only():
    def body(script):
        text = (ROOT / script).read_text()
        start, end = text.index("# ---- dataset block"), text.index("# ---- end of the dataset block")
        return text[text.index('"""\nimport'):start] + text[end:]
    assert body("ROME_cifar10.py") == body("ROME_cifar100.py")
    c100 = ROME_cifar100.parse_args([])
    assert (c100.dataset, c100.num_eval, c100.syn_ce, c100.ce_weight) == ("CIFAR100", 20, False, 0.1)
    assert not ROME_cifar100.CE_ONLY_WHILE_WRONG


def test_the_verbatim_published_command():
    """SPEC 1.2: the IPC-50 CIFAR-10 command runs as it stands."""
    verbatim = ("python3 -u ROME_cifar10.py --dataset CIFAR10 --model ConvNet --ipc 50 --dsa_strategy "
                "color_crop_cutout_flip_scale_rotate --init real --lr_img 0.2 --num_exp 5 --num_eval 5 --net_train_real "
                "--eval_interval 500 --outer_loop 1 --mismatch_lambda 0 --net_decay --embed_last 1000 --syn_ce --ce_weight 0.1 "
                "--train_net_num 1 --aug")
    assert verbatim in commands()
    args = rome.parse_args(shlex.split(verbatim)[3:])
    assert (args.ipc, args.lr_img, args.ce_weight, args.syn_ce, args.aug, args.net_decay) == (50, 0.2, 0.1, True, True, True)
    assert (args.threat_model, args.Iteration, args.batch_real, args.select) == ("published", 20000, 256, "train")


def test_defaults_of_the_specification():
    args = vars(rome.parse_args([]))
    expected = dict(dataset="CIFAR10", model="ConvNet", ipc=50, eval_mode="S", num_exp=5, num_eval=1, epoch_eval_train=1000,
                    Iteration=20000, lr_img=1.0, lr_net=0.01, batch_real=256, batch_train=256, trained_bs=256, init="real",
                    dsa_strategy="color_crop_cutout_flip_scale_rotate", data_path="./data", save_path="./result", outer_loop=1,
                    eval_interval=100, net_num=100, net_push_num=1, net_generate_interval=30, net_begin=0,
                    net_end=100000, train_net_num=2, fetch_net_num=2, model_train_steps=10, embed_last=-1, syn_ce=True,
                    ce_weight=1.0, optim="sgd", net_decay=False, aug=False, zca=False, align_weight=0.2)
    assert {name: args[name] for name in expected} == expected


def test_switches():
    assert not rome.parse_args(["--no_syn_ce"]).syn_ce and rome.parse_args(["--aug"]).aug
    assert not rome.parse_args(["--no_aug", "--no_net_decay", "--no_zca"]).zca


# ------------------------------------------------------------------------------------------------------------- bad input
def fails(capsys, monkeypatch, folder, *flags):
    """Run the script in this process; it must end in one line. Returns (exit status, that line)."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["ROME_cifar10.py", *flags])
    with pytest.raises(SystemExit) as stop:
        run_script(rome.main)
    return stop.value.code, capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize("flags, says", [
    (["--dataset", "MNIST"], "MNIST.*CIFAR10.*Digits"),
    (["--model", "Resnet"], "Resnet.*ConvNetW32"),
    (["--threat_model", "pixels"], "pixels.*published.*pixel"),
    (["--eval_mode", "Q"], "Q.*S.*M"),
    (["--optim", "lbfgs"], "lbfgs.*sgd.*adam"),
    (["--init", "zeros"], "--init zeros is no file, nor real or noise"),
    (["--dsa_strategy", "color_blur"], "blur.*color, crop"),
    (["--ipc", "0"], "--ipc: 0 is not a number of at least 1"),
    (["--Iteration", "-5"], "--Iteration: -5"),
    (["--model_train_steps", "-1"], "--model_train_steps: -1"),
    (["--lr_img", "nan"], "--lr_img: nan"),
    (["--lr_img", "much"], "--lr_img.*much"),
    (["--align_weight", "1.5"], "1.5 is not between 0 and 1"),
    (["--ipcs", "5"], "--ipcs"),
    (["--ipc", "500"], "--ipc 500 takes 500 real images of each class; class 0 has 14"),
    (["--ipc", "40", "--aug"], "--ipc 40 with 2x2 packing takes 160"),
    (["--ipc", "1", "--pack", "3"], "--pack.*3.*2, 4, 8"),
    (["--ipc", "1", "--labels", "soft"], "soft.*hard.*prior"),
    (["--ipc", "1", "--label_temperature", "0"], "--label_temperature: 0"),
    (["--ipc", "1", "--labels", "prior", "--Iteration", "0"], "--labels prior: no network to give the labels.*--robust_prior"),
    (["--ipc", "1", "--labels", "prior", "--fetch_net_num", "0"], "--labels prior: no network"),
    (["--test_limit", "361"], "361.*360 test images"),
    (["--dataset", "CIFAR10", "--data_path", "damaged"], "damaged/cifar10.npz is damaged"),
    (["--save_path", "a_file/result"], "--save_path a_file/result.*choose another"),
    (["--checkpoint_path", "a_file/checkpoints"], "--checkpoint_path a_file/checkpoints.*choose another"),
    pytest.param(["--device", "cuda"], "--device cuda.*auto.*cpu",
                 marks=pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here")),
    (["--device", "tpu"], "--device tpu.*cpu"),
])
def test_bad_input_is_one_line_and_leaves_nothing(capsys, monkeypatch, tmp_path, flags, says):
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "cifar10.npz").write_bytes(b"PK\x03\x04 and no more")
    (tmp_path / "a_file").write_text("")
    status, line = fails(capsys, monkeypatch, tmp_path, "--dataset", "Digits", "--model", "ConvNetW32", *flags)
    assert status != 0 and re.search(says, line), line
    left = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert left == {"damaged/cifar10.npz", "a_file"}


def test_a_loss_that_is_not_finite_stops_the_run(capsys, monkeypatch, tmp_path):
    status, line = fails(capsys, monkeypatch, tmp_path, *SMALL, "--Iteration", "3", "--lr_net", "1e30", "--no_baseline")
    assert status == 1 and re.search(r"(finite|nan|inf).*iteration \d.*--lr_net 1e\+30", line), line
    assert not list(tmp_path.glob("result/*.pt"))


# --------------------------------------------------------------------------------------------------------- whole small runs
SMALL = ["--dataset", "Digits", "--model", "ConvNetW32", "--ipc", "1", "--batch_real", "8", "--trained_bs", "16",
         "--model_train_steps", "1", "--num_exp", "1", "--num_eval", "1", "--epoch_eval_train", "4", "--test_limit", "20",
         "--select", "test", "--lr_img", "0.2", "--embed_last", "1000", "--net_generate_interval", "2"]


def run(folder, *flags, threads="1"):
    return subprocess.run([sys.executable, ROOT / "ROME_cifar10.py", *flags], cwd=folder, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": threads}, stdin=subprocess.DEVNULL, timeout=240)


def test_digits_run_leaves_what_is_promised(tmp_path):
    done = run(tmp_path, *SMALL, "--aug", "--Iteration", "3", "--eval_interval", "2", "--num_exp", "2",
               "--threat_model", "pixel")
    assert done.returncode == 0, done.stderr
    name = "ROME_Digits_ConvNetW32_1ipc_pixel_seed0"
    folder = tmp_path / "result" / name
    assert {p.name for p in folder.iterdir()} == {"flags.json", "metrics.jsonl", "log.txt",
                                                  "ROME_res_ROME_Digits_ConvNetW32_1ipc.pt"} | {
        f"{stem}{kind}.png" for stem in ("best_exp0", "best_exp1", *(f"syn_exp{e}_it0000{i}" for e in (0, 1) for i in (2, 3)))
        for kind in ("", "_unpacked")}
    about = json.loads((folder / "flags.json").read_text())
    assert about["flags"]["ipc"] == 1 and about["command"].endswith("--threat_model pixel")
    assert Image.open(folder / "best_exp0.png").size[0] >= 960

    file = torch.load(tmp_path / "result" / "ROME_res_ROME_Digits_ConvNetW32_1ipc.pt", weights_only=True)
    assert len(file["data"]) == 2 and file["data"][0][0].shape == (10, 3, 32, 32)
    assert file["data"][0][1].tolist() == list(range(10)) and not torch.equal(file["data"][0][0], file["data"][1][0])
    meta = file["meta"]
    assert (meta["packed"], meta["zca"], meta["threat_model"], meta["seed"]) == (True, False, "pixel", 0)
    assert meta["mean"] == list(DATASETS["Digits"]["mean"])
    assert meta["flags"]["Iteration"] == 3 and meta["versions"]["torch"]
    for exp in (0, 1):
        best = torch.load(tmp_path / "checkpoints" / name / f"best_exp{exp}.pt", weights_only=True)
        assert torch.equal(best["data"][0][0], file["data"][exp][0]) and best["meta"]["iteration"] in (2, 3)

    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    final = {line["set"]: line for line in lines if line["event"] == "final"}
    assert list(final) == ["constant classifier", "random real", "random real, 2x2 packed", "ROME"]
    assert len(final["ROME"]["robust_acc"]) == 2 and final["constant classifier"]["robust_2_acc"] == [0.1]
    assert {line["iteration"] for line in lines if line["event"] == "iteration"} == {0}
    accs = file["accs_all_exps"]["ConvNetW32"]
    assert accs == final["ROME"]["robust_acc"] and percent(accs).strip() in done.stdout
    assert "image-gradients" in done.stdout and "ETA" in done.stdout and done.stdout.strip() in (folder / "log.txt").read_text()
    assert list(tmp_path.rglob(".partial*")) == []


def test_a_run_whose_set_holds_the_labels_of_its_prior(tmp_path):
    """The pool's labels, 4x4 packed: what is in the file, what was trained on, and the rows of the table."""
    done = run(tmp_path, *SMALL, "--pack", "4", "--Iteration", "2", "--threat_model", "pixel", "--labels", "prior",
               "--label_temperature", "2", "--lr_schedule", "cosine")
    assert done.returncode == 0, done.stderr
    file = torch.load(tmp_path / "result" / "ROME_res_ROME_Digits_ConvNetW32_1ipc.pt", weights_only=True)
    (soft,), recipe = file["soft_labels"], file["meta"]["recipe"]
    assert soft.shape == (160, 10) and soft.std() > 0 and file["data"][0][0].shape == (10, 3, 32, 32)
    assert (recipe["pack"], recipe["temperature"], recipe["lr_schedule"], recipe["labels"]) == (4, 2.0, "cosine", "prior")
    (teachers,) = recipe["teachers"]
    assert len(teachers) == 4 and len({t["sha256"] for t in teachers}) == 4  # three at the start, one pushed
    lines = [json.loads(line) for line in (tmp_path / "result" / "ROME_Digits_ConvNetW32_1ipc_pixel_seed0" / "metrics.jsonl")
             .read_text().splitlines()]
    assert [line["set"] for line in lines if line["event"] == "final"] == [
        "constant classifier", "random real", "random real, 4x4 packed", "random real, prior labels",
        "random real, 4x4 packed, prior labels", "ROME, hard labels", "ROME"]
    shown = Image.open(tmp_path / "result" / "ROME_Digits_ConvNetW32_1ipc_pixel_seed0" / "best_exp0_unpacked.png").size
    assert shown[0] >= 960


def test_same_seed_same_bits_in_two_processes(tmp_path):
    def one(folder, seed):
        (tmp_path / folder).mkdir()
        assert run(tmp_path / folder, *SMALL, "--Iteration", "3", "--no_baseline", "--seed", seed).returncode == 0
        return torch.load(next((tmp_path / folder).glob("result/*.pt")), weights_only=True)
    with ThreadPoolExecutor() as executor:
        sets = list(executor.map(one, "abc", "001"))
    images = [file["data"][0][0] for file in sets]
    assert torch.equal(images[0], images[1]) and not torch.equal(images[0], images[2])
    assert sets[0]["accs_all_exps"] == sets[1]["accs_all_exps"]


def test_cifar_like_run_and_a_second_one(tmp_path, cifar_like):
    """A 200-image npz, a batch larger than the class, noise, Adam, several networks to evaluate with; and once more."""
    flags = [*SMALL, "--dataset", "CIFAR10", "--data_path", str(cifar_like), "--batch_real", "64", "--Iteration", "2",
             "--eval_mode", "A", "--init", "noise", "--optim", "adam", "--no_baseline", "--test_limit", "5", "--lr_img", "0.01"]
    done = run(tmp_path, *flags)
    assert done.returncode == 0, done.stderr
    assert "--batch_real 64 is more than 10 of the classes have" in done.stdout
    for model in ("ConvNetAS", "ConvNetAR", "ConvNetAL", "ConvNetASwish"):
        assert f"ROME                     {model}" in done.stdout
    again = run(tmp_path, *flags)
    assert again.returncode == 0 and "is finished" in again.stdout and len(again.stdout.splitlines()) == 1
    again = run(tmp_path, *flags, "--Iteration", "0", "--fresh")
    assert again.returncode == 0, again.stderr
    assert "held an earlier run, now in" in again.stdout
    name = "ROME_CIFAR10_ConvNetW32_1ipc_published_seed0"
    assert {p.name for p in (tmp_path / "result").iterdir()} == {
        name, f"{name}.1", f".{name}.lock", ".ROME_res.lock", "ROME_res_ROME_CIFAR10_ConvNetW32_1ipc.pt"}


def test_missing_data_as_a_user_sees_it(tmp_path):
    """No file and no network: one line on standard error that says both ways, and no traceback."""
    env = {**os.environ, "https_proxy": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"}
    done = subprocess.run([sys.executable, ROOT / "ROME_cifar10.py", "--ipc", "1"], cwd=tmp_path, env=env, capture_output=True,
                          text=True, timeout=240)
    line = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and "cifar10.npz" in line and "internet" in line and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
