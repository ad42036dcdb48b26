"""Results as tables: Markdown, CSV and LaTeX. The functions table_* return a Table or None."""
import csv
import io
import itertools
import re
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from scipy.stats import binomtest

from attacks import ATTACKS, THREAT_MODELS
from reporting.records import group_by, mean_of, white_box_groups
from runtime.measures import COLUMNS, CONTROLS, FORMS, attack_label, percent

METRICS = ("RR", "CREI", "I-RR", "I-CREI")


class Compared(NamedTuple):
    """A figure (percent) beside the published one. comparable: both pool the same."""

    ours: float
    published: float
    comparable: bool

    def difference(self):
        known = self.comparable and self.published is not None
        return self.ours - self.published if known else None


@dataclass
class Table:
    """rows: lists of cells: text, a number, a Compared, or None where there is nothing.
    sentences: in Markdown each row is a line of text."""

    name: str
    title: str
    columns: list
    rows: list = field(default_factory=list)
    notes: list = field(default_factory=list)
    sentences: bool = False

    def markdown(self):
        lines = [f"**{self.title}**", "", *markdown_grid(self.columns, self.rows), ""]
        if self.sentences:
            lines = [f"{self.title}:", ""]
            for first, *cells in self.rows:
                named = [f"{column} {cell_text(cell)}"
                         for column, cell in zip(self.columns[1:], cells) if cell is not None]
                lines.append(f"- **{first}**: {'; '.join(named)}.")
        return "\n".join([*lines, *(f"- {note}" for note in self.notes), ""])

    def csv(self):
        """A column of Compared cells becomes three."""
        columns = []
        for name, *cells in zip(self.columns, *self.rows):
            if any(isinstance(cell, Compared) for cell in cells):
                differences = [cell.difference() for cell in cells]
                differences = [value if value is None else round(value, 4) for value in differences]
                columns += [[name, *(cell.ours for cell in cells)],
                            [f"{name} published", *(cell.published for cell in cells)],
                            [f"{name} difference", *differences]]
            else:
                columns.append([name, *cells])
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(zip(*columns))
        return text.getvalue()

    def latex(self):
        def escape(text):
            return re.sub(r"([&%_#$])", r"\\\1", text).replace("+-", r"$\pm$")

        def line(cells):
            return " & ".join(escape(cell_text(cell)) for cell in cells) + r" \\"
        alignment = "l" + "r" * (len(self.columns) - 1)
        return "\n".join([
            r"\begin{table}", r"\centering", rf"\caption{{{escape(self.title)}}}",
            rf"\begin{{tabular}}{{{alignment}}}", r"\toprule", line(self.columns), r"\midrule",
            *map(line, self.rows), r"\bottomrule", r"\end{tabular}", r"\end{table}", ""])


def cell_text(cell):
    """'36.80', or '36.80 (36.83, -0.03)': ours, published, difference."""
    if not isinstance(cell, Compared):
        return "" if cell is None else f"{cell:.2f}" if isinstance(cell, float) else str(cell)
    if cell.published is None:
        return cell_text(cell.ours)
    difference = f", {cell.difference():+.2f}" if cell.comparable else ""
    return f"{cell_text(cell.ours)} ({cell.published:.2f}{difference})".strip()


def markdown_grid(columns, rows):
    """Lines of a Markdown table."""
    lines = ["| " + " | ".join(map(cell_text, row)) + " |" for row in (columns, *rows)]
    return [lines[0], "|---" * len(columns) + "|", *lines[1:]]


def mean_std(values, digits=2, ddof=0, scale=1, sign=""):
    """'44.68 +- 0.31' of numbers times `scale`; of a single one '44.68'."""
    text = f"{scale * np.mean(values):{sign}.{digits}f}"
    if len(values) == 1:
        return text
    return f"{text} +- {scale * np.std(values, ddof=ddof):.{digits}f}"


def wilson(rows):
    """The binomial 95 % interval of the mean accuracy of rows: low, high, in percent."""
    n = rows[0]["n"]
    interval = binomtest(round(mean_of(rows) * n), n).proportion_ci(method="wilson")
    return 100 * interval.low, 100 * interval.high


def accuracy_text(rows):
    """'44.68 +- 0.31 [43.7, 45.7]': percent, the deviation over networks, the interval."""
    low, high = wilson(rows)
    return f"{mean_std([row['accuracy'] for row in rows], scale=100)} [{low:.1f}, {high:.1f}]"


def ipc_text(entry):
    return ", ".join(map(str, entry["ipc"]))


def raised_note(entry):
    return f"attacked accuracy is above clean accuracy ({', '.join(entry['raised'])})"


# ---- tables of the paper
def paper_table(pool, number, title, columns):
    return Table(f"table{number}_{pool.dataset}_{pool.n}",
                 f"Table {number}, {pool.dataset}, {pool.n} test images: {title}", columns)


def entries_of(pool, kind):
    """{(method, targeted, threat model): entry of `metrics_of`} of a grid."""
    return {(entry["method"], entry["targeted"], entry["threat_model"]): entry
            for entry in pool.metrics if entry["kind"] == kind}


def published_figure(paper, key, name):
    """A figure of the paper, or None. key: of `entries_of`."""
    method, targeted, threat = key
    figures = paper.get(method, {}).get(FORMS[targeted], {})
    return figures.get(name) if threat == "published" else None


def compared(entry, metric, published, ipc):
    """A metric of an entry (or None) beside the published one. ipc: what the paper pools."""
    comparable = bool(entry) and not entry["missing"] and entry["ipc"] == ipc
    return Compared(entry and entry[metric], published, comparable)


def grouped_notes(pairs, between):
    """A note for each first part of the pairs, its second parts behind it."""
    groups = group_by(dict.fromkeys(pairs), lambda pair: pair[0])
    return [f"{first}{between}{', '.join(second for _, second in same)}"
            for first, same in groups.items()]


def missing_notes(entries):
    """Which attacks of the grid the methods lack."""
    return grouped_notes([(f"{FORMS[e['targeted']]}, {e['threat_model']}: without "
                           f"{', '.join(e['missing'])}", e["method"])
                          for e in entries if e["missing"]], ": ")


def table_1(pool, published):
    """White-box metrics of each method, published threat model beside pixel."""
    entries = entries_of(pool, "white-box")
    if not entries:
        return None
    paper = published["table1_white_box_pooled_over_ipc_1_10_50"].get(pool.dataset, {})
    table = paper_table(pool, 1, "white-box metrics (percent)", [
        "method", "form", "ipc", *map(" ".join, itertools.product(THREAT_MODELS, METRICS))])
    methods, used = list(dict.fromkeys(method for method, _, _ in entries)), []
    for targeted, method in itertools.product(FORMS, methods):
        cells, found = [], {}
        for threat in THREAT_MODELS:
            key = method, targeted, threat
            entry = entries.get(key)
            if entry:
                found[threat] = entry
            cells += [compared(entry, metric, entry and published_figure(paper, key, metric),
                               [1, 10, 50]) for metric in METRICS]
        if found:
            used += found.values()
            ipcs = {threat: ipc_text(entry) for threat, entry in found.items()}
            same = len(set(ipcs.values())) == 1
            ipc = ipcs.popitem()[1] if same else "; ".join(map(": ".join, ipcs.items()))
            table.rows.append([method, FORMS[targeted], ipc, *cells])
    absent = [method for method in paper if method not in methods]
    table.notes = [
        "In brackets: the published figure, pooled over ipc 1, 10 and 50 and all attacks, and the "
        "difference where ours pools the same. CREI and I-CREI depend on the machine's timings as "
        "well.",
        *(f"{e['method']} {FORMS[e['targeted']]} {e['threat_model']}: {raised_note(e)}"
          for e in used if e["raised"]),
        *missing_notes(used), *([f"no results of {', '.join(absent)}"] if absent else [])]
    return table


def table_2(pool, published):
    """Black-box I-RR of each method: under transfer, and under query attacks."""
    query = entries_of(pool, "query")
    transfer = group_by([e for e in pool.transfer if e["crafted_on"] != e["evaluated_on"]],
                        lambda e: (e["evaluated_on"], e["targeted"], e["threat_model"]))
    if not query and not transfer:
        return None
    paper = published["table2_black_box_I-RR_CIFAR10_ipc50"] if pool.dataset == "CIFAR10" else {}
    kinds = itertools.product(THREAT_MODELS, ("transfer", "query"))
    table = paper_table(pool, 2, "black-box I-RR (percent)",
                        ["method", "form", *map(" ".join, kinds)])
    used = []
    methods = dict.fromkeys(method for method, _, _ in (*transfer, *query))
    for method, targeted in itertools.product(methods, FORMS):
        cells = []
        for threat in THREAT_MODELS:
            key = method, targeted, threat
            found = transfer.get(key, [])
            used += found
            mean = float(np.mean([e["I-RR"] for e in found])) if found else None
            cells += [Compared(mean, published_figure(paper, key, "transfer"), False),
                      compared(query.get(key), "I-RR", published_figure(paper, key, "query"), [50])]
        table.rows.append([method, FORMS[targeted], *cells])
    table.notes = [
        "Transfer: mean of I-RR over the crafting methods that are there, the method itself left "
        "out. How the paper pools its seven crafting networks is not known, so no difference is "
        "given.",
        *grouped_notes([(f"transfer {FORMS[e['targeted']]}, {e['threat_model']}, ipc {e['ipc']}: "
                         f"{', '.join(e['attacks'])}", e["crafted_on"]) for e in used],
                       ", crafted on ")]
    return table


def table_4(pool, published):
    """The ablation: methods named as its rows."""
    paper = published["table4_ablation_CIFAR10_ipc50"]
    entries = {key: entry for key, entry in entries_of(pool, "white-box").items()
               if key[0].removesuffix("-pixel") in paper}
    if not entries:
        return None
    table = paper_table(pool, 4, "ablation (percent)",
                        ["distilled", "ipc", "attacked", "form", *METRICS[2:]])
    figures = paper if pool.dataset == "CIFAR10" else {}
    for key, e in entries.items():
        cells = [compared(e, metric, published_figure(figures, key, metric), [50])
                 for metric in METRICS[2:]]
        if cells[0].published is not None and not table.notes:
            table.notes = ["In brackets: the published figure, of ConvNet at ipc 50 under all "
                           "attacks, and the difference where ours has the same ipc and attacks."]
        table.rows.append([e["method"], ipc_text(e), e["threat_model"], FORMS[e["targeted"]],
                           *cells])
    there = {method.removesuffix("-pixel") for method, _, _ in entries}
    table.notes += missing_notes(entries.values())
    table.notes += [f"no results of {name}" for name in paper if name not in there]
    return table


# ---- other tables
def table_accuracy(pool, published=None):
    """Accuracy per attack, with the controls, published threat model beside pixel."""
    groups = {(*group, threat): cells for threat in THREAT_MODELS
              for group, cells in white_box_groups(pool.rows, threat).items()}
    if not groups:
        return None
    sets = list(dict.fromkeys(group[:2] for group in groups))
    columns = sorted(groups, key=lambda group: sets.index(group[:2]))
    order = (*CONTROLS, *ATTACKS)
    keys = sorted({key for cells in groups.values() for key in cells},
                  key=lambda key: (order.index(key[0]), str(key[1]), key[2] or 0))
    grid = [["attack", *(f"{method}, ipc {ipc}, {threat}" for method, ipc, threat in columns)]]
    for key in keys:
        kind = "" if key[0] in CONTROLS or key[2] is not None else " (minimum norm)"
        cells = [groups[column].get(key) for column in columns]
        grid.append([attack_label(*key) + kind, *(cell and accuracy_text(cell) for cell in cells)])
    if len(columns) > len(keys):  # the shorter side goes across the page
        grid = list(map(list, zip(*grid)))
    return Table(f"accuracy_{pool.dataset}_{pool.n}",
                 f"Accuracy per attack, {pool.dataset}, {pool.n} test images (percent; mean +- "
                 "standard deviation over networks; in brackets the binomial 95 % interval)",
                 grid[0], grid[1:])


def table_runs(runs):
    """The last figures of each run: distilled set and baselines."""
    rows = []
    for run in runs:
        events, state = run.events_of("final"), "finished"
        if not events:
            events = {(e["set"], e["model"]): e for e in run.events_of("evaluation")}.values()
            done = max([e["iteration"] + 1 for e in run.events_of("iteration")], default=0)
            state = f"going, iteration {done} of {run.flags['Iteration']} or more"
        for e in events:
            cells = [percent(e[key]).strip() if key in e else None for key in COLUMNS]
            rows.append([run.title(), e["set"], e["model"], *cells, judged_by(e), e["n"], state])
    return Table(
        "runs", "Distilled sets (accuracy in percent, mean +- standard deviation over networks)",
        ["run", "set", "network", *COLUMNS.values(), "judged by", "n", "state"],
        rows) if rows else None


def judged_by(event):
    """The attack behind the robust accuracies of an evaluation."""
    # Under `pixel` it was targeted, as under `published`, until the smaller radii came.
    return "untargeted PGD-20" if "robust_2_acc" in event else "targeted PGD-10"


def table_seeds(runs):
    """Finished runs that differ in nothing but the seed, on the same device."""
    rows = []
    groups = group_by([run for run in runs if run.events_of("final")],
                      lambda run: (run.title(), run.flags_without("seed"), run.device))
    for (title, _, device), same in groups.items():
        same = list({run.flags.get("seed"): run for run in same}.values())
        if len(same) > 1:
            rows += [[title, device, *row, len(same)] for row in rows_over_seeds(same)]
    return Table(
        "seeds", "Over seeds (accuracy in percent, mean over the networks of a seed; mean +- "
        "standard deviation over seeds; differences are taken seed by seed; *: more than two of "
        "its standard deviations)",
        ["run", "device", "set", *COLUMNS.values(), "judged by", "n", "seeds"],
        rows) if rows else None


def rows_over_seeds(runs):
    """Cells of each set, then of the differences between the distilled set and each other one."""
    sets = [(event, seed_means(runs, event)) for event in runs[0].events_of("final")]
    rows = []
    for event, means in sets:
        cells = [mean_std(means[key], ddof=1) if key in means else None for key in COLUMNS]
        rows.append([event["set"], *cells, judged_by(event), event["n"]])
    for (ours, means), (other, others) in itertools.product(sets, sets):
        if (ours["set"] == runs[0].flags["method"] != other["set"]
                and ours["model"] == other["model"]):
            cells = [difference_text(means[key] - others[key]) if key in means else None
                     for key in COLUMNS]
            rows.append([f"{ours['set']} minus {other['set']}", *cells, judged_by(ours), ours["n"]])
    return rows


def seed_means(runs, event):
    """Percent, {column: (seeds,)}: the mean over the networks of a run, for the set and the network
    of `event`."""
    same = [e for run in runs for e in run.events_of("final")
            if (e["set"], e["model"]) == (event["set"], event["model"])]
    return {key: np.array([100 * np.mean(e[key]) for e in same]) for key in COLUMNS if key in event}


def difference_text(values):
    """'+5.30 +- 1.90 *' of differences, one a seed."""
    clear = abs(values.mean()) > 2 * values.std(ddof=1)
    return mean_std(values, ddof=1, sign="+") + (" *" if clear else "")
