"""One training step on a batch that several processes may share."""
import math

import torch
import torch.nn.functional as F

from runtime import distributed
from runtime.compilation import forward
from runtime.cuda_graphs import graphed_call


def training_step(net, optimizer, images, labels, whole):
    """One step on a batch of `whole` images, of which each process has a shard.

    images: (n, C, H, W) normalised; labels: (n,). Returns the mean loss and the number of right
    answers of the whole batch, () tensors without a graph.
    """
    share = len(labels) / whole

    def gradients_of(net, images, labels):
        logits = forward(net, images)
        loss = F.cross_entropy(logits, labels) * share  # summed over the processes: the mean
        correct = (logits.detach().argmax(1) == labels).sum().to(loss.dtype)
        return loss, correct, *torch.autograd.grad(loss, list(net.parameters()))

    loss, correct, *gradients = graphed_call(gradients_of, ("training step", share), net, images,
                                             labels)
    distributed.all_reduce_sum([loss, correct, *gradients])
    for parameter, gradient in zip(net.parameters(), gradients):
        parameter.grad = gradient
    optimizer.step()
    return loss, correct


def require_finite(values):
    """Raise FloatingPointError naming the first of {name: float} that is not finite."""
    for name, value in values.items():
        if not math.isfinite(value):
            raise FloatingPointError(f"{name} is {value}")
