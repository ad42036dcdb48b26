"""Reads what evaluate.py (results.json) and the ROME scripts (metrics.jsonl, flags.json) wrote.

A file is checked when it is read: all keys are there, of the right kind, in their range.
"""
import json
import re
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from attacks import ATTACKS, THREAT_MODELS, TORCHATTACKS
from datasets import NUM_CLASSES
from runtime.measures import ACCURACIES, COLUMNS, CONTROLS
from runtime.safe_io import InputError

CLEAN = ("Clean", None, None)  # attack, targeted, eps
# Rows that share these are the same measurement.
ROW_KEYS = ("dataset", "n", "crafted_on", "evaluated_on", "threat_model", "attack", "targeted",
            "eps")
PATH_FLAGS = ("save_path", "checkpoint_path", "data_path", "save_interval", "fresh")


@contextmanager
def refuse_damaged(path, what):
    """Turn what reading a damaged file raises into an InputError. what: it should have been."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is damaged or no {what} ({type(error).__name__}: {error})"
                         ) from None


def chance(dataset, num_classes=None):
    """Percent that a constant classifier gets right. num_classes: of a data set not in datasets."""
    return 100 / NUM_CLASSES.get(dataset, num_classes or 10)


def group_by(items, key):
    """{key of item: [items]}, in the order that they came."""
    groups = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def read_results(paths):
    """The results among and below `paths`: {(data set, test images): rows of evaluate.py},
    [RunRecord], and a line for each file that is refused. Raises InputError if none is left.

    A file that contradicts an earlier one is another evaluation, not to be mixed with it.
    """
    measured, runs, refused = {}, [], []  # measured: {values of ROW_KEYS: (path, row)}
    for path in find_results(paths):
        try:
            if path.suffix == ".json":
                add_rows(measured, path)
            else:
                runs.append(read_run(path))
        except InputError as error:
            refused.append(str(error))
    if not measured and not runs:
        raise InputError("; ".join(refused) or f"no result yet below {', '.join(paths)}")
    rows = [row for _, row in measured.values()]
    return group_by(rows, lambda row: (row["dataset"], row["n"])), runs, refused


def find_results(paths):
    """The files results.json and metrics.jsonl among and below `paths`."""
    found = {}
    for path in map(Path, paths):
        if not path.exists():
            raise InputError(f"{path} does not exist")
        files = (*path.rglob("results.json"), *path.rglob("metrics.jsonl"))
        found |= dict.fromkeys(sorted(files) if path.is_dir() else [path])
    return list(found)


# ---- rows of evaluate.py
def is_number(value, least=0, most=sys.float_info.max, kinds=(int, float)):
    return type(value) in kinds and least <= value <= most


def is_text(value):
    return isinstance(value, str)


def are_fractions(values):
    return len(values) > 0 and all(is_number(value, 0, 1) for value in values)


FOREIGN_ATTACK = re.compile(TORCHATTACKS + r"\w{1,40}")
ROW_CHECKS = {
    "dataset": lambda v: is_text(v) and v.isalnum(),
    "ipc": lambda v: v is None or is_number(v, 1, kinds=[int]),
    **dict.fromkeys(("method", "crafted_on", "evaluated_on"), is_text),
    "threat_model": lambda v: v in THREAT_MODELS,
    "attack": lambda v: v in (*CONTROLS, *ATTACKS) or FOREIGN_ATTACK.fullmatch(v),
    "targeted": lambda v: v is None or isinstance(v, bool),
    "eps": lambda v: v is None or is_number(v),
    "n": lambda v: is_number(v, 1, kinds=[int]),
    "accuracy": lambda v: is_number(v, 0, 1),
    **dict.fromkeys(("seconds", "seed"), is_number),
}
FLAG_CHECKS = {**dict.fromkeys(("method", "dataset", "model"), is_text), "ipc": is_number,
               "align_weight": is_number,
               "threat_model": lambda v: v in THREAT_MODELS}
EVENT_CHECKS = {
    "iteration": dict.fromkeys(("exp", "iteration", "loss_robustness", "loss_performance",
                                "loss_pool", "w_f"), lambda v: is_number(v, -sys.float_info.max)),
    "evaluation": {"set": is_text, "model": is_text, "n": is_number,
                   **dict.fromkeys(ACCURACIES, are_fractions)}}
EVENT_CHECKS["final"] = EVENT_CHECKS["evaluation"]


def check(record, checks):
    """Raise KeyError, TypeError or ValueError for what is wrong with a dict."""
    for key, is_right in checks.items():
        if not is_right(record[key]):
            raise ValueError(f"{key} {str(record[key])[:60]}")


def check_rows(rows):
    """Raise KeyError, TypeError or ValueError for what is wrong with rows of results.json."""
    for row in rows:
        check(row, ROW_CHECKS)


def add_rows(measured, path):
    """Add the rows of a results.json, each with the file's `num_classes` (None in older files)."""
    with refuse_damaged(path, "result of evaluate.py"):
        content = json.loads(path.read_text())
        check_rows(content["rows"])
        num_classes = content.get("num_classes")
        if num_classes is not None and not is_number(num_classes, 2, kinds=[int]):
            raise ValueError(f"num_classes {str(num_classes)[:60]}")
    new = {}
    for row in content["rows"]:
        key = tuple(row[name] for name in ROW_KEYS)
        earlier, same = measured.get(key, (path, row))
        if same["accuracy"] != row["accuracy"]:
            raise InputError(f"{path} and {earlier} have different figures for {row['attack']} on "
                             f"{row['crafted_on']}; report them apart")
        new[key] = earlier, {"num_classes": num_classes, **same}
    measured |= new


def attacked_itself(row):
    return row["crafted_on"] == row["evaluated_on"]


def white_box_groups(rows):
    """{(method, ipc, threat model): {(attack, targeted, eps): [row of each network]}} of white-box
    attacks."""
    groups = group_by(filter(attacked_itself, rows),
                      lambda row: (row["method"], row["ipc"], row["threat_model"]))
    return {group: group_by(of_group, lambda row: (row["attack"], row["targeted"], row["eps"]))
            for group, of_group in groups.items()}


def mean_of(rows, key="accuracy"):
    return float(np.mean([row[key] for row in rows]))


# ---- runs of the ROME scripts
@dataclass
class RunRecord:
    """What a ROME script has written so far. events: a dict for each line of metrics.jsonl."""

    folder: Path
    flags: dict
    events: list
    device: str
    num_classes: int = None

    def events_of(self, name):
        return [event for event in self.events if event["event"] == name]

    def last_events(self):
        """The last evaluation of each set and network."""
        events = self.events_of("final") or self.events_of("evaluation")
        return {(event["set"], event["model"]): event for event in events}.values()

    def setting(self):
        return "{dataset} {model} ipc {ipc} {threat_model}".format(**self.flags)

    def title(self):
        return f"{self.flags['method']} {self.setting()}"

    def flags_without(self, *names):
        """The other flags but paths, as text: equal if two runs differ in nothing else."""
        flags = {key: self.flags[key] for key in self.flags.keys() - {*names, *PATH_FLAGS}}
        flags["robust_prior"] = [Path(name).name for name in self.flags.get("robust_prior", [])]
        text = json.dumps(flags, sort_keys=True)
        if "seed" in names:  # names of pretrained networks have it too
            text = text.replace(f"seed{self.flags.get('seed')}-", "seed-")
        return text


def read_run(path):
    """The run of a metrics.jsonl, without a last line that is still being written."""
    with refuse_damaged(path, "metrics of a ROME run"):
        events = [json.loads(line) for line in path.read_text().split("\n")[:-1]]
        about = json.loads(path.with_name("flags.json").read_text())
        flags = {**about["flags"], "dataset": about.get("dataset", about["flags"]["dataset"])}
        check(flags, FLAG_CHECKS)
        for event in events:
            check(event, EVENT_CHECKS[event["event"]])
            check(event, dict.fromkeys(COLUMNS.keys() & event.keys(), are_fractions))
        return RunRecord(path.parent, flags, events, str(about.get("device", "")),
                         about.get("num_classes"))
