"""What result files hold: the columns of an evaluation, the rows of results.json, the events of metrics.jsonl.

A file is checked when it is read; what comes out has every key, of the right kind, in its range.
"""
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from datasets import NUM_CLASSES
from runtime.measures import ACCURACIES, COLUMNS, CONTROLS
from runtime.safe_io import InputError

LOSSES = ("loss_robustness", "loss_performance", "loss_pool", "w_f")


def chance(dataset, num_classes=None):
    """Percent that a constant classifier gets right. num_classes: of a data set that is none of datasets."""
    return 100 / NUM_CLASSES.get(dataset, num_classes or 10)


def label(attack, targeted, eps=None):
    """An attack as tables name it."""
    form = {None: "", True: " targeted", False: " untargeted"}[targeted]
    return f"{attack}{form}" + ("" if eps is None else f" {255 * eps:g}/255")


def check_rows(rows, attacks, threat_models):
    """Raise KeyError, TypeError or ValueError that says what is wrong with the rows of a results.json.

    attacks, threat_models: the names of those that there are.
    """
    def number(value, least=0.0, most=np.inf, kinds=(int, float)):
        return isinstance(value, kinds) and not isinstance(value, bool) and least <= value <= most and np.isfinite(value)

    checks = {
        "dataset": lambda v: isinstance(v, str) and v.isalnum(), "ipc": lambda v: v is None or number(v, 1, kinds=int),
        **dict.fromkeys(("method", "crafted_on", "evaluated_on"), lambda v: isinstance(v, str)),
        "threat_model": lambda v: v in threat_models, "attack": lambda v: v in (*CONTROLS, *attacks),
        "targeted": lambda v: v is None or isinstance(v, bool), "eps": lambda v: v is None or number(v),
        "n": lambda v: number(v, 1, kinds=int), "accuracy": lambda v: number(v, 0, 1),
        **dict.fromkeys(("seconds", "forward", "backward", "max_linf", "max_l2", "seed"), number)}
    if not isinstance(rows, list):
        raise TypeError("rows is no list")
    for row in rows:
        for key, right in checks.items():
            if not right(row[key]):
                raise ValueError(f"a row with {key} {str(row[key])[:60]}")


def groups_of(rows):
    """White-box rows by column of a table: {(method, ipc): {(attack, targeted, eps): [row of each network]}}."""
    groups = {}
    for row in rows:
        if row["crafted_on"] == row["evaluated_on"]:
            cell = groups.setdefault((row["method"], row["ipc"]), {}).setdefault(
                (row["attack"], row["targeted"], row["eps"]), [])
            cell.append(row)
    return groups


def of_all_images(rows):
    """The rows on as many test images as the clean accuracy has; a slow attack may have been given fewer."""
    n = max((row["n"] for row in rows), default=0)
    return [row for row in rows if row["n"] == n]


def mean_of(rows, key="accuracy"):
    return float(np.mean([row[key] for row in rows]))


@dataclass
class RunRecord:
    """What a ROME script has written so far."""

    folder: Path
    flags: dict
    events: list  # dicts, one a line of metrics.jsonl
    device: str = ""
    num_classes: int = None

    def of(self, name):
        return [event for event in self.events if event["event"] == name]

    def setting(self):
        f = self.flags
        return f"{f['dataset']} {f['model']} ipc {f['ipc']} {f['threat_model']}"

    def title(self):
        return f"{self.flags['method']} {self.setting()}"

    def other_flags(self, *names):
        """The flags but for these and the paths, as text: the same for runs that differ in nothing else."""
        left_out = {*names, "save_path", "checkpoint_path", "data_path", "save_interval", "fresh"}
        flags = {key: value for key, value in self.flags.items() if key not in left_out}
        flags["robust_prior"] = [Path(name).name for name in self.flags.get("robust_prior", [])]
        text = json.dumps(flags, sort_keys=True)
        return text.replace(f"seed{self.flags.get('seed')}-", "seed-") if "seed" in names else text


def find(paths):
    """The files of results below `paths`: ([results.json, ...], [metrics.jsonl, ...]). Below a folder, what came with the
    repository in `recorded` is left out, unless the path names it."""
    found = []
    for path in map(Path, paths):
        if not path.exists():
            raise InputError(f"{path} does not exist")
        found += sorted(p for p in path.rglob("*") if p.name in ("results.json", "metrics.jsonl")
                        and "recorded" not in p.relative_to(path).parts) if path.is_dir() else [path]
    found = list(dict.fromkeys(found))
    return [p for p in found if p.suffix == ".json"], [p for p in found if p.suffix != ".json"]


def read_rows(path, attacks, threat_models):
    """The rows of a results.json, as `check_rows` admits them, each with its `num_classes` where the file says it. Raises
    InputError if it is damaged or foreign."""
    try:
        content = json.loads(path.read_text())
        rows = content["rows"]
        check_rows(rows, attacks, threat_models)
        classes = content.get("num_classes")
        if classes is not None and not (isinstance(classes, int) and classes >= 2):
            raise ValueError(f"num_classes is {str(classes)[:60]}")
        return [{**row, "num_classes": classes} for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged or no result of evaluate.py ({type(error).__name__}: {error})") from None


def read_run(path):
    """The run of a metrics.jsonl; a last line that is not finished (a run that is going) is left out."""
    try:
        lines = path.read_text().split("\n")
        events = [json.loads(line) for line in lines[:-1]]
        about = json.loads(path.with_name("flags.json").read_text())
        flags = {**about["flags"], "dataset": about.get("dataset", about["flags"]["dataset"])}
        for key, kind in {"method": str, "dataset": str, "model": str, "threat_model": str, "ipc": int, "Iteration": int,
                          "align_weight": (int, float)}.items():
            if not isinstance(flags[key], kind):
                raise TypeError(f"the flag {key} is {flags[key]}")
        for event in events:
            check_event(event)
        return RunRecord(path.parent, flags, events, str(about.get("device", "")), about.get("num_classes"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged or not of a ROME run ({type(error).__name__}: {error})") from None


def check_event(event):
    """Raise KeyError, TypeError or ValueError that says what is wrong with a line of metrics.jsonl."""
    if event["event"] == "iteration":
        numbers = [event[key] for key in ("exp", "iteration", *LOSSES)]
    elif event["event"] in ("evaluation", "final"):
        measured = [key for key in COLUMNS if key in event or key in ACCURACIES]
        names, numbers = [event["set"], event["model"]], [event["n"], *(x for key in measured for x in event[key])]
        if not all(isinstance(name, str) for name in names) or not all(event[key] for key in measured):
            raise ValueError(f"an {event['event']} of {names}")
    else:
        raise ValueError(f"an unknown event {event['event']}")
    if not np.isfinite(np.array(numbers, dtype=float)).all():
        raise ValueError(f"an {event['event']} with values that are not finite")


def pools(files):
    """Rows that may be pooled: of one data set and one number of test images. {(dataset, n): rows}.

    files: {path: rows}. Also returns a line for each file that is left out because it has another accuracy for an attack
    that an earlier file has: those are two evaluations, and half of each would be none.
    """
    found, refused = {}, []  # key -> (path, row)
    for path, rows in files.items():
        keyed = {tuple(row[k] for k in ("dataset", "n", "crafted_on", "evaluated_on", "threat_model", "attack", "targeted",
                                        "eps")): row for row in rows}
        other = [key for key, row in keyed.items() if key in found and found[key][1]["accuracy"] != row["accuracy"]]
        if other:
            earlier, row = found[other[0]]
            refused.append(f"{path} and {earlier} have different figures for {row['attack']} on {row['crafted_on']}; report "
                           "them apart")
            continue
        for key, row in keyed.items():
            found.setdefault(key, (path, row))
    pooled = {}
    for _, row in found.values():
        pooled.setdefault((row["dataset"], row["n"]), []).append(row)
    return pooled, refused
