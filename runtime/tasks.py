"""The jobs of evaluate.py, and results.json, which a killed run goes on from.

Finished jobs are not done again; of the one that was interrupted, the finished slices of images are kept.
"""
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from runtime import distributed
from runtime.progress import duration
from runtime.device import device_name, versions
from runtime.compilation import forward
from runtime.measures import attack_label
from runtime.safe_io import InputError, write_json
from runtime.checkpoint import lock, require_same_flags


@dataclass(frozen=True)
class Job:
    """One attack on one network, by the keys of a row of results.json. eps: attack space; None: the attack has none."""

    crafted_on: str
    threat_model: str
    attack: str
    targeted: bool = None
    eps: float = None

    def __str__(self):
        return f"{self.crafted_on}: {self.threat_model} {attack_label(self.attack, self.targeted, self.eps)}"

    def is_of(self, row):
        """Whether a row of results.json is a result of this job."""
        return all(row[key] == value for key, value in vars(self).items())


def rows_of(job, slices, targets, dataset, seed):
    """The slices of a finished job -> rows of results.json, one for each network evaluated."""
    total = {key: sum(s[key] for s in slices) for key in ("n", "seconds", "forward", "backward")}
    largest = {key: max(s[key] for s in slices) for key in ("max_linf", "max_l2")}
    return [{"dataset": dataset, "ipc": v.ipc, "method": v.method, "crafted_on": job.crafted_on, "evaluated_on": v.name,
             "threat_model": job.threat_model, "attack": job.attack, "targeted": job.targeted, "eps": job.eps,
             "n": total["n"], "accuracy": sum(s["correct"][v.name] for s in slices) / total["n"],
             "seconds": round(total["seconds"], 3), "forward": total["forward"] / total["n"],
             "backward": total["backward"] / total["n"], **largest, "seed": seed} for v in targets]


class PassCounter(torch.nn.Module):
    """A network that counts, in images, the forward and the backward passes through it."""

    def __init__(self, net):
        super().__init__()
        self.net, self.forward_passes, self.backward_passes = net, 0, 0

    def forward(self, x):
        self.forward_passes += len(x)
        logits = forward(self.net, x)
        if logits.requires_grad:
            logits.register_hook(self._count_backward)
        return logits

    def _count_backward(self, gradient):
        self.backward_passes += len(gradient)


def warm_up(net, images, micro_batch):
    """A pass forward, and on a GPU backward, that no timer sees. images: (N, C, H, W) normalised."""
    x = images[:micro_batch].clone().requires_grad_(images.device.type != "cpu")
    with torch.set_grad_enabled(x.requires_grad):
        logits = forward(net, x)
    if x.requires_grad:
        torch.autograd.grad(logits.sum(), x)


def run_tasks(plan, work, results, dataset, seed, bar):
    """Every slice of every job, by whichever process is free; slices that an interrupted run has done are taken over.

    plan: {Job: (the networks evaluated on, the sizes of its slices)}, in order. work: (job, number of a slice) -> its plain
    numbers, see `rows_of`. results: takes the rows. bar: of test images.
    """
    done = {job: results.slices(job, targets, sizes) for job, (targets, sizes) in plan.items()}
    todo = [(job, number) for job, (_, sizes) in plan.items() for number in range(len(done[job]), len(sizes))]

    def finish(job):
        rows = rows_of(job, done[job], plan[job][0], dataset, seed)
        results.add(job, rows)
        distributed.print_rank0(f"{job}: {100 * rows[0]['accuracy']:.2f} % in {duration(rows[0]['seconds'])}")

    def collect(k, result):
        job, (targets, sizes) = todo[k][0], plan[todo[k][0]]
        done[job].append(result)
        results.save_slices(job, targets, done[job])
        bar.update(result["n"])
        if len(done[job]) == len(sizes):
            finish(job)

    for job, slices in done.items():
        bar.update(sum(s["n"] for s in slices))
        if len(slices) == len(plan[job][1]):
            finish(job)
    distributed.map_dynamic(len(todo), lambda k: work(*todo[k]), collect)


class Results:
    """results.json and, for the job that is not finished, unfinished.json. Both are only ever replaced whole. Of several
    processes all have the content, and the first one writes.

    flags: {name: value} of the run. may_change: those that a run that goes on may change. check_rows: raises KeyError,
    TypeError or ValueError for rows that are none.
    """

    def __init__(self, args, flags, device, may_change, check_rows):
        self.folder = Path(args.out)
        self.path, self.unfinished_path = self.folder / "results.json", self.folder / "unfinished.json"
        self._lock = None
        self.content, self._unfinished = distributed.run_on_rank0(
            lambda: (self._begin(args, flags, device, may_change, check_rows), self._read_unfinished()))
        self.save()

    def _begin(self, args, flags, device, may_change, check_rows):
        """Lock the folder. Returns the content: that of an interrupted run, or none yet."""
        if self.folder.exists():
            self._lock = lock(self.folder)
        content = {"rows": [], "metrics": [], "sanity": {}, "networks": {}, "flags": flags,
                   "versions": versions(), "device": device_name(device)}
        if self.path.exists():
            if not args.resume and not distributed.is_restart():
                raise InputError(f"{self.path} exists; go on with --resume, or choose another --out")
            content = self._read(self.path, check_rows)
            saved = {"attack_precision": "fp32", "zca": False, **content["flags"]}
            require_same_flags(saved, flags, may_change, f"the run in {self.folder}", "another --out")
            if content["rows"] and content["device"] != device_name(device):
                raise InputError(f"the seconds in {self.path} are those of {content['device']}, this is "
                                 f"{device_name(device)}: AE and CREI would mix them; go on there, or choose another "
                                 "--out")
            content |= {"flags": flags, "device": device_name(device)}
        if not self.folder.exists():
            self.folder.mkdir(parents=True)
            self._lock = lock(self.folder)
        return content

    def close(self):
        """Let another process have the folder."""
        if self._lock:
            self._lock.close()

    def _read(self, path, check_rows):
        try:
            content = json.loads(path.read_text())
            for key in ("flags", "sanity", "networks", "versions"):
                if not isinstance(content[key], dict):
                    raise TypeError(f"{key} is no object")
            content["device"]
            check_rows(content["rows"])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} is damaged or no file of ours ({type(error).__name__}: {error})") from None
        return content

    def register(self, target):
        """Note where a network comes from. Refuses one that has changed since the run began."""
        before = self.content["networks"].setdefault(target.name, target.about)
        if before.get("sha256") != target.about["sha256"]:
            raise InputError(f"{target.about['file']} is not the file that {self.path} has results of; choose another --out")

    def has(self, job, targets):
        """Whether rows of this job are there for all networks that it is evaluated on."""
        return {v.name for v in targets} <= {row["evaluated_on"] for row in self.content["rows"] if job.is_of(row)}

    def add(self, job, rows):
        """Rows of a job that is done, in place of those that fewer evaluated networks have left."""
        self.content["rows"] = [row for row in self.content["rows"] if not job.is_of(row)] + rows
        self.save()
        if distributed.is_main_process() and self.unfinished()["job"] == vars(job):
            self.unfinished_path.unlink()

    def save(self):
        if distributed.is_main_process():
            write_json(self.path, self.content)

    def slices(self, job, targets, sizes):
        """The finished slices of `job`, if it is the one that was interrupted and was evaluated on the same networks.

        sizes: of all its slices; those of a version that cut them otherwise do not count.
        """
        unfinished = self.unfinished()
        slices = unfinished["slices"]
        same = (unfinished["job"] == vars(job) and unfinished["evaluated_on"] == [v.name for v in targets]
                and [s["n"] for s in slices] == sizes[:len(slices)])
        return slices if same else []

    def unfinished(self):
        """What is known of the job that was interrupted: its fields, the networks evaluated on, its finished slices."""
        return self._read_unfinished() if distributed.is_main_process() else self._unfinished

    def _read_unfinished(self):
        try:
            unfinished = json.loads(self.unfinished_path.read_text())
            return {key: unfinished[key] for key in ("job", "evaluated_on", "slices")}
        except (OSError, ValueError, KeyError, TypeError):
            return {"job": None, "evaluated_on": None, "slices": []}

    def save_slices(self, job, targets, slices):
        if distributed.is_main_process():
            write_json(self.unfinished_path, {"job": vars(job), "evaluated_on": [v.name for v in targets], "slices": slices})
