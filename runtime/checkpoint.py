"""Saved states, locks and signals: a kill at any moment leaves a good state behind."""
import os
import signal
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from runtime import distributed
from runtime.safe_io import InputError, read_tensors, reason_of_failed_write, write_atomically

MAX_STATE_BYTES = 64 << 30
SAVE_SHARE = 0.01  # of the time, at most, goes into saving when --save_interval is 0
MIN_SECONDS = 5.0  # between two saves then
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):
    """A signal asked the run to stop. state_is_whole: whether the state can be saved."""

    def __init__(self, signum, state_is_whole):
        super().__init__(signal.Signals(signum).name)
        self.exit_status, self.state_is_whole = 128 + signum, state_is_whole


class SignalHandler:
    """Turns SIGINT and SIGTERM into `Interrupted`: at once, or where they are delayed in `check()`.

    One process: a second signal while one is delayed stops at once, with the state not whole.
    Several processes: signals are delayed, and all stop in the same `check()`; in `allow_signals()`
    each process stops by itself. Further signals are ignored: torchrun sends SIGTERM to all others
    when one has ended.
    """

    def __init__(self, log):
        self.log, self.pending = log, None
        self.under_torchrun = distributed.launched_by_torchrun()
        self.delayed = distributed.world_size() > 1
        self._before = {signum: signal.signal(signum, self._handle) for signum in SIGNALS}

    def restore(self):
        """Put back the handlers that were there before."""
        for signum, handler in self._before.items():
            if signal.getsignal(signum) == self._handle:
                signal.signal(signum, handler)

    def _handle(self, signum, frame):
        if not self.delayed:
            self._stop(signum, state_is_whole=True)
        if self.pending is None:
            self.pending = signum
            hint = "" if self.under_torchrun else ("; a second signal stops at once, back to the "
                                                   "last saved state")
            self.log(f"stopping after this iteration{hint}")
        elif not self.under_torchrun:
            self._stop(signum, state_is_whole=False)

    def _stop(self, signum, state_is_whole):
        if self.under_torchrun:
            for each in SIGNALS:
                signal.signal(each, signal.SIG_IGN)
        raise Interrupted(signum, state_is_whole)

    @contextmanager
    def delay_signals(self):
        """The state of the run is not whole inside: signals wait for the next `check()`."""
        before, self.delayed = self.delayed, True
        try:
            yield
        finally:
            self.delayed = before

    @contextmanager
    def allow_signals(self):
        """The state does not change inside, nor do processes wait: a signal stops at once."""
        before, self.delayed = self.delayed, False
        try:
            if self.pending:
                self._stop(self.pending, state_is_whole=True)
            yield
        finally:
            self.delayed = before

    def check(self, save_due=False):
        """Raise Interrupted if a process has had a signal. Returns whether one has `save_due`."""
        pending, save_due = distributed.all_reduce_max(self.pending or 0, bool(save_due))
        if pending:
            self._stop(pending, state_is_whole=True)
        return bool(save_due)


def lock(folder, name=".lock", wait=False):
    """Keep other runs from writing to `folder`, until the returned object is closed.

    name: of the lock file. wait: for the other run to finish. Raises InputError.
    """
    held = ExitStack()
    try:
        held.enter_context(FileLock(Path(folder) / name, timeout=-1 if wait else 0))
    except Timeout:
        raise InputError(f"another run is writing to {folder}; wait for it, or choose another "
                         "folder") from None
    except (OSError, NotImplementedError) as error:
        raise InputError(f"cannot lock {folder} ({getattr(error, 'strerror', error)}); a run needs "
                         "a file system with locks (some network ones have none)") from None
    return held


def require_same_flags(saved, given, may_change, where, otherwise):
    """Raise InputError naming the first flag of `given` that differs from `saved`.

    saved, given: {name: value}. may_change: names that may differ. where: what the saved flags
    belong to. otherwise: what the user can do instead.
    """
    for name, value in given.items():
        if name not in may_change and saved.get(name) != value:
            raise InputError(f"--{name} is {value}, {where} has {saved.get(name)}. Give the same "
                             f"flags to go on with it (only {', '.join(may_change)} may change), "
                             f"or {otherwise}")


class CheckpointFile:
    """`state.pt` and `state.previous.pt` in a folder that no other run writes to."""

    def __init__(self, folder, save_interval=0):
        self.newest, self.previous = Path(folder) / "state.pt", Path(folder) / "state.previous.pt"
        for partial in Path(folder).glob(".partial-*"):  # of a run that was killed while saving
            partial.unlink()
        self.save_interval, self.seconds, self._last = save_interval, 0.0, time.perf_counter()

    def should_save(self, it):
        """Whether a state is to be saved before iteration `it`."""
        if self.save_interval:
            return it > 0 and it % self.save_interval == 0
        elapsed = time.perf_counter() - self._last
        return elapsed >= max(MIN_SECONDS, self.seconds / SAVE_SHARE)

    def save(self, state):
        """Write `state`, and keep the one before. Raises InputError if it cannot be written."""
        start = time.perf_counter()
        try:
            write_atomically(self.newest, lambda partial: self._write(state, partial))
        except (OSError, RuntimeError) as error:  # torch reports a full disk as either
            left = "there is no state before it"
            for path in (self.previous, self.newest):
                if path.exists():
                    left = f"the state before it, {path.name}, is intact"
            raise InputError(f"cannot save the state as {self.newest} "
                             f"({reason_of_failed_write(error)}); {left}") from None
        self._last = time.perf_counter()
        self.seconds = self._last - start

    def _write(self, state, partial):
        with open(partial, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        if self.newest.exists():
            os.replace(self.newest, self.previous)

    def load(self, keys=()):
        """Returns (the newest readable state or None, a message about damaged ones or None).

        keys: that a state must have. Raises InputError if there are states but none is readable.
        """
        damaged = []
        for path in filter(Path.exists, (self.newest, self.previous)):
            try:
                state = read_tensors(path, MAX_STATE_BYTES)
                if not isinstance(state, dict) or not set(keys) <= set(state):
                    raise InputError(f"{path} is no saved state of this script")
            except InputError as error:
                damaged.append(str(error))
                continue
            return state, f"{'; '.join(damaged)}; going on from {path.name}" if damaged else None
        if damaged:
            raise InputError(f"{'; '.join(damaged)}; start over with --fresh")
        return None, None

    def remove_previous(self):
        self.previous.unlink(missing_ok=True)

    def remove(self):
        self.newest.unlink(missing_ok=True)
        self.remove_previous()
