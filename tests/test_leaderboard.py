"""The leaderboard (reporting/leaderboard.py)."""
import json

import pytest
from conftest import ROOT, run_main

import report
from reporting.leaderboard import read_leaderboard
from runtime.safe_io import InputError


def entry(**changes):
    return {"name": "BACON", "labels": "hard", "set": "BACON", "network": "ConvNet", "ipc": 50,
            "folder": "released", "results": ["released"], **changes}


@pytest.fixture
def listed(tmp_path):
    """leaderboard.json of these entries beside one folder of results."""
    folder = ROOT / "experiments" / "paper_claims" / "released_pixel"
    (tmp_path / "released").symlink_to(folder)

    def listed(*measured, printed=()):
        path = tmp_path / "leaderboard.json"
        path.write_text(json.dumps({"measured": measured, "printed": list(printed)}))
        return path
    return listed


def test_rows_are_the_results_best_first(listed, tmp_path, capsys):
    path = listed(entry(name="worse", set="MTT"), entry(name="better", bytes={
        "images": 307200, "labels": 100, "labellers": 0}))
    run_main(report, "--leaderboard", path, "--out", tmp_path / "out")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[1] for line in lines[1:3]] == ["better", "worse"]
    rows = json.loads((tmp_path / "released" / "results.json").read_text())["rows"]
    accuracy, = (row["accuracy"] for row in rows if row["threat_model"] == "pixel"
                 and row["attack"] == "AA" and row["method"] == "BACON"
                 and row["crafted_on"] == row["evaluated_on"] and 255 * row["eps"] == 2)
    assert f"| {100 * accuracy:.1f} [" in lines[1] and "307 + 0.1 + 0" in lines[1]
    assert (tmp_path / "out" / "leaderboard.png").stat().st_size > 5000
    assert "better" in (tmp_path / "out" / "leaderboard.csv").read_text()
    listed_best = json.loads((tmp_path / "out" / "accuracies.json").read_text())["measured"][0]
    (values,) = listed_best["accuracies"]["pixel: AA untargeted 2/255"].values()
    assert values == pytest.approx([100 * accuracy])


@pytest.mark.parametrize("change", [
    {"set": "no such set"}, {"ipc": "50"}, {"results": []}, {"results": ["nowhere"]},
    {"results": "released"}, {"results": ["/released"]}, {"results": ["."]},
    {"name": None}, {"labels": "guessed"}, {"bytes": {"images": 1}}])
def test_an_entry_without_results_is_refused(listed, change):
    with pytest.raises(InputError):
        read_leaderboard(listed(entry(**change)))


@pytest.mark.parametrize("flag, value", [("quick", True), ("aa_iterations", 10)])
def test_a_shortened_autoattack_is_refused(listed, tmp_path, flag, value):
    path = listed(entry(results=["short"]))
    content = json.loads((tmp_path / "released" / "results.json").read_text())
    content["flags"][flag] = value
    (tmp_path / "short").mkdir()
    (tmp_path / "short" / "results.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="not for --quick"):
        read_leaderboard(path)
    with pytest.raises(InputError, match="different figures"):
        content["rows"][0]["accuracy"] = 0.123
        (tmp_path / "short" / "results.json").write_text(json.dumps(content))
        read_leaderboard(listed(entry(results=["released", "short"])))


def test_what_others_print_is_checked(listed):
    printed = {"name": "X", "network": "ConvNet", "ipc": 10, "training": "natural",
               "source": "arXiv", "figures": {"clean": 48.0}}
    assert read_leaderboard(listed(entry(), printed=[printed]))[1] == [printed]
    with pytest.raises(InputError):
        read_leaderboard(listed(entry(), printed=[{**printed, "figures": {"clean": 480.0}}]))
