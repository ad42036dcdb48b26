"""Runs that are stopped, killed, damaged, doubled and starved, against runs that nobody disturbed."""
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, random_dataset, sigterm_at

import ROME_cifar10 as rome
import utils
from runtime.command_line import run_script
from datasets import Dataset
from network_pool import NetworkPool
from runtime.run_directory import Run, save_grid
from runtime.safe_io import InputError
from runtime.checkpoint import Interrupted, CheckpointFile, lock
from networks import get_network

NAME = "ROME_Digits_MLP_1ipc_pixel_seed0"
RESULT = "ROME_res_ROME_Digits_MLP_1ipc.pt"
FLAGS = ["--dataset", "Digits", "--model", "MLP", "--ipc", "1", "--aug", "--threat_model", "pixel", "--batch_real", "8",
         "--trained_bs", "16", "--model_train_steps", "1", "--num_exp", "2", "--num_eval", "2", "--epoch_eval_train", "3",
         "--test_limit", "40", "--lr_img", "0.2", "--net_decay", "--embed_last", "1000", "--net_generate_interval", "2",
         "--net_num", "5", "--Iteration", "9", "--eval_interval", "4", "--labels", "prior"]


def main(monkeypatch, folder, *flags):
    """ROME_cifar10.py in this process, its files under `folder`."""
    folder.mkdir(exist_ok=True)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(utils, "SELECT_IMAGES", 100)
    monkeypatch.setattr(sys, "argv", ["ROME_cifar10.py", *FLAGS, *flags])
    rome.main()


def final_files(folder):
    """The bytes of every file that holds a result."""
    paths = [folder / "result" / RESULT, *sorted((folder / "checkpoints" / NAME).glob("best_exp*.pt")),
             *sorted((folder / "result" / NAME).glob("*.png"))]
    assert len(paths) == 1 + 2 + 2 * 2 * (3 + 1)
    return {path.name: path.read_bytes() for path in paths}


def events(folder, name):
    lines = [json.loads(line) for line in (folder / "result" / NAME / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines if line["event"] == name]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        main(patch, folder / "run")
    return folder / "run"


@pytest.mark.parametrize("where, signum", [("outer_iteration", signal.SIGINT), ("outer_iteration", signal.SIGTERM),
                                           ("train_on_set", signal.SIGTERM), ("save_grids", signal.SIGINT),
                                           ("report_evaluation", signal.SIGINT), ("save_result", signal.SIGTERM)])
def test_stopped_anywhere_and_resumed_is_bit_identical(undisturbed, tmp_path, monkeypatch, where, signum):
    """A signal at every call of a function, one run after the other, until a run gets through."""
    owner = {"outer_iteration": rome, "train_on_set": utils, "save_grids": utils}.get(where, Run)
    function, calls = getattr(owner, where), []

    def disturbed(*args, **options):
        calls.append(1)
        if len(calls) % 5 == 3 or where == "save_result":
            os.kill(os.getpid(), signum)
        return function(*args, **options)
    monkeypatch.setattr(owner, where, disturbed)
    before = signal.getsignal(signum)
    stops = 0
    for _ in range(60):
        try:
            main(monkeypatch, tmp_path)
            break
        except Interrupted as stop:
            stops += 1
            assert stop.state_is_whole and stop.exit_status == 128 + signum
    assert signal.getsignal(signum) is before and (stops >= 2 or where in ("report_evaluation", "save_result"))
    assert final_files(tmp_path) == final_files(undisturbed)
    for event in ("iteration", "evaluation", "final"):
        assert events(tmp_path, event) == events(undisturbed, event), event
    log = (tmp_path / "result" / NAME / "log.txt").read_text()
    assert log.count("going on with") == stops


def test_a_finished_run_is_finished(undisturbed, monkeypatch, capsys):
    before = final_files(undisturbed)
    main(monkeypatch, undisturbed)
    assert "is finished" in capsys.readouterr().out and final_files(undisturbed) == before
    state = torch.load(undisturbed / "checkpoints" / NAME / "state.pt", weights_only=True)
    assert state["finished"] and state["experiment"] is None and state["progress"] == {}


@pytest.fixture
def finished(undisturbed, tmp_path):
    """A copy of a finished run."""
    shutil.copytree(undisturbed, tmp_path / "run")
    return tmp_path / "run"


def test_seeds_in_one_folder_lose_nothing(tmp_path, monkeypatch, capsys):
    """Seeds 0 and 1 with the default folder, and seed 0 again: each has its own result, and the published name says whose."""
    few = ["--num_exp", "1", "--Iteration", "0", "--labels", "hard", "--no_baseline", "--num_eval", "1"]
    for seed in ("0", "1"):
        main(monkeypatch, tmp_path, *few, "--seed", seed)
    names = [f"ROME_Digits_MLP_1ipc_pixel_seed{seed}" for seed in (0, 1)]
    own = [tmp_path / "result" / name / RESULT for name in names]
    published, aside = tmp_path / "result" / RESULT, tmp_path / "result" / RESULT.replace(".pt", ".1.pt")
    assert published.read_bytes() == own[1].read_bytes() and aside.read_bytes() == own[0].read_bytes() != own[1].read_bytes()
    assert [torch.load(path, weights_only=True)["meta"]["run"] for path in own] == names
    assert f"{RESULT} was {names[0]}'s and is now result/{aside.name}" in capsys.readouterr().out
    main(monkeypatch, tmp_path, *few, "--seed", "0")
    out = capsys.readouterr().out
    assert f"{names[0]} is finished: result/{names[0]}/{RESULT}" in out
    assert f"result/{RESULT} is {names[1]}'s; the result of {names[0]} is result/{names[0]}/{RESULT}" in out
    assert published.read_bytes() == own[1].read_bytes()


@pytest.mark.parametrize("name", [RESULT, f"{NAME}/{RESULT}", f"{NAME}/metrics.jsonl", f"{NAME}/flags.json"])
@pytest.mark.parametrize("how", ["deleted", "replaced"])
def test_a_finished_run_restores_what_it_wrote(finished, monkeypatch, capsys, name, how):
    path = finished / "result" / name
    before = path.read_bytes()
    if how == "deleted":
        path.unlink()
    elif path.suffix == ".pt":
        content = torch.load(path, weights_only=True)
        content["data"][0][0] += 1
        torch.save(content, path)
    else:
        path.write_text("something else")
    main(monkeypatch, finished)
    out = capsys.readouterr().out
    assert path.read_bytes() == before and "restored from" in out and "is finished" in out
    if how == "replaced" and name != RESULT:
        assert "is not what this run has written; it is now" in out and path.with_stem(f"{path.stem}.1").exists()


def test_a_finished_run_in_another_save_path(finished, monkeypatch, capsys):
    before = final_files(finished)[RESULT]
    main(monkeypatch, finished, "--save_path", "elsewhere")
    assert (finished / "elsewhere" / RESULT).read_bytes() == (finished / "elsewhere" / NAME / RESULT).read_bytes() == before
    assert (finished / "elsewhere" / NAME / "metrics.jsonl").read_bytes() == (
        finished / "result" / NAME / "metrics.jsonl").read_bytes()
    assert "restored from" in capsys.readouterr().out


def test_a_finished_run_that_cannot_be_restored(finished, monkeypatch):
    (finished / "result" / NAME / RESULT).unlink()
    (finished / "checkpoints" / NAME / "finished" / RESULT).write_bytes(b"damaged")
    with pytest.raises(InputError, match=f"is finished, but .*{RESULT} is missing or another file, and so is .*--fresh"):
        main(monkeypatch, finished)


def test_the_file_of_another_program_is_moved_aside(tmp_path, monkeypatch, capsys):
    (tmp_path / "result").mkdir()
    torch.save({"data": []}, tmp_path / "result" / RESULT)
    main(monkeypatch, tmp_path, "--num_exp", "1", "--Iteration", "0", "--labels", "hard", "--no_baseline", "--num_eval", "1")
    assert "is another program's and will be moved aside" in capsys.readouterr().out
    assert torch.load(tmp_path / "result" / RESULT.replace(".pt", ".1.pt"), weights_only=True) == {"data": []}


@pytest.fixture
def stopped(tmp_path, monkeypatch):
    """A run that was stopped in its first experiment, with two saved states."""
    with monkeypatch.context() as patch:
        sigterm_at(patch, rome, "outer_iteration", 7)
        with pytest.raises(Interrupted):
            main(patch, tmp_path, "--save_interval", "3")
    folder = tmp_path / "checkpoints" / NAME
    assert {p.name for p in folder.iterdir()} == {"state.pt", "state.previous.pt", ".lock", "best_exp0.pt"}
    its = [torch.load(folder / name, weights_only=True)["experiment"]["it"] for name in ("state.pt", "state.previous.pt")]
    assert its == [7, 6]  # at the signal, after the iteration under way; and at the interval before
    return tmp_path


@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped", "missing"])
def test_a_damaged_state_falls_back_to_the_one_before(stopped, undisturbed, monkeypatch, capsys, damage):
    newest = stopped / "checkpoints" / NAME / "state.pt"
    content = bytearray(newest.read_bytes())
    if damage == "flipped":
        content[len(content) // 2] ^= 4
    newest.write_bytes(content[:{"truncated": len(content) // 2, "empty": 0}.get(damage, len(content))])
    if damage == "missing":  # killed between the two renamings of a save
        newest.unlink()
    main(monkeypatch, stopped)
    out = capsys.readouterr().out
    assert "iteration 6" in out and ("state.pt is damaged" in out or "state.pt cannot be read" in out) == (damage != "missing")
    assert final_files(stopped) == final_files(undisturbed)
    assert events(stopped, "iteration") == events(undisturbed, "iteration")


def test_both_states_damaged(stopped, monkeypatch):
    for path in (stopped / "checkpoints" / NAME).glob("state*.pt"):
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match="state.pt .*state.previous.pt .*--fresh"):
        main(monkeypatch, stopped)


def test_killed_again_before_a_new_line(undisturbed, tmp_path, monkeypatch):
    """Killed after a line that no state knows of; stopped before that line came again; killed after it: no line comes twice."""
    outer_iteration, calls = rome.outer_iteration, []

    class Killed(Exception):
        pass

    def disturbed(*args):
        calls.append(1)
        if len(calls) in (6, 9):  # iteration 5; the last state is older than the line of the evaluation before iteration 4
            raise Killed
        if len(calls) == 7:  # iteration 3 again
            os.kill(os.getpid(), signal.SIGTERM)
        return outer_iteration(*args)
    monkeypatch.setattr(rome, "outer_iteration", disturbed)
    for stop in (Killed, Interrupted, Killed):
        with pytest.raises(stop):
            main(monkeypatch, tmp_path, "--save_interval", "3")
    main(monkeypatch, tmp_path, "--save_interval", "3")
    for event in ("iteration", "evaluation", "final"):
        assert events(tmp_path, event) == events(undisturbed, event), event
    assert final_files(tmp_path) == final_files(undisturbed)


def test_contradicting_flags_are_refused_by_name(stopped, undisturbed, monkeypatch):
    for flags, message in ((["--lr_img", "0.3"], r"--lr_img is 0.3, .* has 0.2.*may change.*--fresh"),
                           (["--net_num", "6"], "--net_num is 6"), (["--optim", "adam"], "--optim is adam"),
                           (["--Iteration", "5"], "--Iteration 5: .* is at iteration 7 already")):
        with pytest.raises(InputError, match=message):
            main(monkeypatch, stopped, *flags)
    with monkeypatch.context() as patch:
        patch.setattr(Dataset, "fingerprint", lambda self: "other")
        with pytest.raises(InputError, match="began with other data"):
            main(patch, stopped)
    main(monkeypatch, stopped, "--save_interval", "1")  # this one may change
    assert final_files(stopped).keys() == final_files(undisturbed).keys()


def test_flags_that_may_change(stopped, monkeypatch):
    main(monkeypatch, stopped, "--Iteration", "10", "--eval_interval", "5", "--save_path", "elsewhere", "--data_path", "moved")
    assert (stopped / "elsewhere" / RESULT).exists()
    lines = [json.loads(line) for line in (stopped / "elsewhere" / NAME / "metrics.jsonl").read_text().splitlines()]
    assert {(line["exp"], line["iteration"]) for line in lines if line["event"] == "evaluation" and "best_so_far" in line} == {
        (0, 10), (1, 5), (1, 10)}


def test_sets_of_one_run_have_equally_many_iterations(undisturbed, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        sigterm_at(patch, rome, "outer_iteration", 12)  # in the second experiment
        with pytest.raises(Interrupted):
            main(patch, tmp_path)
    with pytest.raises(InputError, match="--Iteration 12: .* finished experiments of 9 iterations"):
        main(monkeypatch, tmp_path, "--Iteration", "12")
    main(monkeypatch, undisturbed, "--Iteration", "12")
    assert "--Iteration 12 does not prolong it" in capsys.readouterr().out


def test_two_runs_with_one_result_folder(stopped, monkeypatch):
    held = lock(stopped / "result", f".{NAME}.lock")
    with pytest.raises(InputError, match="another run is writing to result"):
        main(monkeypatch, stopped, "--checkpoint_path", "elsewhere")
    held.close()


def test_one_folder_for_results_and_states(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="--save_path and --checkpoint_path are both out; choose two folders"):
        main(monkeypatch, tmp_path, "--save_path", "out", "--checkpoint_path", "./out")
    assert not (tmp_path / "out").exists()


def test_a_state_of_something_else(stopped, monkeypatch):
    for name in ("state.pt", "state.previous.pt"):
        torch.save({"data": []}, stopped / "checkpoints" / NAME / name)
    with pytest.raises(InputError, match="state.pt is no saved state of this script.*--fresh"):
        main(monkeypatch, stopped)


def test_after_fresh_the_message_is_without_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rome, "outer_iteration", lambda *a: os.kill(os.getpid(), signal.SIGTERM) or {
        key: 0.0 for key in ("loss_robustness", "loss_performance", "w_f", "loss_pool")})
    monkeypatch.chdir(tmp_path)
    for flags, same in (([], "the same command goes on"), (["--fresh"], "the same command without --fresh goes on")):
        monkeypatch.setattr(sys, "argv", ["ROME_cifar10.py", *FLAGS, "--no_baseline", *flags])
        with pytest.raises(SystemExit) as stop:
            run_script(rome.main)
        assert stop.value.code == 143 and same in capsys.readouterr().err


def test_fresh_starts_over(stopped, undisturbed, monkeypatch, capsys):
    main(monkeypatch, stopped, "--fresh")
    assert "held an earlier run" in capsys.readouterr().out
    assert final_files(stopped) == final_files(undisturbed)


def test_a_second_signal_stops_at_once(tmp_path, monkeypatch):
    """The iteration under way is not finished, and the last saved state stays what it was."""
    outer_iteration, calls = rome.outer_iteration, []

    def disturbed(*args):
        calls.append(1)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            raise AssertionError("not stopped")
        return outer_iteration(*args)
    monkeypatch.setattr(rome, "outer_iteration", disturbed)
    with pytest.raises(Interrupted) as stop:
        main(monkeypatch, tmp_path, "--save_interval", "2")
    assert not stop.value.state_is_whole
    state = torch.load(tmp_path / "checkpoints" / NAME / "state.pt", weights_only=True)
    assert state["experiment"]["it"] == 4


def test_a_loss_that_is_not_finite_keeps_the_state_before(tmp_path, monkeypatch):
    outer_iteration = rome.outer_iteration

    def diverging(it, *args):
        if it == 5:
            args[0].data.fill_(float("nan"))
        return outer_iteration(it, *args)
    monkeypatch.setattr(rome, "outer_iteration", diverging)
    with pytest.raises(FloatingPointError, match="iteration 5.*--lr_img 0.2.*smaller learning rates.*--fresh.*is kept"):
        main(monkeypatch, tmp_path, "--save_interval", "2")
    state = torch.load(tmp_path / "checkpoints" / NAME / "state.pt", weights_only=True)
    assert state["experiment"]["it"] == 4 and state["experiment"]["image_syn"].isfinite().all()


def test_the_callers_generators_are_untouched(tmp_path, monkeypatch):
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    main(monkeypatch, tmp_path)
    assert torch.equal(states[0], torch.get_rng_state()) and (states[1] == np.random.get_state()[1]).all()
    assert states[2] == random.getstate()


# --------------------------------------------------------------------------------------------------------- the pieces


def test_grid(tmp_path):
    """De-normalised, in order, one row per class."""
    from PIL import Image
    data = random_dataset()
    pixels = torch.linspace(0, 1, 6).view(6, 1, 1, 1).expand(6, 3, 32, 32)
    save_grid(tmp_path / "grid.png", data.normalize(pixels), data, per_row=3)
    image = np.asarray(Image.open(tmp_path / "grid.png"))
    factor = image.shape[1] // (3 * 34 + 2)
    assert image.shape[1] >= 960 and image.shape[0] == factor * (2 * 34 + 2)
    centres = image[factor * 18::factor * 34, factor * 18::factor * 34, 0]  # (2, 3)
    assert np.allclose(centres.astype(int), [[0, 51, 102], [153, 204, 255]], atol=1)


# ------------------------------------------------------------------------------------------------------ real processes
PROGRAM = """
import utils, ROME_cifar10
from runtime.command_line import run_script
utils.SELECT_IMAGES = 100
run_script(ROME_cifar10.main)
"""


def start(folder, before="", **options):
    """ROME_cifar10.py as a process, after some lines of code."""
    return subprocess.Popen([sys.executable, "-c", before + PROGRAM, *FLAGS, "--save_interval", "1"], cwd=folder,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}, **options)


# With this the process kills itself in its fourth save: with half of the file written; between its two renamings.
KILLED_IN_A_SAVE = ["""
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
""", """
import os, signal
replace, saves = os.replace, []
def half(source, target):
    replace(source, target)
    saves.append(target) if str(target).endswith("state.previous.pt") else None
    if len(saves) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
os.replace = half
"""]


def wait_for_iterations(process, folder):
    """Until the run has begun its iterations; whatever it does then."""
    state, before = folder / "checkpoints" / NAME / "state.pt", None
    if state.exists():
        before = state.stat().st_mtime_ns
    while process.poll() is None and (not state.exists() or state.stat().st_mtime_ns == before):
        time.sleep(0.01)


def undisturbed_process(folder):
    folder.mkdir()
    process = start(folder)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return final_files(folder)


@pytest.mark.slow
def test_ten_kills_at_random_moments(tmp_path):
    """SIGKILL, also while a state is being written: the final files are those of a run that nobody killed."""
    expected = undisturbed_process(tmp_path / "a")
    (tmp_path / "b").mkdir()
    rng, kills = random.Random(0), 0
    while kills < 10:
        process = start(tmp_path / "b")
        wait_for_iterations(process, tmp_path / "b")
        time.sleep(rng.uniform(0, 0.15))
        if process.poll() is not None:
            break
        process.kill()
        process.communicate()
        kills += 1
    assert kills >= 8
    process = start(tmp_path / "b")
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert final_files(tmp_path / "b") == expected
    for event in ("iteration", "evaluation", "final"):
        assert events(tmp_path / "b", event) == events(tmp_path / "a", event), event


def test_killed_interrupted_starved_and_doubled_as_processes(tmp_path):
    """SIGKILL in the middle of a save, a full disk, SIGKILL beside a second run that refuses, SIGINT; then to the end."""
    expected = undisturbed_process(tmp_path / "a")
    folder = tmp_path / "b"
    folder.mkdir()
    states = folder / "checkpoints" / NAME
    for before, left in zip(KILLED_IN_A_SAVE, ({"state.pt", "state.previous.pt"}, {"state.previous.pt"})):
        process = start(folder, before)
        _, err = process.communicate(timeout=120)
        assert process.returncode == -signal.SIGKILL, err
        assert {p.name for p in states.glob("state*")} == left and len(list(states.glob(".partial-*-state.pt"))) == 1
    starved = start(folder, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000)))
    _, err = starved.communicate(timeout=120)
    assert starved.returncode == 1 and len(err.strip().splitlines()) == 1 and "cannot save the state" in err, err
    process = start(folder)
    wait_for_iterations(process, folder)
    second = start(folder)
    os.kill(process.pid, signal.SIGSTOP)  # it holds the lock while it stands still
    _, err = second.communicate(timeout=120)
    assert second.returncode == 1 and "another run is writing to" in err and len(err.splitlines()) == 1
    process.kill()
    process.communicate()
    process = start(folder)
    wait_for_iterations(process, folder)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130 and len(err.strip().splitlines()) == 1 and "stopped by SIGINT" in err, err
    process = start(folder)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0 and "going on with" in out, err
    assert final_files(folder) == expected and not list(folder.rglob(".partial-*"))


@pytest.mark.slow
def test_a_full_pool_is_saved_in_seconds(tmp_path):
    """100 ConvNets with momentum, 256 MB. Measured: 1.1 to 1.2 s on the developers' machine."""
    pool = NetworkPool(lambda k: get_network("ConvNet", 3, 10, (32, 32), seed=k),
                         lambda net: torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9), limit=100, start=100)
    for member in pool.members:
        for parameter in member.net.parameters():
            parameter.grad = torch.ones_like(parameter)
        member.optimizer.step()
    states = CheckpointFile(tmp_path)
    states.save({"pool": pool.state_dict()})
    assert states.newest.stat().st_size > 250e6 and states.seconds < 5
