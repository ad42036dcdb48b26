"""The tasks of evaluate.py, and results.json, from which a killed run goes on.

Finished tasks are not repeated. Of an interrupted task, the finished slices of images are kept.
"""
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from runtime import distributed
from runtime.checkpoint import lock, require_same_flags
from runtime.compilation import forward
from runtime.device import device_name, versions
from runtime.measures import attack_label
from runtime.progress import format_duration
from runtime.safe_io import InputError, write_json


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


class PassCounter:
    """Counts the forward and backward passes through a model, in images."""

    def __init__(self):
        self.forward = self.backward = 0

    def wrap(self, model):
        """`model`, with its passes counted."""
        def counted(x):
            self.forward += len(x)
            logits = model(x)
            if logits.requires_grad:
                logits.register_hook(self._count_backward)
            return logits
        return counted

    def _count_backward(self, gradient):
        self.backward += len(gradient)


def warm_up(net, images):
    """A forward pass, on a GPU also a backward pass, that no timer sees."""
    x = images.clone().requires_grad_(images.device.type != "cpu")
    with torch.set_grad_enabled(x.requires_grad):
        logits = forward(net, x)
    if x.requires_grad:
        torch.autograd.grad(logits.sum(), x)


def run_tasks(plan, work, results):
    """Run every slice of every task, each by the next free process.

    plan: {Task: (networks evaluated, sizes of its slices)}. work: (task, number of a slice) -> its
    figures, see `evaluate.run_slice`.
    """
    done = {task: results.finished_slices(task, *plan[task]) for task in plan}
    todo = [(task, number) for task, (_, sizes) in plan.items()
            for number in range(len(done[task]), len(sizes))]

    def finish(task):
        targets, sizes = plan[task]
        if len(done[task]) == len(sizes):
            row = results.add(task, targets, done[task])
            seconds = format_duration(row["seconds"])
            distributed.print_rank0(f"{task}: {100 * row['accuracy']:.2f} % in {seconds}")

    def collect(k, result):
        task = todo[k][0]
        done[task].append(result)
        results.save_slices(task, plan[task][0], done[task])
        bar.update(result["n"])
        finish(task)

    images = sum(sum(sizes) for _, sizes in plan.values())
    with tqdm(total=images, unit="img", disable=distributed.disable_tqdm()) as bar:
        for task in plan:
            bar.update(sum(part["n"] for part in done[task]))
            finish(task)
        distributed.map_dynamic(len(todo), lambda k: work(*todo[k]), collect)


class Results:
    """results.json and, for an interrupted task, unfinished.json; the main process writes them.

    resume: go on with those in `folder`. may_change: flags that may differ then. check_rows: raises
    ValueError, KeyError or TypeError for damaged rows.
    """

    def __init__(self, folder, flags, device, resume, may_change, check_rows):
        self.folder = Path(folder)
        self.path = self.folder / "results.json"
        self.unfinished_path = self.folder / "unfinished.json"
        self.flags, self.device = flags, device_name(device)
        self._lock = None
        self.content, self.unfinished = distributed.run_on_rank0(
            lambda: (self._begin(resume, may_change, check_rows), self._read_unfinished()))
        self.save()

    def _begin(self, resume, may_change, check_rows):
        """Lock the folder. Returns the content: new, or that of the run to go on with."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = lock(self.folder)
        current = {"flags": self.flags, "device": self.device}
        if not self.path.exists():
            return {"rows": [], "metrics": [], "sanity": {}, "networks": {}, **current,
                    "versions": versions()}
        if not resume and not distributed.is_restart():
            raise InputError(f"{self.path} exists; go on with --resume, or choose another --out")
        try:
            content = json.loads(self.path.read_text())
            check_rows(content["rows"])
            saved = {"attack_precision": "fp32", "zca": False, **content["flags"]}
            for key in ("sanity", "networks", "versions"):
                content[key].items()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{self.path} is damaged or not a file of evaluate.py "
                             f"({type(error).__name__}: {error})") from None
        require_same_flags(saved, self.flags, may_change, f"the run in {self.folder}",
                           "another --out")
        if content["rows"] and content["device"] != self.device:
            raise InputError(f"the seconds in {self.path} are of {content['device']}, not of "
                             f"{self.device}; choose another --out")
        return content | current

    def _read_unfinished(self):
        try:
            unfinished = json.loads(self.unfinished_path.read_text())
            return {key: unfinished[key] for key in ("job", "evaluated_on", "slices")}
        except (OSError, ValueError, KeyError, TypeError):
            return {"job": None, "evaluated_on": None, "slices": []}

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
            raise InputError(f"{target.meta['file']} is not the file of {self.path}; choose "
                             "another --out")

    def has(self, task, targets):
        """Whether the rows of a task are there for all these networks."""
        found = {row["evaluated_on"] for row in self.content["rows"] if task.matches(row)}
        return {target.name for target in targets} <= found

    def finished_slices(self, task, targets, sizes):
        """The slices of the task, if it was interrupted with the same networks and sizes."""
        slices = self.unfinished["slices"]
        same = self.unfinished == _unfinished(task, targets, slices)
        same = same and [part["n"] for part in slices] == sizes[:len(slices)]
        return list(slices) if same else []

    def save_slices(self, task, targets, slices):
        """Write the finished slices of the task that is running."""
        if distributed.is_main_process():
            write_json(self.unfinished_path, _unfinished(task, targets, slices))

    def add(self, task, targets, slices):
        """Write the rows of a finished task. Returns the first one."""
        n, seconds, forward, backward = (sum(part[key] for part in slices) for key in
                                         ("n", "seconds", "forward", "backward"))
        largest = {key: max(part[key] for part in slices) for key in ("max_linf", "max_l2")}
        rows = []
        for target in targets:
            correct = sum(part["correct"][target.name] for part in slices)
            rows.append({
                "dataset": self.flags["dataset"], "ipc": target.ipc, "method": target.method,
                "evaluated_on": target.name, **vars(task), "n": n, "accuracy": correct / n,
                "seconds": round(seconds, 3), "forward": forward / n, "backward": backward / n,
                **largest, "seed": self.flags["seed"]})
        others = [row for row in self.content["rows"] if not task.matches(row)]
        self.content["rows"] = others + rows
        self.save()
        if distributed.is_main_process():
            self.unfinished_path.unlink(missing_ok=True)
        return rows[0]


def _unfinished(task, targets, slices):
    """The content of unfinished.json."""
    return {"job": vars(task), "evaluated_on": [target.name for target in targets],
            "slices": slices}
