"""The machine at hand: which device, its name, how many images it takes at a time, and the versions of what runs on it."""
import os
import platform
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from runtime.safe_io import InputError

MICRO_BATCH = 64  # images attacked at a time on a CPU; more are no faster
BYTES_PER_ATTACKED_IMAGE = 8 << 20  # generous for the published ConvNet, whose activations are 2.5 MiB
MOST_ATTACKED = 4096  # images at a time: an activation of ConvNetW256 then has 2^30 values, and an index of 32 bits is enough


def get_device(name, deterministic=False):
    """"auto" (CUDA if it is there), "cpu", "cuda" or "cuda:N" -> torch.device. Raises InputError if it is not there.

    deterministic: let PyTorch refuse operations whose result depends on the order of threads (CUDA has some; CPU none here).
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    found = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if name == "auto":
        return torch.device("cuda:0" if len(found) > 1 else "cpu")
    if name not in found + ["cuda"] * (len(found) > 1):
        raise InputError(f"--device {name} is not available here; choose auto or one of {', '.join(found)}")
    return torch.device(name)


def device_name(device):
    """What the run computes on, for a reader."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads)"


def has_bf16(device):
    """Whether the device has instructions for bfloat16; a CPU without them computes in it all the same, slowly."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if platform.machine() in ("x86_64", "AMD64") and torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False  # or not to be used: ATEN_CPU_CAPABILITY
    try:
        words = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:  # no Linux
        return False
    return bool(words & {"avx512_bf16", "amx_bf16", "bf16"})


def choose_micro_batch(device, micro_batch=0):
    """How many images are attacked at a time: `micro_batch` if it is given, else by the free memory of the device.

    A power of two, so that a little memory in use elsewhere does not change it.
    """
    if micro_batch or device.type != "cuda":
        return micro_batch or MICRO_BATCH
    free, _ = torch.cuda.mem_get_info(device)
    fits = max(256, min(MOST_ATTACKED, free // 2 // BYTES_PER_ATTACKED_IMAGE))
    return 1 << fits.bit_length() - 1


def synchronise(device):
    """Wait for what the device was given to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def to_device_packed(tensors, device):
    """Tensors of the CPU -> on the device, in one copy from pinned memory, so that the host does not wait for each of them."""
    if device.type == "cpu" or not tensors:
        return list(tensors)
    flat = [tensor.contiguous().view(-1).view(torch.uint8) for tensor in tensors]
    sizes = [-len(part) % 8 + len(part) for part in flat]  # each begins where any type may begin
    buffer = torch.cat([F.pad(part, (0, size - len(part))) for part, size in zip(flat, sizes)])
    if torch.cuda.is_available():
        buffer = buffer.pin_memory()
    parts = buffer.to(device, non_blocking=True).split(sizes)
    return [part[:len(one)].view(tensor.dtype).view(tensor.shape) for part, one, tensor in zip(parts, flat, tensors)]


def versions():
    """The versions that a result depends on, as plain strings."""
    from importlib.metadata import version  # importing torchvision takes two seconds
    return {"python": platform.python_version(), "torch": str(torch.__version__), "torchvision": version("torchvision"),
            "numpy": np.__version__, "threads": str(torch.get_num_threads())}
