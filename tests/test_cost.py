"""What a run will cost: counts, estimates, the timer."""
import time

import pytest
import torch
from conftest import random_dataset

import ROME_cifar10 as rome
from attacks import get_threat_model
from runtime.progress import ProgressTimer
from runtime.cost import forward_flops, planned_batches
from networks import get_network


def test_planned_batches():
    """By hand: ipc 1 unpacked, 80 training images of each class, 500 iterations; a test set of 800 in chunks of 64."""
    data = random_dataset(per_class=80)
    args = rome.parse_args(["--ipc", "3", "--batch_real", "64", "--trained_bs", "200", "--model_train_steps", "2", "--num_eval",
                            "2", "--epoch_eval_train", "9", "--batch_train", "20", "--train_net_num", "1"])
    planned = planned_batches(args, data, get_threat_model("published", data))
    attacked, trained = planned["attacked"], planned["trained"]
    # 640 images an update = 10 x 64; 200 pool images = 3 x 64 + 8, 4 steps; 800 test images = 12 x 64 + 32, two networks
    assert attacked[64] == 10 * (500 * 640 + 500 * 4 * 192 + 2 * 768)
    assert attacked[8] == 10 * 500 * 4 * 8 and attacked[32] == 10 * 2 * 32
    assert trained[200] == 1.5 * 500 * 4 * 200  # and 30 synthetic images = 20 + 10, ten epochs, two networks
    assert trained[20] == 1.5 * 10 * 2 * 20 and trained[10] == 1.5 * 10 * 2 * 10
    assert planned["matched"] == {64: 0, 30: 500 * 30} and planned["embedded"][64] == pytest.approx(0.45 * 500 * 640)
    more = rome.parse_args(["--ipc", "3", "--batch_real", "64", "--Iteration", "7"])
    less = rome.parse_args(["--ipc", "3", "--batch_real", "64", "--Iteration", "70000"])
    published, pixel = (get_threat_model(name, data) for name in ("published", "pixel"))
    assert planned_batches(more, data, published) == planned_batches(less, data, published)
    judged = planned_batches(args, data, pixel)["attacked"]
    assert judged[32] == 3 * 20 * 2 * 32  # 20 steps at three radii


def test_network_is_the_same_after_the_cost_estimate():
    net = get_network("ConvNetBN", 3, 10, (32, 32), 0)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    forward_flops(net, 3, (32, 32))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_clock(monkeypatch):
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
