"""Compiled and padded batches against eager ones; precision."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_in, sigterm_at

import benchmark
import rome
import ROME_cifar10
from networks import get_network
from runtime import compilation
from runtime.checkpoint import Interrupted
from runtime.cost import forward_flops

MODEL, SHAPE, SIZE = "ConvNetD1", (3, 32, 32), 16
SMALL = (f"--model {MODEL} --ipc 1 --batch_real 8 --trained_bs 16 --model_train_steps 2 "
         "--threat_model pixel").split()


def network(seed=0, model=MODEL):
    return get_network(model, 3, 10, (32, 32), seed)


@pytest.fixture(autouse=True)
def tf32():
    """The precision of the scripts, and of the compiled graphs here."""
    compilation.set_precision("tf32")
    yield
    compilation.set_precision("tf32")


@pytest.fixture(scope="module")
def graphs():
    """MODEL compiled for 16 images of every kind, in double precision: no error hides in rounding;
    skips where torch.compile does not work."""
    compilation.set_precision("tf32")
    torch.set_default_dtype(torch.double)
    problem = compilation.compile_batches(network(), SHAPE, last=1000,
                                          **{kind: [SIZE] for kind in compilation.KINDS})
    torch.set_default_dtype(torch.float)
    if problem:
        pytest.skip(problem)
    yield
    compilation.reset()


@pytest.fixture
def compiled(graphs, monkeypatch):
    """In double precision with those graphs; the sizes of the batches that run compiled."""
    sizes, original = [], compilation._torch_compile

    def counted(net, x, layers):
        sizes.append(len(x))
        return original()(net, x, layers)
    monkeypatch.setattr(compilation, "_torch_compile", lambda: counted)
    torch.set_default_dtype(torch.double)
    yield sizes
    torch.set_default_dtype(torch.float)


@pytest.fixture
def no_keys(monkeypatch):
    """Nothing is compiled yet; what is, is forgotten after the test."""
    monkeypatch.setattr(compilation, "_compiled_keys", keys := set())
    return keys


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


def assert_equals_eager(function, *arguments):
    expected = outputs_and_gradients(compilation.eager_forward, *arguments)
    for a, b in zip(outputs_and_gradients(function, *arguments), expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("kind", compilation.KINDS)
def test_compiled_and_padded_equal_eager(compiled, kind):
    """Scores, embeddings, gradients; of two networks and two batch sizes by one graph."""
    wanted, with_embedding, training = compilation.KINDS[kind]
    function = compilation.embed if with_embedding else compilation.forward
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for seed, size in ((1, SIZE), (2, 13)):
        net = network(seed).train(training is not False)
        assert_equals_eager(function, net, torch.randn(size, *SHAPE), wanted,
                            1000 if with_embedding else None)
    assert compiled == [SIZE, SIZE]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


@pytest.mark.parametrize("model, last", [
    ("ConvNetW32", 1000), ("ConvNetW32", -1), ("ConvNetW32", 5), ("ConvNetBN", 1000),
    ("ConvNetGN", 3), ("ConvNetMP", 1000), ("LeNet", -3), ("MLP", 1000)])
def test_compiled_forward_equals_eager_forward(model, last):
    """Before it is compiled, in double precision; parameters that are left out have a gradient."""
    net, x = network(model=model).double(), torch.randn(2, *SHAPE, dtype=torch.double)
    for layers in (None, len(net.features[:last])):
        for wanted in ("input", "parameters"):
            assert_equals_eager(compilation.compiled_forward, net, x, wanted, layers)


def test_which_batches_run_eagerly(compiled, monkeypatch):
    """Too small or large ones, another mode, and padding where the images of a batch interact."""
    net = network().eval().requires_grad_(False)
    for size in (5, 11, 17):
        compilation.forward(net, torch.zeros(size, *SHAPE))
    compilation.forward(network(), torch.zeros(SIZE, *SHAPE, requires_grad=True)[:3])
    compilation.embed(net, torch.zeros(SIZE, *SHAPE), -2)
    assert not compiled
    with_norm = network(model="ConvNetBN")
    key = [with_norm.architecture, True, None, "parameters", SIZE]
    monkeypatch.setattr(compilation, "_compiled_keys", {(*key,), (key[0], False, *key[2:])})
    monkeypatch.setattr(compilation, "_torch_compile", lambda: lambda net, x, layers: x)
    x = torch.randn(13, *SHAPE)
    assert compilation.forward(with_norm, x).shape == (13, 10)
    assert torch.equal(compilation.forward(with_norm.eval(), x), x)  # padded, and cut again


# ------------------------------------------------------------------------------------ precision
def test_bf16_compiled_and_disabled(no_keys):
    """Compiled for bf16, a batch inside `disable_bf16` still runs exactly, in its own graph."""
    net, x = network(1).eval(), torch.randn(SIZE, *SHAPE)
    compilation.set_precision("bf16")
    if problem := compilation.compile_batches(net, SHAPE, scored=[SIZE]):
        pytest.skip(problem)
    with torch.no_grad():
        expected, rough = compilation.eager_forward(net, x), compilation.forward(net, x)
        with compilation.disable_bf16():
            assert torch.allclose(compilation.forward(net, x), expected, atol=1e-5)
    assert 1e-4 < (rough - expected).abs().max() < 0.05


def test_precision(monkeypatch):
    with pytest.raises(ValueError, match="fp64.*fp32, tf32, bf16"):
        compilation.set_precision("fp64")
    net, x = network(), torch.randn(4, *SHAPE)
    exact = compilation.embed(net, x, 1000)
    compilation.set_precision("bf16")
    assert all(map(torch.equal, compilation.embed(net, x, 1000), exact))  # eager, on a CPU
    monkeypatch.setattr(compilation, "_autocast",  # as on a GPU
                        lambda device: torch.autocast("cpu", torch.bfloat16))
    for ours, expected in zip(compilation.embed(net, x, 1000), exact):
        assert ours.dtype == torch.float32 and not torch.equal(ours, expected)
        assert torch.allclose(ours, expected, atol=0.05)
    for name, bf16, expected in (("auto", True, "bf16"), ("auto", False, "tf32"),
                                 ("fp32", True, "fp32")):
        monkeypatch.setattr(compilation, "has_bf16", lambda device, bf16=bf16: bf16)
        assert compilation.resolve_precision(name, torch.device("cpu")) == expected


# ------------------------------------------------------------------------- what is compiled, where
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


@pytest.mark.slow
@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512",
                    reason="needs two kinds of instructions")
def test_code_for_one_processor_does_not_run_on_another(tmp_path):
    """Both use one cache on disk, as on a cluster."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    for capability in ("avx512", "avx2"):
        command = [ROOT / "tests" / "on_processor.sh", capability, sys.executable, "-c", COMPILE]
        printed = subprocess.check_output(command, text=True, env=environment)
        assert printed.split() == [capability.upper(), "None", "1", "True"]


def test_no_compiler_means_eager(monkeypatch, no_keys):
    def no_compiler():
        raise RuntimeError("no C++ compiler\nand advice")
    monkeypatch.setattr(compilation, "_torch_compile", no_compiler)
    net, lines = network(), []
    compilation.compile_planned(net, SHAPE, {"attacked": {128: 1e15}}, lines.append)
    (line,) = lines
    assert "no C++ compiler and advice" in line and not no_keys
    assert compilation.forward(net, torch.zeros(128, *SHAPE)).shape == (128, 10)


def test_compiling_and_counting_leave_the_network_as_it_was(monkeypatch, no_keys):
    monkeypatch.setattr(compilation, "_torch_compile", lambda: lambda net, x, layers: net(x))
    net = network(model="ConvNetBN")
    before = {name: value.clone() for name, value in net.state_dict().items()}
    assert compilation.compile_batches(net, SHAPE, trained=[4], scored=[4]) is None
    forward_flops(net, 3, (32, 32))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert net.training and all(parameter.requires_grad for parameter in net.parameters())
    assert len(no_keys) == 2


def test_only_what_pays_is_compiled_and_logged(monkeypatch, no_keys):
    asked, lines = [], []

    def compile_batches(net, shape, last, **sizes):
        asked.append(sizes)
        no_keys.add(str(sizes))
    monkeypatch.setattr(compilation, "compile_batches", compile_batches)

    def compile_planned(**planned):
        compilation.compile_planned(network(), SHAPE, planned, lines.append)
    compile_planned(attacked={128: 1e12, 64: 1e14}, trained={0: 0, 256: 1e13})
    compile_planned(attacked={128: 1e12}, trained={})
    compilation.set_precision("bf16")
    for _ in range(2):
        compile_planned(matched={128: 3e12, 64: 1e11})
    assert asked == [{"attacked": [64], "trained": [256]}, {"matched": [128]}, {"matched": [128]}]
    assert len(lines) == 2 and "[256]" in lines[0]


# ------------------------------------------------------------------------------- in the scripts
def test_fast_iteration_equals_plain_iteration(compiled):
    """One outer iteration class by class, as the scripts batch it, and compiled."""
    bench = benchmark.Bench(benchmark.parse_args(SMALL), "cpu")
    bench.micro_batch, bench.flags.attack_steps = 16, 3  # 80 images = 5 x 16

    def iterate(plain):
        """Images before and after, weights of the pool."""
        image_syn, optimizer_img, pool, rng = bench.begin()
        start = image_syn.detach().clone()
        bench.iterate((image_syn, optimizer_img, pool, rng), plain)
        weights = [p.detach().flatten() for member in pool.members
                   for p in member.net.parameters()]
        return start, image_syn.detach(), torch.cat(weights)

    with benchmark.plain_mode():
        plain, eager = iterate(True), iterate(False)
    assert not compiled and eager[1].dtype == torch.double
    assert (eager[1] - eager[0]).flatten(1).norm(dim=1).min() > 1  # every image moved
    fast = iterate(False)
    # attacked, embedded, matched (of 40: 16, 16 and 8); pool training
    assert compiled == [16] * (5 * 3 + 5 + 2 + 2 * 2 * 4)
    for other in (plain, fast):
        assert torch.allclose(eager[1], other[1], atol=1e-9)
        assert torch.allclose(eager[2], other[2], atol=1e-12)


def test_the_benchmark_says_what_it_measured():
    """40 images in all, fewer than a micro-batch: what is measured is all of them."""
    flags = [*SMALL, "--model", "MLP", "--batch_real", "4", "--repeats", "1"]
    bench = benchmark.Bench(benchmark.parse_args(flags), "cpu")
    images, seconds, passes = benchmark.pgd_step(bench)
    assert images == bench.attacked == passes == 40 and len(seconds) == 1 + len(bench.precisions)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_killed_and_resumed_with_everything_compiled(precision, monkeypatch, tmp_path):
    """The same bits, with batches that are compiled, padded, and eager."""
    flags = [*SMALL, *f"""--dataset Digits --model ConvNetW32 --aug --batch_real 7 --Iteration 4
        --num_exp 1 --epoch_eval_train 1 --test_limit 20 --select last --no_baseline --embed_last
        1000 --precision {precision}""".split()]
    monkeypatch.setattr(compilation, "COMPILE_PAYS", {"cpu": 1e9})
    images = []
    for name in ("a", "b"):
        if name == "b":
            sigterm_at(monkeypatch, rome, "pool_step", 3)
            with pytest.raises(Interrupted):
                run_in(monkeypatch, ROME_cifar10, tmp_path / name, *flags)
            compilation.reset()
        run_in(monkeypatch, ROME_cifar10, tmp_path / name, *flags)
        gradients = {gradient for *_, gradient, size in compilation.compiled_keys()}
        assert gradients == {"none", "input", "parameters"}
        (path,) = Path("result").glob("*.pt")
        images.append(torch.load(path, weights_only=True)["data"][0][0])
        compilation.reset()
    assert torch.equal(*images)
