"""What is recorded and played again: all but the capture of a CUDA graph, which a test at the end has where there is a GPU."""
import pytest
import torch
from conftest import random_dataset
from fake_cuda import run_again

from runtime.training import training_step
from attacks import attack, get_threat_model
from runtime import compilation, cuda_graphs
from networks import get_network


@pytest.fixture
def recorded(monkeypatch):
    """In place of CUDA graphs, functions that run again and write where they wrote first. Yields the number of recordings."""
    count = []

    def capture(function, device):
        count.append(device)
        return run_again(function)
    monkeypatch.setattr(cuda_graphs, "capture", capture)
    cuda_graphs.reset()
    yield count
    cuda_graphs.reset()


def attacked(net, data, threat, seed=0, **options):
    x, labels = data.get_batch("train", slice(10))
    return attack(net, x, labels, threat, generator=torch.Generator().manual_seed(seed), micro_batch=4, **options)


def trained(net, data, steps=3):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    said = [training_step(net.train(), optimizer, *data.get_batch("train", slice(4 * k, 4 * k + 4)), whole=4)
            for k in range(steps)]
    return [*torch.stack([value for pair in said for value in pair]).tolist(), *(p.detach().clone() for p in net.parameters())]


def same(one, other):
    return all(a == b if isinstance(a, float) else torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("threat_model", ["published", "pixel"])
def test_attacks_by_recordings_of_another_network(recorded, threat_model):
    """Two recordings, of whole and last chunks, serve three networks; as without, and unlike each other."""
    data = random_dataset()
    threat = get_threat_model(threat_model, data)
    nets = [get_network("ConvNetW32", 3, 10, (32, 32), seed).eval() for seed in range(3)]
    plain = [attacked(net, data, threat, seed) for seed, net in enumerate(nets)]
    with cuda_graphs.use_cuda_graphs(True):
        played = [attacked(net, data, threat, seed) for seed, net in enumerate(nets)]
        assert all(map(torch.equal, plain, played)) and not torch.equal(played[0], played[1]) and len(recorded) == 2
        attacked(nets[0], data, threat, eps=4 / 255)  # what a recording depends on
        attacked(nets[0], data, threat, targeted=False)
        assert len(recorded) == 6
        attacked(nets[0], data, threat, name="FGSM")
        attacked(nets[0], data, threat, name="CW", targeted=False)  # whose passes depend on the images
        assert len(recorded) == 6
    attacked(nets[0], data, threat)
    assert len(recorded) == 6 and not any(parameter.grad is not None for net in nets for parameter in net.parameters())


def test_training_by_recordings(recorded):
    """Weights to the last bit, what is said of each step too; one recording for all networks of an architecture."""
    data = random_dataset()
    plain = [trained(get_network("ConvNetW32", 3, 10, (32, 32), seed), data) for seed in range(2)]
    with cuda_graphs.use_cuda_graphs(True):
        played = [trained(get_network("ConvNetW32", 3, 10, (32, 32), seed), data) for seed in range(2)]
    assert all(map(same, plain, played)) and not same(*played) and len(recorded) == 1


def test_what_cannot_be_recorded_just_runs(recorded):
    """A network that a training pass alters, or that draws random numbers: its own statistics change."""
    data, net = random_dataset(), get_network("ConvNetBN", 3, 10, (32, 32), 0)
    before = {name: value.clone() for name, value in net.named_buffers()}
    with cuda_graphs.use_cuda_graphs(True):
        trained(net, data, steps=1)
    assert not recorded and any(not torch.equal(value, before[name]) for name, value in net.named_buffers())
    with cuda_graphs.use_cuda_graphs(True):
        first, second = ((net.eval().requires_grad_(False)(torch.ones(2, 3, 32, 32) * k)) for k in (1, 2))
        ours = [cuda_graphs.graphed_call(lambda net, x: (net(x),), "scores", net, torch.ones(2, 3, 32, 32) * k)[0] for k in (1, 2)]
    assert torch.equal(first, ours[0]) and torch.equal(second, ours[1]) and len(recorded) == 1  # in eval mode it can


def test_where_recording_fails_the_run_goes_on(recorded, monkeypatch):
    def refused(function, device):
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")
    data = random_dataset()
    threat, net = get_threat_model("pixel", data), get_network("ConvNetW32", 3, 10, (32, 32), 0).eval()
    plain = attacked(net, data, threat)
    monkeypatch.setattr(cuda_graphs, "capture", refused)
    monkeypatch.setattr(cuda_graphs, "_works", True)
    with pytest.warns(UserWarning, match="no CUDA graphs .CUDA error: operation not permitted.*going on") as said:
        for _ in range(2):
            with cuda_graphs.use_cuda_graphs(True):
                assert torch.equal(attacked(net, data, threat), plain)
    assert len(said) == 1 and "more" not in str(said[0].message)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_real_graphs(precision):
    device, data = torch.device("cuda"), random_dataset()
    data = type(data)("random", data.images, data.labels, data.classes, data.mean, data.std, device)
    threat = get_threat_model("pixel", data)
    compilation.set_precision(precision)
    cuda_graphs.reset()
    try:
        def run(seed):
            net = get_network("ConvNetW32", 3, 10, (32, 32), seed, device)
            x, labels = data.get_batch("train", slice(10))
            adv = attack(net.eval(), x, labels, threat, generator=torch.Generator(device).manual_seed(seed), micro_batch=4)
            return adv, trained(net, data)
        plain = [run(seed) for seed in range(2)]
        with cuda_graphs.use_cuda_graphs(True):
            played = [run(seed) for seed in range(2)]
        for (adv, weights), (other, others) in zip(plain, played):
            assert ((adv - other).abs() > 1e-4).float().mean() < 0.01
            assert all(a == pytest.approx(b, rel=1e-3) if isinstance(a, float) else torch.allclose(a, b, atol=1e-3)
                       for a, b in zip(weights, others))
    finally:
        cuda_graphs.reset()
        compilation.set_precision("fp32")
