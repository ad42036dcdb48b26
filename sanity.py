"""Signs of a broken evaluation, and of gradients that mislead an attack (Carlini et al. 2019; Athalye et al. 2018).

Soft labels can mask gradients: label smoothing has shown 75 % under PGD and nothing under transferred attacks. So each network
is also attacked without its gradients (Square), with the gradients of another one (transfer), and with more of its own (steps,
restarts), all at the smallest radius of the threat model's judge. A stronger attack that gains much is a warning.
"""
import math

import torch
import torch.nn.functional as F

from attacks import craft
from runtime import distributed
from runtime.seeding import make_generator, derive_seed
from networks import network_for
from utils import train_on_set

IMAGES = 100  # test images; an accuracy is known to about 10 points then
QUERIES = 1000  # of Square
RESTARTS, STEPS = 5, 100  # of the strong PGD
SURROGATE_IMAGES, SURROGATE_EPOCHS = 5000, 8  # real training images, for the network that attacks are transferred from
SLACK = 0.02  # by so much an attack that should be weaker may be stronger


def train_surrogate(data, model, seed):
    """A network trained naturally on real images, to craft attacks on. Frozen, in eval mode."""
    net = network_for(data, model, derive_seed(seed, "surrogate", model, "init"))
    generator = make_generator(seed, "surrogate", model)
    images, labels = data.sample(SURROGATE_IMAGES, generator)
    train_on_set(net, images, labels, epochs=SURROGATE_EPOCHS - 1, lr_net=0.02, batch_train=128, dsa_strategy="crop_flip",
                 generator=generator)
    return net.requires_grad_(False)


def check_sanity(name, net, surrogate, threat, test, seed):
    """Checks of one network, on a few images. name: of its random stream. surrogate: of `train_surrogate`. test: (images,
    labels). Returns {check: {"passed", "value", "text"}}."""
    images, labels = (part[:IMAGES] for part in test)
    rng = make_generator(seed, "sanity", name, threat.name, device=images.device)
    eps = min(threat.eval_eps.values())

    def right(attack, crafted_on=net, eps=eps, **options):
        x_adv = craft(crafted_on, images, labels, threat, attack, targeted=False, eps=eps, generator=rng, **options)[0]
        return net(x_adv).argmax(1) == labels

    with torch.no_grad():
        loss = float(F.cross_entropy(net(images), labels))
    large = float(right("PGD", eps=64 / 255, steps=20).float().mean())
    one = float(right("PGD", steps=20).float().mean())
    strong = float(torch.stack([right("PGD", steps=STEPS) for _ in range(RESTARTS)]).all(0).float().mean())
    query = float(right("Square", queries=QUERIES).float().mean())
    transferred = float(right("PGD", crafted_on=surrogate, steps=20).float().mean())
    radius, black_box = f"at {255 * eps:g}/255", "a black-box attack that is stronger means masked gradients"
    return {
        "loss is finite": _check(math.isfinite(loss), loss, f"clean loss {loss:.4g}"),
        "large eps": _check(large <= SLACK, large, f"accuracy {100 * large:.0f} % under PGD at eps 64/255, expected about 0: "
                            "its gradients mislead"),
        "black box": _check(query >= one - SLACK, query - one, f"accuracy {100 * query:.0f} % under Square ({QUERIES} queries) "
                            f"{radius}, {100 * one:.0f} % under PGD-20: {black_box}"),
        "transfer": _check(transferred >= one - SLACK, transferred - one, f"accuracy {100 * transferred:.0f} % under PGD-20 "
                           f"{radius} crafted on a naturally trained network, {100 * one:.0f} % on itself: {black_box}"),
        "steps and restarts": _check(one - strong <= 0.05, one - strong, f"accuracy {100 * one:.0f} % under PGD-20 {radius}, "
                                     f"{100 * strong:.0f} % under the best of {RESTARTS} starts of {STEPS} steps"),
    }


def _check(passed, value, text):
    return {"passed": bool(passed), "value": value, "text": text}


def check_autoattack(rows, network, threat_name):
    """AutoAttack contains a PGD of 100 steps and may not be the weaker one. rows: of results.json. Returns a check as above, or
    None where there is nothing to compare."""
    found = {}
    for row in rows:
        if row["crafted_on"] == row["evaluated_on"] == network and row["threat_model"] == threat_name and not row["targeted"]:
            found[row["attack"], row["eps"], row["n"]] = row["accuracy"]
    pairs = [(value, pgd, eps) for (attack, eps, n), value in found.items() if attack == "AA"
             for pgd in [found.get((other, eps, n)) for other in ("PGD", "PGD20")] if pgd is not None]
    if not pairs:
        return None
    strong, weak, eps = max(pairs, key=lambda pair: pair[0] - pair[1])
    return _check(strong <= weak + SLACK / 2, strong - weak, f"accuracy {100 * strong:.1f} % under AutoAttack, "
                  f"{100 * weak:.1f} % under PGD at {255 * eps:g}/255: AutoAttack must not be weaker")


def run_sanity(attacked, threats, test, data, results, seed):
    """The checks of every network that was attacked, by whichever process is free; saved one by one.

    attacked: (name of a threat model, TargetModel of evaluate.py), ... results: of runtime.tasks.
    """
    surrogates, checks = {}, results.content["sanity"]
    missing = [(name, target) for name, target in attacked if name not in checks.setdefault(target.name, {})]

    def check(k):
        name, target = missing[k]
        if target.model not in surrogates:
            surrogates[target.model] = train_surrogate(data, target.model, seed)
        return check_sanity(target.name, target.net, surrogates[target.model], threats[name], test, seed)

    def collect(k, result):
        name, target = missing[k]
        checks[target.name][name] = result
        results.save()
    distributed.map_dynamic(len(missing), check, collect)
    for name, target in attacked:
        checks[target.name][name].pop("AutoAttack", None)
        compared = check_autoattack(results.content["rows"], target.name, name)
        if compared:
            checks[target.name][name]["AutoAttack"] = compared
    results.save()
