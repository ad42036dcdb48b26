"""Adversarial attacks and the two threat models under which they run.

An attack works in *attack space*: a box [0, 1] in which eps and step sizes are counted. A threat model says how that
space relates to the normalised images that the networks take (SPEC 2):

- `pixel`: attack space = pixels; the normalisation happens inside the attacked model. The valid one.
- `published`: attack space = the normalised image itself, which the attack therefore clamps to [0, 1]. This destroys
  about three quarters of the values before any perturbation, and 8/255 is about 1.6/255 in pixels. Kept, bug for bug,
  to reproduce published figures; the `clamp_only` control shows how much of a "robust accuracy" is the clamp.
"""
import itertools
from dataclasses import dataclass
from typing import Callable

import torch
import torch.nn.functional as F

from runtime.perturbation import check_perturbation
from runtime.autoattack import draw_seed, patched, pyautoattack
from runtime.device import MICRO_BATCH
from runtime.compilation import forward, freeze_parameters
from runtime.cuda_graphs import graphed_call
from runtime.safe_io import InputError

EPS = 8 / 255  # L-inf radius in attack space (both threat models)
EPS_L2, STEP_SIZE_L2 = 128 / 255, 15 / 255
PGD_STEPS = 10
PUBLISHED_CLASSES = 10  # the modulus of the targets of `published`, whatever the data set has (SPEC 2)
TINY = 1e-10  # keeps a division by a norm finite
STEEPER = 5.0  # DeepFool: gradient of another class, of that of the first one; the largest seen: 1.6 on ConvNet, 5.2 on AlexNet
MARGIN = 1.2  # and of the largest seen on the network at hand


# --------------------------------------------------------------------------------------------------------- threat models
@dataclass(frozen=True)
class ThreatModel:
    """How normalised images become attack-space images and back, and how far an attack may go.

    encode: (N, C, H, W) normalised images -> attack space, not yet clamped; decode: its inverse.
    eps, step_size, steps: L-inf radius, size and number of PGD's steps, in attack space. target_classes: the modulus of
    `target_labels`.
    judge: the options of the PGD attack, with a random start, that a "robust accuracy" is measured with. eval_eps: its
    radii in attack space, by the name of the result (COLUMNS of reporting.records).
    """

    name: str
    encode: Callable
    decode: Callable
    eps: float
    step_size: float
    target_classes: int
    judge: dict
    eval_eps: dict
    steps: int = PGD_STEPS

    @property
    def eval_cost(self):
        """Image-gradients that judging an image takes."""
        return self.judge["steps"] * len(self.eval_eps)

    def target_labels(self, labels):
        """The class that a targeted attack aims at: the next one. labels: (N,) int64. Returns (N,) int64."""
        return (labels + 1) % self.target_classes

    def clamp_only(self, x):
        """The control: (N, C, H, W) normalised images through encode, clamp, decode, without any attack."""
        return self.decode(self.encode(x).clamp(0, 1))


def _published(data):
    # QUIRK (published): normalised images are attacked as if they were pixels; 10 classes whatever the data set has.
    return ThreatModel("published", encode=lambda x: x, decode=lambda z: z, eps=EPS, step_size=2 / 225,
                       target_classes=PUBLISHED_CLASSES, judge={"targeted": True, "steps": PGD_STEPS},
                       eval_eps={"robust_acc": EPS})


def _pixel(data):
    # The images are clamped on the way in, so that augmented ones are images too: an attack starts from inside the box.
    # Judged untargeted: a targeted attack leaves 2 to 6 % on networks of which an untargeted one leaves nothing.
    return ThreatModel("pixel", encode=lambda x: data.denormalize(x).clamp(0, 1), decode=lambda z: data.normalize(z), eps=EPS,
                       step_size=2 / 255, target_classes=data and data.num_classes, judge={"targeted": False, "steps": 2 * PGD_STEPS},
                       eval_eps={"robust_2_acc": 2 / 255, "robust_4_acc": 4 / 255, "robust_acc": EPS})


THREAT_MODELS = {"published": _published, "pixel": _pixel}


def get_threat_model(name, data=None):
    """The threat model `name` for a data set.
    data: has `normalize`, `denormalize` (pixels in [0, 1] to normalised units and back) and `num_classes`; None where
    only radii and steps are asked for.
    Raises ValueError for an unknown name. Source: SPEC 2.
    """
    if name not in THREAT_MODELS:
        raise ValueError(f"unknown threat model {name!r}; choose one of {', '.join(THREAT_MODELS)}")
    return THREAT_MODELS[name](data)


def check_threat_model(name, data):
    """Raise InputError where a data set has too few classes for the targets of a threat model."""
    if name == "published" and data.num_classes < PUBLISHED_CLASSES:
        raise InputError(f"--threat_model published aims at class (y + 1) mod {PUBLISHED_CLASSES}, {data.name} has "
                         f"{data.num_classes} classes; choose --threat_model pixel")


# --------------------------------------------------------------------------------------------------------------- attacks
# Common arguments. model: callable, attack-space images -> (N, num_classes) logits. x: (N, C, H, W) attack-space images.
# labels: (N,) int64, the true classes, or with targeted=True the classes to be reached. Returns x_adv like x: every image
# in [0, 1], or, from the attacks that may give up on an image, that image as it came (under `published` outside the box).
def _input_gradient(model, x, labels, targeted):
    """The gradient in x of the loss that the attack increases, summed over the batch."""
    x = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(x), labels, reduction="sum"), x)
    return -gradient if targeted else gradient


def fgsm(model, x, labels, *, eps=EPS, targeted=False):
    """Fast gradient sign method: one step of size eps, L-inf. Source: Goodfellow et al. 2015; SPEC 3.2."""
    return (x + eps * _input_gradient(model, x, labels, targeted).sign()).clamp(0, 1)


def pgd(model, x, labels, *, eps=EPS, step_size, steps=PGD_STEPS, targeted=False, random_start=True, generator=None,
        noise=None):
    """Projected gradient descent, L-inf. eps, step_size: attack-space units. random_start: begin at a uniform point of the
    eps ball (drawn from `generator`, of x's device) rather than at x. noise: like x; what was drawn for that already.
    Source: Madry et al. 2018; SPEC 1.1, 3.2."""
    x_adv = x
    if random_start:
        x_adv = (x + (start_noise(x, eps, generator, len(x)) if noise is None else noise)).clamp(0, 1)
    for _ in range(steps):
        x_adv = x_adv + step_size * _input_gradient(model, x_adv, labels, targeted).sign()
        # Projected around x, not around its clamped image: under `published`, x lies outside [0, 1].
        x_adv = (x + (x_adv - x).clamp(-eps, eps)).clamp(0, 1)
    return x_adv.detach()


def start_noise(x, eps, generator, micro_batch=MICRO_BATCH):
    """A uniform point of the L-inf ball of radius eps for each image of x, (N, C, H, W), drawn for `micro_batch` at a time."""
    return torch.cat([torch.empty_like(part).uniform_(-eps, eps, generator=generator) for part in x.split(micro_batch)])


def pgd_l2(model, x, labels, *, eps=EPS_L2, step_size, steps=PGD_STEPS, targeted=False):
    """Projected gradient descent, L2, from x itself. eps, step_size: attack-space units. Source: SPEC 3.2."""
    x_adv = x
    for _ in range(steps):
        gradient = _input_gradient(model, x_adv, labels, targeted)
        x_adv = x_adv + step_size * gradient / (_l2(gradient) + TINY)
        # Around x, as above. Under `published` the first clamp has moved x_adv so far from x that the projection cancels
        # nearly all of the attack: its "PGD-L2 accuracy" is that of the clamp alone (SPEC 2).
        delta = x_adv - x
        x_adv = (x + delta * (eps / (_l2(delta) + TINY)).clamp(max=1)).clamp(0, 1)
    return x_adv.detach()


def _l2(x):
    """(N, C, H, W) -> the L2 norm of each image, (N, 1, 1, 1)."""
    return x.flatten(1).norm(dim=1).view(-1, 1, 1, 1)


def _margin(logits, labels, floor=-torch.inf):
    """The logit of `labels` minus the largest other one, each at least `floor`. (N, num_classes), (N,) -> (N,)."""
    own = logits.gather(1, labels[:, None]).squeeze(1).clamp(min=floor)
    return own - logits.scatter(1, labels[:, None], -torch.inf).amax(1).clamp(min=floor)


def _adam_direction(gradient, mean, square, step):
    """Adam's direction at `step` (from 0); mean, square: its moments, updated in place. torch.optim.Adam with the defaults, as
    tensors of which rows can be dropped."""
    mean.lerp_(gradient, 0.1)
    square.lerp_(gradient.square(), 0.001)
    return (mean / (1 - 0.9 ** (step + 1))) / ((square / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)


def cw(model, x, labels, *, c=1.0, kappa=0.0, steps=100, lr=0.01, targeted=False, logit_floor=-torch.inf):
    """C&W: the smallest L2 change that reaches the goal, by Adam in tanh space with one constant c.

    Minimises |x_adv - x|^2 + c * max(margin, -kappa). An image is done early, and leaves the batch, once it has
    reached the goal and its cost, looked at every tenth of the steps, was no new minimum twice in a row: the same accuracy,
    with changes up to 5 % larger than after all the steps (CIFAR-10, ConvNet). Values at 0 or 1 stay there (their tanh-space
    coordinate is infinite). An image that never reaches the goal comes back as it was. logit_floor: logits count as at least
    this in the margin; 0 is a QUIRK (published) that blinds the attack while the target's logit is negative.
    Source: Carlini and Wagner 2017; SPEC 3.2. Deviation: no search over c, as in the published benchmark.
    """
    x_best, l2_best = x.clone(), x.new_full((len(x),), torch.inf)
    rows = torch.arange(len(x), device=x.device)  # of the images that are still worked on
    w = torch.atanh((2 * x - 1).clamp(-1, 1))
    mean, square = torch.zeros_like(w), torch.zeros_like(w)  # of Adam
    lowest_cost, stale = x.new_full((len(x),), torch.inf), torch.zeros_like(labels)  # stale: checks without a new minimum
    for step in range(steps):
        w.requires_grad_()
        z = (torch.tanh(w) + 1) / 2
        l2 = (z - x[rows]).square().sum((1, 2, 3))
        logits = model(z)
        margin = _margin(logits, labels[rows], logit_floor)
        cost = l2 + c * (-margin if targeted else margin).clamp(min=-kappa)
        (gradient,) = torch.autograd.grad(cost.sum(), w)
        with torch.no_grad():
            reached = (logits.argmax(1) == labels[rows]) == targeted
            better = reached & (l2 < l2_best[rows])
            l2_best[rows[better]], x_best[rows[better]] = l2[better], z[better]
            w = w - lr * _adam_direction(gradient, mean, square, step)
            if step % max(steps // 10, 1) == 0:
                stale[rows] = torch.where(cost < lowest_cost[rows], 0, stale[rows] + 1)
                lowest_cost[rows] = torch.minimum(cost, lowest_cost[rows])
                going_on = (stale[rows] < 2) | l2_best[rows].isinf()
                rows, w, mean, square = rows[going_on], w[going_on], mean[going_on], square[going_on]
                if len(rows) == 0:
                    break
    return x_best


def deepfool(model, x, labels, *, steps=50, overshoot=0.02, candidates=None, batch=MICRO_BATCH):
    """DeepFool: step to the nearest linearised decision boundary until the class changes. Minimum-norm, L2, untargeted.

    candidates: how many other classes are considered, those of the largest logits (None: all; the authors take 9). After the
    first one, a class is looked at only if its boundary could be the nearest: with a gradient `STEEPER` times as long as that
    of the first, and, when some passes are over, `MARGIN` times the largest such ratio seen in this call.
    An image is done once its class has changed, or once a step changes nothing. One that is misclassified from the start
    comes back as it was. Source: Moosavi-Dezfooli et al. 2016; SPEC 3.2.

    *Performance-impacting*: a pass looks at one class of each of `batch` images; an image that has none left to look at takes
    its step, and one that is done gives its place to the next. So batches stay full, of the size that is compiled (`fast`).
    """
    x_adv, change = x.clone(), torch.zeros_like(x)  # change: to the nearest boundary found so far
    nearest, first_norm = x.new_full((len(x),), torch.inf), x.new_zeros(len(x))  # its distance; of the first class's gradient
    steepest = x.new_ones(())  # the largest ratio of a gradient's norm to the first one's
    others = left = None  # (N, num_classes): classes that are not the image's own; those of them not yet looked at
    taken = torch.zeros_like(labels)  # steps
    rows, waiting = torch.arange(len(x), device=x.device).tensor_split([batch])
    for number in itertools.count():
        if len(rows) == 0:
            return x_adv
        z = x_adv[rows].requires_grad_()
        logits = model(z)
        if left is None:
            others = F.one_hot(labels, logits.shape[1]) == 0
            left = others.clone()
        gaps = logits.gather(1, labels[rows, None]) - logits
        ahead = gaps.detach().where(left[rows], torch.inf)
        gap, other = ahead.min(1)
        (gradient,) = torch.autograd.grad(gaps.gather(1, other[:, None]).sum(), z)
        norm = _l2(gradient).flatten() + TINY
        distance, first = gap / norm, nearest[rows].isinf()
        closer = first | (distance < nearest[rows])
        nearest[rows[closer]] = distance[closer]
        change[rows[closer]] = -gradient[closer] * (distance / norm)[closer].view(-1, 1, 1, 1)
        first_norm[rows[first]] = norm[first]
        steepest = torch.maximum(steepest, (norm / first_norm[rows]).max())
        left[rows, other] = False

        right = logits.argmax(1) == labels[rows]
        expected = first_norm[rows] * (MARGIN * steepest if number >= logits.shape[1] else STEEPER)
        more = ahead.scatter(1, other[:, None], torch.inf).amin(1) < nearest[rows] * expected
        if candidates is not None:
            more &= (others[rows] & ~left[rows]).sum(1) < candidates
        steps_now = right & ~more
        ready, z = rows[steps_now], z.detach()[steps_now]
        x_adv[ready] = (z + (1 + overshoot) * change[ready]).clamp(0, 1)
        nearest[ready], left[ready] = torch.inf, others[ready]
        taken[ready] += 1
        going_on = (x_adv[ready] != z).flatten(1).any(1) & (taken[ready] < steps)
        rows = torch.cat([rows[right & more], ready[going_on]])
        new, waiting = waiting.tensor_split([batch - len(rows)])
        rows = torch.cat([rows, new])


def spsa(model, x, labels, *, eps=EPS, delta=0.01, lr=0.01, steps=1, samples=128, targeted=False, generator=None):
    """SPSA: PGD with a gradient estimated from logits only, at random pairs of points x +- delta * v, v of random signs.

    Adam ascends the margin loss by the estimate; L-inf. samples: pairs a step, so that a step costs 2 * samples queries.
    Source: Uesato et al. 2018; SPEC 3.2. The published benchmark takes a single step.
    """
    x_adv, mean, square = x.clone(), torch.zeros_like(x), torch.zeros_like(x)
    with torch.no_grad():
        for step in range(steps):
            estimate = torch.zeros_like(x)
            for _ in range(samples):
                v = torch.randint(0, 2, x.shape, generator=generator, device=x.device).to(x.dtype) * 2 - 1
                difference = _margin(model(x_adv + delta * v), labels) - _margin(model(x_adv - delta * v), labels)
                estimate += difference.view(-1, 1, 1, 1) * v / (2 * delta * samples)  # 1/v = v
            gradient = -estimate if targeted else estimate  # of what is to fall: the margin of the true class
            x_adv = x_adv - lr * _adam_direction(gradient, mean, square, step)
            x_adv = (x + (x_adv - x).clamp(-eps, eps)).clamp(0, 1)
    return x_adv


# AutoAttack and Square are the authors' own implementation, as the package pyautoattack.
def autoattack(model, x, labels, *, eps=EPS, iterations=100, queries=5000, generator=None, batch=MICRO_BATCH):
    """AutoAttack, standard: APGD-CE, targeted APGD-DLR, targeted FAB, Square, each on what the ones before left.

    L-inf, untargeted. iterations: of each of the first three (the published benchmark had 10). queries: of Square, whose
    schedule is scaled to them. batch: images attacked at a time; what an attack leaves is put together anew for the next one.
    Deviation: at most C - 1 of C classes are targeted (standard: 9). The loss of the targeted APGD looks at four classes;
    where there are fewer, it is the target's cross-entropy.
    Source: Croce and Hein 2020; SPEC 3.2. Raises ValueError if the package is missing.
    """
    AutoAttack, _ = pyautoattack()
    attack = AutoAttack(model, norm="Linf", eps=eps, seed=draw_seed(generator), device=x.device)
    for part in (attack.apgd, attack.apgd_targeted, attack.fab):
        part.n_iter = iterations
    with torch.no_grad():
        classes = model(x[:1]).shape[1]
    for part in (attack.apgd_targeted, attack.fab):
        part.n_target_classes = min(part.n_target_classes, classes - 1)
    if classes < 4:
        attack.apgd_targeted.dlr_loss_targeted = attack.apgd_targeted.ce_loss_targeted
    attack.square.n_queries, attack.square.resc_schedule = queries, True
    with patched(x.device):
        return attack.run_standard_evaluation(x, labels, batch_size=batch)[0]


def square_attack(model, x, labels, *, eps=EPS, queries=5000, p_init=0.8, targeted=False, generator=None):
    """Square: random squares of +-eps, kept where the margin falls. L-inf, logits only.

    queries: at most so many an image; the squares shrink with the share of them that is used.
    Source: Andriushchenko et al. 2020; SPEC 3.2. Raises ValueError if the package is missing.
    """
    _, SquareAttack = pyautoattack()
    attack = SquareAttack(model, norm="Linf", eps=eps, n_queries=queries, p_init=p_init, targeted=targeted, loss="margin",
                          resc_schedule=True, seed=draw_seed(generator), device=x.device)
    with patched(x.device), torch.no_grad():
        return attack.perturb(x, labels)


@dataclass(frozen=True)
class Attack:
    """An attack and what is known about it.

    run: with the common arguments above. norm: "Linf" or "L2". eps, step_size: threat model -> default in attack space; an
    attack without eps looks for the smallest change that does it. targetable: has a targeted form. query: sees logits only.
    random: takes a generator. keeps_failed_input: returns an image that it cannot attack as it came. batches: takes all images and the
    size of its batches, which it keeps full. options: threat model -> what else it is told.
    """

    run: Callable
    norm: str
    eps: Callable = None
    step_size: Callable = None
    targetable: bool = True
    query: bool = False
    random: bool = False
    keeps_failed_input: bool = False
    batches: bool = False
    options: Callable = lambda threat: {}


ATTACKS = {  # Source of the settings: SPEC 3.2
    "FGSM": Attack(fgsm, "Linf", eps=lambda t: t.eps),
    "PGD": Attack(pgd, "Linf", eps=lambda t: t.eps, step_size=lambda t: t.step_size, random=True,
                  options=lambda t: {"steps": t.steps}),
    "PGD20": Attack(pgd, "Linf", eps=lambda t: t.eps, step_size=lambda t: t.step_size, random=True,
                    options=lambda t: {"steps": 2 * t.steps}),  # with a random start: what the scripts judge by under `pixel`
    "PGD_L2": Attack(pgd_l2, "L2", eps=lambda t: EPS_L2, step_size=lambda t: STEP_SIZE_L2),
    "CW": Attack(cw, "L2", keeps_failed_input=True, options=lambda t: {"logit_floor": 0.0} if t.name == "published" else {}),
    "Deepfool": Attack(deepfool, "L2", targetable=False, keeps_failed_input=True, batches=True),
    "AA": Attack(autoattack, "Linf", eps=lambda t: t.eps, targetable=False, random=True, keeps_failed_input=True, batches=True),
    "Square": Attack(square_attack, "Linf", eps=lambda t: t.eps, query=True, random=True, keeps_failed_input=True),
    "SPSA": Attack(spsa, "Linf", eps=lambda t: t.eps, query=True, random=True),
}


def get_attack(name):
    """The Attack called `name`. Raises ValueError for an unknown name."""
    if name not in ATTACKS:
        raise ValueError(f"unknown attack {name!r}; choose one of {', '.join(ATTACKS)}")
    return ATTACKS[name]


def craft(net, x, labels, threat, attack="PGD", *, targeted=True, eps=None, generator=None, micro_batch=MICRO_BATCH, **options):
    """Attack normalised images under a threat model and audit the result.

    net: a network on normalised images; attacked in eval mode, afterwards in the mode it was in.
    x: (N, C, H, W) normalised. labels: (N,) true classes; a targeted attack aims at `threat.target_labels` of them.
    attack: a name of ATTACKS. eps: attack-space units; None: that of the threat model. The step size goes with eps.
    generator: of x's device, for attacks that draw. micro_batch: images attacked at a time. options: passed to the attack.
    Returns (N, C, H, W) normalised adversarial images and the L-inf and L2 change of each in attack space, (N,) each.
    Raises ValueError for an unknown attack, a targeted one that has no such form, or an eps where there is none to set;
    RuntimeError if the audit fails, FloatingPointError if values are not finite.
    """
    spec = get_attack(attack)
    if targeted and not spec.targetable:
        raise ValueError(f"{attack} has no targeted form")
    if spec.eps is None and eps is not None:
        raise ValueError(f"{attack} looks for the smallest change; it has no eps")
    options = {**spec.options(threat), **options}
    if spec.eps is not None:
        eps = options["eps"] = spec.eps(threat) if eps is None else eps
        if spec.step_size is not None:
            options.setdefault("step_size", spec.step_size(threat) * eps / spec.eps(threat))
    options |= {"targeted": targeted} if spec.targetable else {}
    options |= {"generator": generator} if spec.random else {}
    if spec.batches:
        options["batch"], micro_batch = micro_batch, max(len(x), 1)
    was_training = net.training
    net.eval()
    goal = threat.target_labels(labels) if targeted else labels
    noise, parts, key = options.pop("noise", None), [], None
    if spec.run is pgd:  # the same passes for any images: can be recorded, with its random start from outside
        if options.get("random_start", True) and noise is None:
            noise = start_noise(x, eps, options.pop("generator"), micro_batch)
        key = attack, id(threat), *sorted((name, value) for name, value in options.items() if name != "generator")

    def run(net, z, goal, *noise):
        return spec.run(lambda z: forward(net, threat.decode(z)), z, goal, **options, **dict(zip(["noise"], noise))),
    with freeze_parameters(net):
        for x_part, *given in zip(*(t.split(micro_batch) for t in (x, goal, noise) if t is not None)):
            z = threat.encode(x_part)
            (z_adv,) = graphed_call(run, key, net, z, *given)
            parts.append((threat.decode(z_adv), *check_perturbation(z, z_adv, spec.norm, eps, spec.keeps_failed_input)))
    net.train(was_training)
    return tuple(torch.cat(part) for part in zip(*parts))


def attack_images(net, x, labels, threat, generator, attack="PGD", targeted=True, micro_batch=MICRO_BATCH, own=None, **options):
    """The adversarial images alone: see `craft`. own: a slice; of PGD on x, these images only, with their part of the noise."""
    if own is not None and len(x[own]) < len(x):
        options["noise"] = start_noise(x, options.get("eps", threat.eps), generator, micro_batch)[own]
        x, labels = x[own], labels[own]
    return craft(net, x, labels, threat, attack, targeted=targeted, generator=generator, micro_batch=micro_batch, **options)[0]
