"""Saved states, locks and signals, each by itself; whole runs are in test_run_folder.py."""
import errno
import fcntl
import os
import resource
import signal
import time

import pytest
import torch

from runtime.safe_io import InputError, write_tensors
from runtime.checkpoint import Interrupted, SignalHandler, CheckpointFile, lock


def test_two_runs_in_one_folder(tmp_path):
    first = lock(tmp_path)
    with pytest.raises(InputError, match=f"process {os.getpid()}"):
        lock(tmp_path)
    first.close()
    lock(tmp_path).close()


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    """As some network file systems answer: it is not said that another run holds it."""
    def no_locks(*args):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(InputError, match="cannot lock .*No locks available.*file system has locks"):
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
    """A limit on the size of files stands for it: one line with the name, the good states intact, nothing half written."""
    states = CheckpointFile(tmp_path)
    for value in (1.0, 2.0):
        states.save({"x": torch.full((1000,), value)})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(InputError, match="state.pt .file too large.; the state before it, state.pt, is intact"):
            states.save({"x": torch.zeros(1_000_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert {p.name for p in tmp_path.iterdir()} == {"state.pt", "state.previous.pt"}
    assert states.load()[0]["x"][0] == 2 and torch.load(states.previous, weights_only=True)["x"][0] == 1


def test_no_state_is_called_intact_that_never_was(tmp_path, monkeypatch):
    """A full disk, which torch reports as an error of its own, at the first save and at a later one."""
    states, save = CheckpointFile(tmp_path), torch.save

    def full(content, file):
        try:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            raise RuntimeError("[enforce fail at inline_container.cc:668] . unexpected pos 64 vs 0\nstack") from None
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(InputError, match="state.pt .no space left on device.; there is no state before it$"):
        states.save({"x": 1})
    with pytest.raises(OSError, match="cannot write .*res.pt .no space left on device.$"):
        write_tensors(tmp_path / "res.pt", {"x": 1})
    monkeypatch.setattr(torch, "save", save)
    states.save({"x": 1})
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(InputError, match="the state before it, state.pt, is intact"):
        states.save({"x": 2})
    assert states.load()[0] == {"x": 1} and [path.name for path in tmp_path.iterdir()] == ["state.pt"]


def test_interrupts_wait_while_deferred():
    said = []
    interrupts = SignalHandler(said.append)
    try:
        with interrupts.delay_signals():
            os.kill(os.getpid(), signal.SIGTERM)
            reached = True
        assert reached and len(said) == 1
        with pytest.raises(Interrupted, match="SIGTERM") as stop:
            interrupts.check()
        assert stop.value.exit_status == 143
    finally:
        interrupts.restore()
