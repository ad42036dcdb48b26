"""The fast paths against the plain ones."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, random_dataset, sigterm_at

import benchmark
import ROME_cifar10 as rome
import utils
from attacks import attack_with_norms, get_threat_model
from runtime import compilation
from formats.synset_file import SyntheticSet
from runtime.measures import percent
from runtime.checkpoint import Interrupted
from networks import get_network

SMALL = ["--model", "ConvNetW32", "--ipc", "1", "--batch_real", "8", "--trained_bs", "16", "--model_train_steps", "2"]


@pytest.fixture(scope="module")
def compiled():
    """ConvNetW32 compiled for 16 images, whatever they are for; skips where torch.compile does not work."""
    compilation.set_precision("tf32")  # as the scripts: another precision compiles again
    net = get_network("ConvNetW32", 3, 10, (32, 32), 0)
    problem = compilation.compile_batches(net, (3, 32, 32), attacked=[16], trained=[16], matched=[16], embedded=[16], scored=[16],
                                   last=1000)
    if problem:
        pytest.skip(problem)
    assert net.training and all(p.requires_grad for p in net.parameters())
    yield
    compilation.stop_compiling()


def test_compiled_in_bf16_and_judged_without(compiled):
    """Compiled for bf16, a batch inside `disable_bf16` is still computed exactly, in a graph of its own."""
    net, x = get_network("ConvNetW32", 3, 10, (32, 32), 1).eval(), torch.randn(16, 3, 32, 32, requires_grad=True)
    with compilation.freeze_parameters(net):
        plain = compilation._plain(net, x)
        compilation.set_precision("bf16")
        try:
            compilation.compile_batches(net, (3, 32, 32), attacked=[16])
            net.requires_grad_(False)
            rough = compilation.forward(net, x)
            with compilation.disable_bf16():
                exact = compilation.forward(net, x)
        finally:
            compilation.set_precision("tf32")
    assert torch.allclose(exact, plain, atol=1e-5) and not torch.allclose(rough, plain, atol=1e-5)


def count_compiled(monkeypatch):
    calls, original = [], compilation._compiled
    monkeypatch.setattr(compilation, "_compiled", lambda: lambda net, x, last: (calls.append(len(x)), original()(net, x, last))[1])
    return calls


def test_compiled_equals_plain(compiled, monkeypatch):
    """A step of an attack and training gradients, on one network of the pool and, without compiling again, on another. The sign
    of a gradient that is almost 0 may differ, so nearly all pixels must agree, not all; after more steps the paths part."""
    calls, graphs = count_compiled(monkeypatch), torch._dynamo.utils.counters["stats"]["unique_graphs"]
    data = random_dataset(per_class=16)
    threat = get_threat_model("pixel", data)
    x, labels = data.get_batch("train", slice(16))
    for seed in (1, 2):
        net = get_network("ConvNetW32", 3, 10, (32, 32), seed)
        results = []
        for plain in (False, True):
            with benchmark.plain_mode() if plain else torch.enable_grad():
                adv, linf, _ = attack_with_norms(net, x, labels, threat, targeted=False, random_start=False, steps=1)
                net.zero_grad()
                F.cross_entropy(compilation.forward(net, x), labels).backward()
                results.append((adv, [p.grad.clone() for p in net.parameters()]))
        (adv, grads), (adv_plain, grads_plain) = results
        assert ((adv - adv_plain).abs() > 1e-4).float().mean() < 1e-3 and linf.min() > 0.9 * threat.step_size
        assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in zip(grads, grads_plain))
    assert calls == 2 * ([16] * 2) and torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    assert net(x[:5]).shape == (5, 10) and len(calls) == 4  # another batch size stays plain


def test_smaller_batches_are_filled_up(compiled, monkeypatch):
    """Nearly as large ones go through the compiled graph, with the same scores and gradients; smaller ones stay plain, and so
    do networks in which the other images of a batch matter."""
    calls, x = count_compiled(monkeypatch), torch.randn(13, 3, 32, 32)
    net, labels = get_network("ConvNetW32", 3, 10, (32, 32), 3).eval(), torch.arange(13) % 10

    def gradients(batch, training):
        net.train(training).requires_grad_(training)
        wanted = list(net.parameters()) if training else [batch.requires_grad_()]
        return torch.autograd.grad(F.cross_entropy(compilation.forward(net, batch), labels[:len(batch)]), wanted)

    for training in (True, False):
        quick = gradients(x.clone(), training)
        with benchmark.plain_mode():
            plain = gradients(x.clone(), training)
        assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in zip(quick, plain))
    assert calls == [16, 16]
    gradients(x[:5].clone(), training=False)
    assert calls == [16, 16]
    with torch.no_grad():
        assert torch.allclose(compilation.forward(net, x), net(x), atol=1e-4) and calls == [16, 16, 16]  # scores alone, too
    with_norm = get_network("ConvNetBN", 3, 10, (32, 32), 0)
    monkeypatch.setattr(compilation, "_ready", {(with_norm.architecture, training, 16, None, wanted) for training, wanted
                                         in ((True, "parameters"), (False, "none"))})
    assert compilation._compiled_size(with_norm, x) is None
    with torch.no_grad():
        assert compilation._compiled_size(with_norm.eval(), x) == 16


SAME = """
import torch
from runtime import compilation
from networks import get_network
net = get_network("ConvNetW32", 3, 10, (32, 32), 0).eval()
problem = compilation.compile_batches(net, (3, 32, 32), attacked=[16])
x = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
with compilation.freeze_parameters(net):
    print(torch.backends.cpu.get_cpu_capability(), problem, compilation._kind(net, x, None) in compilation._ready,
          torch.allclose(compilation.forward(net, x), net(x), atol=1e-4))
"""


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="needs two kinds of instructions")
def test_what_one_processor_compiled_is_not_taken_for_another(compiled, tmp_path):
    """Both with the same folder of compiled code, as on a cluster with a shared one."""
    for capability in ("avx512", "avx2"):
        command = [ROOT / "tests" / "on_processor.sh", capability, sys.executable, "-c", SAME]
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
        said = subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout
        assert said.split() == [capability.upper(), "None", "True", "True"]


def test_fast_iteration_equals_plain_iteration(compiled, monkeypatch, request):
    """One outer iteration as benchmark's class-by-class loop, as the script batches it, and compiled; in double precision,
    since rounding in single precision turns a sign here and there, after which the paths part."""
    calls = count_compiled(monkeypatch)
    torch.set_default_dtype(torch.double)
    request.addfinalizer(lambda: torch.set_default_dtype(torch.float))
    bench = benchmark.Bench(benchmark.parse_args([*SMALL, "--threat_model", "pixel"]))
    bench.data.micro_batch = 16  # 80 images = 5 x 16
    images, optimizer, plain_pool, rng = bench.start()
    start = images.detach().clone()
    with benchmark.plain_mode():
        benchmark.plain_iteration(images, optimizer, plain_pool.members[0], plain_pool.sample(2, rng["pool"]), bench.data,
                                  bench.threat, bench.flags, rng)

    def script_iteration():
        images, optimizer, pool, rng = bench.start()
        rome.matching_step(images, optimizer, pool.members[0], bench.data, bench.threat, bench.flags, rng)
        rome.pool_step(pool.sample(2, rng["pool"]), bench.data, bench.threat, bench.flags, rng)
        return images, pool

    def parameters(pool):
        return torch.cat([p.detach().flatten() for member in pool.members for p in member.net.parameters()])

    with benchmark.plain_mode():
        eager, eager_pool = script_iteration()
    assert not calls and eager.dtype == torch.double and torch.allclose(eager, images, atol=1e-9)
    assert torch.allclose(parameters(eager_pool), parameters(plain_pool), atol=1e-12)
    quick, quick_pool = script_iteration()
    assert calls == [16] * (5 * 10 + 5 + 2 + 2 * 2 * 11)  # attacked, embedded, matched (of 40: 16, 16 and 8); pool training
    moved = (eager - start).flatten(1).norm(dim=1)  # one image a class
    assert moved.min() > 1
    assert torch.allclose(quick, eager, atol=1e-9)
    assert torch.allclose(parameters(quick_pool), parameters(eager_pool), atol=1e-12)


def test_the_benchmark_says_what_it_measured():
    """40 images in all, fewer than a micro_batch: the batch that is measured is the data. Seconds of the plain loop, and of the fast
    one in each precision."""
    bench = benchmark.Bench(benchmark.parse_args([*SMALL, "--batch_real", "4", "--repeats", "1"]))
    images, seconds, work = benchmark.pgd_step(bench)
    compilation.set_precision("tf32")
    assert images == bench.pgd_batch == work == 40 and len(seconds) == 1 + len(bench.precisions)
    counted = benchmark.on_a_gpu(bench)
    assert counted["operations"] > 500 and counted["bytes"] > 1e8


def test_operations_are_counted():
    x = torch.ones(10, 10)
    with benchmark.OperationCounter() as counter:
        (x.view(100)[:50] + 1) * 2  # 50 in, 50 out, twice
    assert counter.operations == 2 and counter.bytes == 4 * 200


def test_no_compiler_means_plain(monkeypatch):
    def no_compiler():
        raise RuntimeError("no C++ compiler\nand a page of advice")
    monkeypatch.setattr(compilation, "_compiled", no_compiler)
    net, said = get_network("ConvNetW32", 3, 10, (32, 32), 0), []
    compilation.compile_planned(net, (3, 32, 32), {"attacked": {128: 1e15}}, said.append)
    assert said == ["torch.compile does not work here (RuntimeError: no C++ compiler); going on without"]
    assert compilation.forward(net, torch.zeros(128, 3, 32, 32)).shape == (128, 10)
    assert all(p.requires_grad for p in net.parameters()) and net.training


def test_only_what_pays_is_compiled(monkeypatch):
    """And what is new is said."""
    asked, said, ready = [], [], set()
    monkeypatch.setattr(compilation, "_ready", ready)

    def compile_batches(net, shape, last, **sizes):
        asked.append(sizes)
        ready.add(str(sizes))
    monkeypatch.setattr(compilation, "compile_batches", compile_batches)
    net = get_network("ConvNetW32", 3, 10, (32, 32), 0)
    compilation.compile_planned(net, (3, 32, 32), {"attacked": {128: 1e12, 64: 1e14}, "trained": {0: 0, 256: 1e13}}, said.append)
    compilation.compile_planned(net, (3, 32, 32), {"attacked": {128: 1e12}, "trained": {}}, said.append)
    compilation.set_precision("bf16")
    for _ in range(2):
        compilation.compile_planned(net, (3, 32, 32), {"matched": {128: 3e12, 64: 1e11}}, said.append)
    compilation.set_precision("tf32")
    assert asked == [{"attacked": [64], "trained": [256]}, {"matched": [128]}, {"matched": [128]}] and len(said) == 2
    assert "attacked batches of 64, trained batches of 256 images" in said[0]


def test_precision(monkeypatch):
    with pytest.raises(ValueError, match="fp64.*fp32, tf32, bf16"):
        compilation.set_precision("fp64")
    net, x = get_network("ConvNetW32", 3, 10, (32, 32), 0), torch.randn(4, 3, 32, 32)
    exact = compilation.forward(net, x)
    compilation.set_precision("bf16")
    try:
        assert torch.equal(compilation.forward(net, x), exact)  # on a CPU, what is not compiled
        monkeypatch.setattr(compilation, "autocast", lambda device: torch.autocast("cpu", torch.bfloat16))  # as on a GPU
        rough, embedding = compilation.forward(net, x), compilation.embed(net, x, 1000)[0]
    finally:
        compilation.set_precision("tf32")
    for x, y in ((rough, exact), (embedding, net.embed_and_classify(x)[0])):
        assert x.dtype == torch.float32 and not torch.equal(x, y) and torch.allclose(x, y, atol=0.05)


@pytest.mark.parametrize("model, last", [("ConvNetW32", 1000), ("ConvNetW32", -1), ("ConvNetW32", 5), ("ConvNetAS", 1000),
                                         ("ConvNetBN", 1000), ("ConvNetGN", 3), ("ConvNetMP", 1000), ("ResNet18", -2),
                                         ("VGG11", 1000), ("MLP", 1000)])
def test_lean_equals_plain(model, last):
    """Scores, embeddings and all gradients, in double precision; what has no bias has its gradient, 0, all the same."""
    net = get_network(model, 3, 10, (32, 32), 0).double()
    net.train()
    x = torch.randn(4, 3, 32, 32, dtype=torch.double, requires_grad=True)
    wanted = [x, *net.parameters()]
    for layers in (None, compilation._layers(net, last)):
        plain, lean = compilation._plain(net, x, layers), compilation._lean(net, x, layers)
        plain, lean = ([out] if layers is None else out for out in (plain, lean))
        assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(plain, lean))
        gradients = [torch.autograd.grad(sum(part.square().sum() for part in out), wanted) for out in (plain, lean)]
        assert all(torch.allclose(a, b, rtol=1e-8, atol=1e-9) for a, b in zip(*gradients))


@pytest.mark.parametrize("flag, expected", [([], 1), (["--no_compile"], 0)])
def test_the_script_compiles_unless_told_not_to(monkeypatch, tmp_path, flag, expected):
    planned = []
    monkeypatch.setattr(compilation, "compile_planned", lambda net, shape, batches, say, last: planned.append(batches))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ROME_cifar10.py", "--dataset", "Digits", "--model", "MLP", "--ipc", "1",
                                      "--select", "test", "--Iteration", "0", "--num_exp", "1", "--epoch_eval_train",
                                      "1", "--test_limit", "20", "--no_baseline", *flag])
    rome.main()
    assert len(planned) == expected
    for batches in planned:  # 256 real images of each class (all that there are), a pool batch of 256
        assert batches["attacked"][64] > batches["attacked"][20] > 0 and batches["trained"][256] > batches["trained"][10] > 0


@pytest.mark.slow
def test_bf16_accuracy(digits, capsys):
    """What bfloat16 in training and attacks does to clean and robust accuracy: five LeNets on 100 digits, 200 test images."""
    images = torch.cat([digits.sample_class(c, 10, torch.Generator().manual_seed(0)) for c in range(10)])
    labels = torch.arange(10).repeat_interleave(10)
    args = rome.parse_args(["--dataset", "Digits", "--model", "LeNet", "--num_eval", "5", "--epoch_eval_train", "100",
                            "--test_limit", "200", "--select", "test"])
    evaluate, means = utils.Evaluator(args, digits, get_threat_model("pixel", digits)), {}
    for precision in ("fp32", "bf16"):
        compilation.set_precision(precision)
        assert compilation.compile_batches(get_network("LeNet", 3, 10, (32, 32), 0), (3, 32, 32), trained=[100]) is None
        rows = evaluate(SyntheticSet(images, labels), 1, 0)
        compilation.set_precision("tf32")
        compilation.stop_compiling()
        for column in ("clean_acc", "robust_acc"):
            values = [100 * row[column] for row in rows]
            means[precision, column] = sum(values) / 5
            with capsys.disabled():
                print(f"\n{precision} {column}: {percent([v / 100 for v in values])}", end="")
    for column in ("clean_acc", "robust_acc"):
        assert abs(means["fp32", column] - means["bf16", column]) < 3
        assert means["fp32", column] != means["bf16", column] or column == "clean_acc"


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_killed_and_resumed_with_everything_compiled(precision, monkeypatch, tmp_path):
    """The same bits, with batches that are compiled, filled up, and left plain."""
    flags = ["--dataset", "Digits", "--model", "ConvNetW32", "--ipc", "1", "--aug", "--batch_real", "7", "--trained_bs", "16",
             "--model_train_steps", "2", "--Iteration", "4", "--num_exp", "1", "--epoch_eval_train", "1", "--test_limit", "20",
             "--select", "last", "--no_baseline", "--threat_model", "pixel", "--precision", precision, "--embed_last", "1000"]
    monkeypatch.setattr(compilation, "COMPILE_PAYS", {"cpu": 1e9})
    images = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        monkeypatch.setattr(sys, "argv", ["ROME_cifar10.py", *flags])
        if name == "b":
            sigterm_at(monkeypatch, rome, "outer_iteration", 3)
            with pytest.raises(Interrupted):
                rome.main()
            compilation.stop_compiling()
        rome.main()
        assert {kind[-1] for kind in compilation._ready} == {"none", "input", "parameters"}
        (path,) = Path("result").glob("*.pt")
        images.append(torch.load(path, weights_only=True)["data"][0][0])
        compilation.stop_compiling()
    compilation.set_precision("tf32")
    assert torch.equal(*images)
