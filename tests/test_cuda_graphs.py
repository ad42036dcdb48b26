"""`graphed_call` without a GPU, where `capture` is replaced; real graphs at the end."""
import sys
import weakref

import pytest
import torch
from conftest import random_dataset
from fake_cuda import run_again

from attacks import attack, get_threat_model
from networks import get_network
from runtime import compilation, cuda_graphs
from runtime.command_line import run_script
from runtime.training import training_step


@pytest.fixture
def captures(monkeypatch):
    """Functions that run again and write where they wrote first, in place of CUDA graphs."""
    count = []

    def capture(function, device):
        count.append(device)
        return run_again(function)
    monkeypatch.setattr(cuda_graphs, "capture", capture)
    monkeypatch.setattr(cuda_graphs, "warm_up", lambda function, device: function())
    cuda_graphs.reset()
    yield count
    cuda_graphs.reset()


def network(seed=0, model="ConvNetW32", device="cpu"):
    return get_network(model, 3, 10, (32, 32), seed, device)


def attacked(net, data, threat, seed=0, **options):
    x, labels = data.get_batch("train", slice(10))
    generator = torch.Generator(data.device).manual_seed(seed)
    return attack(net.eval(), x, labels, threat, generator=generator, micro_batch=4, **options)


def trained(net, data, steps=3):
    """Losses and counts of the steps, then the weights."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    values = []
    for k in range(steps):
        batch = data.get_batch("train", slice(4 * k, 4 * k + 4))
        values += training_step(net.train(), optimizer, *batch, whole=4)
    return [*values, *(parameter.detach().clone() for parameter in net.parameters())]


def same(one, other):
    return all(map(torch.equal, one, other))


def test_attacks_share_graphs_between_networks(captures):
    """One graph for whole micro-batches and one for the last; nothing that they depend on is
    shared, and attacks whose passes depend on the images have none."""
    data = random_dataset()
    threat = get_threat_model("published", data)
    nets = [network(seed) for seed in range(3)]
    eager = [attacked(net, data, threat, seed) for seed, net in enumerate(nets)]
    with cuda_graphs.use_cuda_graphs(True):
        graphed = [attacked(net, data, threat, seed) for seed, net in enumerate(nets)]
        assert same(eager, graphed) and not torch.equal(*graphed[:2]) and len(captures) == 2
        attacked(nets[0], data, threat, eps=4 / 255)
        attacked(nets[0], data, threat, targeted=False)
        assert len(captures) == 6
        attacked(nets[0], data, threat, name="FGSM")
    attacked(nets[0], data, threat)
    assert len(captures) == 6 and all(p.grad is None for net in nets for p in net.parameters())


def test_training_shares_a_graph_between_networks(captures):
    data = random_dataset()
    eager = [trained(network(seed), data) for seed in range(2)]
    with cuda_graphs.use_cuda_graphs(True):
        graphed = [trained(network(seed), data) for seed in range(2)]
    assert all(map(same, eager, graphed)) and not same(*graphed) and len(captures) == 1


def test_a_network_that_training_changes_has_no_graph(captures):
    """Running statistics of BatchNorm still change; in eval mode there is a graph."""
    data, net = random_dataset(), network(model="ConvNetBN")
    before = net.features[1].running_mean.clone()
    with cuda_graphs.use_cuda_graphs(True):
        trained(net, data, steps=1)
        assert not captures and not torch.equal(net.features[1].running_mean, before)
        net.eval().requires_grad_(False)
        for k in (1, 2):
            x = torch.ones(2, 3, 32, 32) * k
            (scores,) = cuda_graphs.graphed_call(lambda net, x: (net(x),), ("scores",), net, x)
            assert torch.equal(scores, net(x)) and len(captures) == 1


def test_where_the_warm_up_fails_the_run_continues(captures, monkeypatch):
    """It is said once, and what the attempt held is free before the eager call needs memory."""
    held, lines = [], []

    def warm_up(function, device):
        buffer = torch.ones(3)
        held.append(weakref.ref(buffer))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore")

    def scores(net, x):
        assert all(buffer() is None for buffer in held)
        return net(x),
    monkeypatch.setattr(cuda_graphs, "warm_up", warm_up)
    net, x = network(), torch.ones(2, 3, 32, 32)
    for _ in range(2):
        with cuda_graphs.use_cuda_graphs(True, lines.append):
            (out,) = cuda_graphs.graphed_call(scores, ("scores",), net, x)
        assert torch.equal(out, net(x))
    assert held and lines == ["no CUDA graph of scores (CUDA out of memory. Tried to allocate 2.00 "
                              "GiB); continuing without it"]


def test_a_failed_capture_ends_the_run_in_one_line(captures, monkeypatch, capsys):
    """CUDA cannot be trusted in that process any longer."""
    def refused(function, device):
        raise cuda_graphs.CaptureError("a CUDA graph could not be captured; --no_cuda_graphs")

    def main():
        with cuda_graphs.use_cuda_graphs(True):
            trained(network(), random_dataset())
    monkeypatch.setattr(cuda_graphs, "capture", refused)
    monkeypatch.setattr(sys, "argv", ["ROME_cifar10.py"])
    with pytest.raises(SystemExit) as stop:
        run_script(main)
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 1 and "--no_cuda_graphs" in line


def test_a_graph_that_ignores_new_inputs_is_not_used(captures, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "capture", lambda f, device: (f(), lambda: None))
    data, lines = random_dataset(), []
    eager = trained(network(), data)
    with cuda_graphs.use_cuda_graphs(True, lines.append):
        assert same(trained(network(), data), eager)
    assert lines == ["no CUDA graph of training step (it computes other values than eager calls); "
                     "continuing without it"]


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_real_graphs(precision, request):
    request.addfinalizer(lambda: compilation.set_precision("fp32"))
    request.addfinalizer(cuda_graphs.reset)
    compilation.set_precision(precision)
    data = random_dataset(device="cuda")
    threat = get_threat_model("pixel", data)

    def run(seed):
        net = network(seed, device=data.device)
        return attacked(net, data, threat, seed), trained(net, data)
    eager = [run(seed) for seed in range(2)]
    with cuda_graphs.use_cuda_graphs(True):
        graphed = [run(seed) for seed in range(2)]
    for (x_adv, weights), (expected, expected_weights) in zip(graphed, eager):
        assert ((x_adv - expected).abs() > 1e-4).float().mean() < 0.01
        for ours, theirs in zip(weights, expected_weights):
            assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3)
