"""The two ROME scripts as their users run them: commands, flags, mistakes, whole small runs."""
import contextlib
import json
import re
import shlex
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, run_in
from PIL import Image

import evaluate
import pretrain
import report
import ROME_cifar10
import ROME_cifar100
from datasets import DATASETS
from experiment import check_args
from runtime.command_line import run_script
from runtime.measures import percent
from runtime.safe_io import InputError

SMALL = """--dataset Digits --model ConvNetW32 --ipc 1 --batch_real 8 --trained_bs 16 --num_exp 1
    --model_train_steps 1 --num_eval 1 --epoch_eval_train 2 --test_limit 20 --select test
    --lr_img 0.2 --embed_last 1000 --net_generate_interval 2""".split()
NAME = "ROME_Digits_ConvNetW32_1ipc_pixel_seed0"
RESULT = "ROME_res_ROME_Digits_ConvNetW32_1ipc.pt"


# --------------------------------------------------------------------------- commands and flags
COMMANDS = [line.strip() for line in (ROOT / "command.txt").read_text().splitlines()
            if re.match(r"\s*python", line)]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: re.sub(r"\W+", "-", c)[-60:])
def test_commands_parse(command):
    words = shlex.split(command)
    name = next(word for word in words if word.endswith(".py"))
    modules = {"ROME_cifar10.py": ROME_cifar10, "ROME_cifar100.py": ROME_cifar100,
               "pretrain.py": pretrain, "evaluate.py": evaluate, "report.py": report}
    args = modules[name].parse_args(words[words.index(name) + 1:])
    if name.startswith("ROME"):
        assert args.aug == ("-unpacked" not in args.method) and args.lr_img == 0.2
        assert args.dataset.lower() in name


def test_the_verbatim_published_command():
    """SPEC 1.2: the IPC-50 CIFAR-10 command runs as it stands."""
    verbatim = (
        "python3 -u ROME_cifar10.py --dataset CIFAR10 --model ConvNet --ipc 50 --dsa_strategy "
        "color_crop_cutout_flip_scale_rotate --init real --lr_img 0.2 --num_exp 5 --num_eval 5 "
        "--net_train_real --eval_interval 500 --outer_loop 1 --mismatch_lambda 0 --net_decay "
        "--embed_last 1000 --syn_ce --ce_weight 0.1 --train_net_num 1 --aug")
    args = ROME_cifar10.parse_args(shlex.split(verbatim)[3:])
    assert verbatim in COMMANDS and (args.ce_weight, args.net_decay, args.pack) == (0.1, True, 2)


def test_defaults_of_the_specification():
    expected = dict(
        dataset="CIFAR10", model="ConvNet", ipc=50, eval_mode="S", num_exp=5, num_eval=1,
        epoch_eval_train=1000, Iteration=20000, lr_img=1.0, lr_net=0.01, batch_real=256,
        batch_train=256, trained_bs=256, init="real", data_path="./data", save_path="./result",
        dsa_strategy="color_crop_cutout_flip_scale_rotate", outer_loop=1, eval_interval=100,
        net_num=100, net_push_num=1, net_generate_interval=30, net_begin=0, net_end=100000,
        train_net_num=2, fetch_net_num=2, model_train_steps=10, embed_last=-1, syn_ce=True,
        ce_weight=1.0, optim="sgd", net_decay=False, aug=False, zca=False, align_weight=0.2,
        # the numbers that the published scripts have no flag for
        attack_eps=8.0, attack_steps=10, momentum_img=0.5, net_start=3, net_slice_min=10,
        ce_only_while_wrong=True, real_kept=2560)
    args = vars(ROME_cifar10.parse_args([]))
    assert {name: args[name] for name in expected} == expected
    c100 = ROME_cifar100.parse_args([])
    assert (c100.dataset, c100.num_eval, c100.ce_weight) == ("CIFAR100", 20, 0.1)
    assert not c100.syn_ce and not c100.ce_only_while_wrong and c100.real_kept == 0


def test_switches_and_old_names():
    parse = ROME_cifar10.parse_args
    assert not parse(["--no_syn_ce"]).syn_ce and parse(["--aug"]).pack == 2
    assert parse(["--pack", "4"]).aug and not parse(["--no_aug", "--no_net_decay"]).aug
    assert [parse(["--labels", x]).labels for x in ("hard", "stored", "prior")] == [
        "hard", "stored", "stored"]


@pytest.mark.parametrize("flags, message", [
    ("--model ConvNetBN", "ConvNetBN has BatchNorm.*choose one of MLP.*ConvNetGN.*--robust_prior"),
    ("--embed_last -12", "--embed_last -12 leaves none of the 12 layers of ConvNetW32"),
    ("--zca --robust_prior f", "no whitened images: leave out --zca"),
    ("--embed_last -11", None), ("--model ConvNetBN --robust_prior f", None)])
def test_what_the_pool_admits(digits, flags, message):
    args = ROME_cifar10.parse_args([*SMALL, *flags.split()])
    with pytest.raises(InputError, match=message) if message else contextlib.nullcontext():
        check_args(args, digits)


# --------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize("flags, says", [
    ("--dataset MNIST", "MNIST.*CIFAR10.*Digits"),
    ("--model Resnet", "Resnet.*ConvNetW32"),
    ("--init zeros", "zeros is no file, nor real or noise"),
    ("--dsa_strategy color_blur", "blur.*color, crop"),
    ("--ipc 0", "--ipc: 0 is not a number of at least 1"),
    ("--lr_img nan", "--lr_img: nan"),
    ("--align_weight 1.5", "1.5 is not between 0 and 1"),
    ("--ipcs 5", "--ipcs"),
    ("--ipc 500", "--ipc 500 takes 500 real images of each class; class 0 has 14"),
    ("--ipc 40 --aug", "--ipc 40 with 2x2 packing takes 160"),
    ("--pack 3", "--pack.*3.*2, 4, 8"),
    ("--ipc 1 --labels stored --Iteration 0", "stored: no network to give .*--robust_prior"),
    ("--test_limit 361", "361.*360 test images"),
    ("--dataset CIFAR10 --data_path damaged", "damaged/cifar10.npz is damaged"),
    ("--save_path a_file/result", "Not a directory: 'a_file/result'"),
    pytest.param("--device cuda", "--device cuda.*auto.*cpu", marks=pytest.mark.skipif(
        torch.cuda.is_available(), reason="CUDA is here")),
])
def test_bad_input_is_one_line_and_leaves_nothing(capsys, monkeypatch, tmp_path, flags, says):
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "cifar10.npz").write_bytes(b"PK\x03\x04 and no more")
    (tmp_path / "a_file").write_text("")
    flags = ["--dataset", "Digits", "--model", "ConvNetW32", *flags.split()]
    with pytest.raises(SystemExit) as stop:
        run_script(lambda: run_in(monkeypatch, ROME_cifar10, tmp_path, *flags))
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code != 0 and re.search(says, line), line
    left = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert left == {"damaged/cifar10.npz", "a_file"}


# ---------------------------------------------------------------------------- whole small runs
def run(monkeypatch, folder, flags):
    """ROME_cifar10.py in this process; the content of the file of its sets."""
    run_in(monkeypatch, ROME_cifar10, folder, *SMALL, *flags.split())
    return torch.load(folder / "result" / RESULT, weights_only=True)


def finals(folder):
    """{set: line} of the final figures in metrics.jsonl."""
    lines = (folder / "result" / NAME / "metrics.jsonl").read_text().splitlines()
    lines = [json.loads(line) for line in lines]
    assert {line["iteration"] for line in lines if line["event"] == "iteration"} == {0}
    return {line["set"]: line for line in lines if line["event"] == "final"}


def test_digits_run_leaves_what_is_promised(tmp_path, monkeypatch, capsys):
    file = run(monkeypatch, tmp_path, "--aug --Iteration 3 --eval_interval 2 --num_exp 2 "
               "--threat_model pixel")
    out, folder = capsys.readouterr().out, tmp_path / "result" / NAME
    grids = ["best_exp0", "best_exp1"]
    grids += [f"syn_exp{exp}_it0000{it}" for exp in (0, 1) for it in (2, 3)]
    assert {p.name for p in folder.iterdir()} == {
        "flags.json", "metrics.jsonl", "log.txt", RESULT,
        *(f"{grid}{kind}.png" for grid in grids for kind in ("", "_unpacked"))}
    about = json.loads((folder / "flags.json").read_text())
    assert about["flags"]["ipc"] == 1 and about["command"].endswith("--threat_model pixel")

    (first, labels), (second, _) = file["data"]
    assert first.shape == (10, 3, 32, 32) and labels.tolist() == list(range(10))
    assert not torch.equal(first, second)
    expected = {"packed": True, "zca": False, "threat_model": "pixel", "seed": 0,
                "mean": list(DATASETS["Digits"]["mean"])}
    assert expected.items() <= {**file["meta"]}.items()
    assert file["meta"]["flags"]["Iteration"] == 3 and file["meta"]["versions"]["torch"]
    for exp in (0, 1):
        path = tmp_path / "checkpoints" / NAME / f"best_exp{exp}.pt"
        best = torch.load(path, weights_only=True)
        assert torch.equal(best["data"][0][0], file["data"][exp][0])
        assert best["meta"]["iteration"] in (2, 3)

    final, accs = finals(tmp_path), file["accs_all_exps"]["ConvNetW32"]
    assert list(final) == ["constant classifier", "random real", "random real, 2x2 packed", "ROME"]
    assert final["constant classifier"]["robust_2_acc"] == [0.1]
    assert accs == final["ROME"]["robust_acc"] and len(accs) == 2
    assert percent(accs).strip() in out and out.strip() in (folder / "log.txt").read_text()


def test_a_run_whose_set_stores_labels(tmp_path, monkeypatch):
    """The pool's labels, 4x4 packed: the file, what was trained on, the rows of the table."""
    file = run(monkeypatch, tmp_path, "--pack 4 --Iteration 2 --threat_model pixel --labels stored "
               "--label_temperature 2 --lr_schedule cosine")
    (soft,), recipe = file["soft_labels"], file["meta"]["recipe"]
    assert soft.shape == (160, 10) and soft.std() > 0
    assert file["data"][0][0].shape == (10, 3, 32, 32)
    assert (recipe["pack"], recipe["temperature"], recipe["lr_schedule"]) == (4, 2.0, "cosine")
    (teachers,) = recipe["teachers"]  # three at the start, one pushed
    assert len(teachers) == len({teacher["sha256"] for teacher in teachers}) == 4
    assert list(finals(tmp_path)) == [
        "constant classifier", "random real", "random real, 4x4 packed",
        "random real, stored labels", "random real, 4x4 packed, stored labels",
        "ROME, hard labels", "ROME"]
    assert Image.open(tmp_path / "result" / NAME / "best_exp0_unpacked.png").size[0] >= 960


def test_same_seed_same_bits_in_another_process(tmp_path, monkeypatch):
    flags = "--Iteration 3 --no_baseline"
    files = [run(monkeypatch, tmp_path / "a", flags),
             run(monkeypatch, tmp_path / "b", f"{flags} --seed 1")]
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
    subprocess.run([sys.executable, ROOT / "ROME_cifar10.py", *SMALL, *flags.split()],
                   cwd=tmp_path, check=True)
    files.append(torch.load(tmp_path / "result" / RESULT, weights_only=True))
    images = [file["data"][0][0] for file in files]
    assert torch.equal(images[0], images[2]) and not torch.equal(images[0], images[1])
    assert files[0]["accs_all_exps"] == files[2]["accs_all_exps"]


def test_cifar_like_run(tmp_path, monkeypatch, capsys, cifar_like):
    """A batch larger than the class, noise, Adam, several networks."""
    run_in(monkeypatch, ROME_cifar10, tmp_path, *SMALL, "--data_path", cifar_like, *(
        "--dataset CIFAR10 --batch_real 64 --Iteration 1 --eval_mode A --init noise --optim adam "
        "--no_baseline --test_limit 5 --lr_img 0.01 --epoch_eval_train 1").split())
    out = capsys.readouterr().out
    assert "--batch_real 64 is more than 10 of the classes have" in out
    for model in ("ConvNetAS", "ConvNetAR", "ConvNetAL", "ConvNetASwish"):
        assert f"ROME                     {model}" in out
