"""AutoAttack and Square of their authors, as the package pyautoattack: found where it is installed, silent, with our seeds."""
import logging
from contextlib import contextmanager, nullcontext

import torch


def pyautoattack():
    """Its classes (AutoAttack, SquareAttack). Raises ValueError if the package is missing."""
    try:
        from pyautoattack import AutoAttack
        from pyautoattack.square import SquareAttack
    except ImportError:
        raise ValueError("AA and Square need the package pyautoattack (pip install pyautoattack)") from None
    logging.getLogger("auto-attack").setLevel(logging.ERROR)  # its advice, batch by batch; evaluate.py has a sanity report
    return AutoAttack, SquareAttack


def draw_seed(generator):
    """An int for the seed of an attack, drawn from our generator."""
    return int(torch.randint(2**31, (), generator=generator, device=generator.device if generator else None))


@contextmanager
def own_global_generator(device):
    """pyautoattack seeds the global generators, of CUDA that of the current device; the caller's are put back."""
    cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if cuda else []), torch.cuda.device(device) if cuda else nullcontext():
        yield
