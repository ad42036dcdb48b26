"""What a run will cost: counted in forward-backward passes, timed on this device. Source: SPEC 4.

The unit is one image forward through the network and backward to the input. The same counts say
which batches are worth compiling.
"""
import collections
import time

import torch

from runtime import compilation
from runtime.device import synchronise

TRAINING_STEP = 1.5  # forward-backward passes: the gradient of the parameters comes on top
FORWARD = 0.45  # forward-backward passes: no gradient at all
HORIZON = 500  # outer iterations within which compiling must pay; the paper makes 20 000


def forward_flops(net, channel, size):
    """Floating-point operations of one image forward, in convolutions and linear layers.

    A multiply-add counts as two. torch.utils.flop_counter says the same, after two seconds of
    imports.
    """
    flops = []

    def count(layer, inputs, output):
        flops.append(2 * output.numel() * layer.weight[0].numel())

    kinds = (torch.nn.Conv2d, torch.nn.Linear)
    hooks = [layer.register_forward_hook(count) for layer in net.modules()
             if isinstance(layer, kinds)]
    was_training = net.training
    net.eval()
    with torch.no_grad():
        net(torch.zeros(1, channel, *size, device=next(net.parameters()).device))
    net.train(was_training)
    for hook in hooks:
        hook.remove()
    return sum(flops)


def forward_backward_rate(net, data, count):
    """Forward-backward passes a second, measured on `count` real images; about a second."""
    images = data.get_batch("train", slice(count))[0]
    repeats = 1 if data.device.type == "cpu" else 10
    with compilation.freeze_parameters(net.eval()):
        for count in (1, repeats):  # the first is the warm-up
            synchronise(data.device)
            start = time.perf_counter()
            for _ in range(count):
                x = images.clone().requires_grad_()
                torch.autograd.grad(compilation.forward(net, x).sum(), x)
            synchronise(data.device)
    return len(images) * repeats / (time.perf_counter() - start)


# --------------------------------------------------- planned work: {batch size: passes}, a Counter
def micro_batches(images, micro_batch, passes):
    """`images` that go through in micro-batches, `passes` times each."""
    rest = images % micro_batch
    return collections.Counter({micro_batch: (images - rest) * passes, rest: rest * passes})


def training_batches(count, batch, epochs):
    """Training on `count` images in batches of `batch`."""
    passes = TRAINING_STEP * epochs
    work = collections.Counter({min(batch, count): passes * (count // batch) * batch})
    work[count % batch] += passes * (count % batch)
    return work


def compile_planned(net, data, planned, log, embed_last=None):
    """Compile the batches that are worth it. planned: {kind: {batch size: passes}}, the kinds
    being arguments of `compilation.compile_batches`."""
    flops = 2 * forward_flops(net, data.channel, data.size)
    work = {kind: {size: passes * flops for size, passes in batches.items()}
            for kind, batches in planned.items()}
    compilation.compile_planned(net, (data.channel, *data.size), work, log, embed_last)
