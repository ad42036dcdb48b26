"""What a run of a ROME script writes, and what it goes on from after a kill."""
import json
import math
import os
import shlex
import sys
import time
from pathlib import Path

from tqdm import tqdm

from engine.clock import duration
from engine.device import device_name, versions
from engine.formats import SyntheticSet, save_synset
from engine.results import COLUMNS, by_model, percent
from engine.safe_files import InputError, write_atomically, write_json
from engine.saved_state import Interrupted, Interrupts, StateFile, lock, refuse_other_flags

NO_EFFECT = ("fresh", "save_interval")  # on the result
# Flags that a run that goes on may change.
MAY_CHANGE = ("Iteration", "eval_interval", "save_path", "save_interval", "data_path", "fresh")


class Run:
    """What one run writes, and what it goes on from.

    <save_path>/<run>/: flags.json, metrics.jsonl (one JSON object a line), log.txt, grids as PNG
    <save_path>/ROME_res_<method>_<dataset>_<model>_<ipc>ipc.pt: the distilled sets, at the end
    <checkpoint_path>/<run>/best_exp<k>.pt: the best set of experiment k so far
    <checkpoint_path>/<run>/state.pt, state.previous.pt: the last two saved states

    A context manager: SIGINT and SIGTERM inside it save the state and raise `Interrupted`. With a saved state the run goes on
    from it; `progress` and `experiment` then hold what was saved. Without one, or with --fresh, a folder of that name is
    kept beside the new one as <run>.1, <run>.2, ...
    progress: dict of plain values and tensors that is saved as it is. experiment: the part that `watch` described, or None.
    """

    def __init__(self, args, data):
        self.args, self.data = args, data
        self.name = f"{args.method}_{args.dataset}_{args.model}_{args.ipc}ipc_{args.threat_model}_seed{args.seed}"
        self.folder = Path(args.save_path) / self.name
        self.checkpoint_folder = Path(args.checkpoint_path) / self.name
        if self.folder.resolve() == self.checkpoint_folder.resolve():
            raise InputError(f"--save_path and --checkpoint_path are both {args.save_path}; choose two folders: the one of an "
                             "earlier run is moved aside, and its saved state must not be")
        self.result_file = Path(args.save_path) / f"ROME_res_{args.method}_{args.dataset}_{args.model}_{args.ipc}ipc.pt"
        for flag, folder in (("save_path", self.folder.parent), ("checkpoint_path", self.checkpoint_folder)):
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise InputError(f"cannot write to --{flag} {getattr(args, flag)} ({error}); choose another folder") from None
        # The second one stands beside the run folder, which may be moved.
        self._locks = [lock(self.checkpoint_folder), lock(self.folder.parent, f".{self.name}.lock")]
        self._state_file = StateFile(self.checkpoint_folder, args.save_interval)
        self._same = {"flags": vars(args), "versions": versions(), "device": device_name(data.device),
                      "data": data.fingerprint()}
        saved, damage = (None, None) if args.fresh else self._state_file.load(
            (*self._same, "chunk", "progress", "experiment", "seconds", "metrics_bytes", "finished"))
        if saved:
            self._check_saved(saved)
            data.chunk = saved["chunk"]  # another one draws other random starts on CUDA, and free memory changes
        else:
            self._state_file.remove()
        saved = saved or {"progress": {}, "experiment": None, "seconds": 0.0, "metrics_bytes": 0, "finished": False}
        self.progress, self.experiment, self.finished = saved["progress"], saved["experiment"], saved["finished"]
        self._describe = None
        self._open(saved)
        if damage:
            self.say(damage)

    def _check_saved(self, saved):
        where = f"the run saved in {self.checkpoint_folder}"
        refuse_other_flags(saved["flags"], vars(self.args), MAY_CHANGE, where,
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
        earlier = self._set_aside() if self.folder.exists() and not going_on else None
        self.folder.mkdir(exist_ok=True)
        self._log = open(self.folder / "log.txt", "a")
        self._metrics = open(self.folder / "metrics.jsonl", "a")
        self._metrics.truncate(min(saved["metrics_bytes"], os.fstat(self._metrics.fileno()).st_size))  # later lines come again
        self._metrics.seek(0, os.SEEK_END)  # truncation leaves the position, which the next state records, where it was
        self.start = time.perf_counter() - saved["seconds"]
        if self.finished:
            other = saved["flags"]["Iteration"] != self.args.Iteration
            self.say(f"{self.name} is finished: {self.result_file}, {self.folder}; "
                     + (f"--Iteration {self.args.Iteration} does not prolong it; " if other else "") + "--fresh starts over")
            return
        about = {"command": shlex.join(sys.argv), **{k: self._same[k] for k in ("flags", "versions", "device")}}
        write_json(self.folder / "flags.json", about)
        if going_on:
            where = f"experiment {len(self.progress.get('sets', []))}"
            where += f", iteration {self.experiment['it']}" if self.experiment else ""
            self.say(f"going on with {self.name} at {where}, after {duration(saved['seconds'])}")
            if saved["versions"] != self._same["versions"] or saved["device"] != self._same["device"]:
                self.say(f"the saved part ran with {saved['versions']} on {saved['device']}, this is {self._same['versions']} "
                         f"on {self._same['device']}: the result may differ in the last bits from that of an undisturbed run")
        if earlier:
            self.say(f"{self.folder} held an earlier run, now in {earlier}")
        if self.result_file.exists():
            self.say(f"{self.result_file} exists and will be replaced at the end")

    def _set_aside(self):
        number = 1
        while (target := self.folder.with_name(f"{self.name}.{number}")).exists():
            number += 1
        os.replace(self.folder, target)
        return target

    def __enter__(self):
        self._interrupts = Interrupts(self.say)
        return self

    def __exit__(self, kind, error, traceback):
        try:
            if isinstance(error, Interrupted) and error.whole and not self.finished:
                self.save_state()
        finally:
            self._interrupts.restore()
            for file in (self._log, self._metrics, *self._locks):
                file.close()

    # ------------------------------------------------------------------------------------------------------ saved state
    def watch(self, describe):
        """From now on a saved state has `describe()` as its `experiment`; None: no experiment is under way."""
        self._describe, self.experiment = describe, None

    def uninterrupted(self):
        """A context in which signals wait, because the state of the run is not whole."""
        return self._interrupts.deferred()

    def checkpoint(self, it):
        """Before iteration `it`, with the state whole: save it if it is time to, or stop if a signal asked for it."""
        self._interrupts.check()
        if self._state_file.due(it):
            self.save_state()

    def save_state(self, finished=False):
        self._metrics.flush()
        self._state_file.save({**self._same, "chunk": self.data.chunk, "progress": self.progress,
                               "experiment": self._describe and self._describe(),
                               "seconds": time.perf_counter() - self.start, "metrics_bytes": self._metrics.tell(),
                               "finished": finished})

    def finish(self):
        """The results are written: only the fact stays in the saved state."""
        self.progress, self._describe, self.finished = {}, None, True
        self._state_file.remove()
        self.save_state(finished=True)

    # ------------------------------------------------------------------------------------------------------------ reports
    def say(self, text):
        """A line for the reader: on the screen, above a progress bar if there is one, and in log.txt."""
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()
        print(text, file=self._log, flush=True)

    def metric(self, event, **values):
        """A line for programs, in metrics.jsonl."""
        line = {"event": event, "seconds": round(time.perf_counter() - self.start, 2), **values}
        print(json.dumps(line), file=self._metrics, flush=True)

    def report_evaluation(self, rows, **values):
        """Rows of an Evaluator, for each network name: one line on the screen, one in metrics.jsonl."""
        where = " ".join(name if value is True else f"{name} {value}" for name, value in values.items() if value is not False)
        for model, columns in by_model(rows).items():
            self.metric("evaluation", **values, model=model, **columns)
            self.say(f"{where}, {model}: " + "  ".join(f"{name} {percent(columns[key])}" for key, name in
                                                       {**COLUMNS, "select_acc": "select"}.items() if key in columns))

    def save_grid(self, name, images):
        """A PNG of class-major images (C*n, 3, H, W), normalised: a row a class or several, or ten images if n is 1."""
        classes = self.data.num_classes
        per_class = len(images) // classes
        per_row = per_class * max(1, math.isqrt(classes // per_class)) if per_class > 1 else 10
        save_grid(self.folder / f"{name}.png", images, self.data, per_row)

    def _meta(self, **more):
        args, data = self.args, self.data
        return {"dataset": args.dataset, "classes": data.classes, "mean": list(data.mean), "std": list(data.std),
                "packed": args.aug, "pack": args.pack, "zca": args.zca, "threat_model": args.threat_model, "seed": args.seed,
                "flags": {name: value for name, value in vars(args).items() if name not in NO_EFFECT},
                "versions": versions(), "device": device_name(data.device), **more}

    def save_best(self, exp, best, recipe):
        """best: dict of set (the parts of a SyntheticSet), iteration, rows. recipe: how to train on it."""
        save_synset(self.checkpoint_folder / f"best_exp{exp}.pt", [SyntheticSet(*best["set"])], best["rows"],
                    self._meta(iteration=best["iteration"], recipe=recipe))

    def save_result(self, sets, table, constant, recipe):
        """The final file and the final table. sets: a SyntheticSet an experiment; table: {set name: rows}; constant: the row of
        a constant classifier."""
        save_synset(self.result_file, sets, table[self.args.method], self._meta(recipe=recipe))
        args = self.args
        measured, wide = [key for key in COLUMNS if key in table[args.method][0]], max(24, *map(len, table))
        self.say(f"\n{args.dataset}, {args.ipc} image(s) per class, threat model {args.threat_model}, {args.num_exp} set(s) x "
                 f"{args.num_eval} network(s), {table[args.method][0]['n']} test images; accuracy in percent, mean +- std\n"
                 f"{'set':<{wide}} {'network':<12} " + " ".join(f"{COLUMNS[key]:>15}" for key in measured))
        for name, rows in {"constant classifier": constant, **table}.items():
            for model, columns in by_model(rows).items():
                self.metric("final", set=name, model=model, **columns)
                self.say(f"{name:<{wide}} {model:<12} " + " ".join(f"{percent(columns[key]):>15}" for key in measured))
        self.say(f"\nset: {self.result_file}\nrun: {self.folder}")


def save_grid(path, images, data, per_row):
    """Write normalised images (N, C, H, W) as one PNG, `per_row` a row, enlarged to about 1000 pixels."""
    from torchvision.utils import make_grid, save_image
    grid = make_grid(data.denormalize(images.detach()).clamp(0, 1), nrow=per_row, pad_value=1.0)  # (C, H', W')
    factor = max(1, min(math.ceil(960 / grid.shape[2]), 1200 // grid.shape[1]))
    grid = grid.repeat_interleave(factor, dim=1).repeat_interleave(factor, dim=2)
    write_atomically(path, lambda partial: save_image(grid, partial))
