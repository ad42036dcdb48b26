import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT

import evaluate
import sanity
import utils
from attacks import ATTACKS, attack_images, get_threat_model
from runtime.measures import CONTROLS
from runtime.safe_io import InputError
from runtime.checkpoint import lock
from reporting.results_md import warnings_of
from networks import get_network
from target_models import TargetModel

ROW_KEYS = {"dataset", "ipc", "method", "crafted_on", "evaluated_on", "threat_model", "attack", "targeted", "eps", "n",
            "accuracy", "seconds", "forward", "backward", "max_linf", "max_l2", "seed"}
SMALL = ["--model", "LeNet", "--epoch_eval_train", "60", "--lr_net", "0.02", "--num_eval", "2", "--limit", "40", "--no_sanity"]


def run(monkeypatch, out, *arguments):
    """evaluate.py in this process; returns the content of results.json."""
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--out", str(out), *map(str, arguments)])
    evaluate.main()
    return json.loads((out / "results.json").read_text())


@pytest.fixture(scope="module")
def digits_set(digits, tmp_path_factory):
    """Ten real digits a class in the DC layout, as a distillation would leave them."""
    path = tmp_path_factory.mktemp("set") / "ROME_res_ROME_Digits_LeNet_10ipc.pt"
    rng = torch.Generator().manual_seed(0)
    images = torch.cat([digits.sample_class(c, 10, rng) for c in range(10)])
    torch.save({"data": [[images, torch.arange(10).repeat_interleave(10)]], "accs_all_exps": {},
                "meta": {"dataset": "Digits", "packed": False, "threat_model": "published"}}, path)
    return path


@pytest.fixture(scope="module")
def digits_networks(digits, digits_set, tmp_path_factory):
    """Two networks trained on that set, under the names of BEARD."""
    folder = tmp_path_factory.mktemp("networks")
    images, labels = torch.load(digits_set, weights_only=True)["data"][0]
    for i, method in enumerate(("DC", "MTT")):
        net = get_network("LeNet", 3, 10, (32, 32), seed=i)
        utils.train_on_set(net, images, labels, epochs=40, lr_net=0.05, batch_train=64, dsa_strategy="none",
                           generator=torch.Generator().manual_seed(i))
        torch.save(net.state_dict(), folder / f"{method}_LeNet_Digits_10_None_0.8.pth")
    return sorted(folder.iterdir())


# ------------------------------------------------------------------------------------------------------------ end to end
def test_a_set_end_to_end(digits, digits_set, tmp_path, monkeypatch):
    """Trains, attacks under both threat models, and every figure can be found again by hand."""
    monkeypatch.setattr(evaluate, "SLICE", 16)
    attacks = ("FGSM", "PGD", "PGD_L2", "CW", "Deepfool")
    content = run(monkeypatch, tmp_path / "out", "--synset", digits_set, *SMALL, "--attacks", *attacks)
    rows = content["rows"]
    assert all(set(row) == ROW_KEYS for row in rows)
    names = [f"ROME_LeNet_Digits_10_None_0-{i}.pth" for i in range(2)]
    wanted = {(name, threat, attack, targeted) for name in names for threat in ("published", "pixel") for attack in attacks
              for targeted in ((True, False) if ATTACKS[attack].targetable else (False,))}
    wanted |= {(name, threat, control, None) for name in names for threat in ("published", "pixel")
               for control in ("Clean", "Clamp-only")}
    assert {(r["crafted_on"], r["threat_model"], r["attack"], r["targeted"]) for r in rows} == wanted
    assert len(rows) == len(wanted)
    assert all(r["evaluated_on"] == r["crafted_on"] and r["n"] == 40 and r["ipc"] == 10 and r["seed"] == 0 for r in rows)

    images, labels = digits.get_batch("test", slice(40))
    for row in rows:
        threat = get_threat_model(row["threat_model"], digits)
        net = get_network("LeNet", 3, 10, (32, 32), seed=0)
        net.load_state_dict(torch.load(tmp_path / "out" / "networks" / row["crafted_on"], weights_only=True))
        if row["attack"] == "Clean":
            x_adv, passes = images, (0, 0)
        elif row["attack"] == "Clamp-only":
            x_adv, passes = threat.clamp_only(images), (0, 0)
        else:
            options = {"random_start": False} if row["attack"] == "PGD" else {}
            size = 64 if row["attack"] == "Deepfool" else 16  # as the slices: the last bits depend on the size of a batch
            x_adv = torch.cat([attack_images(net, x, y, threat, None, row["attack"], row["targeted"], **options)
                               for x, y in zip(images.split(size), labels.split(size))])
            steps = {"FGSM": 1, "PGD": 10, "PGD_L2": 10}.get(row["attack"])
            passes = (steps, steps) if steps else (row["forward"], row["backward"])
        # DeepFool leaves images on the boundary, where the size of a batch decides.
        tolerance = 0.15 if row["attack"] == "Deepfool" else 1e-9
        assert row["accuracy"] == pytest.approx(utils.accuracy(net, x_adv, labels), abs=tolerance), row
        assert (row["forward"], row["backward"]) == passes and row["seconds"] > 0
        assert row["eps"] == {"FGSM": 8 / 255, "PGD": 8 / 255, "PGD_L2": 128 / 255}.get(row["attack"])
        if row["eps"]:
            assert 0 < row["max_l2" if row["attack"] == "PGD_L2" else "max_linf"] <= row["eps"] + 1e-6
    assert utils.accuracy(net.eval(), images, labels) > 0.6

    text = (tmp_path / "out" / "results.md").read_text()
    for phrase in ("## Threat model published", "## Threat model pixel", "bounded by eps", "minimum norm", "Clamp-only",
                   "+-", "I-CREI", "missing: AA at ipc 10"):
        assert phrase in text
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"results.json", "results.md", "grid_published.png",
                                                              "grid_pixel.png", "networks", ".lock"}
    (metrics,) = [m for m in content["metrics"] if (m["threat_model"], m["targeted"]) == ("pixel", True)]
    pixel = [r for r in rows if r["threat_model"] == "pixel"]
    clean = np.mean([r["accuracy"] for r in pixel if r["attack"] == "Clean"])
    attacked = [np.mean([r["accuracy"] for r in pixel if r["attack"] == a and r["targeted"]]) for a in attacks[:4]]
    assert metrics["I-RR"] == pytest.approx(100 * (1 - (clean - np.mean(attacked)) * (clean - min(attacked)) / clean**2))
    assert content["networks"][names[1]]["seed_init"] != content["networks"][names[0]]["seed_init"]


def strip(rows):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def test_resume_repeats_nothing(digits_set, tmp_path, monkeypatch):
    """Interrupted at every third slice, again and again: the same rows, and no slice is computed twice."""
    monkeypatch.setattr(evaluate, "SLICE", 16)
    arguments = ["--synset", digits_set, *SMALL, "--threat_model", "pixel",
                 "--attacks", "FGSM", "PGD", "Square", "--queries", 10]
    undisturbed = run(monkeypatch, tmp_path / "a", *arguments)
    computed, run_slice, train_on_set = [], evaluate.run_slice, utils.train_on_set
    trained = []

    def sometimes(job, number, *rest):
        computed.append((job, number))
        result = run_slice(job, number, *rest)
        if len(computed) % 3 == 0:
            computed.pop()  # killed before it was saved: the only work that may be repeated
            computed.append("lost")
            raise KeyboardInterrupt
        return result

    def count(*a, **k):
        trained.append(1)
        return train_on_set(*a, **k)
    monkeypatch.setattr(evaluate, "run_slice", sometimes)
    monkeypatch.setattr(utils, "train_on_set", count)
    for _ in range(40):
        try:
            content = run(monkeypatch, tmp_path / "b", *arguments, "--resume")
            break
        except KeyboardInterrupt:
            pass
    assert strip(content["rows"]) == strip(undisturbed["rows"])
    done = [c for c in computed if c != "lost"]
    assert len(done) == len(set(done)) == 3 * len(content["rows"]) and len(trained) == 2
    assert not (tmp_path / "b" / "unfinished.json").exists()


def test_killed_and_resumed_as_a_process(digits_networks, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, ROOT / "evaluate.py", "--networks", *digits_networks, "--out", out, "--no_sanity", "--attacks",
               "FGSM", "PGD", "CW", "--resume", "--limit", "100"]
    process = subprocess.Popen(list(map(str, command)), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    rows, deadline = [], time.time() + 120
    while len(rows) < 10 and time.time() < deadline:
        time.sleep(0.05)
        try:
            rows = json.loads((out / "results.json").read_text())["rows"]  # never half written
        except FileNotFoundError:
            pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = json.loads((out / "results.json").read_text())["rows"]
    finished = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    after = json.loads((out / "results.json").read_text())["rows"]
    assert len(after) == 2 * 2 * (2 + 3 * 2) and after[:len(before)] == before
    assert f"{len(before)} of them done" in finished.stdout


def test_what_is_wrong_in_bf16_alone_is_attacked_again(digits_networks, digits, monkeypatch):
    """A bf16 in which all images look wrong from the start: nothing is attacked in it, so everything is once more, in fp32, as
    if there were no bf16."""
    from runtime import compilation
    net = get_network("LeNet", 3, 10, (32, 32), 0)
    net.load_state_dict(torch.load(digits_networks[0], weights_only=True))
    target = TargetModel("a.pth", "A", 1, "LeNet", net.eval())
    x, labels = digits.get_batch("test", slice(40))
    job, threat = evaluate.Job("a.pth", "pixel", "FGSM", False, 2 / 255), get_threat_model("pixel", digits)
    args = evaluate.parse_args(["--networks", "a.pth"])

    def measured():
        return evaluate.run_slice(job, 0, x, labels, [target], threat, 64, args)
    plain = measured()
    asked, through = [], compilation.dispatch

    def rough(net, x, layers):
        asked.append(compilation.precision())
        scores = through(net, x, layers)
        return scores - 100 * torch.nn.functional.one_hot(labels, 10) if asked[-1] == "bf16" else scores
    monkeypatch.setattr(compilation, "dispatch", rough)
    compilation.set_precision("bf16")
    try:
        found, wrong = measured(), utils.wrong_in_bf16_alone(net, x, labels)
    finally:
        compilation.set_precision("fp32")
    with torch.no_grad():
        right = net(x).argmax(1) == labels
    assert torch.equal(wrong, right) and not utils.wrong_in_bf16_alone(net, x, labels).any() and "tf32" in asked
    assert found["correct"] == plain["correct"] and 0 < plain["correct"]["a.pth"] < right.sum()
    assert found["max_linf"] == plain["max_linf"] and found["forward"] > plain["forward"]


def test_transfer_and_craft_on(digits_networks, digits, tmp_path, monkeypatch):
    content = run(monkeypatch, tmp_path / "out", "--networks", *digits_networks, "--transfer", "--attacks", "FGSM", "PGD",
                  "--threat_model", "pixel", "--untargeted", "--limit", 50, "--no_sanity")
    cells = {(e["crafted_on"], e["evaluated_on"]): e["I-RR"] for e in content["transfer"]}
    assert set(cells) == {(a, b) for a in ("DC", "MTT") for b in ("DC", "MTT")}
    rows = {(r["crafted_on"][:2], r["evaluated_on"][:2], r["attack"]): r["accuracy"] for r in content["rows"]}
    clean, a = rows["MT", "MT", "Clean"], [rows["DC", "MT", name] for name in ("FGSM", "PGD")]
    assert cells["DC", "MTT"] == pytest.approx(100 * (1 - (clean - np.mean(a)) * (clean - min(a)) / clean**2))
    assert cells["DC", "DC"] < cells["DC", "MTT"]  # white box is the stronger
    assert (tmp_path / "out" / "transfer_pixel_untargeted_ipc_10.png").exists()
    # By hand: what was crafted on DC, judged by MTT.
    nets = [get_network("LeNet", 3, 10, (32, 32), 0) for _ in digits_networks]
    for net, path in zip(nets, digits_networks):
        net.load_state_dict(torch.load(path, weights_only=True))
    images, labels = digits.get_batch("test", slice(50))
    x_adv = attack_images(nets[0], images, labels, get_threat_model("pixel", digits), None, "FGSM", False)
    assert rows["DC", "MT", "FGSM"] == pytest.approx(utils.accuracy(nets[1], x_adv, labels))

    content = run(monkeypatch, tmp_path / "one", "--networks", *digits_networks, "--transfer", "--attacks", "FGSM",
                  "--threat_model", "pixel", "--limit", 50, "--no_sanity", "--craft_on", "MTT")
    assert {r["crafted_on"] for r in content["rows"] if r["attack"] == "FGSM"} == {digits_networks[1].name}
    assert {r["evaluated_on"] for r in content["rows"] if r["attack"] == "FGSM"} == {p.name for p in digits_networks}


def test_accuracy_against_eps(digits_networks, tmp_path, monkeypatch):
    content = run(monkeypatch, tmp_path / "out", "--networks", digits_networks[0], "--attacks", "PGD", "CW", "--untargeted",
                  "--eps", 0, 8, 32, 128, "--threat_model", "pixel", "--limit", 60, "--no_sanity")
    curve = [r["accuracy"] for r in content["rows"] if r["attack"] == "PGD"]
    assert [255 * r["eps"] for r in content["rows"] if r["attack"] == "PGD"] == pytest.approx([0, 8, 32, 128])
    assert curve == sorted(curve, reverse=True) and curve[0] == content["rows"][0]["accuracy"] and curve[-1] < 0.05
    assert [r["eps"] for r in content["rows"] if r["attack"] == "CW"] == [None]
    assert (tmp_path / "out" / "eps_pixel.png").exists()
    assert {tuple(m["attacks"]) for m in content["metrics"]} == {("PGD", "CW")}  # at the default eps alone


def test_a_resumed_run_may_add_attacks(digits_networks, tmp_path, monkeypatch):
    common = ["--networks", *digits_networks, "--limit", 30, "--no_sanity", "--threat_model", "pixel", "--untargeted"]
    first = run(monkeypatch, tmp_path / "out", *common, "--attacks", "FGSM")
    more = run(monkeypatch, tmp_path / "out", *common, "--attacks", "FGSM", "SPSA", "--transfer", "--resume")
    assert [r for r in first["rows"] if r["attack"] != "FGSM"] == [r for r in more["rows"] if r["attack"] in CONTROLS]
    assert len([r for r in more["rows"] if r["attack"] == "FGSM"]) == 4  # transfer was not there before
    assert len(more["rows"]) == len({tuple(map(str, r.values())) for r in more["rows"]}) == 4 + 4 + 4


def test_packing_and_adversarial_training(digits, digits_set, tmp_path, monkeypatch):
    """Packed sets are unpacked, by meta or by flag; --adv_train makes networks for each threat model."""
    seen = []
    monkeypatch.setattr(utils, "train_on_set", lambda net, images, labels, attack=None, **k: seen.append(
        (images.shape, attack and attack(images[:2], labels[:2]))))  # sanity has its own name for it
    content = torch.load(digits_set, weights_only=True)
    for name, meta, flags in (("ours", {"dataset": "Digits", "packed": True}, []), ("theirs", {}, ["--packed"])):
        torch.save({"data": content["data"], "meta": meta}, tmp_path / f"res_{name}_Digits_LeNet_10ipc.pt")
        out = run(monkeypatch, tmp_path / name, "--synset", tmp_path / f"res_{name}_Digits_LeNet_10ipc.pt", *SMALL, *flags,
                  "--attacks", "FGSM", "--adv_train", "--untargeted")
    assert [shape for shape, _ in seen] == [(400, 3, 32, 32)] * 8
    images, labels = content["data"][0]
    from augment import unpack
    for (_, x_adv), threat in zip(seen, ("published", "published", "pixel", "pixel")):
        change = (digits.denormalize(x_adv) - digits.denormalize(unpack(images)[:2]).clamp(0, 1)).abs().max()
        assert (change <= 8 / 255 + 1e-5) == (threat == "pixel")
    assert {(r["crafted_on"].split("_")[4], r["threat_model"]) for r in out["rows"]} == {
        ("PGD-published", "published"), ("PGD-pixel", "pixel")}


# ------------------------------------------------------------------------------------------------------------- sanity
class Masked(torch.nn.Module):
    """A network whose gradients are gone: the logits come in steps."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        logits = self.net(x)
        return logits.mul(4).round().div(4) + 0 * logits


@pytest.fixture
def quick_checks(monkeypatch):
    monkeypatch.setattr(sanity, "QUERIES", 200)
    monkeypatch.setattr(sanity, "STEPS", 30)


def test_sanity_report(digits_networks, digits, tmp_path, monkeypatch, quick_checks):
    content = run(monkeypatch, tmp_path / "out", "--networks", digits_networks[0], "--attacks", "FGSM", "--limit", 100,
                  "--threat_model", "pixel")
    checks = content["sanity"][digits_networks[0].name]["pixel"]
    assert len(checks) == 5 and all(check["passed"] for check in checks.values()), checks
    net = get_network("LeNet", 3, 10, (32, 32), 0).eval()
    net.load_state_dict(torch.load(digits_networks[0], weights_only=True))
    surrogate = sanity.train_surrogate(digits, "LeNet", 0)
    assert utils.accuracy(surrogate, *digits.get_batch("test", slice(None))) > 0.8
    threat = dataclasses.replace(get_threat_model("pixel", digits), eval_eps={"robust_acc": 24 / 255})
    checks = sanity.check_sanity("masked.pth", Masked(net).eval(), surrogate, threat, digits.get_batch("test", slice(100)), 0)
    assert not any(checks[name]["passed"] for name in ("large eps", "black box", "transfer")), checks
    warnings = warnings_of({"sanity": {"masked.pth": {"pixel": checks}}, "metrics": [
        {"method": "DC", "threat_model": "pixel", "targeted": True, "raised": ["FGSM at ipc 10"]}]})
    assert "large eps" in warnings[0] and "above clean accuracy (FGSM at ipc 10)" in warnings[-1]


def test_autoattack_must_not_be_weaker():
    def row(attack, accuracy, eps=2 / 255, n=100):
        return {"crafted_on": "net", "evaluated_on": "net", "threat_model": "pixel", "targeted": False, "attack": attack,
                "eps": eps, "n": n, "accuracy": accuracy}
    rows = [row("PGD20", 0.30), row("AA", 0.28), row("PGD20", 0.20, 4 / 255), row("PGD", 0.05, n=50)]
    assert sanity.check_autoattack(rows, "net", "pixel")["passed"]
    wrong = sanity.check_autoattack([*rows, row("AA", 0.25, 4 / 255)], "net", "pixel")
    assert not wrong["passed"] and "25.0 % under AutoAttack, 20.0 % under PGD at 4/255" in wrong["text"]
    assert sanity.check_autoattack(rows[:1], "net", "pixel") is None and sanity.check_autoattack(rows, "other", "pixel") is None


# ---------------------------------------------------------------------------------------------------------- soft labels
def test_a_set_with_soft_labels(digits, digits_set, tmp_path, monkeypatch, quick_checks):
    """A network with the set's labels beside one with the classes alone, as the recipe says; the headline is AutoAttack."""
    images, labels = torch.load(digits_set, weights_only=True)["data"][0]
    soft = torch.randn(100, 10, generator=torch.Generator().manual_seed(0)) + 4 * torch.eye(10)[labels]
    meta = {"dataset": "Digits", "threat_model": "pixel", "recipe": {"epochs": 60, "lr_net": 0.02, "temperature": 2.0}}
    path = tmp_path / "res_ROME_Digits_LeNet_10ipc.pt"
    torch.save({"data": [[images, labels]], "soft_labels": [soft], "meta": meta}, path)
    out = tmp_path / "out"
    flags = ["--synset", path, "--model", "LeNet", "--num_eval", "1", "--limit", "40", "--aa_limit", "10", "--threat_model",
             "pixel", "--attacks", "PGD20", "AA", "--aa_iterations", "5", "--queries", "20", "--untargeted"]
    rows = run(monkeypatch, out, *flags, "--no_sanity")["rows"]
    names = [f"ROME-pixel{kind}_LeNet_Digits_10_None_0-0.pth" for kind in ("", "-hard")]
    assert {(r["crafted_on"], r["attack"], r["eps"], r["n"]) for r in rows} == {
        (name, *key) for name in names for key in (("Clean", None, 40), ("Clamp-only", None, 40), ("PGD20", 8 / 255, 40),
                                                   *(("AA", eps / 255, 10) for eps in (2, 4, 8)))}
    for name, target in zip(names, (soft, labels)):
        about = json.loads((out / "networks" / f"{name}.json").read_text())
        assert (about["epochs"], about["temperature"], about["batch_train"]) == (60, 2.0, 256)
        assert about["labels"] == ("hard" if target is labels else "soft")
        net = get_network("LeNet", 3, 10, (32, 32), about["seed_init"])
        utils.train_on_set(net, images, target, epochs=60, lr_net=0.02, batch_train=256, temperature=2.0,
                           dsa_strategy="color_crop_cutout_flip_scale_rotate",
                           generator=torch.Generator().manual_seed(about["seed_train"]))
        ours = torch.load(out / "networks" / name, weights_only=True)
        assert all(torch.allclose(value, ours[key], atol=1e-5) for key, value in net.state_dict().items())
    text = (out / "results.md").read_text()
    assert "| ROME-pixel | 10 | " in text.split("## Threat model")[0] and "| *a constant classifier* | | 10 | 10 |" in text

    more = run(monkeypatch, out, *flags, "--labels", "own", "--resume")  # with the sanity checks, of the one asked for
    assert list(more["sanity"]) == names[:1] and more["rows"] == rows
    with pytest.raises(InputError, match="trained with another temperature"):
        run(monkeypatch, tmp_path / "again", *flags, "--no_sanity", "--attacks", "FGSM")
        shutil.move(tmp_path / "again" / "results.json", tmp_path / "aside")
        run(monkeypatch, tmp_path / "again", *flags, "--no_sanity", "--label_temperature", "3", "--attacks", "FGSM")


# ------------------------------------------------------------------------------------------------------- wrong on purpose
@pytest.mark.parametrize("arguments, message", [
    ([], "nothing to attack"),
    (["--networks", "x", "--attacks", "PDG"], "invalid choice: 'PDG'"),
    (["--networks", "x", "--attacks", "Deepfool", "AA", "--targeted"], "no targeted form"),
    (["--networks", "x", "--method", "a", "b"], "2 name"),
    (["--synset", "x", "--dsa_strategy", "colour"], "colour"),
    (["--networks", "x", "--eps", "-1"], "at least 0"),
    (["--networks", "x", "--eps", "4", "--attacks", "CW", "Deepfool"], "no attack that --eps bounds"),
    (["--networks", "x", "--crei_weight", "7"], "7 is not between 0 and 1"),
    (["--networks", "x", "--method", "a/b"], "'a/b' is not made of"),
])
def test_bad_flags(arguments, message, capsys):
    with pytest.raises(SystemExit) as error:
        evaluate.parse_args(arguments)
    assert error.value.code == 2 and message in capsys.readouterr().err


def test_bad_files(digits_networks, digits_set, tmp_path, monkeypatch):
    def refused(message, *arguments):
        with pytest.raises(InputError, match=message):
            run(monkeypatch, tmp_path / "out", *arguments)
        assert not (tmp_path / "out").exists()

    first = digits_networks[0]
    refused("nowhere.pth does not exist", "--networks", tmp_path / "nowhere.pth")
    refused("is not of CIFAR10", "--networks", first, "--dataset", "CIFAR10")
    refused("features.0.weight is .*expected|missing", "--networks", first, "--model", "ConvNetW32")
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / first.name).write_bytes(first.read_bytes())
    refused("have the same name", "--networks", first, tmp_path / "copy" / first.name)
    (tmp_path / "copy" / digits_set.name).write_bytes(digits_set.read_bytes())
    refused("would be pooled: tell them apart with --method", "--synset", digits_set, tmp_path / "copy" / digits_set.name)
    (tmp_path / "copy" / "DC_LeNet_Digits_10_PGD_0.7.pth").write_bytes(first.read_bytes())
    refused("would be pooled", "--networks", first, tmp_path / "copy" / "DC_LeNet_Digits_10_PGD_0.7.pth")
    refused("would be pooled", "--synset", digits_set, "--networks", first, "--method", "A", "A")
    refused("--limit 1000 is more than the 360", "--networks", first, "--limit", 1000)
    refused("--craft_on IDM: the methods here are DC", "--networks", first, "--craft_on", "IDM")
    images, labels = torch.load(digits_set, weights_only=True)["data"][0]
    for change, message in (
            ({"data": [[images, labels + 1]]}, "labels from 1 to 10; Digits has 0 to 9"),
            ({"data": [[images, labels - 1]]}, "labels from -1 to 8"),
            ({"data": [[images[:-1], labels[:-1]]]}, "9 to 10 images each"),
            ({"data": [[images[:, :, :16, :16], labels]]}, r"images are \(3, 16, 16\)"),
            ({"data": [[images, labels]], "meta": {"mean": [0.1, 0.2]}}, r"normalised with mean \[0.1, 0.2\]"),
            *(({"data": [[images, labels]], "meta": meta}, "of its meta is") for meta in (
                {"flags": []}, {"dataset": ["Digits"]}, {"flags": {"model": []}}, {"mean": ["a"] * 3}, {"packed": "no"}))):
        torch.save({"meta": {}, **change}, tmp_path / "res_X_Digits_LeNet_10ipc.pt")
        refused(message, "--synset", tmp_path / "res_X_Digits_LeNet_10ipc.pt", *SMALL)


def test_existing_results_are_protected(digits_networks, tmp_path, monkeypatch):
    common = ["--networks", digits_networks[0], "--attacks", "FGSM", "--limit", 30, "--no_sanity"]
    before = run(monkeypatch, tmp_path / "out", *common)
    for arguments, message in ((common, "exists; go on with --resume"),
                               ([*common, "--seed", 1, "--resume"], "--seed is 1, the run in .* has 0"),
                               (["--networks", digits_networks[1], *common[2:], "--resume"], "--networks is")):
        with pytest.raises(InputError, match=message):
            run(monkeypatch, tmp_path / "out", *arguments)
    assert json.loads((tmp_path / "out" / "results.json").read_text())["rows"] == before["rows"]
    state = torch.load(digits_networks[0], weights_only=True)
    changed = tmp_path / digits_networks[0].name
    torch.save(state, changed)
    run(monkeypatch, tmp_path / "own", "--networks", changed, *common[2:])
    state["classifier.bias"] += 1
    torch.save(state, changed)
    with pytest.raises(InputError, match="not the file that"):
        run(monkeypatch, tmp_path / "own", "--networks", changed, *common[2:], "--resume")
    whole = json.loads((tmp_path / "own" / "results.json").read_text())
    for damaged in ('{"rows": [', "[]", *(json.dumps({**whole, key: value}) for key, value in (
            ("rows", None), ("rows", [{}]), ("flags", []), ("networks", []), ("versions", None)))):
        (tmp_path / "own" / "results.json").write_text(damaged)
        with pytest.raises(InputError, match="results.json is damaged"):
            run(monkeypatch, tmp_path / "own", "--networks", changed, *common[2:], "--resume")


def test_networks_of_another_set_or_training_are_not_taken_over(digits_set, tmp_path, monkeypatch):
    path, out = tmp_path / digits_set.name, tmp_path / "out"
    path.write_bytes(digits_set.read_bytes())
    arguments = ["--synset", path, *SMALL, "--epoch_eval_train", 1, "--attacks", "FGSM", "--targeted"]
    run(monkeypatch, out, *arguments)
    content = torch.load(path, weights_only=True)
    content["data"][0][0] += 0.1
    torch.save(content, path)
    with pytest.raises(InputError, match="was trained with another set_sha256 .*choose another --out"):
        run(monkeypatch, out, *arguments, "--resume")
    path.write_bytes(digits_set.read_bytes())
    (out / "results.json").unlink()
    with pytest.raises(InputError, match="was trained with another seed .0 instead of 5"):
        run(monkeypatch, out, *arguments, "--seed", 5)


def test_a_network_that_diverged_is_no_result(digits_set, tmp_path, monkeypatch):
    with pytest.raises(FloatingPointError, match="after training on .*--lr_net 1e.30"):
        run(monkeypatch, tmp_path, "--synset", digits_set, *SMALL, "--lr_net", "1e30")
    assert not list((tmp_path / "networks").iterdir())


def test_the_attack_that_was_interrupted_comes_first(digits_networks, tmp_path, monkeypatch):
    """Its finished slices are taken over, although the resumed run has an attack that would come before it."""
    monkeypatch.setattr(evaluate, "SLICE", 10)
    common = ["--networks", digits_networks[0], "--threat_model", "pixel", "--untargeted", "--no_sanity", "--limit", 30]
    run_slice, done = evaluate.run_slice, []

    def disturbed(job, number, *rest):
        if (job.attack, number) == ("PGD", 2) and "stopped" not in done:
            done.append("stopped")
            raise KeyboardInterrupt
        done.append((job.attack, number))
        return run_slice(job, number, *rest)
    monkeypatch.setattr(evaluate, "run_slice", disturbed)
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, tmp_path / "out", *common, "--attacks", "PGD")
    del done[:done.index("stopped")]
    run(monkeypatch, tmp_path / "out", *common, "--attacks", "FGSM", "PGD", "--resume")
    assert done == ["stopped", ("PGD", 2), ("FGSM", 0), ("FGSM", 1), ("FGSM", 2)]


def test_slices_of_another_size_are_not_taken_over(digits_networks, tmp_path, monkeypatch):
    flags = ["--networks", digits_networks[0], "--threat_model", "pixel", "--attacks", "Deepfool", "--no_sanity", "--limit", 30]
    save_slices = evaluate.Results.save_slices

    def stop(results, job, targets, slices):
        save_slices(results, job, targets, slices)
        if job.attack == "Deepfool":
            raise KeyboardInterrupt
    with monkeypatch.context() as patched:
        patched.setattr(evaluate, "SLICE", 5)
        patched.setattr(evaluate.Results, "save_slices", stop)
        with pytest.raises(KeyboardInterrupt):
            run(monkeypatch, tmp_path / "out", *flags)
    content = run(monkeypatch, tmp_path / "out", *flags, "--resume")
    assert {row["n"] for row in content["rows"]} == {30}


def test_a_missing_package_is_missed_at_the_start(digits_networks, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "find_spec", lambda name: None)
    for flags in (["--attacks", "AA", "--no_sanity"], ["--attacks", "FGSM"]):
        with pytest.raises(InputError, match="need the package pyautoattack"):
            run(monkeypatch, tmp_path / "out", "--networks", digits_networks[0], *flags)
    assert not (tmp_path / "out").exists()


def test_two_evaluations_in_one_folder(digits_networks, tmp_path, monkeypatch):
    first = lock(tmp_path)
    with pytest.raises(InputError, match="another run is writing to"):
        run(monkeypatch, tmp_path, "--networks", digits_networks[0])
    first.close()


def test_one_line_for_the_user(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, ROOT / "evaluate.py", "--networks", "nowhere.pth"], cwd=tmp_path,
                            capture_output=True, text=True, env=environment)
    assert result.returncode == 1 and result.stderr == "evaluate.py: error: nowhere.pth does not exist or is a folder\n"
    assert list(tmp_path.iterdir()) == []
