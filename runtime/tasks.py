"""The tasks of evaluate.py, and results.json, from which a killed run goes on.

Neither finished tasks nor the finished slices of images of other tasks are computed again.
"""
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from runtime import distributed
from runtime.checkpoint import lock, require_same_flags
from runtime.compilation import forward, freeze_parameters
from runtime.device import device_name, versions
from runtime.measures import attack_label
from runtime.progress import format_duration
from runtime.safe_io import InputError, write_json

# Flags of evaluate.py that older files lack, and one that is gone.
OLDER = {"attack_precision": "fp32", "zca": False, "adv_train": False, "quick": False,
         "control_labels": []}


@dataclass(frozen=True)
class Task:
    """One attack on one network, by the keys of a row of results.json. eps: attack space."""

    crafted_on: str
    threat_model: str
    attack: str
    targeted: bool = None
    eps: float = None

    def __str__(self):
        label = attack_label(self.attack, self.targeted, self.eps)
        return f"{self.crafted_on}: {self.threat_model} {label}"

    def matches(self, row):
        """Whether a row of results.json is of this task."""
        return all(row[key] == value for key, value in vars(self).items())


def pack_bits(right):
    """(N,) bool -> hexadecimal digits, eight images in two of them."""
    return np.packbits(np.asarray(right, dtype=bool)).tobytes().hex()


def unpack_bits(text, n):
    """The (N,) bool array of `pack_bits`. Raises ValueError for another length."""
    found = np.frombuffer(bytes.fromhex(text), np.uint8)
    if len(found) != -(-n // 8):
        raise ValueError(f"{len(found)} bytes for {n} images")
    return np.unpackbits(found, count=n).astype(bool)


def warm_up(net, images):
    """Passes that no timer sees: compilation, libraries of a GPU."""
    with freeze_parameters(net):
        x = images.clone().requires_grad_()
        torch.autograd.grad(forward(net, x).sum(), x)
        with torch.no_grad():
            forward(net, x)


def run_tasks(plan, sizes, work, results):
    """Run every slice of every task, each by the next free process.

    plan: {Task: networks evaluated}. sizes: {Task: images in its slices}. work: (task, number of a
    slice) -> its figures, see `evaluate.run_slice`.
    """
    done = {task: results.finished_slices(task, plan[task], sizes[task]) for task in plan}
    todo = [(task, number) for task in plan for number in range(len(done[task]), len(sizes[task]))]

    def collect(k, result):
        task = todo[k][0]
        done[task].append(result)
        bar.update(result["n"])
        if len(done[task]) == len(sizes[task]):
            row = results.add(task, plan[task], done[task])
            seconds = format_duration(row["seconds"])
            distributed.print_rank0(f"{task}: {100 * row['accuracy']:.2f} % in {seconds}")
        results.save()

    images = sum(sizes[task][number] for task, number in todo)
    with tqdm(total=images, unit="img", disable=distributed.disable_tqdm()) as bar:
        distributed.map_dynamic(len(todo), lambda k: work(*todo[k]), collect)


class Results:
    """results.json, which the main process writes.

    resume: go on with the one in `folder`. may_change: flags that may differ then. check_rows:
    raises an error for damaged rows.
    """

    def __init__(self, folder, flags, device, resume, may_change, check_rows):
        self.folder, self.path = Path(folder), Path(folder) / "results.json"
        self.flags, self.device = flags, device_name(device)
        self._lock = None
        self.content = distributed.run_on_rank0(
            lambda: self._begin(resume, may_change, check_rows))
        self.save()

    def _begin(self, resume, may_change, check_rows):
        """Lock the folder. Returns the content: new, or that of the run to go on with."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = lock(self.folder)
        current = {"flags": self.flags, "device": self.device}
        if not self.path.exists():
            return {"rows": [], "metrics": [], "sanity": {}, "networks": {}, "unfinished": {},
                    **current, "versions": versions()}
        if not resume and not distributed.is_restart():
            raise InputError(f"{self.path} exists; go on with --resume, or choose another --out")
        try:
            content = json.loads(self.path.read_text())
            check_rows(content["rows"])
            saved = {**OLDER, **content["flags"]}
            content.setdefault("unfinished", {})
            for key in ("sanity", "networks", "versions", "unfinished"):
                content[key].items()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{self.path} is damaged ({type(error).__name__}: {error})") from None
        require_same_flags(saved, {"adv_train": False, **self.flags}, may_change,
                           f"the run in {self.folder}", "another --out")
        if content["rows"] and content["device"] != self.device:
            raise InputError(f"the seconds in {self.path} are of {content['device']}, not of "
                             f"{self.device}; choose another --out")
        return content | current

    def close(self):
        """Release the folder."""
        if self._lock:
            self._lock.close()

    def save(self):
        if distributed.is_main_process():
            write_json(self.path, self.content)

    def register(self, target):
        """Note the origin of a network. Raises InputError if its file has changed."""
        known = self.content["networks"].setdefault(target.name, target.meta)
        if known.get("sha256") != target.meta["sha256"]:
            raise InputError(f"{target.meta['file']} is not that of {self.path}; choose another "
                             "--out")

    def has(self, task, targets):
        """Whether the rows of a task are there for all these networks."""
        found = {row["evaluated_on"] for row in self.content["rows"] if task.matches(row)}
        return {target.name for target in targets} <= found

    def finished_slices(self, task, targets, sizes):
        """The finished slices of a task that have these networks and sizes: a list to extend."""
        names = {target.name for target in targets}
        slices = self.content["unfinished"].get(repr(task), [])
        if not all(names <= part.get("right", {}).keys() and part["n"] == n
                   for part, n in zip(slices, sizes)):
            slices = []
        self.content["unfinished"][repr(task)] = slices
        return slices

    def add(self, task, targets, slices):
        """Put the rows of a finished task in place of its slices. Returns the first one."""
        def total(key):
            return sum(part[key] for part in slices)

        n, rows = total("n"), []
        for target in targets:
            right = np.concatenate([unpack_bits(part["right"][target.name], part["n"])
                                    for part in slices])
            rows.append({
                "dataset": self.flags["dataset"], "ipc": target.ipc, "method": target.method,
                "bytes": target.meta.get("bytes"),
                "evaluated_on": target.name, **vars(task), "n": n, "accuracy": int(right.sum()) / n,
                "seconds": round(total("seconds"), 3), "forward": total("forward") / n,
                "backward": total("backward") / n,
                "max_linf": max(part["max_linf"] for part in slices),
                "max_l2": max(part["max_l2"] for part in slices), "seed": self.flags["seed"],
                "right": pack_bits(right)})
        others = [row for row in self.content["rows"] if not task.matches(row)]
        self.content["rows"] = others + rows
        del self.content["unfinished"][repr(task)]
        return rows[0]
