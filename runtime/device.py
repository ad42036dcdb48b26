"""The machine: device, its name, how many images it takes at a time, versions."""
import os
import platform
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F

from runtime.safe_io import InputError

MICRO_BATCH = 64  # images attacked at a time on a CPU; more are no faster
BYTES_PER_ATTACKED_IMAGE = 8 << 20  # generous: activations of the published ConvNet are 2.5 MiB
MAX_MICRO_BATCH = 4096  # an activation of ConvNetW256 then has 2^30 values: indices of 32 bits do


def get_device(name, deterministic=False):
    """"auto" (CUDA if it is there), "cpu", "cuda" or "cuda:N" -> torch.device.

    deterministic: PyTorch refuses operations whose result depends on the order of threads.
    Raises InputError for a device that is not there.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    found = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if name == "auto":
        return torch.device("cuda:0" if len(found) > 1 else "cpu")
    if name not in found + ["cuda"] * (len(found) > 1):
        raise InputError(f"--device {name} is not available here; choose auto or one of "
                         f"{', '.join(found)}")
    return torch.device(name)


def device_name(device):
    """The device, for a reader."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads)"


def has_bf16(device):
    """Whether the device has bfloat16 instructions; a CPU without them emulates it slowly."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if platform.machine() in ("x86_64", "AMD64"):
        if torch.backends.cpu.get_cpu_capability() != "AVX512":  # see ATEN_CPU_CAPABILITY
            return False
    try:
        words = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:  # no Linux
        return False
    return bool(words & {"avx512_bf16", "amx_bf16", "bf16"})


def choose_micro_batch(device, asked=0):
    """How many images are attacked at a time: `asked`, or by the free memory of the device.

    A power of two, so that a little memory in use elsewhere does not change it.
    """
    if asked or device.type != "cuda":
        return asked or MICRO_BATCH
    free, _ = torch.cuda.mem_get_info(device)
    fits = max(256, min(MAX_MICRO_BATCH, free // 2 // BYTES_PER_ATTACKED_IMAGE))
    return 1 << fits.bit_length() - 1


def synchronise(device):
    """Wait for the device to finish its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def to_device_packed(tensors, device):
    """Copy CPU tensors to the device in one pinned copy, for which the host does not wait."""
    if device.type == "cpu" or not tensors:
        return list(tensors)
    flat = [tensor.contiguous().view(-1).view(torch.uint8) for tensor in tensors]
    padded = [F.pad(part, (0, -len(part) % 8)) for part in flat]  # any type can begin at 8 bytes
    buffer = torch.cat(padded)
    if torch.cuda.is_available():
        buffer = buffer.pin_memory()
    parts = buffer.to(device, non_blocking=True).split([len(part) for part in padded])
    return [part[:len(bytes_)].view(tensor.dtype).view(tensor.shape)
            for part, bytes_, tensor in zip(parts, flat, tensors)]


def versions():
    """The versions that a result depends on, as strings."""
    packages = {name: version(name) for name in ("torchvision", "numpy")}
    return {"python": platform.python_version(), "torch": str(torch.__version__), **packages,
            "threads": str(torch.get_num_threads())}
