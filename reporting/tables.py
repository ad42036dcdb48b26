"""Results as tables: Markdown, CSV and LaTeX. The functions table_* return a Table, or None."""
import csv
import io
import itertools
import re
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from scipy.stats import binomtest

from attacks import ATTACKS, THREAT_MODELS
from reporting.records import mean_of, of_threat, white_box_groups
from runtime.measures import COLUMNS, CONTROLS, FORMS, attack_label, percent

METRICS = ("RR", "CREI", "I-RR", "I-CREI")
PAPER_IPC = [1, 10, 50]  # what Table 1 pools


class Compared(NamedTuple):
    """A figure (percent) beside the published one. comparable: both pool the same."""

    ours: float = None
    published: float = None
    comparable: bool = True

    @property
    def difference(self):
        known = self.ours is not None and self.published is not None
        return self.ours - self.published if known and self.comparable else None


@dataclass
class Table:
    """rows: lists of cells: text, a number in percent, a Compared, or None where there is nothing.
    sentences: in Markdown each row is a line of text."""

    name: str
    title: str
    columns: list
    rows: list = field(default_factory=list)
    notes: list = field(default_factory=list)
    sentences: bool = False

    def markdown(self):
        notes = [f"- {note}" for note in self.notes]
        if not self.sentences:
            grid = markdown_grid(self.columns, self.rows)
            return "\n".join([f"**{self.title}**", "", *grid, "", *notes, ""])
        lines = [f"{self.title}:", ""]
        for first, *cells in self.rows:
            named = [f"{column} {cell_text(cell)}" for column, cell in zip(self.columns[1:], cells)
                     if cell is not None]
            lines.append(f"- **{first}**: {'; '.join(named)}.")
        return "\n".join([*lines, *notes, ""])

    def csv(self):
        """A column of Compared cells becomes three."""
        columns = []
        for name, *cells in zip(self.columns, *self.rows):
            columns.append([name, *(cell[0] if isinstance(cell, Compared) else cell
                                    for cell in cells)])
            if any(isinstance(cell, Compared) for cell in cells):
                differences = [None if cell.difference is None else round(cell.difference, 4)
                               for cell in cells]
                columns.append([f"{name} published", *(cell.published for cell in cells)])
                columns.append([f"{name} difference", *differences])
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(zip(*columns))
        return text.getvalue()

    def latex(self):
        def line(cells):
            return " & ".join(escape(cell_text(cell)) for cell in cells) + r" \\"

        def escape(text):
            return re.sub(r"([&%_#$])", r"\\\1", text).replace("+-", r"$\pm$")
        return "\n".join([
            r"\begin{table}", r"\centering", rf"\caption{{{escape(self.title)}}}",
            rf"\begin{{tabular}}{{l{'r' * (len(self.columns) - 1)}}}", r"\toprule",
            line(self.columns), r"\midrule", *map(line, self.rows),
            r"\bottomrule", r"\end{tabular}", r"\end{table}", ""])


def cell_text(cell):
    """'36.80', or '36.80 (36.83, -0.03)': ours, published, difference."""
    if isinstance(cell, Compared) and cell.published is not None:
        difference = "" if cell.difference is None else f", {cell.difference:+.2f}"
        return f"{cell_text(cell.ours)} ({cell.published:.2f}{difference})".strip()
    if isinstance(cell, Compared):
        cell = cell.ours
    return "" if cell is None else f"{cell:.2f}" if isinstance(cell, float) else str(cell)


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
    """The binomial 95 % interval (Wilson) of the mean accuracy of rows: low, high, in percent."""
    n = rows[0]["n"]
    interval = binomtest(round(mean_of(rows) * n), n).proportion_ci(method="wilson")
    return 100 * interval.low, 100 * interval.high


def accuracy_text(rows):
    """'44.68 +- 0.31 [43.7, 45.7]': percent, the standard deviation over networks, `wilson`."""
    low, high = wilson(rows)
    return f"{mean_std([row['accuracy'] for row in rows], scale=100)} [{low:.1f}, {high:.1f}]"


def ipc_text(ipcs):
    return ", ".join(map(str, ipcs))


# ------------------------------------------------------------------------------ tables of the paper
def entries_of(pool, kind):
    """{(method, targeted, threat model): entry of `metrics_of`} of an attack grid."""
    return {(entry["method"], entry["targeted"], entry["threat_model"]): entry
            for entry in pool.metrics if entry["kind"] == kind}


def published_figures(paper, method, targeted, threat):
    """The published figures by metric; {} where there are none."""
    return paper.get(method, {}).get(FORMS[targeted], {}) if threat == "published" else {}


def compared(entry, metrics, paper, ipc):
    """A cell for each metric of an entry (or None). ipc: the settings that the paper pools."""
    if not entry:
        return [Compared(None, paper.get(metric)) for metric in metrics]
    comparable = not entry["missing"] and entry["ipc"] == ipc
    return [Compared(entry[metric], paper.get(metric), comparable) for metric in metrics]


def grouped_notes(pairs, between):
    """A note for each first part, with all its second parts behind it."""
    groups = {}
    for first, second in pairs:
        groups.setdefault(first, {})[second] = True
    return [f"{first}{between}{', '.join(seconds)}" for first, seconds in groups.items()]


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
    methods = list(dict.fromkeys(method for method, _, _ in entries))
    names = [f"{threat} {metric}" for threat in THREAT_MODELS for metric in METRICS]
    table = Table(
        f"table1_{pool.dataset}_{pool.n}",
        f"Table 1, {pool.dataset}, {pool.n} test images: white-box metrics (percent)",
        ["method", "form", "ipc", *names])
    used = []
    for targeted, method in itertools.product(FORMS, methods):
        found = [entries.get((method, targeted, threat)) for threat in THREAT_MODELS]
        if not any(found):
            continue
        ipcs, cells = {}, []
        for threat, entry in zip(THREAT_MODELS, found):
            figures = published_figures(paper, method, targeted, threat) if entry else {}
            cells += compared(entry, METRICS, figures, PAPER_IPC)
            if entry:
                used.append(entry)
                ipcs[threat] = ipc_text(entry["ipc"])
        same = len(set(ipcs.values())) == 1
        ipc = ipcs.popitem()[1] if same else "; ".join(map(": ".join, ipcs.items()))
        table.rows.append([method, FORMS[targeted], ipc, *cells])
    raised = [f"{e['method']} {FORMS[e['targeted']]} {e['threat_model']}: attacked accuracy is "
              f"above clean accuracy ({', '.join(e['raised'])})" for e in used if e["raised"]]
    absent = [method for method in paper if method not in methods]
    table.notes = [
        "In brackets: the published figure, pooled over ipc 1, 10 and 50 and all attacks, and the "
        "difference where ours pools the same. CREI and I-CREI depend on the machine's timings as "
        "well.", *raised, *missing_notes(used)]
    if absent:
        table.notes.append(f"no results of {', '.join(absent)}")
    return table


def table_2(pool, published):
    """Black-box I-RR of each method: under transfer, mean over the other crafting methods, and
    under query attacks."""
    query, transfer = entries_of(pool, "query"), {}
    for e in pool.transfer:
        if e["crafted_on"] != e["evaluated_on"]:
            key = (e["evaluated_on"], e["targeted"], e["threat_model"])
            transfer.setdefault(key, []).append(e)
    if not query and not transfer:
        return None
    paper = published["table2_black_box_I-RR_CIFAR10_ipc50"] if pool.dataset == "CIFAR10" else {}
    names = [f"{threat} {kind}" for threat in THREAT_MODELS for kind in ("transfer", "query")]
    table = Table(f"table2_{pool.dataset}_{pool.n}",
                  f"Table 2, {pool.dataset}, {pool.n} test images: black-box I-RR (percent)",
                  ["method", "form", *names])
    pairs = []
    methods = dict.fromkeys(method for method, _, _ in (*transfer, *query))
    for method, (targeted, form) in itertools.product(methods, FORMS.items()):
        cells = []
        for threat in THREAT_MODELS:
            key = (method, targeted, threat)
            figures, found = published_figures(paper, *key), transfer.get(key, [])
            mean = float(np.mean([e["I-RR"] for e in found])) if found else None
            cells.append(Compared(mean, figures.get("transfer"), comparable=False))
            cells += compared(query.get(key), ["I-RR"], {"I-RR": figures.get("query")}, [50])
            pairs += [(f"transfer {form}, {threat}, ipc {e['ipc']}: {', '.join(e['attacks'])}",
                       e["crafted_on"]) for e in found]
        table.rows.append([method, form, *cells])
    table.notes = [
        "Transfer: mean of I-RR over the crafting methods that are there, the method itself left "
        "out. How the paper pools its seven crafting networks is not known, so no difference is "
        "given.", *grouped_notes(pairs, ", crafted on ")]
    return table


def table_4(pool, published):
    """The ablation: methods named as its rows."""
    paper = published["table4_ablation_CIFAR10_ipc50"]
    entries = [entry for entry in entries_of(pool, "white-box").values()
               if entry["method"].removesuffix("-pixel") in paper]
    if not entries:
        return None
    table = Table(f"table4_{pool.dataset}_{pool.n}",
                  f"Table 4, {pool.dataset}, {pool.n} test images: ablation (percent)",
                  ["distilled", "ipc", "attacked", "form", "I-RR", "I-CREI"])
    for e in entries:
        key = (e["method"], e["targeted"], e["threat_model"])
        figures = published_figures(paper if pool.dataset == "CIFAR10" else {}, *key)
        table.rows.append([e["method"], ipc_text(e["ipc"]), e["threat_model"],
                           FORMS[e["targeted"]], *compared(e, METRICS[2:], figures, [50])])
    if any(cell.published is not None for row in table.rows for cell in row[4:]):
        table.notes.append("In brackets: the published figure, of ConvNet at ipc 50 under all "
                           "attacks, and the difference where ours has the same ipc and attacks.")
    there = {entry["method"].removesuffix("-pixel") for entry in entries}
    table.notes += missing_notes(entries)
    table.notes += [f"no results of {name}" for name in paper if name not in there]
    return table


# ------------------------------------------------------------------------- other tables of all rows
def table_accuracy(pool, published=None):
    """Robust accuracy per attack, with the controls, published beside pixel."""
    groups = {threat: white_box_groups(of_threat(pool.rows, threat)) for threat in THREAT_MODELS}
    names = dict.fromkeys(group for found in groups.values() for group in found)
    columns = [(threat, group) for group in names for threat in THREAT_MODELS
               if group in groups[threat]]
    if not columns:
        return None
    keys = {key for threat, group in columns for key in groups[threat][group]}
    order = (*CONTROLS, *ATTACKS)
    keys = sorted(keys, key=lambda key: (order.index(key[0]), str(key[1]), key[2] or 0))
    grid = [["attack", *(f"{method}, ipc {ipc}, {threat}" for threat, (method, ipc) in columns)]]
    for key in keys:
        kind = "" if key[0] in CONTROLS or key[2] is not None else " (minimum norm)"
        cells = [groups[threat][group].get(key) for threat, group in columns]
        grid.append([attack_label(*key) + kind, *(cell and accuracy_text(cell) for cell in cells)])
    if len(columns) > len(keys):  # the shorter side goes across the page
        grid = list(map(list, zip(*grid)))
    return Table(f"accuracy_{pool.dataset}_{pool.n}",
                 f"Accuracy per attack, {pool.dataset}, {pool.n} test images (percent; mean +- "
                 "standard deviation over networks; in brackets the binomial 95 % interval)",
                 grid[0], grid[1:])


def table_runs(runs):
    """The last figures of each run: distilled set and baselines."""
    table = Table(
        "runs", "Distilled sets (accuracy in percent, mean +- standard deviation over networks)",
        ["run", "set", "network", *COLUMNS.values(), "judged by", "n", "state"])
    for run in runs:
        events, state = run.events_of("final"), "finished"
        if not events:
            last = {(e["set"], e["model"]): e for e in run.events_of("evaluation")}
            done = max([e["iteration"] + 1 for e in run.events_of("iteration")], default=0)
            events = last.values()
            state = f"going, iteration {done} of {run.flags['Iteration']} or more"
        for e in events:
            cells = [percent(e[key]).strip() if key in e else None for key in COLUMNS]
            table.rows.append([run.title(), e["set"], e["model"], *cells, judged_by(e), e["n"],
                               state])
    return table if table.rows else None


def judged_by(event):
    """The attack behind the robust accuracies of an evaluation. Under `pixel` it was targeted, as
    under `published`, until the smaller radii came."""
    return "untargeted PGD-20" if "robust_2_acc" in event else "targeted PGD-10"


def table_seeds(runs):
    """Finished runs that differ in nothing but the seed, on the same device."""
    groups = {}
    for run in runs:
        if run.events_of("final"):
            group = groups.setdefault((run.title(), run.flags_without("seed"), run.device), {})
            group[run.flags.get("seed")] = run
    table = Table(
        "seeds", "Over seeds (accuracy in percent, mean over the networks of a seed; mean +- "
        "standard deviation over seeds; differences are taken seed by seed; *: more than two of "
        "its standard deviations)",
        ["run", "device", "set", *COLUMNS.values(), "judged by", "n", "seeds"])
    for (title, _, device), seeds in groups.items():
        if len(seeds) > 1:
            table.rows += [[title, device, *row, len(seeds)] for row in rows_over_seeds(seeds)]
    return table if table.rows else None


def rows_over_seeds(seeds):
    """Cells of each set, then of the differences between the distilled set and each other one.

    seeds: {seed: RunRecord}."""
    runs = list(seeds.values())
    sets = [(event, seed_means(runs, event)) for event in runs[0].events_of("final")]
    rows = []
    for event, means in sets:
        cells = [mean_std(means[key], ddof=1) if key in means else None for key in COLUMNS]
        rows.append([event["set"], *cells, judged_by(event), event["n"]])
    for ours, means in sets:
        for other, others in sets if ours["set"] == runs[0].flags["method"] else ():
            if other["set"] != ours["set"] and other["model"] == ours["model"]:
                cells = [difference_text(means[key] - others[key]) if key in means else None
                         for key in COLUMNS]
                rows.append([f"{ours['set']} minus {other['set']}", *cells, judged_by(ours),
                             ours["n"]])
    return rows


def seed_means(runs, event):
    """Percent, {column: (seeds,)}: the mean over the networks of each run, for the set and the
    network of `event`."""
    same = [e for run in runs for e in run.events_of("final")
            if (e["set"], e["model"]) == (event["set"], event["model"])]
    return {key: np.array([100 * np.mean(e[key]) for e in same]) for key in COLUMNS if key in event}


def difference_text(values):
    """'+5.30 +- 1.90 *' of differences, one a seed."""
    clear = abs(values.mean()) > 2 * values.std(ddof=1)
    return mean_std(values, ddof=1, sign="+") + (" *" if clear else "")
