"""Saved states, locks and signals: a kill at any moment leaves a good state behind."""
import signal
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from runtime import distributed
from runtime.safe_io import InputError, read_tensors, write_tensors

MAX_STATE_BYTES = 64 << 30
SAVE_SHARE = 0.01  # of the time, at most, goes into saving when --save_interval is 0
MIN_SECONDS = 5.0  # between two saves then
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):
    """A signal has asked the run to stop; its state is whole and can be saved."""

    def __init__(self, signum):
        super().__init__(signal.Signals(signum).name)
        self.exit_status = 128 + signum


class SignalHandler:
    """Turns SIGINT and SIGTERM into `Interrupted`: at once, or where they are delayed in `check()`.

    A second signal kills. Processes of torchrun stop in the same `check()`, or each by itself in
    `allow_signals()`, and ignore further ones: when one has ended, torchrun sends SIGTERM to all.
    """

    def __init__(self, log):
        self.log, self.pending = log, None
        self.delayed = distributed.world_size() > 1
        self._second = signal.SIG_IGN if distributed.launched_by_torchrun() else signal.SIG_DFL
        self._before = {signum: signal.signal(signum, self._handle) for signum in SIGNALS}

    def restore(self):
        """Put back the handlers that were there before, except where signals are ignored now."""
        for signum, handler in self._before.items():
            if signal.getsignal(signum) != signal.SIG_IGN:
                signal.signal(signum, handler)

    def _handle(self, signum, frame):
        self._stop_handling()
        if not self.delayed:
            raise Interrupted(signum)
        self.pending = signum
        self.log("stopping after this iteration")

    def _stop_handling(self):
        for signum in SIGNALS:
            signal.signal(signum, self._second)

    @contextmanager
    def delay_signals(self, delayed=True):
        """A context in which the state is not whole: signals wait for the next `check()`."""
        before, self.delayed = self.delayed, delayed
        try:
            yield
        finally:
            self.delayed = before

    @contextmanager
    def allow_signals(self):
        """Inside, the state does not change, nor do processes wait: a signal stops at once."""
        with self.delay_signals(False):
            if self.pending:
                raise Interrupted(self.pending)
            yield

    def check(self, save_due=False):
        """Raise Interrupted if a process has had a signal. Returns whether one has `save_due`."""
        pending, save_due = distributed.all_reduce_max(self.pending or 0, bool(save_due))
        if pending:
            self._stop_handling()
            raise Interrupted(pending)
        return bool(save_due)


def lock(folder, name=".lock"):
    """Keep other runs from writing to `folder`, until the returned object is closed.

    name: of the lock file. Raises InputError if another run has it.
    """
    held = ExitStack()
    try:
        held.enter_context(FileLock(Path(folder) / name, timeout=0))
    except Timeout:
        raise InputError(f"another run is writing to {folder}") from None
    return held


def require_same_flags(saved, given, may_change, where, otherwise):
    """Raise InputError naming the first flag of `given` that differs from `saved`.

    saved, given: {name: value}. may_change: names that may differ. where, otherwise: for the
    message, what the saved flags belong to and what the user can do instead.
    """
    for name, value in given.items():
        if name not in may_change and saved.get(name) != value:
            raise InputError(f"--{name} is {value}, {where} has {saved.get(name)}; only "
                             f"{', '.join(may_change)} may change: give the same flags, or "
                             f"{otherwise}")


class CheckpointFile:
    """`state.pt` in a folder that no other run writes to: replaced at once, never half written."""

    def __init__(self, folder, save_interval=0):
        self.path = Path(folder) / "state.pt"
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
        """Raises OSError if `state` cannot be written; the state before stays then."""
        start = time.perf_counter()
        write_tensors(self.path, state)
        self._last = time.perf_counter()
        self.seconds = self._last - start

    def load(self, keys=()):
        """The saved state, or None. Raises InputError if it is damaged or lacks some of `keys`."""
        if not self.path.exists():
            return None
        try:
            state = read_tensors(self.path, MAX_STATE_BYTES)
            if not isinstance(state, dict) or not set(keys) <= set(state):
                raise InputError(f"{self.path} is no saved state of this version")
        except InputError as error:
            raise InputError(f"{error}; start over with --fresh") from None
        return state
