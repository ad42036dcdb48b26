"""What an evaluation measures: grids of attacks, their radii, options and costs; and the attack of
one slice of images."""
import time
from collections import Counter

import torch

from attacks import ATTACKS, TORCHATTACKS, attack_with_norms, find_attack
from runtime import compilation
from runtime.cost import FORWARD
from runtime.device import synchronise
from runtime.seeding import make_generator
from runtime.tasks import pack_bits
from utils import wrong_only_in_bf16

QUERY = tuple(name for name, attack in ATTACKS.items() if attack.query)
AUTOATTACK_EPS = (2 / 255, 4 / 255, 8 / 255)  # under `pixel`, without --eps
WHITE_BOX = ("FGSM", "PGD", "PGD_L2", "CW", "Deepfool", "AA")  # the grid of the paper's Table 1
GRIDS = {  # what flags are where they are not given
    "headline": {"threat_model": ["pixel"], "untargeted": True, "attacks": ["PGD20", "AA"],
                 "eps": [1.0, 2.0, 4.0, 8.0], "labels": ["own"], "control": True},
    "white-box": {"attacks": list(WHITE_BOX)},
    "beard": {"attacks": list(WHITE_BOX), "threat_model": ["published"], "aa_iterations": 10},
    "ddrobustbench": {  # 10 steps of 2/255, as torchattacks has them
        "threat_model": ["pixel"], "untargeted": True, "eps": [2.0],
        "attacks": [TORCHATTACKS + name for name in ("FGSM", "PGD", "CW", "VMIFGSM", "Jitter")]},
}
QUICK = {"num_eval": 1, "limit": 200, "queries": 500, "sanity": False}
QUICK_EPS = [2.0, 8.0]  # of the headline
QUICK_TRAINING = 50_000  # images that a network sees with --quick


def radii(attack, threat, given):
    """The radii of an attack, in attack space; [None] if it has none. given: in 1/255, or none."""
    spec = find_attack(attack)
    if not spec.eps:
        return [None]
    if given:
        return [eps / 255 for eps in given]
    if attack == "AA" and threat.name == "pixel":
        return AUTOATTACK_EPS
    return [spec.eps(threat)]


def attack_options(attack, iterations, queries):
    """Options of an attack. PGD has no random start in the grid (SPEC 3.2). iterations: of
    AutoAttack; queries: of Square."""
    return {"PGD": {"random_start": False}, "Square": {"queries": queries},
            "AA": {"iterations": iterations, "queries": queries}}.get(attack, {})


def typical_cost(attack, iterations, queries):
    """Forward-backward passes an image; a guess where the attack stops early."""
    square = 0.5 * FORWARD * queries
    return {"FGSM": 1, "PGD": 10, "PGD20": 20, "PGD_L2": 10, "CW": 60, "Deepfool": 12,
            "AA": 10 * iterations + 0.4 * square, "Square": square,
            "SPSA": 256 * FORWARD}.get(attack, 30 if attack.startswith(TORCHATTACKS) else FORWARD)


def run_slice(task, number, x, labels, targets, threat, micro_batch, seed, options):
    """Attack one slice of the test images and evaluate it.

    targets: the networks to evaluate on, the attacked one first. options: of the attack.
    Returns numbers, for `Results.add`; seconds are those of the attacked network.
    """
    attacked, passes = targets[0], Counter(forward=0, backward=0)
    rng = make_generator(seed, *map(str, vars(task).values()), number, device=x.device)

    def run_attack(x, labels):
        return attack_with_norms(
            attacked.net, x, labels, threat, task.attack, targeted=task.targeted, eps=task.eps,
            generator=rng, micro_batch=micro_batch, passes=passes, **options)

    def which_right(target):  # by the network itself, not `forward`: in fp32
        return pack_bits((target.net(x_adv).argmax(1) == labels).cpu())  # waits for the device

    synchronise(x.device)
    start = time.perf_counter()
    linf = l2 = torch.zeros(1)
    if task.attack == "Clean":
        x_adv = x
    elif task.attack == "Clamp-only":
        x_adv = threat.clamp_only(x)
    else:
        x_adv, linf, l2 = run_attack(x, labels)
        again = wrong_only_in_bf16(attacked.net, x_adv, labels, micro_batch)
        if again.any():
            with compilation.disable_bf16():
                x_adv[again], linf[again], l2[again] = run_attack(x[again], labels[again])
    with torch.no_grad():
        right = {attacked.name: which_right(attacked)}
        seconds = time.perf_counter() - start
        right |= {target.name: which_right(target) for target in targets[1:]}
    return {"right": right, "n": len(labels), "seconds": seconds, **passes,
            "max_linf": float(linf.max()), "max_l2": float(l2.max())}
