"""The machine: device, its name, how many images it takes at a time, versions."""
import os
import platform
import warnings
from importlib.metadata import version
from pathlib import Path

import torch

from runtime.safe_io import InputError

MICRO_BATCH = 64  # images attacked at a time on a CPU; more are no faster
BYTES_PER_ATTACKED_IMAGE = 8 << 20  # activations of the published ConvNet are 2.5 MiB
MAX_MICRO_BATCH = 4096  # more, and an activation of ConvNetW256 needs indices of 64 bits


def get_device(name, deterministic=False):
    """"auto" (CUDA if it is there), "cpu", "cuda" or "cuda:N" -> torch.device.

    deterministic: PyTorch refuses operations whose result depends on the order of threads.
    Raises InputError for a device that is not here.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # we read none: it costs time
    found = ["cpu", *(f"cuda:{i}" for i in range(count_gpus()))]
    if name == "auto":
        return torch.device("cuda:0" if len(found) > 1 else "cpu")
    if name not in found + ["cuda"] * (len(found) > 1):
        raise InputError(f"--device {name} is not here; choose auto or one of {', '.join(found)}")
    return torch.device(name)


def count_gpus():
    """GPUs that this PyTorch can use; 0 with a driver that counts some and cannot run."""
    try:
        if torch.cuda.is_available():
            torch.ones(1, device="cuda").item()
            return torch.cuda.device_count()
    except RuntimeError as error:
        warnings.warn(f"no GPU is used ({str(error).splitlines()[0]})", stacklevel=2)
    return 0


def device_name(device):
    """The device, for a reader."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads)"


def has_bf16(device):
    """Whether the device has bfloat16 instructions; a CPU without them emulates it slowly."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    is_x86, capability = platform.machine() == "x86_64", torch.backends.cpu.get_cpu_capability()
    cpuinfo = Path("/proc/cpuinfo")  # of Linux
    if is_x86 and capability != "AVX512" or not cpuinfo.exists():
        return False
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(cpuinfo.read_text().split())


def choose_micro_batch(device, asked=0):
    """Images attacked at a time: `asked`, or by the free memory of the device; a power of two, so
    that a little memory in use elsewhere does not change it."""
    if asked or device.type != "cuda":
        return asked or MICRO_BATCH
    free, _ = torch.cuda.mem_get_info(device)
    fits = max(256, min(MAX_MICRO_BATCH, free // 2 // BYTES_PER_ATTACKED_IMAGE))
    return 1 << fits.bit_length() - 1


def synchronise(device):
    """Wait for the device to finish its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def copy_to_device(tensor, device):
    """Copy a CPU tensor to the device, without making the host wait."""
    if tensor.device == device:
        return tensor
    if device.type == "cuda" and torch.cuda.is_available():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def versions():
    """The versions that a result depends on, as strings."""
    return {"python": platform.python_version(), "torch": str(torch.__version__),
            "torchvision": version("torchvision"), "numpy": version("numpy"),
            "threads": str(torch.get_num_threads())}
