"""CUDA graphs: what a network does to a batch is recorded once and played again, so that its hundreds of launches become one.

*Performance-impacting*, nothing else. A recording has a network and inputs of its own. To play it, the parameters of the
network at hand and its inputs are copied there: one recording serves all networks of an architecture, those of a pool too, and
holds nothing between two plays that a saved state would need. What is recorded is the function that runs without graphs as
well; tests/test_graphs.py runs all but `capture` without a GPU.
"""
import copy
import warnings
from contextlib import contextmanager

import torch

from runtime import compilation, distributed

_playing, _works = False, True
_recordings = {}  # what was recorded: GraphedCallable


@contextmanager
def use_cuda_graphs(wanted):
    """What `play` is given inside is recorded and played, if `wanted`; else just run. Of several processes none records: the
    threads that wait for the others may disturb it."""
    global _playing
    kept, _playing = _playing, wanted and _works and distributed.world_size() == 1
    try:
        yield
    finally:
        _playing = kept


def graphed_call(function, key, net, *tensors):
    """function(net, *tensors), a tuple of tensors, by a recording where there is to be one.

    function: of fixed shapes, without random numbers, without anything that makes the host wait; it alters neither `net` nor
    the tensors, and depends on nothing else but what `key`, hashable, says. key None: never recorded. net: of `get_network`.
    tensors: on one device.
    Returns new tensors, without a graph of autograd.
    """
    global _playing, _works
    architecture = getattr(net, "architecture", None)
    if not _playing or key is None or architecture is None or net.training and compilation.is_batch_dependent(net):
        return tuple(out.detach() for out in function(net, *tensors))
    kind = (key, architecture, net.training, next(net.parameters()).requires_grad, compilation.precision(), tensors[0].device,
            *((tensor.shape, tensor.dtype) for tensor in tensors))
    if kind not in _recordings:
        try:
            _recordings[kind] = GraphedCallable(function, net, tensors)
        except RuntimeError as error:  # of the driver, or an operation that cannot be recorded
            warnings.warn(f"no CUDA graphs ({str(error).splitlines()[0][:200]}); going on without", stacklevel=2)
            _playing = _works = False
            return graphed_call(function, key, net, *tensors)
    return _recordings[kind](net, *tensors)


def reset():
    """Free what was recorded."""
    _recordings.clear()


class GraphedCallable:
    """One function, on a network and inputs of its own."""

    def __init__(self, function, net, tensors):
        self.function, self.net = function, copy.deepcopy(net)  # what the function refers to must live as long as this does
        self.inputs = [tensor.detach().clone() for tensor in tensors]
        self.outputs, self.again = capture(lambda: function(self.net, *self.inputs), self.inputs[0].device)

    def __call__(self, net, *tensors):
        with torch.no_grad():
            for own, given in zip((*self.net.parameters(), *self.net.buffers(), *self.inputs),
                                  (*net.parameters(), *net.buffers(), *tensors)):
                own.copy_(given)
        self.again()
        return tuple(out.detach().clone() for out in self.outputs)


def capture(function, device):
    """Run `function`, () -> tensors, and record it. Returns (its outputs, a callable that computes them again, in place)."""
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # libraries choose their kernels, autograd makes its threads
                function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = function()
    return outputs, graph.replay
