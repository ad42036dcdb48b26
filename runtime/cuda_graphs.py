"""CUDA graphs: hundreds of kernel launches become one.

A graph owns a network and inputs. A call copies the caller's values there and replays the graph, so
one graph serves all networks of an architecture.
"""
import copy
import warnings
from contextlib import contextmanager

import torch

from runtime import compilation, distributed

_enabled = False
_works = True
_graphs = {}  # {what a graph depends on: GraphedCallable}


@contextmanager
def use_cuda_graphs(wanted):
    """Inside, `graphed_call` uses graphs, if wanted and in a single process: a thread that waits
    for others may disturb a capture."""
    global _enabled
    before, _enabled = _enabled, wanted and _works and distributed.world_size() == 1
    try:
        yield
    finally:
        _enabled = before


def graphed_call(function, key, net, *tensors):
    """function(net, *tensors), a tuple of tensors, by a CUDA graph where that is possible.

    function: has fixed shapes, draws no random numbers, never makes the host wait, changes neither
    net nor tensors, and depends on nothing else but key. key: hashable; None means no graph.
    net: of `get_network`. Returns new tensors without autograd history.
    """
    global _enabled, _works
    architecture = getattr(net, "architecture", None)
    changes_net = net.training and compilation.is_batch_dependent(net)
    if not _enabled or key is None or architecture is None or changes_net:
        return tuple(out.detach() for out in function(net, *tensors))
    key = (key, architecture, net.training, next(net.parameters()).requires_grad,
           compilation.precision(), tensors[0].device,
           *((tensor.shape, tensor.dtype) for tensor in tensors))
    if key not in _graphs:
        try:
            _graphs[key] = GraphedCallable(function, net, tensors)
        except RuntimeError as error:  # of the driver, or of an operation that no graph can hold
            reason = str(error).splitlines()[0]
            warnings.warn(f"no CUDA graphs ({reason}); continuing without them", stacklevel=2)
            _enabled = _works = False
            return graphed_call(function, None, net, *tensors)
    return _graphs[key](net, *tensors)


def reset():
    """Free all graphs."""
    _graphs.clear()


class GraphedCallable:
    """A captured function with its own network and inputs."""

    def __init__(self, function, net, tensors):
        self.function, self.net = function, copy.deepcopy(net)  # must live as long as the graph
        self.inputs = [tensor.detach().clone() for tensor in tensors]
        self.outputs, self.replay = capture(lambda: function(self.net, *self.inputs),
                                            self.inputs[0].device)

    def __call__(self, net, *tensors):
        own = *self.net.parameters(), *self.net.buffers(), *self.inputs
        with torch.no_grad():
            for target, source in zip(own, (*net.parameters(), *net.buffers(), *tensors)):
                target.copy_(source)
        self.replay()
        return tuple(out.detach().clone() for out in self.outputs)


def capture(function, device):
    """Capture function() -> tensors. Returns (its outputs, replay() that overwrites them)."""
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # warm-up: libraries choose kernels, autograd starts its threads
                function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = function()
    return outputs, graph.replay
