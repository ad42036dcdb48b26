"""Compiled and padded batches against eager ones; precision."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, sigterm_at

import benchmark
import rome
import ROME_cifar10
import utils
from attacks import get_threat_model
from formats.synset_file import SyntheticSet
from networks import get_network
from runtime import compilation
from runtime.checkpoint import Interrupted

MODEL, SHAPE, SIZE = "ConvNetD1", (3, 32, 32), 16
SMALL = ["--model", MODEL, "--ipc", "1", "--batch_real", "8", "--trained_bs", "16",
         "--model_train_steps", "2"]


def network(seed=0, model=MODEL):
    return get_network(model, 3, 10, (32, 32), seed)


@pytest.fixture(autouse=True)
def tf32():
    """The precision of the scripts, and of the compiled graphs here."""
    compilation.set_precision("tf32")
    yield
    compilation.set_precision("tf32")


@pytest.fixture(scope="module")
def compiled():
    """MODEL compiled for 16 images of every kind; skips where torch.compile does not work."""
    compilation.set_precision("tf32")
    problem = compilation.compile_batches(network(), SHAPE, last=1000,
                                          **{kind: [SIZE] for kind in compilation.KINDS})
    if problem:
        pytest.skip(problem)
    yield
    compilation.reset()


@pytest.fixture
def calls(monkeypatch):
    """The sizes of the batches that run compiled."""
    sizes, original = [], compilation._torch_compile

    def counted(net, x, layers):
        sizes.append(len(x))
        return original()(net, x, layers)
    monkeypatch.setattr(compilation, "_torch_compile", lambda: counted)
    return sizes


def outputs_and_gradients(function, net, x, wanted, last):
    """What `function` gives for one of the KINDS, as a list of tensors."""
    x = x.clone().requires_grad_(wanted == "input")
    net.requires_grad_(wanted == "parameters")
    with torch.set_grad_enabled(wanted != "none"):
        outputs = function(net, x) if last is None else function(net, x, last)
    outputs = [outputs] if last is None else list(outputs)
    if wanted == "none":
        return outputs
    inputs = [x] if wanted == "input" else list(net.parameters())
    weights = [torch.linspace(-1, 1, out.numel()).view_as(out) for out in outputs]
    return outputs + list(torch.autograd.grad(outputs, inputs, weights))


def close(ours, expected, **tolerances):
    return all(torch.allclose(a, b, **tolerances) for a, b in zip(ours, expected, strict=True))


@pytest.mark.parametrize("kind", compilation.KINDS)
def test_compiled_and_padded_equal_eager(compiled, calls, kind):
    """Scores, embeddings, gradients; of two networks and two batch sizes by one graph."""
    wanted, with_embedding, training = compilation.KINDS[kind]
    last = 1000 if with_embedding else None
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for seed, size in ((1, SIZE), (2, 13)):
        net = network(seed).train(training is not False)
        x = torch.randn(size, *SHAPE)
        function = compilation.embed if with_embedding else compilation.forward
        ours = outputs_and_gradients(function, net, x, wanted, last)
        expected = outputs_and_gradients(compilation.eager_forward, net, x, wanted, last)
        assert close(ours, expected, rtol=1e-3, atol=1e-4)
    assert calls == [SIZE, SIZE]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


def test_which_batches_run_eagerly(compiled, calls, monkeypatch):
    """Too small or large ones, another mode, and padding where the images of a batch interact."""
    net = network().eval().requires_grad_(False)
    for size in (5, 11, 17):
        compilation.forward(net, torch.zeros(size, *SHAPE))
    compilation.forward(network(), torch.zeros(SIZE, *SHAPE, requires_grad=True)[:3])
    compilation.embed(net, torch.zeros(SIZE, *SHAPE), -2)
    assert not calls
    with_norm = network(model="ConvNetBN")
    key = [with_norm.architecture, True, None, "parameters", SIZE]
    monkeypatch.setattr(compilation, "_compiled_keys", {(*key,), (key[0], False, *key[2:])})
    monkeypatch.setattr(compilation, "_torch_compile", lambda: lambda net, x, layers: x)
    x = torch.randn(13, *SHAPE)
    assert compilation.forward(with_norm, x).shape == (13, 10)
    assert torch.equal(compilation.forward(with_norm.eval(), x), x)  # padded, and cut again


def test_bf16_compiled_and_disabled(compiled):
    """Compiled for bf16, a batch inside `disable_bf16` still runs exactly, in its own graph."""
    net, x = network(1).eval(), torch.randn(SIZE, *SHAPE, requires_grad=True)
    with compilation.freeze_parameters(net):
        expected = compilation.eager_forward(net, x)
        compilation.set_precision("bf16")
        assert compilation.compile_batches(net, SHAPE, attacked=[SIZE]) is None
        rough = compilation.forward(net, x)
        with compilation.disable_bf16():
            exact = compilation.forward(net, x)
    assert torch.allclose(exact, expected, atol=1e-5)
    assert not torch.allclose(rough, expected, atol=1e-5)


COMPILE = """
import torch
from networks import get_network
from runtime import compilation
net = get_network("MLP", 3, 10, (32, 32), 0).eval()
problem = compilation.compile_batches(net, (3, 32, 32), scored=[16])
x = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    print(torch.backends.cpu.get_cpu_capability(), problem, len(compilation.compiled_keys()),
          torch.allclose(compilation.forward(net, x), net(x), atol=1e-4))
"""


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512",
                    reason="needs two kinds of instructions")
def test_code_for_one_processor_does_not_run_on_another(compiled, tmp_path):
    """Both use one cache on disk, as on a cluster."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    for capability in ("avx512", "avx2"):
        command = [ROOT / "tests" / "on_processor.sh", capability, sys.executable, "-c", COMPILE]
        printed = subprocess.run(command, capture_output=True, text=True, env=environment,
                                 check=True).stdout
        assert printed.split() == [capability.upper(), "None", "1", "True"]


def test_no_compiler_means_eager(monkeypatch):
    def no_compiler():
        raise RuntimeError("no C++ compiler\nand advice")
    monkeypatch.setattr(compilation, "_torch_compile", no_compiler)
    monkeypatch.setattr(compilation, "_compiled_keys", set())
    net, lines = network(), []
    compilation.compile_planned(net, SHAPE, {"attacked": {128: 1e15}}, lines.append)
    assert lines == ["torch.compile does not work here (RuntimeError: no C++ compiler and advice); "
                     "continuing without it"]
    assert compilation.forward(net, torch.zeros(128, *SHAPE)).shape == (128, 10)
    assert not compilation.compiled_keys()


def test_compiling_leaves_the_network_as_it_was(monkeypatch):
    monkeypatch.setattr(compilation, "_torch_compile", lambda: lambda net, x, layers: net(x))
    monkeypatch.setattr(compilation, "_compiled_keys", set())
    net = network(model="ConvNetBN")
    before = {name: value.clone() for name, value in net.state_dict().items()}
    assert compilation.compile_batches(net, SHAPE, trained=[4], scored=[4]) is None
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert net.training and all(parameter.requires_grad for parameter in net.parameters())
    assert len(compilation.compiled_keys()) == 2


def test_only_what_pays_is_compiled_and_logged(monkeypatch):
    asked, lines, keys = [], [], set()

    def compile_batches(net, shape, last, **sizes):
        asked.append({kind: found for kind, found in sizes.items() if found})
        keys.add(str(sizes))
    monkeypatch.setattr(compilation, "_compiled_keys", keys)
    monkeypatch.setattr(compilation, "compile_batches", compile_batches)

    def compile_planned(**planned):
        compilation.compile_planned(network(), SHAPE, planned, lines.append)
    compile_planned(attacked={128: 1e12, 64: 1e14}, trained={0: 0, 256: 1e13})
    compile_planned(attacked={128: 1e12}, trained={})
    compilation.set_precision("bf16")
    for _ in range(2):
        compile_planned(matched={128: 3e12, 64: 1e11})
    assert asked == [{"attacked": [64], "trained": [256]}, {"matched": [128]}, {"matched": [128]}]
    assert len(lines) == 2 and "attacked [64], trained [256]" in lines[0]


def test_precision(monkeypatch):
    with pytest.raises(ValueError, match="fp64.*fp32, tf32, bf16"):
        compilation.set_precision("fp64")
    net, x = network(), torch.randn(4, *SHAPE)
    exact = compilation.embed(net, x, 1000)
    compilation.set_precision("bf16")
    assert close(compilation.embed(net, x, 1000), exact, rtol=0, atol=0)  # eager, on a CPU
    monkeypatch.setattr(compilation, "_autocast",  # as on a GPU
                        lambda device: torch.autocast("cpu", torch.bfloat16))
    for ours, expected in zip(compilation.embed(net, x, 1000), exact):
        assert ours.dtype == torch.float32 and not torch.equal(ours, expected)
        assert torch.allclose(ours, expected, atol=0.05)


@pytest.mark.parametrize("name, bf16, expected", [("auto", True, "bf16"), ("auto", False, "tf32"),
                                                  ("fp32", True, "fp32")])
def test_automatic_precision(monkeypatch, name, bf16, expected):
    monkeypatch.setattr(compilation, "has_bf16", lambda device: bf16)
    assert compilation.resolve_precision(name, torch.device("cpu")) == expected


@pytest.mark.parametrize("model, last", [("ConvNetW32", 1000), ("ConvNetW32", -1),
                                         ("ConvNetW32", 5), ("ConvNetBN", 1000), ("ConvNetGN", 3),
                                         ("ConvNetMP", 1000), ("ResNet18", -2), ("MLP", 1000)])
def test_compiled_forward_equals_eager_forward(model, last):
    """Before it is compiled, in double precision; parameters that are left out have a gradient."""
    net, x = network(model=model).double(), torch.randn(2, *SHAPE, dtype=torch.double)
    for layers in (None, len(net.features[:last])):
        for wanted in ("input", "parameters"):
            ours, expected = (outputs_and_gradients(function, net, x, wanted, layers) for function
                              in (compilation.compiled_forward, compilation.eager_forward))
            assert close(ours, expected, rtol=1e-8, atol=1e-9)


# ------------------------------------------------------------------------------- in the scripts
def test_fast_iteration_equals_plain_iteration(compiled, calls, request):
    """One outer iteration class by class, as the scripts batch it, and compiled; in double
    precision, since rounding in single precision turns a sign here and there."""
    torch.set_default_dtype(torch.double)
    request.addfinalizer(lambda: torch.set_default_dtype(torch.float))
    bench = benchmark.Bench(benchmark.parse_args([*SMALL, "--threat_model", "pixel"]), "cpu")
    bench.micro_batch = 16  # 80 images = 5 x 16

    def iterate(plain):
        parts = bench.begin()
        start = parts[0].detach().clone()
        bench.iterate(parts, plain)
        weights = torch.cat([p.detach().flatten() for member in parts[2].members
                             for p in member.net.parameters()])
        return parts[0].detach(), weights, start

    with benchmark.plain_mode():
        plain, plain_weights, start = iterate(True)
        eager, eager_weights, _ = iterate(False)
    assert not calls and eager.dtype == torch.double and torch.allclose(eager, plain, atol=1e-9)
    assert torch.allclose(eager_weights, plain_weights, atol=1e-12)
    fast, fast_weights, _ = iterate(False)
    # attacked, embedded, matched (of 40: 16, 16 and 8); pool training
    assert calls == [16] * (5 * 10 + 5 + 2 + 2 * 2 * 11)
    assert (eager - start).flatten(1).norm(dim=1).min() > 1  # every image moved
    assert torch.allclose(fast, eager, atol=1e-9)
    assert torch.allclose(fast_weights, eager_weights, atol=1e-12)


def test_the_benchmark_says_what_it_measured():
    """40 images in all, fewer than a micro-batch: what is measured is all of them."""
    bench = benchmark.Bench(benchmark.parse_args([
        *SMALL, "--model", "ConvNetW32", "--batch_real", "4", "--repeats", "1"]), "cpu")
    images, seconds, passes = benchmark.pgd_step(bench)
    assert images == bench.attacked == passes == 40 and len(seconds) == 1 + len(bench.precisions)


@pytest.mark.parametrize("flag, expected", [([], 1), (["--no_compile"], 0)])
def test_the_script_compiles_unless_told_not_to(monkeypatch, tmp_path, flag, expected):
    planned = []
    monkeypatch.setattr(compilation, "compile_planned",
                        lambda net, shape, batches, log, last: planned.append(batches))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [
        "ROME_cifar10.py", "--dataset", "Digits", "--model", "MLP", "--ipc", "1", "--select",
        "test", "--Iteration", "0", "--num_exp", "1", "--epoch_eval_train", "1", "--test_limit",
        "20", "--no_baseline", *flag])
    ROME_cifar10.main()
    assert len(planned) == expected
    for batches in planned:  # all real images of each class, a pool batch of 256
        assert batches["attacked"][64] > batches["attacked"][20] > 0
        assert batches["trained"][256] > batches["trained"][10] > 0


@pytest.mark.slow
def test_bf16_accuracy(digits):
    """bfloat16 in training and attacks changes clean and robust accuracy by less than 3 points:
    five LeNets on 100 digits, 200 test images."""
    generator = torch.Generator().manual_seed(0)
    images = torch.cat([digits.sample_class(c, 10, generator) for c in range(10)])
    synset = SyntheticSet(images, torch.arange(10).repeat_interleave(10))
    args = ROME_cifar10.parse_args(["--dataset", "Digits", "--model", "LeNet", "--num_eval", "5",
                            "--epoch_eval_train", "100", "--test_limit", "200", "--select", "test"])
    evaluate, means = utils.Evaluator(args, digits, get_threat_model("pixel", digits)), {}
    for precision in ("fp32", "bf16"):
        compilation.set_precision(precision)
        assert compilation.compile_batches(network(model="LeNet"), SHAPE, trained=[100]) is None
        rows = evaluate(synset, 1, 0)
        compilation.reset()
        for column in ("clean_acc", "robust_acc"):
            means[precision, column] = sum(row[column] for row in rows) / 5
    for column in ("clean_acc", "robust_acc"):
        assert abs(means["fp32", column] - means["bf16", column]) < 0.03
    assert means["fp32", "robust_acc"] != means["bf16", "robust_acc"]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_killed_and_resumed_with_everything_compiled(precision, monkeypatch, tmp_path):
    """The same bits, with batches that are compiled, padded, and eager."""
    flags = ["--dataset", "Digits", "--model", "ConvNetW32", "--ipc", "1", "--aug", "--batch_real",
             "7", "--trained_bs", "16", "--model_train_steps", "2", "--Iteration", "4", "--num_exp",
             "1", "--epoch_eval_train", "1", "--test_limit", "20", "--select", "last",
             "--no_baseline", "--threat_model", "pixel", "--precision", precision, "--embed_last",
             "1000"]
    monkeypatch.setattr(compilation, "COMPILE_PAYS", {"cpu": 1e9})
    monkeypatch.setattr(sys, "argv", ["ROME_cifar10.py", *flags])
    images = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        if name == "b":
            sigterm_at(monkeypatch, rome, "pool_step", 3)
            with pytest.raises(Interrupted):
                ROME_cifar10.main()
            compilation.reset()
        ROME_cifar10.main()
        gradients = {gradient for *_, gradient, size in compilation.compiled_keys()}
        assert gradients == {"none", "input", "parameters"}
        (path,) = Path("result").glob("*.pt")
        images.append(torch.load(path, weights_only=True)["data"][0][0])
        compilation.reset()
    assert torch.equal(*images)
