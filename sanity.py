"""Signs of a broken evaluation or of masked gradients (Carlini et al. 2019; Athalye et al. 2018).

Soft labels can mask gradients. So each network is also attacked without gradients (Square), with
those of another network (transfer), and with more steps and restarts.
"""
import functools
import math

import torch
import torch.nn.functional as F

from attacks import attack
from networks import network_for
from runtime import distributed
from runtime.seeding import derive_seed, make_generator
from synsets import TrainConfig
from utils import train_on_set

IMAGES = 100  # test images; the standard error of an accuracy is at most 5 points
QUERIES = 1000  # of Square
RESTARTS, STEPS = 5, 100  # of the strong PGD
SURROGATE_IMAGES, SURROGATE_EPOCHS = 5000, 8  # training of the network that attacks transfer from
SLACK = 0.02  # of accuracy, that chance explains


def train_surrogate(data, model, seed):
    """A frozen network, trained naturally on real images, to craft attacks on."""
    net = network_for(data, model, derive_seed(seed, "surrogate", model, "init"))
    generator = make_generator(seed, "surrogate", model)
    images, labels = data.sample(SURROGATE_IMAGES, generator)
    config = TrainConfig(SURROGATE_EPOCHS - 1, 0.02, 128, "crop_flip")
    train_on_set(net, images, labels, config, generator)
    return net.requires_grad_(False)


def check_sanity(name, net, surrogate, threat, test, seed):
    """Check one network. name: key of its random generator. test: (images, labels).
    Returns {check: {"passed", "value", "text"}}.
    """
    images, labels = (part[:IMAGES] for part in test)
    rng = make_generator(seed, "sanity", name, threat.name, device=images.device)
    eps = min(threat.eval_eps.values())

    def accuracy(name="PGD", crafted_on=net, eps=eps, restarts=1, **options):
        correct = torch.ones_like(labels, dtype=torch.bool)
        for _ in range(restarts):
            x_adv = attack(crafted_on, images, labels, threat, name, targeted=False, eps=eps,
                           generator=rng, **options)
            correct &= net(x_adv).argmax(1) == labels
        return float(correct.float().mean())

    with torch.no_grad():
        loss = float(F.cross_entropy(net(images), labels))
    large = accuracy(eps=64 / 255, steps=20)
    pgd = accuracy(steps=20)
    strong = accuracy(steps=STEPS, restarts=RESTARTS)
    query = accuracy("Square", queries=QUERIES)
    transfer = accuracy(crafted_on=surrogate, steps=20)
    against = f"{pgd:.0%} under PGD-20 at {255 * eps:g}/255"
    masked = f"{against}: a stronger black-box attack means masked gradients"
    checks = {
        "loss is finite": (math.isfinite(loss), loss, f"clean loss {loss:.4g}"),
        "large eps": (large <= SLACK, large,
                      f"accuracy {large:.0%} under PGD at 64/255, not 0: its gradients mislead"),
        "black box": (query >= pgd - SLACK, query - pgd,
                      f"accuracy {query:.0%} under Square ({QUERIES} queries), {masked}"),
        "transfer": (transfer >= pgd - SLACK, transfer - pgd,
                     f"accuracy {transfer:.0%} under PGD-20 from another network, {masked}"),
        "steps and restarts": (
            pgd - strong <= 0.05, pgd - strong,
            f"accuracy {strong:.0%} under {RESTARTS} starts of {STEPS} steps, {against}"),
    }
    return {name: _check(*found) for name, found in checks.items()}


def _check(passed, value, text):
    return {"passed": passed, "value": value, "text": text}


def check_autoattack(rows, network, threat):
    """AutoAttack includes a PGD of 100 steps, so it must not be weaker than PGD.

    rows: of results.json. network, threat: names. Returns a check as above, or None without rows of
    both.
    """
    found = {(row["attack"], row["eps"], row["n"]): row["accuracy"] for row in rows
             if row["crafted_on"] == row["evaluated_on"] == network
             and row["threat_model"] == threat and not row["targeted"]}
    pairs = [(found["AA", eps, n] - accuracy, accuracy, eps)
             for (name, eps, n), accuracy in found.items()
             if name in ("PGD", "PGD20") and ("AA", eps, n) in found]
    if not pairs:
        return None
    excess, pgd, eps = max(pairs)
    return _check(excess <= SLACK / 2, excess, f"accuracy {pgd + excess:.1%} under AutoAttack, "
                  f"{pgd:.1%} under PGD at {255 * eps:g}/255: AutoAttack must not be weaker")


def run_sanity(targets, threats, test, data, results, seed):
    """Check every network under every threat model, each by the next free process; save each check.

    targets: TargetModels. threats: {name: ThreatModel}. results: of runtime.tasks.
    """
    checks = results.content["sanity"]
    attacked = [(threat, target) for threat in threats for target in targets]
    missing = [(threat, target) for threat, target in attacked
               if threat not in checks.setdefault(target.name, {})]
    surrogate = functools.cache(lambda model: train_surrogate(data, model, seed))

    def check(k):
        threat, target = missing[k]
        return check_sanity(target.name, target.net, surrogate(target.model), threats[threat],
                            test, seed)

    def collect(k, result):
        threat, target = missing[k]
        checks[target.name][threat] = result
        results.save()

    distributed.map_dynamic(len(missing), check, collect)
    for threat, target in attacked:
        checks[target.name][threat].pop("AutoAttack", None)
        compared = check_autoattack(results.content["rows"], target.name, threat)
        if compared:
            checks[target.name][threat]["AutoAttack"] = compared
    results.save()
