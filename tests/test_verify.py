"""verify.py: a recorded evaluation holds, or it is said which row does not."""
import json

import pytest
import torch
from conftest import run_main

import evaluate
import verify
from networks import get_network
from runtime.safe_io import InputError
from runtime.tasks import pack_bits, unpack_bits
from synsets import TrainConfig
from utils import train_on_set


@pytest.fixture(scope="module")
def recorded(digits, tmp_path_factory):
    """(the folder of an evaluation, its network)"""
    folder = tmp_path_factory.mktemp("row")
    net = get_network("MLP", 3, 10, (32, 32), 0)
    images, labels = digits.get_batch("train", slice(200))
    train_on_set(net, images, labels, TrainConfig(30, 0.02, 64, "none"),
                 torch.Generator().manual_seed(0))
    network = folder / "DC_MLP_Digits_20_None_0.8.pth"
    torch.save(net.state_dict(), network)
    run_main(evaluate, "--networks", network, "--threat_model", "pixel", "--untargeted",
             "--attacks", "PGD20", "AA", "--eps", 8, "--limit", 100, "--queries", 20,
             "--aa_iterations", 5, "--no_sanity", "--no_compile", "--out", folder / "out")
    return folder / "out", network


@pytest.fixture
def change(recorded, tmp_path):
    """A copy of the results with the PGD-20 row changed."""
    def change(alter):
        content = json.loads((recorded[0] / "results.json").read_text())
        alter(next(row for row in content["rows"] if row["attack"] == "PGD20"))
        (tmp_path / "results.json").write_text(json.dumps(content))
        return tmp_path
    return change


def verify_row(folder, network, capsys, *flags):
    """(exit status, output)"""
    try:
        run_main(verify, folder, "--files", network, "--sample", 100, "--seed", 0, *flags)
        status = 0
    except SystemExit as end:
        status = end.code
    return status, capsys.readouterr().out


def test_a_true_row_holds(recorded, capsys):
    status, out = verify_row(*recorded, capsys)
    assert status == 0 and "4 rows, 0 that do not hold" in out
    run_main(verify, recorded[0], "--files", recorded[1], "--sample", 10)  # any ten images


def test_two_points_more_do_not_hold(recorded, change, capsys):
    def claim_two_points(row):
        row["accuracy"] += 0.02
    status, out = verify_row(change(claim_two_points), recorded[1], capsys)
    assert status == 1 and "4 rows, 1 that do not hold" in out and "PGD20" in out

    def claim_images_too(row):
        right = unpack_bits(row["right"], 100)
        right[(~right).nonzero()[0][:4]] = True
        row.update(right=pack_bits(right), accuracy=right.mean())
    status, out = verify_row(change(claim_images_too), recorded[1], capsys)
    assert status == 1 and "recorded" in out and "1 that do not hold" in out


def test_what_cannot_be_verified_is_said(recorded, change, capsys):
    with pytest.raises(InputError, match="does not list which images"):
        verify_row(change(lambda row: row.pop("right")), recorded[1], capsys)
    with pytest.raises(InputError, match="does not list which images"):
        verify_row(change(lambda row: row.update(right="00")), recorded[1], capsys)
    other = recorded[1].with_name("other_MLP_Digits_1_None.pth")
    torch.save(get_network("MLP", 3, 10, (32, 32), 1).state_dict(), other)
    status, out = verify_row(recorded[0], other, capsys)
    assert status == 1 and "not verified: DC_MLP" in out  # nothing was looked at


def test_bits():
    right = torch.rand(37, generator=torch.Generator().manual_seed(0)) < 0.5
    assert unpack_bits(pack_bits(right), 37).tolist() == right.tolist()
