"""All that a run of a ROME script writes, and how it goes on after a kill."""
import json
import math
import os
import shlex
import shutil
import sys
import time
from pathlib import Path

from runtime import distributed
from runtime.checkpoint import CheckpointFile, Interrupted, SignalHandler, lock, require_same_flags
from runtime.device import device_name, versions
from runtime.distributed import write_line
from runtime.progress import format_duration
from runtime.safe_io import InputError, read_tensors, sha256, write_atomically, write_json

MAY_CHANGE = ("Iteration", "eval_interval", "save_path", "save_interval", "data_path", "fresh",
              "chunk", "cuda_graphs", "device")
STATE_KEYS = ("flags", "versions", "device", "data", "micro_batch", "progress", "experiment",
              "seconds", "metrics_bytes", "finished")


class RunDirectory:
    """What one run writes, and what it goes on from. A context manager.

    <save_path>/<name>/: flags.json, metrics.jsonl (one JSON object a line), log.txt, PNG grids
    <save_path>/<name>/<result_name>: the distilled sets, at the end
    <save_path>/<result_name>: a copy; one of another run is moved aside
    <checkpoint_path>/<name>/best_exp<k>.pt: the best set of experiment k so far
    <checkpoint_path>/<name>/state.pt, state.previous.pt: the last two checkpoints
    <checkpoint_path>/<name>/finished/: copies of the results, to restore what is missing

    SIGINT and SIGTERM save a checkpoint and raise `Interrupted`. A run goes on from its checkpoint;
    without one, or with `fresh`, an old folder is kept beside as <name>.1, <name>.2, ...

    flags: {name: value}, recorded and compared. micro_batch: that of the checkpoint counts, unless
    --chunk gives one, since another one draws other random starts on CUDA. part: with --parallel
    experiments, the experiment that this is the run of. progress: plain values and tensors, saved as they are.
    """

    def __init__(self, name, result_name, save_path, checkpoint_path, flags, data, micro_batch,
                 save_interval=0, fresh=False, part=None):
        self.name, self.flags, self.data, self.part = name, flags, data, part
        self._experiment, self.save_interval = None, save_interval
        self.folder = Path(save_path) / name
        self.checkpoint_folder = Path(checkpoint_path) / name
        if self.folder.resolve() == self.checkpoint_folder.resolve():
            raise InputError(f"--save_path and --checkpoint_path are both {save_path}; choose two "
                             "folders: a run folder is moved aside, its checkpoint must not be")
        self.result_file = self.folder / result_name
        self.published_file = Path(save_path) / result_name
        states = self.checkpoint_folder if part is None else self._part_folder(part)
        _make_folder("save_path", save_path, self.folder.parent)
        _make_folder("checkpoint_path", checkpoint_path, states)
        self._locks = [lock(states)]
        if part is None:  # beside the run folder, which may be moved
            self._locks.append(lock(self.folder.parent, f".{name}.lock"))
        self._checkpoint = CheckpointFile(states, save_interval)
        self._identity = {"flags": flags, "versions": versions(),
                          "device": device_name(data.device), "data": data.fingerprint()}
        saved, message = self._load(fresh and part is None and not distributed.is_restart())
        self.micro_batch = micro_batch if flags["chunk"] else saved.get("micro_batch", micro_batch)
        self._written = saved.get("written", {})  # {file name: SHA-256} of a finished run
        self.progress, self.finished = saved.get("progress", {}), saved.get("finished", False)
        self.saved_experiment = saved.get("experiment")
        self._open_files(saved)
        if message:
            self.log(message)

    def __enter__(self):
        self._signals = SignalHandler(self.log)
        return self

    def __exit__(self, kind, error, traceback):
        try:
            if isinstance(error, Interrupted) and error.state_is_whole and not self.finished:
                self.save_checkpoint()
        finally:
            self._signals.restore()
            self._close()

    def _close(self):
        for file in (self._log, self._metrics, *self._locks):
            file.close()

    # ------------------------------------------------------------------------- beginning
    def _load(self, start_over):
        """The checkpoint, or {}, and a line on what was damaged, or None."""
        saved, message = (None, None) if start_over else self._checkpoint.load(STATE_KEYS)
        if saved:
            self._check_saved(saved)
            return saved, message
        self._checkpoint.remove()
        self._remove_parts()
        shutil.rmtree(self.checkpoint_folder / "finished", ignore_errors=True)
        return {}, message

    def _check_saved(self, saved):
        where, iterations = f"the run saved in {self.checkpoint_folder}", self.flags["Iteration"]
        require_same_flags(saved["flags"], self.flags, MAY_CHANGE, where,
                           "--fresh to start over, or another --checkpoint_path")
        if saved["data"] != self._identity["data"]:
            raise InputError(f"{where} began with other data than {self.flags['data_path']} "
                             "holds now")
        device = self._identity["device"]
        if saved["device"].split("(")[0] != device.split("(")[0]:
            raise InputError(f"{where} ran on {saved['device']}, whose random numbers {device} "
                             "does not have; go on there, or start over with --fresh")
        if saved["progress"].get("sets") and saved["flags"]["Iteration"] != iterations:
            raise InputError(f"--Iteration {iterations}: {where} has finished experiments of "
                             f"{saved['flags']['Iteration']} iterations, and all of its sets are "
                             "to be alike")
        if saved["experiment"] and saved["experiment"]["it"] > iterations:
            raise InputError(f"--Iteration {iterations}: {where} is at iteration "
                             f"{saved['experiment']['it']} already")

    def _open_files(self, saved):
        """Begin the files of the run folder, or go on with them."""
        suffix = "" if self.part is None else f".exp{self.part}"
        moved = None
        if self.folder.exists() and not saved and self.part is None:
            moved = _move_aside(self.folder)
        self.folder.mkdir(exist_ok=True)
        self._log = open(self.folder / f"log{suffix}.txt", "a", encoding="utf-8",
                         errors="backslashreplace")
        if self.finished:
            self._restore_results()
        self._metrics = open(self.folder / f"metrics{suffix}.jsonl", "a", encoding="utf-8")
        if not self.finished:  # lines after the checkpoint will come again
            size = os.fstat(self._metrics.fileno()).st_size
            self._metrics.truncate(min(saved.get("metrics_bytes", 0), size))
        self._metrics.seek(0, os.SEEK_END)
        self.start = time.perf_counter() - saved.get("seconds", 0.0)
        if self.finished:
            longer = f"--Iteration {self.flags['Iteration']} does not prolong it; " * (
                saved["flags"]["Iteration"] != self.flags["Iteration"])
            self.log(f"{self.name} is finished: {self.result_file}, {self.folder}; {longer}"
                     "--fresh starts over")
            return
        if self.part is None:
            about = {key: self._identity[key] for key in ("flags", "versions", "device")}
            write_json(self.folder / "flags.json", {
                "command": shlex.join(sys.argv), **about, "dataset": self.data.name,
                "num_classes": self.data.num_classes})
        if saved:
            self._report_resumed(saved)
        if moved:
            self.log(f"{self.folder} held an earlier run, now in {moved}")
        owner = self._owner_of_published() if self.part is None else None
        if owner not in (None, self.name):
            self.log(f"{self.published_file} is {owner}'s and will be moved aside at the end")

    def _report_resumed(self, saved):
        exp = len(self.progress.get("sets", [])) if self.part is None else self.part
        where = f"experiment {exp}"
        if self.saved_experiment:
            where += f", iteration {self.saved_experiment['it']}"
        self.log(f"going on with {self.name} at {where}, "
                 f"after {format_duration(saved['seconds'])}")
        before, now = ([about["versions"], about["device"]] for about in (saved, self._identity))
        if before != now:
            self.log(f"the saved part ran with {before}, this is {now}: the result may differ in "
                     "the last bits from that of an undisturbed run")

    # ------------------------------------------------------------------------- checkpoints
    def register_state(self, experiment):
        """From now on checkpoints hold `experiment.state_dict()`; None: no experiment is under way.

        An interrupted experiment's state is first loaded into it. Returns whether there was one.
        """
        saved, self.saved_experiment, self._experiment = self.saved_experiment, None, experiment
        if experiment is not None and saved:
            experiment.load_state_dict(saved)
        return bool(experiment is not None and saved)

    def delay_signals(self):
        """A context in which signals wait, because the state of the run is not whole."""
        return self._signals.delay_signals()

    def save_if_due(self, it):
        """Before iteration `it`: save if it is time to, or raise Interrupted if a signal came."""
        if self._signals.check(save_due=self._should_save(it)):
            self.save_checkpoint()

    def _should_save(self, it):
        return self._checkpoint.should_save(it)

    def save_checkpoint(self):
        self._metrics.flush()
        experiment = self._experiment and self._experiment.state_dict()
        self._checkpoint.save({
            **self._identity, "micro_batch": self.micro_batch, "progress": self.progress,
            "experiment": experiment, "seconds": time.perf_counter() - self.start,
            "metrics_bytes": self._metrics.tell(), "finished": self.finished,
            "written": self._written})

    # ------------------------------------------------------------------------- the finished run
    def _result_files(self):
        return self.result_file, self.folder / "metrics.jsonl", self.folder / "flags.json"

    def _owner_of_published(self):
        """The run that the published file belongs to; None if there is no such file."""
        if not self.published_file.exists():
            return None
        try:
            return read_tensors(self.published_file)["meta"].get("run") or "an earlier version"
        except (InputError, KeyError, TypeError, AttributeError):
            return "another program"

    def publish(self):
        """Copy the result to its published name, which has no seed; another run's is kept."""
        held = lock(self.published_file.parent, ".ROME_res.lock", wait=True)
        try:
            owner = self._owner_of_published()
            if owner not in (None, self.name):
                moved = _move_aside(self.published_file)
                self.log(f"{self.published_file} was {owner}'s and is now {moved}")
            _copy(self.result_file, self.published_file)
        finally:
            held.close()

    def finish(self):
        """The results are written. Keep copies, and only the fact in the checkpoint."""
        self.progress, self._experiment, self.finished = {}, None, True
        self._metrics.flush()
        copies = self.checkpoint_folder / "finished"
        copies.mkdir(exist_ok=True)
        for path in self._result_files():
            _copy(path, copies / path.name)
            self._written[path.name] = sha256(path)
        self.save_checkpoint()
        self._checkpoint.remove_previous()
        self._remove_parts()

    def _restore_results(self):
        """Bring back what a finished run has written and what is missing or changed now.

        Raises InputError where that cannot be done.
        """
        copies = self.checkpoint_folder / "finished"
        for path in self._result_files():
            expected, copy = self._written.get(path.name), copies / path.name
            if expected is None or path.exists() and sha256(path) == expected:
                continue
            if not copy.exists() or sha256(copy) != expected:
                raise InputError(f"{self.name} is finished, but {path} is missing or another file, "
                                 f"and so is {copy}; --fresh starts over")
            if path.exists():
                moved = _move_aside(path)
                self.log(f"{path} is not what this run has written; it is now {moved}")
            _copy(copy, path)
            self.log(f"{path} restored from {copy}")
        owner = self._owner_of_published()
        if owner not in (None, self.name):
            self.log(f"{self.published_file} is {owner}'s; the result of {self.name} is "
                     f"{self.result_file}")
        elif owner is None or sha256(self.published_file) != sha256(self.result_file):
            self.publish()
            self.log(f"{self.published_file} restored from {self.result_file}")

    # ------------------------------------------------------------------------- several processes
    def map_dynamic(self, count, work):
        """`distributed.map_dynamic`; a signal to one of several processes stops all of them."""
        if distributed.world_size() == 1:
            return distributed.map_dynamic(count, work)
        with self._signals.allow_signals():
            return distributed.map_dynamic(count, work)

    def map_experiments(self, count, work):
        """--parallel experiments: work(k, its own run), by whichever process is free.

        Then the progress of all of them is that of this run, in order.
        """
        self.save_checkpoint()  # from here on there is something to go on with

        def run_one(exp):
            with distributed.single_process(), RunDirectory(
                    self.name, self.result_file.name, self.folder.parent,
                    self.checkpoint_folder.parent, self.flags, self.data, self.micro_batch,
                    self.save_interval, part=exp) as part:
                if not part.progress.get("sets"):
                    work(exp, part)
                    part.save_checkpoint()
                    part._signals.check()
        self.map_dynamic(count, run_one)
        if distributed.is_main_process():
            self._gather_parts(count)

    def _gather_parts(self, count):
        self.progress.update({"table": {}, "sets": [], "teachers": []})
        for exp in range(count):
            progress = CheckpointFile(self._part_folder(exp)).load(STATE_KEYS)[0]["progress"]
            for name, rows in progress["table"].items():
                self.progress["table"].setdefault(name, []).extend(rows)
            for key in ("sets", "teachers"):
                self.progress[key] += progress[key]
            for stem, ending, file in (("log", "txt", self._log),
                                       ("metrics", "jsonl", self._metrics)):
                text = (self.folder / f"{stem}.exp{exp}.{ending}").read_text(encoding="utf-8")
                file.write(text)

    def _part_folder(self, exp):
        return self.checkpoint_folder / f"exp{exp}"

    def _remove_parts(self):
        """Experiments that were runs of their own: this run has them now, or begins anew."""
        if self.part is not None:
            return
        for folder in self.checkpoint_folder.glob("exp[0-9]*"):
            shutil.rmtree(folder)
        for pattern in ("log.exp*.txt", "metrics.exp*.jsonl"):
            for path in self.folder.glob(pattern):
                path.unlink()

    # ------------------------------------------------------------------------- what is written
    def log(self, text):
        """A line for the reader: on the screen and in log.txt."""
        write_line(text)
        self._log.write(text + "\n")
        self._log.flush()

    def log_metrics(self, event, **values):
        """A line for programs, in metrics.jsonl."""
        seconds = round(time.perf_counter() - self.start, 2)
        self._metrics.write(json.dumps({"event": event, "seconds": seconds, **values}) + "\n")
        self._metrics.flush()

    def save_grid(self, name, images):
        """A PNG of class-major images (C*n, C, H, W), normalised: a row a class, or several."""
        classes = self.data.num_classes
        per_class = len(images) // classes
        per_row = per_class * max(1, math.isqrt(classes // per_class)) if per_class > 1 else 10
        save_grid(self.folder / f"{name}.png", images, self.data, per_row)


class NullRunDirectory(RunDirectory):
    """A run as the other processes see it: the same state, and nothing is written."""

    def __init__(self, attributes, data, fingerprint):
        vars(self).update(attributes, data=data, part=None, _experiment=None)
        if fingerprint != data.fingerprint():
            raise InputError(f"process {distributed.rank()} has other data in --data_path "
                             f"{self.flags['data_path']} than process 0")

    def _nothing(self, *args, **options):
        pass

    log = log_metrics = save_grid = _nothing
    _should_save = save_checkpoint = _close = _gather_parts = _remove_parts = _nothing

    def finish(self):
        self.finished = True


def open_run(data, **arguments):
    """The RunDirectory of a script; the other processes get a NullRunDirectory."""
    opened = []

    def begin():
        run = RunDirectory(data=data, **arguments)
        opened.append(run)
        names = ("name", "flags", "progress", "saved_experiment", "finished", "micro_batch",
                 "result_file", "folder", "checkpoint_folder", "save_interval")
        return {name: getattr(run, name) for name in names}, data.fingerprint()
    shared = distributed.run_on_rank0(begin)
    return opened[0] if opened else NullRunDirectory(shared[0], data, shared[1])


def save_grid(path, images, data, per_row):
    """Write normalised images (N, C, H, W) as one PNG, `per_row` a row, about 1000 pixels wide."""
    from torchvision.utils import make_grid, save_image

    pixels = data.denormalize(images.detach().to(data.device)).clamp(0, 1)
    grid = make_grid(pixels, nrow=per_row, pad_value=1.0)
    factor = max(1, min(math.ceil(960 / grid.shape[2]), 1200 // grid.shape[1]))
    grid = grid.repeat_interleave(factor, dim=1).repeat_interleave(factor, dim=2)
    write_atomically(path, lambda partial: save_image(grid, partial))


def _make_folder(flag, value, folder):
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to --{flag} {value} ({error}); choose another "
                         "folder") from None


def _move_aside(path):
    """Rename to the first free of NAME.1, NAME.2, ... (before a file's ending); the new path."""
    stem, ending = (path.name, "") if path.is_dir() else (path.stem, path.suffix)
    number = 1
    while (target := path.with_name(f"{stem}.{number}{ending}")).exists():
        number += 1
    os.replace(path, target)
    return target


def _copy(source, target):
    write_atomically(target, lambda partial: shutil.copyfile(source, partial))
