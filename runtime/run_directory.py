"""What a run of a ROME script writes, and what it goes on from after a kill."""
import json
import math
import os
import shlex
import shutil
import sys
import time
from pathlib import Path

from runtime import distributed
from runtime.progress import duration
from runtime.device import device_name, versions
from runtime.measures import COLUMNS, by_model, percent
from runtime.safe_io import InputError, read_tensors, sha256, write_atomically, write_json
from runtime.checkpoint import Interrupted, SignalHandler, CheckpointFile, lock, require_same_flags
from formats.synset_file import SyntheticSet, save_synset

NO_EFFECT = ("fresh", "save_interval", "parallel")  # on the result
# Flags that a run that goes on may change.
MAY_CHANGE = ("Iteration", "eval_interval", "save_path", "save_interval", "data_path", "fresh")
STATE = ("flags", "versions", "device", "data", "chunk", "progress", "experiment", "seconds", "metrics_bytes",
         "finished")  # what a saved state holds; and, of a finished run, `written`


class Run:
    """What one run writes, and what it goes on from.

    <save_path>/<run>/: flags.json, metrics.jsonl (one JSON object a line), log.txt, grids as PNG
    <save_path>/<run>/ROME_res_<method>_<dataset>_<model>_<ipc>ipc.pt: the distilled sets, at the end
    <save_path>/ROME_res_<method>_<dataset>_<model>_<ipc>ipc.pt: a copy; one of another run is moved aside
    <checkpoint_path>/<run>/best_exp<k>.pt: the best set of experiment k so far
    <checkpoint_path>/<run>/state.pt, state.previous.pt: the last two saved states
    <checkpoint_path>/<run>/finished/: copies of the results, from which a finished run restores what is missing

    A context manager: SIGINT and SIGTERM inside it save the state and raise `Interrupted`. With a saved state the run goes on
    from it; `progress` and `experiment` then hold what was saved. Without one, or with --fresh, a folder of that name is
    kept beside the new one as <run>.1, <run>.2, ...
    progress: dict of plain values and tensors that is saved as it is. experiment: the part that `watch` described, or None.

    part: with --parallel experiments, the experiment that this is the run of. Its states are in exp<k>/ of the checkpoints,
    its lines in metrics.exp<k>.jsonl and log.exp<k>.txt, until the whole run has them.
    """

    def __init__(self, args, data, part=None):
        self.args, self.data, self.part = args, data, part
        self.name = f"{args.method}_{data.name}_{args.model}_{args.ipc}ipc_{args.threat_model}_seed{args.seed}"
        self.folder = Path(args.save_path) / self.name
        self.checkpoint_folder = Path(args.checkpoint_path) / self.name
        if self.folder.resolve() == self.checkpoint_folder.resolve():
            raise InputError(f"--save_path and --checkpoint_path are both {args.save_path}; choose two folders: the one of an "
                             "earlier run is moved aside, and its saved state must not be")
        result_name = f"ROME_res_{args.method}_{data.name}_{args.model}_{args.ipc}ipc.pt"
        self.result_file, self.published_file = self.folder / result_name, Path(args.save_path) / result_name
        states, self._kind = self.checkpoint_folder, ""
        if part is not None:
            states, self._kind = self._part_folder(part), f".exp{part}"
        for flag, folder in (("save_path", self.folder.parent), ("checkpoint_path", states)):
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise InputError(f"cannot write to --{flag} {getattr(args, flag)} ({error}); choose another folder") from None
        # The second one stands beside the run folder, which may be moved.
        self._locks = [lock(states)] + ([lock(self.folder.parent, f".{self.name}.lock")] if part is None else [])
        self._state_file = CheckpointFile(states, args.save_interval)
        self._same = {"flags": vars(args), "versions": versions(), "device": device_name(data.device),
                      "data": data.fingerprint()}
        fresh = args.fresh and part is None and not distributed.is_restart()
        saved, damage = (None, None) if fresh else self._state_file.load(STATE)
        if saved:
            self._check_saved(saved)
            data.micro_batch = saved["chunk"]  # another one draws other random starts on CUDA, and free memory changes
        else:
            self._state_file.remove()
            self._remove_parts()
            shutil.rmtree(self.checkpoint_folder / "finished", ignore_errors=True)
        saved = saved or {"progress": {}, "experiment": None, "seconds": 0.0, "metrics_bytes": 0, "finished": False}
        self._written = saved.get("written", {})  # {name: SHA-256} of a finished run
        self.progress, self.experiment, self.finished = saved["progress"], saved["experiment"], saved["finished"]
        self._describe = None
        self._open(saved)
        if damage:
            self.log(damage)

    def _to_device(self):
        """A state is read into the memory of the CPU."""
        best = self.experiment and self.experiment["best"]
        if best:
            best["set"] = [part if part is None else part.to(self.data.device) for part in best["set"]]
            best["controls"] = {name: soft.to(self.data.device) for name, soft in best["controls"].items()}

    def _check_saved(self, saved):
        where = f"the run saved in {self.checkpoint_folder}"
        require_same_flags({"parallel": "batch", "cuda_graphs": True, **saved["flags"]}, vars(self.args), MAY_CHANGE, where,
                           "--fresh to start over, or another --checkpoint_path")
        if saved["data"] != self._same["data"]:
            raise InputError(f"{where} began with other data than {self.args.data_path} holds now")
        if saved["device"].split("(")[0] != self._same["device"].split("(")[0]:
            raise InputError(f"{where} ran on {saved['device']}, whose random streams {self._same['device']} does not have; go "
                             "on there, or start over with --fresh")
        if saved["progress"].get("sets") and saved["flags"]["Iteration"] != self.args.Iteration:
            raise InputError(f"--Iteration {self.args.Iteration}: {where} has finished experiments of "
                             f"{saved['flags']['Iteration']} iterations, and all of its sets are to be alike")
        if saved["experiment"] and saved["experiment"]["it"] > self.args.Iteration:
            raise InputError(f"--Iteration {self.args.Iteration}: {where} is at iteration {saved['experiment']['it']} already")

    def _open(self, saved):
        """Begin, or go on with, the files of the run folder."""
        going_on = bool(saved.get("flags"))
        earlier = _set_aside(self.folder) if self.folder.exists() and not going_on and self.part is None else None
        self.folder.mkdir(exist_ok=True)
        self._log = open(self.folder / f"log{self._kind}.txt", "a", encoding="utf-8", errors="backslashreplace")
        if self.finished:
            self._restore_results()
        self._metrics = open(self.folder / f"metrics{self._kind}.jsonl", "a", encoding="utf-8")
        if not self.finished:
            self._metrics.truncate(min(saved["metrics_bytes"], os.fstat(self._metrics.fileno()).st_size))  # later come again
        self._metrics.seek(0, os.SEEK_END)  # truncation leaves the position, which the next state records, where it was
        self.start = time.perf_counter() - saved["seconds"]
        if self.finished:
            other = saved["flags"]["Iteration"] != self.args.Iteration
            self.log(f"{self.name} is finished: {self.result_file}, {self.folder}; "
                     + (f"--Iteration {self.args.Iteration} does not prolong it; " if other else "") + "--fresh starts over")
            return
        about = {"command": shlex.join(sys.argv), **{k: self._same[k] for k in ("flags", "versions", "device")},
                 "dataset": self.data.name, "num_classes": self.data.num_classes}
        if self.part is None:
            write_json(self.folder / "flags.json", about)
        if going_on:
            where = f"experiment {len(self.progress.get('sets', [])) if self.part is None else self.part}"
            where += f", iteration {self.experiment['it']}" if self.experiment else ""
            self.log(f"going on with {self.name} at {where}, after {duration(saved['seconds'])}")
            if saved["versions"] != self._same["versions"] or saved["device"] != self._same["device"]:
                self.log(f"the saved part ran with {saved['versions']} on {saved['device']}, this is {self._same['versions']} "
                         f"on {self._same['device']}: the result may differ in the last bits from that of an undisturbed run")
        if earlier:
            self.log(f"{self.folder} held an earlier run, now in {earlier}")
        owner = self._owner_of_published() if self.part is None else None
        if owner not in (None, self.name):
            self.log(f"{self.published_file} is {owner}'s and will be moved aside at the end")

    def __enter__(self):
        self._to_device()
        self._interrupts = SignalHandler(self.log)
        return self

    def __exit__(self, kind, error, traceback):
        try:
            if isinstance(error, Interrupted) and error.state_is_whole and not self.finished:
                self.save_state()  # without waiting for others, which may be gone
        finally:
            self._interrupts.restore()
            self._close()

    def _close(self):
        for file in (self._log, self._metrics, *self._locks):
            file.close()

    # ------------------------------------------------------------------------------------------------------ saved state
    def register_state(self, describe):
        """From now on a saved state has `describe()` as its `experiment`; None: no experiment is under way."""
        self._describe, self.experiment = describe, None

    def delay_signals(self):
        """A context in which signals wait, because the state of the run is not whole."""
        return self._interrupts.delay_signals()

    def checkpoint(self, it):
        """Before iteration `it`, with the state whole: save it if it is time to, or stop if a signal asked for it."""
        if self._interrupts.check(save_due=self._due(it)):
            self.save_state()

    def _due(self, it):
        return self._state_file.should_save(it)

    def save_state(self, finished=False):
        self._write_state(finished)

    def _write_state(self, finished):
        self._metrics.flush()
        self._state_file.save({**self._same, "chunk": self.data.micro_batch, "progress": self.progress,
                               "experiment": self._describe and self._describe(),
                               "seconds": time.perf_counter() - self.start, "metrics_bytes": self._metrics.tell(),
                               "finished": finished, "written": self._written})

    # ------------------------------------------------------------------------------------------------- the finished run
    def _result_files(self):
        """What report.py and others read of a finished run."""
        return self.result_file, self.folder / "metrics.jsonl", self.folder / "flags.json"

    def _owner_of_published(self):
        """The run that the file of the published name is of; None if there is no such file."""
        if not self.published_file.exists():
            return None
        try:
            return read_tensors(self.published_file)["meta"].get("run") or "an earlier version"
        except (InputError, KeyError, TypeError, AttributeError):
            return "another program"

    def _publish(self):
        """Copy the result to its published name, which has no seed; one of another run is moved aside. Says so."""
        with lock(self.published_file.parent, ".ROME_res.lock", wait=True):
            owner = self._owner_of_published()
            if owner not in (None, self.name):
                self.log(f"{self.published_file} was {owner}'s and is now {_set_aside(self.published_file)}")
            write_atomically(self.published_file, lambda partial: shutil.copyfile(self.result_file, partial))

    def _restore_results(self):
        """Bring back from the checkpoints what a finished run has written and what is missing or another file now. Raises
        InputError where that cannot be done."""
        if not self._written:
            raise InputError(f"{self.name} was finished by an earlier version, as {self.published_file} unless that was "
                             "replaced; --fresh starts over")
        for path in self._result_files():
            wanted = self._written.get(path.name)
            if wanted is None or path.exists() and sha256(path) == wanted:
                continue
            kept = self.checkpoint_folder / "finished" / path.name
            if not kept.exists() or sha256(kept) != wanted:
                raise InputError(f"{self.name} is finished, but {path} is missing or another file, and so is {kept}; --fresh "
                                 "starts over")
            if path.exists():
                self.log(f"{path} is not what this run has written; it is now {_set_aside(path)}")
            write_atomically(path, lambda partial: shutil.copyfile(kept, partial))  # noqa: B023
            self.log(f"{path} restored from {kept}")
        owner = self._owner_of_published()
        if owner in (None, self.name) and not _same_file(self.published_file, self.result_file):
            self._publish()
            self.log(f"{self.published_file} restored from {self.result_file}")
        elif owner != self.name:
            self.log(f"{self.published_file} is {owner}'s; the result of {self.name} is {self.result_file}")

    def finish(self):
        """The results are written: only the fact, and what they are, stays in the saved state."""
        self.progress, self._describe, self.finished = {}, None, True
        self._metrics.flush()
        kept = self.checkpoint_folder / "finished"
        kept.mkdir(exist_ok=True)
        for path in self._result_files():
            write_atomically(kept / path.name, lambda partial: shutil.copyfile(path, partial))  # noqa: B023
            self._written[path.name] = sha256(path)
        self.save_state(finished=True)
        self._state_file.remove_previous()
        self._remove_parts()

    # ------------------------------------------------------------------------------------------------- several processes
    def map_dynamic(self, count, work):
        """`distributed.map_dynamic`; of several processes, a signal to one stops all, and the work is done again later."""
        if distributed.world_size() == 1:
            return distributed.map_dynamic(count, work)
        with self._interrupts.allow_signals():
            return distributed.map_dynamic(count, work)

    def map_experiments(self, work):
        """--parallel experiments: work(k, its Run) for each experiment, by whichever process is free; then the progress of
        all of them is that of this run, in order."""
        self.save_state()  # from here on there is something to go on with

        def one(exp):
            with distributed.single_process(), Run(self.args, self.data, part=exp) as part:
                if not part.progress.get("sets"):
                    work(exp, part)
                    part.save_state()
                    part._interrupts.check()
        self.map_dynamic(self.args.num_exp, one)
        if distributed.is_main_process():
            self._gather()

    def _gather(self):
        self.progress.update({"table": {}, "sets": [], "teachers": []})
        for exp in range(self.args.num_exp):
            saved, _ = CheckpointFile(self._part_folder(exp)).load(STATE)
            for name, rows in saved["progress"]["table"].items():
                self.progress["table"].setdefault(name, []).extend(rows)
            for key in ("sets", "teachers"):
                self.progress[key] += saved["progress"][key]
            for stem, ending, file in (("log", "txt", self._log), ("metrics", "jsonl", self._metrics)):
                file.write((self.folder / f"{stem}.exp{exp}.{ending}").read_text(encoding="utf-8"))

    def _part_folder(self, exp):
        return self.checkpoint_folder / f"exp{exp}"

    def _remove_parts(self):
        """Forget the experiments that were runs of their own: this run has all of them, or begins anew."""
        if self.part is None:
            for folder in self.checkpoint_folder.glob("exp[0-9]*"):
                shutil.rmtree(folder)
            for path in (*self.folder.glob("log.exp*.txt"), *self.folder.glob("metrics.exp*.jsonl")):
                path.unlink()

    # ------------------------------------------------------------------------------------------------------------ reports
    def log(self, text):
        """A line for the reader: on the screen, above a progress bar if there is one, and in log.txt."""
        distributed.write_line(text)
        print(text, file=self._log, flush=True)

    def metric(self, event, **values):
        """A line for programs, in metrics.jsonl."""
        line = {"event": event, "seconds": round(time.perf_counter() - self.start, 2), **values}
        print(json.dumps(line), file=self._metrics, flush=True)

    def report_iteration(self, exp, it, losses, timer):
        """losses: loss_robustness, loss_performance, loss_pool, w_f (percent), as floats."""
        self.metric("iteration", exp=exp, iteration=it, **losses)
        self.log(f"exp {exp} it {it}/{self.args.Iteration}  robustness-aligned {losses['loss_robustness']:.4g}  "
                 f"performance-aligned {losses['loss_performance']:.4g}  w_f {losses['w_f']:.2f} %  "
                 f"pool {losses['loss_pool']:.4g}  {timer}")

    def report_evaluation(self, rows, **values):
        """Rows of an Evaluator, for each network name: one line on the screen, one in metrics.jsonl."""
        where = " ".join(name if value is True else f"{name} {value}" for name, value in values.items() if value is not False)
        for model, columns in by_model(rows).items():
            self.metric("evaluation", **values, model=model, **columns)
            self.log(f"{where}, {model}: " + "  ".join(f"{name} {percent(columns[key])}" for key, name in
                                                       {**COLUMNS, "select_acc": "select"}.items() if key in columns))

    def save_grid(self, name, images):
        """A PNG of class-major images (C*n, 3, H, W), normalised: a row a class or several, or ten images if n is 1."""
        classes = self.data.num_classes
        per_class = len(images) // classes
        per_row = per_class * max(1, math.isqrt(classes // per_class)) if per_class > 1 else 10
        save_grid(self.folder / f"{name}.png", images, self.data, per_row)

    def _meta(self, **more):
        args, data = self.args, self.data
        return {"run": self.name, "dataset": data.name, "classes": data.classes, "mean": list(data.mean), "std": list(data.std),
                "packed": args.aug, "pack": args.pack, "zca": args.zca, "threat_model": args.threat_model, "seed": args.seed,
                "flags": {name: value for name, value in vars(args).items() if name not in NO_EFFECT},
                "versions": versions(), "device": device_name(data.device), **more}

    def save_best(self, exp, best, recipe):
        """best: dict of set (the parts of a SyntheticSet), iteration, rows. recipe: how to train on it."""
        save_synset(self.checkpoint_folder / f"best_exp{exp}.pt", [SyntheticSet(*best["set"])], best["rows"],
                    self._meta(iteration=best["iteration"], recipe=recipe))

    def save_result(self, constant, recipe):
        """The final file and the final table, from the progress: sets, those of each experiment; table, {set name: rows}.
        constant: the row of a constant classifier."""
        table, sets = self.progress["table"], [SyntheticSet(*one) for one in self.progress["sets"]]
        save_synset(self.result_file, sets, table[self.args.method], self._meta(recipe=recipe))
        self._publish()
        args = self.args
        measured, wide = [key for key in COLUMNS if key in table[args.method][0]], max(24, *map(len, table))
        self.log(f"\n{self.data.name}, {args.ipc} image(s) per class, threat model {args.threat_model}, {args.num_exp} set(s) "
                 f"x {args.num_eval} network(s), {table[args.method][0]['n']} test images; accuracy in percent, mean +- std\n"
                 f"{'set':<{wide}} {'network':<12} " + " ".join(f"{COLUMNS[key]:>15}" for key in measured))
        for name, rows in {"constant classifier": constant, **table}.items():
            for model, columns in by_model(rows).items():
                self.metric("final", set=name, model=model, **columns)
                self.log(f"{name:<{wide}} {model:<12} " + " ".join(f"{percent(columns[key]):>15}" for key in measured))
        self.log(f"\nset: {self.result_file}, also as {self.published_file}\nrun: {self.folder}")


def open_run(args, data):
    """The Run of a script: to be written by the first of several processes, the others have a `NullRunDirectory`."""
    runs = []

    def begin():
        runs.append(Run(args, data))
        return {**{name: getattr(runs[0], name) for name in ("progress", "experiment", "finished")},
                "chunk": data.micro_batch, "data": data.fingerprint()}  # the first process's micro_batch: another draws other noise on CUDA
    said = distributed.run_on_rank0(begin)
    return runs[0] if runs else NullRunDirectory(args, data, said)


class NullRunDirectory(Run):
    """A run as a process sees it that is not the first one: it goes on from the same state, and writes and says nothing."""

    def __init__(self, args, data, said):
        self.args, self.data, self.part, self._describe, self.name = args, data, None, None, "the run"
        self.progress, self.experiment, self.finished = (said[name] for name in ("progress", "experiment", "finished"))
        data.micro_batch = said["chunk"]
        if said["data"] != data.fingerprint():
            raise InputError(f"process {distributed.rank()} has other data in --data_path {args.data_path} than process 0")

    def _nothing(self, *args, **options):
        pass

    log = metric = report_iteration = report_evaluation = save_grid = save_best = save_result = _nothing
    _due = _write_state = _close = _gather = _remove_parts = _nothing

    def finish(self):
        self.finished = True
        self.save_state()


def _set_aside(path):
    """Rename a file or folder to the first free of NAME.1, NAME.2, ...: before the ending of a file. Returns the new path."""
    stem, ending = (path.name, "") if path.is_dir() else (path.stem, path.suffix)
    number = 1
    while (target := path.with_name(f"{stem}.{number}{ending}")).exists():
        number += 1
    os.replace(path, target)
    return target


def _same_file(one, other):
    """Whether two files are there, with the same content."""
    return one.exists() and other.exists() and one.stat().st_size == other.stat().st_size and sha256(one) == sha256(other)


def save_grid(path, images, data, per_row):
    """Write normalised images (N, C, H, W) as one PNG, `per_row` a row, enlarged to about 1000 pixels."""
    from torchvision.utils import make_grid, save_image
    grid = make_grid(data.denormalize(images.detach()).clamp(0, 1), nrow=per_row, pad_value=1.0)  # (C, H', W')
    factor = max(1, min(math.ceil(960 / grid.shape[2]), 1200 // grid.shape[1]))
    grid = grid.repeat_interleave(factor, dim=1).repeat_interleave(factor, dim=2)
    write_atomically(path, lambda partial: save_image(grid, partial))
