"""Results as tables, Markdown and CSV. The functions table_* return a Table; None without rows."""
import csv
import io
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest

from attacks import TORCHATTACKS
from reporting.records import group_by, mean_of, white_box_groups
from runtime.measures import COLUMNS, CONTROLS, FORMS, attack_label, percent

METRICS = ("RR", "I-RR", "AE", "CREI", "I-CREI")


@dataclass
class Table:
    """rows: lists of cells: text, a number, or None where there is nothing."""

    name: str
    title: str
    columns: list
    rows: list
    notes: tuple = ()

    def markdown(self):
        notes = [f"- {note}" for note in self.notes]
        return "\n".join([f"**{self.title}**", "", *markdown_grid(self.columns, self.rows), "",
                          *notes, ""])

    def csv(self):
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([self.columns, *self.rows])
        return text.getvalue()


def markdown_grid(columns, rows):
    """Lines of a Markdown table."""
    lines = ["| " + " | ".join("" if cell is None else str(cell) for cell in row) + " |"
             for row in (columns, *rows)]
    return [lines[0], "|---" * len(columns) + "|", *lines[1:]]


def lay_out(keys, cells, columns=()):
    """Columns and rows of a table. keys: names of the first columns. cells: {values of the keys:
    {column: text}}. columns: their order, where it is not that of the cells."""
    found = {name for row in cells.values() for name in row}
    found = [name for name in columns if name in found] or list(
        dict.fromkeys(name for row in cells.values() for name in row))
    return [*keys, *found], [[*group, *map(row.get, found)] for group, row in cells.items()]


def turned(columns, rows):
    """The same table with its shorter side across the page."""
    if len(columns) > len(rows):
        columns, *rows = map(list, zip(columns, *rows))
    return columns, rows


def mean_std(values, digits=2, ddof=0, scale=1, sign=""):
    """'44.68 +- 0.31' of numbers times `scale`; of a single one '44.68'."""
    text = f"{scale * np.mean(values):{sign}.{digits}f}"
    if len(values) == 1:
        return text
    return f"{text} +- {scale * np.std(values, ddof=ddof):.{digits}f}"


# ---- accuracies of evaluate.py
def wilson(accuracy, n):
    """The binomial 95 % interval of an accuracy in percent, of n images: low, high, in percent."""
    interval = binomtest(round(accuracy / 100 * n), n).proportion_ci(method="wilson")
    return 100 * interval.low, 100 * interval.high


def with_interval(text, accuracy, n):
    """'44.68 +- 0.31 [43.7, 45.7]' of the text before the bracket; the others as for `wilson`."""
    low, high = wilson(accuracy, n)
    return f"{text} [{low:.1f}, {high:.1f}]"


def accuracy_text(rows):
    """Percent, deviation over networks, binomial interval."""
    text = mean_std([row["accuracy"] for row in rows], scale=100)
    return with_interval(text, 100 * mean_of(rows), rows[0]["n"])


def attack_name(attack):
    """'CW targeted (minimum norm)' of (attack, targeted, eps); of torchattacks, whose attacks
    without a radius are of many kinds, '(no radius)'."""
    bounded = attack[0] in CONTROLS or attack[2] is not None
    unbounded = " (no radius)" if attack[0].startswith(TORCHATTACKS) else " (minimum norm)"
    return attack_label(*attack) + ("" if bounded else unbounded)


def table_accuracy(dataset, n, rows):
    """Accuracy per attack, with the controls, published threat model beside pixel."""
    groups = sorted(white_box_groups(rows).items(), key=lambda group: str(group[0]))
    cells = {group: {attack_name(attack): accuracy_text(same) for attack, same in attacks.items()}
             for group, attacks in groups}
    return Table(
        f"accuracy_{dataset}_{n}", f"Accuracy per attack, {dataset}, {n} test images (percent; "
        "mean +- standard deviation over networks; in brackets the binomial 95 % interval)",
        *turned(*lay_out(("set", "ipc", "threat model"), cells)))


# ---- metrics
def table_metrics(dataset, n, entries, published=None):
    """The metrics of the paper's Tables 1, 2 and 4, its figures in brackets. entries: of
    `metrics_of` and `transfer_means`. published: of published.json."""
    rows = []
    for entry in sorted(entries, reverse=True,
                        key=lambda e: (e["kind"], e["targeted"], e["threat_model"])):
        figures, ipc = paper_figures(published, dataset, entry) if published else ({}, None)
        same = entry["ipc"] == ipc and not entry["missing"] and entry["kind"] != "transfer"
        text = ", ".join(entry["attacks"])
        for key, words in (("missing", "missing"), ("crafted_on", "crafted on"),
                           ("raised", "above clean accuracy")):
            if entry.get(key):
                text += f"; {words}: {', '.join(entry[key])}"
        rows.append([
            entry["method"], FORMS[entry["targeted"]], entry["threat_model"], entry["kind"],
            ", ".join(map(str, entry["ipc"])),
            *(beside(entry.get(name), figures.get(name), same) for name in METRICS), text])
    notes = ["AE, CREI and I-CREI depend on the machine's timings. Transfer: mean over the other "
             "methods that examples were crafted on."]
    if published:
        notes += ["In brackets: the paper's figure, of all attacks and of ipc 1, 10 and 50 "
                  "together (Table 1) or ipc 50 (Tables 2 and 4), and the difference where ours "
                  "pools the same. How the paper pools transfer is not known."]
    return Table(f"metrics_{dataset}_{n}",
                 f"Robustness metrics, {dataset}, {n} test images (percent)",
                 ["method", "form", "threat model", "kind", "ipc", *METRICS, "attacks"], rows,
                 notes) if rows else None


def beside(ours, published, same):
    """'36.80 (36.83, -0.03)': ours, published, and the difference if both pool the same."""
    if ours is None or published is None:
        return None if ours is None else f"{ours:.2f}"
    difference = f", {ours - published:+.2f}" if same else ""
    return f"{ours:.2f} ({published:.2f}{difference})"


def paper_figures(published, dataset, entry):
    """The figures of the paper for an entry {metric: percent}, and the ipc that they pool."""
    table_1 = published["table1_white_box_pooled_over_ipc_1_10_50"].get(dataset, {})
    table_2 = published["table2_black_box_I-RR_CIFAR10_ipc50"]
    method, form, kind = entry["method"], FORMS[entry["targeted"]], entry["kind"]
    if entry["threat_model"] != "published":
        return {}, None
    if kind == "white-box" and method in table_1:
        return table_1[method][form], [1, 10, 50]
    if dataset != "CIFAR10":
        return {}, None
    if kind == "white-box":
        return published["table4_ablation_CIFAR10_ipc50"].get(method, {}).get(form, {}), [50]
    return {"I-RR": table_2.get(method, {}).get(form, {}).get(kind)}, [50]


# ---- runs
def table_runs(runs):
    """The last figures of runs. Finished ones that differ in nothing but the seed, on the same
    device, stand together."""
    def alike(run):
        finished = run.events_of("final")
        return run.title(), run.device, run.flags_without("seed") if finished else run.folder

    rows = []
    for (title, device, _), same in group_by(runs, alike).items():
        by_seed = {run.flags.get("seed"): run for run in same}
        rows += [[title, device, *row] for row in rows_of_runs(list(by_seed.values()))]
    return Table(
        "runs", "Distilled sets (accuracy in percent, mean +- standard deviation over networks; "
        "where there are several seeds over them, of each the mean over its networks, and "
        "differences seed by seed; *: more than two of its standard deviations)",
        ["run", "device", "set", "network", *COLUMNS.values(), "judged by", "n", "seeds"],
        rows) if rows else None


def rows_of_runs(runs):
    """Cells of each set, then of the differences between the distilled set and each other one."""
    method, seeds = runs[0].flags["method"], len(runs)
    if not runs[0].events_of("final"):
        seeds = "1, not finished"
    rows, means, ends = [], {}, {}
    last = [event for run in runs for event in run.last_events()]
    for key, events in group_by(last, lambda event: (event["set"], event["model"])).items():
        means[key] = {column: np.array([100 * np.mean(event[column]) for event in events])
                      for column in COLUMNS if column in events[0]}  # {column: (seeds,)}
        ends[key] = judged_by(events[0]), events[0]["n"], seeds
        texts = {column: percent(events[0][column]).strip() if len(runs) == 1 else
                 mean_std(values, ddof=1) for column, values in means[key].items()}
        rows.append([*key, *map(texts.get, COLUMNS), *ends[key]])
    for (name, model), others in means.items():
        if len(runs) > 1 and name != method and (method, model) in means:
            ours = means[method, model]
            texts = {column: difference_text(ours[column] - others[column]) for column in others}
            rows.append([f"{method} minus {name}", model, *map(texts.get, COLUMNS),
                         *ends[name, model]])
    return rows


def judged_by(event):
    """The attack behind the robust accuracies of an evaluation."""
    # Under `pixel` it was targeted, as under `published`, until the smaller radii came.
    return "untargeted PGD-20" if "robust_2_acc" in event else "targeted PGD-10"


def difference_text(values):
    """'+5.30 +- 1.90 *' of differences, one a seed."""
    clear = abs(values.mean()) > 2 * values.std(ddof=1)
    return mean_std(values, ddof=1, sign="+") + (" *" if clear else "")
