"""Checks for a few minutes on a real GPU: python3 tests/gpu.py [--out DIR] [--budget S] [STEP ...]

Each step is a process of its own with a time limit, the most telling first; a step that does not
fit into the budget is not started. It prints JSON lines, and all steps write DIR/<step>.log. Exit
status 1: a step failed. No package host is asked and no data set needed: images are made up where
speed is measured. On a machine without a GPU everything is small, graphs are replaced by running
again, and some steps are left out, which tests this file.
"""
import argparse
import copy
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["ROME_TESTS_ON_GPU"] = "1"

import torch  # noqa: E402
from conftest import write_cifar_like  # noqa: E402
from fake_cuda import run_again  # noqa: E402

CUDA = torch.cuda.is_available()
PUBLISHED = """--model ConvNet --init real --lr_img 0.2 --num_exp 1 --num_eval 1
    --net_decay --embed_last 1000 --syn_ce --ce_weight 0.5 --train_net_num 1 --aug --no_baseline
    --test_limit 2000 --save_interval 5""".split()
SMALL = """--model ConvNetW32 --ipc 1 --trained_bs 8 --batch_real 2 --model_train_steps 1
    --fetch_net_num 1 --test_limit 20 --epoch_eval_train 1 --Iteration 12
    --eval_interval 12""".split()


def say(**values):
    print(json.dumps(values), flush=True)


def gibibytes(count):
    return round(count / 2**30, 2)


def random_data():
    """3000 random images on the device, and its threat model `pixel`."""
    from attacks import get_threat_model
    from conftest import random_dataset
    data = random_dataset(per_class=300 if CUDA else 6, device="cuda:0" if CUDA else "cpu")
    return data, get_threat_model("pixel", data)


def stand_in():
    """Without a GPU: run again in place of a CUDA graph."""
    from runtime import cuda_graphs
    if not CUDA:
        cuda_graphs.capture = lambda function, device: run_again(function)
        cuda_graphs.warm_up = lambda function, device: function()


def milliseconds(call, repeats=10):
    """Median wall time of call() after a warm-up, with the device waited for."""
    from runtime.device import synchronise
    device, times = torch.device("cuda:0" if CUDA else "cpu"), []
    for _ in range(1 + (repeats if CUDA else 1)):
        synchronise(device)
        start = time.perf_counter()
        call()
        synchronise(device)
        times.append(1000 * (time.perf_counter() - start))
    return round(sorted(times[1:])[len(times[1:]) // 2], 3)


# ------------------------------------------------------------------------------------------ steps
def env():
    say(torch=torch.__version__, cuda=torch.version.cuda, available=CUDA, cc=shutil.which("cc"),
        cudnn=torch.backends.cudnn.version(), python=sys.version.split()[0])
    if CUDA:
        from runtime.device import choose_micro_batch
        say(name=torch.cuda.get_device_name(), free_gib=gibibytes(torch.cuda.mem_get_info()[0]),
            capability=torch.cuda.get_device_capability(),
            micro_batch=choose_micro_batch(torch.device("cuda:0")))


def capture(compiled=False, precision="tf32"):
    """CUDA graphs against eager calls: attacks, embedding, a training step; two networks each."""
    from networks import network_for
    from runtime import compilation
    stand_in()
    data, threat = random_data()
    model, big, small = ("ConvNet", 2560, 256) if CUDA else ("ConvNetW32", 40, 8)
    compilation.set_precision(precision)
    if compiled:
        for kinds in ({"attacked": [big]}, {"attacked": [small]}, {"trained": [small]},
                      {"embedded": [big]}):
            start = time.perf_counter()
            problem = compilation.compile_batches(network_for(data, model, 0), (3, 32, 32),
                                                  last=1000, **kinds)
            say(compiled=kinds, seconds=round(time.perf_counter() - start, 1), problem=problem)
            assert problem is None
    calls = {"attack of the prior": attack_call(data, threat, model, big),
             "attack of the pool": attack_call(data, threat, model, small),
             "embedding": embedding_call(data, model, big),
             "training step": training_call(data, model, small)}
    for name, make in calls.items():
        compare_with_eager(name, make)


def attack_call(data, threat, model, count):
    from attacks import attack
    from networks import network_for

    def make(seed):
        net = network_for(data, model, seed).eval()
        x, y = data.get_batch("train", slice(seed, seed + count))
        generator = torch.Generator(data.device)
        return lambda: attack(net, x, y, threat, generator=generator.manual_seed(seed),
                              micro_batch=count)
    return make


def embedding_call(data, model, count):
    from networks import network_for
    from rome import embed_frozen

    def make(seed):
        net = network_for(data, model, seed).train()
        x = data.get_batch("train", slice(seed, seed + count))[0]
        return lambda: embed_frozen(net, x, 1000, count)
    return make


def training_call(data, model, count):
    from networks import network_for
    from runtime.training import training_step

    def make(seed):
        net = network_for(data, model, seed).train()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
        x, y = data.get_batch("train", slice(seed, seed + count))

        def call():
            loss, _ = training_step(net, optimizer, x, y, len(y))
            return torch.cat([loss.view(1), *(p.grad.flatten() for p in net.parameters())])
        return call
    return make


def compare_with_eager(name, make):
    from runtime import cuda_graphs
    eager, ms_eager = [make(seed)() for seed in (0, 1)], milliseconds(make(0))
    before = torch.cuda.memory_reserved() if CUDA else 0
    with cuda_graphs.use_cuda_graphs(True):
        graphed = [make(seed)() for seed in (0, 1, 0)]
        assert cuda_graphs._graphs and all(cuda_graphs._graphs.values()), "no graph was made"
        ms_graphed = milliseconds(make(0))
    grown = (torch.cuda.memory_reserved() if CUDA else 0) - before
    unequal = [float(((a - b).abs() > 1e-3 * a.abs().max()).float().mean())
               for a, b in zip(eager, graphed)]
    say(what=name, unequal_share=[round(share, 6) for share in unequal],
        same_again=torch.equal(graphed[0], graphed[2]), ms_eager=ms_eager, ms_graphed=ms_graphed,
        reserved_gib=gibibytes(grown))
    assert max(unequal) < 0.01 and not torch.equal(graphed[0], graphed[1])


def failed():
    """A capture that fails, in a process of its own: what is right and what works afterwards."""
    from networks import network_for
    from runtime import cuda_graphs
    stand_in()
    data, _ = random_data()
    net = network_for(data, "ConvNetW32", 0).eval()
    x, calls = data.get_batch("train", slice(8))[0], []
    before = torch.cuda.current_stream() if CUDA else None

    def waits(net, x):
        calls.append(1)
        out = net(x)
        if len(calls) == 4 and CUDA:
            out.sum().item()  # in the capture, after three warm-ups
        return out,
    problem = None
    with torch.no_grad(), cuda_graphs.use_cuda_graphs(True):
        try:
            cuda_graphs.graphed_call(waits, ("waits",), net, x)
        except cuda_graphs.CaptureError as error:
            problem = str(error)
        right = torch.allclose(net(x).cpu(), copy.deepcopy(net).cpu()(x.cpu()), atol=1e-2)
    say(problem=problem, right=right, calls=len(calls),
        stream_kept=not CUDA or torch.cuda.current_stream() == before)
    if CUDA:
        torch.cuda.empty_cache()
        say(reserved_mib=torch.cuda.memory_reserved() / 2**20)
        assert problem and right


def training():
    """Training on a set: ms a step, host waits, and what the device does."""
    from networks import network_for
    from runtime import compilation
    from runtime.cuda_graphs import use_cuda_graphs
    stand_in()
    data, _ = random_data()
    model = "ConvNet" if CUDA else "ConvNetW32"
    for graphs in (False, True):
        for ipc, sizes in ((1, [40]), (10, [256, 144]), (50, [256, 208]))[:3 if CUDA else 1]:
            if CUDA:
                problem = compilation.compile_batches(network_for(data, model, 0), (3, 32, 32),
                                                      trained=sizes)
                assert problem is None, problem
            with use_cuda_graphs(graphs):
                train, steps = training_on_a_set(data, model, ipc, 19 if CUDA else 1)
                say(ipc=ipc, graphs=graphs, ms_a_step=round(milliseconds(train, 3) / steps, 3))
    if CUDA:
        with use_cuda_graphs(True):
            waits_and_profile(*training_on_a_set(data, model, 50, 3))


def training_on_a_set(data, model, ipc, epochs):
    """(a function that trains once, how many steps that is)."""
    from networks import network_for
    from runtime.seeding import make_generator
    from synsets import TrainConfig
    from utils import train_on_set
    images = torch.randn(40 * ipc, 3, 32, 32, device=data.device)
    labels = torch.arange(10, device=data.device).repeat(4 * ipc)

    def train():
        net = network_for(data, model, 0)
        train_on_set(net, images, labels, TrainConfig(epochs), make_generator(0))
    return train, (epochs + 1) * -(-len(images) // 256)


def waits_and_profile(train, steps):
    from torch.profiler import ProfilerActivity, profile
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as waits:
        warnings.simplefilter("always")
        train()
    torch.cuda.set_sync_debug_mode(0)
    say(host_waits=len(waits), steps=steps,
        where=sorted({f"{Path(w.filename).name}:{w.lineno}" for w in waits}))
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as prof:
        train()
    print(prof.key_averages().table(sort_by="cuda_time_total", row_limit=12,
                                    max_name_column_width=50))


def run(script, folder, *flags, stop_at=None):
    """Run a script in `folder`, its output printed. stop_at: SIGTERM at that iteration's line."""
    data, classes = Path(tempfile.gettempdir()) / "rome_made_up", 100 if "100" in script else 10
    if not (data / f"cifar{classes}.npz").exists():
        write_cifar_like(data, *((50000, 10000) if CUDA else (600, 200)), classes)
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-u", str(ROOT / script), "--data_path", str(data), *map(str, flags)]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True,
                          stderr=subprocess.STDOUT) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            assert "no CUDA graphs" not in line and "torch.compile does not work" not in line
            if stop_at is not None and f"it {stop_at}/" in line:
                process.send_signal(signal.SIGTERM)
    assert process.returncode == (0 if stop_at is None else 143), process.returncode


def rome(*flags, name="tf32", ipc=10, iterations=41, script="ROME_cifar10.py"):
    """The published command, shortened: seconds an iteration, its losses."""
    with tempfile.TemporaryDirectory() as folder:
        run(script, Path(folder), *PUBLISHED, "--ipc", ipc, "--Iteration", iterations,
            "--eval_interval", iterations, "--epoch_eval_train", "50", *flags,
            *([] if CUDA else SMALL))
        (metrics,) = Path(folder).glob("result/*/metrics.jsonl")
        events = list(map(json.loads, metrics.read_text().splitlines()))
    times = [(e["iteration"], e["seconds"]) for e in events if e["event"] == "iteration"]
    (first, began), (last, ended) = times[1 if len(times) > 2 else 0], times[-1]
    say(run=name, seconds_an_iteration=round((ended - began) / max(last - first, 1), 4),
        losses=[e["loss_pool"] for e in events if e["event"] == "iteration"])


def resume():
    """--deterministic: stopped after iteration 10 and resumed, the same bits as undisturbed."""
    flags = [*PUBLISHED, "--ipc", 10, "--deterministic", "--Iteration", 21, "--eval_interval", 21,
             "--epoch_eval_train", 5, *([] if CUDA else SMALL)]
    sums = []
    for stop in (None, 10):
        with tempfile.TemporaryDirectory() as folder:
            if stop is not None:
                run("ROME_cifar10.py", Path(folder), *flags, stop_at=stop)
            run("ROME_cifar10.py", Path(folder), *flags)
            (path,) = Path(folder).glob("result/*.pt")
            images = torch.load(path, map_location="cpu", weights_only=True)["data"][0][0]
            sums.append(hashlib.sha256(images.contiguous().numpy().tobytes()).hexdigest()[:16])
    say(undisturbed=sums[0], resumed=sums[1], equal=sums[0] == sums[1])
    assert sums[0] == sums[1]


def nccl():
    import torch.distributed as dist
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("cpu:gloo,cuda:nccl" if CUDA else "gloo", world_size=1, rank=0,
                                store=dist.FileStore(f"{folder}/store", 1))
        for device in ("cpu", "cuda:0") if CUDA else ("cpu",):
            tensor = torch.ones(3, device=device)
            dist.all_reduce(tensor)
            dist.broadcast(tensor, src=0)
        said = [{"a": 1}]
        dist.broadcast_object_list(said, src=0, device=torch.device("cpu"))
        dist.barrier()
        dist.destroy_process_group()
    say(ok=said == [{"a": 1}])


def evaluation():
    """evaluate.py with AutoAttack on 256 images, on a network that was trained for a moment."""
    with tempfile.TemporaryDirectory() as folder:
        folder, limit = Path(folder), 256 if CUDA else 4
        run("pretrain.py", folder, "--model", "ConvNetW32", "--threat_model", "pixel", "--epochs",
            "1", "--attack_steps", "2", "--aa_limit", 0, "--test_limit", limit)
        (path,) = (folder / "checkpoints").glob("*.pth")
        run("evaluate.py", folder, "--networks", path, "--threat_model", "pixel", "--untargeted",
            "--attacks", "PGD20", "AA", "--limit", limit, "--out", folder / "out", "--no_sanity",
            *([] if CUDA else ["--aa_iterations", 1, "--queries", 5]))
        print((folder / "out" / "results.json").read_text()[-1500:])


def benchmark():
    sizes = "--batch_real 256 --trained_bs 256 --model_train_steps 10 --repeats 3".split()
    subprocess.run([sys.executable, "benchmark.py", *(sizes if CUDA else ["--quick"]), "--out",
                    Path(tempfile.gettempdir()) / "rome_benchmark.json"], cwd=ROOT, check=True)


STEPS = {  # name: (seconds at most, what it runs)
    "env": (30, env),
    "graphs": (60, ["-m", "pytest", "-q", "tests/test_cuda_graphs.py", "-m", "gpu", "-p",
                    "no:cacheprovider"]),
    "capture": (60, capture),
    "compiled": (150, lambda: capture(True)),
    "rome": (90, rome),
    "failed": (40, failed),
    "training": (100, training),
    "rome_bf16": (120, lambda: rome("--precision", "bf16", name="bf16")),
    "resume": (150, resume),
    "bf16": (120, lambda: capture(True, "bf16")),
    "rome_ipc1": (120, lambda: rome("--batch_real", 5000, name="ipc 1", ipc=1, iterations=11)),
    "rome_cifar100": (150, lambda: rome("--model_train_steps", 50, name="CIFAR-100, ipc 50", ipc=50,
                                        iterations=11, script="ROME_cifar100.py")),
    "rome_no_graphs": (90, lambda: rome("--no_cuda_graphs", name="tf32, no graphs")),
    "rome_bf16_no_graphs": (90, lambda: rome("--precision", "bf16", "--no_cuda_graphs",
                                             name="bf16, no graphs")),
    "evaluation": (120, evaluation),
    "benchmark": (300, benchmark),
    "nccl": (40, nccl),
}
WITHOUT_GPU = ["env", "capture", "rome", "failed", "training", "nccl"]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("steps", nargs="*", help=" ".join(STEPS))
    parser.add_argument("--out", default="result/gpu")
    parser.add_argument("--budget", type=float, default=420)
    parser.add_argument("--together", nargs="*", default=[],
                        help="steps that run at the same time, before the others")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        return STEPS[args.inside][1]()
    Path(args.out).mkdir(parents=True, exist_ok=True)
    until, results = time.perf_counter() + args.budget, []  # [(status, line), ...]
    started = [(name, *start(name, args.out)) for name in args.together]
    results += [finish(*one, args.out, until) for one in started]
    for name in args.steps or ([] if args.together else STEPS if CUDA else WITHOUT_GPU):
        if until - time.perf_counter() < min(STEPS[name][0], 20):
            results.append((0, f"{name}: no time left"))
            continue
        results.append(finish(name, *start(name, args.out), args.out, until))
    print("\n".join(line for _, line in results))
    sys.exit(any(status != 0 for status, _ in results))


def start(name, out):
    what = STEPS[name][1]
    command = what if isinstance(what, list) else [__file__, "--inside", name]
    with open(Path(out) / f"{name}.log", "w") as log:
        process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=log,
                                   stderr=subprocess.STDOUT, start_new_session=True)
    return process, time.perf_counter()


def finish(name, process, began, out, until):
    left = min(STEPS[name][0] - (time.perf_counter() - began), until - time.perf_counter())
    try:
        status = process.wait(max(left, 1))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        status = "out of time"
    print(f"--- {name}\n{(Path(out) / f'{name}.log').read_text()[-4000:]}", flush=True)
    seconds = time.perf_counter() - began
    end = "ok" if status == 0 else f"failed ({status})"
    return status, f"{name}: {end} in {seconds:.0f} s"


if __name__ == "__main__":
    main()
