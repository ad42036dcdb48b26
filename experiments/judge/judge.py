"""Networks of which the truth is known, before the judge: does it say so?

    PYTHONPATH=. python experiments/judge/judge.py NATURAL ROBUST... --out result/judge

NATURAL, ROBUST: ConvNetW32 networks of pretrain.py, without an attack and with attacks of several
radii. Two more hide their gradients, and are as weak as NATURAL: its logits times 10 000, and its
images rounded to multiples of a quarter. AutoAttack is also that of torchattacks, and of
pyautoattack with FAB's own projection.
"""
import argparse
from contextlib import closing
from pathlib import Path

import torch
from torch import nn

import evaluate
from attacks import get_threat_model
from datasets import load_dataset
from formats.network_file import load_into
from networks import network_for
from runtime.autoattack import draw_seed, pyautoattack
from runtime.compilation import freeze_parameters
from runtime.tasks import Results
from target_models import TargetModel

MODEL = "ConvNetW32"
COMPARED = 8.0  # the radius of the other two AutoAttacks, in 1/255


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("networks", nargs="+", help="NATURAL, then ROBUST...")
    parser.add_argument("--out", default="result/judge")
    parser.add_argument("--data_path", default="./data")
    parser.add_argument("--images", type=int, default=200)
    return parser.parse_args()


class Rounded(nn.Module):
    """Rounds to multiples of a quarter: the gradient is zero."""

    def forward(self, x):
        return (4 * x).round() / 4


class Steep(nn.Module):
    """Logits so large that the cross-entropy has no gradient left."""

    def forward(self, logits):
        return 1e4 * logits


def load_targets(paths, data):
    nets = {Path(path).stem: load_into(network_for(data, MODEL, 0), path).eval() for path in paths}
    natural = next(iter(nets.values()))
    nets |= {"rounded": nn.Sequential(Rounded(), natural).eval(),
             "logits-x-10000": nn.Sequential(natural, Steep()).eval()}
    return [TargetModel(f"{name}_{MODEL}_{data.name}_5000_None.pth", name, None, MODEL, net,
                        {"sha256": name}) for name, net in nets.items()]


def accuracy_of_authors(net, threat, images, labels, eps):
    """Under AutoAttack as pyautoattack has it."""
    AutoAttack, _ = pyautoattack()
    z = threat.encode(images)
    with torch.random.fork_rng(devices=[]), freeze_parameters(net):
        made = AutoAttack(lambda z: net(threat.decode(z)), norm="Linf", eps=eps,
                          seed=draw_seed(None), device=z.device)
        z = made.run_standard_evaluation(z, labels, batch_size=len(z))[0]
    with torch.no_grad():
        return float((net(threat.decode(z)).argmax(1) == labels).float().mean())


def main():
    given = parse_args()
    data = load_dataset("CIFAR10", given.data_path)
    threat, targets = get_threat_model("pixel", data), load_targets(given.networks, data)
    args = evaluate.parse_args([
        "--networks", *given.networks, "--dataset", data.name, "--threat_model", "pixel",
        "--untargeted", "--attacks", "PGD20", "AA", "--eps", "2", "8", "--limit",
        str(given.images), "--no_compile", "--out", given.out, "--resume"])
    with closing(Results(args.out, vars(args), data.device, True, evaluate.MAY_CHANGE,
                         lambda rows: None)) as results:
        results.content |= {"num_classes": data.num_classes, "data": data.describe()}
        evaluate.evaluate(args, targets, {"pixel": threat}, data, 256, results)
        args.attacks, args.eps = ["torchattacks:AutoAttack"], [COMPARED]
        evaluate.evaluate(args, targets, {"pixel": threat}, data, 256, results)
    images, labels = data.get_batch("test", slice(given.images))
    lines = [f"{target.method}: "
             f"{100 * accuracy_of_authors(target.net, threat, images, labels, COMPARED / 255):.2f}"
             f" % under the authors' AutoAttack at {COMPARED:g}/255" for target in targets]
    print("\n".join(lines))
    (Path(given.out) / "authors.txt").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
