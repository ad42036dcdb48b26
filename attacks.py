"""Adversarial attacks and the two threat models under which they run. Source: SPEC 2, 3.2.

An attack works in attack space, the box [0, 1]; eps and step sizes are in its units:

- `pixel`: attack space holds pixels; the attacked model includes the normalisation. Valid.
- `published`: attack space holds normalised images. The clamp to [0, 1] destroys about three
  quarters of the values, and 8/255 is about 1.6/255 in pixels. Kept, bug for bug, to reproduce
  published figures; the control `clamp_only` measures the clamp alone.

    x_adv = attack(net, x, labels, get_threat_model("pixel", data), "PGD", targeted=False)
"""
from dataclasses import dataclass
from typing import Callable

import torch
import torch.nn.functional as F

from runtime.autoattack import draw_seed, patched, pyautoattack
from runtime.compilation import forward, freeze_parameters
from runtime.cuda_graphs import graphed_call
from runtime.device import MICRO_BATCH
from runtime.perturbation import check_perturbation
from runtime.safe_io import InputError

EPS = 8 / 255  # L-inf radius in attack space
EPS_L2, STEP_SIZE_L2 = 128 / 255, 15 / 255
PUBLISHED_CLASSES = 10  # `published` aims at class (y + 1) mod 10, whatever the data set (SPEC 2)
TINY = 1e-10  # keeps a division by a norm finite


# ---------------------------------------------------------------------------------- threat models
@dataclass(frozen=True)
class ThreatModel:
    """The space in which images are attacked, and how far an attack may go.

    encode: (N, C, H, W) normalised images -> attack space, not clamped. decode: its inverse.
    eps, step_size, steps: of the standard L-inf PGD. target_classes: modulus of target labels.
    eval_attack, eval_eps: options of the PGD that measures robust accuracies, and its radii by the
    name of the accuracy (runtime.measures.COLUMNS).
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
        """Forward-backward passes an image that the robust accuracies take."""
        return self.eval_attack["steps"] * len(self.eval_eps)

    def target_labels(self, labels):
        """The class that a targeted attack aims at, the next one: (N,) -> (N,)."""
        return (labels + 1) % self.target_classes

    def clamp_only(self, x):
        """The control without an attack: encode, clamp and decode normalised images."""
        return self.decode(self.encode(x).clamp(0, 1))


def _published(data):
    # QUIRK (published): attacks normalised images as if they were pixels.
    return ThreatModel(
        "published", encode=lambda x: x, decode=lambda z: z, eps=EPS, step_size=2 / 225, steps=10,
        target_classes=PUBLISHED_CLASSES, eval_attack={"targeted": True, "steps": 10},
        eval_eps={"robust_acc": EPS})


def _pixel(data):
    # Augmented images leave the box, so encode clamps. The evaluation is untargeted: targeted PGD
    # leaves 2 to 6 % accuracy on networks where untargeted PGD leaves none.
    return ThreatModel(
        "pixel", encode=lambda x: data.denormalize(x).clamp(0, 1),
        decode=lambda z: data.normalize(z), eps=EPS, step_size=2 / 255, steps=10,
        target_classes=data and data.num_classes,
        eval_attack={"targeted": False, "steps": 20},
        eval_eps={"robust_2_acc": 2 / 255, "robust_4_acc": 4 / 255, "robust_acc": EPS})


THREAT_MODELS = {"published": _published, "pixel": _pixel}


def get_threat_model(name, data=None):
    """The threat model `name` for a Dataset; None where only radii and steps are asked for.

    Raises ValueError for an unknown name.
    """
    return _choose("threat model", name, THREAT_MODELS)(data)


def _choose(what, name, table):
    if name not in table:
        raise ValueError(f"unknown {what} {name!r}; choose one of {', '.join(table)}")
    return table[name]


def check_threat_model(name, data):
    """Raise InputError if the data set has too few classes for the targets of a threat model."""
    if name == "published" and data.num_classes < PUBLISHED_CLASSES:
        raise InputError(
            f"--threat_model published aims at class (y + 1) mod {PUBLISHED_CLASSES}, {data.name} "
            f"has {data.num_classes} classes; choose --threat_model pixel")


# ---------------------------------------------------------------------------------------- attacks
# Arguments of all attacks. model: attack-space images -> (N, num_classes) logits. x: (N, C, H, W)
# attack-space images. labels: (N,) int64, true classes; the classes to reach if targeted. eps,
# step_size: attack-space units. generator: on x's device. All return x_adv like x, in [0, 1].
def _input_gradient(model, x, labels, targeted):
    """The gradient in x of the loss that the attack increases, summed over the batch."""
    x = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(x), labels, reduction="sum"), x)
    return -gradient if targeted else gradient


def fgsm(model, x, labels, *, eps=EPS, targeted=False):
    """FGSM: one step of size eps along the gradient's sign. L-inf. Goodfellow et al. 2015."""
    return (x + eps * _input_gradient(model, x, labels, targeted).sign()).clamp(0, 1)


def pgd(model, x, labels, noise=None, *, eps=EPS, step_size, steps=10, targeted=False):
    """PGD: projected gradient descent from x + noise. L-inf. Madry et al. 2018; SPEC 1.1.

    noise: like x, for a random start from `start_noise`; None: start at x.
    """
    x_adv = x if noise is None else (x + noise).clamp(0, 1)
    for _ in range(steps):
        x_adv = x_adv + step_size * _input_gradient(model, x_adv, labels, targeted).sign()
        # Project around x, not around its clamped image: `published` has x outside [0, 1].
        x_adv = (x + (x_adv - x).clamp(-eps, eps)).clamp(0, 1)
    return x_adv.detach()


def start_noise(x, eps, generator, micro_batch=MICRO_BATCH):
    """A uniform draw from the L-inf ball of radius eps for each image, `micro_batch` at a time."""
    parts = x.split(micro_batch)
    return torch.cat([torch.empty_like(p).uniform_(-eps, eps, generator=generator) for p in parts])


def pgd_l2(model, x, labels, *, eps=EPS_L2, step_size, steps=10, targeted=False):
    """PGD with L2 steps in an L2 ball, from x. L2. Madry et al. 2018."""
    x_adv = x
    for _ in range(steps):
        gradient = _input_gradient(model, x_adv, labels, targeted)
        x_adv = x_adv + step_size * gradient / (_l2(gradient) + TINY)
        # Under `published` the clamp moves x_adv so far from x that this projection undoes nearly
        # all of the attack: its PGD-L2 accuracy is that of the clamp (SPEC 2).
        delta = x_adv - x
        x_adv = (x + delta * (eps / (_l2(delta) + TINY)).clamp(max=1)).clamp(0, 1)
    return x_adv.detach()


def _l2(x):
    """The L2 norm of each image: (N, C, H, W) -> (N, 1, 1, 1)."""
    return x.flatten(1).norm(dim=1).view(-1, 1, 1, 1)


def _margin(logits, labels, floor=-torch.inf):
    """Logit of the label minus the largest other one, (N,). floor: the least value of a logit."""
    own = logits.gather(1, labels[:, None]).squeeze(1).clamp(min=floor)
    return own - logits.scatter(1, labels[:, None], -torch.inf).amax(1).clamp(min=floor)


def _adam_direction(gradient, mean, square, step):
    """Adam's direction at `step` (from 0). mean, square: its moments, updated in place.
    torch.optim.Adam has no moments whose rows can be dropped.
    """
    mean.lerp_(gradient, 0.1)
    square.lerp_(gradient.square(), 0.001)
    return (mean / (1 - 0.9 ** (step + 1))) / ((square / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)


def cw(model, x, labels, *, c=1.0, kappa=0.0, steps=100, lr=0.01, targeted=False,
       logit_floor=-torch.inf):
    """C&W: minimise |x_adv - x|^2 + c * max(margin, -kappa) by Adam in tanh space. L2. Carlini and
    Wagner 2017.

    Deviation: no search over c, as in the published benchmark. A failed image comes back as it
    was. An image at its goal leaves the batch once its cost, read at every tenth of the steps, was
    no new minimum twice in a row: same accuracy, changes up to 5 % larger. logit_floor: least
    logit in the margin. 0 is a QUIRK (published): blind while the target's logit is negative.
    """
    x_best, l2_best = x.clone(), x.new_full((len(x),), torch.inf)
    rows = torch.arange(len(x), device=x.device)  # the images still in the batch
    w = torch.atanh((2 * x - 1).clamp(-1, 1))
    mean, square = torch.zeros_like(w), torch.zeros_like(w)
    lowest, stale = x.new_full((len(x),), torch.inf), torch.zeros_like(labels)
    for step in range(steps):
        z, l2, reached, cost, gradient = _cw_cost(
            model, w, x[rows], labels[rows], c, kappa, targeted, logit_floor)
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


def _cw_cost(model, w, x, labels, c, kappa, targeted, logit_floor):
    """At w: images, squared L2 changes, whether they reach the goal, costs, gradient in w."""
    w = w.requires_grad_()
    z = (torch.tanh(w) + 1) / 2
    l2 = (z - x).square().sum((1, 2, 3))
    logits = model(z)
    margin = _margin(logits, labels, logit_floor)
    cost = l2 + c * (-margin if targeted else margin).clamp(min=-kappa)
    (gradient,) = torch.autograd.grad(cost.sum(), w)
    reached = (logits.argmax(1) == labels) == targeted
    return z.detach(), l2.detach(), reached, cost.detach(), gradient


# DeepFool skips classes too far away to have the nearest boundary, given a bound on the ratio of
# their gradient norm to the first class's: STEEPER (largest seen: 1.6 on ConvNet, 5.2 on AlexNet),
# after num_classes passes MARGIN times the largest ratio of the call.
STEEPER = 5.0
MARGIN = 1.2


def deepfool(model, x, labels, *, steps=50, overshoot=0.02, batch=MICRO_BATCH):
    """DeepFool: step to the nearest linearised class boundary until the class changes, or a step
    changes nothing. L2, untargeted. Moosavi-Dezfooli et al. 2016.

    *Performance-impacting*: a pass looks at one class of each of `batch` images. An image without
    a class left steps; one that is done makes room for the next. So batches stay full.
    """
    state = _DeepFool(x, labels)
    rows, waiting = torch.arange(len(x), device=x.device).tensor_split([batch])
    while len(rows):
        correct, unfinished = state.look_at_next_class(model, rows)
        stepping = rows[correct & ~unfinished]
        moved = state.step(stepping, overshoot)
        again = stepping[moved & (state.steps[stepping] < steps)]
        rows = torch.cat([rows[correct & unfinished], again])
        new, waiting = waiting.tensor_split([batch - len(rows)])
        rows = torch.cat([rows, new])
    return state.x_adv


class _DeepFool:
    """Where DeepFool is with each image. rows: indices of the images in the batch."""

    def __init__(self, x, labels):
        self.labels, self.x_adv, self.steps = labels, x.clone(), torch.zeros_like(labels)
        self.change = torch.zeros_like(x)  # to the nearest boundary found so far
        self.nearest = x.new_full((len(x),), torch.inf)  # its distance
        self.first_norm = x.new_zeros(len(x))  # gradient norm of the first class
        self.steepest = x.new_ones(())  # the largest gradient norm relative to first_norm
        self.left = None  # (N, num_classes): classes not looked at yet
        self.passes = 0

    def look_at_next_class(self, model, rows):
        """Find the boundary of the class with the largest logit among those left. Returns masks of
        rows that are classified correctly, and that have further classes to look at.
        """
        x = self.x_adv[rows].requires_grad_()
        logits = model(x)
        if self.left is None:
            self.left = F.one_hot(self.labels, logits.shape[1]) == 0
        gaps = logits.gather(1, self.labels[rows, None]) - logits
        ahead = gaps.detach().where(self.left[rows], torch.inf)
        gap, other = ahead.min(1)
        (gradient,) = torch.autograd.grad(gaps.gather(1, other[:, None]).sum(), x)
        self._record(rows, gap, gradient)
        self.left[rows, other] = False

        bound = MARGIN * self.steepest if self.passes >= logits.shape[1] else STEEPER
        self.passes += 1
        next_gap = ahead.scatter(1, other[:, None], torch.inf).amin(1)
        unfinished = next_gap < self.nearest[rows] * (self.first_norm[rows] * bound)
        return logits.argmax(1) == self.labels[rows], unfinished

    def _record(self, rows, gap, gradient):
        """Keep the boundaries that are nearer than those before."""
        norm = _l2(gradient).flatten() + TINY
        distance, first = gap / norm, self.nearest[rows].isinf()
        closer = first | (distance < self.nearest[rows])
        self.nearest[rows[closer]] = distance[closer]
        scale = (distance / norm)[closer].view(-1, 1, 1, 1)
        self.change[rows[closer]] = -gradient[closer] * scale
        self.first_norm[rows[first]] = norm[first]
        self.steepest = torch.maximum(self.steepest, (norm / self.first_norm[rows]).max())

    def step(self, rows, overshoot):
        """Move images across their nearest boundary. Returns a mask of those that changed."""
        before = self.x_adv[rows]
        self.x_adv[rows] = (before + (1 + overshoot) * self.change[rows]).clamp(0, 1)
        self.nearest[rows], self.left[rows] = torch.inf, True
        self.left[rows, self.labels[rows]] = False
        self.steps[rows] += 1
        return (self.x_adv[rows] != before).flatten(1).any(1)


def spsa(model, x, labels, *, eps=EPS, delta=0.01, lr=0.01, steps=1, samples=128, targeted=False,
         generator=None):
    """SPSA: Adam on the margin, its gradient estimated from logits at `samples` random pairs of
    points x +- delta * v, v of random signs. L-inf. Uesato et al. 2018.
    """
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
    """AutoAttack, standard: APGD-CE, targeted APGD-DLR, targeted FAB, Square, each on what the ones
    before left. L-inf, untargeted. Croce and Hein 2020; their code, as pyautoattack.

    iterations: of the first three (published benchmark: 10). queries: of Square. batch: images at
    a time. Deviation: targets at most C - 1 of C classes (standard: 9). The DLR loss needs four
    classes; with fewer, targeted APGD uses the cross-entropy.
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
    """Square: random squares of +-eps, kept where the margin falls; at most `queries` logits an
    image. L-inf. Andriushchenko et al. 2020; their code, as pyautoattack.
    """
    _, SquareAttack = pyautoattack()
    square = SquareAttack(
        model, norm="Linf", eps=eps, n_queries=queries, p_init=0.8, targeted=targeted,
        loss="margin", resc_schedule=True, seed=draw_seed(generator), device=x.device)
    with patched(x.device), torch.no_grad():
        return square.perturb(x, labels)


# ------------------------------------------------------------------------------ attack a network
@dataclass(frozen=True)
class Attack:
    """An attack and its properties.

    run: a function above. eps, step_size, options: threat model -> default; eps None: looks for
    the least change. targetable: has a targeted form. query: sees logits only. random: takes a
    generator. random_start: takes noise, and repeats the same operations. keeps_failed_input:
    returns an image that it fails on as it came, which under `published` may be outside [0, 1].
    batches: takes all images and a batch size.
    """

    run: Callable
    norm: str = "Linf"
    eps: Callable = lambda threat: threat.eps
    step_size: Callable = None
    options: Callable = lambda threat: {}
    targetable: bool = True
    query: bool = False
    random: bool = False
    random_start: bool = False
    keeps_failed_input: bool = False
    batches: bool = False


ATTACKS = {  # Source of the settings: SPEC 3.2
    "FGSM": Attack(fgsm),
    "PGD": Attack(pgd, step_size=lambda t: t.step_size, options=lambda t: {"steps": t.steps},
                  random_start=True),
    "PGD20": Attack(pgd, step_size=lambda t: t.step_size, options=lambda t: {"steps": 20},
                    random_start=True),
    "PGD_L2": Attack(pgd_l2, "L2", lambda t: EPS_L2, step_size=lambda t: STEP_SIZE_L2),
    "CW": Attack(cw, "L2", None, keeps_failed_input=True,
                 options=lambda t: {"logit_floor": 0.0} if t.name == "published" else {}),
    "Deepfool": Attack(deepfool, "L2", None, targetable=False, keeps_failed_input=True,
                       batches=True),
    "AA": Attack(autoattack, targetable=False, random=True, keeps_failed_input=True, batches=True),
    "Square": Attack(square_attack, query=True, random=True, keeps_failed_input=True),
    "SPSA": Attack(spsa, query=True, random=True),
}


def attack(net, x, labels, threat, name="PGD", **options):
    """The x_adv of `attack_with_norms`, which has the same arguments."""
    return attack_with_norms(net, x, labels, threat, name, **options)[0]


def attack_with_norms(net, x, labels, threat, name="PGD", *, targeted=True, eps=None,
                      generator=None, micro_batch=MICRO_BATCH, shard=None, counter=None, **options):
    """Attack a network on normalised images, and check the result.

    net: attacked in eval mode. x: (N, C, H, W) normalised. labels: (N,) true classes; a targeted
    attack aims at the next ones. name: of ATTACKS. eps: attack-space units; default: the threat
    model's. generator: on x's device. micro_batch: images at a time. shard: a slice; attack these
    images only, with the noise that they have in the whole batch. counter: a PassCounter
    (runtime.tasks). options: of the attack; the default step size is proportional to eps, and
    random_start=False starts PGD at x.

    Returns x_adv, normalised, and the L-inf and L2 change of each image in attack space, (N,).
    Raises ValueError for an unknown attack, or a form or eps that it does not have;
    RuntimeError if x_adv is out of bounds, FloatingPointError if it is not finite.
    """
    spec = _choose("attack", name, ATTACKS)
    start = options.pop("random_start", spec.random_start)
    options = _attack_options(spec, name, threat, targeted, eps, generator, options)
    tensors = [x, threat.target_labels(labels) if targeted else labels]
    if start:
        tensors.append(start_noise(x, options["eps"], generator, micro_batch))
    if shard is not None:
        tensors = [tensor[shard] for tensor in tensors]
    if spec.batches:
        options["batch"], micro_batch = micro_batch, max(len(x), 1)
    # Where the operations repeat, CUDA graphs can replay them.
    key = (name, id(threat), *sorted(options.items())) if spec.random_start else None
    was_training, results = net.training, []
    net.eval()
    with freeze_parameters(net):
        for parts in zip(*(tensor.split(micro_batch) for tensor in tensors)):
            results.append(_attack_batch(spec, net, threat, counter, options, key, *parts))
    net.train(was_training)
    return tuple(torch.cat(part) for part in zip(*results))


def _attack_options(spec, name, threat, targeted, eps, generator, options):
    """Fill in what the caller leaves to the attack and the threat model."""
    if targeted and not spec.targetable:
        raise ValueError(f"{name} has no targeted form")
    if spec.eps is None and eps is not None:
        raise ValueError(f"{name} looks for the smallest change; it has no eps")
    options = {**spec.options(threat), **options}
    if spec.eps:
        options["eps"] = spec.eps(threat) if eps is None else eps
    if spec.step_size:
        step_size = spec.step_size(threat) * options["eps"] / spec.eps(threat)
        options.setdefault("step_size", step_size)
    if spec.targetable:
        options["targeted"] = targeted
    if spec.random:
        options["generator"] = generator
    return options


def _attack_batch(spec, net, threat, counter, options, key, x, goal, *noise):
    """Attack and check one batch. Returns what `attack_with_norms` does."""
    def run(net, z, goal, *noise):
        def model(z):
            return forward(net, threat.decode(z))
        return spec.run(counter.wrap(model) if counter else model, z, goal, *noise, **options),

    z = threat.encode(x)
    (z_adv,) = graphed_call(run, key, net, z, goal, *noise)
    norms = check_perturbation(z, z_adv, spec.norm, options.get("eps"), spec.keeps_failed_input)
    return threat.decode(z_adv), *norms
