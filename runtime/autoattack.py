"""AutoAttack and Square of their authors, as the package pyautoattack: found where it is installed, silent, with our seeds.

One function of it is ours. FAB projects every image onto a hyperplane in every iteration, and sorts its pixels to do so, which
takes half the time of AutoAttack on a CPU; project_linf finds the same point without sorting.
"""
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


def project_linf(points, w, b):
    """The smallest change in L-inf that brings each point onto the hyperplane w . x = b, or as near as the box [0, 1] lets it.

    points, w: (N, D); b: (N,). Returns (N, D). Each coordinate moves towards the plane by `step`, or up to the border of the
    box, from outside back to it; `step` is where what that gains, sum |w| min(step, room), equals the distance. This sum is
    concave and piecewise linear: Newton's method from below does not overshoot, and takes as many steps as pieces at most.
    Source: Croce and Hein 2020 (FAB), section 2.2.
    """
    residual = (w * points).sum(1, keepdim=True) - b.unsqueeze(1)
    upwards = (w < 0) == (residual >= 0)  # the coordinates that grow
    room = torch.where(upwards, 1 - points, points)
    weight, distance = w.abs(), residual.abs()
    total = weight.sum(1, keepdim=True)
    step = distance / total
    for _ in range(w.shape[1]):
        at_border = (room <= step).to(w.dtype) * weight
        slope = total - at_border.sum(1, keepdim=True)  # 0: nobody can go further
        longer = torch.where(slope > 0, (distance - (at_border * room).sum(1, keepdim=True)) / slope, step)
        if not (longer > step * (1 + 1e-6)).any():
            break
        step = torch.maximum(step, longer)
    change = torch.where(w != 0, torch.minimum(room, step), 0)  # a gradient of zeros: nowhere to go
    return torch.where(upwards, change, -change)


def draw_seed(generator):
    """An int for the seed of an attack, drawn from our generator."""
    return int(torch.randint(2**31, (), generator=generator, device=generator.device if generator else None))


@contextmanager
def patched(device):
    """Inside, FAB projects with `project_linf`; its own projection is put back. So are the caller's global generators, which
    pyautoattack seeds (of CUDA that of the current device)."""
    from pyautoattack import fab_base
    cuda, theirs = device.type == "cuda", fab_base.projection_linf
    fab_base.projection_linf = project_linf
    try:
        with torch.random.fork_rng(devices=[device] if cuda else []), torch.cuda.device(device) if cuda else nullcontext():
            yield
    finally:
        fab_base.projection_linf = theirs
