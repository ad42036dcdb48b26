"""The saved state of a run: a kill at any moment leaves a good one behind, and a damaged one is noticed.

Nothing here knows what a state holds; the ROME scripts and pretrain.py say that, each in one function.
"""
import os
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import torch

from runtime import distributed
from runtime.safe_io import InputError, read_tensors, reason_of_failed_write, write_atomically

MAX_STATE_BYTES = 64 << 30
SAVE_SHARE = 0.01  # of the time, at most, goes into saving when --save_interval is 0
LEAST_SECONDS = 5.0  # between two saves then


class Interrupted(BaseException):
    """The user or the queue asked the run to stop. whole: whether its state is fit to be saved."""

    def __init__(self, signum, whole):
        super().__init__(signal.Signals(signum).name)
        self.signum, self.exit_status, self.whole = int(signum), 128 + signum, whole


class SignalHandler:
    """Turns SIGINT and SIGTERM into `Interrupted`: at once, or inside `deferred()` at the next `check()`.

    A second signal in such a stretch stops the run at once; what was saved before is what remains. Of several processes each
    one may get the signal, more than once (from the terminal, from torchrun, from each other): all stop at the same `check()`,
    or inside `at_once()`, and further signals mean nothing.
    """

    def __init__(self, say):
        self.say, self.pending, self.together = say, None, distributed.launched_by_torchrun()
        self.defer = distributed.world_size() > 1
        self._before = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}

    def restore(self):
        """Put the handlers back that were there before."""
        for signum, handler in self._before.items():
            signal.signal(signum, signal.SIG_IGN if self.together and self.pending else handler)

    def _handle(self, signum, frame):
        if self.together and self.pending:
            return
        if self.together and not self.defer:
            self.pending = signum
        if not self.defer or self.pending:
            raise Interrupted(signum, whole=not self.defer)
        self.pending = signum
        self.say("stopping after this iteration" + ("" if self.together else "; a second signal stops at once, back to the "
                                                    "last saved state"))

    @contextmanager
    def delay_signals(self):
        """A stretch after which the state of the run is whole again."""
        before, self.defer = self.defer, True
        try:
            yield
        finally:
            self.defer = before

    @contextmanager
    def allow_signals(self):
        """A stretch in which the processes do not wait for each other: a signal ends it at once, on all of them."""
        before = self.defer
        try:
            self.defer = False
            if self.pending:
                raise Interrupted(self.pending, whole=True)
            yield
        except Interrupted as stop:
            if not self.together:
                raise
            self.pending = stop.signum
            distributed.pass_on(stop.signum)
        finally:
            self.defer = before
        self.pending = max(distributed.all_gather_object(self.pending or 0)) or None
        self.check()

    def check(self, due=False):
        """Raise Interrupted if a signal has come, to any process. Returns whether it was `due` for one of them."""
        pending, due = distributed.all_reduce_max(int(self.pending or 0), int(bool(due)))
        if pending:
            self.pending = pending
            raise Interrupted(pending, whole=True)
        return bool(due)


def lock(folder, name=".lock", wait=False):
    """Make sure that no other run writes to `folder`. Returns an open file; closing it, or dying, gives the lock back.

    name: of the file that stands for the lock, in `folder`. wait: until the other one has finished. Raises InputError that
    names the process that holds it, or says why there can be no lock.
    """
    import fcntl
    file = open(Path(folder) / name, "a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "unknown"
        file.close()
        raise InputError(f"another run (process {holder}) is writing to {folder}; wait for it, or choose another "
                         "folder") from None
    except OSError as error:
        file.close()
        raise InputError(f"cannot lock {folder} ({error.strerror or error}); a run needs a folder whose file system has locks "
                         "(some network file systems have none)") from None
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file


def require_same_flags(saved, given, may_change, where, otherwise):
    """Raise InputError naming the first flag of `given` that is not as in `saved` ({name: value}) and may not change.

    where: what the saved ones belong to. otherwise: what the user can do instead.
    """
    for name, value in given.items():
        if name not in may_change and saved.get(name) != value:
            raise InputError(f"--{name} is {value}, {where} has {saved.get(name)}. Give the same flags to go on with it (only "
                             f"{', '.join(may_change)} may change), or {otherwise}")


class CheckpointFile:
    """`state.pt` and `state.previous.pt` in a folder that no other run writes to."""

    def __init__(self, folder, save_interval=0):
        self.newest, self.previous = Path(folder) / "state.pt", Path(folder) / "state.previous.pt"
        for partial in Path(folder).glob(".partial-*"):  # of a run that was killed in the middle of a save
            partial.unlink()
        self.save_interval, self.seconds, self._last = save_interval, 0.0, time.perf_counter()

    def should_save(self, it):
        """Whether a state is to be saved before iteration `it`."""
        if self.save_interval:
            return it > 0 and it % self.save_interval == 0
        return time.perf_counter() - self._last >= max(LEAST_SECONDS, self.seconds / SAVE_SHARE)

    def save(self, state):
        """Write `state`; the one before stays as `state.previous.pt`. Raises InputError if it cannot be written."""
        start = time.perf_counter()

        def write(partial):
            with open(partial, "wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            if self.newest.exists():
                os.replace(self.newest, self.previous)
        try:
            write_atomically(self.newest, write)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as either
            before = [path for path in (self.newest, self.previous) if path.exists()]
            left = f"the state before it, {before[0].name}, is intact" if before else "there is no state before it"
            raise InputError(f"cannot save the state as {self.newest} ({reason_of_failed_write(error)}); {left}") from None
        self._last = time.perf_counter()
        self.seconds = self._last - start

    def load(self, keys=()):
        """The newest state that can be read, or None if there never was one, and a line about what was damaged, or None.

        keys: those that a state has. Raises InputError if there are states and none can be read.
        """
        damaged = []
        for path in (self.newest, self.previous):
            if not path.exists():
                continue
            try:
                state = read_tensors(path, MAX_STATE_BYTES)
                if not isinstance(state, dict) or not set(keys) <= set(state):
                    raise InputError(f"{path} is no saved state of this script")
                return state, f"{'; '.join(damaged)}; going on from {path.name}" if damaged else None
            except InputError as error:
                damaged.append(str(error))
        if damaged:
            raise InputError(f"{'; '.join(damaged)}; start over with --fresh")
        return None, None

    def forget_previous(self):
        self.previous.unlink(missing_ok=True)

    def remove(self):
        for path in (self.newest, self.previous):
            path.unlink(missing_ok=True)
