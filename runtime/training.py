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
        correct = (logits.detach().argmax(1) == labels).to(loss.dtype)
        return loss, correct, *_gradients(loss, net)

    loss, correct, *gradients = graphed_call(gradients_of, ("training step", share), net, images,
                                             labels)
    correct = correct.sum()
    distributed.all_reduce_sum([loss, correct, *gradients])
    _step(net, optimizer, gradients)
    return loss, correct


def step_on_set(net, optimizer, images, labels, loss_of, *options):
    """One step with loss_of(logits, labels, *options), in one process. options: hashable."""
    def gradients_of(net, images, labels):
        return _gradients(loss_of(forward(net, images), labels, *options), net)
    key = ("training on a set", loss_of, *options)
    _step(net, optimizer, graphed_call(gradients_of, key, net, images, labels))


def _gradients(loss, net):
    # Contiguous, like the parameters: else an optimizer on CUDA steps tensor by tensor.
    return [gradient.contiguous()
            for gradient in torch.autograd.grad(loss, list(net.parameters()))]


def _step(net, optimizer, gradients):
    for parameter, gradient in zip(net.parameters(), gradients):
        parameter.grad = gradient
    optimizer.step()


def require_finite(values):
    """Raise FloatingPointError naming the first of {name: float} that is not finite."""
    for name, value in values.items():
        if not math.isfinite(value):
            raise FloatingPointError(f"{name} is {value}")
