"""Shapes, gradients, counts of operations and published accuracies of the networks."""
import json

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, SHARED, random_dataset
from torch.utils.flop_counter import FlopCounterMode

import utils
from datasets import load_dataset
from formats.network_file import load_into
from networks import EVAL_MODES, NETWORKS, eval_pool, get_network, network_for
from runtime.cost import forward_flops, least_values_moved
from runtime.safe_io import InputError

RELEASED = sorted((SHARED / "models").glob("*.pth"))


@pytest.mark.parametrize("model", NETWORKS)
def test_every_network(model):
    net = get_network(model, 3, 7, (32, 32), seed=0)
    x = torch.randn(2, 3, 32, 32)
    scores = net(x)
    scores.sum().backward()
    assert scores.shape == (2, 7)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    embedding, same = net.eval().embed_and_classify(x)
    assert torch.allclose(same, net(x), atol=1e-5)
    assert torch.allclose(net.classifier(embedding), same, atol=1e-5)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(x[:1])
    assert forward_flops(net, 3, (32, 32)) == counter.get_total_flops()
    has_batchnorm = any(isinstance(m, torch.nn.BatchNorm2d) for m in net.modules())
    assert has_batchnorm == model.endswith("BN")


def test_convnet_is_the_one_of_the_specification():
    net = get_network("ConvNet", 3, 10, (32, 32), seed=0)
    assert forward_flops(net, 3, (32, 32)) == pytest.approx(2 * 50.6e6, rel=0.005)
    values_out = 128 * (32**2 + 16**2 + 8**2) + 10
    values_in = 3 * 32**2 + 128 * (16**2 + 8**2 + 4**2)
    assert least_values_moved(net, 3, (32, 32)) == 5 * values_out + 4 * values_in
    assert net.embed_and_classify(torch.zeros(1, 3, 32, 32))[0].shape == (1, 2048)
    layers = [*(f"features.{i}" for i in (0, 1, 4, 5, 8, 9)), "classifier"]
    names = {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    assert set(net.state_dict()) == names
    x = torch.randn(4, 128, 8, 8)
    assert torch.allclose(net.features[1](x), torch.nn.InstanceNorm2d(128)(x), atol=1e-5)


def test_embed_last():
    net = get_network("ConvNetW32", 3, 10, (32, 32), seed=0).eval()
    x = torch.randn(2, 3, 32, 32)
    full, scores = net.embed_and_classify(x)
    for last in (1000, 12):
        assert torch.equal(net.embed_and_classify(x, last)[0], full)
    before_pooling, same = net.embed_and_classify(x, -1)  # the default of --embed_last
    pooled = F.avg_pool2d(before_pooling.view(2, 32, 8, 8), 2).flatten(1)
    assert torch.allclose(pooled, full) and torch.equal(same, scores)
    normed, _ = net.embed_and_classify(x, -2)  # the layer after it works in place
    assert normed.min() < 0 and torch.equal(normed.relu().view(2, -1), before_pooling)
    first_block, same = net.embed_and_classify(x, 4)
    assert torch.allclose(same, scores, atol=1e-5)
    assert torch.equal(first_block, net.features[:4](x).flatten(1))


def test_resnet_starts_as_pytorchs_layers_do():
    """Uniform within 1/sqrt(fan-in); torchvision's is normal, by fan-out."""
    net = get_network("ResNet18", 3, 10, (32, 32), seed=0)
    layers = [module for module in net.modules() if isinstance(module, torch.nn.Conv2d)]
    assert len(layers) == 20
    for layer in layers:
        bound = layer.weight[0].numel() ** -0.5
        assert 0.99 * bound < layer.weight.abs().max() <= bound
        assert layer.weight.detach().std() == pytest.approx(bound / 3**0.5, rel=0.05)


def test_seed_and_global_generator():
    state = torch.get_rng_state()
    one, same, other = (get_network("MLP", 3, 10, (32, 32), seed).classifier.weight
                        for seed in (5, 5, 6))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert torch.equal(state, torch.get_rng_state())


def test_names():
    for mode in EVAL_MODES:
        assert set(eval_pool(mode, "ConvNet")) <= set(NETWORKS), mode
    with pytest.raises(ValueError, match="'ConvNett'.*MLP.*ConvNetGN"):
        get_network("ConvNett", 3, 10, (32, 32), 0)


@pytest.mark.parametrize("model, side", [("VGG11", 16), ("ConvNetD4", 15), ("LeNet", 12)])
def test_images_too_small(model, side):
    data = random_dataset(per_class=1)
    data.size = (side, 32)
    with pytest.raises(InputError, match=f"--model {model} cannot.*random, {side}x32 .too small"):
        network_for(data, model, 0)


@pytest.mark.skipif(not RELEASED, reason="no ../shared/models: they are not redistributed")
@pytest.mark.parametrize("path, limit, tolerance", [
    (RELEASED[0] if RELEASED else None, 2000, 0.02),  # two standard errors
    *(pytest.param(path, None, 0.001, marks=pytest.mark.slow) for path in RELEASED)])
def test_released_networks_reach_their_published_accuracy(path, limit, tolerance, cifar10_npz):
    """Architecture, normalisation and data together. Published: on all test images."""
    published, figures = json.loads((ROOT / "published.json").read_text()), {}
    for log in ("ROME", "BACON"):
        rows = published[f"log_transfer_accuracy_fraction_crafted_on_{log}_ipc50"]
        figures |= rows["Clean"]["targeted"]
    data = load_dataset("CIFAR10", cifar10_npz)
    net = load_into(get_network("ConvNet", 3, 10, (32, 32), seed=0), path)
    accuracy = utils.accuracy(net, *data.get_batch("test", slice(limit)), micro_batch=250)
    assert abs(accuracy - figures[path.name.split("_")[0]]) <= tolerance
