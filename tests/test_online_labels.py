"""Labels at every input: training against a literal loop, the networks in files, the scripts."""
import copy
import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, run_in, sigterm_at

import evaluate
import export
import pretrain
import rome
import ROME_cifar10
import utils
from formats.inputs import check_and_normalise, read_inputs
from formats.network_file import load_into
from formats.synset_file import MAX_LABELLERS, SyntheticSet, read_synset, save_synset
from networks import NETWORKS, get_network
from runtime.checkpoint import Interrupted
from runtime.command_line import run_script
from runtime.measures import kilobytes
from runtime.safe_io import InputError, write_tensors
from synsets import (TrainConfig, build_labellers, describe_prior_networks, load_labellers,
                     load_synset, stored_labellers)

LABELS = torch.arange(10)
META = {"dataset": "CIFAR10", "mean": [0.5] * 3, "std": [0.25] * 3, "pack": 2,
        "flags": {"model": "MLP"}, "recipe": {"mix": "cutmix", "noise": 0.25, "temperature": 2.0}}


def teacher(seed=1, num_classes=10):
    return get_network("MLP", 3, num_classes, (32, 32), seed).eval().requires_grad_(False)


def images(count=10):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))


# ------------------------------------------------------------------------------------ training
def test_training_against_a_literal_loop():
    """Two labellers, mixed images, averaged weights: PyTorch's own loss and optimizer."""
    x, networks, decay = images(), [teacher(1), teacher(2)], 0.5
    config = TrainConfig(2, 0.05, 4, "flip", 2.0, "cosine", "both", 0.0, decay)
    student = get_network("MLP", 3, 10, (32, 32), 3)
    literal = copy.deepcopy(student)
    utils.train_on_set(student, x, None, config, torch.Generator().manual_seed(5),
                       labellers=networks)
    optimizer = torch.optim.SGD(literal.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 9)
    average, seen = None, []
    batches = utils.augmented_batches(x, None, config, torch.Generator().manual_seed(5), networks)
    for batch, _ in (pair for epoch in batches for pair in epoch):
        logits = torch.stack([net(batch) for net in networks]).mean(0)
        loss = 4 * F.cross_entropy(literal(batch) / 2, (logits / 2).softmax(1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        cosine.step()
        now = [parameter.detach().clone() for parameter in literal.parameters()]
        average = [a + (1 - decay) * (b - a) for a, b in zip(average or now, now)]
        seen.append(batch)
    for ours, expected in zip(student.parameters(), average):
        assert torch.allclose(ours, expected, atol=1e-5)
    assert [len(batch) for batch in seen] == [4, 4, 2] * 3
    nearest = torch.cdist(torch.cat(seen).flatten(1), x.flatten(1)).min(1).values
    assert (nearest > 1).sum() > 20  # of 30; the others met themselves


def test_noise_has_the_standard_deviation_asked_for():
    config = TrainConfig(0, batch_train=50, dsa_strategy="none", noise=0.3)
    x = images(50)
    ((batch, _),) = next(utils.augmented_batches(x, None, config, torch.Generator().manual_seed(0),
                                                 [teacher()]))
    order = torch.cdist(batch.flatten(1), x.flatten(1)).argmin(1)
    assert (batch - x[order]).std().item() == pytest.approx(0.3, rel=0.01)


# --------------------------------------------------------------------------------------- files
def set_file(folder, **changes):
    path = folder / "res_ROME_CIFAR10_MLP_1ipc.pt"
    one = SyntheticSet(images(), LABELS, None, stored_labellers([teacher()], "MLP"))
    save_synset(path, [one], [], META)
    if changes:
        content = torch.load(path, weights_only=True)
        torch.save({**content, **changes}, path)
    return path


@pytest.mark.parametrize("layout", export.LAYOUTS)
def test_what_an_export_carries(tmp_path, layout):
    """The networks in float16, or where a layout has no place for them, what they say of the
    images themselves. Other readers find images and classes where they were."""
    path, out = set_file(tmp_path), tmp_path / "out"
    assert torch.load(path, weights_only=True)["data"][0][1].tolist() == list(range(10))
    export.export(export.parse_args([str(path), "-", "--to", layout]), _made(out))
    x, labels, config = load_synset(out)
    assert (config.mix, config.noise) == ("cutmix", 0.25)
    expected = teacher().half().float()
    if layout in export.WITH_LABELLERS:
        (net,) = load_labellers(out)
        assert torch.equal(net(x), expected(x)) and labels.dim() == 1
        assert "load_labellers(" in (out / "README.md").read_text()
    else:
        original = load_synset(path)[0]
        assert torch.allclose(labels, expected(original), atol=1e-4)


def test_training_without_the_project(tmp_path):
    """The script that an export carries: its labellers are ours, and a network learns from them."""
    path, out = tmp_path / "res_ROME_CIFAR10_ConvNetW32_1ipc.pt", tmp_path / "out"
    net = get_network("ConvNetW32", 3, 10, (32, 32), 1).eval().requires_grad_(False)
    one = SyntheticSet(images(), LABELS, None, stored_labellers([net], "ConvNetW32"))
    recipe = {"epochs": 60, "lr_net": 0.1, "batch_train": 40, "temperature": 2.0,
              "mix": "cutmix_mixup", "lr_schedule": "cosine", "warm_up": 0.1,
              "dsa_strategy": "crop_flip_scale_rotate"}
    save_synset(path, [one], [], {**META, "recipe": recipe})
    flags = [str(path), "-", "--to", "dc", "--keep_packed"]
    export.export(export.parse_args(flags), _made(out))
    code = (out / "train_online.py").read_text()
    assert len(code.splitlines()) <= 84 and "train_online" in (out / "README.md").read_text()
    alone = {}
    exec(code, alone)
    (name,) = (file.name for file in out.glob("*.pt"))
    x, labellers, recipe = alone["read_set"](out / name)
    assert torch.equal(x, load_synset(out)[0]) and len(x) == 40
    assert torch.allclose(alone["scores"](labellers[0], x), net(x), atol=1e-2)  # float16
    student, unseen = get_network("ConvNetW32", 3, 10, (32, 32), 2), images(200)[100:]

    def distance():
        with torch.no_grad():
            return F.kl_div(student(unseen).log_softmax(1), net(unseen).softmax(1),
                            reduction="batchmean")
    torch.manual_seed(0)
    alone["random"].seed(0)
    before = distance()
    alone["train"](student, x, labellers, **recipe)
    assert distance() < before / 3


def test_the_set_that_is_here():
    """Small, readable, with the network that lies beside it, and the script that trains alone."""
    folder = ROOT / "experiments/online_labels"
    images, labels, config = load_synset(folder / "ready")
    assert images.shape == (400, 3, 32, 32) and config.mix == "cutmix_mixup"
    assert torch.equal(labels, torch.arange(10).repeat_interleave(10).repeat(4))
    (net,), (one,) = load_labellers(folder / "ready"), folder.glob("ready/*.pt")
    with pytest.raises(InputError, match="1 set.*there is no 1"):
        load_labellers(folder / "ready", 1)
    ((about,),) = read_synset(one).meta["recipe"]["teachers"]
    file = folder / "teachers" / about["file"]
    assert describe_prior_networks([file]) == [about]
    original = load_into(get_network("ConvNetW64", 3, 10, (32, 32), 0), file).half().float()
    assert torch.equal(net(images), original.eval()(images)) and one.stat().st_size < 2e6
    alone = (folder / "ready" / "train_online.py").read_text()
    assert alone == export.TRAIN_ONLINE.read_text()


@pytest.mark.parametrize("soft, labellers, expected, text", [
    (None, [], (30720, 10, 0), "31 + 0.01 + 0"),
    (torch.zeros(40, 10), [], (30720, 1600, 0), "31 + 1.6 + 0"),
    (None, [teacher()], (30720, 10, 2 * 411146), "31 + 0.01 + 822")])
def test_the_bytes_of_a_set(soft, labellers, expected, text):
    """The MLP has 3072 * 128 + 128 + 128 * 128 + 128 + 128 * 10 + 10 parameters, of two bytes."""
    one = SyntheticSet(images(), LABELS, soft, stored_labellers(labellers, "MLP"))
    assert tuple(one.stored_bytes().values()) == expected
    assert kilobytes(one.stored_bytes()) == text and kilobytes(None) == ""


def _made(folder):
    folder.mkdir()
    return folder


def test_classes_in_another_order(tmp_path, digits):
    """The labeller's scores are permuted with the classes."""
    names = [str(c) for c in range(9, -1, -1)]
    path = tmp_path / "set.pt"
    one = SyntheticSet(images(), LABELS, None, stored_labellers([teacher()], "MLP"))
    meta = {**META, "dataset": "Digits", "classes": names, "mean": list(digits.mean),
            "std": list(digits.std), "pack": 1}
    save_synset(path, [one], [], meta)
    (entry,) = read_inputs([path], [], NETWORKS)
    check_and_normalise(entry, digits)
    (synset,) = entry.synset.sets
    (net,) = build_labellers(synset)
    expected = teacher().half().float()(images()).flip(1)
    assert torch.allclose(net(synset.images), expected, atol=1e-5)
    assert synset.labels.tolist() == list(range(9, -1, -1))


STATE = stored_labellers([teacher()], "MLP")[0]["state"]


@pytest.mark.parametrize("labellers, problem", [
    ("two", "list of all sets"),
    ([7], "list of at most 16"),
    ([[{"model": "MLP", "state": STATE}] * (MAX_LABELLERS + 1)], "list of at most 16"),
    ([["MLP"]], "no dict of model and state"),
    ([[{"model": "MLP", "state": {"a": 1}}]], "no state_dict"),
    ([[{"model": "MLP", "state": {**STATE, "classifier.bias": torch.full((10,), torch.nan)}}]],
     "classifier.bias are not finite"),
    ([[{"model": "ViT", "state": STATE}]], "'ViT'; known are"),
    ([[{"model": "LeNet", "state": STATE}]], "no LeNet for images of"),
    ([[{"model": "MLP", "state": {}}]], "no MLP for images of")])
def test_labellers_that_are_none(tmp_path, labellers, problem):
    path = set_file(tmp_path, labellers=labellers)
    with pytest.raises(InputError, match=problem):
        build_labellers(read_synset(path).sets[0])


# ------------------------------------------------------------------------------------- scripts
def test_from_a_teacher_to_a_table(tmp_path, monkeypatch, capsys):
    common = ["--dataset", "Digits", "--model", "MLP", "--threat_model", "pixel", "--no_compile"]
    run_in(monkeypatch, pretrain, tmp_path, *common, "--epochs", 1, "--attack_steps", 1,
           "--test_limit", 20, "--aa_limit", 0)
    network = "checkpoints/full_MLP_Digits_142_PGD-pixel_seed0-0.pth"
    flags = [*common, "--ipc", 1, "--robust_prior", network, "--Iteration", 1, "--num_exp", 1,
             "--num_eval", 1, "--epoch_eval_train", 30, "--batch_real", 4, "--embed_last", 1000,
             "--labels", "online", "--mix", "both", "--noise", 0.1, "--lr_net", 0.05]
    run_in(monkeypatch, ROME_cifar10, tmp_path, *flags)
    rows = (tmp_path / "result/ROME_Digits_MLP_1ipc_pixel_seed0/metrics.jsonl").read_text()
    names = [row["set"] for row in map(json.loads, rows.splitlines()) if row["event"] == "final"]
    assert names == ["constant classifier", "random real", "random real, online labels",
                     "ROME, hard labels", "ROME"]
    synset = "result/ROME_res_ROME_Digits_MLP_1ipc.pt"
    common = [*common[:4], "--num_eval", 1, "--attacks", "FGSM", "--limit", 10, "--no_sanity",
              "--no_compile", "--untargeted"]
    run_in(monkeypatch, evaluate, tmp_path, *common, "--synset", synset, "--out", "own")
    run_in(monkeypatch, evaluate, tmp_path, *common, "--synset", synset, "--out", "other",
           "--labeller", network, "--mix", "none", "--labels", "own")
    kinds = {path.parent.parent.name + " " + json.loads(path.read_text())["labels"]
             for path in tmp_path.glob("*/networks/*.json")}
    assert kinds == {"own online", "own hard", "other online"}


def test_stopped_and_resumed_with_labellers(tmp_path, monkeypatch):
    """Stopped in the second set: the same images, labellers and accuracies as in one piece."""
    network = tmp_path / "full_MLP_Digits_142_PGD-pixel_seed0-0.pth"
    write_tensors(network, teacher().state_dict())
    Path(f"{network}.json").write_text(json.dumps({
        "model": "MLP", "dataset": "Digits", "num_classes": 10, "threat_model": "pixel",
        "train_robust_acc": 0.5}))
    flags = ["--dataset", "Digits", "--model", "MLP", "--threat_model", "pixel", "--no_compile",
             "--ipc", 1, "--robust_prior", network, "--Iteration", 2, "--num_exp", 2, "--num_eval",
             1, "--epoch_eval_train", 3, "--batch_real", 4, "--embed_last", 1000, "--test_limit",
             20, "--labels", "online", "--mix", "both", "--noise", 0.1, "--ema", 0.5,
             "--no_baseline"]
    run_in(monkeypatch, ROME_cifar10, tmp_path / "whole", *flags)
    with monkeypatch.context() as patch:
        sigterm_at(patch, rome, "pool_step", 4)
        with pytest.raises(Interrupted):
            run_in(patch, ROME_cifar10, tmp_path / "stopped", *flags)
    run_in(monkeypatch, ROME_cifar10, tmp_path / "stopped", *flags)
    whole, resumed = (torch.load(path, weights_only=True) for name in ("whole", "stopped")
                      for path in (tmp_path / name / "result").glob("*.pt"))
    for one, other in zip(whole["data"], resumed["data"]):
        assert torch.equal(one[0], other[0])
    for one, other in zip(whole["labellers"], resumed["labellers"]):
        assert all(torch.equal(value, other[0]["state"][key])
                   for key, value in one[0]["state"].items())
    assert whole["accs_all_exps"] == resumed["accs_all_exps"]


@pytest.mark.parametrize("flags, problem", [
    (["--labels", "online"], "--robust_prior"), (["--mix", "both"], "--labels online"),
    (["--noise", "0.1"], "--labels online")])
def test_flags_that_do_not_go_together(tmp_path, monkeypatch, capsys, flags, problem):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ROME_cifar10.py", "--dataset", "Digits", *flags])
    with pytest.raises(SystemExit):
        run_script(ROME_cifar10.main)
    assert problem in capsys.readouterr().err
