"""Recompute a recorded evaluation on a sample of its images.

    python verify.py experiments/released_networks/headline --files checkpoints/*.pth --sample 100

Of each row of results.json: its accuracy is that of the images that it lists as right, and the same
attack on the same network leaves as many of a random sample right. Ends with status 1 and names the
rows of which this is not so.
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
from runtime.safe_io import InputError, sha256
from runtime.tasks import Task, unpack_bits
from target_models import TargetModel

TOLERANCE = 0.015  # of the sample: random starts, other processors
LEAST = 2  # images that may always differ


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("folder", type=Path, help="with results.json, as evaluate.py wrote it")
    add("--files", nargs="+", default=[], type=Path, metavar="FILE",
        help="the networks, where they do not lie in FOLDER/networks")
    add("--sample", type=at_least(1), default=100, help="test images")
    add("--seed", type=at_least(0), help="which images; default: others each time")
    add("--data_path", default="./data")
    add("--device", default="auto")
    return parser.parse_args(argv)


def main():
    args = parse_args()
    path = args.folder / "results.json"
    with refuse_damaged(path, "results.json of evaluate.py"):
        content = json.loads(path.read_text())
        check_rows(content["rows"])
        recorded = argparse.Namespace(**content["flags"])
        files = {about["sha256"]: name for name, about in content["networks"].items()}
    if recorded.zca or recorded.network_mean:
        raise InputError(f"{args.folder}: images normalised by flags are not recomputed")
    device = get_device(args.device)
    data = load_dataset(recorded.dataset, args.data_path, device)
    found = find_networks([*args.folder.glob("networks/*.pth"), *args.files], files)
    if args.seed is None:
        args.seed = torch.seed() % 2**31
    print(f"sample: {args.sample} images of seed {args.seed}; networks: "
          f"{len(found)} of {len(files)}")
    rows = [row for row in filter(attacked_itself, content["rows"])
            if row["evaluated_on"] in found]
    failed = [line for row in rows
              for line in problems(row, found[row["evaluated_on"]], recorded, data, args)]
    print(f"{len(rows)} rows, {len(failed)} that do not hold")
    if failed or not rows:
        sys.exit(1)


def find_networks(paths, wanted):
    """{name in the results: path} of the files whose checksums are there. wanted: {SHA-256: name}.
    """
    found = {wanted[digest]: path for path in paths if (digest := sha256(path)) in wanted}
    for name in sorted({*wanted.values()} - {*found}):
        print(f"not verified: {name} is not here; give it with --files")
    return found


def problems(row, path, recorded, data, args):
    """Lines that say what is wrong with a row; they are printed too."""
    task = Task(*(row[key] for key in ("crafted_on", "threat_model", "attack", "targeted", "eps")))
    lines = []
    try:
        right = torch.from_numpy(unpack_bits(row["right"], row["n"]))
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{args.folder}: a row does not list which images are right; evaluate "
                         "again") from None
    if abs(float(right.double().mean()) - row["accuracy"]) > 1e-6:
        lines.append(f"{task}: {100 * row['accuracy']:.2f} % stands there, the images listed as "
                     f"right are {100 * right.double().mean():.2f} %")
    sample = torch.randperm(row["n"], generator=torch.Generator().manual_seed(args.seed))
    sample = sample[:args.sample].sort().values
    again = recompute(task, path, recorded, data, sample)
    before, now = right[sample].float().mean(), again.float().mean()
    if abs(before - now) * len(sample) > max(LEAST, TOLERANCE * len(sample)):
        lines.append(f"{task}: {100 * now:.1f} % of the sample are right, "
                     f"{100 * before:.1f} % recorded")
    print(f"{task}: {100 * now:.1f} % of {len(sample)}, recorded {100 * before:.1f} %")
    for line in lines:
        print(f"does not hold: {line}")
    return lines


def recompute(task, path, recorded, data, sample):
    """Which images of the sample a network gets right: (N,) bool."""
    model = NETWORK_NAME.match(path.name)["model"]
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
