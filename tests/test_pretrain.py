"""pretrain.py, and what the ROME scripts make of its networks; data of the user's own."""
import json
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import run_in, sigterm_at

import evaluate
import pretrain
import rome
import ROME_cifar10
import utils
from attacks import ATTACKS, attack, get_threat_model
from formats.network_file import load_into
from networks import get_network
from runtime.checkpoint import Interrupted
from runtime.measures import CONTROLS
from runtime.safe_io import InputError

FLAGS = """--dataset Digits --model MLP --threat_model pixel --epochs 4 --attack_steps 3
    --num_nets 2 --batch_train 64 --test_limit 100 --aa_limit 4 --no_compile""".split()
NETWORKS = [f"full_MLP_Digits_142_PGD-pixel_seed0-{k}.pth" for k in range(2)]


def main(monkeypatch, folder, flags=""):
    run_in(monkeypatch, pretrain, folder, *FLAGS, *flags.split())


def load(path):
    return load_into(get_network("MLP", 3, 10, (32, 32), 0), path)


def said_of(path):
    return json.loads(path.with_name(f"{path.name}.json").read_text())


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained")
    with pytest.MonkeyPatch.context() as patch:
        main(patch, folder)
    return folder / "checkpoints"


def test_networks_learn_and_say_what_they_are(pretrained, digits):
    images, labels = digits.get_batch("test", slice(100))
    for name in NETWORKS:
        about, net = said_of(pretrained / name), load(pretrained / name)
        expected = {"model": "MLP", "dataset": "Digits", "num_classes": 10, "threat_model": "pixel",
                    "n": 100, "aa_n": 4, "clean_acc": utils.accuracy(net, images, labels)}
        assert {key: about[key] for key in expected} == expected
        assert about["clean_acc"] > 0.5 and 0 < about["robust_acc"] <= about["clean_acc"]
        assert 0 <= about["aa_acc"] <= utils.accuracy(net, images[:4], labels[:4])
        assert 0.3 < about["train_robust_acc"] < 1
    first, second = (torch.load(pretrained / name, weights_only=True) for name in NETWORKS)
    assert not any(torch.equal(first[key], second[key]) for key in first if "weight" in key)


def test_adversarial_training_makes_robust(pretrained, digits, tmp_path, monkeypatch):
    """Training on clean images leaves a smaller share of the accuracy under a strong attack."""
    main(monkeypatch, tmp_path, "--attack_steps 0 --num_nets 1")
    images, labels = digits.get_batch("test", slice(100))
    kept = []
    for path in (pretrained / NETWORKS[0],
                 tmp_path / "checkpoints" / "full_MLP_Digits_142_None_seed0-0.pth"):
        net = load(path)
        x_adv = attack(net, images, labels, get_threat_model("pixel", digits), targeted=False,
                       eps=24 / 255, random_start=False)
        kept.append(utils.accuracy(net, x_adv, labels) / utils.accuracy(net, images, labels))
    assert kept[0] > kept[1] + 0.05, kept


def test_stopped_and_resumed_is_bit_identical(pretrained, tmp_path, monkeypatch):
    """Stopped in either network, and in the test of the first, which is not trained again."""
    for owner, function, call in ((pretrain, "attack", 61), (pretrain.Training, "measure", 1),
                                  (pretrain, "attack", 30)):
        with monkeypatch.context() as patch:
            sigterm_at(patch, owner, function, call)
            with pytest.raises(Interrupted):
                main(patch, tmp_path)
    folder = tmp_path / "checkpoints" / f"pretrain_{NETWORKS[1][:-6]}"
    assert torch.load(folder / "net1" / "state.pt", weights_only=True)["epoch"] == 1
    main(monkeypatch, tmp_path)
    for name in NETWORKS:
        assert (tmp_path / "checkpoints" / name).read_bytes() == (pretrained / name).read_bytes()


def test_the_radius_of_the_attack(pretrained, tmp_path, monkeypatch):
    """It is another network; files from before the flag are of 8/255."""
    seen = []

    def noted(*arguments, eps=None, **options):
        seen.append(eps)
        return attack(*arguments, eps=eps, **options)
    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "attack", noted)
        main(patch, tmp_path, "--attack_eps 2 --num_nets 1 --epochs 1 --aa_limit 0")
    assert set(seen) == {2 / 255}
    assert (tmp_path / "checkpoints" / "full_MLP_Digits_142_PGD2-pixel_seed0-0.pth").exists()
    for name in NETWORKS:
        about = said_of(pretrained / name)
        del about["flags"]["attack_eps"]
        (tmp_path / "checkpoints" / f"{name}.json").write_text(json.dumps(about))
        (tmp_path / "checkpoints" / name).write_bytes(b"")
    main(monkeypatch, tmp_path)
    assert (tmp_path / "checkpoints" / NETWORKS[0]).read_bytes() == b""  # not trained again


def test_a_finished_network_is_not_trained_again(pretrained, tmp_path, monkeypatch, capsys):
    """Unless --fresh says so."""
    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "training_step", lambda *args: pytest.fail("trained again"))
        main(patch, pretrained.parent)
        assert capsys.readouterr().out.count("is there already") == 2
        with pytest.raises(InputError, match="--epochs is 5, .* has 4"):
            main(patch, pretrained.parent, "--epochs 5")
    short = "--num_nets 1 --epochs 1 --aa_limit 0"
    main(monkeypatch, tmp_path, short)
    path = tmp_path / "checkpoints" / NETWORKS[0]
    before = path.read_bytes()
    path.write_bytes(b"")
    main(monkeypatch, tmp_path, short)
    assert path.read_bytes() == b""
    main(monkeypatch, tmp_path, f"{short} --fresh")
    assert path.read_bytes() == before


def test_learning_rate():
    args = pretrain.parse_args(["--lr_net", "0.1", "--warm_up", "0.1"])
    rates = [pretrain.learning_rate(args, step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([0.01 * (i + 1) for i in range(10)])
    assert rates[10] == pytest.approx(0.1) and rates[55] == pytest.approx(0.05)
    assert 0 < rates[99] < 1e-4


def test_what_is_compiled_for(digits, monkeypatch):
    """Batches of 64, attacked 32 at a time, and the last one of an epoch: 1437 = 22 * 64 + 29."""
    planned = []
    monkeypatch.setattr(pretrain, "compile_planned", lambda *args: planned.append(args[2]))
    pretrain.compile_training(pretrain.parse_args(FLAGS), digits, 32)
    (plan,) = planned
    assert set(plan["attacked"]) == {32} and set(plan["trained"]) == {64, 29}


# ----------------------------------------------------------------- the networks in the ROME scripts
ROME = """--dataset Digits --model MLP --ipc 1 --aug --threat_model pixel --batch_real 8 --num_exp 1
    --num_eval 1 --epoch_eval_train 3 --test_limit 20 --Iteration 2 --lr_img 0.2 --no_baseline
    --eval_interval 2 --embed_last 1000 --no_compile""".split()


def test_a_fixed_prior_is_used_and_not_touched(pretrained, tmp_path, monkeypatch):
    seen, matching_step = [], rome.matching_step

    def watched(image_syn, optimizer_img, member, *rest):
        state = {key: value.clone() for key, value in member.net.state_dict().items()}
        seen.append((state, member.running_accuracy().item(), member.net.training))
        return matching_step(image_syn, optimizer_img, member, *rest)
    monkeypatch.setattr(rome, "matching_step", watched)
    run_in(monkeypatch, ROME_cifar10, tmp_path, *ROME, "--method", "+AP", "--robust_prior",
             *(pretrained / name for name in NETWORKS))
    assert (tmp_path / "result" / "ROME_res_+AP_Digits_MLP_1ipc.pt").exists()
    nets = [load(pretrained / name).state_dict() for name in NETWORKS]
    accuracies = [100 * said_of(pretrained / name)["train_robust_acc"] for name in NETWORKS]
    assert len(seen) == 2 * 2  # two iterations, two networks each
    for state, w_f, training in seen:
        (k,) = [k for k in range(2) if all(torch.equal(state[key], nets[k][key]) for key in state)]
        assert w_f == pytest.approx(accuracies[k]) and not training
    metrics = tmp_path / "result" / "+AP_Digits_MLP_1ipc_pixel_seed0" / "metrics.jsonl"
    assert '"loss_pool": 0.0' in metrics.read_text()


@pytest.mark.parametrize("change, message", [
    ({"model": "LeNet"}, "its model is LeNet, this run's MLP"),
    ({"dataset": "CIFAR10"}, "its dataset is CIFAR10, this run's Digits"),
    ({"num_classes": 100}, "its num_classes is 100, this run's 10"),
    ({"threat_model": "published"}, "its threat_model is published, this run's pixel"),
    ({"train_robust_acc": 31.7}, "missing or damaged"),
    (None, "json of pretrain.py beside it is missing")])
def test_bad_priors_are_refused_by_name(pretrained, tmp_path, monkeypatch, change, message):
    path = shutil.copyfile(pretrained / NETWORKS[0], tmp_path / "prior.pth")
    if change:
        about = {**said_of(pretrained / NETWORKS[0]), **change}
        (tmp_path / "prior.pth.json").write_text(json.dumps(about))
    with pytest.raises(InputError, match=f"prior.pth.*{message}"):
        run_in(monkeypatch, ROME_cifar10, tmp_path, *ROME, "--robust_prior", path)
    assert not (tmp_path / "result").exists()


# ------------------------------------------------------------------------- data of the user's own
@pytest.mark.parametrize("num_classes", [2, 5])
def test_own_data_through_all_scripts(tmp_path, monkeypatch, capsys, num_classes):
    """Grey images of 28x28, labels in a column: pretrain, ROME, evaluate with every attack."""
    rng = np.random.default_rng(0)
    y = np.arange(20 * num_classes) % num_classes
    base = rng.integers(0, 256, (num_classes, 7, 7)).repeat(4, 1).repeat(4, 2)
    x = (0.7 * base[y] + rng.integers(0, 70, (len(y), 28, 28))).astype(np.uint8)
    np.savez(tmp_path / "own.npz", x_train=x, y_train=y[:, None], x_test=x[:40], y_test=y[:40])
    own = ["--dataset", "own.npz", "--no_compile"]
    common = [*own, "--model", "MLP", "--threat_model", "pixel"]
    run_in(monkeypatch, pretrain, tmp_path, *common, *"--epochs 2 --attack_steps 1 "
             "--batch_train 16 --aa_limit 0".split())
    network = "checkpoints/full_MLP_own_20_PGD-pixel_seed0-0.pth"
    about = said_of(tmp_path / network)
    assert about["dataset"] == "own" and about["num_classes"] == num_classes
    normalisation = [[x.mean() / 255], [x.std() / 255]]
    assert np.allclose([about["mean"], about["std"]], normalisation, atol=1e-4)

    run_in(monkeypatch, ROME_cifar10, tmp_path, *common, "--robust_prior", network, *"""--ipc 1
             --Iteration 1 --num_exp 1 --num_eval 1 --epoch_eval_train 20 --batch_real 8
             --embed_last 1000 --labels prior --no_baseline""".split())
    out = capsys.readouterr().out
    assert f"own: {len(y)} training and 40 test images, 1x28x28, {num_classes} classes" in out
    assert f"{network} taken as: own, MLP, pixel" in out
    synset = "result/ROME_res_ROME_own_MLP_1ipc.pt"
    meta = torch.load(tmp_path / synset, weights_only=True)["meta"]
    assert (meta["dataset"], meta["mean"]) == ("own", about["mean"])

    run_in(monkeypatch, evaluate, tmp_path, *own, "--synset", synset, *"""--limit 10 --num_eval 1
             --grid white-box --query --queries 5 --aa_iterations 2 --no_sanity --labels own
             --out out""".split())
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    assert content["num_classes"] == num_classes
    assert {row["threat_model"] for row in content["rows"]} == {"pixel"}
    assert {row["attack"] for row in content["rows"]} == {*CONTROLS, *ATTACKS} - {"PGD20"}
    table = (tmp_path / "out" / "results.md").read_text()
    assert re.search(rf"constant classifier[ |]*\| {100 / num_classes:.1f} \|", table)
