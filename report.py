"""The paper's tables and figures from result files, ours beside the published ones.

    python report.py result/                     all that the results allow, into result/report/
    python report.py result/released --table 1 --figure 3

Reads what evaluate.py (results.json) and the ROME scripts (metrics.jsonl, flags.json) have written, finished or still going.
Writes Markdown, CSV and LaTeX tables, and every picture as PNG and PDF. Published figures: published.json, with their source.
Distributed under the MIT licence.
"""
import argparse
import csv
import io
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

import utils
from attacks import ATTACKS, THREAT_MODELS, get_threat_model
from evaluate import (
    CONTROLS,
    Source,
    cell_text,
    check_rows,
    check_set,
    fit_normalisation,
    groups_of,
    heat_map,
    label,
    metrics_of,
    transfer_matrices,
    transfer_of,
)
from files import InputError, write_atomically, write_text

HERE = Path(__file__).parent
METRICS = ("RR", "CREI", "I-RR", "I-CREI")
PAPER_IPC = [1, 10, 50]  # what Table 1 pools
LOSSES = ("loss_robustness", "loss_performance", "loss_pool", "w_f")
BEGIN, END = "<!-- report: begin -->", "<!-- report: end -->"


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("results", nargs="+", metavar="PATH", help="results.json, metrics.jsonl, or folders with them somewhere inside")
    add("--table", nargs="+", type=int, choices=(1, 2, 4), default=[], help="of the paper; default: all, and more")
    add("--figure", nargs="+", type=int, choices=(3, 4), default=[], help="of the paper; default: all, and more")
    add("--out", default="./result/report", metavar="DIR", help="folder for the report")
    add("--readme", metavar="FILE", help=f"replace what stands between {BEGIN} and {END} in this file by the tables")
    add("--crei_weight", type=utils.fraction, default=0.5, help="of RR against AE in CREI, 0 to 1")
    add("--tsne", metavar="SET", help="also draw a t-SNE of embeddings of real, attacked and these synthetic images (a .pt)")
    add("--data_path", default="./data", help="folder of cifar10.npz, cifar100.npz, for --tsne")
    add("--seed", type=utils.at_least(0), default=0, help="of --tsne")
    return parser.parse_args(argv)


# ------------------------------------------------------------------------------------------------------------- results
@dataclass
class Run:
    """What a ROME script has written so far."""

    folder: Path
    flags: dict
    events: list  # dicts, one a line of metrics.jsonl
    device: str = ""

    def of(self, name):
        return [event for event in self.events if event["event"] == name]

    def title(self):
        f = self.flags
        return f"{f['method']} {f['dataset']} {f['model']} ipc {f['ipc']} {f['threat_model']}"

    def other_flags(self, *names):
        """The flags but for these and the paths, as text: the same for runs that differ in nothing else."""
        left_out = {*names, "save_path", "checkpoint_path", "data_path", "save_interval", "fresh"}
        flags = {key: value for key, value in self.flags.items() if key not in left_out}
        flags["robust_prior"] = [Path(name).name for name in self.flags.get("robust_prior", [])]
        text = json.dumps(flags, sort_keys=True)
        return text.replace(f"seed{self.flags.get('seed')}-", "seed-") if "seed" in names else text


def find(paths):
    """The files of results below `paths`: ([results.json, ...], [metrics.jsonl, ...]). Below a folder, what came with the
    repository in `recorded` is left out, unless the path names it."""
    found = []
    for path in map(Path, paths):
        if not path.exists():
            raise InputError(f"{path} does not exist")
        found += sorted(p for p in path.rglob("*") if p.name in ("results.json", "metrics.jsonl")
                        and "recorded" not in p.relative_to(path).parts) if path.is_dir() else [path]
    found = list(dict.fromkeys(found))
    return [p for p in found if p.suffix == ".json"], [p for p in found if p.suffix != ".json"]


def read_rows(path):
    """The rows of a results.json. Raises InputError if it is damaged or foreign."""
    try:
        rows = json.loads(path.read_text())["rows"]
        check_rows(rows)
        return rows
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged or no result of evaluate.py ({type(error).__name__}: {error})") from None


def read_run(path):
    """The run of a metrics.jsonl; a last line that is not finished (a run that is going) is left out."""
    try:
        lines = path.read_text().split("\n")
        events = [json.loads(line) for line in lines[:-1]]
        about = json.loads(path.with_name("flags.json").read_text())
        flags = about["flags"]
        for key, kind in {"method": str, "dataset": str, "model": str, "threat_model": str, "ipc": int, "Iteration": int,
                          "align_weight": (int, float)}.items():
            if not isinstance(flags[key], kind):
                raise TypeError(f"the flag {key} is {flags[key]}")
        for event in events:
            check_event(event)
        return Run(path.parent, flags, events, str(about.get("device", "")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged or not of a ROME run ({type(error).__name__}: {error})") from None


def check_event(event):
    """Raise KeyError, TypeError or ValueError that says what is wrong with a line of metrics.jsonl."""
    if event["event"] == "iteration":
        numbers = [event[key] for key in ("exp", "iteration", *LOSSES)]
    elif event["event"] in ("evaluation", "final"):
        measured = [key for key in utils.COLUMNS if key in event or key in utils.ACCURACIES]
        names, numbers = [event["set"], event["model"]], [event["n"], *(x for key in measured for x in event[key])]
        if not all(isinstance(name, str) for name in names) or not all(event[key] for key in measured):
            raise ValueError(f"an {event['event']} of {names}")
    else:
        raise ValueError(f"an unknown event {event['event']}")
    if not np.isfinite(np.array(numbers, dtype=float)).all():
        raise ValueError(f"an {event['event']} with values that are not finite")


def pools(files):
    """Rows that may be pooled: of one data set and one number of test images. {(dataset, n): rows}.

    files: {path: rows}. Also returns a line for each file that is left out because it has another accuracy for an attack
    that an earlier file has: those are two evaluations, and half of each would be none.
    """
    found, refused = {}, []  # key -> (path, row)
    for path, rows in files.items():
        keyed = {tuple(row[k] for k in ("dataset", "n", "crafted_on", "evaluated_on", "threat_model", "attack", "targeted",
                                        "eps")): row for row in rows}
        other = [key for key, row in keyed.items() if key in found and found[key][1]["accuracy"] != row["accuracy"]]
        if other:
            earlier, row = found[other[0]]
            refused.append(f"{path} and {earlier} have different figures for {row['attack']} on {row['crafted_on']}; report "
                           "them apart")
            continue
        for key, row in keyed.items():
            found.setdefault(key, (path, row))
    pooled = {}
    for _, row in found.values():
        pooled.setdefault((row["dataset"], row["n"]), []).append(row)
    return pooled, refused


def threats_of(dataset):
    """The threat models, for their eps; they need no images for that."""
    class Data:
        num_classes = 100 if dataset == "CIFAR100" else 10

        @staticmethod
        def normalize(x):
            return x
        denormalize = normalize
    return {name: get_threat_model(name, Data) for name in THREAT_MODELS}


# -------------------------------------------------------------------------------------------------------------- tables
@dataclass
class Table:
    """columns: names. rows: lists of cells: text, a number in percent, or None where there is no figure.

    A cell may also be (ours, published) or, where the two do not pool the same, (ours, published, False): no difference then.
    """

    name: str
    title: str
    columns: list
    rows: list
    notes: list = field(default_factory=list)

    def markdown(self):
        lines = [f"**{self.title}**", "", "| " + " | ".join(self.columns) + " |", "|---" * len(self.columns) + "|"]
        lines += ["| " + " | ".join(_text(cell) for cell in row) + " |" for row in self.rows]
        return "\n".join([*lines, "", *(f"- {note}" for note in self.notes), ""])

    def csv(self):
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        pairs = [any(isinstance(row[i], tuple) for row in self.rows) for i in range(len(self.columns))]
        writer.writerow([name for column, pair in zip(self.columns, pairs)
                         for name in ([column, f"{column} published", f"{column} difference"] if pair else [column])])
        for row in self.rows:
            cells = []
            for cell, pair in zip(row, pairs):
                ours, published, *same = cell if isinstance(cell, tuple) else (cell, None)
                comparable = isinstance(ours, float) and published is not None and same != [False]
                difference = round(ours - published, 4) if comparable else None
                cells += [ours, published, difference] if pair else [ours]
            writer.writerow(["" if cell is None else cell for cell in cells])
        return text.getvalue()

    def latex(self):
        def escape(text):
            return re.sub(r"([&%_#$])", r"\\\1", text).replace("+-", r"$\pm$")
        lines = [r"\begin{table}", r"\centering", rf"\caption{{{escape(self.title)}}}",
                 rf"\begin{{tabular}}{{l{'r' * (len(self.columns) - 1)}}}", r"\toprule",
                 " & ".join(map(escape, self.columns)) + r" \\", r"\midrule"]
        lines += [" & ".join(escape(_text(cell)) for cell in row) + r" \\" for row in self.rows]
        return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}", ""])


def _text(cell):
    """'36.80', or '36.80 (36.83, -0.03)': ours, published, difference."""
    if isinstance(cell, tuple):
        ours, published, *same = cell
        if published is None:
            return _text(ours)
        if ours is None or same == [False]:
            return f"{_text(ours)} ({published:.2f})".strip()
        return f"{ours:.2f} ({published:.2f}, {ours - published:+.2f})"
    return "" if cell is None else f"{cell:.2f}" if isinstance(cell, float) else str(cell)


def table_1(pool, rows, published, crei_weight):
    """White-box metrics of each method, published threat model beside pixel."""
    dataset, n = pool
    entries = {(e["method"], e["targeted"], e["threat_model"]): e
               for e in metrics_of(rows, threats_of(dataset), crei_weight) if e["kind"] == "white-box"}
    if not entries:
        return None
    paper = published["table1_white_box_pooled_over_ipc_1_10_50"].get(dataset, {})
    table = Table(f"table1_{dataset}_{n}", f"Table 1, {dataset}, {n} test images: white-box metrics (percent)",
                  ["method", "form", "ipc", *(f"{threat} {m}" for threat in THREAT_MODELS for m in METRICS)], [])
    methods = list(dict.fromkeys(method for method, _, _ in entries))
    lacking = {}  # what -> methods
    for targeted in (True, False):
        form = "targeted" if targeted else "untargeted"
        for method in methods:
            found = {t: entries.get((method, targeted, t)) for t in THREAT_MODELS}
            if not any(found.values()):
                continue
            pooled = {threat: ", ".join(map(str, e["ipc"])) for threat, e in found.items() if e}
            ipc = pooled.popitem()[1] if len(set(pooled.values())) == 1 else "; ".join(map(": ".join, pooled.items()))
            cells = []
            for threat, entry in found.items():
                reference = paper.get(method, {}).get(form, {}) if threat == "published" and entry else {}
                same = bool(entry) and not entry["missing"] and entry["ipc"] == PAPER_IPC
                cells += [(entry[m] if entry else None, reference.get(m), same) for m in METRICS]
                if entry and entry["missing"]:
                    lacking.setdefault(f"{form}, {threat}: without {', '.join(entry['missing'])}", []).append(method)
                if entry and entry["raised"]:
                    table.notes.append(f"{method} {form} {threat}: attacked accuracy is above clean accuracy "
                                       f"({', '.join(entry['raised'])})")
            table.rows.append([method, form, ipc, *cells])
    table.notes += [f"{what}: {', '.join(names)}" for what, names in lacking.items()]
    table.notes.insert(0, "In brackets: the published figure, pooled over ipc 1, 10 and 50 and all attacks, and the difference "
                       "where ours pools the same. CREI and I-CREI depend on the machine's timings as well.")
    absent = [method for method in paper if method not in methods]
    if absent:
        table.notes.append(f"no results of {', '.join(absent)}")
    return table


def table_2(pool, rows, published, crei_weight):
    """Black-box I-RR of each method: transfer (mean over the other crafting methods) and query attacks."""
    dataset, n = pool
    threats = threats_of(dataset)
    query = {(e["method"], e["targeted"], e["threat_model"]): e
             for e in metrics_of(rows, threats, crei_weight) if e["kind"] == "query"}
    transfer = {}
    for e in transfer_of(rows, threats):
        if e["crafted_on"] != e["evaluated_on"]:
            transfer.setdefault((e["evaluated_on"], e["targeted"], e["threat_model"]), []).append(e)
    if not (query or transfer):
        return None
    paper = published["table2_black_box_I-RR_CIFAR10_ipc50"] if dataset == "CIFAR10" else {}
    table = Table(f"table2_{dataset}_{n}", f"Table 2, {dataset}, {n} test images: black-box I-RR (percent)",
                  ["method", "form", *(f"{t} {kind}" for t in THREAT_MODELS for kind in ("transfer", "query"))], [])
    crafted_on = {}  # what -> methods
    for method in dict.fromkeys(key[0] for key in (*transfer, *query)):
        for targeted in (True, False):
            form, cells = "targeted" if targeted else "untargeted", []
            for threat in THREAT_MODELS:
                reference = paper.get(method, {}).get(form, {}) if threat == "published" else {}
                found, asked = transfer.get((method, targeted, threat), []), query.get((method, targeted, threat))
                cells += [(float(np.mean([e["I-RR"] for e in found])) if found else None, reference.get("transfer"), False),
                          (asked and asked["I-RR"], reference.get("query"),
                           bool(asked) and asked["ipc"] == [50] and not asked["missing"])]
                for e in found:
                    what = f"{form}, {threat}, ipc {e['ipc']}: {', '.join(e['attacks'])}"
                    crafted_on.setdefault(what, {})[e["crafted_on"]] = True
            table.rows.append([method, form, *cells])
    table.notes.append("Transfer: mean of I-RR over the crafting methods that are there, the method itself left out. How the "
                       "paper pools its seven crafting networks is not known, so no difference is given.")
    table.notes += [f"transfer {what}, crafted on {', '.join(methods)}" for what, methods in crafted_on.items()]
    return table


def table_4(pool, rows, published, crei_weight):
    """The ablation: methods named as its rows."""
    dataset, n = pool
    paper = published["table4_ablation_CIFAR10_ipc50"]
    entries = {(e["method"], e["targeted"], e["threat_model"]): e
               for e in metrics_of(rows, threats_of(dataset), crei_weight) if e["kind"] == "white-box"}
    names = [name for name in paper if any(method.removesuffix("-pixel") == name for method, _, _ in entries)]
    if not names:
        return None
    table = Table(f"table4_{dataset}_{n}", f"Table 4, {dataset}, {n} test images: ablation (percent)",
                  ["distilled", "ipc", "attacked", "form", "I-RR", "I-CREI"], [])
    lacking = {}  # what -> methods
    for (method, targeted, threat), e in entries.items():
        if method.removesuffix("-pixel") in names:
            form = "targeted" if targeted else "untargeted"
            comparable = threat == "published" and dataset == "CIFAR10" and method in paper
            reference = paper[method][form] if comparable else {}
            same = e["ipc"] == [50] and not e["missing"]
            table.rows.append([method, ", ".join(map(str, e["ipc"])), threat, form,
                               *((e[m], reference.get(m), same) for m in ("I-RR", "I-CREI"))])
            if e["missing"]:
                lacking.setdefault(f"{form}, {threat}: without {', '.join(e['missing'])}", []).append(method)
    table.notes += [f"{what}: {', '.join(methods)}" for what, methods in lacking.items()]
    if any(cell[1] is not None for row in table.rows for cell in row[4:]):
        table.notes.insert(0, "In brackets: the published figure, of ConvNet at ipc 50 under all attacks, and the difference "
                           "where ours has the same ipc and attacks.")
    table.notes += [f"no results of {name}" for name in paper if name not in names]
    return table


def table_accuracy(pool, rows):
    """Robust accuracy per attack, with the controls, published beside pixel."""
    dataset, n = pool
    groups = {t: groups_of([row for row in rows if row["threat_model"] == t]) for t in THREAT_MODELS}
    columns = [(t, group) for group in dict.fromkeys(g for found in groups.values() for g in found) for t in THREAT_MODELS
               if group in groups[t]]
    keys = {key for found in groups.values() for cells in found.values() for key in cells}
    order = (*CONTROLS, *ATTACKS)
    keys = sorted(keys, key=lambda key: (order.index(key[0]), str(key[1]), key[2] or 0))
    if not columns:
        return None
    grid = [["attack", *(f"{method}, ipc {ipc}, {t}" for t, (method, ipc) in columns)]]
    for key in keys:
        cells = [groups[t][group].get(key) for t, group in columns]
        kind = "" if key[0] in CONTROLS or ATTACKS[key[0]].eps else " (minimum norm)"
        grid.append([label(*key) + kind, *(cell_text(cell) if cell else None for cell in cells)])
    if len(columns) > len(keys):  # the shorter side goes across the page
        grid = [list(column) for column in zip(*grid)]
    return Table(f"accuracy_{dataset}_{n}", f"Accuracy per attack, {dataset}, {n} test images (percent; mean +- standard "
                 "deviation over networks; in brackets the binomial 95 % interval)", grid[0], grid[1:])


def table_runs(runs):
    """The last figures of each run: distilled set and baselines."""
    table = Table("runs", "Distilled sets (accuracy in percent, mean +- standard deviation over networks)",
                  ["run", "set", "network", *utils.COLUMNS.values(), "judged by", "n", "state"], [])
    for run in runs:
        last = run.of("final")
        state = "finished"
        if not last:
            last = {(e["set"], e["model"]): e for e in run.of("evaluation")}.values()
            done = max([e["iteration"] + 1 for e in run.of("iteration")], default=0)
            state = f"going, iteration {done} of {run.flags['Iteration']} or more"
        for e in last:
            table.rows.append([run.title(), e["set"], e["model"],
                               *(utils.percent(e[key]).strip() if key in e else None for key in utils.COLUMNS),
                               judged_by(e), e["n"], state])
    return table if table.rows else None


def table_seeds(runs):
    """Finished runs that differ in nothing but the seed, on the same device: mean and standard deviation over the seeds, and of
    the differences between the distilled set and each other one, seed by seed."""
    groups = {}
    for run in runs:
        if run.of("final"):
            groups.setdefault((run.title(), run.other_flags("seed"), run.device), {})[run.flags.get("seed")] = run
    table = Table("seeds", "Over seeds (accuracy in percent, mean over the networks of a seed; mean +- standard deviation over "
                  "seeds; differences are taken seed by seed; *: more than two of its standard deviations)",
                  ["run", "device", "set", *utils.COLUMNS.values(), "judged by", "n", "seeds"], [])
    for (title, _, device), seeds in groups.items():
        if len(seeds) < 2:
            continue
        runs = list(seeds.values())
        means = [(e, {key: seed_means(runs, e, key) for key in utils.COLUMNS if key in e}) for e in runs[0].of("final")]
        rows = [(e, e["set"], values, False) for e, values in means]
        rows += [(ours, f"{ours['set']} minus {other['set']}", {key: values[key] - others[key] for key in values}, True)
                 for ours, values in means if ours["set"] == runs[0].flags["method"]
                 for other, others in means if other["set"] != ours["set"] and other["model"] == ours["model"]]
        table.rows += [[title, device, name, *(_over_seeds(values.get(key), sign) for key in utils.COLUMNS), judged_by(e),
                        e["n"], len(runs)] for e, name, values, sign in rows]
    return table if table.rows else None


def seed_means(runs, event, key):
    """Percent, (seeds,): the mean over the networks of each run for the set and the network of `event`."""
    return np.array([100 * np.mean(e[key]) for run in runs for e in run.of("final")
                     if (e["set"], e["model"]) == (event["set"], event["model"])])


def _over_seeds(values, sign):
    """'87.31 +- 1.02', or with the sign, for a difference, '+5.30 +- 1.90 *'; the sample standard deviation."""
    if values is None:
        return None
    mean, std = values.mean(), values.std(ddof=1)
    text = f"{mean:{'+' if sign else ''}.2f} +- {std:.2f}"
    return text + " *" if sign and abs(mean) > 2 * std else text


def judged_by(event):
    """The attack behind the robust accuracies of an evaluation. Under `pixel` it was targeted, as under `published`, until the
    smaller radii came."""
    return "untargeted PGD-20" if "robust_2_acc" in event else "targeted PGD-10"


# ------------------------------------------------------------------------------------------------------------- figures
def figure_3(pool, rows, published):
    """Transfer heat maps, the published ones beside ours where there are some. Yields (name, figure)."""
    import matplotlib.pyplot as plt
    dataset, n = pool
    paper = published["figure3_transfer_I-RR_CIFAR10_ipc50"]
    for title, ours, crafted, evaluated_on in transfer_matrices(transfer_of(rows, threats_of(dataset))):
        panels = [(f"ours, {n} images", ours)]
        form = "targeted" if "untargeted" not in title else "untargeted"
        if dataset == "CIFAR10" and title.startswith("published ") and title.endswith(" ipc 50"):
            where = paper["columns_evaluated_network"]
            panels.append(("published", np.array([[paper[form][where.index(c)][where.index(e)] if c in where and e in where
                                                   else np.nan for e in evaluated_on] for c in crafted])))
        figure, axes = plt.subplots(1, len(panels), figsize=(1.2 + len(panels) * (1.4 + 0.9 * len(evaluated_on)),
                                                             1.6 + 0.6 * len(crafted)), squeeze=False, layout="constrained")
        for ax, (name, matrix) in zip(axes[0], panels):
            image = heat_map(ax, matrix, crafted, evaluated_on)
            ax.set_title(name)
        figure.suptitle(f"I-RR (%), {dataset}, {title}")
        figure.colorbar(image, ax=axes)
        yield f"figure3_{dataset}_{n}_{re.sub('[^a-z0-9]+', '_', title)}", figure


def figure_4(runs, published):
    """Robust accuracy against --align_weight, of runs that differ in nothing else. Yields (name, figure)."""
    import matplotlib.pyplot as plt
    sweeps = {}
    for run in runs:
        final = [e for e in run.of("final") if e["set"] == run.flags["method"]]
        if final:
            sweeps.setdefault(run.other_flags("align_weight"), {})[run.flags["align_weight"]] = (run, final[0])
    for number, sweep in enumerate(s for s in sweeps.values() if len(s) > 1):
        figure, ax = plt.subplots(figsize=(6.4, 4), layout="constrained")
        weights = sorted(sweep)
        for key, name in (("clean_acc", "clean"), ("robust_acc", "robust")):
            values = [100 * np.array(sweep[w][1][key]) for w in weights]
            ax.errorbar(weights, [v.mean() for v in values], [v.std() for v in values], marker="o", capsize=3,
                        label=f"{name}, ours")
        run = sweep[weights[0]][0]
        if run.flags["dataset"] == "CIFAR10" and run.flags["threat_model"] == "published":
            paper = published["figure4_alpha_sweep_accuracy_CIFAR10_ipc50_read_off_plot"]
            ax.plot([float(w) for w in paper], list(paper.values()), "k--", label="published (ipc 50, read off the plot)")
        ax.set(xlabel="align_weight (the paper's alpha)", ylabel="accuracy (%)", title=run.title())
        ax.legend()
        yield f"figure4_{number}", figure


def figure_run(run):
    """Losses, w_f and accuracies against the outer iteration."""
    import matplotlib.pyplot as plt
    figure, (losses, weight, accuracies) = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    iterations = run.of("iteration")
    for exp in dict.fromkeys(e["exp"] for e in iterations):
        events = [e for e in iterations if e["exp"] == exp]
        style = {"alpha": 1 if exp == iterations[0]["exp"] else 0.4}
        for i, name in enumerate(("robustness", "performance", "pool")):
            losses.plot([e["iteration"] for e in events], [e[f"loss_{name}"] for e in events], f"C{i}", **style,
                        label=name if style["alpha"] == 1 else None)
        weight.plot([e["iteration"] for e in events], [e["w_f"] for e in events], "C3.", **style)
    losses.set(xlabel="outer iteration", yscale="log", title="losses")
    weight.set(xlabel="outer iteration", title="w_f of the network at hand (%)")
    weight.set_ylim(bottom=0)
    if iterations:
        losses.legend(fontsize=8)
    for i, (key, name) in enumerate(utils.COLUMNS.items()):
        points = {}
        for e in run.of("evaluation"):
            if key not in e:
                continue
            if e["set"] == run.flags["method"] and not e.get("final"):
                points.setdefault(e["iteration"], []).extend(e[key])
            elif e["set"] == "random real" and e["exp"] == 0:
                accuracies.axhline(100 * np.mean(e[key]), color=f"C{i}", ls=":")
        if points:
            values = [100 * np.array(points[it]) for it in sorted(points)]
            accuracies.errorbar(sorted(points), [v.mean() for v in values], [v.std() for v in values], color=f"C{i}",
                                marker="o", capsize=3, label=name)
            accuracies.legend(fontsize=8)
    accuracies.set(xlabel="outer iteration", title="accuracy (%); dotted: random real images")
    accuracies.set_ylim(bottom=0)
    accuracies.set_xlim(left=0)
    figure.suptitle(run.title())
    return figure


def figure_tsne(path, data_path, seed):
    """t-SNE (scikit-learn) of embeddings of real, PGD-attacked and synthetic images, by a network trained on the set."""
    import matplotlib.pyplot as plt
    import torch
    from sklearn.manifold import TSNE

    from attacks import attack_images
    from augment import unpack
    from files import read_synset
    from networks import get_network
    sets, meta = read_synset(path)
    trained = ("model", "epoch_eval_train", "lr_net", "batch_train", "dsa_strategy")
    if not {"dataset", "packed", "threat_model"} <= set(meta) or not set(trained) <= set(meta.get("flags", {})):
        raise InputError(f"{path} does not say its data set, packing and training; --tsne takes a set of a ROME script")
    data = utils.load_dataset(meta["dataset"], data_path)
    source = Source(Path(path), "", data.name, meta["flags"]["model"], None, sets=sets, meta=meta)
    fit_normalisation([source], data)
    check_set(source, data)
    threat, model = get_threat_model(meta["threat_model"], data), meta["flags"]["model"]
    images, labels = sets[0]
    if meta["packed"]:
        images, labels = unpack(images), labels.repeat(4)  # (4N, C, H, W)
    net = get_network(model, data.channel, data.num_classes, data.size, utils.stream_seed(seed, "tsne", "init"))
    utils.train_on_set(net, images, labels, epochs=meta["flags"]["epoch_eval_train"], lr_net=meta["flags"]["lr_net"],
                       batch_train=meta["flags"]["batch_train"], dsa_strategy=meta["flags"]["dsa_strategy"],
                       generator=utils.stream(seed, "tsne", "train"))
    real, real_labels = data.take("test", slice(600))
    attacked = attack_images(net, real, real_labels, threat, utils.stream(seed, "tsne", "attack"), targeted=False)
    with torch.no_grad():
        embeddings = [net.embed_and_classify(x)[0].numpy() for x in (real, attacked, images)]
    points = TSNE(random_state=seed, init="pca").fit_transform(np.concatenate(embeddings))
    figure, axes = plt.subplots(1, 2, figsize=(11, 5), layout="constrained")
    ends = np.cumsum([0, *map(len, embeddings)])
    for ax, shown in zip(axes, ((0, "real test images"), (1, "the same, attacked"))):
        for part, name, marker, size in ((shown[0], shown[1], ".", 40), (2, "synthetic", "*", 90)):
            colours = (labels if part == 2 else real_labels) % 10
            xy = points[ends[part]:ends[part + 1]]
            ax.scatter(xy[:, 0], xy[:, 1], s=size, c=colours, cmap="tab10", vmin=0, vmax=9, marker=marker, label=name,
                       edgecolors="k" if part == 2 else "none", linewidths=0.5)
        ax.set(xticks=[], yticks=[])
        ax.legend(loc="upper right")
    figure.suptitle(f"t-SNE of embeddings, {data.name}, {model} trained on {Path(path).name}; colour: class")
    return figure


# ---------------------------------------------------------------------------------------------------------------- main
def main():
    args = parse_args()
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    published = json.loads((HERE / "published.json").read_text())
    out, refused, evaluations, runs = Path(args.out), [], {}, {}
    result_files, run_files = find(args.results)
    for files, read, kept in ((result_files, read_rows, evaluations), (run_files, read_run, runs)):
        for path in files:
            try:
                kept[path] = read(path)
            except InputError as error:
                refused.append(str(error))
    pooled_rows, left_out = pools(evaluations)
    refused, runs = refused + left_out, list(runs.values())
    if not pooled_rows and not runs:
        raise InputError("; ".join(refused) or f"no result yet below {', '.join(args.results)}")
    all_of_it = not args.table and not args.figure

    out.mkdir(parents=True, exist_ok=True)
    tables, figures = [], []

    def draw(named_figures):
        for name, figure in named_figures:
            for ending in ("png", "pdf"):
                write_atomically(out / f"{name}.{ending}", lambda partial: figure.savefig(partial, dpi=150))  # noqa: B023
            plt.close(figure)
            figures.append(name)

    if args.tsne:
        draw([("tsne", figure_tsne(args.tsne, args.data_path, args.seed))])
    for pool, pooled in pooled_rows.items():
        for number, make in ((1, table_1), (2, table_2), (4, table_4)):
            if all_of_it or number in args.table:
                tables.append(make(pool, pooled, published, args.crei_weight))
        if all_of_it:
            tables.append(table_accuracy(pool, pooled))
        if all_of_it or 3 in args.figure:
            draw(figure_3(pool, pooled, published))
    if all_of_it or 4 in args.figure:
        draw(figure_4(runs, published))
    if all_of_it:
        tables += [table_seeds(runs), table_runs(runs)]
        names = [run.folder.name for run in runs]
        draw(("curves_" + ("" if names.count(run.folder.name) == 1 else f"{run.folder.parent.name}_") + run.folder.name,
              figure_run(run)) for run in runs)
    tables = [table for table in tables if table]
    for table in tables:
        for ending, text in (("md", table.markdown()), ("csv", table.csv()), ("tex", table.latex())):
            write_text(out / f"{table.name}.{ending}", text)
    body = "\n".join(table.markdown() for table in tables)
    if args.readme:
        replace_section(Path(args.readme), body)
    print(body)
    for line in refused:
        print(f"refused: {line}")
    print(f"{len(tables)} table(s), {len(figures)} figure(s) in {out}: {', '.join([t.name for t in tables] + figures)}")


def replace_section(path, body):
    """Put `body` between the two markers of a file. Raises InputError if they are not there."""
    text = path.read_text()
    if BEGIN not in text or END not in text:
        raise InputError(f"{path} has no lines {BEGIN} and {END}")
    text = text[:text.index(BEGIN) + len(BEGIN)] + "\n" + body + text[text.index(END):]
    write_text(path, text)


if __name__ == "__main__":
    utils.run_script(main)
