"""All that a run of a ROME script writes, and how it goes on after a kill."""
import json
import math
import os
import shlex
import shutil
import sys
import time
from contextlib import ExitStack
from pathlib import Path

from runtime import distributed
from runtime.checkpoint import CheckpointFile, Interrupted, SignalHandler, lock, require_same_flags
from runtime.device import device_name, versions
from runtime.safe_io import InputError, sha256, write_atomically, write_json

MAY_CHANGE = ("Iteration", "eval_interval", "save_path", "save_interval", "data_path", "fresh",
              "chunk", "cuda_graphs", "device")


class RunDirectory:
    """What one run writes (docs/reproduce.md), and what it goes on from. A context manager.

    A run goes on from its checkpoint; without one, or with `fresh`, an old folder becomes <name>.1.
    Process 0 writes; the others have the same `progress`, `finished` and `micro_batch`. With
    --parallel experiments each of them has a folder exp<k> in those of the run, until the end.

    flags: {name: value}, recorded and compared. micro_batch: that of the checkpoint counts, unless
    --chunk gives one, since another one draws other random starts on CUDA. progress: plain values
    and tensors.
    """

    def __init__(self, name, result_name, save_path, checkpoint_path, flags, data, micro_batch,
                 save_interval=0, fresh=False):
        self.name, self.flags, self.data = name, flags, data
        self.folder, self.checkpoint_folder = Path(save_path) / name, Path(checkpoint_path) / name
        self.result_file = self.folder / result_name
        self.published_file = Path(save_path) / result_name
        self.save_interval, self._experiment = save_interval, None
        self._writes, self._files = distributed.is_main_process(), ExitStack()
        self._identity = {"flags": flags, "versions": versions(),
                          "device": device_name(data.device), "data": data.fingerprint()}
        new = {**self._identity, "micro_batch": micro_batch, "progress": {}, "experiment": None,
               "seconds": 0.0, "metrics_bytes": 0, "finished": False}
        saved = distributed.run_on_rank0(lambda: self._load(new, fresh))
        self._check_saved(saved)
        self.micro_batch = micro_batch if flags["chunk"] else saved["micro_batch"]
        self.progress = saved["progress"]
        self.finished, self._saved_experiment = saved["finished"], saved["experiment"]
        self._start = time.perf_counter() - saved["seconds"]
        if self._writes:
            self._open_files(saved)

    def __enter__(self):
        self._signals = SignalHandler(self.log)
        self._files.callback(self._signals.restore)
        return self

    def __exit__(self, kind, error, traceback):
        with self._files:  # closes them at the end
            if isinstance(error, Interrupted) and not self.finished:
                self.save_checkpoint()

    # ------------------------------------------------------------------------- beginning
    def _load(self, new, fresh):
        """Lock the folders. Returns the checkpoint, or `new` if there is none."""
        for folder in (self.checkpoint_folder, self.folder.parent):
            folder.mkdir(parents=True, exist_ok=True)
        self._files.enter_context(lock(self.checkpoint_folder))
        self._files.enter_context(lock(self.folder.parent, f".{self.folder.name}.lock"))
        self._checkpoint = CheckpointFile(self.checkpoint_folder, self.save_interval)
        if fresh and not distributed.is_restart():
            self._checkpoint.path.unlink(missing_ok=True)
        saved = self._checkpoint.load(new)
        self._is_new = not saved
        if self._is_new:
            self._remove_parts()
        return saved or new

    def _check_saved(self, saved):
        where, now = f"the run saved in {self.checkpoint_folder}", self._identity
        require_same_flags(saved["flags"], self.flags, MAY_CHANGE, where,
                           "--fresh to start over, or another --checkpoint_path")
        if saved["data"] != now["data"]:
            raise InputError(f"{where} began with other data than --data_path holds")
        if saved["device"].split("(")[0] != now["device"].split("(")[0]:
            raise InputError(f"{where} ran on {saved['device']}, whose random numbers "
                             f"{now['device']} lacks; --fresh starts over")
        before, after = saved["flags"]["Iteration"], self.flags["Iteration"]
        reached = saved["experiment"]["it"] if saved["experiment"] else 0
        if reached > after or before != after and saved["progress"].get("sets"):
            raise InputError(f"--Iteration {after}: {where} is at iteration {reached} of {before}, "
                             "or has finished sets, which are all to be alike")
        if saved["finished"] and not self.result_file.exists():
            raise InputError(f"{self.name} is finished, but {self.result_file} is missing; --fresh "
                             "starts over")

    def _open_files(self, saved):
        """Begin the files of the run folder, or go on with them."""
        moved = _move_aside(self.folder) if self._is_new and self.folder.exists() else None
        self.folder.mkdir(exist_ok=True)
        self._log, self._metrics = (
            self._files.enter_context(open(self.folder / name, "a", encoding="utf-8",
                                           errors="backslashreplace"))
            for name in ("log.txt", "metrics.jsonl"))
        if self.finished:
            self.log(f"{self.name} is finished: {self.result_file}; --fresh starts over")
            return
        # Lines after the checkpoint will come again.
        self._metrics.truncate(min(saved["metrics_bytes"], self._metrics.tell()))
        self._metrics.seek(0, os.SEEK_END)
        about = {key: self._identity[key] for key in ("flags", "versions", "device")}
        write_json(self.folder / "flags.json", {
            "command": shlex.join(sys.argv), **about, "dataset": self.data.name,
            "num_classes": self.data.num_classes})
        if moved:
            self.log(f"{self.folder} held an earlier run, now in {moved}")
        if self._is_new:
            return
        it = saved["experiment"]["it"] if saved["experiment"] else 0
        self.log(f"going on with {self.name}: {len(self.progress.get('sets', []))} sets are "
                 f"finished, the next one is at iteration {it}")
        for key in ("versions", "device"):
            if saved[key] != about[key]:
                self.log(f"the last bits may change: {key} were {saved[key]}, are {about[key]}")

    # ------------------------------------------------------------------------- checkpoints
    def register_state(self, experiment):
        """From now on checkpoints hold `experiment.state_dict()`; None: no experiment is under way.

        Returns whether there was the state of an interrupted one, which is loaded into it.
        """
        saved, self._saved_experiment, self._experiment = self._saved_experiment, None, experiment
        if experiment is None or not saved:
            return False
        experiment.load_state_dict(saved)
        return True

    def delay_signals(self):
        """A context in which signals wait, because the state of the run is not whole."""
        return self._signals.delay_signals()

    def save_if_due(self, it):
        """Before iteration `it`: save if it is time to, or raise Interrupted if a signal came."""
        if self._signals.check(self._writes and self._checkpoint.should_save(it)):
            self.save_checkpoint()

    def save_checkpoint(self):
        if not self._writes:
            return
        self._metrics.flush()
        self._checkpoint.save({
            **self._identity, "micro_batch": self.micro_batch, "progress": self.progress,
            "experiment": self._experiment and self._experiment.state_dict(),
            "seconds": time.perf_counter() - self._start, "metrics_bytes": self._metrics.tell(),
            "finished": self.finished})

    def publish(self):
        """Copy the result to its published name, which has no seed. Another file is moved aside."""
        path = self.published_file
        if path.exists() and sha256(path) != sha256(self.result_file):
            self.log(f"{path} was another result and is now {_move_aside(path)}")
        write_atomically(path, lambda partial: shutil.copyfile(self.result_file, partial))

    def finish(self):
        """The results are written. Keep only that fact in the checkpoint."""
        self.progress, self._experiment, self.finished = {}, None, True
        self.save_checkpoint()
        if self._writes:
            self._remove_parts()

    # ------------------------------------------------------------------------- several processes
    def map_dynamic(self, count, work):
        """`distributed.map_dynamic`; a signal to one of the processes stops all of them."""
        with self._signals.allow_signals():
            return distributed.map_dynamic(count, work)

    def map_experiments(self, count, work):
        """--parallel experiments: work(k, its own run), whose progress and files are then ours."""
        self.save_checkpoint()  # from here on there is something to go on with

        def run_one(exp):
            with distributed.single_process(), RunDirectory(
                    f"{self.name}/exp{exp}", self.result_file.name, self.folder.parent,
                    self.checkpoint_folder.parent, self.flags, self.data, self.micro_batch,
                    self.save_interval) as part:
                if not part.progress.get("sets"):
                    work(exp, part)
                    part.save_checkpoint()
                    part._signals.check()
        self.map_dynamic(count, run_one)
        if self._writes:
            self._gather_parts(count)

    def _gather_parts(self, count):
        self.progress.update({"table": {}, "sets": [], "teachers": []})
        for exp in range(count):
            states, folder = self.checkpoint_folder / f"exp{exp}", self.folder / f"exp{exp}"
            progress = CheckpointFile(states).load()["progress"]
            for name, rows in progress["table"].items():
                self.progress["table"].setdefault(name, []).extend(rows)
            for key in ("sets", "teachers"):
                self.progress[key] += progress[key]
            for file, name in ((self._log, "log.txt"), (self._metrics, "metrics.jsonl")):
                file.write((folder / name).read_text(encoding="utf-8"))
            for path in (*states.glob("best_exp*.pt"), *folder.glob("*.png")):
                os.replace(path, path.parents[1] / path.name)

    def _remove_parts(self):
        for folder in (self.checkpoint_folder, self.folder):
            for part in folder.glob("exp[0-9]*"):
                shutil.rmtree(part)
                part.with_name(f".{part.name}.lock").unlink(missing_ok=True)

    # ------------------------------------------------------------------------- what is written
    def log(self, text):
        """A line for the reader: on the screen and in log.txt."""
        if self._writes:
            distributed.write_line(text)
            self._log.write(text + "\n")
            self._log.flush()

    def log_metrics(self, event, **values):
        """A line for programs, in metrics.jsonl."""
        if self._writes:
            seconds = round(time.perf_counter() - self._start, 2)
            self._metrics.write(json.dumps({"event": event, "seconds": seconds, **values}) + "\n")
            self._metrics.flush()

    def save_grid(self, name, images):
        """A PNG of class-major normalised images (C*n, C, H, W)."""
        if self._writes:
            save_grid(self.folder / f"{name}.png", images, self.data)


def save_grid(path, images, data):
    """Write class-major normalised images (C*n, C, H, W) as one PNG, about 1000 pixels wide.

    A row holds a class, or several; at one image a class, ten.
    """
    from torchvision.utils import make_grid, save_image

    per_class = len(images) // data.num_classes
    per_row = 10
    if per_class > 1:
        per_row = per_class * max(1, math.isqrt(data.num_classes // per_class))
    pixels = data.denormalize(images.detach().to(data.device)).clamp(0, 1)
    grid = make_grid(pixels, nrow=per_row, pad_value=1.0)
    factor = max(1, min(math.ceil(960 / grid.shape[2]), 1200 // grid.shape[1]))
    grid = grid.repeat_interleave(factor, dim=1).repeat_interleave(factor, dim=2)
    write_atomically(path, lambda partial: save_image(grid, partial))


def _move_aside(path):
    """Rename to the first free of NAME.1, NAME.2, ... (before a file's ending); the new path."""
    stem, ending = (path.name, "") if path.is_dir() else (path.stem, path.suffix)
    number = 1
    while (target := path.with_name(f"{stem}.{number}{ending}")).exists():
        number += 1
    os.replace(path, target)
    return target
