"""The audit of an attack: whether its examples are images, and as near to the originals as it claims."""
import math
from contextlib import contextmanager

import torch

TOLERANCE = 1e-6  # of the audit, attack-space units

_later = None  # the DeferredChecks of an `deferred_checks`


class DeferredChecks:
    """What was found of attacks and not looked at yet: looking makes the host wait for the device."""

    def __init__(self):
        self.found, self.allowed = [], []

    def add(self, found, norm, eps):
        self.found.append(found)  # (3,): lowest and highest value, largest change
        self.allowed.append((norm, eps))

    def read(self, values=()):
        """Look at all, and at `values`, () tensors, in one go. Returns the values as floats. Raises as `audit` does."""
        found = torch.cat([*self.found, *(value.detach().view(1) for value in values)]).tolist() if self.found or values else []
        for k, (norm, eps) in enumerate(self.allowed):
            _judge(*found[3 * k:3 * k + 3], norm, eps)
        values = found[3 * len(self.allowed):]
        self.found, self.allowed = [], []
        return values


@contextmanager
def deferred_checks():
    """The audits of the attacks inside are read together, by `read` of what this yields or at the end."""
    global _later
    _later = audits = DeferredChecks()
    try:
        yield audits
        audits.read()
    finally:
        _later = None


def check_perturbation(x, x_adv, norm, eps, keeps_failed_input=False):
    """Verify an attack after the fact: finite, inside [0, 1], within eps of the (clamped) image.

    x, x_adv: (N, C, H, W) attack space. norm: "Linf" or "L2", of eps; eps None: no bound. keeps_failed_input: an image that came back
    as it was is right wherever it lies, and counts as no change.
    Returns the L-inf and the L2 change of each image, (N,) each. Raises FloatingPointError if x_adv is not finite,
    RuntimeError with the figures if it is out of bounds: a broken attack must never become a result.
    """
    change = x_adv - x.clamp(0, 1)
    if keeps_failed_input:
        unchanged = (x_adv == x).flatten(1).all(1).view(-1, 1, 1, 1)
        x_adv, change = (torch.where(unchanged, 0, t) for t in (x_adv, change))
    linf, l2 = change.flatten(1).abs().amax(1), change.flatten(1).norm(dim=1)  # (N,), (N,)
    if len(x) == 0:
        return linf, l2
    largest = (linf if norm == "Linf" else l2).max()
    found = torch.stack([x_adv.min(), x_adv.max(), largest]).detach()  # NaN propagates
    if _later is None:
        _judge(*found.tolist(), norm, eps)
    else:
        _later.add(found, norm, eps)
    return linf, l2


def _judge(low, high, largest, norm, eps):
    if not math.isfinite(low + high + largest):
        raise FloatingPointError("an attack met values that are not finite: the network or the images have diverged")
    if not (low >= 0 and high <= 1 and (eps is None or largest <= eps + TOLERANCE)):
        raise RuntimeError(f"an attack left its bounds: values in [{low:.6g}, {high:.6g}], largest {norm} change "
                           f"{largest:.6g}, allowed are [0, 1] and {eps}")
