"""What makes the scripts fast on the machine at hand: compilation, precision, memory.

*Performance-impacting*, nothing else: each fast path computes what the plain one does, up to rounding (tests/test_fast.py),
and benchmark.py measures both. The settings are of the process, as those of torch.backends are.
"""
import ctypes
import functools
import itertools
import logging
import re
import time
from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F

from runtime.device import device_name, has_bf16

PRECISIONS = ("fp32", "tf32", "bf16")  # and the flag --precision has auto
# Compiling one kind of batch takes 5 to 20 s. It pays where so much work of that kind is planned, in floating-point
# operations: about a minute of it on two CPU cores, or on a large GPU.
COMPILE_PAYS = {"cpu": 7.5e12, "cuda": 4e14}
COMPILE_PAYS_BF16 = 0.3  # of that: on a CPU, what is not compiled is computed in fp32
# A batch of a size that is not compiled is filled up with zeros to one that is, if so much of that one are its own images.
PADDING_PAYS = {"fp32": 0.7, "tf32": 0.7, "bf16": 0.3}

_precision = "fp32"
_ready = set()  # the kinds of batches that are compiled


# ------------------------------------------------------------------------------------------------------------ compilation
def _plain(net, x, last=None):
    with autocast(x.device):
        if last is None:
            return _widen(net(x))
        return tuple(map(_widen, net.embed_and_classify(x, last)))


def _widen(x):
    return x.float() if x.dtype == torch.bfloat16 else x


def autocast(device):
    """bf16 on a GPU. Not on a CPU: what is not compiled runs in bfloat16 ten times slower there, if not fifty."""
    return torch.autocast(device.type, torch.bfloat16) if _precision == "bf16" and device.type != "cpu" else nullcontext()


def _lean(net, x, last=None):
    """What is compiled: what `_plain` computes, with less memory traffic."""
    x, layers = x.contiguous(memory_format=torch.channels_last), list(net.features)
    with torch.autocast(x.device.type, torch.bfloat16, enabled=_precision == "bf16"):
        x, unused = _lean_layers(layers[:last], x)
        embedding = x.flatten(1)
        if last is not None and last < len(layers):
            x, more = _lean_layers(layers[last:], x.clone())  # the next layer may work in place
            unused = unused + more
        logits = _widen(net.classifier(x.flatten(1)) + unused)
    return logits if last is None else (_widen(embedding), logits)


def _lean_layers(layers, x):
    """Pooling as view and mean, of which the compiler can make one pass with the norm and the activation before it; and no bias
    of a convolution whose norm takes the mean of each channel away. Returns (x, a zero that has these biases, so that they keep
    a gradient: 0, which is what rounding leaves of it otherwise)."""
    unused = 0.0
    for layer, following in itertools.zip_longest(layers, layers[1:]):
        if type(layer) is torch.nn.Conv2d and layer.bias is not None and _takes_means_away(following):
            x = layer._conv_forward(x, layer.weight, None)
            unused = unused + 0 * layer.bias.sum()
        elif type(layer) is torch.nn.AvgPool2d and (layer.kernel_size, layer.stride, layer.padding) == (2, 2, 0) \
                and x.shape[2] % 2 == x.shape[3] % 2 == 0:
            n, channels, height, width = x.shape
            x = x.view(n, channels, height // 2, 2, width // 2, 2).mean((3, 5))
        else:
            x = layer(x)
    return x, unused


def _takes_means_away(layer):
    return type(layer) is torch.nn.GroupNorm and layer.num_groups == layer.num_channels


# One function for all networks: parameters are inputs of what is compiled, so that another network of the pool, of the same
# architecture, does not compile again. Shapes are fixed: a graph for any batch size is a third slower on a CPU.
@functools.cache
def _compiled():
    return torch.compile(_lean, dynamic=False)


def _kind(net, x, last):
    """What a compiled graph is good for: an architecture, its mode, a batch size, the layers of the embedding that is wanted
    as well, and which gradients are wanted."""
    if not torch.is_grad_enabled():
        wanted = "none"
    else:
        wanted = "parameters" if next(net.parameters()).requires_grad else "input" if x.requires_grad else "none"
    return net.architecture, net.training, len(x), last, wanted


def forward(net, x):
    """Class scores of a network, compiled if `compile_batches` was told of such batches, or of larger ones that are worth
    filling up.

    net: of `get_network`. x: (N, C, H, W) normalised images. Returns (N, num_classes) float32.
    """
    return _through(net, x, None)


def embed(net, x, last):
    """`Network.embed_and_classify`, compiled like `forward`."""
    return _through(net, x, last)


def _layers(net, last):
    """--embed_last as a number of layers from the start."""
    return None if last is None else len(range(len(net.features))[:last])


def _through(net, x, last):
    if not _ready or getattr(net, "architecture", None) is None:
        return _plain(net, x, last)
    last = _layers(net, last)
    size = _compiled_size(net, x, last)
    if size is None:
        return _plain(net, x, last)
    if size == len(x):
        return _compiled()(net, x, last)
    out = _compiled()(net, F.pad(x, (0, 0, 0, 0, 0, 0, 0, size - len(x))), last)
    return out[:len(x)] if last is None else tuple(part[:len(x)] for part in out)


def _compiled_size(net, x, last=None):
    """The size of the compiled batches that x goes through as; None: of none. last: of `_layers`."""
    architecture, training, n, *rest = kind = _kind(net, x, last)
    if kind in _ready:
        return n
    size = min((size for a, t, size, *other in _ready if n < size and (a, t, other) == (architecture, training, rest)),
               default=None)
    if size is None or n < PADDING_PAYS[_precision] * size:
        return None
    return None if training and is_batch_dependent(net) else size


def is_batch_dependent(net):
    """Whether an image's scores in training depend on the others of its batch, or on how many there are: BatchNorm, dropout."""
    kinds = (torch.nn.modules.batchnorm._BatchNorm, torch.nn.modules.dropout._DropoutNd)
    return any(isinstance(layer, kinds) for layer in net.modules())


def compile_batches(net, shape, attacked=(), trained=(), matched=(), embedded=(), scored=(), last=None):
    """Compile for networks like `net`, by running each kind of batch once on zeros. `net` is left as it was.

    shape: (C, H, W) of the images. Batch sizes: attacked: with the gradient in the images, `net` in eval mode and its
    parameters frozen; scored: in eval mode, without a gradient; trained: with the gradient in the parameters, in training mode;
    matched: `embed` with `last`, and the gradient in the images; embedded: the same without a gradient; these two in the mode
    that `net` is in.
    Returns None, or, if it does not work here (no compiler, say), the reason in one line: everything stays plain then.
    """
    device, was_training = next(net.parameters()).device, net.training
    buffers = [(buffer, buffer.clone()) for buffer in net.buffers()]  # the statistics of BatchNorm
    try:
        import torch._dynamo.config
        import torch._functorch.config
        import torch.compiler.config
        # PyTorch keeps what it generated on disk, for this processor and number of threads, and would take it for others too:
        # code for AVX-512, compiled for AVX2, leaves out half of the values without a word.
        torch.compiler.config.cache_key_tag = device_name(torch.device("cpu"))
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it misses CUDA on machines without a GPU
        torch._functorch.config.donated_buffer = False  # some attacks take several gradients of one pass
        torch._dynamo.config.cache_size_limit = 64  # kinds of batches
        kinds = [(n, "input", None, False) for n in attacked] + [(n, "parameters", None, True) for n in trained]
        kinds += [(n, "none", None, False) for n in scored]
        if last is not None:
            kinds += [(n, "input", _layers(net, last), was_training) for n in matched]
            kinds += [(n, "none", _layers(net, last), was_training) for n in embedded]
        for size, wanted, layers, training in kinds:
            net.train(training).requires_grad_(wanted == "parameters")
            x = torch.zeros(size, *shape, device=device, requires_grad=wanted == "input")
            with torch.set_grad_enabled(wanted != "none"):
                kind = _kind(net, x, layers)
                if kind in _ready:
                    continue
                out = _compiled()(net, x, layers)
            if wanted != "none":
                loss = sum(part.square().mean() for part in (out if layers else [out]))
                torch.autograd.grad(loss, [x] if wanted == "input" else list(net.parameters()))
            _ready.add(kind)
    except Exception as error:  # of dynamo, of the code generator, of the compiler: whatever it is, eager mode works
        _ready.clear()
        # the first line; of a backend's error the next one too, which has the reason
        said = re.sub(r"raised:\s+", "raised ", str(error)).splitlines() or [""]
        return f"torch.compile does not work here ({type(error).__name__}: {said[0][:200]})"
    finally:
        net.train(was_training).requires_grad_(True)
        for buffer, kept in buffers:
            buffer.copy_(kept)
    return None


def stop_compiling():
    """Forget all that was compiled."""
    _ready.clear()
    torch._dynamo.reset()


def compile_planned(net, shape, planned, say, last=None):
    """Compile for the batches of which enough is planned to pay for it. Says what it did.

    planned: {kind, a batch-size argument of `compile_batches`: {batch size: planned floating-point operations}}.
    """
    pays = COMPILE_PAYS[next(net.parameters()).device.type] * (COMPILE_PAYS_BF16 if _precision == "bf16" else 1)
    sizes = {kind: [size for size, flops in batches.items() if flops >= pays] for kind, batches in planned.items()}
    sizes = {kind: found for kind, found in sizes.items() if found}
    if not sizes:
        return
    start, already = time.perf_counter(), len(_ready)
    problem = compile_batches(net, shape, **sizes, last=last)
    if problem:
        say(f"{problem}; going on without")
    elif len(_ready) > already:
        batches = ", ".join(f"{kind} batches of {' and '.join(map(str, found))}" for kind, found in sizes.items())
        say(f"compiled in {time.perf_counter() - start:.3g} s: {batches} images; --no_compile turns it off")


# -------------------------------------------------------------------------------------------------------------- precision
def set_precision(name):
    """fp32: all in float32. tf32: convolutions and matrix products may round their factors to TensorFloat-32 (CUDA; no effect
    elsewhere). bf16: tf32, and `forward` computes in bfloat16, parameters and updates stay float32; not inside `disable_bf16`."""
    global _precision
    if name not in PRECISIONS:
        raise ValueError(f"unknown precision {name!r}; choose one of {', '.join(PRECISIONS)}")
    _precision = name
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = name != "fp32"


def precision():
    """What `forward` computes in here and now: a name of PRECISIONS."""
    return _precision


def resolve_precision(args, device):
    """--precision auto becomes bf16 where the device has instructions for it, else tf32, in `args` too. Returns the name."""
    if args.precision == "auto":
        args.precision = "bf16" if has_bf16(device) else "tf32"
    return args.precision


@contextmanager
def disable_bf16():
    """`forward` inside does not compute in bfloat16: an accuracy that is reported is attacked with exact gradients."""
    global _precision
    kept = _precision
    _precision = "tf32" if kept == "bf16" else kept
    try:
        yield
    finally:
        _precision = kept


@contextmanager
def freeze_parameters(net):
    """No gradient of the parameters of `net` is taken inside."""
    wanted = [parameter for parameter in net.parameters() if parameter.requires_grad]
    try:
        for parameter in wanted:
            parameter.requires_grad_(False)
        yield net
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)


@contextmanager
def disable_tf32():
    """Matrix products inside are not rounded to TensorFloat-32, whatever the precision of the process."""
    kept = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = kept


# ----------------------------------------------------------------------------------------------------------------- memory
def reuse_freed_memory(mmap_threshold=1 << 30, trim_threshold=(1 << 31) - 1):
    """Let glibc keep freed blocks instead of returning them to the system; CPU only.

    A network's activations are tens of megabytes that come and go at every layer; returned each time, their page faults
    cost a third of the run. No effect where the C library is another one. The thresholds are mallopt's, in bytes.
    """
    m_trim_threshold, m_mmap_threshold = -1, -3  # of glibc's malloc.h
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(m_mmap_threshold, mmap_threshold)
        libc.mallopt(m_trim_threshold, trim_threshold)
    except (OSError, AttributeError):
        pass
