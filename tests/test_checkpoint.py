"""Saved states, locks and signals, each by itself; whole runs are in test_run_directory.py."""
import os
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT

from runtime import distributed
from runtime.checkpoint import CheckpointFile, Interrupted, SignalHandler, lock
from runtime.safe_io import InputError

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
        other.wait()
    lock(tmp_path).close()


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
    """A limit on the size of files stands for it: the good state stays, nothing is half written."""
    states = CheckpointFile(tmp_path)
    for value in (1.0, 2.0):
        states.save({"x": torch.full((1000,), value)})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match="(?i)file too large"):
            states.save({"x": torch.zeros(1_000_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert [path.name for path in tmp_path.iterdir()] == ["state.pt"]
    assert states.load()["x"][0] == 2


@pytest.mark.parametrize("under_torchrun, second", [(False, signal.SIG_DFL),
                                                    (True, signal.SIG_IGN)])
def test_signals_wait_while_delayed(monkeypatch, under_torchrun, second):
    """From the first one on, a second one kills or, under torchrun, is ignored."""
    monkeypatch.setattr(distributed, "launched_by_torchrun", lambda: under_torchrun)
    logged, before = [], signal.getsignal(signal.SIGTERM)
    signals = SignalHandler(logged.append)
    try:
        with signals.delay_signals():
            os.kill(os.getpid(), signal.SIGTERM)
            assert len(logged) == 1
            assert {signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)} == {second}
        with pytest.raises(Interrupted, match="SIGTERM") as stop:
            signals.check()
        assert stop.value.exit_status == 143
        signals.restore()
        assert signal.getsignal(signal.SIGTERM) == (second if under_torchrun else before)
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, signal.default_int_handler)
