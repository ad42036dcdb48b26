"""The audit of an attack: whether its examples are images, and as near to the originals as it claims."""
import math

import torch

TOLERANCE = 1e-6  # of the audit, attack-space units


def audit(x, x_adv, norm, eps, gives_up=False):
    """Verify an attack after the fact: finite, inside [0, 1], within eps of the (clamped) image.

    x, x_adv: (N, C, H, W) attack space. norm: "Linf" or "L2", of eps; eps None: no bound. gives_up: an image that came back
    as it was is right wherever it lies, and counts as no change.
    Returns the L-inf and the L2 change of each image, (N,) each. Raises FloatingPointError if x_adv is not finite,
    RuntimeError with the figures if it is out of bounds: a broken attack must never become a result.
    """
    change = x_adv - x.clamp(0, 1)
    if gives_up:
        unchanged = (x_adv == x).flatten(1).all(1).view(-1, 1, 1, 1)
        x_adv, change = (torch.where(unchanged, 0, t) for t in (x_adv, change))
    linf, l2 = change.flatten(1).abs().amax(1), change.flatten(1).norm(dim=1)  # (N,), (N,)
    if len(x) == 0:
        return linf, l2
    largest = (linf if norm == "Linf" else l2).max()
    low, high, largest = torch.stack([x_adv.min(), x_adv.max(), largest]).tolist()  # one synchronisation; NaN propagates
    if not math.isfinite(low + high + largest):
        raise FloatingPointError("an attack met values that are not finite: the network or the images have diverged")
    if not (low >= 0 and high <= 1 and (eps is None or largest <= eps + TOLERANCE)):
        raise RuntimeError(f"an attack left its bounds: values in [{low:.6g}, {high:.6g}], largest {norm} change "
                           f"{largest:.6g}, allowed are [0, 1] and {eps}")
    return linf, l2
