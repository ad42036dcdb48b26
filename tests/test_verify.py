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
    assert status == 0 and "4 of 4 rows recomputed, 0 problem(s)" in out
    run_main(verify, recorded[0], "--files", recorded[1], "--sample", 10)  # any ten images


def test_two_points_more_do_not_hold(recorded, change, capsys):
    def claim_two_points(row):
        row["accuracy"] += 0.02
    status, out = verify_row(change(claim_two_points), recorded[1], capsys)
    assert status == 1 and "PGD20 untargeted 8/255: " in out and ", 1 problem(s)" in out

    def claim_images_too(row):
        right = unpack_bits(row["right"], 100)
        right[(~right).nonzero()[0][:2]] = True
        row.update(right=pack_bits(right), accuracy=right.mean())
    status, out = verify_row(change(claim_images_too), recorded[1], capsys)
    assert status == 1 and "2 images of the sample that are listed as right" in out

    def list_others(row):
        row["right"] = pack_bits(unpack_bits(row["right"], 100)[::-1].copy())
    assert verify_row(change(list_others), recorded[1], capsys)[0] == 1


OTHER_NAME = dict.fromkeys(("evaluated_on", "crafted_on"), "better_MLP_Digits_20_None.pth")


@pytest.mark.parametrize("changed, message", [
    ({"method": "MySet"}, "it says"), ({"ipc": 1}, "it says"),
    ({"bytes": {"images": 1}}, "it says"), (OTHER_NAME, "its network is unknown"),
    ({"attack": "FGSM"}, "the flags name PGD20"),
    ({"eps": 4 / 255}, "the flags name PGD20 at 8/255"), ({"n": 5000}, "damaged"),
    ({"right": "00"}, "damaged")])
def test_rows_that_were_written_by_hand_do_not_hold(recorded, change, capsys, changed, message):
    status, out = verify_row(change(lambda row: row.update(changed)), recorded[1], capsys)
    assert status == 1 and "does not hold: " in out and message in out


def test_no_row_may_be_left_out(recorded, tmp_path, capsys):
    """Of one of two networks, or an attack of the flags on all."""
    content = json.loads((recorded[0] / "results.json").read_text())
    (name, about), = content["networks"].items()
    other = "DC_MLP_Digits_20_None_0.9.pth"
    content["networks"][other] = about
    for row in content["rows"][:3]:
        content["rows"].append({**row, "evaluated_on": other, "crafted_on": other})
    (tmp_path / "results.json").write_text(json.dumps(content))
    status, out = verify_row(tmp_path, recorded[1], capsys)
    assert status == 1 and f"{other}: pixel AA untargeted 8/255: there is no such row" in out
    assert "7 of 7 rows recomputed, 1 problem(s)" in out  # both are the same file


def test_what_cannot_be_verified_is_said(recorded, change, capsys):
    with pytest.raises(InputError, match="listed which images are right"):
        verify_row(change(lambda row: row.pop("right")), recorded[1], capsys)
    with pytest.raises(InputError, match="only images normalised so"):
        content = json.loads((recorded[0] / "results.json").read_text())
        folder = change(lambda row: None)
        (folder / "results.json").write_text(json.dumps({**content, "data": "normalised"}))
        verify_row(folder, recorded[1], capsys)
    other = recorded[1].with_name("other_MLP_Digits_1_None.pth")
    torch.save(get_network("MLP", 3, 10, (32, 32), 1).state_dict(), other)
    status, out = verify_row(recorded[0], other, capsys)
    assert status == 1 and "DC_MLP_Digits_20_None_0.8.pth is not here" in out


def test_bits():
    right = torch.rand(37, generator=torch.Generator().manual_seed(0)) < 0.5
    assert unpack_bits(pack_bits(right), 37).tolist() == right.tolist()
