"""Several processes, started by torchrun, compute what one process computes; what ends them, and
what they resume from. In float64, so that a rounding error does not turn a gradient's sign."""
import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
from types import SimpleNamespace

import processes
import pytest
import torch

import ROME_cifar10
from experiment import check_args
from runtime import distributed
from runtime.checkpoint import SIGNALS, Interrupted, SignalHandler
from runtime.safe_io import InputError

NAME = "ROME_CIFAR10_MLP_1ipc_pixel_seed0"
RESULT = "result/ROME_res_ROME_CIFAR10_MLP_1ipc.pt"
NETWORKS = [f"checkpoints/full_MLP_CIFAR10_20_PGD-pixel_seed0-{k}.pth" for k in range(2)]
# Evaluations before iteration 3 and after the last one; a state is saved before iteration 5.
ROME = """--model MLP --ipc 1 --aug --threat_model pixel --batch_real 7 --trained_bs 17
    --model_train_steps 1 --num_exp 2 --num_eval 2 --epoch_eval_train 2 --test_limit 20 --lr_img 0.2
    --net_decay --embed_last 1000 --net_generate_interval 2 --net_num 5 --Iteration 6
    --eval_interval 3 --labels prior --no_compile --no_baseline --save_interval 5""".split()
PRETRAIN = """pretrain.py --model MLP --threat_model pixel --epochs 2 --attack_steps 2
    --batch_train 64 --test_limit 20 --aa_limit 0 --no_compile --num_nets 2""".split()
EVALUATE = """evaluate.py --epoch_eval_train 5 --num_eval 1 --limit 20 --attacks PGD CW
    --threat_model pixel --untargeted --no_compile --out out""".split()


def run_here(folder, *scripts):
    """Run scripts in this process, in `folder`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", [])
        for small in processes.SMALL:
            patch.setattr(*small)
        try:
            for script in scripts:
                processes.run(*script)
        finally:
            torch.set_default_dtype(torch.float32)


def torchrun(folder, count, scripts, starts=({},)):
    """Run scripts in `count` processes, started again as often as `starts` says."""
    plan = json.dumps({"scripts": scripts, "starts": starts}, default=str)
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
               str(count), "--max-restarts", str(len(starts) - 1), processes.__file__, plan]
    process = subprocess.Popen(program, cwd=folder, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        out, err = process.communicate(timeout=300)
    finally:
        process.terminate()  # torchrun then ends the processes
        process.wait(timeout=60)
    return process.returncode, out, err


def script_lines(err):
    return [line for line in err.splitlines() if line.startswith("ROME_cifar10.py: ")]


def load(*path):
    return torch.load(os.path.join(*path), weights_only=True)


def load_json(folder, name):
    return json.loads((folder / name).read_text())


def assert_same_run(folder, other, bits=False):
    """The same sets, within the rounding of sums, and the same rows of every evaluation."""
    ours, theirs = load(folder, RESULT), load(other, RESULT)
    for file in (ours, theirs):
        file["tensors"] = [images for images, _ in file["data"]] + file["soft_labels"]
    for a, b in zip(ours["tensors"], theirs["tensors"], strict=True):
        assert torch.equal(a, b) if bits else torch.allclose(a, b, atol=1e-5)
    assert ours["accs_all_exps"] == theirs["accs_all_exps"]
    for a, b in zip(metrics(folder), metrics(other), strict=True):
        assert a == (pytest.approx(b) if a["event"] == "iteration" else b)


def metrics(folder):
    text = (folder / "result" / NAME / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    return [{key: value for key, value in line.items() if not re.match("seconds|loss", key)}
            for line in lines]


@pytest.fixture(scope="module")
def data(cifar_like):
    return ["--dataset", "CIFAR10", "--data_path", cifar_like]


@pytest.fixture(scope="module")
def one(tmp_path_factory, data):
    """The files of one process, without torchrun."""
    folder = tmp_path_factory.mktemp("one")
    run_here(folder, ["ROME_cifar10.py", *ROME, *data], [*PRETRAIN, *data],
             [*EVALUATE, *data[2:], "--synset", RESULT])
    assert distributed.dist is None  # torch.distributed is not used
    return folder


# ----------------------------------------------------------------------------------- whole scripts
def test_wrong_flags_a_stop_a_kill_and_restarts(one, tmp_path, data):
    """Two processes, started four times: with different flags; one is stopped in an evaluation;
    one is killed in an iteration; to the end. Sets, rows and the pool are those of one process."""
    starts = [{"more": ["--lr_img", "0.3"]},
              {"1": ["runtime.distributed.map_dynamic", 1, "stop"],
               "0": ["utils.train_on_set", 1, "wait"]},
              {"1": ["runtime.distributed.class_means", 6, "kill"]}, {}]
    status, out, err = torchrun(tmp_path, 2, [["ROME_cifar10.py", *ROME, *data]], starts)
    assert status == 0, err
    lines = script_lines(err)
    for message in ("--lr_img differs between the processes", "stopped by SIGTERM"):
        assert any(message in line for line in lines)
    assert sum("another process is gone" in line for line in lines) == 1
    assert out.count("going on with") == 2 and out.count("\nset: ") == 1
    assert_same_run(tmp_path, one)
    ours, theirs = (load(folder, "checkpoints", NAME, "kept.pt")["experiment"]
                    for folder in (tmp_path, one))
    assert ours["it"] == theirs["it"] == 5
    assert torch.allclose(ours["image_syn"], theirs["image_syn"], atol=1e-5)
    for a, b in zip(ours["pool"]["members"], theirs["pool"]["members"], strict=True):
        assert (a["seen"], a["correct"]) == (b["seen"], b["correct"])
        for key, value in b["net"].items():
            assert value.dtype == torch.float64
            assert torch.allclose(a["net"][key], value, atol=1e-5), key
    assert sum(member["seen"] for member in ours["pool"]["members"])


def test_all_scripts_and_a_stop_of_all(one, tmp_path, data):
    """Networks, tasks and experiments in a dynamic queue have the bits of one process; a run that
    torchrun stops is resumed by one process."""
    rome_flags, elsewhere = [*ROME, *data], tmp_path / "experiments"
    scripts = [[*PRETRAIN, *data], [*EVALUATE, *data[2:], "--synset", one / RESULT],
               ["ROME_cifar100.py", *rome_flags, "--syn_ce", "--ce_weight", 1, "--parallel",
                "experiments", "--save_path", elsewhere / "result", "--checkpoint_path",
                elsewhere / "checkpoints"],
               ["ROME_cifar10.py", *rome_flags]]
    stop = {"1": ["runtime.distributed.class_means", 7, "stop all"]}
    status, out, err = torchrun(tmp_path, 2, scripts, [stop])
    (line,) = script_lines(err)
    assert status != 0 and "stopped by SIGTERM" in line
    state = load(tmp_path, "checkpoints", NAME, "state.pt")
    assert state["experiment"]["it"] == 4
    assert not re.search("world|process|rank",
                         " ".join(map(str, [*state, *state["flags"], *state["versions"]])))
    for name in NETWORKS:
        assert (tmp_path / name).read_bytes() == (one / name).read_bytes()
        ours, theirs = (load_json(folder, f"{name}.json") for folder in (tmp_path, one))
        for key in ("clean_acc", "robust_acc", "n"):
            assert ours[key] == theirs[key]
    ours, theirs = (load_json(folder, "out/results.json") for folder in (tmp_path, one))
    for row in ours["rows"] + theirs["rows"]:
        del row["seconds"]
    assert ours["rows"] == theirs["rows"] and len(ours["rows"]) == 4 * 4
    assert ours["sanity"] == theirs["sanity"] and len(ours["sanity"]) == 4
    assert out.count("**Accuracy per attack") == 1

    assert_same_run(elsewhere, one, bits=True)
    files = {path.name for path in (elsewhere / "result" / NAME).iterdir()}
    assert files == {"flags.json", "log.txt", "metrics.jsonl", os.path.basename(RESULT)}
    run_here(tmp_path, ["ROME_cifar10.py", *rome_flags])
    assert_same_run(tmp_path, one)


@pytest.mark.slow
def test_the_cifar100_script_on_digits(tmp_path):
    """Three processes; classes alone, unpacked, clean real images, several class groups, Adam."""
    flags = ["ROME_cifar100.py", *(flag for flag in ROME if flag != "--aug"), *(
        "--dataset Digits --labels hard --no_attack_prior --optim adam --lr_img 0.01 --num_exp 1 "
        "--num_eval 3").split()]
    for folder in ("one", "three"):
        (tmp_path / folder).mkdir()
    run_here(tmp_path / "one", flags)
    assert torchrun(tmp_path / "three", 3, [flags])[0] == 0
    name = RESULT.replace("CIFAR10", "Digits")
    ours, theirs = (load(tmp_path, folder, name) for folder in ("three", "one"))
    assert torch.allclose(ours["data"][0][0], theirs["data"][0][0], atol=1e-5)
    assert ours["accs_all_exps"] == theirs["accs_all_exps"]


# -------------------------------------------------------------------------------------- the pieces
def as_one_of(monkeypatch, rank, size, store=None):
    world = SimpleNamespace(rank=rank, size=size, store=store)
    monkeypatch.setattr(distributed, "_world", world)


@pytest.mark.parametrize("flags, message", [
    (["--trained_bs", "2"], "3 processes share 2 .*--trained_bs.; start at most 2"),
    (["--batch_real", "1"], None),
    (["--parallel", "experiments"], "3 processes share 2 experiments .--num_exp."),
    (["--parallel", "experiments", "--num_exp", "3", "--trained_bs", "2"], None)])
def test_more_processes_than_work(monkeypatch, digits, flags, message):
    as_one_of(monkeypatch, 1, 3)
    args = ROME_cifar10.parse_args([*ROME, "--dataset", "Digits", *flags])
    with pytest.raises(InputError, match=message) if message else contextlib.nullcontext():
        check_args(args, digits)


@pytest.mark.parametrize("name, local, gpus, device", [
    ("auto", 1, 0, "cpu"), ("cpu", 1, 8, "cpu"), ("auto", 1, 2, "cuda:1"), ("cuda", 0, 2, "cuda:0"),
    ("auto", 2, 2, None), ("cuda", 2, 0, None), ("cuda:0", 1, 2, None)])
def test_the_device_of_a_process(monkeypatch, name, local, gpus, device):
    monkeypatch.setattr(distributed, "count_gpus", lambda: gpus)
    monkeypatch.setenv("LOCAL_RANK", str(local))
    if device:
        assert distributed._own_device(name) == device
        return
    with pytest.raises(InputError, match=f"--device {name}: .* there are {gpus}"):
        distributed._own_device(name)


@pytest.mark.parametrize("number", [0, 1])  # one map after another
def test_the_dynamic_queue(monkeypatch, number):
    """The other process takes the second item and is done with it only after our third one."""
    store = torch.distributed.HashStore()
    as_one_of(monkeypatch, 0, 2, store)
    monkeypatch.setattr(distributed, "_maps", itertools.count())
    for _ in range(number):
        distributed.map_dynamic(3, lambda k: "earlier")
    worked, collected = [], []

    def work(k):
        worked.append(k)
        if k == 0:
            assert store.add(f"map{number}/next", 1) == 2
        if k == 2:
            assert collected == [(0, "0")]
            store.set(f"map{number}/1", '"other"')
        return str(k)
    results = distributed.map_dynamic(4, work, lambda *pair: collected.append(pair))
    assert worked == [0, 2, 3] and results == ["0", "other", "2", "3"]
    assert collected == list(enumerate(results))


def test_a_signal_ends_the_waiting_for_others(monkeypatch):
    """Under torchrun, where signals are ignored from the first one on."""
    as_one_of(monkeypatch, 0, 2, store := torch.distributed.HashStore())
    monkeypatch.setattr(distributed, "launched_by_torchrun", lambda: True)
    monkeypatch.setattr(distributed, "_maps", itertools.count())
    monkeypatch.setattr(distributed.time, "sleep", lambda _: os.kill(os.getpid(), signal.SIGTERM))
    store.add("map0/next", 1)  # taken by the other process, which never answers
    before = {signum: signal.getsignal(signum) for signum in SIGNALS}
    signals = SignalHandler(lambda text: None)
    try:
        with pytest.raises(Interrupted), signals.delay_signals(), signals.allow_signals():
            distributed.map_dynamic(1, None)
        os.kill(os.getpid(), signal.SIGTERM)  # of torchrun, while the state is saved: ignored
        signals.restore()
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
