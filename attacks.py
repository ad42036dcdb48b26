"""Adversarial attacks and the two threat models under which they run.

An attack works in *attack space*: a box [0, 1] in which eps and step sizes are counted. A threat model says how that
space relates to the normalised images that the networks take (SPEC 2):

- `pixel`: attack space = pixels; the normalisation happens inside the attacked model. The valid one.
- `published`: attack space = the normalised image itself, which the attack therefore clamps to [0, 1]. This destroys
  about three quarters of the values before any perturbation, and 8/255 is about 1.6/255 in pixels. Kept, bug for bug,
  to reproduce published figures; the `clamp_only` control shows how much of a "robust accuracy" is the clamp.
"""
import math
from dataclasses import dataclass
from typing import Callable

import torch
import torch.nn.functional as F

EPS = 8 / 255  # L-inf radius in attack space (both threat models)
PGD_STEPS = 10
TOLERANCE = 1e-6  # of the audit, attack-space units


# --------------------------------------------------------------------------------------------------------- threat models
@dataclass(frozen=True)
class ThreatModel:
    """How normalised images become attack-space images and back, and how far an attack may go.

    encode: (N, C, H, W) normalised images -> attack space, not yet clamped; decode: its inverse.
    eps, step_size: L-inf radius and PGD step in attack space. target_classes: the modulus of `target_labels`.
    """

    name: str
    encode: Callable
    decode: Callable
    eps: float
    step_size: float
    target_classes: int

    def target_labels(self, labels):
        """The class that a targeted attack aims at: the next one. labels: (N,) int64. Returns (N,) int64."""
        return (labels + 1) % self.target_classes

    def clamp_only(self, x):
        """The control: (N, C, H, W) normalised images through encode, clamp, decode, without any attack."""
        return self.decode(self.encode(x).clamp(0, 1))


def _published(data):
    # QUIRK (published): normalised images are attacked as if they were pixels; 10 classes whatever the data set has.
    return ThreatModel("published", encode=lambda x: x, decode=lambda z: z, eps=EPS, step_size=2 / 225,
                       target_classes=10)


def _pixel(data):
    # The images are clamped on the way in, so that augmented ones are images too: an attack starts from inside the box.
    return ThreatModel("pixel", encode=lambda x: data.denormalize(x).clamp(0, 1), decode=data.normalize, eps=EPS,
                       step_size=2 / 255, target_classes=data.num_classes)


THREAT_MODELS = {"published": _published, "pixel": _pixel}


def get_threat_model(name, data):
    """The threat model `name` for a data set.

    data: has `normalize`, `denormalize` (pixels in [0, 1] to normalised units and back) and `num_classes`.
    Raises ValueError for an unknown name. Source: SPEC 2.
    """
    if name not in THREAT_MODELS:
        raise ValueError(f"unknown threat model {name!r}; choose one of {', '.join(THREAT_MODELS)}")
    return THREAT_MODELS[name](data)


# --------------------------------------------------------------------------------------------------------------- attacks
# Common arguments. model: callable, attack-space images -> (N, num_classes) logits. x: (N, C, H, W) attack-space images.
# labels: (N,) int64, the true classes, or with targeted=True the classes to be reached. Returns x_adv like x, in [0, 1].
def _input_gradient(model, x, labels, targeted):
    """The gradient in x of the loss that the attack increases, summed over the batch."""
    x = x.detach().requires_grad_()
    loss = F.cross_entropy(model(x), labels, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, x)
    return -gradient if targeted else gradient


def fgsm(model, x, labels, *, eps=EPS, targeted=False):
    """Fast gradient sign method: one step of size eps, L-inf. Source: Goodfellow et al. 2015; SPEC 3.2."""
    return (x + eps * _input_gradient(model, x, labels, targeted).sign()).clamp(0, 1)


def pgd(model, x, labels, *, eps=EPS, step_size, steps=PGD_STEPS, targeted=False, random_start=True, generator=None):
    """Projected gradient descent, L-inf.

    eps, step_size: attack-space units. random_start: begin at a uniform point of the eps ball (drawn from `generator`,
    of x's device) rather than at x. Source: Madry et al. 2018; SPEC 1.1, 3.2.
    """
    x_adv = x
    if random_start:
        noise = torch.empty_like(x).uniform_(-eps, eps, generator=generator)
        x_adv = (x + noise).clamp(0, 1)
    for _ in range(steps):
        x_adv = x_adv + step_size * _input_gradient(model, x_adv, labels, targeted).sign()
        # Projected around x, not around its clamped image: under `published`, x lies outside [0, 1].
        x_adv = (x + (x_adv - x).clamp(-eps, eps)).clamp(0, 1)
    return x_adv.detach()


ATTACKS = {"FGSM": fgsm, "PGD": pgd}


def audit(x, x_adv, eps):
    """Verify an L-inf attack after the fact: finite, inside [0, 1], within eps of the (clamped) image.

    x, x_adv: (N, C, H, W) attack space. Returns the largest L-inf change. Raises FloatingPointError if x_adv is not
    finite, RuntimeError with the figures if it is out of bounds: a broken attack must never become a result.
    """
    if len(x) == 0:
        return 0.0
    change = (x_adv - x.clamp(0, 1)).abs().max()
    low, high, change = torch.stack([x_adv.min(), x_adv.max(), change]).tolist()  # one synchronisation; NaN propagates
    if not math.isfinite(low + high + change):
        raise FloatingPointError("an attack met values that are not finite: the network or the images have diverged")
    if not (low >= 0 and high <= 1 and change <= eps + TOLERANCE):
        raise RuntimeError(f"an attack left its bounds: values in [{low:.6g}, {high:.6g}], largest change "
                           f"{change:.6g}, allowed are [0, 1] and {eps:.6g}")
    return change


def attack_images(net, x, labels, threat, generator, attack="PGD", targeted=True, chunk=256, **options):
    """Attack normalised images under a threat model and audit the result.

    net: a network on normalised images; attacked in eval mode, afterwards in the mode it was in.
    x: (N, C, H, W) normalised. labels: (N,) true classes; a targeted attack aims at `threat.target_labels` of them.
    generator: of x's device, for random starts. attack: a name of ATTACKS. chunk: images attacked at a time (memory).
    options: passed to the attack. Returns (N, C, H, W) normalised adversarial images.
    Raises ValueError for an unknown attack; RuntimeError if the audit fails, FloatingPointError if values are not finite.
    """
    if attack not in ATTACKS:
        raise ValueError(f"unknown attack {attack!r}; choose one of {', '.join(ATTACKS)}")
    if attack == "PGD":
        options = {"step_size": threat.step_size, "generator": generator, **options}
    was_training = net.training
    net.eval()
    goal = threat.target_labels(labels) if targeted else labels
    adversarial = []
    for x_part, goal_part in zip(x.split(chunk), goal.split(chunk)):
        z = threat.encode(x_part)
        z_adv = ATTACKS[attack](lambda z: net(threat.decode(z)), z, goal_part, eps=threat.eps, targeted=targeted, **options)
        audit(z, z_adv, threat.eps)
        adversarial.append(threat.decode(z_adv))
    net.train(was_training)
    return torch.cat(adversarial)
