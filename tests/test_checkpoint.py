"""Saved states and signals, each by itself; whole runs are in test_run_directory.py."""
import os
import signal
import time

import pytest

from runtime import distributed
from runtime.checkpoint import CheckpointFile, Interrupted, SignalHandler


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
