import dataclasses
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import call_before, run_in

import evaluate
import sanity
import target_models
import utils
from attack_grid import run_slice
from attacks import ATTACKS, attack, get_threat_model
from augment import unpack
from formats.inputs import Input
from formats.synset_file import SynsetFile, SyntheticSet
from networks import get_network
from reporting.results_md import warnings_of
from runtime import compilation
from runtime.checkpoint import lock
from runtime.measures import CONTROLS
from runtime.safe_io import InputError
from runtime.tasks import Task, unpack_bits
from synsets import TrainConfig
from target_models import TargetModel

SMALL = ("--model MLP --epoch_eval_train 40 --lr_net 0.02 --num_eval 2 --limit 40 "
         "--no_sanity").split()
PIXEL = "--threat_model pixel --untargeted --no_sanity --limit 30".split()


@pytest.fixture
def run(monkeypatch, tmp_path):
    """evaluate.py in this process, into tmp_path/`out`; returns the content of results.json."""
    def run(*arguments, out="out"):
        run_in(monkeypatch, evaluate, tmp_path, "--out", out, *arguments)
        return json.loads((tmp_path / out / "results.json").read_text())
    return run


@pytest.fixture
def refused(run):
    """evaluate.py raises an InputError whose message matches."""
    def refused(message, *arguments):
        with pytest.raises(InputError, match=message):
            run(*arguments)
    return refused


def test_the_headline(digits_set, run, tmp_path, monkeypatch):
    """Without flags of attacks: AutoAttack and PGD-20 under `pixel`, and the same of random images
    with the same training, which --quick shortens; beside a network of all real images."""
    monkeypatch.setattr(evaluate, "QUICK_TRAINING", 3000)
    full = tmp_path / "full_MLP_Digits_100_None_seed0-0.pth"
    torch.save(get_network("MLP", 3, 10, (32, 32), 0).state_dict(), full)
    content = run("--synset", digits_set, "--networks", full, "--model", "MLP", "--quick",
                  "--limit", 20, "--queries", 10, "--aa_iterations", 2)
    rows = content["rows"]
    assert {(row["method"], row["attack"], row["eps"]) for row in rows if row["eps"]} == {
        (method, attack, eps / 255) for method in ("ROME", "ROME-random", "full")
        for attack in ("PGD20", "AA") for eps in (2, 8)}
    assert {(row["threat_model"], row["n"]) for row in rows} == {("pixel", 20)}
    ours, random = (json.loads(path.read_text())
                    for path in sorted((tmp_path / "out" / "networks").glob("*.json")))
    assert ours["epochs"] == random["epochs"] == 30  # times 100 images
    assert ours["bytes"] == random["bytes"] and ours["sha256"] != random["sha256"]
    text = (tmp_path / "out" / "results.md").read_text()
    assert "| ROME-random | MLP | 10 |" in text and "Above random real images" in text
    above = text.split("Above training on all real images")[1].split("Warnings")[0]
    clean = {row["method"]: row["accuracy"] for row in rows if row["attack"] == "Clean"}
    assert f"| ROME | MLP | 10 | {100 * (clean['ROME'] - clean['full']):+.1f} [" in above
    assert "| ROME-random | MLP | 10 |" in above and "| full " not in above

    network = next((tmp_path / "out" / "networks").glob("ROME_*.pth"))  # judged again by itself
    again = ["--networks", network, *PIXEL, "--attacks", "FGSM"]
    assert run(*again, out="again")["rows"][0]["bytes"] == ours["bytes"]
    network.with_name(f"{network.name}.json").write_text('{"bytes": {}, "sha256": "of another"}')
    assert run(*again, out="foreign")["rows"][0]["bytes"] is None


def test_a_control_is_like_the_set(digits):
    """As many images, packed alike; the same labellers; logits of the teachers, or none and a
    warning."""
    images, net = torch.zeros(20, 3, 32, 32), get_network("MLP", 3, 10, (32, 32), 0).eval()
    stored = SyntheticSet(images, torch.arange(10).repeat_interleave(2), torch.zeros(80, 10))
    labelled = stored._replace(soft_labels=None, labellers=[{"model": "MLP", "state": {}}])

    def control(one, teachers):
        file = SynsetFile("set.pt", [one], {}, [], 2, False, [])
        source = Input("set.pt", "ROME", {}, synset=file)
        made = target_models.control_of(source, digits, teachers, 0)
        hard = one.soft_labels is not None and not teachers
        assert made.method == ("ROME-random-hard" if hard else "ROME-random")
        assert (made.control, made.synset.pack) == (True, 2)
        return made.synset.sets[0], source.warnings
    made, warnings = control(stored, [net])
    assert made.images.shape == images.shape and torch.equal(made.labels, stored.labels)
    assert torch.equal(made.soft_labels, net(unpack(made.images, 2))) and not warnings
    made, warnings = control(stored, [])
    assert made.soft_labels is None and "--control_labels" in warnings[0]
    made, warnings = control(labelled, [])
    assert made.labellers == labelled.labellers and not warnings
    uneven = stored._replace(images=images[:3], labels=torch.tensor([7, 0, 7]), soft_labels=None)
    made, _ = control(uneven, [])
    assert made.labels.tolist() == [7, 0, 7] and made.images.shape == (3, 3, 32, 32)
    assert made.images.flatten(1).norm(dim=1).min() > 1
    with pytest.raises(InputError, match="--no_control"):
        control(stored._replace(images=torch.zeros(400, 3, 32, 32), soft_labels=None,
                                labels=torch.arange(10).repeat_interleave(40)), [])


def network(path):
    net = get_network("MLP", 3, 10, (32, 32), 0)
    net.load_state_dict(torch.load(path, weights_only=True))
    return net.eval()


@pytest.fixture(scope="module")
def digits_set(digits, tmp_path_factory):
    """Ten real digits a class in the DC layout, as a distillation would leave them."""
    path = tmp_path_factory.mktemp("set") / "ROME_res_ROME_Digits_MLP_10ipc.pt"
    rng = torch.Generator().manual_seed(0)
    images = torch.cat([digits.sample_class(c, 10, rng) for c in range(10)])
    meta = {"dataset": "Digits", "packed": False, "threat_model": "published"}
    torch.save({"data": [[images, torch.arange(10).repeat_interleave(10)]], "accs_all_exps": {},
                "meta": meta}, path)
    return path


@pytest.fixture(scope="module")
def digits_networks(digits_set, tmp_path_factory):
    """Two networks trained on that set, under the names of BEARD."""
    folder = tmp_path_factory.mktemp("networks")
    images, labels = torch.load(digits_set, weights_only=True)["data"][0]
    for i, method in enumerate(("DC", "MTT")):
        net = get_network("MLP", 3, 10, (32, 32), seed=i)
        utils.train_on_set(net, images, labels, TrainConfig(40, 0.02, 64, "none"),
                           torch.Generator().manual_seed(i))
        torch.save(net.state_dict(), folder / f"{method}_MLP_Digits_10_None_0.8.pth")
    return sorted(folder.iterdir())


# ------------------------------------------------------------------------------------- end to end
def test_a_set_end_to_end(digits, digits_set, tmp_path, monkeypatch, run):
    """Trains, attacks under both threat models; every figure can be found again by hand."""
    monkeypatch.setattr(evaluate, "SLICE", 16)
    names, out = ("FGSM", "PGD", "PGD_L2", "CW", "Deepfool"), tmp_path / "out"
    content = run("--synset", digits_set, *SMALL, "--attacks", *names)
    rows = content["rows"]
    forms = [(name, form) for name in names for form in {False, ATTACKS[name].targetable}]
    forms += [(control, None) for control in CONTROLS]
    wanted = {(f"ROME_MLP_Digits_10_None_0-{i}.pth", threat, *form) for i in range(2)
              for threat in ("published", "pixel") for form in forms}
    keys = ("crafted_on", "threat_model", "attack", "targeted")
    assert {tuple(row[key] for key in keys) for row in rows} == wanted and len(rows) == len(wanted)

    images, labels = digits.get_batch("test", slice(40))
    for row in rows:
        assert row["evaluated_on"] == row["crafted_on"] and row["seconds"] > 0
        assert (row["dataset"], row["n"], row["ipc"], row["seed"]) == ("Digits", 40, 10, 0)
        threat = get_threat_model(row["threat_model"], digits)
        net = network(out / "networks" / row["crafted_on"])
        x_adv, passes = images, 0
        if row["attack"] == "Clamp-only":
            x_adv = threat.clamp_only(images)
        elif row["attack"] != "Clean":
            options = {"random_start": False} if row["attack"] == "PGD" else {}
            size = 64 if row["attack"] == "Deepfool" else 16  # the last bits depend on it
            x_adv = torch.cat([
                attack(net, x, y, threat, row["attack"], targeted=row["targeted"], **options)
                for x, y in zip(images.split(size), labels.split(size))])
            passes = {"FGSM": 1, "PGD": 10, "PGD_L2": 10}.get(row["attack"], row["forward"])
        # DeepFool leaves images on the boundary, where the size of a batch decides.
        tolerance = 0.15 if row["attack"] == "Deepfool" else 1e-9
        accuracy = utils.accuracy(net, x_adv, labels)
        assert row["accuracy"] == pytest.approx(accuracy, abs=tolerance), row
        assert row["forward"] == row["backward"] == passes
        eps = {"FGSM": 8 / 255, "PGD": 8 / 255, "PGD_L2": 128 / 255}.get(row["attack"])
        assert row["eps"] == eps
        if eps:
            assert 0 < row["max_l2" if row["attack"] == "PGD_L2" else "max_linf"] <= eps + 1e-6
    assert utils.accuracy(net, images, labels) > 0.6

    (metrics,) = [m for m in content["metrics"]
                  if (m["threat_model"], m["targeted"]) == ("pixel", True)]
    pixel = [r for r in rows if r["threat_model"] == "pixel"]
    clean = np.mean([r["accuracy"] for r in pixel if r["attack"] == "Clean"])
    attacked = [np.mean([r["accuracy"] for r in pixel if r["attack"] == name and r["targeted"]])
                for name in names[:4]]
    improved = 100 * (1 - (clean - np.mean(attacked)) * (clean - min(attacked)) / clean**2)
    assert metrics["I-RR"] == pytest.approx(improved)
    assert "missing: AA at ipc 10" in (out / "results.md").read_text()


def test_transfer_and_craft_on(digits_networks, digits, run):
    common = ["--networks", *digits_networks, "--transfer", *PIXEL, "--attacks", "FGSM"]
    content = run(*common, "PGD")
    cells = {(e["crafted_on"], e["evaluated_on"]) for e in content["transfer"]}
    assert cells == {(a, b) for a in ("DC", "MTT") for b in ("DC", "MTT")}
    rows = {(r["crafted_on"][:2], r["evaluated_on"][:2], r["attack"]): r["accuracy"]
            for r in content["rows"]}
    nets = [network(path) for path in digits_networks]
    images, labels = digits.get_batch("test", slice(30))
    threat = get_threat_model("pixel", digits)
    x_adv = attack(nets[0], images, labels, threat, "FGSM", targeted=False)
    assert rows["DC", "MT", "FGSM"] == pytest.approx(utils.accuracy(nets[1], x_adv, labels))

    content = run(*common, "--craft_on", "MTT", out="one")
    rows = [r for r in content["rows"] if r["attack"] == "FGSM"]
    assert {r["crafted_on"] for r in rows} == {digits_networks[1].name}
    assert {r["evaluated_on"] for r in rows} == {p.name for p in digits_networks}


def test_accuracy_against_eps(digits_networks, run):
    content = run("--networks", digits_networks[0], *PIXEL, "--attacks", "PGD", "CW",
                  "--eps", 0, 8, 32, 128)
    pgd = [r for r in content["rows"] if r["attack"] == "PGD"]
    curve = [r["accuracy"] for r in pgd]
    assert [255 * r["eps"] for r in pgd] == pytest.approx([0, 8, 32, 128])
    assert curve == sorted(curve, reverse=True) and curve[-1] < 0.05
    assert curve[0] == content["rows"][0]["accuracy"]
    assert [r["eps"] for r in content["rows"] if r["attack"] == "CW"] == [None]


def test_what_is_wrong_only_in_bf16_is_attacked_again(digits_networks, digits, monkeypatch):
    """In a bf16 in which all images look wrong nothing is attacked, so all are again, in fp32."""
    net, (x, labels) = network(digits_networks[0]), digits.get_batch("test", slice(40))

    def measured():
        return run_slice(
            Task("a.pth", "pixel", "FGSM", False, 2 / 255), 0, x, labels,
            [TargetModel("a.pth", "A", 1, "MLP", net)], get_threat_model("pixel", digits), 64, 0,
            {})

    def rough(net, x):
        if compilation.precision() == "bf16":
            return net(x) - 100 * torch.nn.functional.one_hot(labels, 10)
        return net(x)

    plain = measured()
    monkeypatch.setattr("attacks.forward", rough)
    monkeypatch.setattr(utils, "forward", rough)
    compilation.set_precision("bf16")
    try:
        found, wrong = measured(), utils.wrong_only_in_bf16(net, x, labels)
    finally:
        compilation.set_precision("fp32")
    correct = net(x).argmax(1) == labels
    assert torch.equal(wrong, correct)
    assert not utils.wrong_only_in_bf16(net, x, labels).any()
    assert found["right"] == plain["right"]
    assert 0 < unpack_bits(plain["right"]["a.pth"], 40).sum() < correct.sum()
    assert found["max_linf"] == plain["max_linf"] and found["forward"] > plain["forward"]


def test_packed_sets_are_unpacked(digits_set, tmp_path, monkeypatch, run):
    """As the meta or a flag says."""
    seen = []
    monkeypatch.setattr(utils, "train_on_set", lambda net, images, *rest, **options:
                        seen.append(images))
    data = torch.load(digits_set, weights_only=True)["data"]
    for name, meta, flags in (("ours", {"dataset": "Digits", "packed": True}, []),
                              ("theirs", {}, ["--packed"])):
        path = tmp_path / f"res_{name}_Digits_MLP_10ipc.pt"
        torch.save({"data": data, "meta": meta}, path)
        run("--synset", path, *SMALL, *flags, "--num_eval", 1, "--attacks", "FGSM", out=name)
    assert len(seen) == 2 and all(torch.equal(images, unpack(data[0][0])) for images in seen)


# -------------------------------------------------------------------------------- interrupted runs
def strip(rows):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def test_resume_repeats_nothing(digits_set, monkeypatch, run):
    """Interrupted at every third slice: the same rows, and no slice is computed twice."""
    monkeypatch.setattr(evaluate, "SLICE", 16)
    arguments = ["--synset", digits_set, *SMALL, "--threat_model", "pixel", "--attacks", "FGSM",
                 "PGD", "Square", "--queries", 10]
    undisturbed = run(*arguments)
    run_slice, computed = evaluate.run_slice, []

    def sometimes(task, number, *rest):
        result = run_slice(task, number, *rest)
        computed.append((task, number))
        if len(computed) % 3 == 0:
            computed[-1] = "lost"  # before it was saved: the only work that may be repeated
            raise KeyboardInterrupt
        return result
    monkeypatch.setattr(evaluate, "run_slice", sometimes)
    trained = call_before(monkeypatch.setattr, utils, "train_on_set", [], None)
    for _ in range(40):
        try:
            content = run(*arguments, "--resume", out="b")
            break
        except KeyboardInterrupt:
            pass
    assert strip(content["rows"]) == strip(undisturbed["rows"])
    done = [c for c in computed if c != "lost"]
    assert len(done) == len(set(done)) == 3 * len(content["rows"]) and len(trained) == 2
    assert content["unfinished"] == {}


def test_slices_are_kept_only_where_they_fit(digits_networks, tmp_path, monkeypatch, run):
    """Those of an interrupted attack, beside an attack that comes before it; not those of another
    size, and not those without the other networks of --transfer."""
    monkeypatch.setattr(evaluate, "SLICE", 10)
    run_slice, done, stop_at = evaluate.run_slice, [], ("PGD", 2)

    def disturbed(task, number, *rest):
        if (task.attack, number) == stop_at:
            raise KeyboardInterrupt
        done.append((task.attack, number))
        return run_slice(task, number, *rest)

    monkeypatch.setattr(evaluate, "run_slice", disturbed)
    flags = ["--networks", *digits_networks, *PIXEL, "--attacks", "FGSM", "PGD", "--resume"]
    with pytest.raises(KeyboardInterrupt):
        run(*flags[:-3], "PGD")
    stop_at = None
    for name, size, more, kept in (("same", 10, [], 2), ("size", 7, [], 0),
                                   ("transfer", 10, ["--transfer"], 0)):
        shutil.copytree(tmp_path / "out", tmp_path / name)
        monkeypatch.setattr(evaluate, "SLICE", size)
        done.clear()
        rows = run(*flags, *more, out=name)["rows"]
        assert done.count(("PGD", 0)) == (1 if kept else 2)
        assert len(done) == 4 * -(-30 // size) - kept
        assert {row["n"] for row in rows} == {30} and len(rows) == 4 + 4 * (1 + bool(more))


def test_existing_results_are_protected(digits_networks, tmp_path, run, refused):
    first, changed = digits_networks[0], tmp_path / digits_networks[0].name
    shutil.copyfile(first, changed)
    results, common = tmp_path / "out/results.json", ["--attacks", "FGSM", *PIXEL, "--networks"]
    again = [*common, changed, "--resume"]
    before = run(*common, changed)
    with lock(tmp_path / "out"):
        refused("another run is writing", *common, changed)
    refused("exists; go on with --resume", *common, changed)
    refused("--seed is 1, the run in .* has 0", *again, "--seed", 1)
    refused("--networks is", *common, digits_networks[1], "--resume")
    state = torch.load(changed, weights_only=True)
    state[next(iter(state))] += 1
    torch.save(state, changed)
    refused("is not that of", *again)
    assert json.loads(results.read_text())["rows"] == before["rows"]
    for key, value in (("rows", [{}]), ("flags", []), ("unfinished", None), ("versions", None),
                       (None, '{"rows": ['), (None, "[]")):
        results.write_text(json.dumps({**before, key: value}) if key else value)
        refused("results.json is damaged", *again)


def test_networks_of_another_set_or_training_are_not_taken_over(digits_set, tmp_path, run, refused):
    path = shutil.copyfile(digits_set, tmp_path / digits_set.name)
    flags = ["--synset", path, *SMALL, "--epoch_eval_train", 1, "--attacks", "FGSM"]
    run(*flags)
    content = torch.load(path, weights_only=True)
    content["data"][0][0] += 0.1
    torch.save(content, path)
    refused("was trained with another set_sha256 .*choose another --out", *flags, "--resume")
    shutil.copyfile(digits_set, path)
    (tmp_path / "out/results.json").unlink()
    refused("was trained with another seed .0, not 5", *flags, "--seed", 5)


def test_a_network_that_diverged_is_no_result(digits_set, tmp_path, run):
    with pytest.raises(FloatingPointError, match="after training on .*--lr_net 1e.30"):
        run("--synset", digits_set, *SMALL, "--lr_net", "1e30")
    assert not list((tmp_path / "out/networks").iterdir())


# ------------------------------------------------------------------------------ sanity, soft labels
class Masked(torch.nn.Module):
    """A network without gradients: its logits come in steps."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        logits = self.net(x)
        return logits.mul(4).round().div(4) + 0 * logits


@pytest.fixture
def quick_checks(monkeypatch):
    for name, value in (("QUERIES", 200), ("STEPS", 20), ("SURROGATE_IMAGES", 1000)):
        monkeypatch.setattr(sanity, name, value)


def test_sanity_report(digits_networks, digits, run, quick_checks):
    content = run("--networks", digits_networks[0], "--attacks", "FGSM", "--limit", 100,
                  "--threat_model", "pixel", "--untargeted")
    checks = content["sanity"][digits_networks[0].name]["pixel"]
    assert len(checks) == 5 and all(check["passed"] for check in checks.values()), checks
    surrogate = sanity.train_surrogate(digits, "MLP", 0)
    assert utils.accuracy(surrogate, *digits.get_batch("test", slice(None))) > 0.8
    threat = dataclasses.replace(get_threat_model("pixel", digits),
                                 eval_eps={"robust_acc": 24 / 255})
    net, test = Masked(network(digits_networks[0])), digits.get_batch("test", slice(100))
    checks = sanity.check_sanity("masked.pth", net.eval(), surrogate, threat, test, 0)
    assert not any(checks[key]["passed"] for key in ("large eps", "black box", "transfer")), checks
    warnings = warnings_of({"sanity": {"masked.pth": {"pixel": checks}}, "metrics": []})
    assert "large eps" in warnings[0]


def test_autoattack_must_not_be_weaker():
    def row(name, accuracy, eps=2, n=100):
        return {"crafted_on": "net", "evaluated_on": "net", "threat_model": "pixel", "n": n,
                "targeted": False, "attack": name, "eps": eps / 255, "accuracy": accuracy}

    rows = [row("PGD20", 0.30), row("AA", 0.28), row("PGD20", 0.20, 4), row("PGD", 0.05, n=50)]
    assert sanity.check_autoattack(rows, "net", "pixel")["passed"]
    wrong = sanity.check_autoattack([*rows, row("AA", 0.25, 4)], "net", "pixel")
    assert not wrong["passed"]
    assert "25.0% under AutoAttack, 20.0% under PGD at 4/255" in wrong["text"]
    assert sanity.check_autoattack(rows[:1], "net", "pixel") is None
    assert sanity.check_autoattack(rows, "other", "pixel") is None


def test_a_set_with_soft_labels(digits_set, tmp_path, run, refused, quick_checks):
    """A network with the set's labels and one with the classes, as the recipe says."""
    images, labels = torch.load(digits_set, weights_only=True)["data"][0]
    soft = torch.randn(100, 10, generator=torch.Generator().manual_seed(0))
    soft += 4 * torch.eye(10)[labels]
    meta = {"dataset": "Digits", "threat_model": "pixel",
            "recipe": {"epochs": 30, "lr_net": 0.02, "temperature": 2.0}}
    path, out = tmp_path / "res_ROME_Digits_MLP_10ipc.pt", tmp_path / "out"
    torch.save({"data": [[images, labels]], "soft_labels": [soft], "meta": meta}, path)
    flags = ["--synset", path, *("--model MLP --num_eval 1 --limit 20 --aa_limit 10 --threat_model "
                                 "pixel --attacks PGD20 AA --aa_iterations 5 --queries 20 "
                                 "--untargeted").split()]
    rows = run(*flags, "--no_sanity")["rows"]
    names = [f"ROME-pixel{kind}_MLP_Digits_10_None_0-0.pth" for kind in ("", "-hard")]
    wanted = [("Clean", None, 20), ("Clamp-only", None, 20), ("PGD20", 8 / 255, 20),
              *(("AA", eps / 255, 10) for eps in (2, 4, 8))]
    assert {(r["crafted_on"], r["attack"], r["eps"], r["n"]) for r in rows} == {
        (name, *key) for name in names for key in wanted}
    for name, target, kind in zip(names, (soft, labels), ("soft", "hard")):
        meta = json.loads((out / "networks" / f"{name}.json").read_text())
        assert (meta["epochs"], meta["temperature"], meta["batch_train"]) == (30, 2.0, 256)
        assert meta["labels"] == kind
        net = get_network("MLP", 3, 10, (32, 32), meta["seed_init"])
        utils.train_on_set(net, images, target, TrainConfig(30, 0.02, temperature=2.0),
                           torch.Generator().manual_seed(meta["seed_train"]))
        for key, value in network(out / "networks" / name).state_dict().items():
            assert torch.allclose(value, net.state_dict()[key], atol=1e-5)
    text = (out / "results.md").read_text()
    assert "| ROME-pixel | MLP | 10 | " in text.split("**Accuracy per attack")[0]
    assert "| constant classifier |" in text
    # With the sanity checks, of the labels asked for.
    more = run(*flags, "--labels", "own", "--resume")
    assert list(more["sanity"]) == names[:1] and more["rows"] == rows
    (out / "results.json").unlink()
    refused("trained with another temperature", *flags, "--no_sanity", "--label_temperature", 3)


# --------------------------------------------------------------------------------- wrong on purpose
@pytest.mark.parametrize("arguments, message", [
    ("", "nothing to attack"), ("--networks x --method a b", "2 name")])
def test_bad_flags(arguments, message, capsys):
    with pytest.raises(SystemExit):
        evaluate.parse_args(arguments.split())
    assert message in capsys.readouterr().err


def test_bad_files(digits_networks, digits_set, tmp_path, monkeypatch, refused):
    first, copy = digits_networks[0], tmp_path / "copy"
    copy.mkdir()
    for path, name in ((first, first.name), (digits_set, digits_set.name),
                       (first, "DC_MLP_Digits_10_PGD_0.7.pth")):
        shutil.copyfile(path, copy / name)
    for message, *arguments in (
            ("nowhere.pth does not exist", "--networks", copy / "nowhere.pth", "--dataset",
             "Digits"),
            ("is not of CIFAR10", "--networks", first, "--dataset", "CIFAR10"),
            ("expected|missing", "--networks", first, "--model", "ConvNetW32"),
            ("have the same name", "--networks", first, copy / first.name),
            ("would be pooled: .* --method", "--synset", digits_set, copy / digits_set.name),
            ("would be pooled", "--networks", first, copy / "DC_MLP_Digits_10_PGD_0.7.pth"),
            ("would be pooled", "--synset", digits_set, "--networks", first, "--method", "A", "A"),
            ("--craft_on IDM: the methods here are DC", "--networks", first, "--craft_on", "IDM")):
        refused(message, *arguments)
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    for flags in (["--attacks", "AA", "--no_sanity"], ["--attacks", "FGSM"]):
        refused("need the package pyautoattack", "--networks", first, *flags)
    assert not (tmp_path / "out").exists()
