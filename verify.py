"""Recompute a recorded evaluation on a sample of its images.

    python verify.py experiments/leaderboard/released_pgd --files checkpoints/*.pth --sample 100

Of each attack on each network in results.json: it is there, its figure is that of the images that
it lists as right, and the same attack on the same network leaves these right, of a random sample.
Ends with status 1 where that is not so, or where a network is not at hand. Examples crafted on
other networks (--transfer) are not recomputed.
"""
import argparse
import json
import sys
from pathlib import Path

import torch

from attack_grid import attack_options, run_slice
from attacks import get_threat_model
from datasets import load_dataset
from formats.inputs import NETWORK_NAME
from formats.network_file import load_into
from networks import network_for
from reporting.records import attacked_itself, check_rows, refuse_damaged
from runtime.command_line import at_least, run_script
from runtime.device import choose_micro_batch, get_device
from runtime.measures import CONTROLS
from runtime.safe_io import InputError, sha256
from runtime.tasks import Task, unpack_bits
from target_models import TargetModel

TOLERANCE = 0.01  # of the sample, that random starts and other processors change
LEAST = 1  # image that they may always change
OLDER = {"craft_on": [], "method": [], "model": None, "eps": []}  # flags that older files lack


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("folder", type=Path, help="with results.json, as evaluate.py wrote it")
    add("--files", nargs="+", default=[], type=Path, metavar="FILE",
        help="the networks, where they do not lie in FOLDER/networks")
    add("--sample", type=at_least(1), default=300, help="test images")
    add("--seed", type=at_least(0), help="which images; default: others each time")
    add("--data_path", default="./data")
    add("--dataset", help="your own, as it was evaluated on")
    add("--device", default="auto")
    return parser.parse_args(argv)


def main():
    args = parse_args()
    path = args.folder / "results.json"
    with refuse_damaged(path, "results.json of evaluate.py"):
        content = json.loads(path.read_text())
        check_rows(content["rows"])
        recorded = argparse.Namespace(**{**OLDER, **content["flags"]})
        digests = {name: about["sha256"] for name, about in content["networks"].items()}
        rows = list(filter(attacked_itself, content["rows"]))
        lines = [*missing_rows(rows, content["networks"], recorded),
                 *foreign_rows(rows, content["networks"], recorded)]
    if not all("right" in row for row in rows):
        raise InputError(f"{path} is from before rows listed which images are right: evaluate "
                         "again")
    data = load_dataset(args.dataset or recorded.dataset, args.data_path, get_device(args.device))
    if data.describe() != content.get("data"):
        raise InputError(f"{path} is of {content.get('data')}; here is {data.describe()}, and only "
                         "images normalised so are recomputed")
    if args.seed is None:
        args.seed = torch.seed() % 2**31
    found = find_networks([*args.folder.glob("networks/*.pth"), *args.files], digests)
    lines += [f"{name} is not here; give it with --files" for name in digests.keys() - found]
    print(f"sample: {args.sample} images of seed {args.seed}; networks: {len(found)} of "
          f"{len(digests)}")
    checked = [row for row in rows if row["evaluated_on"] in found]
    for row in checked:
        lines += problems(row, found[row["evaluated_on"]], recorded, data, args)
    for line in lines:
        print(f"does not hold: {line}")
    print(f"{len(checked)} of {len(rows)} rows recomputed, {len(lines)} problem(s)")
    if lines or not checked:
        sys.exit(1)


def task_of(row, name=None):
    """The Task of a row, or the same on another network."""
    return Task(name or row["crafted_on"],
                *(row[key] for key in ("threat_model", "attack", "targeted", "eps")))


def missing_rows(rows, networks, recorded):
    """Lines for what was measured on one network and not on another, or stands in the flags alone.
    """
    there, methods = {*map(task_of, rows)}, {row["evaluated_on"]: row["method"] for row in rows}
    for name in networks:
        attacked = not recorded.craft_on or methods.get(name) in recorded.craft_on
        wanted = {task_of(row, name) for row in rows if attacked or row["attack"] in CONTROLS}
        yield from (f"{task}: there is no such row" for task in sorted(wanted - there, key=str))
    radii = {attack: {row["eps"] and round(255 * row["eps"], 6) for row in rows
                      if row["attack"] == attack} for attack in recorded.attacks}
    for attack, found in radii.items():
        if not found:
            yield f"the flags name {attack}, and there is no row of it"
        elif None not in found:
            yield from (f"the flags name {attack} at {eps:g}/255, and there is no row of it"
                        for eps in {*recorded.eps} - found)


def foreign_rows(rows, networks, recorded):
    """Lines for rows that are not of the network, the set and the bytes that they claim."""
    for row in rows:
        name, about = row["evaluated_on"], networks.get(row["evaluated_on"], {})
        in_name = NETWORK_NAME.match(name) or {"method": row["method"], "ipc": row["ipc"] or 0}
        claimed = row["method"], row["ipc"], row["dataset"], row.get("bytes")
        true = (row["method"] if row["method"] in recorded.method else in_name["method"],
                int(in_name["ipc"]) or None, recorded.dataset, about.get("bytes"))
        if not about or claimed != true:
            yield (f"{task_of(row)}: it says {claimed}, its network "
                   f"{true if about else 'is unknown'}")


def find_networks(paths, digests):
    """{name: path} of the files with the SHA-256 of `digests`, {name: SHA-256}."""
    at_hand = {sha256(path): path for path in paths}
    return {name: at_hand[digest] for name, digest in digests.items() if digest in at_hand}


def problems(row, path, recorded, data, args):
    """Lines that say what is wrong with a row."""
    task, n = task_of(row), row["n"]
    labels = data.labels["test"]
    try:
        right = torch.from_numpy(unpack_bits(row["right"], n))
    except (TypeError, ValueError):
        return [f"{task}: its list of right images is damaged"]
    if n > len(labels):
        return [f"{task}: {n} images, the data set has {len(labels)}"]
    lines = []
    if abs(float(right.double().mean()) - row["accuracy"]) > 1e-6:
        lines.append(f"{task}: {100 * row['accuracy']:.2f} % stands there, the images listed as "
                     f"right are {100 * right.double().mean():.2f} %")
    sample = torch.randperm(n, generator=torch.Generator().manual_seed(args.seed))
    sample = sample[:args.sample].sort().values
    before, now = right[sample], recompute(task, path, recorded, data, sample)
    lost, won = int((before & ~now).sum()), int((now & ~before).sum())
    print(f"{task}: {int(now.sum())} of {len(sample)} right, recorded {int(before.sum())}",
          flush=True)
    if lost > max(LEAST, TOLERANCE * len(sample)):
        lines.append(f"{task}: {lost} images of the sample that are listed as right are not, and "
                     f"{won} that are not listed are right")
    return lines


def recompute(task, path, recorded, data, sample):
    """Which images of the sample a network gets right: (N,) bool."""
    name = NETWORK_NAME.match(task.crafted_on)
    model = recorded.model or (name["model"] if name else "ConvNet")
    net = load_into(network_for(data, model, 0), path).eval()
    images, labels = data.get_batch("test", sample.to(data.device))
    target = TargetModel(path.name, "", 0, model, net)
    result = run_slice(task, 0, images, labels, [target],
                       get_threat_model(task.threat_model, data), choose_micro_batch(data.device),
                       recorded.seed,
                       attack_options(task.attack, recorded.aa_iterations, recorded.queries))
    return torch.from_numpy(unpack_bits(result["right"][path.name], len(labels)))


if __name__ == "__main__":
    run_script(main)
