"""Runs that are stopped, killed, damaged, doubled, starved, against one that nobody disturbed."""
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, call_before, random_dataset, run_in, sigterm_at

import experiment
import rome
import ROME_cifar10
import utils
from datasets import Dataset
from runtime import distributed
from runtime.checkpoint import CheckpointFile, Interrupted, SignalHandler, lock
from runtime.run_directory import save_grid
from runtime.safe_io import InputError

NAME = "ROME_Digits_MLP_1ipc_published_seed0"
RESULT = "ROME_res_ROME_Digits_MLP_1ipc.pt"
FLAGS = """--dataset Digits --model MLP --ipc 1 --aug --batch_real 8 --trained_bs 16
    --model_train_steps 1 --num_exp 2 --num_eval 2 --epoch_eval_train 3 --test_limit 20 --lr_img 0.2
    --net_decay --embed_last 1000 --net_generate_interval 2 --net_num 5 --Iteration 9
    --eval_interval 4 --labels stored""".split()
SHORT = "--num_exp 1 --Iteration 1 --labels hard --no_baseline --num_eval 1".split()


def main(monkeypatch, folder, *flags):
    """ROME_cifar10.py in this process, its files under `folder`."""
    monkeypatch.setattr(utils, "SELECT_IMAGES", 40)
    run_in(monkeypatch, ROME_cifar10, folder, *FLAGS, *flags)


def refused(monkeypatch, folder, message, *flags):
    with pytest.raises(InputError, match=message):
        main(monkeypatch, folder, *flags)


def saved_state(folder):
    return torch.load(folder / "checkpoints" / NAME / "state.pt", weights_only=True)


def final_files(folder):
    """The bytes of every file that holds a result."""
    paths = [folder / "result" / RESULT,
             *sorted((folder / "checkpoints" / NAME).glob("best_exp*.pt")),
             *sorted((folder / "result" / NAME).glob("*.png"))]
    assert len(paths) == 1 + 2 + 2 * 2 * (3 + 1)
    return {path.name: path.read_bytes() for path in paths}


def events(folder):
    """The lines of metrics.jsonl without their seconds."""
    lines = (folder / "result" / NAME / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "seconds"}
            for line in lines]


def assert_same_run(folder, expected):
    assert final_files(folder) == final_files(expected)
    assert events(folder) == events(expected)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        main(patch, folder / "run")
    return folder / "run"


@pytest.mark.parametrize("owner, name, signum", [
    (rome, "pool_step", signal.SIGINT), (utils, "train_on_set", signal.SIGTERM),
    (experiment, "save_grids", signal.SIGINT), (experiment, "report_evaluation", signal.SIGINT),
    (experiment, "save_result", signal.SIGTERM)])
def test_stopped_anywhere_and_resumed_is_bit_identical(undisturbed, tmp_path, monkeypatch, owner,
                                                       name, signum):
    """A signal at some calls of a function, one run after the other, until a run gets through."""
    calls = range(1, 300) if name == "save_result" else range(3, 300, 5)
    call_before(monkeypatch.setattr, owner, name, calls, lambda: os.kill(os.getpid(), signum))
    before, stops = signal.getsignal(signum), 0
    for _ in range(60):
        try:
            main(monkeypatch, tmp_path)
            break
        except Interrupted as stop:
            stops += 1
            assert stop.exit_status == 128 + signum
    assert signal.getsignal(signum) is before
    assert stops >= 2 or name in ("report_evaluation", "save_result")
    assert_same_run(tmp_path, undisturbed)
    log = (tmp_path / "result" / NAME / "log.txt").read_text()
    assert log.count("going on with") == stops


def test_experiments_as_runs_of_their_own(undisturbed, tmp_path, monkeypatch):
    """Stopped in each of them; then the files of a run that makes one after the other."""
    for call in (5, 9):
        with monkeypatch.context() as patch:
            sigterm_at(patch, rome, "pool_step", call)
            with pytest.raises(Interrupted):
                main(patch, tmp_path, "--parallel", "experiments")
    main(monkeypatch, tmp_path, "--parallel", "experiments")
    assert_same_run(tmp_path, undisturbed)
    names = {path.name for path in (tmp_path / "checkpoints" / NAME).iterdir()}
    assert names == {"best_exp0.pt", "best_exp1.pt", "state.pt", ".lock"}


# ---------------------------------------------------------------------------- finished runs
def test_a_finished_run_is_finished(undisturbed, monkeypatch, capsys):
    before = final_files(undisturbed)
    main(monkeypatch, undisturbed, "--Iteration", "12")
    assert "is finished" in capsys.readouterr().out
    assert final_files(undisturbed) == before
    state = saved_state(undisturbed)
    assert state["finished"] and state["experiment"] is None and state["progress"] == {}
    refused(monkeypatch, undisturbed, f"is finished, but elsewhere/.*{RESULT} is missing.*--fresh",
            "--save_path", "elsewhere")


def test_seeds_in_one_folder_lose_nothing(tmp_path, monkeypatch, capsys):
    """Each has its own result; the published name is moved aside and says whose it holds. The
    generators of the caller stay as they are."""
    published = tmp_path / "result" / RESULT
    published.parent.mkdir()
    published.write_text("of another program")
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    for seed in ("0", "1"):
        main(monkeypatch, tmp_path, *SHORT, "--seed", seed)
    assert torch.equal(states[0], torch.get_rng_state()) and states[2] == random.getstate()
    assert (states[1] == np.random.get_state()[1]).all()
    own = [tmp_path / "result" / f"{NAME[:-1]}{seed}" / RESULT for seed in (0, 1)]
    assert [torch.load(path, weights_only=True)["meta"]["run"] for path in own] == [
        NAME, f"{NAME[:-1]}1"]
    aside = [published.with_stem(f"{published.stem}.{number}") for number in (1, 2)]
    assert aside[0].read_text() == "of another program"
    assert aside[1].read_bytes() == own[0].read_bytes()
    assert published.read_bytes() == own[1].read_bytes() != own[0].read_bytes()
    assert f"was another result and is now result/{aside[1].name}" in capsys.readouterr().out


# ------------------------------------------------------------------------------ stopped runs
@pytest.fixture
def stopped(tmp_path, monkeypatch):
    """A run that was stopped in its first experiment, after the iteration under way."""
    with monkeypatch.context() as patch:
        sigterm_at(patch, rome, "pool_step", 7)
        with pytest.raises(Interrupted):
            main(patch, tmp_path, "--save_interval", "3")
    assert saved_state(tmp_path)["experiment"]["it"] == 7
    return tmp_path


def test_states_of_no_use_and_a_fresh_start(stopped, undisturbed, monkeypatch):
    path = stopped / "checkpoints" / NAME / "state.pt"
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 4
    path.write_bytes(damaged)
    refused(monkeypatch, stopped, "state.pt is damaged.*--fresh")
    torch.save({"data": []}, path)
    refused(monkeypatch, stopped, "state.pt is no saved state of this version.*--fresh")
    main(monkeypatch, stopped, "--fresh")
    assert_same_run(stopped, undisturbed)
    assert (stopped / "result" / f"{NAME}.1" / "log.txt").exists()


def test_killed_again_before_a_new_line(undisturbed, tmp_path, monkeypatch):
    """Killed after a line that no state knows of, stopped before it came again: no line twice."""
    class Killed(Exception):
        pass

    def kill_or_stop():
        if len(calls) == 7:  # iteration 3 again
            os.kill(os.getpid(), signal.SIGTERM)
        else:  # iteration 5; the last state is older than the evaluation at 4
            raise Killed
    calls = call_before(monkeypatch.setattr, rome, "pool_step", (6, 7, 9), kill_or_stop)
    for stop in (Killed, Interrupted, Killed):
        with pytest.raises(stop):
            main(monkeypatch, tmp_path, "--save_interval", "3")
    main(monkeypatch, tmp_path, "--save_interval", "3")
    assert_same_run(tmp_path, undisturbed)


def test_flags_that_contradict_and_flags_that_may_change(stopped, monkeypatch):
    for flags, message in (("--lr_img 0.3", r"--lr_img is 0.3, .* has 0.2.*may change.*--fresh"),
                           ("--net_num 6", "--net_num is 6"), ("--optim adam", "--optim is adam"),
                           ("--Iteration 5", "--Iteration 5: .* is at iteration 7")):
        refused(monkeypatch, stopped, message, *flags.split())
    with monkeypatch.context() as patch:
        patch.setattr(Dataset, "fingerprint", lambda self: "other")
        refused(patch, stopped, "began with other data")
    held = lock(stopped / "result", f".{NAME}.lock")
    refused(monkeypatch, stopped, "another run .*is writing to result", "--checkpoint_path", "new")
    held.close()
    main(monkeypatch, stopped, "--Iteration", "10", "--eval_interval", "5", "--save_path",
         "elsewhere", "--data_path", "moved", "--save_interval", "1")
    assert (stopped / "elsewhere" / RESULT).exists()
    path = stopped / "elsewhere" / NAME / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert {(line["exp"], line["iteration"]) for line in lines if "best_so_far" in line} == {
        (0, 10), (1, 5), (1, 10)}


def test_sets_of_one_run_have_equally_many_iterations(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        sigterm_at(patch, rome, "pool_step", 12)  # in the second experiment
        with pytest.raises(Interrupted):
            main(patch, tmp_path)
    refused(monkeypatch, tmp_path, "--Iteration 12: .* of 9, or has finished sets", "--Iteration",
            "12")


def test_a_loss_that_is_not_finite_keeps_the_state_before(tmp_path, monkeypatch):
    def diverge():
        calls[-1][0].data.fill_(float("nan"))  # image_syn
    calls = call_before(monkeypatch.setattr, rome, "matching_step", [11], diverge)  # two a step
    with pytest.raises(FloatingPointError, match="iteration 5.*--lr_img 0.2.*smaller .*--fresh"):
        main(monkeypatch, tmp_path, "--save_interval", "2")
    state = saved_state(tmp_path)["experiment"]
    assert state["it"] == 4 and state["image_syn"].isfinite().all()


def test_grid(tmp_path):
    """De-normalised, in order, one row per class."""
    from PIL import Image
    data = random_dataset(num_classes=2)
    pixels = torch.linspace(0, 1, 6).view(6, 1, 1, 1).expand(6, 3, 32, 32)
    save_grid(tmp_path / "grid.png", data.normalize(pixels), data)
    image = np.asarray(Image.open(tmp_path / "grid.png"))
    factor = image.shape[1] // (3 * 34 + 2)
    assert image.shape[1] >= 960 and image.shape[0] == factor * (2 * 34 + 2)
    centres = image[factor * 18::factor * 34, factor * 18::factor * 34, 0]  # (2, 3)
    assert np.allclose(centres.astype(int), [[0, 51, 102], [153, 204, 255]], atol=1)


# ------------------------------------------------------------------- saved states and signals
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


# ---------------------------------------------------------------------------- real processes
PROGRAM = """
import utils, ROME_cifar10
from runtime.command_line import run_script
utils.SELECT_IMAGES = 40
run_script(ROME_cifar10.main)
"""


class Process(subprocess.Popen):
    """ROME_cifar10.py as a process, after some lines of code."""

    def __init__(self, folder, before="", **options):
        self.state = folder / "checkpoints" / NAME / "state.pt"
        env = {"OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": str(ROOT)}
        super().__init__([sys.executable, "-c", before + PROGRAM, *FLAGS, "--save_interval", "1"],
                         cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                         env={**os.environ, **env}, **options)

    def wait_for_iterations(self):
        """Until the run has begun its iterations; whatever it does then."""
        before = self.state.stat().st_mtime_ns if self.state.exists() else None
        while self.poll() is None and (
                not self.state.exists() or self.state.stat().st_mtime_ns == before):
            time.sleep(0.01)

    def ends_with(self, status, words="", lines=None):
        """Wait for its end, and compare its exit status and what it says to stderr or stdout."""
        out, err = self.communicate(timeout=600)
        assert self.returncode == status and words in out + err.lower(), err
        assert lines is None or len(err.strip().splitlines()) == lines, err


# With this the process kills itself in its fourth save, with half of the file written.
HALF_WRITTEN = """
import io, os, signal, torch
save, saves = torch.save, []
def half(content, file):
    saves.append(file.name) if file.name.endswith("-state.pt") else None
    if len(saves) < 4:
        return save(content, file)
    whole = io.BytesIO()
    save(content, whole)
    file.write(whole.getvalue()[:whole.tell() // 2])
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
torch.save = half
"""


@pytest.mark.slow
def test_ten_kills_at_random_moments(tmp_path, undisturbed):
    """SIGKILL, also while a state is being written: the files of a run that nobody killed."""
    rng, kills = random.Random(0), 0
    while kills < 10:
        process = Process(tmp_path)
        process.wait_for_iterations()
        time.sleep(rng.uniform(0, 0.15))
        if process.poll() is not None:
            break
        process.kill()
        process.communicate()
        kills += 1
    assert kills >= 8
    Process(tmp_path).ends_with(0)
    assert_same_run(tmp_path, undisturbed)


def test_killed_starved_doubled_and_interrupted_as_processes(tmp_path, undisturbed):
    """SIGKILL in the middle of a save, a full disk, a second run that refuses, SIGINT; then on."""
    process = Process(tmp_path, HALF_WRITTEN)
    process.ends_with(-signal.SIGKILL)
    assert process.state.exists()
    assert len(list(process.state.parent.glob(".partial-*-state.pt"))) == 1
    limit = (300_000, 300_000)
    Process(tmp_path, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit)
            ).ends_with(1, "file too large", lines=1)
    process = Process(tmp_path)
    process.wait_for_iterations()
    os.kill(process.pid, signal.SIGSTOP)  # it holds the lock while it stands still
    Process(tmp_path).ends_with(1, "another run", lines=1)
    process.send_signal(signal.SIGINT)
    os.kill(process.pid, signal.SIGCONT)
    process.ends_with(130, "stopped by sigint", lines=1)
    Process(tmp_path).ends_with(0, "going on with")
    assert_same_run(tmp_path, undisturbed)
    assert not list(tmp_path.rglob(".partial-*"))
