"""Results as tables, Markdown and CSV. The functions table_* return a Table or None."""
import csv
import io
import itertools
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
            if isinstance(cells[0], Compared):
                differences = [cell.difference() for cell in cells]
                columns += [[name, *(cell.ours for cell in cells)],
                            [f"{name} published", *(cell.published for cell in cells)],
                            [f"{name} difference",
                             *(x if x is None else round(x, 4) for x in differences)]]
            else:
                columns.append([name, *cells])
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(zip(*columns))
        return text.getvalue()


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
    """'44.68 +- 0.31 [43.7, 45.7]': percent, the deviation over networks, the interval; None
    without rows."""
    if not rows:
        return None
    low, high = wilson(rows)
    return f"{mean_std([row['accuracy'] for row in rows], scale=100)} [{low:.1f}, {high:.1f}]"


def attack_grid(groups):
    """Attacks down, groups across: columns, rows. groups: {title: {attack: rows}}."""
    order = (*CONTROLS, *ATTACKS)
    keys = sorted({key for cells in groups.values() for key in cells},
                  key=lambda key: (order.index(key[0]), str(key[1]), key[2] or 0))
    return ["attack", *groups], [
        [attack_name(key), *(accuracy_text(cells.get(key)) for cells in groups.values())]
        for key in keys]


def attack_name(key):
    """'CW targeted (minimum norm)' of (attack, targeted, eps)."""
    bounded = key[0] in CONTROLS or key[2] is not None
    return attack_label(*key) + ("" if bounded else " (minimum norm)")


def ipc_text(entry):
    return ", ".join(map(str, entry["ipc"]))


def raised_note(entry):
    return f"attacked accuracy is above clean accuracy ({', '.join(entry['raised'])})"


# ---- tables of the paper
def paper_table(pool, number, title, entries, metrics, paper, ipcs):
    """A row for each method and form, the threat models across, published figures in brackets.

    entries: {(method, targeted, threat model): {metric: percent, "ipc", "missing"}}.
    paper: {method: {form: {metric: percent}}}. ipcs: the settings that the paper pools.
    """
    if not entries:
        return None
    columns = map(" ".join, itertools.product(THREAT_MODELS, metrics))
    table = Table(f"table{number}_{pool.dataset}_{pool.n}", f"Table {number}, {pool.dataset}, "
                  f"{pool.n} test images: {title} (percent)", ["method", "form", "ipc", *columns])
    methods = dict.fromkeys(method for method, _, _ in entries)
    for targeted, method in itertools.product(FORMS, methods):
        found = {threat: entries[method, targeted, threat] for threat in THREAT_MODELS
                 if (method, targeted, threat) in entries}
        if found:
            figures = paper.get(method, {}).get(FORMS[targeted], {})
            cells = [compared(found.get(threat), metric, figures if threat == "published" else {},
                              ipcs) for threat, metric in itertools.product(THREAT_MODELS, metrics)]
            table.rows.append([method, FORMS[targeted], settings_text(found), *cells])
    lacking = group_by([e for e in entries.values() if e["missing"]], lambda e: (
        f"{FORMS[e['targeted']]}, {e['threat_model']}: without {', '.join(e['missing'])}"))
    table.notes = [f"{what}: {', '.join(e['method'] for e in same)}"
                   for what, same in lacking.items()]
    absent = [method for method in paper if not {method, f"{method}-pixel"} & {*methods}]
    if absent:
        table.notes.append(f"no results of {', '.join(absent)}")
    return table


def settings_text(found):
    """The IPC settings of {threat model: entry}: '1, 10', or apart where they are not the same."""
    texts = {threat: ipc_text(entry) for threat, entry in found.items()}
    if len(set(texts.values())) == 1:
        return texts.popitem()[1]
    return "; ".join(map(": ".join, texts.items()))


def compared(entry, metric, figures, ipcs):
    """A metric of an entry (or None) beside the published one."""
    if entry is None:
        return Compared(None, None, False)
    same = metric in entry and not entry["missing"] and entry["ipc"] == ipcs
    # How the paper pools its seven crafting networks is not known.
    return Compared(entry.get(metric), figures.get(metric), same and metric != "transfer")


def entries_of(pool, kind):
    """{(method, targeted, threat model): entry of `metrics_of`} of a grid."""
    return {(entry["method"], entry["targeted"], entry["threat_model"]): entry
            for entry in pool.metrics if entry["kind"] == kind}


def table_1(pool, published):
    """White-box metrics of each method."""
    entries = entries_of(pool, "white-box")
    paper = published["table1_white_box_pooled_over_ipc_1_10_50"].get(pool.dataset, {})
    table = paper_table(pool, 1, "white-box metrics", entries, METRICS, paper, [1, 10, 50])
    if table:
        table.notes[:0] = [
            "In brackets: the published figure, pooled over ipc 1, 10 and 50 and all attacks, and "
            "the difference where ours pools the same. CREI and I-CREI depend on the machine's "
            "timings as well.",
            *(f"{e['method']} {FORMS[e['targeted']]} {e['threat_model']}: {raised_note(e)}"
              for e in entries.values() if e["raised"])]
    return table


def table_2(pool, published):
    """Black-box I-RR of each method: under transfer, and under query attacks."""
    entries = {key: {**entry, "query": entry["I-RR"]}
               for key, entry in entries_of(pool, "query").items()}
    transfer = [e for e in pool.transfer if e["crafted_on"] != e["evaluated_on"]]
    for key, same in group_by(transfer, lambda e: (
            e["evaluated_on"], e["targeted"], e["threat_model"])).items():
        ipcs = list(dict.fromkeys(e["ipc"] for e in same))
        entries.setdefault(key, {"ipc": ipcs, "missing": []})["transfer"] = mean_of(same, "I-RR")
    paper = published["table2_black_box_I-RR_CIFAR10_ipc50"] if pool.dataset == "CIFAR10" else {}
    table = paper_table(pool, 2, "black-box I-RR", entries, ("transfer", "query"), paper, [50])
    if table:
        attacks = group_by(transfer, lambda e: (
            f"transfer {FORMS[e['targeted']]}, {e['threat_model']}, ipc {e['ipc']}: "
            f"{', '.join(e['attacks'])}, crafted on "))
        table.notes[:0] = [
            "Transfer: mean of I-RR over the crafting methods that are there, the method itself "
            "left out. How the paper pools its seven crafting networks is not known, so no "
            "difference is given.",
            *(what + ", ".join(dict.fromkeys(e["crafted_on"] for e in same))
              for what, same in attacks.items())]
    return table


def table_4(pool, published):
    """The ablation: methods named as its rows."""
    paper = published["table4_ablation_CIFAR10_ipc50"]
    entries = {key: entry for key, entry in entries_of(pool, "white-box").items()
               if key[0].removesuffix("-pixel") in paper}
    figures = paper if pool.dataset == "CIFAR10" else {}
    table = paper_table(pool, 4, "ablation", entries, METRICS[2:], figures, [50])
    if table and figures:
        table.notes.insert(0, "In brackets: the published figure, of ConvNet at ipc 50 under all "
                           "attacks, and the difference where ours has the same ipc and attacks.")
    return table


# ---- other tables
def table_accuracy(pool, published=None):
    """Accuracy per attack, with the controls, published threat model beside pixel."""
    groups = {(*group, threat): cells for threat in THREAT_MODELS
              for group, cells in white_box_groups(pool.rows, threat).items()}
    if not groups:
        return None
    sets = list(dict.fromkeys(group[:2] for group in groups))
    columns, rows = attack_grid({
        "{}, ipc {}, {}".format(*group): groups[group]
        for group in sorted(groups, key=lambda group: sets.index(group[:2]))})
    if len(groups) > len(rows):  # the shorter side goes across the page
        columns, *rows = map(list, zip(columns, *rows))
    return Table(f"accuracy_{pool.dataset}_{pool.n}",
                 f"Accuracy per attack, {pool.dataset}, {pool.n} test images (percent; mean +- "
                 "standard deviation over networks; in brackets the binomial 95 % interval)",
                 columns, rows)


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
    method, means, after = runs[0].flags["method"], {}, {}
    finals = [event for run in runs for event in run.events_of("final")]
    for key, events in group_by(finals, lambda event: (event["set"], event["model"])).items():
        after[key] = judged_by(events[0]), events[0]["n"]
        means[key] = [np.array([100 * np.mean(event[column]) for event in events])
                      if column in events[0] else None for column in COLUMNS]  # (seeds,)
    rows = [[key[0], *map(spread_over_seeds, means[key]), *after[key]] for key in means]
    for (name, model), others in means.items():
        if name != method and (method, model) in means:
            cells = [None if ours is None else difference_text(ours - other)
                     for ours, other in zip(means[method, model], others)]
            rows.append([f"{method} minus {name}", *cells, *after[name, model]])
    return rows


def spread_over_seeds(values):
    return None if values is None else mean_std(values, ddof=1)


def difference_text(values):
    """'+5.30 +- 1.90 *' of differences, one a seed."""
    clear = abs(values.mean()) > 2 * values.std(ddof=1)
    return mean_std(values, ddof=1, sign="+") + (" *" if clear else "")
