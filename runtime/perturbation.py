"""The check that an attack returned images, as close to the originals as it claims."""
import math
from contextlib import contextmanager

import torch

TOLERANCE = 1e-6  # attack-space units

_deferred = None  # the DeferredChecks inside `deferred_checks`


class DeferredChecks:
    """Extremes of attacks, not read yet: reading makes the host wait for the device."""

    def __init__(self):
        self.pending = []  # (extremes (3,), norm, eps)

    def read(self, values=()):
        """Check the extremes. Returns `values`, () tensors, as floats: one transfer for all."""
        pending, self.pending = self.pending, []
        tensors = [found for found, *_ in pending] + [value.detach().view(1) for value in values]
        numbers = torch.cat(tensors).tolist() if tensors else []
        for k, (_, norm, eps) in enumerate(pending):
            _require_bounds(*numbers[3 * k:3 * k + 3], norm, eps)
        return numbers[3 * len(pending):]


@contextmanager
def deferred_checks():
    """Checks inside wait for `read` of the yielded DeferredChecks, or for the end."""
    global _deferred
    _deferred = checks = DeferredChecks()
    try:
        yield checks
        checks.read()
    finally:
        _deferred = None


def check_perturbation(x, x_adv, norm, eps, keeps_failed_input=False):
    """Check that x_adv is finite, inside [0, 1] and within eps of the clamped x.

    x, x_adv: (N, C, H, W), attack space. norm: "Linf" or "L2", of eps; eps None: no bound.
    keeps_failed_input: an image equal to its original passes. Returns the L-inf and the L2 change
    of each image, (N,). Raises FloatingPointError or RuntimeError.
    """
    change = x_adv - x.clamp(0, 1)
    if keeps_failed_input:
        unchanged = (x_adv == x).flatten(1).all(1).view(-1, 1, 1, 1)
        x_adv, change = (torch.where(unchanged, 0, t) for t in (x_adv, change))
    linf, l2 = change.flatten(1).abs().amax(1), change.flatten(1).norm(dim=1)
    if len(x):
        largest = (linf if norm == "Linf" else l2).max()
        found = torch.stack([x_adv.min(), x_adv.max(), largest]).detach()  # NaN propagates
        if _deferred is None:
            _require_bounds(*found.tolist(), norm, eps)
        else:
            _deferred.pending.append((found, norm, eps))
    return linf, l2


def _require_bounds(low, high, largest, norm, eps):
    if not math.isfinite(low + high + largest):
        raise FloatingPointError("an attack met values that are not finite: the network or the "
                                 "images have diverged")
    if low < 0 or high > 1 or (eps is not None and largest > eps + TOLERANCE):
        raise RuntimeError(f"an attack left its bounds: values from {low:.6g} to {high:.6g}, "
                           f"{norm} change {largest:.6g}; eps is {eps}")
