"""Saved states, locks and signals, each by itself; whole runs are in test_run_directory.py."""
import errno
import fcntl
import os
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT

from runtime.checkpoint import CheckpointFile, Interrupted, SignalHandler, lock
from runtime.safe_io import InputError, write_tensors

HOLD = """
import sys
from runtime.checkpoint import lock
held = lock(sys.argv[1])
print("held", flush=True)
input()
"""


def test_two_runs_in_one_folder(tmp_path):
    """Of one process; of another one, whose death gives the lock back."""
    first = lock(tmp_path)
    with pytest.raises(InputError, match=f"another run is writing to {tmp_path}; wait for it, or"):
        lock(tmp_path)
    first.close()
    with subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], cwd=ROOT,
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(InputError, match="another run is writing to"):
            lock(tmp_path)
        other.kill()
        with lock(tmp_path, wait=True), pytest.raises(InputError, match="another run"):
            lock(tmp_path)
    lock(tmp_path).close()


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    """As some network file systems answer: it is not said that another run holds it."""
    def no_locks(*args):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(InputError, match="cannot lock .*No locks available.*system with locks"):
        lock(tmp_path)


def test_when_a_state_is_due(tmp_path, monkeypatch):
    every_third = CheckpointFile(tmp_path, save_interval=3)
    assert [it for it in range(8) if every_third.should_save(it)] == [3, 6]
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    automatic = CheckpointFile(tmp_path)
    automatic.seconds = 0.2  # a save takes 0.2 s: at 1 percent of the time, every 20 s
    due = []
    for it in range(60):
        now[0] += 1
        if automatic.should_save(it):
            due.append(it)
            automatic._last = now[0]
    assert due == [19, 39, 59]


def test_a_full_disk_during_a_save(tmp_path):
    """A limit on the size of files stands for it: the good states stay, nothing is half written."""
    states = CheckpointFile(tmp_path)
    for value in (1.0, 2.0):
        states.save({"x": torch.full((1000,), value)})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(InputError, match="state.pt .file too large.; state.pt before it is "
                                             "intact"):
            states.save({"x": torch.zeros(1_000_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert {p.name for p in tmp_path.iterdir()} == {"state.pt", "state.previous.pt"}
    assert states.load()[0]["x"][0] == 2
    assert torch.load(states.previous, weights_only=True)["x"][0] == 1


def test_no_state_is_called_intact_that_never_was(tmp_path, monkeypatch):
    """A full disk, which torch reports as an error of its own, at the first save and later."""
    states, save = CheckpointFile(tmp_path), torch.save

    def full(content, file):
        try:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            raise RuntimeError("[enforce fail at inline_container.cc:668] . ...\nstack") from None
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(InputError, match="no space left on device.; there is none before it$"):
        states.save({"x": 1})
    with pytest.raises(OSError, match="cannot write .*res.pt .no space left on device.$"):
        write_tensors(tmp_path / "res.pt", {"x": 1})
    monkeypatch.setattr(torch, "save", save)
    states.save({"x": 1})
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(InputError, match="state.pt before it is intact"):
        states.save({"x": 2})
    assert states.load()[0] == {"x": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["state.pt"]


def test_signals_wait_while_delayed():
    logged, before = [], signal.getsignal(signal.SIGTERM)
    signals = SignalHandler(logged.append)
    try:
        with signals.delay_signals():
            os.kill(os.getpid(), signal.SIGTERM)
            assert len(logged) == 1 and signals.pending == signal.SIGTERM
            with pytest.raises(Interrupted) as stop:
                os.kill(os.getpid(), signal.SIGTERM)
            assert not stop.value.state_is_whole
        with pytest.raises(Interrupted, match="SIGTERM") as stop:
            signals.check()
        assert stop.value.exit_status == 143 and stop.value.state_is_whole
    finally:
        signals.restore()
    assert signal.getsignal(signal.SIGTERM) == before
