"""A stand-in for a CUDA device: tensors that report `cuda:0` and live in the memory of the CPU.

Inside `FakeCuda()` every function of torch is checked before it runs. Refused, as on a real device:
tensors of both devices in one operation (a CPU tensor without dimensions may join), a generator of
the other device, `numpy()` of a device tensor, and, in deterministic mode, the gradient of
grid_sample. Counted: `syncs`, where the host waits for the device, copies included.
"""
import contextlib
from collections import Counter

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

import runtime.device
from runtime import cuda_graphs

CUDA = torch.device("cuda:0")
# Reading a value of a device tensor, or an output whose size depends on values.
WAITS = {"item", "__bool__", "__int__", "__float__", "__index__", "__contains__", "tolist", "cpu",
         "nonzero", "argwhere", "equal", "allclose", "masked_select", "unique", "bincount"}
UNCHECKED = {"__get__", "__set__", "requires_grad_", "as_subclass",
             "_has_compatible_shallow_copy_type"}


class CudaTensor(torch.Tensor):
    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)

    def __deepcopy__(self, memo):
        values = self.detach().clone()
        if isinstance(self, torch.nn.Parameter):
            return torch.nn.Parameter(values, self.requires_grad)
        return values


class CudaGenerator(torch.Generator):
    device = property(lambda self: CUDA)


class EitherGenerator(torch.Generator):
    """In place of torch.Generator."""

    def __new__(cls, device="cpu"):
        if is_cuda(device):
            return super().__new__(CudaGenerator)
        return super().__new__(torch._C.Generator, device)


def on_device(value):
    return isinstance(value, CudaTensor)


def is_cuda(device):
    if device is None or isinstance(device, (int, torch.dtype)):
        return False
    return torch.device(device).type == "cuda"


def tensors_in(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from tensors_in(part)


class FakeCuda(TorchFunctionMode):
    """The device, inside the `with`. syncs: {name of the function: count}."""

    def __init__(self):
        super().__init__()
        self.syncs = Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        if name in UNCHECKED:
            result = func(*args, **kwargs)
            return self._wrap(result) if name == "__get__" and on_device(args[0]) else result
        if name in ("to", "cpu") and isinstance(args[0], torch.Tensor):
            return self._move(func, name, args, kwargs)
        if name == "__format__" and on_device(args[0]):
            self.syncs["item"] += 1
            return format(plain(args[0]), *args[1:])
        given = list(tensors_in(args)) + list(tensors_in(list(kwargs.values())))
        there = [tensor for tensor in given if on_device(tensor)]
        asked = is_cuda(kwargs.get("device"))
        wanted = asked or bool(there) and "device" not in kwargs
        self._check(name, args, given, there)
        self._check_generator(name, kwargs.get("generator"), wanted)
        self._count_waits(name, args, there)
        if asked:
            kwargs["device"] = "cpu"
            self.syncs["copy to the device"] += name in ("tensor", "as_tensor")
        if func is F.interpolate:  # in deterministic mode it makes tensors out of sight
            args, kwargs = plain(args), plain(kwargs)
        result = func(*args, **kwargs)
        return self._wrap(result) if wanted else result

    def _check(self, name, args, given, there):
        if name in ("numpy", "__array__") and there:
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu()")
        mixed = [tensor for tensor in given if not on_device(tensor) and tensor.dim()]
        if name in ("__getitem__", "__setitem__") and on_device(args[0]):
            mixed = []  # an index may be on the CPU; it is copied
        if there and mixed and name not in ("copy_", "set_"):
            raise RuntimeError("Expected all tensors to be on the same device, but found cuda:0 "
                               f"and cpu ({name})")
        if name == "grid_sample" and torch.are_deterministic_algorithms_enabled():
            if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in there):
                raise RuntimeError(f"{name} does not have a deterministic implementation")

    def _check_generator(self, name, generator, wanted):
        if generator is not None and isinstance(generator, CudaGenerator) != wanted:
            raise RuntimeError(f"Expected a '{'cuda' if wanted else 'cpu'}' device type for "
                               f"generator but found '{generator.device.type}' ({name})")

    def _count_waits(self, name, args, there):
        if name in WAITS and there or name == "where" and len(args) == 1:
            self.syncs[name] += 1
        if name == "copy_" and len(there) == 1:
            self.syncs["copy"] += 1
        if name in ("__getitem__", "__setitem__") and on_device(args[0]):
            self.syncs["index"] += any(index.dtype == torch.bool or not on_device(index)
                                       for index in tensors_in(args[1]))

    def _move(self, func, name, args, kwargs):
        """`to` and `cpu`: a copy where the device changes; non_blocking: the host does not wait."""
        tensor, others = args[0], [*args[1:], *kwargs.values()]
        targets = [other for other in others if isinstance(other, (torch.device, str))]
        targets += [other.device for other in others if isinstance(other, torch.Tensor)]
        if name == "cpu":
            targets = ["cpu"]
        to_cuda = is_cuda(targets[0]) if targets else on_device(tensor)

        def on_cpu(value):
            return torch.device("cpu") if isinstance(value, (torch.device, str)) else value
        moved = func(plain(tensor), *map(on_cpu, args[1:]),
                     **{key: on_cpu(value) for key, value in kwargs.items()})
        if to_cuda != on_device(tensor):
            waits = on_device(tensor) or not kwargs.get("non_blocking")
            self.syncs["cpu" if on_device(tensor) else "copy to the device"] += waits
            moved = moved.clone()
        elif moved is tensor:
            return tensor
        return self._wrap(moved) if to_cuda else moved

    def _wrap(self, value):
        if isinstance(value, torch.Tensor):
            return value if on_device(value) else value.as_subclass(CudaTensor)
        if hasattr(value, "_fields"):
            return type(value)(*map(self._wrap, value))
        return type(value)(map(self._wrap, value)) if isinstance(value, (list, tuple)) else value


def plain(value):
    """What is on the device, as it would come out of a file."""
    if isinstance(value, torch.Tensor):
        return value.as_subclass(torch.Tensor)
    if isinstance(value, dict):
        return type(value)((key, plain(part)) for key, part in value.items())
    return type(value)(map(plain, value)) if isinstance(value, (list, tuple)) else value


def run_again(function):
    """In place of a CUDA graph: (outputs, a callable that computes them again, in place)."""
    outputs = function()

    def replay():
        for output, new in zip(outputs, function()):
            output.detach().copy_(new)
    return outputs, replay


@contextlib.contextmanager
def fake_cuda(monkeypatch, memory=80 << 30):
    """A machine with one fake GPU of that many bytes. Yields the FakeCuda."""
    device, save = FakeCuda(), torch.save

    def capture(function, _):
        """Like a CUDA graph, it refuses a function that makes the host wait."""
        before = device.syncs.total()
        captured = run_again(function)
        if device.syncs.total() != before:
            raise cuda_graphs.CaptureError("operation not permitted when stream is capturing")
        return captured
    cuda = {"get_device_name": lambda device=None: "Fake GPU",
            "mem_get_info": lambda device=None: (memory, memory),
            "max_memory_reserved": lambda device=None: memory,
            "synchronize": lambda _=None: device.syncs.update(["synchronize"]),
            "device": lambda device: contextlib.nullcontext(),
            "get_rng_state": lambda device=None: torch.zeros(8, dtype=torch.uint8),
            "set_rng_state": lambda state, device=None: None}
    with monkeypatch.context() as patch:
        patch.setattr(torch, "Generator", EitherGenerator)
        patch.setattr(torch, "save", lambda content, *args: save(plain(content), *args))
        for name, function in cuda.items():
            patch.setattr(torch.cuda, name, function)
        patch.setattr(torch.cuda.random, "manual_seed", lambda seed: None)
        patch.setattr(runtime.device, "count_gpus", lambda: 1)
        patch.setattr(cuda_graphs, "capture", capture)
        patch.setattr(cuda_graphs, "warm_up", lambda function, device: function())
        cuda_graphs.reset()
        # module.to(device) makes new parameters, as the class of the old ones cannot change
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        try:
            with device:
                yield device
        finally:
            cuda_graphs.reset()
            torch.__future__.set_overwrite_module_params_on_conversion(False)
