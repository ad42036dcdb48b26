"""A stand-in for a CUDA device: tensors that say `cuda:0` and hold their values in the memory of the CPU.

Inside `FakeCuda()` every function of torch is looked at before it runs. What is refused, as on a real device: tensors of both
devices in one operation (a CPU tensor without dimensions may take part), a generator of the other device, `numpy()` of a device
tensor, and, in deterministic mode, differentiating an operation that has no deterministic CUDA implementation. What is counted:
`syncs`, the places where the host waits for the device, copies from and to it included.

Not checked by it: real launches, cuDNN, rounding, timings, memory, several devices, compiled graphs.
"""
import contextlib
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from runtime import cuda_graphs

CUDA = torch.device("cuda:0")
# Reading a value out of a device tensor, or an output whose size depends on values.
WAITS = {"item", "__bool__", "__int__", "__float__", "__index__", "__contains__", "tolist", "cpu", "nonzero", "argwhere",
         "equal", "allclose", "is_nonzero", "masked_select", "unique", "bincount"}
# Of those that the scripts could meet. Source: torch.use_deterministic_algorithms. (F.interpolate is listed there too, but is
# computed in another way in deterministic mode.)
NOT_DIFFERENTIABLE_REPEATABLY = {F.grid_sample, torch.grid_sampler, F.adaptive_max_pool2d, torch.median, torch.histc}


class CudaTensor(torch.Tensor):
    """A tensor that says that it is on `cuda:0`."""

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)

    def __deepcopy__(self, memo):
        values = self.detach().clone()
        return torch.nn.Parameter(values, self.requires_grad) if isinstance(self, torch.nn.Parameter) else values


class CudaGenerator(torch.Generator):
    device = property(lambda self: CUDA)


class EitherGenerator(torch.Generator):
    """Takes the place of torch.Generator: makes one of the device that is asked for."""

    def __new__(cls, device="cpu"):
        return super().__new__(CudaGenerator) if is_cuda(device) else super().__new__(torch._C.Generator, device)


def on_device(value):
    return isinstance(value, CudaTensor)


def tensors_in(value):
    """The tensors among arguments, in lists and tuples too."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from tensors_in(part)


def is_cuda(device):
    return device is not None and not isinstance(device, (int, torch.dtype)) and torch.device(device).type == "cuda"


class FakeCuda(TorchFunctionMode):
    """The device, from here to the end of the `with`. syncs: {name of the function: count}."""

    def __init__(self):
        super().__init__()
        self.syncs = {}

    def count(self, name):
        self.syncs[name] = self.syncs.get(name, 0) + 1

    # ------------------------------------------------------------------------------------------------ operations of torch
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        if name in ("__get__", "__set__", "requires_grad_", "as_subclass", "_has_compatible_shallow_copy_type"):
            result = func(*args, **kwargs)
            return self._wrap(result) if name == "__get__" and on_device(args[0]) else result  # .grad, .data
        if name in ("to", "cpu") and isinstance(args[0], torch.Tensor):
            return self._move(func, name, args, kwargs)
        if name == "__format__" and on_device(args[0]):
            self.count("item")
            return format(plain(args[0]), *args[1:])
        given = list(tensors_in(args)) + list(tensors_in(list(kwargs.values())))
        there = [t for t in given if on_device(t)]
        self._check(func, name, args, given, there)
        wanted = is_cuda(kwargs.get("device")) or (bool(there) and "device" not in kwargs)
        generator = kwargs.get("generator")
        if generator is not None and isinstance(generator, CudaGenerator) != wanted:
            raise RuntimeError(f"Expected a '{'cuda' if wanted else 'cpu'}' device type for generator but found "
                               f"'{generator.device.type}' ({name})")
        if is_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
            if name in ("tensor", "as_tensor"):
                self.count("copy to the device")
        if name in WAITS and there or name == "where" and len(args) == 1:
            self.count(name)
        if name == "copy_" and len(there) == 1:
            self.count("copy")
        if name in ("__getitem__", "__setitem__"):
            index = list(tensors_in(args[1])) if len(args) > 1 else []
            if on_device(args[0]) and any(i.dtype in (torch.bool, torch.uint8) or not on_device(i) for i in index):
                self.count("index")
        if func is F.interpolate:  # in deterministic mode it takes another way, which makes tensors where this is not looked at
            args, kwargs = plain(args), plain(kwargs)
        result = func(*args, **kwargs)
        return self._wrap(result) if wanted else result

    def _check(self, func, name, args, given, there):
        if name in ("numpy", "__array__") and there:
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy it first")
        mixed = [t for t in given if not on_device(t) and t.dim()]
        if name in ("__getitem__", "__setitem__") and on_device(args[0]):
            mixed = []  # an index may be on the CPU; it is copied
        if there and mixed and name not in ("copy_", "set_"):
            raise RuntimeError(f"Expected all tensors to be on the same device, but found cuda:0 and cpu ({name})")
        if (there and torch.are_deterministic_algorithms_enabled() and func in NOT_DIFFERENTIABLE_REPEATABLY
                and torch.is_grad_enabled() and any(t.requires_grad for t in there)):
            raise RuntimeError(f"{name}_backward_cuda does not have a deterministic implementation")

    def _move(self, func, name, args, kwargs):
        """`to` and `cpu`: a copy where the device changes."""
        tensor, others = args[0], [*args[1:], *kwargs.values()]
        target = next((o for o in others if isinstance(o, (torch.device, str))), None)
        if name == "cpu":
            target = "cpu"
        elif target is None and any(isinstance(o, torch.Tensor) for o in others):
            target = next(o for o in others if isinstance(o, torch.Tensor)).device
        to_cuda = on_device(tensor) if target is None else is_cuda(target)
        clean = [torch.device("cpu") if isinstance(a, (torch.device, str)) else a for a in args[1:]]
        more = {key: torch.device("cpu") if isinstance(v, (torch.device, str)) else v for key, v in kwargs.items()}
        moved = func(plain(tensor), *clean, **more)
        if to_cuda != on_device(tensor):
            self.count("cpu" if on_device(tensor) else "copy to the device")
            moved = moved.clone()
        elif moved is tensor:
            return tensor
        return self._wrap(moved) if to_cuda else moved

    def _wrap(self, value):
        if isinstance(value, torch.Tensor):
            return value if on_device(value) else value.as_subclass(CudaTensor)
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*(self._wrap(part) for part in value))
        return type(value)(self._wrap(part) for part in value) if isinstance(value, (list, tuple)) else value


def plain(value):
    """What is on the device, as it would come out of a file."""
    if isinstance(value, torch.Tensor):
        return value.as_subclass(torch.Tensor)
    if isinstance(value, dict):
        return type(value)((key, plain(part)) for key, part in value.items())
    return type(value)(plain(part) for part in value) if isinstance(value, (list, tuple)) else value


def run_again(function):
    """In place of a recording: (what `function` returned, a callable that runs it again and writes the same tensors)."""
    outputs = function()

    def again():
        for output, new in zip(outputs, function()):
            output.detach().copy_(new)
    return outputs, again


@contextlib.contextmanager
def fake_cuda(monkeypatch, memory=80 << 30):
    """A machine with one fake GPU of that many bytes. Yields the FakeCuda."""
    device, save = FakeCuda(), torch.save
    with monkeypatch.context() as patch:
        patch.setattr(torch, "Generator", EitherGenerator)
        patch.setattr(torch, "save", lambda content, file, *a, **k: save(plain(content), file, *a, **k))
        for name, value in {
                "device_count": lambda: 1, "get_device_name": lambda device=None: "Fake GPU",
                "get_device_properties": lambda device=None: SimpleNamespace(total_memory=memory, name="Fake GPU"),
                "mem_get_info": lambda device=None: (memory, memory), "max_memory_allocated": lambda device=None: 0,
                "synchronize": lambda device=None: device_waits(), "device": lambda device: contextlib.nullcontext(),
                "get_rng_state": lambda device=None: torch.zeros(8, dtype=torch.uint8),
                "set_rng_state": lambda state, device=None: None}.items():
            patch.setattr(torch.cuda, name, value)
        patch.setattr(torch.cuda.random, "manual_seed", lambda seed: None)

        def device_waits():
            device.count("synchronize")

        def capture(function, _):
            """In place of a CUDA graph, which refuses a function that makes the host wait."""
            before = sum(device.syncs.values())
            recorded = run_again(function)
            if sum(device.syncs.values()) != before:
                raise RuntimeError("operation not permitted when stream is capturing")
            return recorded
        patch.setattr(cuda_graphs, "capture", capture)
        cuda_graphs.reset()
        # module.to(device) makes new parameters, as the class of the old ones cannot change
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        try:
            with device:
                yield device
        finally:
            cuda_graphs.reset()
            torch.__future__.set_overwrite_module_params_on_conversion(False)
