"""What a run will cost: counts, estimates, the timer."""
import time

import pytest
from conftest import random_dataset

import experiment
import ROME_cifar10
import utils
from attacks import get_threat_model
from runtime.progress import ProgressTimer


def batches(data, threat_name, *flags):
    """(batches to compile, passes of an outer iteration) of a run."""
    args = ROME_cifar10.parse_args(["--ipc", "3", "--batch_real", "64", *flags])
    threat = get_threat_model(threat_name, data)
    setup = experiment.Setup(data, threat, [], utils.Evaluator(args, data, threat), None, None, 64)
    return (experiment.batches_to_compile(args, setup),
            experiment.iteration_passes(args, data))


def test_batches_and_passes_by_hand():
    """3 images a class, 80 training images of each class, 800 test images in batches of 64."""
    data = random_dataset(per_class=80)
    flags = ["--trained_bs", "200", "--model_train_steps", "2", "--num_eval", "2",
             "--epoch_eval_train", "9", "--batch_train", "20", "--train_net_num", "1"]
    work, passes = batches(data, "published", *flags)
    attacked, trained = work["attacked"], work["trained"]
    # 640 images an update; 200 pool images = 3 x 64 + 8, 4 steps; 800 test images = 12 x 64 + 32
    assert attacked[64] == 10 * (500 * 640 + 500 * 4 * 192 + 2 * 768)
    assert attacked[8] == 10 * 500 * 4 * 8 and attacked[32] == 10 * 2 * 32
    assert trained[200] == 1.5 * 500 * 4 * 200  # 30 synthetic images = 20 + 10, ten epochs, twice
    assert trained[20] == 1.5 * 10 * 2 * 20 and trained[10] == 1.5 * 10 * 2 * 10
    assert work["matched"][30] == 500 * 30 and work["matched"][64] == 0
    assert work["embedded"][64] == pytest.approx(0.45 * 500 * 640)
    assert passes == 10 * 640 + (10 + 1) * 4 * 200
    assert batches(data, "pixel", *flags)[0]["attacked"][32] == 3 * 20 * 2 * 32  # three radii
    assert batches(data, "published", "--Iteration", "7")[0] == batches(
        data, "published", "--Iteration", "70000")[0]


def test_progress_timer(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    timer = ProgressTimer()
    timer.add_phase("iteration", 100, 2.0)
    timer.add_phase("evaluation", 3, 50.0)
    assert timer.eta() == 350
    for seconds, phase in ((30, "evaluation"), (1, "iteration"), (3, "iteration")):
        now[0] += seconds
        timer.step(phase)
    assert timer.seconds("iteration") == 2 and timer.eta() == 98 * 2 + 2 * 30
    assert str(timer) == "2 s/iteration, ETA 4 min"
