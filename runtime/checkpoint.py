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
SIGNAL_SECONDS = 5.0  # within which torchrun ends the others when a process has left


class Interrupted(BaseException):
    """A signal asked the run to stop. state_is_whole: whether the state can be saved."""

    def __init__(self, signum, state_is_whole):
        super().__init__(signal.Signals(signum).name)
        self.exit_status, self.state_is_whole = 128 + signum, state_is_whole


class SignalHandler:
    """Turns SIGINT and SIGTERM into `Interrupted`: at once, or where they are delayed in `check()`.

    One process: a second signal stops at once, with the state not whole. Several processes: all
    stop in the same `check()`, or each by itself in `allow_signals()`, and further signals are
    ignored, because torchrun sends SIGTERM to all others when one has ended.
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
            self._stop(signum)
        if self.pending is None:
            self.pending = signum
            self.log("stopping after this iteration" if self.under_torchrun else
                     "stopping after this iteration; a second signal stops at once, back to the "
                     "last saved state")
        elif not self.under_torchrun:
            self._stop(signum, state_is_whole=False)

    def _stop(self, signum, state_is_whole=True):
        if self.under_torchrun:
            for each in SIGNALS:
                signal.signal(each, signal.SIG_IGN)
        raise Interrupted(signum, state_is_whole)

    @contextmanager
    def _set_delayed(self, delayed):
        before, self.delayed = self.delayed, delayed
        try:
            yield
        finally:
            self.delayed = before

    def delay_signals(self):
        """A context in which the state is not whole: signals wait for the next `check()`."""
        return self._set_delayed(True)

    @contextmanager
    def allow_signals(self):
        """Inside, the state does not change, nor do processes wait: a signal stops at once."""
        with self._set_delayed(False):
            if self.pending:
                self._stop(self.pending)
            yield

    def check(self, save_due=False):
        """Raise Interrupted if a process has had a signal. Returns whether one has `save_due`.

        Where another process has left already, torchrun's SIGTERM to this one is on its way; the
        state is whole here, so it is worth waiting for.
        """
        try:
            pending, save_due = distributed.all_reduce_max(self.pending or 0, bool(save_due))
        except ConnectionError:
            deadline = time.monotonic() + SIGNAL_SECONDS
            while self.pending is None and time.monotonic() < deadline:
                time.sleep(0.05)  # signal handlers run in between
            if self.pending is None:
                raise
            pending = self.pending
        if pending:
            self._stop(pending)
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
    except (OSError, NotImplementedError) as error:  # as some network file systems answer
        raise InputError(f"cannot lock {folder} ({getattr(error, 'strerror', error)}); choose a "
                         "folder on a file system with locks") from None
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
            intact = [path.name for path in self._existing()]
            left = f"{intact[0]} before it is intact" if intact else "there is none before it"
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

    def _existing(self):
        return [path for path in (self.newest, self.previous) if path.exists()]

    def load(self, keys=()):
        """Returns (the newest readable state or None, a message about damaged ones or None).

        keys: that a state must have. Raises InputError if there are states but none is readable.
        """
        damaged = []
        for path in self._existing():
            try:
                state = read_tensors(path, MAX_STATE_BYTES)
                if not isinstance(state, dict) or not set(keys) <= set(state):
                    raise InputError(f"{path} is no saved state of this script")
                return state, f"{damaged[0]}; going on from {path.name}" if damaged else None
            except InputError as error:
                damaged.append(str(error))
        if damaged:
            raise InputError(f"{'; '.join(damaged)}; start over with --fresh")
        return None, None

    def remove_previous(self):
        self.previous.unlink(missing_ok=True)

    def remove(self):
        self.newest.unlink(missing_ok=True)
        self.remove_previous()
