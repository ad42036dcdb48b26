"""Several processes, started by torchrun: what they compute is what one process computes; what ends them, and what they go on
from. All runs are real ones, in float64, so that a rounding error does not turn the sign of a gradient."""
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

import pretrain
import ROME_cifar10 as rome
import utils
from runtime import distributed
from runtime.command_line import run_script
from runtime.safe_io import InputError
from runtime.checkpoint import Interrupted, SignalHandler

DRIVER = ROOT / "tests" / "processes.py"
NAME, RESULT = "ROME_CIFAR10_MLP_1ipc_pixel_seed0", "ROME_res_ROME_CIFAR10_MLP_1ipc.pt"
# An evaluation before iteration 3 and after the last one; a state is saved before iteration 5.
ROME = ["--dataset", "CIFAR10", "--model", "MLP", "--ipc", "1", "--aug", "--threat_model", "pixel", "--batch_real", "7",
        "--trained_bs", "17", "--model_train_steps", "1", "--num_exp", "2", "--num_eval", "2", "--epoch_eval_train", "2",
        "--test_limit", "20", "--lr_img", "0.2", "--net_decay", "--embed_last", "1000", "--net_generate_interval", "2",
        "--net_num", "5", "--Iteration", "6", "--eval_interval", "3", "--labels", "prior", "--no_compile", "--no_baseline"]
PLAIN, TORCHRUN = [sys.executable], [sys.executable, "-m", "torch.distributed.run"]


def start(folder, count, script, *flags, launcher=("--standalone",), **environment):
    """A script as a process, or under torchrun with `count` of them."""
    folder.mkdir(exist_ok=True)
    program = PLAIN if count is None else [*TORCHRUN, "--nproc_per_node", str(count), *launcher]
    return subprocess.Popen([*program, DRIVER, script, *map(str, flags)], cwd=folder, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1", **environment})


def run(folder, count, script, *flags, status=0, **options):
    """Returns (standard output, standard error) of a run that ends with that status."""
    process = start(folder, count, script, *flags, **options)
    try:
        out, err = process.communicate(timeout=150)
    finally:
        process.terminate()  # torchrun then ends the processes
        process.wait(timeout=60)
    assert process.returncode == status, err
    return out, err


def said_by(script, err):
    """The lines that the script itself has left on standard error."""
    return [line for line in err.splitlines() if line.startswith(f"{script}: ")]


def sets_of(folder):
    file = torch.load(folder / "result" / RESULT, weights_only=True)
    return [images for images, _ in file["data"]] + file["soft_labels"], file["accs_all_exps"]


def assert_same_run(folder, other, bits=False):
    """The same sets, within the rounding of sums, and the same rows of every evaluation."""
    (ours, accs), (theirs, other_accs) = sets_of(folder), sets_of(other)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b) if bits else torch.allclose(a, b, atol=1e-5)
    assert accs == other_accs
    lines = [[{k: v for k, v in json.loads(line).items() if k != "seconds" and not k.startswith("loss")}
              for line in (f / "result" / NAME / "metrics.jsonl").read_text().splitlines()] for f in (folder, other)]
    for a, b in zip(*lines, strict=True):
        assert a == (pytest.approx(b) if a["event"] == "iteration" else b)


@pytest.fixture(scope="module")
def data(cifar_like):
    return ["--data_path", str(cifar_like)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, data):
    """One process, without torchrun; its states stay."""
    folder = tmp_path_factory.mktemp("one")
    run(folder, None, "ROME_cifar10.py", *ROME, *data, "--save_interval", 5, KEEP="1")
    return folder


# --------------------------------------------------------------------------------------------------------- the ROME scripts
def test_one_process_under_torchrun_has_the_bits_of_a_plain_run(undisturbed, tmp_path, data):
    run(tmp_path, 1, "ROME_cifar10.py", *ROME, *data, "--save_interval", 5)
    assert_same_run(tmp_path, undisturbed, bits=True)
    for path in ("result/" + RESULT, f"checkpoints/{NAME}/best_exp0.pt", f"checkpoints/{NAME}/best_exp1.pt"):
        assert (tmp_path / path).read_bytes() == (undisturbed / path).read_bytes(), path


def test_killed_then_stopped_and_started_again_by_torchrun(undisturbed, tmp_path, data):
    """SIGKILL to one of two: the other says in one line what happened, and nobody waits. Three go on; all stop when one is
    told to; torchrun starts them again. Images, labels, rows and the pool are those of one process."""
    flags, began = ["ROME_cifar10.py", *ROME, *data, "--save_interval", 5], time.monotonic()
    _, err = run(tmp_path, 2, *flags, AT="1:pool_step:6", status=1)
    (line,) = said_by("ROME_cifar10.py", err)
    assert "another process of the run is gone" in line and "the same command goes on" in line
    assert time.monotonic() - began < 60
    out, err = run(tmp_path, 3, *flags, launcher=["--standalone", "--max-restarts", "1"], KEEP="1", AT="2:training_set:2",
                   SIGNAL=str(int(signal.SIGTERM)))
    (line,) = said_by("ROME_cifar10.py", err)
    assert "stopped by SIGTERM; the same command goes on from here" in line
    assert out.count("going on with") == 2 and out.count("\nset: ") == 1
    assert_same_run(tmp_path, undisturbed)
    ours, theirs = (torch.load(folder / "checkpoints" / NAME / "state.previous.pt", weights_only=True)["experiment"]
                    for folder in (tmp_path, undisturbed))
    assert ours["it"] == theirs["it"] == 5 and torch.allclose(ours["image_syn"], theirs["image_syn"], atol=1e-5)
    for a, b in zip(ours["pool"]["members"], theirs["pool"]["members"], strict=True):
        assert (a["seen"], a["correct"]) == (b["seen"], b["correct"])
        for key, value in b["net"].items():
            assert value.dtype == torch.float64 and torch.allclose(a["net"][key], value, atol=1e-5), key
    assert sum(member["seen"] for member in ours["pool"]["members"])
    state = torch.load(tmp_path / "checkpoints" / NAME / "state.pt", weights_only=True)
    assert not re.search("world|process|rank", " ".join(map(str, [*state, *state["flags"], *state["versions"]])))


def test_torchruns_signal_does_not_take_the_last_line(monkeypatch, capsys):
    """Another process has died; while this one leaves, torchrun tells it to stop as well."""
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(sys, "argv", ["ROME_cifar10.py"])
    monkeypatch.setattr(distributed, "launched_by_torchrun", lambda: True)
    monkeypatch.setattr(distributed, "shutdown", lambda whole: os.kill(os.getpid(), signal.SIGTERM))

    def broken():
        raise ConnectionError("another process of the run is gone")
    try:
        with pytest.raises(SystemExit) as stop:
            run_script(broken)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert stop.value.code == 1
    assert capsys.readouterr().err == "ROME_cifar10.py: error: another process of the run is gone\n"


def test_experiments_are_dealt_out(undisturbed, tmp_path, data):
    """Each has its own states: stopped under two processes, it goes on under one, with the bits of a plain run; which was
    one of the other script: with these flags the two do the same."""
    flags = ["ROME_cifar100.py", *ROME, *data, "--syn_ce", "--ce_weight", 1, "--parallel", "experiments"]
    _, err = run(tmp_path, 2, *flags, AT="1:outer_iteration:4", SIGNAL=str(int(signal.SIGTERM)), status=1)
    (line,) = said_by("ROME_cifar100.py", err)
    assert "stopped by SIGTERM; the same command goes on from here" in line
    states = [tmp_path / "checkpoints" / NAME / f"exp{k}" / "state.pt" for k in range(2)]
    assert {torch.load(path, weights_only=True)["experiment"]["it"] for path in states} & {4}
    out, _ = run(tmp_path, None, *flags)
    assert "at experiment 0" in out and "at experiment 1" in out
    assert_same_run(tmp_path, undisturbed, bits=True)
    assert {p.name for p in (tmp_path / "result" / NAME).iterdir()} == {"flags.json", "log.txt", "metrics.jsonl", RESULT}
    assert {p.name for p in (tmp_path / "checkpoints" / NAME).iterdir()} == {".lock", "state.pt", "finished", "best_exp0.pt",
                                                                            "best_exp1.pt"}


@pytest.mark.slow
def test_the_cifar100_script_on_digits(tmp_path):
    """Other flags: classes alone, unpacked, clean real images in the prior, several groups of classes, Adam."""
    unpacked = [flag for flag in ROME if flag != "--aug"]
    flags = ["ROME_cifar100.py", *unpacked, "--dataset", "Digits", "--labels", "hard", "--no_attack_prior", "--optim", "adam",
             "--lr_img", "0.01", "--num_exp", "1", "--num_eval", "3", "--Iteration", "5", "--eval_interval", "5"]
    for folder, count in (("a", None), ("b", 2)):
        run(tmp_path / folder, count, *flags)
    name = RESULT.replace("CIFAR10", "Digits")
    a, b = (torch.load(tmp_path / folder / "result" / name, weights_only=True) for folder in "ab")
    assert torch.allclose(a["data"][0][0], b["data"][0][0], atol=1e-5) and a["accs_all_exps"] == b["accs_all_exps"]


@pytest.mark.slow
def test_the_other_scripts_on_digits(tmp_path):
    """Three processes against one: a network of pretrain.py, a set distilled with it, and its evaluation."""
    digits = ["--dataset", "Digits", "--model", "MLP", "--threat_model", "pixel", "--no_compile"]
    network, synset = "checkpoints/full_MLP_Digits_142_PGD-pixel_seed0-0.pth", "result/ROME_res_ROME_Digits_MLP_1ipc.pt"
    for folder, count in (("one", None), ("three", 3)):
        folder = tmp_path / folder
        run(folder, count, "pretrain.py", *digits, "--epochs", 1, "--attack_steps", 2, "--batch_train", 64, "--test_limit", 20,
            "--aa_limit", 0)
        run(folder, count, "ROME_cifar10.py", *ROME, "--dataset", "Digits", "--robust_prior", network, "--num_exp", 1)
        run(folder, count, "evaluate.py", "--synset", synset, "--epoch_eval_train", 2, "--num_eval", 2, "--limit", 20,
            "--attacks", "PGD", "--threat_model", "pixel", "--untargeted", "--no_compile", "--no_sanity", "--out", "out",
            DTYPE="float32")
    networks, sets = ([torch.load(tmp_path / folder / name, weights_only=True) for folder in ("one", "three")]
                      for name in (network, synset))
    assert all(torch.allclose(networks[0][key], networks[1][key], atol=1e-5) for key in networks[0])
    assert torch.allclose(sets[0]["data"][0][0], sets[1]["data"][0][0], atol=1e-5)
    rows = [[row["accuracy"] for row in json.loads((tmp_path / folder / "out" / "results.json").read_text())["rows"]]
            for folder in ("one", "three")]
    assert rows[0] == rows[1] and len(rows[0]) == 4 * 3  # own and hard labels, two networks each; two controls and PGD


# -------------------------------------------------------------------------------------------------- pretrain.py, evaluate.py
def test_pretrain(tmp_path, data):
    """Two processes: one network each, bit for bit; or one network together, stopped and gone on with by one."""
    flags = ["pretrain.py", "--dataset", "CIFAR10", *data, "--model", "MLP", "--threat_model", "pixel", "--epochs", 2,
             "--attack_steps", 2, "--batch_train", 64, "--test_limit", 20, "--aa_limit", 0, "--no_compile"]
    run(tmp_path / "one", None, *flags, "--num_nets", 2)
    run(tmp_path / "dealt", 2, *flags, "--num_nets", 2)
    run(tmp_path / "shared", 2, *flags, AT="1:attack:6", SIGNAL=str(int(signal.SIGTERM)), status=1)
    out, _ = run(tmp_path / "shared", None, *flags)
    assert "going on with network 0 at step 6" in out
    for k, folder, bits in ((0, "dealt", True), (1, "dealt", True), (0, "shared", False)):
        name = f"full_MLP_CIFAR10_20_PGD-pixel_seed0-{k}.pth"
        ours, theirs = (torch.load(tmp_path / f / "checkpoints" / name, weights_only=True) for f in (folder, "one"))
        for key, value in theirs.items():
            assert torch.equal(ours[key], value) if bits else torch.allclose(ours[key], value, atol=1e-5)
        ours, theirs = (json.loads((tmp_path / f / "checkpoints" / f"{name}.json").read_text()) for f in (folder, "one"))
        assert [ours[key] for key in ("clean_acc", "robust_acc", "n")] == [theirs[key] for key in
                                                                           ("clean_acc", "robust_acc", "n")]


def test_evaluate(undisturbed, tmp_path, data):
    """Networks, slices and sanity checks are dealt out: the rows are those of one process."""
    flags = ["evaluate.py", "--synset", undisturbed / "result" / RESULT, *data, "--epoch_eval_train", 5, "--num_eval", 1,
             "--limit", 20, "--attacks", "PGD", "CW", "--threat_model", "pixel", "--untargeted", "--no_compile"]
    run(tmp_path, None, *flags, "--out", "one", DTYPE="float32")
    out, _ = run(tmp_path, 2, *flags, "--out", "two", DTYPE="float32")
    one, two = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two"))
    rows = [[{k: v for k, v in row.items() if k != "seconds"} for row in content["rows"]] for content in (one, two)]
    assert rows[0] == rows[1] and len(rows[0]) == 4 * 4 and one["sanity"] == two["sanity"] and len(one["sanity"]) == 4
    assert out.count("## Threat model pixel") == 1


# ---------------------------------------------------------------------------------------------------------- wrong on purpose
def test_flags_that_differ_between_processes(tmp_path, data):
    _, err = run(tmp_path, 2, "ROME_cifar10.py", *ROME, *data, MORE="--lr_img 0.3", status=1)
    lines = said_by("ROME_cifar10.py", err)
    assert lines and set(lines) == {"ROME_cifar10.py: error: --lr_img is 0.2 in process 0 and 0.3 in process 1; all processes "
                                    "of a run have the same flags"}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flags, says", [
    (["--trained_bs", "2"], "3 processes share 2 images of the pool's batches .--trained_bs.; start at most 2"),
    (["--batch_real", "1"], None), (["--parallel", "experiments"], "3 processes share 2 experiments .--num_exp."),
    (["--parallel", "experiments", "--num_exp", "3", "--trained_bs", "2"], None)])
def test_more_processes_than_work(monkeypatch, digits, flags, says):
    as_one_of(monkeypatch, 1, 3)
    args = rome.parse_args([*ROME, "--dataset", "Digits", *flags])
    with pytest.raises(InputError, match=says) if says else contextlib.nullcontext():
        utils.check_sizes(args, digits)


@pytest.mark.parametrize("flags, says", [
    (["--num_nets", "2"], "3 processes share 2 networks .--num_nets."),
    (["--batch_train", "1435"], "3 processes share 2 images of the last batch of an epoch .--batch_train."),
    (["--model", "ConvNetBN"], "--model ConvNetBN has BatchNorm.*--num_nets"),
    (["--model", "ConvNetBN", "--num_nets", "3"], None)])
def test_what_pretraining_cannot_share(monkeypatch, digits, flags, says):
    as_one_of(monkeypatch, 1, 3)
    with pytest.raises(InputError, match=says) if says else contextlib.nullcontext():
        pretrain.check_shares(pretrain.parse_args(flags), digits)


def test_a_port_that_is_taken(tmp_path):
    """torchrun says so itself."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        port = held.getsockname()[1]
        _, err = run(tmp_path, 2, "ROME_cifar10.py", *ROME, status=1, launcher=["--master_port", str(port)])
    assert re.search("address already in use|EADDRINUSE", err) and not said_by("ROME_cifar10.py", err)


@pytest.mark.parametrize("name, local, gpus, device, problem", [
    ("auto", 1, 0, "cpu", None), ("cpu", 1, 8, "cpu", None), ("auto", 1, 2, "cuda:1", None), ("cuda", 0, 2, "cuda:0", None),
    ("auto", 2, 2, "cuda", "process 5 has no GPU: 3 processes on its machine, 2 GPU.*--nproc_per_node 2"),
    ("cuda", 2, 0, "cuda", "process 5 has no GPU.*0 GPU.*--device cpu"),
    ("cuda:0", 1, 2, "cuda:0", "--device cuda:0: each process takes a GPU of its own")])
def test_the_device_of_a_process(monkeypatch, name, local, gpus, device, problem):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setenv("LOCAL_RANK", str(local))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    found, wrong = distributed._own_device(name, 5)
    assert found == device and (wrong is None if problem is None else re.search(problem, wrong))


# -------------------------------------------------------------------------------------------------------------- the pieces
def test_a_plain_run_imports_nothing(tmp_path, data):
    """Of torch.distributed, by our files; torch's optimisers import it in their own time."""
    program = f"""
import builtins, sys, torch
sys.path.insert(0, {str(ROOT)!r})
found, usual = [], builtins.__import__
def watched(name, importer=None, *rest, **named):
    ours = importer and str(importer.get("__file__", "")).startswith({str(ROOT)!r} + "/engine")
    if ours and name.startswith("torch.distributed"):
        found.append(name)
    return usual(name, importer, *rest, **named)
builtins.__import__ = watched
import ROME_cifar10, evaluate, pretrain
sys.argv = ["ROME_cifar10.py", *{[*ROME, *data, "--Iteration", "1", "--num_exp", "1"]!r}]
ROME_cifar10.main()
print(found, torch.distributed.is_initialized())
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=150,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "[] False", (done.stdout[-1000:], done.stderr)


def as_one_of(monkeypatch, rank, size):
    monkeypatch.setattr(distributed, "_world", SimpleNamespace(rank=rank, size=size))


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_shares(monkeypatch, size):
    for count in (7, 8, 23):
        taken = []
        for rank in range(size):
            as_one_of(monkeypatch, rank, size)
            own = range(count)[distributed.shard(count)]
            assert 0 < len(own) <= distributed.max_shard_size(count)
            taken += own
            with distributed.single_process():
                assert distributed.world_size() == 1 and distributed.shard(count) == slice(0, count) and distributed.is_main_process()
        assert taken == list(range(count))


def test_class_means_of_shares(monkeypatch):
    """By hand: what each process sums, class by class, put together."""
    sizes, embeddings = [3, 1, 4, 2], torch.randn(10, 5, dtype=torch.float64)
    sums = []
    monkeypatch.setattr(distributed, "all_reduce_sum", lambda tensors: sums.append(tensors[0].clone()))
    for rank in range(4):
        as_one_of(monkeypatch, rank, 4)
        distributed.class_means(embeddings[distributed.shard(10)], sizes)
    monkeypatch.setattr(distributed, "_world", None)
    whole = distributed.class_means(embeddings, sizes)
    assert torch.allclose(sum(sums) / torch.tensor(sizes)[:, None], whole)
    assert torch.equal(whole[3], embeddings[8:].mean(0))


def test_too_little_work(monkeypatch):
    as_one_of(monkeypatch, 0, 4)
    distributed.require_work(4, "sets")
    with pytest.raises(InputError, match="4 processes share 3 sets .--num_exp.; start at most 3"):
        distributed.require_work(3, "sets (--num_exp)")


def test_one_process_deals_in_order_and_meets_nobody():
    seen = []
    assert distributed.map_dynamic(3, lambda k: k * k, lambda k, result: seen.append((k, result))) == [0, 1, 4]
    assert seen == [(0, 0), (1, 1), (2, 4)] and distributed.all_gather_object("x") == ["x"] and distributed.all_reduce_max(3, 0) == (3, 0)


def test_a_machine_that_falls_silent(monkeypatch):
    """Whoever waits for it gives up, with one line, once it has shown no sign of life for so long."""
    class Store(dict):
        def check(self, keys):
            return all(key in self for key in keys)
        get = dict.__getitem__

    store = Store({"pulse/1": b"7", "pulse/2": b"0"})
    monkeypatch.setattr(distributed, "_world", SimpleNamespace(rank=0, size=3, store=store))
    monkeypatch.setattr(distributed, "PULSE", 0.02)
    monkeypatch.setattr(distributed, "PATIENCE", 0.4)
    began, beats, sleep = time.monotonic(), iter(range(1, 10**6)), time.sleep
    monkeypatch.setattr(distributed.time, "sleep", lambda pause: (sleep(pause), store.update({"pulse/2": next(beats)})))
    with pytest.raises(ConnectionError, match="no sign of life from process 1"):
        distributed._wait_for("never")
    assert 0.4 < time.monotonic() - began < 5
    store["there"] = b"x"
    assert distributed._wait_for("there") == b"x"


def test_a_signal_among_several_processes(monkeypatch):
    """A second one means nothing, and one in a stretch without meetings ends it at once."""
    monkeypatch.setattr(distributed, "launched_by_torchrun", lambda: True)
    interrupts, before = SignalHandler(lambda text: None), signal.getsignal(signal.SIGINT)
    try:
        with interrupts.delay_signals():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Interrupted):
            interrupts.check()
        interrupts.pending = None
        reached = []
        with pytest.raises(Interrupted), interrupts.allow_signals():
            os.kill(os.getpid(), signal.SIGTERM)
            reached.append(1)
        assert not reached
    finally:
        interrupts.pending = None
        interrupts.restore()
    assert signal.getsignal(signal.SIGINT) is not before
