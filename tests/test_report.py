"""report.py on result files that are made up, so that every figure in a table is known."""
import csv
import itertools
import json
import re
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from conftest import ROOT, SHARED, run_main, write_set
from scipy.stats import t as student

import report
from reporting import statistics
from reporting.metrics import THREATS, transfer_of
from runtime.safe_io import InputError

EPS = {"FGSM": 8 / 255, "PGD": 8 / 255, "PGD_L2": 128 / 255, "AA": 8 / 255, "Square": 8 / 255}
PUBLISHED = json.loads((ROOT / "published.json").read_text())
TARGETED = ("FGSM", "PGD", "PGD_L2", "CW")
FIGURES = {"model": "ConvNet", "n": 100, "clean_acc": [0.5, 0.6], "clamp_acc": [0.4, 0.5],
           "robust_acc": [0.3, 0.4]}


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
        for attack, form in itertools.product(attacks, ("targeted", "untargeted")):
            if attack != "Clean" and attacks[attack][form]:
                log = attacks[attack][form]
                rows.append(row("BACON", int(ipc), attack, form == "targeted",
                                log["accuracy"] / 100, seconds=log["seconds"]))
    return rows


def improved_rr(clean, attacked):
    return 100 * (1 - (clean - np.mean(attacked)) * (clean - min(attacked)) / clean**2)


def write(folder, rows, **content):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps({"rows": list(rows), **content}))


def final(name="ROME", **figures):
    return {"event": "final", "set": name, **FIGURES, **figures}


def write_run(folder, *events, device="", **flags):
    """A run with these events."""
    flags = {"method": "ROME", "dataset": "CIFAR10", "model": "ConvNet", "ipc": 50,
             "threat_model": "published", "align_weight": 0.2, "save_path": str(folder), **flags}
    folder.mkdir(parents=True)
    (folder / "flags.json").write_text(json.dumps({"flags": flags, "device": device}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))


@pytest.fixture
def run_report(tmp_path, capsys):
    """Runs report.py on tmp_path/in into tmp_path/out; returns what it prints."""
    def run(*arguments, paths=(tmp_path / "in",)):
        run_main(report, *paths, *arguments, "--out", tmp_path / "out")
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
@pytest.mark.skipif(not SHARED.exists(), reason="no ../shared here")
def test_published_figures_are_those_of_the_source():
    golden = json.loads((SHARED / "golden" / "published.json").read_text())
    del golden["threat_model"]
    assert PUBLISHED == {**golden, "source": PUBLISHED["source"]}


def test_the_metrics_of_the_published_logs(tmp_path, run_report, lines_of):
    """From the logs of BACON come BACON's RR and I-RR of the paper, which depend on no machine. No
    mean over data sets or numbers of images; no difference where the paper pools others."""
    rows = bacon_rows()
    for attack, targeted in (("Clean", None), ("PGD", False)):
        rows.append(row("BACON", 50, attack, targeted, 0.01, n=500))
        rows.append(row("BACON", 50, attack, targeted, 0.2, dataset="CIFAR100"))
    write(tmp_path / "in", rows)
    run_report()
    assert {path.stem for path in (tmp_path / "out").glob("metrics*.md")} == {
        "metrics_CIFAR10_10000", "metrics_CIFAR10_500", "metrics_CIFAR100_10000"}
    lines = lines_of("metrics_CIFAR10_10000", "method", "form", "threat model", "kind")
    paper = PUBLISHED["table1_white_box_pooled_over_ipc_1_10_50"]["CIFAR10"]["BACON"]
    for form, metric in itertools.product(("targeted", "untargeted"), ("RR", "I-RR")):
        line = lines[f"BACON/{form}/published/white-box"]
        assert line["ipc"] == "1, 10, 50"
        ours, published, difference = map(float, re.findall(r"[-+]?[\d.]+", line[metric]))
        assert ours == pytest.approx(paper[form][metric], abs=0.011)
        assert published == paper[form][metric] and abs(difference) <= 0.01
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
    for method, ipc in (("+RPM", 1), ("+RPM+AP", 50)):  # the paper has ipc 50
        rows.append(row(method, ipc, "Clean", None, 0.5))
        rows += [row(method, ipc, attack, True, 0.4) for attack in TARGETED]
    write(tmp_path / "in", rows)
    run_report()

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
    for name in ("+RPM", "+RPM+AP"):
        published = paper[name]["targeted"]["I-RR"]
        difference = f", {ours - published:+.2f}" if name == "+RPM+AP" else ""
        assert lines[f"{name}/targeted/published/white-box"]["I-RR"] == (
            f"{ours:.2f} ({published:.2f}{difference})")
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
    going = [{"event": "evaluation", "exp": 0, "iteration": it, "set": name, **FIGURES}
             for name, it in (("random real", 0), ("ROME", 20))]
    going += [{"event": "iteration", "exp": 0, "iteration": it, "loss_robustness": 9 - it / 4,
               "loss_performance": 2.0, "w_f": it / 2, "loss_pool": 2.0} for it in (0, 10, 20)]
    folder, smaller = tmp_path / "in", {"robust_2_acc": [0.5, 0.5], "robust_4_acc": [0.4, 0.4]}
    write_run(folder / "a", *going, final())
    write_run(folder / "b", *going, final("another"), align_weight=0.8, method="another", num_exp=3)
    write_run(folder / "c", *going, align_weight=0.5)
    with (folder / "c" / "metrics.jsonl").open("a") as file:
        file.write('{"event": "iter')  # being written at this moment
    write_run(folder / "pixel", *going, final(**smaller), threat_model="pixel")
    out = run_report()
    clean, robust = "| 55.00 +- 5.00 | 45.00 +- 5.00 |", "35.00 +- 5.00 |"
    assert f"{clean}  |  | {robust} targeted PGD-10 | 100 | 1 |" in out
    assert f"{clean} 50.00 +- 0.00 | 40.00 +- 0.00 | {robust} untargeted PGD-20 | 100 | 1 |" in out
    assert out.count("not finished") == 2 and "refused" not in out  # its set and random real images
    figures = {path.stem: path.stat().st_size for path in (tmp_path / "out").glob("*.png")}
    assert set(figures) == {"figure4_0", "curves_a", "curves_b", "curves_c", "curves_pixel"}
    assert min(figures.values()) > 10000


def test_over_seeds(tmp_path, run_report, lines_of):
    """Three seeds on one device and one on another; differences are taken seed by seed."""
    for seed, (real, rome, device) in enumerate(((40, 45, "A"), (50, 56, "A"), (30, 35, "A"),
                                                 (30, 90, "B"))):
        events = [final(name, clean_acc=[0.5, 0.5], robust_acc=[acc / 100 - 0.01, acc / 100 + 0.01])
                  for name, acc in (("random real", real), ("ROME", rome))]
        write_run(tmp_path / "in" / f"seed{seed}", *events, device=device, seed=seed,
                  robust_prior=[f"somewhere{seed}/net_seed{seed}-0.pth"])
    run_report("--table", "runs")
    lines = lines_of("runs", "device", "seeds", "set")
    deviation, of_difference = np.std([45, 56, 35], ddof=1), np.std([5, 6, 5], ddof=1)
    assert lines["A/3/random real"]["robust 8/255"] == "40.00 +- 10.00"
    assert lines["A/3/ROME"]["robust 8/255"] == f"45.33 +- {deviation:.2f}"
    difference = lines["A/3/ROME minus random real"]
    assert difference["robust 8/255"] == f"+5.33 +- {of_difference:.2f} *"
    assert difference["clean"] == "+0.00 +- 0.00" and lines["A/3/ROME"]["robust 2/255"] == ""
    assert lines["B/1/ROME"]["robust 8/255"] == "90.00 +- 1.00" and len(lines) == 5


# ---- sets of many seeds
def test_what_a_set_is_worth(tmp_path, run_report, lines_of):
    """A run of two sets and evaluate.py on the first one; AutoAttack on fewer images joins them."""
    robust = {"clean_acc": [0.5, 0.5], "robust_acc": [0.1, 0.1], "robust_2_acc": [0.3, 0.34]}
    write_run(tmp_path / "in" / "run", final(**robust), threat_model="pixel", num_exp=2)
    write(tmp_path / "in" / "pets", num_classes=3, rows=[
        row("A", 1, attack, targeted, 0.5, "pixel", dataset="pets")
        for attack, targeted in (("Clean", None), ("AA", False))])
    name = "ROME-pixel_ConvNet_CIFAR10_50_None_0-0.pth"
    write(tmp_path / "in" / "evaluated", [
        row("ROME-pixel", 50, attack, targeted, accuracy, threat, n=n, crafted_on=name,
            evaluated_on=name, eps=None if attack == "Clean" else 2 / 255)
        for attack, targeted, accuracy, threat, n in (
            ("Clean", None, 0.56, "pixel", 1000), ("PGD20", False, 0.38, "pixel", 1000),
            ("AA", False, 0.28, "pixel", 500), ("AA", True, 0.99, "pixel", 500),
            ("Clean", None, 0.99, "pixel", 500),  # the same network on fewer images: not averaged
            ("AA", False, 0.99, "published", 500))])
    out = run_report("--table", "robust")
    assert "| constant classifier |  |  | 33.3 | 33.3 |" in out
    constant, ours = lines_of("robust_CIFAR10", "set").values()
    assert constant["clean"] == "10.0" and ours == {
        "set": "ROME-pixel", "network": "ConvNet", "ipc": "50", "sets": "1 to 2",
        "clean": f"51.5 +- {np.std([53, 50], ddof=1):.1f}", "PGD-20 2/255": "34.0 +- 0.0",
        "PGD-20 8/255": "10.0 +- 0.0", "AutoAttack 2/255": "28.0 [24.2, 32.1]"}
    assert "clean 100, 1000; PGD-20 2/255 100, 1000; PGD-20 8/255 100; AutoAttack 2/255 5" in out


SETS = {"A": [0.5, 0.54, 0.52], "B": [0.4, 0.46], "C": [0.3, 0.9], "D": [0.7], "E": [0.21, 0.22]}
MEASURES = ["published: Clean", "published: I-RR targeted", "published: PGD targeted 8/255"]
PAIRS = [{"of": of, "than": than, "network": "ConvNet", "ipc": ipc, "claim": claim}
         for of, than, ipc, claim in (("A", "B", [50, 1], "s"), ("B", "A", [50], "s"),
                                      ("A", "C", [50], "s"), ("E", "A", [50], "s"),
                                      ("D", "A", [50], ""))]


def test_the_interval_of_a_difference():
    """The first example of Newcombe 1998, table II, method 10."""
    assert statistics.above_text(100 * 56 / 70, 70, 100 * 48 / 80, 80) == "+20.0 [5.2, 33.4]"


def test_differences_between_sets(tmp_path, run_report, lines_of):
    """Welch's intervals, what they say of a claim, and their places in a page."""
    rows = []
    for (method, accuracies), attack in itertools.product(SETS.items(), ("Clean", *TARGETED)):
        for k, clean in enumerate(accuracies):
            name = f"{method}_ConvNet_CIFAR10_50_None_{k}-0.pth"
            targeted, accuracy = (None, clean) if attack == "Clean" else (True, 0.2)
            rows.append(row(method, 50, attack, targeted, accuracy, crafted_on=name,
                            evaluated_on=name))
    write(tmp_path / "in", rows)
    asked = [{"name": "claims", "title": "Claims", "measures": MEASURES, "pairs": PAIRS},
             {"name": "all", "title": "All", "measures": MEASURES, "sets": [
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
    lines, (clean, irr, pgd) = lines_of("claims", ""), MEASURES
    ab, ba, ac, ea, da = lines.values()
    assert (ab[clean], ab[pgd]) == (interval, "+0.0 [0.0, 0.0]: not supported")
    assert ba[clean].startswith(f"-9.0 [{-9 - half:.1f}, ")
    assert ac[clean].endswith("]: not supported") and ea[clean].endswith("]: refuted")
    assert (da[clean], da["sets"]) == ("+18.0", "1 to 3")
    assert "no results: A - B, ConvNet, 1 a class" in out

    values = [improved_rr(accuracy, [0.2]) for accuracy in SETS["A"]]
    lines = lines_of("all", "set")
    assert lines[irr]["A"] == f"{np.mean(values):.1f} +- {np.std(values, ddof=1):.1f}"
    assert lines[irr]["D"] == f"{improved_rr(0.7, [0.2]):.1f}"
    assert lines["sets"] == {"set": "sets", "A": "3", "D": "1"}
    assert "no results of F, ConvNet, 50 a class" in out
    text = page.read_text()
    assert f"| s (A - B, ConvNet, 50 a class) | {interval} |" in text and "old" not in text
    assert re.findall(r"\*\*(All|Claims) |\n(b)\n", text) == [
        ("All", ""), ("", "b"), ("Claims", ""), ("All", "")]
    for wrong, message in ((f"<!-- report: begin other -->{report.END}", "asks for other; there"),
                           ("no markers", "page.md has no lines")):
        page.write_text(wrong)
        with pytest.raises(InputError, match=message):
            run_report("--compare", file, "--readme", page)
    for change in ({"measures": "all"}, {"pairs": [{**PAIRS[0], "ipc": 1}]}, {"pairs": 1}):
        file.write_text(json.dumps([{**asked[0], **change}]))
        with pytest.raises(InputError, match="compare.json is damaged or no file of comparisons"):
            run_report("--compare", file)


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


WRONG = [("accuracy", 1.5), ("attack", "PDG"), ("seconds", "1"), ("seconds", float("nan")),
         ("method", None), ("n", 2.5), ("targeted", "yes"), ("eps", "a"), ("ipc", "10"),
         ("dataset", "a/b"), ("dataset", [])]


def test_damaged_and_foreign_files_are_named_and_the_rest_is_reported(tmp_path, run_report):
    """Also a file that contradicts another, and none of its rows is taken."""
    folder = tmp_path / "in"
    write(folder / "good", bacon_rows())
    write(folder / "good again", bacon_rows())
    contents = ['{"rows": [{', '{"a": 1}', "[1]"]
    contents += [json.dumps({"rows": [{**row("X", 1, "PGD", True, 0.5), key: value}]})
                 for key, value in WRONG]
    contents.append(json.dumps({"rows": [row("X", 1, "Clean", None, 0.5),
                                         {**bacon_rows()[0], "accuracy": 0.5}]}))
    for i, text in enumerate(contents):
        (folder / f"wrong{i}").mkdir()
        (folder / f"wrong{i}" / "results.json").write_text(text)
    for i, event in enumerate(({"event": "iteration"}, {"event": "else"}, [1],
                               final(clean_acc=None), final(robust_2_acc=[None]))):
        write_run(folder / f"run{i}", event)
    write_run(folder / "run5", align_weight="much")
    out = run_report()
    refused = re.findall(r"^refused: .*?/in/(\w+)/", out, re.MULTILINE)
    assert "36.83 (36.83, " in out and "| X |" not in out and sorted(refused) == sorted(
        [*(f"wrong{i}" for i in range(len(contents))), *(f"run{i}" for i in range(6))])
    assert (f"refused: {folder}/wrong14/results.json and {folder}/good/results.json have different "
            f"figures for Clean on {bacon_rows()[0]['crafted_on']}") in out
    with pytest.raises(InputError, match="wrong0.*no result of evaluate.py"):
        run_report(paths=[folder / "wrong0"])
    with pytest.raises(InputError, match="nowhere does not exist"):
        run_report(paths=[tmp_path / "nowhere"])


# ---- figures of .pt files
def test_sets_side_by_side(tmp_path, run_report):
    """A row for each class, in its colours; a set that does not say what it is, is refused."""
    colours = torch.rand(2, 3, 1, 1)
    meta = {"classes": ["a", "b"], "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25]}
    mean, std = (torch.tensor(meta[key]).view(3, 1, 1) for key in ("mean", "std"))
    images = ((colours.expand(2, 3, 32, 32) - mean) / std).repeat_interleave(3, 0)
    labels = torch.tensor([0] * 3 + [1] * 3)
    paths = [write_set(tmp_path / f"{name}.pt", images, labels, **meta) for name in ("one", "two")]
    write(tmp_path / "in", bacon_rows())
    run_report("--table", "metrics", "--show", *paths)
    image = matplotlib.image.imread(tmp_path / "out" / "sets.png")[..., :3].reshape(-1, 3)
    for colour in colours.flatten(1).numpy():
        assert (abs(image - colour) < 0.01).all(1).mean() > 0.1
    with pytest.raises(InputError, match="foreign.pt: whitened, or without"):
        run_report("--show", write_set(tmp_path / "foreign.pt", images, labels))
