"""report.py on result files that were made up, so that every figure in a table is known."""
import csv
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, SHARED
from matplotlib.figure import Figure

import report
from runtime.safe_io import InputError

EPS = {"FGSM": 8 / 255, "PGD": 8 / 255, "PGD_L2": 128 / 255, "AA": 8 / 255, "Square": 8 / 255, "SPSA": 8 / 255}
PUBLISHED = json.loads((ROOT / "published.json").read_text())


def row(method, ipc, attack, targeted, accuracy, threat="published", crafted=None, n=10000, seconds=1.0, dataset="CIFAR10"):
    name = "{}_ConvNet_CIFAR10_{}_None.pth"
    return {"dataset": dataset, "ipc": ipc, "method": method, "crafted_on": name.format(crafted or method, ipc),
            "evaluated_on": name.format(method, ipc), "threat_model": threat, "attack": attack, "targeted": targeted,
            "eps": EPS.get(attack), "n": n, "accuracy": accuracy, "seconds": seconds, "forward": 1, "backward": 1,
            "max_linf": 0, "max_l2": 0, "seed": 0}


def bacon_rows():
    """What the published benchmark logged for BACON, as rows of evaluate.py."""
    rows = []
    for ipc, attacks in PUBLISHED["log_white_box_BACON_CIFAR10"].items():
        clean = attacks["Clean"]
        rows.append(row("BACON", int(ipc), "Clean", None, clean["accuracy"] / 100, seconds=min(
            clean["seconds_targeted_pass"], clean["seconds_untargeted_pass"])))
        for attack, forms in attacks.items():
            for form in ("targeted", "untargeted"):
                if attack != "Clean" and forms[form]:
                    rows.append(row("BACON", int(ipc), attack, form == "targeted", forms[form]["accuracy"] / 100,
                                    seconds=forms[form]["seconds"]))
    return rows


def write(folder, rows, name="results.json"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps({"rows": rows}))
    return folder


def read_csv(path):
    """{(method, form): line}."""
    return {(line["method"], line["form"]): line for line in csv.DictReader(path.open())}


def main(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["report.py", *map(str, arguments)])
    report.main()
    return capsys.readouterr().out


def test_published_figures_are_those_of_the_source():
    if not SHARED.exists():
        pytest.skip("no ../shared here")
    golden = json.loads((SHARED / "golden" / "published.json").read_text())
    assert {k: v for k, v in PUBLISHED.items() if k != "source"} == {k: v for k, v in golden.items() if k != "threat_model"}


def test_table_1_from_the_published_logs(tmp_path, monkeypatch, capsys):
    """From the logs of BACON comes BACON's row of the paper: RR and I-RR to 0.01, which depend on no machine."""
    out = main(monkeypatch, capsys, write(tmp_path / "in", bacon_rows()), "--table", "1", "--out", tmp_path / "out")
    cells = read_csv(tmp_path / "out" / "table1_CIFAR10_10000.csv")
    paper = PUBLISHED["table1_white_box_pooled_over_ipc_1_10_50"]["CIFAR10"]["BACON"]
    for form in ("targeted", "untargeted"):
        for metric in ("RR", "I-RR"):
            cell = cells["BACON", form]
            assert float(cell[f"published {metric}"]) == pytest.approx(paper[form][metric], abs=0.01)
            assert float(cell[f"published {metric} published"]) == paper[form][metric]
            assert abs(float(cell[f"published {metric} difference"])) <= 0.01
        assert cell["pixel RR"] == "" and cell["ipc"] == "1, 10, 50"
    assert "36.83 (36.83, " in out and "no results of Full-size, DC, DSA, MTT, DM, IDM, ROME" in out
    latex = (tmp_path / "out" / "table1_CIFAR10_10000.tex").read_text()
    assert latex.count(r"\\") == 1 + 2 and r"\toprule" in latex and "%" not in latex.replace(r"\%", "")


def test_no_difference_where_the_pool_is_another(tmp_path, monkeypatch, capsys):
    rows = [r for r in bacon_rows() if r["ipc"] == 50 and r["attack"] != "AA"]
    out = main(monkeypatch, capsys, write(tmp_path / "in", rows), "--table", "1", "--out", tmp_path / "out")
    assert "(36.83)" in out and "(36.83, " not in out and "untargeted, published: without AA at ipc 50: BACON" in out


def test_nothing_is_pooled_over_data_sets_or_images(tmp_path, monkeypatch, capsys):
    rows = bacon_rows()
    for attack, targeted in (("Clean", None), ("PGD", False)):
        rows.append(row("BACON", 50, attack, targeted, 0.01, n=500))
        rows.append(row("BACON", 50, attack, targeted, 0.2, dataset="CIFAR100"))
    main(monkeypatch, capsys, write(tmp_path / "in", rows), "--out", tmp_path / "out")
    names = {p.stem for p in (tmp_path / "out").glob("table1*.md")}
    assert names == {"table1_CIFAR10_10000", "table1_CIFAR10_500", "table1_CIFAR100_10000"}
    assert "36.83 (36.83, " in (tmp_path / "out" / "table1_CIFAR10_10000.md").read_text()


def test_tables_2_and_4_and_figure_3(tmp_path, monkeypatch, capsys):
    rows = []
    for threat in ("published", "pixel"):
        for method, clean in (("BACON", 0.7), ("IDM", 0.6)):
            rows.append(row(method, 50, "Clean", None, clean, threat))
            rows.append(row(method, 50, "Square", False, 0.3, threat))
            for crafted in ("BACON", "IDM"):
                rows.append(row(method, 50, "PGD", False, 0.2 if crafted == method else 0.5, threat, crafted))
        rows += [row("+AP", 50, "Clean", None, 0.5, threat), row("+AP", 50, "PGD", True, 0.4, threat)]
        for method, ipc in (("+RPM", 1), ("+RPM+AP", 50)):
            rows.append(row(method, ipc, "Clean", None, 0.5, threat))
            rows += [row(method, ipc, attack, True, 0.4, threat) for attack in ("FGSM", "PGD", "PGD_L2", "CW")]
    out = main(monkeypatch, capsys, write(tmp_path / "in", rows), "--out", tmp_path / "out")

    def irr(clean, attacked):
        return 100 * (1 - (clean - np.mean(attacked)) * (clean - min(attacked)) / clean**2)
    lines = read_csv(tmp_path / "out" / "table2_CIFAR10_10000.csv")
    paper = PUBLISHED["table2_black_box_I-RR_CIFAR10_ipc50"]
    for method, clean in (("BACON", 0.7), ("IDM", 0.6)):
        cell = lines[method, "untargeted"]
        for threat in ("published", "pixel"):
            assert float(cell[f"{threat} transfer"]) == pytest.approx(irr(clean, [0.5]))
            assert float(cell[f"{threat} query"]) == pytest.approx(irr(clean, [0.3]))
        assert float(cell["published query published"]) == paper[method]["untargeted"]["query"]
        assert cell["published query difference"] == ""  # SPSA is missing
        assert cell["published transfer difference"] == ""
    # +AP has one attack of four, +RPM has all of them at ipc 1, +RPM+AP at ipc 50.
    assert f"{irr(0.5, [0.4]):.2f} (94.66)" in out and "CW at ipc 50: +AP" in out and "no results of Baseline" in out
    grid = f"{irr(0.5, [0.4] * 4):.2f}"
    lines = {(line["distilled"], line["form"]): line for line in csv.DictReader(
        (tmp_path / "out" / "table4_CIFAR10_10000.csv").open()) if line["attacked"] == "published"}
    paper = PUBLISHED["table4_ablation_CIFAR10_ipc50"]
    for name, difference in (("+RPM", ""), ("+RPM+AP", float(grid) - paper["+RPM+AP"]["targeted"]["I-RR"])):
        line = lines[name, "targeted"]
        assert f"{float(line['I-RR']):.2f}" == grid and line["I-RR published"] == str(paper[name]["targeted"]["I-RR"])
        found = line["I-RR difference"]
        assert found == difference if difference == "" else float(found) == pytest.approx(difference)
    for threat in ("published", "pixel"):
        for ending in ("png", "pdf"):
            assert (tmp_path / "out" / f"figure3_CIFAR10_10000_{threat}_untargeted_ipc_50.{ending}").stat().st_size > 1000


def write_run(folder, align_weight, final, flags=None, more=None):
    folder.mkdir(parents=True)
    flags = {"method": "ROME", "dataset": "CIFAR10", "model": "ConvNet", "ipc": 50, "threat_model": "published",
             "Iteration": 40, "align_weight": align_weight, "save_path": str(folder), **(flags or {})}
    accuracies = {"model": "ConvNet", "n": 100, "clean_acc": [0.5, 0.6], "clamp_acc": [0.4, 0.5], "robust_acc": [0.3, 0.4],
                  **(more or {})}
    events = [{"event": "evaluation", "exp": 0, "set": "random real", **accuracies}]
    for it in (0, 10, 20):
        events.append({"event": "iteration", "exp": 0, "iteration": it, "loss_robustness": 9.0 - it / 4,
                       "loss_performance": 2.0, "w_f": it / 2, "loss_pool": 2.0})
    events.append({"event": "evaluation", "exp": 0, "iteration": 20, "set": flags["method"], "best_so_far": True, **accuracies})
    if final:
        events.append({"event": "final", "set": flags["method"], **accuracies})
    (folder / "flags.json").write_text(json.dumps({"flags": flags}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))


def test_runs_finished_and_going_and_the_sweep(tmp_path, monkeypatch, capsys):
    write_run(tmp_path / "in" / "a", 0.2, True)
    write_run(tmp_path / "in" / "b", 0.8, True, {"method": "another name", "num_exp": 3})
    write_run(tmp_path / "in" / "other", 0.8, True, {"lr_img": 3})
    write_run(tmp_path / "in" / "c", 0.5, False)
    with open(tmp_path / "in" / "c" / "metrics.jsonl", "a") as file:
        file.write('{"event": "iter')  # being written at this moment
    smaller = {"robust_2_acc": [0.5, 0.5], "robust_4_acc": [0.4, 0.4]}
    write_run(tmp_path / "in" / "pixel", 0.2, True, {"threat_model": "pixel"}, smaller)
    out = main(monkeypatch, capsys, tmp_path / "in", "--out", tmp_path / "out")
    assert "| 55.00 +- 5.00 | 45.00 +- 5.00 |  |  | 35.00 +- 5.00 | targeted PGD-10 | 100 | finished |" in out
    assert ("| 55.00 +- 5.00 | 45.00 +- 5.00 | 50.00 +- 0.00 | 40.00 +- 0.00 | 35.00 +- 5.00 | untargeted PGD-20 | 100 | "
            "finished |") in out
    assert "going, iteration 21 of 40 or more" in out and "refused" not in out
    figures = {p.name for p in (tmp_path / "out").glob("*.png")}
    assert figures == {"figure4_0.png", "curves_a.png", "curves_b.png", "curves_c.png", "curves_other.png",
                       "curves_pixel.png"}


def test_over_seeds(tmp_path, monkeypatch, capsys):
    """Three seeds on one device and one on another; the figures by hand, the differences seed by seed."""
    for seed, (real, rome, device) in enumerate(((40, 45, "A"), (50, 56, "A"), (30, 35, "A"), (30, 90, "B"))):
        prior = [f"somewhere{seed}/net_seed{seed}-0.pth"]
        folder = tmp_path / "in" / f"seed{seed}"
        write_run(folder, 0.2, True, {"seed": seed, "robust_prior": prior})
        lines = [{"event": "final", "set": name, "model": "ConvNet", "n": 100, "clean_acc": [0.5, 0.5], "clamp_acc": [0.5, 0.5],
                  "robust_acc": [accuracy / 100 - 0.01, accuracy / 100 + 0.01]}
                 for name, accuracy in (("random real", real), ("ROME", rome))]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        about = json.loads((folder / "flags.json").read_text())
        (folder / "flags.json").write_text(json.dumps({**about, "device": device}))
    main(monkeypatch, capsys, tmp_path / "in", "--out", tmp_path / "out")
    lines = {line["set"]: line for line in csv.DictReader((tmp_path / "out" / "seeds.csv").open())}
    assert {line["device"] for line in lines.values()} == {"A"} and {line["seeds"] for line in lines.values()} == {"3"}
    assert lines["random real"]["robust 8/255"] == "40.00 +- 10.00"
    assert lines["ROME"]["robust 8/255"] == f"45.33 +- {np.std([45, 56, 35], ddof=1):.2f}"
    assert lines["ROME minus random real"]["robust 8/255"] == f"+5.33 +- {np.std([5, 6, 5], ddof=1):.2f} *"
    assert lines["ROME minus random real"]["clean"] == "+0.00 +- 0.00" and lines["ROME"]["robust 2/255"] == ""


def test_what_a_set_is_worth(tmp_path, monkeypatch, capsys):
    """Clean and PGD-20 of a run of two sets and of evaluate.py on the first of them; AutoAttack on fewer images joins them."""
    smaller = {"robust_2_acc": [0.30, 0.34], "robust_4_acc": [0.2, 0.2], "robust_acc": [0.1, 0.1], "clean_acc": [0.5, 0.5]}
    write_run(tmp_path / "in" / "run", 0.2, True, {"threat_model": "pixel", "num_exp": 2}, smaller)
    with open(tmp_path / "in" / "run" / "metrics.jsonl", "a") as file:
        hard = {"event": "final", "set": "ROME, hard labels", "model": "ConvNet", "n": 100, **smaller, "clamp_acc": [0.5, 0.5],
                "robust_2_acc": [0.1, 0.1]}
        file.write(json.dumps(hard) + "\n")
    common = {"threat": "pixel", "n": 1000}
    rows = [row("ROME-pixel", 50, "Clean", None, 0.56, **common)]
    rows += [{**row("ROME-pixel", 50, "PGD20", False, 0.38, **common), "eps": 2 / 255},
             {**row("ROME-pixel", 50, "AA", False, 0.28, threat="pixel", n=500), "eps": 2 / 255},
             {**row("ROME-pixel", 50, "AA", True, 0.99, threat="pixel", n=500), "eps": 2 / 255},
             {**row("ROME-pixel", 50, "AA", False, 0.99, threat="published", n=500), "eps": 2 / 255}]
    network = {key: "ROME-pixel_ConvNet_CIFAR10_50_None_0-0.pth" for key in ("crafted_on", "evaluated_on")}
    write(tmp_path / "in" / "evaluated", [{**line, **network} for line in rows])
    out = main(monkeypatch, capsys, tmp_path / "in", "--out", tmp_path / "out", "--table", "robust")
    assert "1 table(s), 0 figure(s)" in out
    lines = {line["set"]: line for line in csv.DictReader((tmp_path / "out" / "robust_CIFAR10.csv").open())}
    assert list(lines) == ["constant classifier", "ROME-pixel", "ROME-pixel-hard"]
    ours = lines["ROME-pixel"]
    assert (ours["clean"], ours["network"], ours["ipc"]) == (f"51.5 +- {np.std([53, 50], ddof=1):.1f}", "ConvNet", "50")
    assert ours["PGD-20 2/255"] == "34.0 +- 0.0" and ours["PGD-20 8/255"] == "10.0 +- 0.0"
    assert (ours["AutoAttack 2/255"], ours["sets"]) == ("28.0", "1 to 2")
    assert lines["ROME-pixel-hard"]["PGD-20 2/255"] == "10.0 +- 0.0" and lines["constant classifier"]["clean"] == "10.0"
    assert "clean 100, 1000; PGD-20 2/255 100, 1000; PGD-20 4/255 100; PGD-20 8/255 100; AutoAttack 2/255 500" in out


def sets_of(method, accuracies, attacked=0.2):
    """Rows of a network on each set of a file."""
    for k, accuracy in enumerate(accuracies):
        name = f"{method}_ConvNet_CIFAR10_50_None_{k}-0.pth"
        for line in (row(method, 50, "Clean", None, accuracy), *(row(method, 50, attack, True, attacked) for attack in
                                                               ("FGSM", "PGD", "PGD_L2", "CW"))):
            yield {**line, "crafted_on": name, "evaluated_on": name}


def test_differences_between_sets(tmp_path, monkeypatch, capsys):
    """Their intervals by Welch's formula, what they say of a claim, and the places that they go to in a page."""
    from scipy.stats import t
    write(tmp_path / "in", [*sets_of("A", [0.5, 0.54, 0.52]), *sets_of("B", [0.4, 0.46]), *sets_of("C", [0.3, 0.9]),
                            *sets_of("D", [0.7])])
    pairs = [{"of": of, "than": than, "network": "ConvNet", "ipc": [50], **({"claim": "so"} if of != "D" else {})}
             for of, than in (("A", "B"), ("B", "A"), ("A", "C"), ("D", "A"))] + [
                 {"of": "A", "than": "B", "network": "ConvNet", "ipc": [1]}]
    measures = ["published: Clean", "published: I-RR targeted", "published: PGD targeted 8/255"]
    asked = [{"name": "claims", "title": "Claims", "measures": measures, "pairs": pairs, "sentences": True},
             {"name": "all", "title": "All", "measures": measures, "sets": [
                 {"set": name, "network": "ConvNet", "ipc": 50} for name in "ADE"]}]
    (tmp_path / "compare.json").write_text(json.dumps(asked))
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- report: begin all -->\nold\n<!-- report: end -->\nb\n<!-- report: begin claims all -->\n"
                    "<!-- report: end -->\n")
    arguments = [tmp_path / "in", "--out", tmp_path / "out", "--compare", tmp_path / "compare.json", "--readme", page]
    out = main(monkeypatch, capsys, *arguments)

    a, b = np.array([50, 54, 52]), np.array([40, 46])
    variances = a.var(ddof=1) / 3, b.var(ddof=1) / 2
    freedom = sum(variances) ** 2 / (variances[0] ** 2 / 2 + variances[1] ** 2 / 1)
    half = t.ppf(0.975, freedom) * sum(variances) ** 0.5
    lines = {line[""]: line for line in csv.DictReader((tmp_path / "out" / "claims.csv").open())}
    verdict = "supported" if 9 > half else "not supported"
    assert lines["so (A - B, ConvNet, 50 a class)"]["published: Clean"] == f"+9.0 [{9 - half:.1f}, {9 + half:.1f}]: {verdict}"
    assert lines["so (A - C, ConvNet, 50 a class)"]["published: Clean"].endswith("]: not supported")
    assert lines["so (A - B, ConvNet, 50 a class)"]["published: PGD targeted 8/255"] == "+0.0 [0.0, 0.0]: not supported"
    single = lines["D - A, ConvNet, 50 a class"]
    assert (single["published: Clean"], single["sets"]) == ("+18.0", "1 to 3")
    assert "no results: A - B, ConvNet, 1 a class" in out

    def irr(clean):
        return 100 * (1 - (clean - 0.2) ** 2 / clean**2)
    values = [irr(clean) for clean in (0.5, 0.54, 0.52)]
    cells = {line[""]: line for line in csv.DictReader((tmp_path / "out" / "all.csv").open())}
    assert cells["published: I-RR targeted"]["A"] == f"{np.mean(values):.1f} +- {np.std(values, ddof=1):.1f}"
    assert cells["published: I-RR targeted"]["D"] == f"{irr(0.7):.1f}" and cells["sets"] == {"": "sets", "A": "3", "D": "1"}
    text = page.read_text()
    assert f"- **so (A - B, ConvNet, 50 a class)**: published: Clean +9.0 [{9 - half:.1f}, {9 + half:.1f}]: {verdict}; " in text
    assert text.count("**All, ConvNet, 50 a class") == 2 and text.count("Claims (percentage") == 1 and "old" not in text
    assert text.index("**All") < text.index("\nb\n") < text.index("Claims (")
    main(monkeypatch, capsys, *arguments)
    assert page.read_text() == text
    page.write_text("<!-- report: begin other -->\n<!-- report: end -->")
    with pytest.raises(InputError, match="page.md asks for other; there is claims, all"):
        main(monkeypatch, capsys, *arguments)
    for wrong in ("{", "[]x", '[{"name": "a"}]', json.dumps([{**asked[0], "measures": "all"}]),
                  json.dumps([{**asked[0], "pairs": [{**pairs[0], "ipc": 1}]}])):
        (tmp_path / "compare.json").write_text(wrong)
        with pytest.raises(InputError, match="compare.json is damaged or no file of comparisons"):
            main(monkeypatch, capsys, *arguments)


def test_two_names_are_compared_without_a_file(tmp_path, monkeypatch, capsys):
    """`--compare A B`: the usual measures, of all networks and numbers of images that both have, B being the reference."""
    def judged(method, accuracies, ipc=10, dataset="CIFAR10"):
        for k, accuracy in enumerate(accuracies):
            name = f"{method}_ConvNet_{dataset}_{ipc}_None_{k}-0.pth"
            for attack, targeted, share, eps in (("Clean", None, 1, None), ("AA", False, 0.5, 2 / 255)):
                yield {**row(method, ipc, attack, targeted, share * accuracy, threat="pixel", dataset=dataset),
                       "crafted_on": name, "evaluated_on": name, "eps": eps}
    write(tmp_path / "in", [*judged("A-pixel", [0.5, 0.52]), *judged("B", [0.4, 0.42]), *judged("B", [0.9], ipc=50)])
    main(monkeypatch, capsys, tmp_path / "in", "--out", tmp_path / "out", "--compare", "A", "B")
    lines = {line[""]: line for line in csv.DictReader((tmp_path / "out" / "compare_A_B_CIFAR10.csv").open())}
    assert lines["pixel: Clean"]["A-pixel"] == "51.0 +- 1.4" and lines["pixel: AA untargeted 2/255"]["B"] == "20.5 +- 0.7"
    (line,) = csv.DictReader((tmp_path / "out" / "compare_A_B_CIFAR10_differences.csv").open())
    half = 4.302652729749 * 2**0.5  # Student's t, two degrees of freedom; both means have a standard error of 1
    assert line["pixel: Clean"] == f"+10.0 [{10 - half:.1f}, {10 + half:.1f}]"
    for names, message in ((["A", "C"], "no result of C on CIFAR10; there are A-pixel, B"),
                           (["A"], "--compare A: there is no such file; give one, or the names of at least two sets")):
        with pytest.raises(InputError, match=message):
            main(monkeypatch, capsys, tmp_path / "in", "--out", tmp_path / "out", "--compare", *names)


def test_a_data_set_of_three_classes_has_another_constant(tmp_path, monkeypatch, capsys):
    rows = [row("A", 1, attack, targeted, 0.5, threat="pixel", dataset="pets")
            for attack, targeted in (("Clean", None), ("AA", False))]
    (tmp_path / "results.json").write_text(json.dumps({"rows": rows, "num_classes": 3}))
    out = main(monkeypatch, capsys, tmp_path, "--out", tmp_path / "out", "--table", "robust")
    assert "| constant classifier |  |  | 33.3 | 33.3 |" in out


def test_runs_under_published_in_comparisons(tmp_path, monkeypatch, capsys):
    """The last figures of a run stand beside those of evaluate.py; not among them, where other networks were attacked."""
    write_run(tmp_path / "in" / "a", 0.2, True, {"num_exp": 2})
    write(tmp_path / "in" / "evaluated", [row("ROME", 50, "PGD", True, 0.9)])
    wanted = {"in the run: Clean": (50, 60), "in the run: Clamp-only": (40, 50), "in the run: PGD targeted 8/255": (30, 40)}
    (tmp_path / "compare.json").write_text(json.dumps([{"name": "runs", "title": "Runs", "measures": list(wanted), "sets": [
        {"set": "ROME", "network": "ConvNet", "ipc": 50}]}]))
    main(monkeypatch, capsys, tmp_path / "in", "--out", tmp_path / "out", "--compare", tmp_path / "compare.json", "--figure",
         "curves")
    cells = {line[""]: line["ROME"] for line in csv.DictReader((tmp_path / "out" / "runs.csv").open())}
    assert cells == {**{measure: f"{np.mean(two):.1f} +- {np.std(two, ddof=1):.1f}" for measure, two in wanted.items()},
                     "sets": "2"}
    assert [path.name for path in (tmp_path / "out").glob("*.png")] == ["curves_a.png"]


PAGES = [path.name for path in sorted((ROOT / "docs").glob("*.md")) if f"\n{report.END}" in path.read_text()]


@pytest.mark.parametrize("page", PAGES)
def test_the_pages_say_what_the_files_say(page, tmp_path, monkeypatch, capsys):
    """The command that stands in a page writes its tables as they are there."""
    text = (ROOT / "docs" / page).read_text()
    command = re.search(rf"^    python report.py (.*) --readme docs/{page} --out \S+$", text, re.MULTILINE)[1].split()
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: Path(path).touch())
    words = [name for word in command for name in (sorted(map(str, Path().glob(word))) if "*" in word else [word])]
    (tmp_path / page).write_text(text)
    main(monkeypatch, capsys, *words, "--readme", tmp_path / page, "--out", tmp_path / "out")
    assert (tmp_path / page).read_text() == text


def test_verdicts():
    from reporting.statistics import verdict, welch
    assert [verdict(*interval) for interval in ((0.1, 1), (-1, 1), (-1, -0.1), (0, 0))] == [
        "supported", "not supported", "refuted", "not supported"]
    rng = np.random.default_rng(0)
    held = [low <= 2 <= high for _, low, high in (welch(rng.normal(5, 1, 3), rng.normal(3, 3, 4)) for _ in range(500))]
    assert 0.9 < np.mean(held) < 0.99  # it covers the truth as often as it says


WRONG = [("seconds", "1"), ("seconds", float("nan")), ("method", None), ("n", 2.5), ("targeted", "yes"), ("eps", "a"),
         ("ipc", "10"), ("dataset", "a/b"), ("dataset", [])]


def test_two_evaluations_of_the_same_names_are_not_mixed(tmp_path, monkeypatch, capsys):
    """Four networks at 25 %, two of the same names at 75 %: the second file is left out as a whole, and named."""
    for name, networks, accuracy in (("a", 4, 0.25), ("b", 2, 0.75), ("c", 2, 0.25)):
        rows = [{**row("ROME", 1, "Clean", None, accuracy), "evaluated_on": f"{i}.pth", "crafted_on": f"{i}.pth"}
                for i in range(networks)]
        write(tmp_path / "in" / name, rows)
    write(tmp_path / "in" / "recorded", [row("DC", 1, "Clean", None, 0.5)])  # what came with the repository
    out = main(monkeypatch, capsys, tmp_path / "in", "--out", tmp_path / "out")
    assert "| Clean | 25.00 +- 0.00" in out and "DC" not in out.replace("no results of Full-size, DC", "")
    assert [line for line in out.splitlines() if "refused" in line] == [
        f"refused: {tmp_path}/in/b/results.json and {tmp_path}/in/a/results.json have different figures for Clean on 0.pth; "
        "report them apart"]
    assert "DC" in main(monkeypatch, capsys, tmp_path / "in" / "recorded", "--out", tmp_path / "out")


def test_damaged_and_foreign_files_are_named_and_the_rest_is_reported(tmp_path, monkeypatch, capsys):
    write(tmp_path / "in" / "good", bacon_rows())
    for name, text in (("damaged", '{"rows": [{'), ("foreign", '{"a": 1}'), ("list", "[1]"),
                       ("impossible", json.dumps({"rows": [row("X", 1, "PGD", True, 1.5)]})),
                       ("unknown", json.dumps({"rows": [row("X", 1, "PDG", True, 0.5)]})),
                       *((f"{key}{i}", json.dumps({"rows": [{**row("X", 1, "PGD", True, 0.5), key: value}]}))
                         for i, (key, value) in enumerate(WRONG))):
        (tmp_path / "in" / name).mkdir()
        (tmp_path / "in" / name / "results.json").write_text(text)
    final = '{"event": "final", "set": "a", "model": "b", "n": 5, "clean_acc": null, "clamp_acc": [1], "robust_acc": [1]}'
    for i, line in enumerate(('{"event": "iteration"}', final, '{"event": "else"}', "[1]")):
        write_run(tmp_path / "in" / f"run{i}", 0.2, True)
        (tmp_path / "in" / f"run{i}" / "metrics.jsonl").write_text(line + "\n")
    write_run(tmp_path / "in" / "run4", "much", True)
    out = main(monkeypatch, capsys, tmp_path / "in", "--out", tmp_path / "out")
    refused = [line for line in out.splitlines() if line.startswith("refused: ")]
    assert len(refused) == 5 + len(WRONG) + 5 and "36.83 (36.83, " in out
    for name in ("damaged", "foreign", "list", "impossible", "unknown", *(f"run{i}" for i in range(5))):
        assert any(f"/{name}/" in line for line in refused)
    (tmp_path / "in" / "good" / "results.json").unlink()
    with pytest.raises(InputError, match="foreign.*no result of evaluate.py"):
        main(monkeypatch, capsys, tmp_path / "in", "--out", tmp_path / "out")
    with pytest.raises(InputError, match="nowhere does not exist"):
        main(monkeypatch, capsys, tmp_path / "nowhere")


def test_a_section_of_the_readme_is_replaced(tmp_path, monkeypatch, capsys):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    folder = write(tmp_path / "in", bacon_rows())
    for _ in range(2):
        main(monkeypatch, capsys, folder, "--table", "1", "--out", tmp_path / "out", "--readme", readme)
    text = readme.read_text()
    assert text.startswith(f"before\n{report.BEGIN}\n**Table 1") and text.endswith(f"{report.END}\nafter\n")
    assert "old" not in text
    (tmp_path / "other.md").write_text("no markers")
    with pytest.raises(InputError, match="other.md has no lines"):
        main(monkeypatch, capsys, folder, "--table", "1", "--out", tmp_path / "out", "--readme", tmp_path / "other.md")


def test_sets_side_by_side(tmp_path, monkeypatch, capsys):
    """A row for each class, in its colours; a set that does not say what it is, is refused."""
    import matplotlib.pyplot as plt
    import torch
    colours = torch.rand(2, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.3, 0.25]
    images = (colours.expand(2, 3, 32, 32) - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    meta = {"dataset": "CIFAR10", "classes": ["a", "b"], "mean": mean, "std": std, "flags": {"method": "M"},
            "threat_model": "pixel"}
    for name, said in (("one", meta), ("two", {**meta, "flags": {"method": "N"}}), ("foreign", {})):
        content = {"data": [[images.repeat_interleave(3, 0), torch.tensor([0] * 3 + [1] * 3)]], "meta": said}
        torch.save(content, tmp_path / f"{name}.pt")
    folder = write(tmp_path / "in", bacon_rows())
    main(monkeypatch, capsys, folder, "--table", "1", "--out", tmp_path / "out", "--show", tmp_path / "one.pt",
         tmp_path / "two.pt")
    picture = torch.from_numpy(plt.imread(tmp_path / "out" / "sets.png"))[..., :3].flatten(0, 1)
    for colour in colours.flatten(1):
        assert ((picture - colour).abs() < 0.01).all(1).float().mean() > 0.1
    with pytest.raises(InputError, match="foreign.pt does not say its data set"):
        main(monkeypatch, capsys, folder, "--table", "1", "--out", tmp_path / "out", "--show", tmp_path / "foreign.pt")


def test_tsne(tmp_path, monkeypatch, capsys, digits):
    import torch
    images = torch.cat([digits.sample_class(c, 1, torch.Generator().manual_seed(c)) for c in range(10)])
    flags = {"model": "LeNet", "epoch_eval_train": 5, "lr_net": 0.01, "batch_train": 32, "dsa_strategy": "none"}
    torch.save({"data": [[images, torch.arange(10)]], "meta": {"dataset": "Digits", "packed": False, "threat_model": "pixel",
                                                              "flags": flags}}, tmp_path / "set.pt")
    folder = write(tmp_path / "in", bacon_rows())
    main(monkeypatch, capsys, folder, "--table", "1", "--out", tmp_path / "out", "--tsne", tmp_path / "set.pt")
    assert (tmp_path / "out" / "tsne.png").stat().st_size > 10000
