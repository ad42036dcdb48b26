"""AutoAttack and Square from the package pyautoattack: silent, and seeded by our generators.

FAB sorts the pixels of every image to project it onto a hyperplane, half the time of AutoAttack on
a CPU; `project_linf` finds the same point without sorting.
"""
import logging
from contextlib import contextmanager, nullcontext

import torch

from runtime.safe_io import InputError


def pyautoattack():
    """Its classes (AutoAttack, SquareAttack). Raises InputError if the package is missing."""
    try:
        from pyautoattack import AutoAttack
        from pyautoattack.square import SquareAttack
    except ImportError:
        raise InputError("AA, Square and the sanity checks (--no_sanity) need the package "
                         "pyautoattack") from None
    logging.getLogger("auto-attack").setLevel(logging.ERROR)  # a warning for every batch
    return AutoAttack, SquareAttack


def project_linf(points, w, b):
    """The least L-inf change (N, D) that brings points (N, D) onto the hyperplanes w . x = b, or as
    close as the box [0, 1] allows. w: (N, D); b: (N,). Croce and Hein 2020 (FAB), section 2.2.

    Newton's method for the `step` with sum |w| min(step, room) = distance. The sum is concave, so
    it never overshoots.
    """
    residual = (w * points).sum(1, keepdim=True) - b.unsqueeze(1)
    upwards = (w < 0) == (residual >= 0)  # the coordinates that grow
    room = torch.where(upwards, 1 - points, points)
    weight, distance = w.abs(), residual.abs()
    total = weight.sum(1, keepdim=True)
    step = distance / total
    for _ in range(w.shape[1]):
        at_border = (room <= step).to(w.dtype) * weight
        slope = total - at_border.sum(1, keepdim=True)  # 0: all are at the border
        left = distance - (at_border * room).sum(1, keepdim=True)
        longer = torch.where(slope > 0, left / slope, step)
        if not (longer > step * (1 + 1e-6)).any():
            break
        step = torch.maximum(step, longer)
    change = torch.where(w != 0, torch.minimum(room, step), 0)
    return torch.where(upwards, change, -change)


def draw_seed(generator):
    """An int, drawn from `generator` or, for None, from the global one."""
    device = generator.device if generator else None
    return int(torch.randint(2**31, (), generator=generator, device=device))


@contextmanager
def patched(device):
    """Let FAB use `project_linf`, and put back the global generators, which pyautoattack seeds."""
    from pyautoattack import fab_base
    cuda, theirs = device.type == "cuda", fab_base.projection_linf
    fab_base.projection_linf = project_linf
    try:
        with torch.random.fork_rng(devices=[device] if cuda else []), \
                torch.cuda.device(device) if cuda else nullcontext():
            yield
    finally:
        fab_base.projection_linf = theirs
