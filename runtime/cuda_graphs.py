"""CUDA graphs: hundreds of kernel launches become one.

A graph owns a network and inputs. A call copies the caller's values there and replays the graph, so
one graph serves all networks of an architecture. Before its first use it is compared with the same
calls run eagerly.
"""
import copy
from contextlib import contextmanager

import torch

from runtime import compilation, distributed
from runtime.safe_io import InputError

# A value is unequal if it differs by more than this share of the largest one.
TOLERANCE = 1e-2
MOST_UNEQUAL = 0.05  # share of values; a graph that ignores new inputs gets nearly all wrong

_enabled = False
_log = print
_graphs = {}  # {what a graph depends on: GraphedCallable, or None where there can be none}
_pool = None  # memory that all graphs share: every output is copied before the next replay


class CaptureError(InputError):
    """The device refused a capture. CUDA may not work any longer in this process."""


@contextmanager
def use_cuda_graphs(wanted, log=print):
    """Inside, `graphed_call` uses graphs, if wanted and in a single process: a thread that waits
    for others may disturb a capture. log: takes a line."""
    global _enabled, _log
    before = _enabled, _log
    _enabled, _log = wanted and distributed.world_size() == 1, log
    try:
        yield
    finally:
        _enabled, _log = before


def graphed_call(function, key, net, *tensors):
    """function(net, *tensors), a tuple of float tensors, by a CUDA graph where that is possible.

    function: has fixed shapes, draws no random numbers, never makes the host wait, changes neither
    net nor tensors, and depends on nothing else but key. key: a tuple that begins with a name; None
    means no graph. net: of `get_network`. Returns new tensors without autograd history. Raises
    CaptureError.
    """
    architecture = getattr(net, "architecture", None)
    changes_net = net.training and compilation.is_batch_dependent(net)
    if not _enabled or key is None or architecture is None or changes_net:
        return _eagerly(function, net, tensors)
    key = (key, architecture, net.training, next(net.parameters()).requires_grad,
           compilation.precision(), tensors[0].device,
           *((tensor.shape, tensor.dtype) for tensor in tensors))
    if key not in _graphs:
        graph = GraphedCallable(function, net, tensors)
        problem = graph.prepare()
        if problem:
            _log(f"no CUDA graph of {key[0][0]} ({problem}); continuing without it")
        _graphs[key] = None if problem else graph
    graph = _graphs[key]
    return graph(net, *tensors) if graph else _eagerly(function, net, tensors)


def _eagerly(function, net, tensors):
    return tuple(out.detach() for out in function(net, *tensors))


def reset():
    """Free all graphs."""
    global _pool
    _graphs.clear()
    _pool = None


class GraphedCallable:
    """A function with a network and inputs of its own, and the graph of calling it with them."""

    def __init__(self, function, net, tensors):
        self.function, self.net = function, copy.deepcopy(net)  # must live as long as the graph
        self.inputs = [tensor.detach().clone() for tensor in tensors]
        self.state = [*self.net.parameters(), *self.net.buffers()]

    def prepare(self):
        """Capture the graph. Returns None, or in a line why it cannot be used."""
        device, problem = self.inputs[0].device, None
        try:
            warm_up(self._call, device)
        except RuntimeError as error:  # of an operation that this device lacks, or of memory
            problem = str(error).split("\n")[0]
        if problem:  # outside of the handler, whose traceback holds memory
            return problem
        self.outputs, self.replay = capture(self._call, device)
        return None if self._is_right() else "it computes other values than eager calls"

    def _call(self):
        return self.function(self.net, *self.inputs)

    def __call__(self, net, *tensors):
        with torch.no_grad():
            torch._foreach_copy_(self.state, [*net.parameters(), *net.buffers()])
            for target, source in zip(self.inputs, tensors):
                target.copy_(source)
        self.replay()
        outputs = [out.detach() for out in self.outputs]
        results = [torch.empty_like(out) for out in outputs]
        torch._foreach_copy_(results, outputs)
        return tuple(results)

    def _is_right(self):
        """Compare with eager calls, also for another network and other inputs: the graph must
        hold no value of those that it was captured with."""
        other = copy.deepcopy(self.net)
        with torch.no_grad():
            torch._foreach_mul_(list(other.parameters()), 1.01)
        here = [tensor.clone() for tensor in self.inputs]
        rolled = [tensor.roll(1, 0) for tensor in here]
        for net, tensors in ((other, rolled), (copy.deepcopy(self.net), here)):
            expected = _eagerly(self.function, net, tensors)
            for a, b in zip(expected, self(net, *tensors)):
                unequal = (a - b).abs() > TOLERANCE * a.abs().max()
                if unequal.float().mean() > MOST_UNEQUAL or not b.isfinite().all():
                    return False
        return True


def warm_up(function, device):
    """Before a capture: libraries choose kernels, autograd starts its threads."""
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream):
                for _ in range(3):
                    function()
        finally:
            torch.cuda.current_stream().wait_stream(stream)


def capture(function, device):
    """Capture function() -> tensors. Returns (its outputs, replay() that overwrites them).

    Raises CaptureError; torch.cuda.graph then leaves its stream current, which is mended here.
    """
    global _pool
    with torch.cuda.device(device):
        if _pool is None:
            _pool = torch.cuda.graph_pool_handle()
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph, pool=_pool):
                outputs = function()
        except RuntimeError as error:
            torch.cuda.set_stream(stream)
            reason = str(error).split("\n")[0]
            raise CaptureError(f"a CUDA graph could not be captured ({reason}); the same command "
                               "with --no_cuda_graphs goes on") from None
    return outputs, graph.replay
