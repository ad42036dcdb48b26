"""report.py on result files that are made up, so that every figure in a table is known."""
import csv
import itertools
import json
import re
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from conftest import ROOT, SHARED
from matplotlib.figure import Figure
from scipy.stats import t as student

import report
from reporting.metrics import THREATS, transfer_of
from runtime.safe_io import InputError

EPS = {"FGSM": 8 / 255, "PGD": 8 / 255, "PGD_L2": 128 / 255, "AA": 8 / 255, "Square": 8 / 255}
PUBLISHED = json.loads((ROOT / "published.json").read_text())
TARGETED = ("FGSM", "PGD", "PGD_L2", "CW")


def row(method, ipc, attack, targeted, accuracy, threat="published", **changes):
    name = f"{method}_ConvNet_CIFAR10_{ipc}_None.pth"
    return {"dataset": "CIFAR10", "ipc": ipc, "method": method, "crafted_on": name,
            "evaluated_on": name, "threat_model": threat, "attack": attack, "targeted": targeted,
            "eps": EPS.get(attack), "n": 10000, "accuracy": accuracy, "seconds": 1.0, "seed": 0,
            **changes}


def bacon_rows():
    """What the published benchmark logged for BACON, as rows of evaluate.py."""
    rows = []
    for ipc, attacks in PUBLISHED["log_white_box_BACON_CIFAR10"].items():
        clean = attacks["Clean"]
        seconds = min(clean["seconds_targeted_pass"], clean["seconds_untargeted_pass"])
        rows.append(row("BACON", int(ipc), "Clean", None, clean["accuracy"] / 100, seconds=seconds))
        for attack, forms in attacks.items():
            for form in ("targeted", "untargeted"):
                if attack != "Clean" and forms[form]:
                    rows.append(row("BACON", int(ipc), attack, form == "targeted",
                                    forms[form]["accuracy"] / 100, seconds=forms[form]["seconds"]))
    return rows


def improved_rr(clean, attacked):
    return 100 * (1 - (clean - np.mean(attacked)) * (clean - min(attacked)) / clean**2)


def write(folder, rows, **content):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps({"rows": list(rows), **content}))


def write_run(folder, final=True, events=(), about=None, measured=None, **flags):
    """A run of three iterations on two networks; or one with these events."""
    folder.mkdir(parents=True)
    flags = {"method": "ROME", "dataset": "CIFAR10", "model": "ConvNet", "ipc": 50,
             "threat_model": "published", "Iteration": 40, "align_weight": 0.2,
             "save_path": str(folder), **flags}
    accuracies = {"model": "ConvNet", "n": 100, "clean_acc": [0.5, 0.6], "clamp_acc": [0.4, 0.5],
                  "robust_acc": [0.3, 0.4], **(measured or {})}
    if not events:
        events = [{"event": "evaluation", "exp": 0, "set": "random real", **accuracies}]
        events += [{"event": "iteration", "exp": 0, "iteration": it, "loss_robustness": 9 - it / 4,
                    "loss_performance": 2.0, "w_f": it / 2, "loss_pool": 2.0} for it in (0, 10, 20)]
        events.append({"event": "evaluation", "exp": 0, "iteration": 20, "set": flags["method"],
                       **accuracies})
        events += [{"event": "final", "set": flags["method"], **accuracies}] * final
    (folder / "flags.json").write_text(json.dumps({"flags": flags, **(about or {})}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))


@pytest.fixture
def run_report(tmp_path, monkeypatch, capsys):
    """Runs report.py on tmp_path/in into tmp_path/out; returns what it prints. Files of figures
    are empty unless draw=True."""
    savefig = Figure.savefig

    def run(*arguments, draw=False, paths=(tmp_path / "in",)):
        monkeypatch.setattr(Figure, "savefig", savefig if draw else lambda _, path, **__:
                            Path(path).touch())
        words = ["report.py", *paths, *arguments, "--out", tmp_path / "out"]
        monkeypatch.setattr(sys, "argv", list(map(str, words)))
        report.main()
        return capsys.readouterr().out
    return run


@pytest.fixture
def lines_of(tmp_path):
    """Reads a table: {values of the columns `keys`, joined by "/": {column: value}}."""
    def read(name, *keys):
        with (tmp_path / "out" / f"{name}.csv").open() as file:
            return {"/".join(line[key] for key in keys): line for line in csv.DictReader(file)}
    return read


# ---- tables of the paper
def test_published_figures_are_those_of_the_source():
    if not SHARED.exists():
        pytest.skip("no ../shared here")
    golden = json.loads((SHARED / "golden" / "published.json").read_text())
    del golden["threat_model"]
    assert PUBLISHED == {**golden, "source": PUBLISHED["source"]}


def test_the_metrics_of_the_published_logs(tmp_path, run_report, lines_of):
    """From the logs of BACON come BACON's RR and I-RR of the paper, which depend on no machine."""
    write(tmp_path / "in", bacon_rows())
    run_report("--table", "metrics")
    lines = lines_of("metrics_CIFAR10_10000", "method", "form", "threat model", "kind")
    paper = PUBLISHED["table1_white_box_pooled_over_ipc_1_10_50"]["CIFAR10"]["BACON"]
    for form in ("targeted", "untargeted"):
        line = lines[f"BACON/{form}/published/white-box"]
        assert line["ipc"] == "1, 10, 50"
        for metric in ("RR", "I-RR"):
            ours, published, difference = map(float, re.findall(r"[-+]?[\d.]+", line[metric]))
            assert ours == pytest.approx(paper[form][metric], abs=0.011)
            assert published == paper[form][metric] and abs(difference) <= 0.01


def test_only_the_same_is_pooled_and_compared(tmp_path, run_report):
    """No mean over data sets or numbers of images; no difference to the paper where the pool is
    another one."""
    rows = bacon_rows()
    for attack, targeted in (("Clean", None), ("PGD", False)):
        rows.append(row("BACON", 50, attack, targeted, 0.01, n=500))
        rows.append(row("BACON", 50, attack, targeted, 0.2, dataset="CIFAR100"))
    write(tmp_path / "in", rows)
    run_report()
    texts = {path.stem: path.read_text() for path in (tmp_path / "out").glob("metrics*.md")}
    assert set(texts) == {f"metrics_{name}" for name in ("CIFAR10_10000", "CIFAR10_500",
                                                         "CIFAR100_10000")}
    assert "36.83 (36.83, " in texts["metrics_CIFAR10_10000"]
    write(tmp_path / "in", [r for r in bacon_rows() if r["ipc"] == 50 and r["attack"] != "AA"])
    out = run_report("--table", "metrics")
    assert "(36.83)" in out and "(36.83, " not in out
    assert "FGSM, PGD, PGD_L2, CW, Deepfool; missing: AA at ipc 50 |" in out


def test_transfer_queries_ablation_and_figure_3(tmp_path, run_report, lines_of):
    rows, name = [], "{}_ConvNet_CIFAR10_50_None.pth"
    for threat in ("published", "pixel"):
        for method, clean in (("BACON", 0.7), ("IDM", 0.6)):
            rows += [row(method, 50, "Clean", None, clean, threat),
                     row(method, 50, "Square", False, 0.3, threat)]
            rows += [row(method, 50, "PGD", False, 0.2 if crafted == method else 0.5, threat,
                         crafted_on=name.format(crafted)) for crafted in ("BACON", "IDM")]
        # +AP has one attack of four, +RPM has all of them at ipc 1, +RPM+AP at ipc 50.
        for method, ipc, attacks in (("+AP", 50, ["PGD"]), ("+RPM", 1, TARGETED),
                                     ("+RPM+AP", 50, TARGETED)):
            rows.append(row(method, ipc, "Clean", None, 0.5, threat))
            rows += [row(method, ipc, attack, True, 0.4, threat) for attack in attacks]
    write(tmp_path / "in", rows)
    run_report(draw=True)

    lines = lines_of("metrics_CIFAR10_10000", "method", "form", "threat model", "kind")
    paper = PUBLISHED["table2_black_box_I-RR_CIFAR10_ipc50"]
    for (method, clean), (kind, attacked) in itertools.product(
            (("BACON", 0.7), ("IDM", 0.6)), (("transfer", 0.5), ("query", 0.3))):
        ours = f"{improved_rr(clean, [attacked]):.2f}"
        assert lines[f"{method}/untargeted/pixel/{kind}"]["I-RR"] == ours
        # No difference: of query attacks SPSA is missing.
        published = f"{ours} ({paper[method]['untargeted'][kind]:.2f})"
        assert lines[f"{method}/untargeted/published/{kind}"]["I-RR"] == published
    assert "crafted on: IDM" in lines["BACON/untargeted/pixel/transfer"]["attacks"]
    ours, paper = improved_rr(0.5, [0.4] * 4), PUBLISHED["table4_ablation_CIFAR10_ipc50"]
    for name in ("+AP", "+RPM", "+RPM+AP"):
        published = paper[name]["targeted"]["I-RR"]
        difference = f", {ours - published:+.2f}" if name == "+RPM+AP" else ""
        assert lines[f"{name}/targeted/pixel/white-box"]["I-RR"] == f"{ours:.2f}"
        assert lines[f"{name}/targeted/published/white-box"]["I-RR"] == (
            f"{ours:.2f} ({published:.2f}{difference})")
    assert "CW at ipc 50" in lines["+AP/targeted/published/white-box"]["attacks"]
    for name in ("published_untargeted_ipc_50.png", "pixel_untargeted_ipc_50.pdf"):
        assert (tmp_path / "out" / f"figure3_CIFAR10_10000_{name}").stat().st_size > 1000


def test_the_diagonal_of_the_transfer_is_white_box():
    """Attacked itself, 10 %; from its sister, 30 %; from another method's network, 40 %."""
    names = ("A0", "A1", "B0", "B1")
    rows = [row(name[0], 1, "Clean", None, 0.5, "pixel", evaluated_on=name) for name in names]
    for name, other in itertools.product(names, names):
        accuracy = 0.1 if other == name else 0.3 if other[0] == name[0] else 0.4
        rows.append(row(name[0], 1, "PGD", False, accuracy, "pixel", crafted_on=other,
                        evaluated_on=name))
    cells = {(e["crafted_on"], e["evaluated_on"]): e["I-RR"] for e in transfer_of(rows, THREATS)}
    own, other = improved_rr(0.5, [0.1]), improved_rr(0.5, [0.4])
    assert cells == pytest.approx({("A", "A"): own, ("B", "B"): own, ("A", "B"): other,
                                   ("B", "A"): other})


# ---- runs
def test_runs_finished_and_going_and_the_sweep(tmp_path, run_report):
    write_run(tmp_path / "in" / "a")
    write_run(tmp_path / "in" / "b", align_weight=0.8, method="another name", num_exp=3)
    write_run(tmp_path / "in" / "other", align_weight=0.8, lr_img=3)
    write_run(tmp_path / "in" / "c", final=False, align_weight=0.5)
    with (tmp_path / "in" / "c" / "metrics.jsonl").open("a") as file:
        file.write('{"event": "iter')  # being written at this moment
    smaller = {"robust_2_acc": [0.5, 0.5], "robust_4_acc": [0.4, 0.4]}
    write_run(tmp_path / "in" / "pixel", threat_model="pixel", measured=smaller)
    out = run_report()
    clean, robust = "| 55.00 +- 5.00 | 45.00 +- 5.00 |", "35.00 +- 5.00 |"
    assert f"{clean}  |  | {robust} targeted PGD-10 | 100 | 1 |" in out
    assert f"{clean} 50.00 +- 0.00 | 40.00 +- 0.00 | {robust} untargeted PGD-20 | 100 | 1 |" in out
    assert out.count("not finished") == 2 and "refused" not in out  # its set and random real images
    assert {path.stem for path in (tmp_path / "out").glob("*.png")} == {
        "figure4_0", "curves_a", "curves_b", "curves_c", "curves_other", "curves_pixel"}
    run_report(draw=True, paths=[tmp_path / "in" / "a", tmp_path / "in" / "b"])
    for name in ("figure4_0", "curves_a"):
        assert (tmp_path / "out" / f"{name}.png").stat().st_size > 10000


def test_over_seeds(tmp_path, run_report, lines_of):
    """Three seeds on one device and one on another; differences are taken seed by seed."""
    for seed, (real, rome, device) in enumerate(((40, 45, "A"), (50, 56, "A"), (30, 35, "A"),
                                                 (30, 90, "B"))):
        events = [{"event": "final", "set": name, "model": "ConvNet", "n": 100,
                   "clean_acc": [0.5, 0.5], "clamp_acc": [0.5, 0.5],
                   "robust_acc": [percent / 100 - 0.01, percent / 100 + 0.01]}
                  for name, percent in (("random real", real), ("ROME", rome))]
        write_run(tmp_path / "in" / f"seed{seed}", events=events, about={"device": device},
                  seed=seed, robust_prior=[f"somewhere{seed}/net_seed{seed}-0.pth"])
    run_report()
    lines = lines_of("runs", "device", "seeds", "set")
    deviation, of_difference = np.std([45, 56, 35], ddof=1), np.std([5, 6, 5], ddof=1)
    assert lines["A/3/random real"]["robust 8/255"] == "40.00 +- 10.00"
    assert lines["A/3/ROME"]["robust 8/255"] == f"45.33 +- {deviation:.2f}"
    difference = lines["A/3/ROME minus random real"]
    assert difference["robust 8/255"] == f"+5.33 +- {of_difference:.2f} *"
    assert difference["clean"] == "+0.00 +- 0.00" and lines["A/3/ROME"]["robust 2/255"] == ""
    assert lines["B/1/ROME"]["robust 8/255"] == "90.00 +- 1.00" and len(lines) == 5


# ---- sets of many seeds
def rows_of_sets(method, accuracies, threat, attacks, ipc=50):
    """Rows of a network on each set of a file. attacks: (attack, targeted, eps, accuracy)."""
    for k, clean in enumerate(accuracies):
        name = f"{method}_ConvNet_CIFAR10_{ipc}_None_{k}-0.pth"
        for attack, targeted, eps, accuracy in (("Clean", None, None, clean), *attacks):
            yield row(method, ipc, attack, targeted, accuracy, threat, crafted_on=name,
                      evaluated_on=name, eps=eps)


def test_what_a_set_is_worth(tmp_path, run_report, lines_of):
    """A run of two sets and evaluate.py on the first one; AutoAttack on fewer images joins them."""
    finals = [{"event": "final", "set": name, "model": "ConvNet", "n": 100, "clean_acc": [0.5, 0.5],
               "clamp_acc": [0.5, 0.5], "robust_acc": [0.1, 0.1], "robust_4_acc": [0.2, 0.2],
               "robust_2_acc": robust}
              for name, robust in (("ROME", [0.30, 0.34]), ("ROME, hard labels", [0.1, 0.1]))]
    write_run(tmp_path / "in" / "run", threat_model="pixel", num_exp=2, events=finals)
    write(tmp_path / "in" / "pets", num_classes=3, rows=[
        row("A", 1, attack, targeted, 0.5, "pixel", dataset="pets")
        for attack, targeted in (("Clean", None), ("AA", False))])
    rows = [("Clean", None, 0.56, "pixel", 1000), ("PGD20", False, 0.38, "pixel", 1000),
            ("AA", False, 0.28, "pixel", 500), ("AA", True, 0.99, "pixel", 500),
            ("AA", False, 0.99, "published", 500)]
    name = "ROME-pixel_ConvNet_CIFAR10_50_None_0-0.pth"
    write(tmp_path / "in" / "evaluated", [
        row("ROME-pixel", 50, attack, targeted, accuracy, threat, n=n, crafted_on=name,
            evaluated_on=name, eps=None if attack == "Clean" else 2 / 255)
        for attack, targeted, accuracy, threat, n in rows])
    out = run_report("--table", "robust")
    assert "2 table(s), 0 figure(s)" in out and "| constant classifier |  |  | 33.3 | 33.3 |" in out
    lines = lines_of("robust_CIFAR10", "set")
    assert list(lines) == ["constant classifier", "ROME-pixel", "ROME-pixel-hard"]
    ours = lines["ROME-pixel"]
    assert ours["clean"] == f"51.5 +- {np.std([53, 50], ddof=1):.1f}"
    assert (ours["network"], ours["ipc"], ours["sets"]) == ("ConvNet", "50", "1 to 2")
    assert ours["PGD-20 2/255"] == "34.0 +- 0.0" and ours["PGD-20 8/255"] == "10.0 +- 0.0"
    assert ours["AutoAttack 2/255"] == "28.0"
    assert lines["ROME-pixel-hard"]["PGD-20 2/255"] == "10.0 +- 0.0"
    assert lines["constant classifier"]["clean"] == "10.0"
    assert ("clean 100, 1000; PGD-20 2/255 100, 1000; PGD-20 4/255 100; PGD-20 8/255 100; "
            "AutoAttack 2/255 500") in out


def test_differences_between_sets(tmp_path, run_report, lines_of):
    """Welch's intervals, what they say of a claim, and their places in a page."""
    attacks = [(attack, True, EPS.get(attack), 0.2) for attack in TARGETED]
    sets = {"A": [0.5, 0.54, 0.52], "B": [0.4, 0.46], "C": [0.3, 0.9], "D": [0.7],
            "E": [0.21, 0.22]}
    write(tmp_path / "in", [r for method, accuracies in sets.items()
                            for r in rows_of_sets(method, accuracies, "published", attacks)])
    pairs = [{"of": of, "than": than, "network": "ConvNet", "ipc": [50], "claim": claim}
             for of, than, claim in ("ABs", "BAs", "ACs", "EAs", ("D", "A", ""))]
    pairs.append({"of": "A", "than": "B", "network": "ConvNet", "ipc": [1]})
    clean, irr, pgd = measures = ["published: Clean", "published: I-RR targeted",
                                  "published: PGD targeted 8/255"]
    asked = [{"name": "claims", "title": "Claims", "measures": measures, "pairs": pairs},
             {"name": "all", "title": "All", "measures": measures, "sets": [
                 {"set": name, "network": "ConvNet", "ipc": 50} for name in "ADF"]}]
    file, page = tmp_path / "compare.json", tmp_path / "page.md"
    file.write_text(json.dumps(asked))
    page.write_text("a\n<!-- report: begin all -->\nold\n<!-- report: end -->\nb\n"
                    "<!-- report: begin claims all -->\n<!-- report: end -->\n")
    out = run_report("--compare", file, "--readme", page)

    variances = np.var([50, 54, 52], ddof=1) / 3, np.var([40, 46], ddof=1) / 2
    freedom = sum(variances) ** 2 / (variances[0] ** 2 / 2 + variances[1] ** 2 / 1)
    half = student.ppf(0.975, freedom) * sum(variances) ** 0.5
    interval = f"+9.0 [{9 - half:.1f}, {9 + half:.1f}]: {'' if 9 > half else 'not '}supported"
    lines, name = lines_of("claims", ""), "s (A - B, ConvNet, 50 a class)"
    assert lines[name][clean] == interval
    assert lines[name][pgd] == "+0.0 [0.0, 0.0]: not supported"
    assert lines["s (A - C, ConvNet, 50 a class)"][clean].endswith("]: not supported")
    assert lines["s (B - A, ConvNet, 50 a class)"][clean].startswith(f"-9.0 [{-9 - half:.1f}, ")
    assert lines["s (E - A, ConvNet, 50 a class)"][clean].endswith("]: refuted")
    single = lines["D - A, ConvNet, 50 a class"]
    assert (single[clean], single["sets"]) == ("+18.0", "1 to 3")
    assert "no results: A - B, ConvNet, 1 a class" in out

    values = [improved_rr(accuracy, [0.2]) for accuracy in sets["A"]]
    lines = lines_of("all", "set")
    assert lines[irr]["A"] == f"{np.mean(values):.1f} +- {np.std(values, ddof=1):.1f}"
    assert lines[irr]["D"] == f"{improved_rr(0.7, [0.2]):.1f}"
    assert lines["sets"] == {"set": "sets", "A": "3", "D": "1"}
    assert "no results of F, ConvNet, 50 a class" in out
    text = page.read_text()
    assert f"| {name} | {interval} |" in text and "old" not in text
    assert text.count("**All (percent") == 2 and text.count("**Claims (percentage") == 1
    assert text.index("**All") < text.index("\nb\n") < text.index("**Claims")
    for wrong, message in ((f"<!-- report: begin other -->{report.END}", "asks for other; there"),
                           ("no markers", "page.md has no lines")):
        page.write_text(wrong)
        with pytest.raises(InputError, match=message):
            run_report("--compare", file, "--readme", page)
    for wrong in ("{", '[{"name": "a"}]', json.dumps([{**asked[0], "measures": "all"}]),
                  json.dumps([{**asked[0], "pairs": [{**pairs[0], "ipc": 1}]}])):
        file.write_text(wrong)
        with pytest.raises(InputError, match="compare.json is damaged or no file of comparisons"):
            run_report("--compare", file)


def test_runs_under_published_in_comparisons(tmp_path, run_report):
    """The last figures of a run stand beside those of evaluate.py, of other networks, not among
    them."""
    write_run(tmp_path / "in" / "a", num_exp=2)
    write(tmp_path / "in" / "evaluated", [row("ROME", 50, "PGD", True, 0.9)])
    name = "in the run: PGD targeted 8/255"
    (tmp_path / "compare.json").write_text(json.dumps([{
        "name": "runs", "title": "Runs", "measures": [name],
        "sets": [{"set": "ROME", "network": "ConvNet", "ipc": 50}]}]))
    out = run_report("--compare", tmp_path / "compare.json", "--figure", "curves")
    assert f"| {name} | 35.0 +- {50**0.5:.1f} |\n| sets | 2 |" in out
    assert [path.name for path in (tmp_path / "out").glob("*.png")] == ["curves_a.png"]


# ---- files
PAGES = [path.name for path in sorted((ROOT / "docs").glob("*.md"))
         if f"\n{report.END}" in path.read_text()]


@pytest.mark.parametrize("page", PAGES)
def test_the_pages_say_what_the_files_say(page, tmp_path, run_report, monkeypatch):
    """The command that stands in a page writes its tables as they are there."""
    text = (ROOT / "docs" / page).read_text()
    command = rf"^    python report.py (.*) --readme docs/{page} --out \S+$"
    words = re.search(command, text, re.MULTILINE)[1].split()
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(report, "make_figures", lambda *_: ())
    words = [name for word in words
             for name in (sorted(map(str, Path().glob(word))) if "*" in word else [word])]
    (tmp_path / page).write_text(text)
    run_report(*words, "--readme", tmp_path / page, paths=())
    assert (tmp_path / page).read_text() == text


def test_two_evaluations_of_the_same_names_are_not_mixed(tmp_path, run_report):
    """Four networks at 25 %, two of the same names at 75 %: the second file is left out, and
    named."""
    for name, networks, accuracy in (("a", 4, 0.25), ("b", 2, 0.75), ("c", 2, 0.25)):
        write(tmp_path / "in" / name, [
            row("ROME", 1, "Clean", None, accuracy, evaluated_on=f"{i}.pth", crafted_on=f"{i}.pth")
            for i in range(networks)])
    out = run_report()
    assert "| Clean | 25.00 +- 0.00" in out
    assert [line for line in out.splitlines() if "refused" in line] == [
        f"refused: {tmp_path}/in/b/results.json and {tmp_path}/in/a/results.json have different "
        "figures for Clean on 0.pth; report them apart"]


WRONG = [("accuracy", 1.5), ("attack", "PDG"), ("seconds", "1"), ("seconds", float("nan")),
         ("method", None), ("n", 2.5), ("targeted", "yes"), ("eps", "a"), ("ipc", "10"),
         ("dataset", "a/b"), ("dataset", [])]
FINAL = {"event": "final", "set": "a", "model": "b", "n": 5, "clean_acc": [1], "clamp_acc": [1],
         "robust_acc": [1]}


def test_damaged_and_foreign_files_are_named_and_the_rest_is_reported(tmp_path, run_report):
    write(tmp_path / "in" / "good", bacon_rows())
    contents = ['{"rows": [{', '{"a": 1}', "[1]"]
    contents += [json.dumps({"rows": [{**row("X", 1, "PGD", True, 0.5), key: value}]})
                 for key, value in WRONG]
    for i, text in enumerate(contents):
        (tmp_path / "in" / f"evaluation{i}").mkdir()
        (tmp_path / "in" / f"evaluation{i}" / "results.json").write_text(text)
    for i, event in enumerate(({"event": "iteration"}, {"event": "else"}, [1],
                               {**FINAL, "clean_acc": None}, {**FINAL, "robust_2_acc": [None]})):
        write_run(tmp_path / "in" / f"run{i}", events=[event])
    write_run(tmp_path / "in" / "run5", align_weight="much")
    out = run_report()
    refused = re.findall(r"^refused: .*/in/(\w+)/", out, re.MULTILINE)
    assert "36.83 (36.83, " in out and sorted(refused) == sorted(
        [*(f"evaluation{i}" for i in range(len(contents))), *(f"run{i}" for i in range(6))])
    (tmp_path / "in" / "good" / "results.json").unlink()
    with pytest.raises(InputError, match="evaluation0.*no result of evaluate.py"):
        run_report()
    with pytest.raises(InputError, match="nowhere does not exist"):
        run_report(paths=[tmp_path / "nowhere"])


# ---- figures of .pt files
def test_sets_side_by_side(tmp_path, run_report):
    """A row for each class, in its colours; a set that does not say what it is, is refused."""
    colours = torch.rand(2, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    meta = {"classes": ["a", "b"], "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25]}
    mean, std = (torch.tensor(meta[key]).view(3, 1, 1) for key in ("mean", "std"))
    images = ((colours.expand(2, 3, 32, 32) - mean) / std).repeat_interleave(3, 0)
    paths = [tmp_path / f"{name}.pt" for name in ("one", "two", "foreign")]
    for path, about in zip(paths, (meta, meta, {})):
        data = [[images, torch.tensor([0] * 3 + [1] * 3)]]
        torch.save({"data": data, "meta": about and {**about, "dataset": "CIFAR10"}}, path)
    write(tmp_path / "in", bacon_rows())
    run_report("--table", "metrics", "--show", *paths[:2], draw=True)
    image = matplotlib.image.imread(tmp_path / "out" / "sets.png")[..., :3].reshape(-1, 3)
    for colour in colours.flatten(1).numpy():
        assert (abs(image - colour) < 0.01).all(1).mean() > 0.1
    with pytest.raises(InputError, match="foreign.pt: whitened, or without"):
        run_report("--table", "metrics", "--show", paths[2])
