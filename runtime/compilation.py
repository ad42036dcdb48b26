"""How networks are computed: precision and torch.compile. Both belong to the process."""
import copy
import ctypes
import functools
import logging
import math
import time
import warnings
from contextlib import contextmanager, suppress

import torch
import torch.nn.functional as F

from runtime.device import device_name, has_bf16

PRECISIONS = ("fp32", "tf32", "bf16")
# Compiling takes 5 to 20 s. It pays from so many planned operations: a minute on two CPU cores.
COMPILE_PAYS = {"cpu": 7.5e12, "cuda": 1e14}
COMPILE_PAYS_BF16 = 0.3  # times as many: a CPU uses bf16 in compiled batches only
# A batch is padded to a compiled size if it fills at least this fraction of it.
PADDING_PAYS = {"fp32": 0.7, "tf32": 0.7, "bf16": 0.3}
KINDS = {  # of batches: (which gradient, embedding too, training mode or None: as the network is)
    "attacked": ("input", False, False),
    "trained": ("parameters", False, True),
    "scored": ("none", False, False),
    "matched": ("input", True, None),
    "embedded": ("none", True, None),
}

_precision = "fp32"
_compiled_keys = set()


# ---------------------------------------------------------------------------- precision
def set_precision(name):
    """Set the precision of the process. Raises ValueError for an unknown name.

    tf32: CUDA may round convolutions to TensorFloat-32; products of matrices it never may, as the
    grids of rotations and ZCA are such. bf16: `forward` computes in bfloat16, too.
    """
    global _precision
    if name not in PRECISIONS:
        raise ValueError(f"unknown precision {name!r}; choose from {', '.join(PRECISIONS)}")
    _precision = name
    torch.backends.cudnn.allow_tf32 = name != "fp32"


def precision():
    """The precision of `forward` now."""
    return _precision


def resolve_precision(name, device):
    """auto -> bf16 if the device has instructions for it, else tf32. Other names stay."""
    if name != "auto":
        return name
    return "bf16" if has_bf16(device) else "tf32"


@contextmanager
def disable_bf16():
    """Inside, `forward` uses no bfloat16: reported accuracies need exact gradients."""
    global _precision
    before = _precision
    _precision = "tf32" if before == "bf16" else before
    try:
        yield
    finally:
        _precision = before


# ----------------------------------------------------------------------- forward passes
def forward(net, x):
    """(N, C, H, W) normalised images -> (N, num_classes) float32 class scores."""
    return dispatch(net, x, None)


def embed(net, x, last):
    """`Network.embed_and_classify` -> float32 (embedding, class scores)."""
    return dispatch(net, x, len(net.features[:last]))


def eager_forward(net, x, layers=None):
    """Class scores; with a number of layers: (embedding after so many, class scores)."""
    with _autocast(x.device):
        if layers is None:
            return _to_float32(net(x))
        return tuple(map(_to_float32, net.embed_and_classify(x, layers)))


def _autocast(device):
    enabled = _precision == "bf16" and device.type != "cpu"  # there, 10 to 50 times slower
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def _to_float32(x):
    return x.float() if x.dtype == torch.bfloat16 else x


def compiled_forward(net, x, layers=None):
    """`eager_forward` for torch.compile, which merges a mean over a view with the layers before.
    A bias that instance norm cancels is left out; `unused` gives it its gradient, 0."""
    x, unused = x.contiguous(memory_format=torch.channels_last), 0.0
    modules = [*net.features, None]
    with torch.autocast(x.device.type, torch.bfloat16, enabled=_precision == "bf16"):
        for i, (layer, following) in enumerate(zip(modules, modules[1:]), 1):
            if i != layers and _norm_cancels_bias(layer, following):
                x = layer._conv_forward(x, layer.weight, None)
                unused = unused + 0 * layer.bias.sum()
            elif _halves(layer, x):
                n, channels, height, width = x.shape
                x = x.view(n, channels, height // 2, 2, width // 2, 2).mean((3, 5))
            else:
                x = layer(x)
            if i == layers:
                embedding = x.flatten(1)
                x = x.clone() if following else x  # the next layer may work in place
        logits = _to_float32(net.classifier(x.flatten(1)) + unused)
    return logits if layers is None else (_to_float32(embedding), logits)


def _norm_cancels_bias(layer, following):
    return (type(layer) is torch.nn.Conv2d and layer.bias is not None
            and type(following) is torch.nn.GroupNorm
            and following.num_groups == following.num_channels)


def _halves(layer, x):
    return (type(layer) is torch.nn.AvgPool2d and layer.kernel_size == layer.stride == 2
            and layer.padding == x.shape[2] % 2 == x.shape[3] % 2 == 0)


@functools.cache
def _torch_compile():
    # Parameters are inputs of the graph, so all networks of an architecture share it.
    # Fixed shapes: dynamic ones are a third slower on a CPU.
    return torch.compile(compiled_forward, dynamic=False)


# ----------------------------------------------------------------------------- dispatch
def dispatch(net, x, layers):
    """Run a batch compiled, padded with zeros to the next compiled size, or eagerly."""
    if not _compiled_keys or getattr(net, "architecture", None) is None:
        return eager_forward(net, x, layers)
    n, key = len(x), compile_key(net, x, layers)
    size = min((s for *k, s in _compiled_keys if k == key and s >= n), default=math.inf)
    if n < PADDING_PAYS[_precision] * size:
        return eager_forward(net, x, layers)
    if n == size:
        return _torch_compile()(net, x, layers)
    if net.training and is_batch_dependent(net):
        return eager_forward(net, x, layers)
    out = _torch_compile()(net, F.pad(x, (0, 0, 0, 0, 0, 0, 0, size - n)), layers)
    return out[:n] if layers is None else tuple(part[:n] for part in out)


def compile_key(net, x, layers):
    """What the batches of a compiled graph have in common, apart from their size."""
    if not torch.is_grad_enabled():
        gradient = "none"
    elif next(net.parameters()).requires_grad:
        gradient = "parameters"
    else:
        gradient = "input" if x.requires_grad else "none"
    return [net.architecture, net.training, layers, gradient]


def is_batch_dependent(net):
    """Whether training scores depend on the rest of the batch: BatchNorm or dropout."""
    kinds = torch.nn.modules.batchnorm._BatchNorm, torch.nn.modules.dropout._DropoutNd
    return any(isinstance(layer, kinds) for layer in net.modules())


@contextmanager
def freeze_parameters(net):
    """Inside, no gradient of the parameters of `net` is taken."""
    wanted = [parameter for parameter in net.parameters() if parameter.requires_grad]
    net.requires_grad_(False)
    try:
        yield net
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)


# -------------------------------------------------------------------------- compilation
def compile_batches(net, shape, last=None, **sizes):
    """Compile for networks like `net`. shape: (C, H, W). sizes: kind of KINDS = batch sizes.
    last: of `embed`.

    Returns None, or in one line why torch.compile fails here; then all stays eager.
    """
    net, was_training = copy.deepcopy(net), net.training
    try:
        _configure()
        for kind, batches in sizes.items():
            gradient, with_embedding, training = KINDS[kind]
            net.train(was_training if training is None else training)
            net.requires_grad_(gradient == "parameters")
            layers = len(net.features[:last]) if with_embedding else None
            for size in batches:
                _compile_one(net, (size, *shape), layers, gradient)
    except Exception as error:  # of any part of the compiler
        _compiled_keys.clear()
        reason = " ".join(str(error).split())[:200]
        return f"torch.compile does not work here ({type(error).__name__}: {reason})"
    return None


def _configure():
    import torch._dynamo.config
    import torch._functorch.config
    import torch.compiler.config
    # The cache on disk ignores the processor: AVX-512 code skips half of the values on AVX2.
    torch.compiler.config.cache_key_tag = device_name(torch.device("cpu"))
    torch._functorch.config.donated_buffer = False  # some attacks differentiate a pass twice
    torch._dynamo.config.cache_size_limit = 64
    # They warn of a missing CUDA on machines without a GPU, and of products without TF32.
    warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)


def _compile_one(net, shape, layers, gradient):
    x = torch.zeros(shape, device=next(net.parameters()).device,
                    requires_grad=gradient == "input")
    with torch.set_grad_enabled(gradient != "none"):
        key = *compile_key(net, x, layers), len(x)
        if key in _compiled_keys:
            return
        out = _torch_compile()(net, x, layers)
        if gradient != "none":
            loss = sum(part.square().mean() for part in (out if layers else [out]))
            torch.autograd.grad(loss, [x] if gradient == "input" else list(net.parameters()))
    _compiled_keys.add(key)


def compiled_keys():
    """The set of (*compile_key, batch size). While it is empty, all batches run eagerly."""
    return _compiled_keys


def reset():
    """Free all compiled graphs."""
    _compiled_keys.clear()
    torch._dynamo.reset()


def compile_planned(net, shape, planned, log, last=None):
    """`compile_batches` for those with enough planned work (COMPILE_PAYS), and log it.

    planned: {kind of KINDS: {batch size: floating-point operations}}.
    """
    device = next(net.parameters()).device.type
    if device == "cuda" and torch.are_deterministic_algorithms_enabled():
        return  # the compiler of older versions chooses kernels by their time
    pays = COMPILE_PAYS[device]
    pays *= COMPILE_PAYS_BF16 if _precision == "bf16" else 1
    sizes = {kind: found for kind, work in planned.items()
             if (found := [size for size, flops in work.items() if flops >= pays])}
    if not sizes:
        return
    start, before = time.perf_counter(), len(_compiled_keys)
    if problem := compile_batches(net, shape, last, **sizes):
        log(f"{problem}; continuing without it")
    elif len(_compiled_keys) > before:
        log(f"compiled in {time.perf_counter() - start:.3g} s for batches of these sizes: {sizes}; "
            "--no_compile turns it off")


def keep_freed_memory(mmap_threshold=1 << 30, trim_threshold=(1 << 31) - 1):
    """Let glibc keep freed activations (mallopt, in bytes): without it, page faults take a third
    of a CPU run. No effect with another C library."""
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, mmap_threshold)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, trim_threshold)  # M_TRIM_THRESHOLD
