"""Adversarial attacks and the two threat models under which they run. Source: SPEC 2, 3.2.

An attack works in attack space, the box [0, 1]. Under `pixel` it holds pixels; under `published`
(a bug, kept) normalised images: the clamp destroys about three quarters of their values, and 8/255
is about 1.6/255 in pixels.

    x_adv = attack(net, x, labels, get_threat_model("pixel", data), "PGD", targeted=False)
"""
import inspect
from dataclasses import dataclass
from functools import partial
from typing import Callable

import torch
import torch.nn.functional as F

from runtime.autoattack import draw_seed, patched, pyautoattack
from runtime.compilation import forward, freeze_parameters
from runtime.cuda_graphs import graphed_call
from runtime.device import MICRO_BATCH
from runtime.perturbation import check_perturbation
from runtime.safe_io import InputError
from runtime.torchattacks_attack import radius_of, run_torchattacks, torchattacks_class

EPS = 8 / 255  # L-inf radius in attack space
EPS_L2, STEP_SIZE_L2 = 128 / 255, 15 / 255
PUBLISHED_CLASSES = 10  # `published` aims at class (y + 1) mod 10, whatever the data set (SPEC 2)
TINY = 1e-10  # keeps a division by a norm finite


# ---------------------------------------------------------------------------------- threat models
@dataclass(frozen=True)
class ThreatModel:
    """Where images are attacked, and the standard PGD: eps, step_size, steps.

    encode: normalised images (N, C, H, W) -> attack space. decode: its inverse. eval_attack,
    eval_eps: options of the PGD that measures robust accuracies, and its radii by their names in
    runtime.measures.COLUMNS.
    """

    name: str
    encode: Callable
    decode: Callable
    eps: float
    step_size: float
    steps: int
    target_classes: int
    eval_attack: dict
    eval_eps: dict

    @property
    def eval_cost(self):
        """Forward-backward passes of the robust accuracies, an image."""
        return self.eval_attack["steps"] * len(self.eval_eps)

    def target_labels(self, labels):
        """The next class, at which targeted attacks aim: (N,) -> (N,)."""
        return (labels + 1) % self.target_classes

    def clamp_only(self, x):
        """The control without an attack: normalised images, clamped in attack space."""
        return self.decode(self.encode(x).clamp(0, 1))


THREAT_MODELS = ("published", "pixel")


def get_threat_model(name, data=None):
    """The threat model `name` for a Dataset; without one it has no encode and decode."""
    if name not in THREAT_MODELS:
        raise ValueError(f"unknown threat model {name!r}; choose one of published, pixel")
    if name == "published":  # QUIRK (published): normalised images as if they were pixels
        return ThreatModel(
            name, encode=lambda x: x, decode=lambda z: z, eps=EPS, step_size=2 / 225, steps=10,
            target_classes=PUBLISHED_CLASSES, eval_attack={"targeted": True, "steps": 10},
            eval_eps={"robust_acc": EPS})
    # Augmented images leave the box, so encode clamps. Targeted PGD would leave 2 to 6 % accuracy
    # on networks where untargeted PGD leaves none.
    return ThreatModel(
        name, encode=lambda x: data.denormalize(x).clamp(0, 1), decode=lambda z: data.normalize(z),
        eps=EPS, step_size=2 / 255, steps=10, target_classes=data and data.num_classes,
        eval_attack={"targeted": False, "steps": 20},
        eval_eps={"robust_2_acc": 2 / 255, "robust_4_acc": 4 / 255, "robust_acc": EPS})


def check_threat_model(name, data):
    """Raise InputError if the data set lacks classes that a threat model aims at."""
    if name == "published" and data.num_classes < PUBLISHED_CLASSES:
        raise InputError(f"--threat_model published aims at 10 classes, {data.name} has "
                         f"{data.num_classes}; choose --threat_model pixel")


# ---------------------------------------------------------------------------------------- attacks
# model: attack-space images -> (N, num_classes) logits. x: (N, C, H, W), attack space. labels:
# (N,), true classes, or if targeted those to reach. All return x_adv like x, in [0, 1].
def _input_gradient(model, x, labels, targeted):
    """The gradient in x of the loss that the attack increases, summed over the batch."""
    x = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(x), labels, reduction="sum"), x)
    return -gradient if targeted else gradient


def fgsm(model, x, labels, *, eps=EPS, targeted=False):
    """FGSM: one L-inf step of size eps. Goodfellow et al. 2015."""
    return (x + eps * _input_gradient(model, x, labels, targeted).sign()).clamp(0, 1)


def pgd(model, x, labels, noise=None, *, eps=EPS, step_size, steps=10, targeted=False):
    """PGD: L-inf steps from x, or from x + noise of `start_noise`. Madry et al. 2018."""
    x_adv = x if noise is None else (x + noise).clamp(0, 1)
    for _ in range(steps):
        x_adv = x_adv + step_size * _input_gradient(model, x_adv, labels, targeted).sign()
        # Project around x, not around its clamped image: `published` has x outside [0, 1].
        x_adv = (x + (x_adv - x).clamp(-eps, eps)).clamp(0, 1)
    return x_adv.detach()


def start_noise(x, eps, generator, micro_batch=MICRO_BATCH):
    """Uniform noise in the L-inf ball of radius eps, drawn for `micro_batch` images at a time."""
    parts = x.split(micro_batch)
    return torch.cat([torch.empty_like(p).uniform_(-eps, eps, generator=generator) for p in parts])


def pgd_l2(model, x, labels, *, eps=EPS_L2, step_size, steps=10, targeted=False):
    """PGD with L2 steps in an L2 ball, from x. Madry et al. 2018."""
    x_adv = x
    for _ in range(steps):
        gradient = _input_gradient(model, x_adv, labels, targeted)
        x_adv = x_adv + step_size * gradient / (_l2(gradient) + TINY)
        # Under `published` the clamp moves x_adv so far that this undoes the attack (SPEC 2).
        delta = x_adv - x
        x_adv = (x + delta * (eps / (_l2(delta) + TINY)).clamp(max=1)).clamp(0, 1)
    return x_adv.detach()


def _l2(x):
    """The L2 norm of each image: (N, C, H, W) -> (N, 1, 1, 1)."""
    return x.flatten(1).norm(dim=1).view(-1, 1, 1, 1)


def _margin(logits, labels, floor=-torch.inf):
    """Logit of the label minus the largest other one, (N,), of logits not below `floor`."""
    own = logits.gather(1, labels[:, None]).squeeze(1).clamp(min=floor)
    return own - logits.scatter(1, labels[:, None], -torch.inf).amax(1).clamp(min=floor)


def _adam_direction(gradient, mean, square, step):
    """Adam's direction at `step`, from 0; updates the moments. (torch.optim.Adam keeps all rows.)
    """
    mean.lerp_(gradient, 0.1)
    square.lerp_(gradient.square(), 0.001)
    return (mean / (1 - 0.9 ** (step + 1))) / ((square / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)


def cw(model, x, labels, *, c=1.0, steps=100, lr=0.01, targeted=False, logit_floor=-torch.inf):
    """C&W: Adam in tanh space on |x_adv - x|^2 + c * max(margin, 0). Carlini and Wagner 2017.

    Deviations: no search over c, as published; an image at its goal leaves the batch once its cost,
    read at every tenth of the steps, was no new minimum twice in a row (changes up to 5 % larger).
    logit_floor: least logit in the margin. 0 is a QUIRK (published): blind to negative targets.
    """
    x_best, l2_best = x.clone(), x.new_full((len(x),), torch.inf)
    rows = torch.arange(len(x), device=x.device)  # the images still in the batch
    w = torch.atanh((2 * x - 1).clamp(-1, 1))
    mean, square = torch.zeros_like(w), torch.zeros_like(w)
    lowest, stale = x.new_full((len(x),), torch.inf), torch.zeros_like(labels)
    for step in range(steps):
        w.requires_grad_()
        z = (torch.tanh(w) + 1) / 2
        l2 = (z - x[rows]).square().sum((1, 2, 3))
        logits = model(z)
        margin = _margin(logits, labels[rows], logit_floor)
        cost = l2 + c * (-margin if targeted else margin).clamp(min=0)
        (gradient,) = torch.autograd.grad(cost.sum(), w)
        z, l2, cost = z.detach(), l2.detach(), cost.detach()
        reached = (logits.argmax(1) == labels[rows]) == targeted
        better = reached & (l2 < l2_best[rows])
        l2_best[rows[better]], x_best[rows[better]] = l2[better], z[better]
        w = w.detach() - lr * _adam_direction(gradient, mean, square, step)
        if step % max(steps // 10, 1) == 0:
            stale[rows] = torch.where(cost < lowest[rows], 0, stale[rows] + 1)
            lowest[rows] = torch.minimum(cost, lowest[rows])
            stay = (stale[rows] < 2) | l2_best[rows].isinf()
            rows, w, mean, square = rows[stay], w[stay], mean[stay], square[stay]
            if len(rows) == 0:
                break
    return x_best


# DeepFool skips classes that are too far away even with a gradient STEEPER times as long as that of
# the first class (largest seen: 1.6 on ConvNet, 5.2 on AlexNet); after num_classes passes, MARGIN
# times as long as the longest one of this call.
STEEPER, MARGIN = 5.0, 1.2
OVERSHOOT = 0.02


def deepfool(model, x, labels, *, steps=50, batch=MICRO_BATCH):
    """DeepFool: steps over the nearest linearised boundary until the class changes, or a step
    changes nothing. Moosavi-Dezfooli et al. 2016.

    A pass looks at one class of each of `batch` images; the next image takes the place of one that
    is done.
    """
    state = _DeepFool(x, labels)
    rows, waiting = torch.arange(len(x), device=x.device).tensor_split([batch])
    while len(rows):
        correct, unfinished = state.look_at_next_class(model, rows)
        stepping = rows[correct & ~unfinished]
        moved = state.step(stepping)
        again = stepping[moved & (state.steps[stepping] < steps)]
        rows = torch.cat([rows[correct & unfinished], again])
        new, waiting = waiting.tensor_split([batch - len(rows)])
        rows = torch.cat([rows, new])
    return state.x_adv


class _DeepFool:
    """The state of all images. rows: indices of those in the batch."""

    def __init__(self, x, labels):
        self.labels, self.x_adv, self.steps = labels, x.clone(), torch.zeros_like(labels)
        self.change = torch.zeros_like(x)  # to the nearest boundary so far
        self.nearest = x.new_full((len(x),), torch.inf)  # its distance
        self.first_norm = x.new_zeros(len(x))  # length of the first class's gradient
        self.steepest = x.new_ones(())  # the longest gradient relative to first_norm
        self.left = None  # (N, num_classes): classes not looked at yet
        self.passes = 0

    def look_at_next_class(self, model, rows):
        """Look at the class left with the largest logit. Returns masks of the rows that are right,
        and of those with further classes to look at."""
        x = self.x_adv[rows].requires_grad_()
        logits = model(x)
        if self.left is None:
            self.left = F.one_hot(self.labels, logits.shape[1]) == 0
        gaps = logits.gather(1, self.labels[rows, None]) - logits
        ahead = gaps.detach().where(self.left[rows], torch.inf)
        gap, other = ahead.min(1)
        (gradient,) = torch.autograd.grad(gaps.gather(1, other[:, None]).sum(), x)
        norm = _l2(gradient).flatten() + TINY
        distance, first = gap / norm, self.nearest[rows].isinf()
        closer = first | (distance < self.nearest[rows])
        self.nearest[rows[closer]] = distance[closer]
        scale = (distance / norm)[closer].view(-1, 1, 1, 1)
        self.change[rows[closer]] = -gradient[closer] * scale
        self.first_norm[rows[first]] = norm[first]
        self.steepest = torch.maximum(self.steepest, (norm / self.first_norm[rows]).max())
        self.left[rows, other] = False

        bound = MARGIN * self.steepest if self.passes >= logits.shape[1] else STEEPER
        self.passes += 1
        next_gap = ahead.scatter(1, other[:, None], torch.inf).amin(1)
        unfinished = next_gap < self.nearest[rows] * (self.first_norm[rows] * bound)
        return logits.argmax(1) == self.labels[rows], unfinished

    def step(self, rows):
        """Move images over their nearest boundary. Returns a mask of those that changed."""
        before = self.x_adv[rows]
        self.x_adv[rows] = (before + (1 + OVERSHOOT) * self.change[rows]).clamp(0, 1)
        self.nearest[rows], self.left[rows] = torch.inf, True
        self.left[rows, self.labels[rows]] = False
        self.steps[rows] += 1
        return (self.x_adv[rows] != before).flatten(1).any(1)


def spsa(model, x, labels, *, eps=EPS, steps=1, samples=128, targeted=False, generator=None):
    """SPSA: Adam on the margin, its gradient estimated from logits at `samples` pairs of points
    x +- delta * v, v of random signs. Uesato et al. 2018."""
    delta, lr = 0.01, 0.01
    x_adv, mean, square = x.clone(), torch.zeros_like(x), torch.zeros_like(x)
    with torch.no_grad():
        for step in range(steps):
            estimate = torch.zeros_like(x)
            for _ in range(samples):
                v = torch.randint(0, 2, x.shape, generator=generator, device=x.device)
                v = v.to(x.dtype) * 2 - 1
                difference = _margin(model(x_adv + delta * v), labels)
                difference = difference - _margin(model(x_adv - delta * v), labels)
                estimate += difference.view(-1, 1, 1, 1) * v / (2 * delta * samples)  # 1/v = v
            gradient = -estimate if targeted else estimate
            x_adv = x_adv - lr * _adam_direction(gradient, mean, square, step)
            x_adv = (x + (x_adv - x).clamp(-eps, eps)).clamp(0, 1)
    return x_adv


def autoattack(model, x, labels, *, eps=EPS, iterations=100, queries=5000, generator=None,
               batch=MICRO_BATCH):
    """Standard AutoAttack, L-inf: APGD-CE, targeted APGD-DLR and FAB with `iterations` each, Square
    with `queries`. Croce and Hein 2020; their code, as pyautoattack.

    Deviation for few classes: at most C - 1 targets; below four, cross-entropy for the DLR loss.
    """
    AutoAttack, _ = pyautoattack()
    standard = AutoAttack(model, norm="Linf", eps=eps, seed=draw_seed(generator), device=x.device)
    for part in (standard.apgd, standard.apgd_targeted, standard.fab):
        part.n_iter = iterations
    with torch.no_grad():
        classes = model(x[:1]).shape[1]
    for part in (standard.apgd_targeted, standard.fab):
        part.n_target_classes = min(part.n_target_classes, classes - 1)
    if classes < 4:
        standard.apgd_targeted.dlr_loss_targeted = standard.apgd_targeted.ce_loss_targeted
    standard.square.n_queries, standard.square.resc_schedule = queries, True
    with patched(x.device):
        return standard.run_standard_evaluation(x, labels, batch_size=batch)[0]


def square_attack(model, x, labels, *, eps=EPS, queries=5000, targeted=False, generator=None):
    """Square: random squares of +-eps, kept where the margin falls. Andriushchenko et al. 2020;
    their code, as pyautoattack."""
    _, SquareAttack = pyautoattack()
    square = SquareAttack(
        model, norm="Linf", eps=eps, n_queries=queries, p_init=0.8, targeted=targeted,
        loss="margin", resc_schedule=True, seed=draw_seed(generator), device=x.device)
    with patched(x.device), torch.no_grad():
        return square.perturb(x, labels)


# ------------------------------------------------------------------------------ attack a network
@dataclass(frozen=True)
class Attack:
    """How to run an attack, a function above. It gets the `noise`, `generator` or `batch` (it takes
    all images) that its arguments name.

    eps: threat model -> default; None: it looks for the least change. options: likewise. query: it
    sees logits only. keeps_failed_input: what it fails on comes back, maybe from outside [0, 1].
    """

    run: Callable
    norm: str = "Linf"
    eps: Callable = lambda threat: threat.eps
    options: Callable = lambda threat: {}
    targetable: bool = True
    query: bool = False
    keeps_failed_input: bool = False

    def takes(self, argument):
        return argument in inspect.signature(self.run).parameters


ATTACKS = {  # Source of the settings: SPEC 3.2
    "FGSM": Attack(fgsm),
    "PGD": Attack(pgd, options=lambda t: {"step_size": t.step_size, "steps": t.steps}),
    "PGD20": Attack(pgd, options=lambda t: {"step_size": t.step_size, "steps": 20}),
    "PGD_L2": Attack(pgd_l2, "L2", lambda t: EPS_L2, lambda t: {"step_size": STEP_SIZE_L2}),
    "CW": Attack(cw, "L2", None, lambda t: {"logit_floor": 0.0} if t.name == "published" else {},
                 keeps_failed_input=True),
    "Deepfool": Attack(deepfool, "L2", None, targetable=False, keeps_failed_input=True),
    "AA": Attack(autoattack, targetable=False, keeps_failed_input=True),
    "Square": Attack(square_attack, query=True, keeps_failed_input=True),
    "SPSA": Attack(spsa, query=True),
}

TORCHATTACKS = "torchattacks:"  # before the name of an attack of that package


def find_attack(name):
    """The Attack of a name: of ATTACKS, or "torchattacks:VMIFGSM" for any attack of torchattacks
    with the settings it has there. Raises InputError."""
    if name in ATTACKS:
        return ATTACKS[name]
    if not name.startswith(TORCHATTACKS):
        raise InputError(f"unknown attack {name!r}; choose one of {', '.join(ATTACKS)}, or "
                         f"{TORCHATTACKS}NAME")
    made = torchattacks_class(name.removeprefix(TORCHATTACKS))
    norm, radius = ("L2", EPS_L2) if "L2" in name else ("Linf", EPS)
    eps = (lambda threat: radius) if radius_of(made) else None
    return Attack(partial(run_torchattacks, made), norm, eps, targetable=False,
                  keeps_failed_input=True)


def attack(net, x, labels, threat, name="PGD", **options):
    """The x_adv of `attack_with_norms`, which has the same arguments."""
    return attack_with_norms(net, x, labels, threat, name, **options)[0]


def attack_with_norms(net, x, labels, threat, name="PGD", *, targeted=True, eps=None,
                      generator=None, micro_batch=MICRO_BATCH, shard=None, passes=None, **options):
    """Attack a network, in eval mode, on normalised images (N, C, H, W), and check the result.

    labels: (N,), true classes. eps: attack-space units; the default step size goes with it.
    generator: on x's device. micro_batch: images at a time. shard: a slice; attack these images
    only, with their noise in the whole batch. passes: a Counter of "forward" and "backward" passes,
    in images. options: of the attack; random_start=False starts PGD at x.

    Returns x_adv, normalised, and the L-inf and L2 change of each image in attack space, (N,).
    Raises InputError for an unknown attack, ValueError for a form or eps it does not have, and what
    `check_perturbation` raises.
    """
    spec = find_attack(name)
    random_start = options.pop("random_start", spec.takes("noise"))
    options = _attack_options(spec, name, threat, targeted, eps, generator, options)
    tensors = [x, threat.target_labels(labels) if targeted else labels]
    if random_start:
        tensors.append(start_noise(x, options["eps"], generator, micro_batch))
    if shard is not None:
        tensors = [tensor[shard] for tensor in tensors]
    if spec.takes("batch"):
        options["batch"], micro_batch = micro_batch, max(len(x), 1)
    key = None  # CUDA graphs can replay PGD, whose operations never vary; a replay counts nothing
    if spec.takes("noise") and passes is None:
        key = (name, id(threat), *sorted(options.items()))

    def run(net, z, goal, *noise):
        def model(z):
            logits = forward(net, threat.decode(z))
            return logits if passes is None else _count_passes(passes, logits)
        return spec.run(model, z, goal, *noise, **options),

    was_training, results = net.training, []
    net.eval()
    with freeze_parameters(net):
        for x, *others in zip(*(tensor.split(micro_batch) for tensor in tensors)):
            z = threat.encode(x)
            (z_adv,) = graphed_call(run, key, net, z, *others)
            norms = check_perturbation(z, z_adv, spec.norm, options.get("eps"),
                                       spec.keeps_failed_input)
            results.append((threat.decode(z_adv), *norms))
    net.train(was_training)
    return tuple(torch.cat(part) for part in zip(*results))


def _count_passes(passes, logits):
    passes["forward"] += len(logits)
    if logits.requires_grad:
        logits.register_hook(lambda gradient: passes.update(backward=len(gradient)))
    return logits


def _attack_options(spec, name, threat, targeted, eps, generator, given):
    """The options of the attack: `given`, and what these leave to the attack and threat model."""
    if targeted and not spec.targetable:
        raise ValueError(f"{name} has no targeted form")
    if eps is not None and not spec.eps:
        raise ValueError(f"{name} has no eps")
    options = spec.options(threat)
    if spec.eps:
        options["eps"] = spec.eps(threat) if eps is None else eps
        if "step_size" in options:
            options["step_size"] = options["step_size"] * options["eps"] / spec.eps(threat)
    if spec.targetable:
        options["targeted"] = targeted
    if spec.takes("generator"):
        options["generator"] = generator
    return options | given
