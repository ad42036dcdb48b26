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
    return sum(2 * values_out * layer.weight[0].numel()
               for layer, _, values_out in _layers(net, channel, size))


def least_values_moved(net, channel, size):
    """Values that one image forward and backward to the input must read from memory or write to it.

    Norm, ReLU and pooling between two layers count as one reader and one writer. So a layer's
    output is written once and read twice, in the norm and in its backward; its gradient, the
    layer's input and that one's gradient are written and read once.
    """
    return sum(5 * values_out + 4 * values_in
               for _, values_in, values_out in _layers(net, channel, size))


def _layers(net, channel, size):
    """The convolutions and linear layers: [(layer, values of its input, of its output), ...]."""
    found = []

    def note(layer, inputs, output):
        found.append((layer, inputs[0].numel(), output.numel()))

    kinds = (torch.nn.Conv2d, torch.nn.Linear)
    hooks = [layer.register_forward_hook(note) for layer in net.modules()
             if isinstance(layer, kinds)]
    was_training = net.training
    net.eval()
    with torch.no_grad():
        net(torch.zeros(1, channel, *size, device=next(net.parameters()).device))
    net.train(was_training)
    for hook in hooks:
        hook.remove()
    return found


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
