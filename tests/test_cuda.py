"""The scripts on a stand-in for a CUDA device (fake_cuda.py), interrupted and resumed too."""
import contextlib
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import sigterm_at
from fake_cuda import CudaTensor, fake_cuda, on_device

import benchmark
import evaluate
import pretrain
import rome
import ROME_cifar10
import ROME_cifar100
import utils
from attacks import autoattack
from augment import dsa_apply, dsa_draw
from networks import get_network
from runtime import cuda_graphs
from runtime.checkpoint import Interrupted
from runtime.command_line import run_script
from runtime.device import choose_micro_batch
from runtime.measures import COLUMNS
from runtime.perturbation import deferred_checks
from runtime.safe_io import InputError
from runtime.seeding import make_generator
from synsets import TrainConfig

ROME = """--dataset Digits --model MLP --ipc 1 --aug --threat_model pixel --batch_real 4
    --trained_bs 8 --model_train_steps 1 --num_exp 1 --num_eval 1 --epoch_eval_train 1
    --test_limit 10 --lr_img 0.2 --attack_steps 2 --net_decay --embed_last 1000 --Iteration 4
    --eval_interval 2 --no_compile --device cuda""".split()


@pytest.fixture
def cuda(monkeypatch):
    monkeypatch.setattr(utils, "SELECT_IMAGES", 20)
    with fake_cuda(monkeypatch, memory=1 << 30) as device:  # micro-batches of 256
        yield device
    torch.use_deterministic_algorithms(False)


def main(monkeypatch, folder, script, *flags):
    folder.mkdir(exist_ok=True)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, flags)])
    script.main()


# ------------------------------------------------------------------------------ the stand-in
def test_what_the_stand_in_refuses_and_counts(cuda):
    x, generator = torch.ones(2, 3, device="cuda"), torch.Generator("cuda").manual_seed(0)
    assert x.device == torch.device("cuda:0") and (x + 1).is_cuda and not x.cpu().is_cuda
    for mixed in (lambda: x + torch.ones(2, 3), lambda: torch.cat([torch.ones(2, 3), x]),
                  lambda: torch.ones(3)[x[0].long()]):
        with pytest.raises(RuntimeError, match="same device"):
            mixed()
    for wrong in (lambda: torch.rand(2, generator=generator),
                  lambda: x.uniform_(generator=torch.Generator())):
        with pytest.raises(RuntimeError, match="device type for generator"):
            wrong()
    with pytest.raises(TypeError, match="Tensor.cpu"):
        x.numpy()
    cuda.syncs.clear()
    x = torch.arange(4).to("cuda")
    x[torch.tensor([0, 1])], x[x > 1], x.sum().item(), x.cpu(), x + 1, x[1:]
    assert +cuda.syncs == Counter({"copy to the device": 1, "index": 2, "item": 1, "cpu": 1})


def test_rotation_in_deterministic_mode(cuda):
    """Its gradient would add up in any order on CUDA: there it is computed on the CPU."""
    x = torch.rand(2, 1, 4, 4)
    draw = dsa_draw("rotate", (4, 4), torch.Generator().manual_seed(0))
    torch.use_deterministic_algorithms(True)
    ours = dsa_apply(x.to("cuda").requires_grad_(), draw)
    assert on_device(ours) and torch.allclose(ours.cpu(), dsa_apply(x, draw), atol=1e-6)
    with pytest.raises(RuntimeError, match="deterministic implementation"):
        F.grid_sample(ours, torch.zeros(2, 4, 4, 2, device="cuda"), align_corners=False)


# ------------------------------------------------------------------------------- end to end
@pytest.mark.parametrize("script, flags", [
    (ROME_cifar10, ["--deterministic", "--threat_model", "published", "--no_baseline"]),
    (ROME_cifar100, ["--optim", "adam", "--labels", "stored", "--no_baseline"])])
def test_an_interrupted_run_ends_as_a_whole_one(cuda, tmp_path, monkeypatch, script, flags):
    """Stopped after its best set, which comes from a file then and goes into grids, the last
    evaluation and the result."""
    evaluate_network = utils.Evaluator._evaluate_network

    def first_is_best(self, train_set, model, key, select):
        row = evaluate_network(self, train_set, model, key, select)
        return {**row, "select_acc": 1 / key[2] if select else None}  # key: "evaluate", exp, it
    monkeypatch.setattr(utils.Evaluator, "_evaluate_network", first_is_best)
    main(monkeypatch, tmp_path / "a", script, *ROME, *flags)
    sigterm_at(monkeypatch, rome, "pool_step", 3)
    with pytest.raises(Interrupted):
        main(monkeypatch, tmp_path / "b", script, *ROME, *flags)
    with pytest.raises(InputError, match="ran on Fake GPU|--device is cpu"):
        main(monkeypatch, tmp_path / "b", script, *ROME, *flags, "--device", "cpu")
    main(monkeypatch, tmp_path / "b", script, *ROME, *flags)
    (images, meta, rows), (resumed, _, resumed_rows) = (results(tmp_path / name) for name in "ab")
    assert torch.equal(images, resumed) and not on_device(resumed) and meta["device"] == "Fake GPU"
    assert rows == resumed_rows and len(rows) == 3


def results(folder):
    """Images and meta of the set, and the rows of its evaluations."""
    (path,) = (folder / "result").glob("*.pt")
    content = torch.load(path, weights_only=True)
    (path,) = (folder / "result").glob("*/metrics.jsonl")
    rows = []
    for line in map(json.loads, path.read_text().splitlines()):
        if line["event"] == "evaluation" and "iteration" in line:
            rows.append([line["iteration"], *(line.get(key) for key in COLUMNS)])
    return content["data"][0][0], content["meta"], rows


def test_pretraining_and_a_run_with_its_network(cuda, tmp_path, monkeypatch):
    flags = """--dataset Digits --model MLP --threat_model pixel --epochs 1 --attack_steps 1
        --batch_train 256 --test_limit 10 --aa_limit 2 --device cuda --no_compile""".split()
    main(monkeypatch, tmp_path / "a", pretrain, *flags)
    sigterm_at(monkeypatch, pretrain, "attack", 3)
    with pytest.raises(Interrupted):
        main(monkeypatch, tmp_path / "b", pretrain, *flags)
    main(monkeypatch, tmp_path / "b", pretrain, *flags)
    name = "checkpoints/full_MLP_Digits_142_PGD-pixel_seed0-0.pth"
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    main(monkeypatch, tmp_path / "b", ROME_cifar10, *ROME, "--robust_prior", tmp_path / "b" / name,
         "--select", "last", "--labels", "stored", "--Iteration", "1")


def test_evaluation_resumed(cuda, digits, tmp_path, monkeypatch):
    images = torch.cat([digits.sample_class(c, 1, make_generator(c)) for c in range(10)])
    meta = {"dataset": "Digits", "packed": True, "flags": {"model": "MLP"}}
    torch.save({"data": [[images, torch.arange(10)]], "meta": meta}, tmp_path / "set.pt")
    flags = f"""--synset {tmp_path}/set.pt --epoch_eval_train 1 --num_eval 1 --limit 6 --transfer
        --threat_model pixel --queries 10 --aa_iterations 1 --no_compile --resume
        --attacks FGSM PGD PGD_L2 CW Deepfool AA Square SPSA""".split()
    run_slice, calls = evaluate.run_slice, []

    def disturbed(*args):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return run_slice(*args)
    monkeypatch.setattr(evaluate, "SLICE", 1)
    monkeypatch.setattr(evaluate, "run_slice", disturbed)
    with pytest.raises(KeyboardInterrupt):
        main(monkeypatch, tmp_path / "out", evaluate, *flags, "--device", "cuda")
    with pytest.raises(InputError, match="Fake GPU, not of CPU"):
        main(monkeypatch, tmp_path / "out", evaluate, *flags, "--device", "cpu")
    main(monkeypatch, tmp_path / "out", evaluate, *flags, "--device", "cuda")
    content = json.loads((tmp_path / "out/result/evaluation/results.json").read_text())
    assert content["device"] == "Fake GPU" and content["sanity"]
    assert len(content["rows"]) == 2 + 2 * 6 + 2 + 2
    assert {row["forward"] for row in content["rows"] if row["attack"] == "PGD"} == {10}


# ----------------------------------------------------------------------------------- details
def test_an_outer_iteration_does_not_wait_for_the_device(cuda):
    """One graph of each kind serves all networks."""
    flags = ["--model", "LeNet", "--ipc", "1", "--batch_real", "2", "--trained_bs", "4",
             "--model_train_steps", "1"]
    bench = benchmark.Bench(benchmark.parse_args(flags), "cuda")
    parts = bench.begin()
    bench.iterate(parts)  # captures graphs, and compares them
    cuda.syncs.clear()
    with deferred_checks() as checks:
        bench.iterate(parts)
        assert not +cuda.syncs
        checks.read([])
    assert cuda.syncs.total() == 1
    graphs = [(key[0][0], key[6][0][0]) for key in cuda_graphs._graphs]  # (name, images)
    assert sorted(graphs) == [("PGD", 4), ("PGD", 20), ("embed", 20), ("training step", 4)]


@pytest.mark.parametrize("labels", ["hard", "online"])
def test_training_on_a_set_does_not_wait_for_the_device(cuda, labels):
    images = torch.rand(24, 3, 32, 32).to("cuda")
    classes, labellers = torch.arange(24).to("cuda") % 10, ()
    if labels == "online":
        labellers = [get_network("MLP", 3, 10, (32, 32), 1, "cuda").eval().requires_grad_(False)]
    config = TrainConfig(2, batch_train=16, mix="both", noise=0.1, ema=0.9)
    with cuda_graphs.use_cuda_graphs(True):
        for _ in range(2):  # the first time, graphs are captured and compared
            net = get_network("LeNet", 3, 10, (32, 32), 0, "cuda")
            cuda.syncs.clear()
            utils.train_on_set(net, images, classes, config, labellers=labellers)
    assert not +cuda.syncs


def test_the_micro_batch_follows_free_memory_and_stays(monkeypatch, tmp_path):
    """A resumed run keeps it: other sizes draw other random starts on CUDA."""
    for free, expected in ((79 << 30, 4096), (30 << 30, 1024), (1 << 30, 256)):
        with fake_cuda(monkeypatch, free):
            assert choose_micro_batch(torch.device("cuda:0")) == expected
            assert choose_micro_batch(torch.device("cuda:0"), 300) == 300
    pool_step, sizes = rome.pool_step, []

    def spy(*args):
        sizes.append(args[-1])
        return pool_step(*args)
    monkeypatch.setattr(rome, "pool_step", spy)
    sigterm_at(monkeypatch, rome, "pool_step", 2)
    flags = [*ROME, "--select", "last"]
    with fake_cuda(monkeypatch, 79 << 30), pytest.raises(Interrupted):
        main(monkeypatch, tmp_path, ROME_cifar10, *flags)
    with fake_cuda(monkeypatch, 30 << 30):
        main(monkeypatch, tmp_path, ROME_cifar10, *flags)
    assert sizes == [4096] * 4


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB ...\nmore"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")])
def test_a_full_memory_is_one_line(error, monkeypatch, capsys):
    def full():
        raise error
    monkeypatch.setattr(sys, "argv", ["ROME_cifar10.py"])
    with pytest.raises(SystemExit) as stop:
        run_script(full)
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 1 and "memory of the device is full" in line and "--chunk" in line


def test_autoattack_seeds_the_device_of_its_images(cuda, monkeypatch):
    """pyautoattack seeds the current CUDA device, whatever device its images are on."""
    current, seeded = [], []

    @contextlib.contextmanager
    def device(wanted):
        current.append(wanted)
        yield
        current.pop()
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda.random, "manual_seed", lambda seed: seeded.append([*current]))
    net, generator = get_network("MLP", 3, 10, (32, 32), 0, "cuda").eval(), make_generator(
        0, device="cuda")
    x = torch.rand(2, 3, 32, 32, generator=generator, device="cuda")
    with torch.no_grad():
        labels = net(x).argmax(1)
    x_adv = autoattack(net, x, labels, iterations=2, queries=5, generator=generator)
    assert isinstance(x_adv, CudaTensor) and seeded and all(at == [x.device] for at in seeded)


def test_the_checks_for_a_gpu_run_without_one(tmp_path):
    """`make test-gpu`, small, with a stand-in for graphs; and a step that fails."""
    command = [sys.executable, Path(__file__).with_name("gpu.py"), "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "failed (" not in done.stdout, done.stdout + done.stderr
    for step in ("env", "capture", "rome", "failed", "training", "nccl"):
        assert f"{step}: ok" in done.stdout
    done = subprocess.run([*command, "graphs"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "graphs: failed (1)" in done.stdout  # there is no driver
