"""pretrain.py, and what the ROME scripts make of its networks; the ablation flags."""
import json
import os
import signal
import sys

import numpy as np
import pytest
import torch

import evaluate
import pretrain
import ROME_cifar10 as rome
import utils
from attacks import ATTACKS, attack, get_threat_model
from formats.network_file import load_into
from network_pool import NetworkPool
from runtime.measures import CONTROLS
from runtime.safe_io import InputError
from runtime.checkpoint import Interrupted
from networks import get_network

FLAGS = ["--dataset", "Digits", "--model", "LeNet", "--threat_model", "pixel", "--epochs", "8", "--attack_steps", "3",
         "--batch_train", "64", "--test_limit", "100", "--num_nets", "2", "--aa_limit", "4"]
NETWORKS = [f"full_LeNet_Digits_142_PGD-pixel_seed0-{k}.pth" for k in range(2)]


def main(monkeypatch, folder, *flags, script=pretrain):
    folder.mkdir(exist_ok=True)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *flags])
    script.main()


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory, digits):
    folder = tmp_path_factory.mktemp("pretrained")
    with pytest.MonkeyPatch.context() as patch:
        main(patch, folder, *FLAGS)
    return folder / "checkpoints"


def test_networks_learn_and_say_what_they_are(pretrained, digits):
    images, labels = digits.get_batch("test", slice(100))
    for name in NETWORKS:
        about = json.loads((pretrained / f"{name}.json").read_text())
        net = get_network("LeNet", 3, 10, (32, 32), seed=0)
        net.load_state_dict(torch.load(pretrained / name, weights_only=True))
        assert about["clean_acc"] == utils.accuracy(net, images, labels) > 0.5
        assert [about[key] for key in ("model", "dataset", "num_classes", "threat_model")] == ["LeNet", "Digits", 10, "pixel"]
        assert about["aa_n"] == 4 and 0 <= about["aa_acc"] <= utils.accuracy(net, images[:4], labels[:4])
        assert 0.3 < about["train_robust_acc"] < 1 and 0 < about["robust_acc"] <= about["clean_acc"] and about["n"] == 100
    states = [torch.load(pretrained / name, weights_only=True) for name in NETWORKS]
    assert not torch.equal(states[0]["classifier.weight"], states[1]["classifier.weight"])


def test_adversarial_training_makes_robust(pretrained, digits, tmp_path, monkeypatch):
    """The same training on clean images leaves a smaller share of its accuracy under a strong attack."""
    main(monkeypatch, tmp_path, *FLAGS, "--attack_steps", "0")
    images, labels = digits.get_batch("test", slice(100))
    threat, kept = get_threat_model("pixel", digits), []
    for path in (pretrained / NETWORKS[1], tmp_path / "checkpoints" / "full_LeNet_Digits_142_None_seed0-1.pth"):
        net = load_into(get_network("LeNet", 3, 10, (32, 32), 0), path)
        x_adv = attack(net, images, labels, threat, targeted=False, eps=24 / 255, random_start=False)
        kept.append(utils.accuracy(net, x_adv, labels) / utils.accuracy(net, images, labels))
    assert kept[0] > kept[1] + 0.05, kept


def test_stopped_and_resumed_is_bit_identical(pretrained, tmp_path, monkeypatch):
    attack, calls, stops = pretrain.attack, [], 0

    def disturbed(*args, **options):
        calls.append(1)
        if len(calls) % 61 == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return attack(*args, **options)
    monkeypatch.setattr(pretrain, "attack", disturbed)
    for _ in range(20):
        try:
            main(monkeypatch, tmp_path, *FLAGS)
            break
        except Interrupted:
            stops += 1
    assert stops >= 4
    for name in NETWORKS:
        assert (tmp_path / "checkpoints" / name).read_bytes() == (pretrained / name).read_bytes()


def test_a_finished_network_is_not_trained_again(pretrained, monkeypatch, capsys):
    monkeypatch.setattr(pretrain, "train", lambda *args: pytest.fail("trained again"))
    main(monkeypatch, pretrained.parent, *FLAGS)
    assert capsys.readouterr().out.count("is there already") == 2
    with pytest.raises(InputError, match="--epochs is 5, .* has 8"):
        main(monkeypatch, pretrained.parent, *FLAGS, "--epochs", "5")


def test_fresh_and_interrupted_in_the_test(pretrained, tmp_path, monkeypatch):
    """--fresh forgets the network that was there; an interruption of the final test does not repeat the training."""
    one = [*FLAGS, "--num_nets", "1"]
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for ending in ("", ".json"):
        (folder / f"{NETWORKS[0]}{ending}").write_bytes((pretrained / f"{NETWORKS[0]}{ending}").read_bytes())
    training_step, steps = pretrain.training_step, []

    def counted(*args):
        steps.append(1)
        return training_step(*args)
    monkeypatch.setattr(pretrain, "training_step", counted)
    with monkeypatch.context() as patch:
        patch.setattr(utils, "robust_accuracies", lambda *a: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Interrupted):
            main(patch, tmp_path, *one, "--fresh")
    assert steps and not (folder / NETWORKS[0]).exists()
    steps.clear()
    main(monkeypatch, tmp_path, *one)
    assert not steps and (folder / NETWORKS[0]).read_bytes() == (pretrained / NETWORKS[0]).read_bytes()


def test_learning_rate():
    args = pretrain.parse_args(["--lr_net", "0.1", "--warm_up", "0.1"])
    rates = [pretrain.learning_rate(args, step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([0.01 * (i + 1) for i in range(10)])
    assert rates[10] == pytest.approx(0.1) and rates[55] == pytest.approx(0.05) and 0 < rates[99] < 1e-4


# ----------------------------------------------------------------------------------------- the prior in the ROME scripts
ROME = ["--dataset", "Digits", "--model", "LeNet", "--ipc", "1", "--aug", "--threat_model", "pixel", "--batch_real", "8",
        "--num_exp", "1", "--num_eval", "1", "--epoch_eval_train", "3", "--test_limit", "20", "--Iteration", "2",
        "--lr_img", "0.2", "--no_baseline", "--eval_interval", "2"]


def test_a_fixed_prior_is_used_and_not_touched(pretrained, tmp_path, monkeypatch):
    seen, matching_step = [], rome.matching_step

    def watched(image_syn, optimizer_img, member, *rest):
        seen.append((member.net.classifier.weight.clone(), member.running_accuracy().item(), member.net.training))
        return matching_step(image_syn, optimizer_img, member, *rest)
    monkeypatch.setattr(rome, "matching_step", watched)
    monkeypatch.setattr(utils, "attack", utils.attack)
    main(monkeypatch, tmp_path, *ROME, "--method", "+AP", "--robust_prior", *(str(pretrained / name) for name in NETWORKS),
         script=rome)
    assert (tmp_path / "result" / "ROME_res_+AP_Digits_LeNet_1ipc.pt").exists()
    states = [torch.load(pretrained / name, weights_only=True)["classifier.weight"] for name in NETWORKS]
    accuracies = [100 * json.loads((pretrained / f"{name}.json").read_text())["train_robust_acc"] for name in NETWORKS]
    assert len(seen) == 2 * 2  # two iterations, two networks each
    for weight, w_f, training in seen:
        (k,) = [k for k in range(2) if torch.equal(weight, states[k])]
        assert w_f == pytest.approx(accuracies[k]) and not training
    metrics = (tmp_path / "result" / "+AP_Digits_LeNet_1ipc_pixel_seed0" / "metrics.jsonl").read_text()
    assert '"loss_pool": 0.0' in metrics


@pytest.mark.parametrize("change, message", [
    ({"model": "MLP"}, "its model is MLP, this run's LeNet"),
    ({"dataset": "CIFAR10"}, "its dataset is CIFAR10, this run's Digits"),
    ({"num_classes": 100}, "its num_classes is 100, this run's 10"),
    ({"threat_model": "published"}, "its threat_model is published, this run's pixel"),
    ({"train_robust_acc": None}, "missing or damaged"),
    ({"train_robust_acc": 31.7}, "missing or damaged"),
    (None, "json, which says how it was trained, is missing"),
])
def test_bad_priors_are_refused_by_name(pretrained, tmp_path, monkeypatch, change, message):
    path = tmp_path / "prior.pth"
    path.write_bytes((pretrained / NETWORKS[0]).read_bytes())
    if change is not None:
        about = {**json.loads((pretrained / f"{NETWORKS[0]}.json").read_text()), **change}
        (tmp_path / "prior.pth.json").write_text(json.dumps(about))
    with pytest.raises(InputError, match=f"prior.pth.*{message}"):
        main(monkeypatch, tmp_path, *ROME, "--robust_prior", str(path), script=rome)
    assert not (tmp_path / "result").exists()


def test_a_prior_that_is_no_network(pretrained, tmp_path, monkeypatch):
    torch.save([1, 2], tmp_path / "prior.pth")
    (tmp_path / "prior.pth.json").write_text((pretrained / f"{NETWORKS[0]}.json").read_text())
    with pytest.raises(InputError, match="prior.pth holds a list; expected a state_dict"):
        main(monkeypatch, tmp_path, *ROME, "--robust_prior", str(tmp_path / "prior.pth"), script=rome)
    with pytest.raises(InputError, match="nowhere.pth does not exist"):
        main(monkeypatch, tmp_path, *ROME, "--robust_prior", "nowhere.pth", script=rome)
    with pytest.raises(SystemExit):
        rome.parse_args(["--robust_prior", "prior.pth", "--zca"])


# -------------------------------------------------------------------------------------------------------------- ablations
def test_a_clean_pool_is_trained_on_clean_images(digits, monkeypatch):
    args = rome.parse_args(["--model", "LeNet", "--fetch_net_num", "1", "--model_train_steps", "1", "--no_attack_pool"])
    monkeypatch.setattr(rome, "attack", lambda *a, **k: pytest.fail("attacked"))
    pool = NetworkPool(lambda k: get_network("LeNet", 3, 10, (32, 32), k),
                         lambda net: torch.optim.SGD(net.parameters(), lr=0.1), limit=3, start=1)
    seen = []
    pool.members[0].net.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    rng = {name: torch.Generator().manual_seed(0) for name in ("data", "attack")}
    rome.pool_step(pool.members, digits, get_threat_model("pixel", digits), args, rng)
    assert torch.equal(seen[0], digits.sample(256, torch.Generator().manual_seed(0))[0])


def test_distances():
    emb, mean = torch.tensor([[1.0, 2.0], [3.0, 6.0]]), torch.tensor([0.0, 1.0])
    assert rome.robustness_aligned_loss(emb, mean) == (0.5 * (2 + 3)) ** 2
    assert rome.robustness_aligned_loss(emb, mean, "l2") == 2**2 + 3**2


# ------------------------------------------------------------------------------------------------- data of the user's own
@pytest.mark.parametrize("num_classes", [2, 3, 5])
def test_own_data_through_all_scripts(tmp_path, monkeypatch, capsys, num_classes):
    """Grey images of 28x28, labels in a column: pretrain.py, ROME with its network, evaluate.py with every attack."""
    rng = np.random.default_rng(0)
    y = np.arange(20 * num_classes) % num_classes
    base = rng.integers(0, 256, (num_classes, 7, 7)).repeat(4, 1).repeat(4, 2)
    x = (0.7 * base[y] + rng.integers(0, 70, (len(y), 28, 28))).astype(np.uint8)
    np.savez(tmp_path / "own.npz", x_train=x, y_train=y[:, None], x_test=x[:40], y_test=y[:40])
    common = ["--dataset", "own.npz", "--model", "ConvNetW32", "--threat_model", "pixel", "--no_compile"]
    main(monkeypatch, tmp_path, *common, "--epochs", "2", "--attack_steps", "1", "--batch_train", "16", "--aa_limit", "0")
    network = "checkpoints/full_ConvNetW32_own_20_PGD-pixel_seed0-0.pth"
    about = json.loads((tmp_path / f"{network}.json").read_text())
    assert about["dataset"] == "own" and about["num_classes"] == num_classes
    assert np.allclose([about["mean"], about["std"]], [[x.mean() / 255], [x.std() / 255]], atol=1e-4)

    flags = [*common, "--ipc", "1", "--robust_prior", network, "--Iteration", "1", "--num_exp", "1", "--num_eval", "1",
             "--epoch_eval_train", "20", "--batch_real", "8", "--embed_last", "1000", "--labels", "prior", "--no_baseline"]
    main(monkeypatch, tmp_path, *flags, script=rome)
    out = capsys.readouterr().out
    assert f"own: {len(y)} training and 40 test images, 1x28x28, {num_classes} classes" in out
    assert f"{network} taken as: own, ConvNetW32, pixel" in out
    synset = "result/ROME_res_ROME_own_ConvNetW32_1ipc.pt"
    meta = torch.load(tmp_path / synset, weights_only=True)["meta"]
    assert (meta["dataset"], meta["mean"]) == ("own", about["mean"])

    main(monkeypatch, tmp_path, "--dataset", "own.npz", "--synset", synset, "--limit", "10", "--num_eval", "1", "--query",
         "--queries", "5", "--aa_iterations", "2", "--no_sanity", "--no_compile", "--labels", "own", "--out", "out",
         script=evaluate)
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {row["threat_model"] for row in content["rows"]} == {"pixel"} and content["num_classes"] == num_classes
    assert {row["attack"] for row in content["rows"]} == {*CONTROLS, *ATTACKS} - {"PGD20"}
    assert f"a constant classifier* | | {100 / num_classes:g} |" in (tmp_path / "out" / "results.md").read_text()
    for script, arguments in ((rome, [*flags, "--threat_model", "published"]), (evaluate, [
            "--dataset", "own.npz", "--synset", synset, "--threat_model", "published", "--out", "other"])):
        with pytest.raises(InputError, match=f"mod 10, own has {num_classes} classes"):
            main(monkeypatch, tmp_path, *arguments, script=script)
    with pytest.raises(InputError, match="data set 'own', which is none of those here; .*--dataset"):
        main(monkeypatch, tmp_path, "--synset", synset, "--out", "other", script=evaluate)
    with pytest.raises(InputError, match="VGG11 cannot take the images of own, 28x28"):
        main(monkeypatch, tmp_path, *flags, "--model", "VGG11", script=rome)
