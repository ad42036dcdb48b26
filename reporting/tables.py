"""Results as tables: Markdown, CSV and LaTeX."""
import csv
import io
import re
from dataclasses import dataclass, field

import numpy as np
from scipy.stats import binomtest

from reporting.records import chance, groups_of, label, mean_of
from runtime.measures import COLUMNS, CONTROLS, HEADLINE_EPS, percent


@dataclass
class Table:
    """columns: names. rows: lists of cells: text, a number in percent, or None where there is no figure.

    A cell may also be (ours, published) or, where the two do not pool the same, (ours, published, False): no difference then.
    sentences: in Markdown each row is a line of text.
    """

    name: str
    title: str
    columns: list
    rows: list
    notes: list = field(default_factory=list)
    sentences: bool = False

    def markdown(self):
        if self.sentences:
            named = [[f"{name} {_text(cell)}" for name, cell in zip(self.columns[1:], row[1:]) if cell is not None]
                     for row in self.rows]
            said = [f"- **{_text(row[0])}**: {'; '.join(cells)}." for row, cells in zip(self.rows, named)]
            return "\n".join([f"{self.title}:", "", *said, *(f"- {note}" for note in self.notes), ""])
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


def cell_text(rows):
    """'44.68 [43.71, 45.66]': percent and the binomial 95 % interval (Wilson) for n images; with several networks
    '44.68 +- 0.31 [...]', the standard deviation over them and the interval of the mean."""
    accuracy, n = mean_of(rows), rows[0]["n"]
    low, high = binomtest(round(accuracy * n), n).proportion_ci(method="wilson")
    spread = f" +- {100 * np.std([row['accuracy'] for row in rows]):.2f}" if len(rows) > 1 else ""
    return f"{100 * accuracy:.2f}{spread} [{100 * low:.1f}, {100 * high:.1f}]"


def table_accuracy(pool, rows, attacks, threat_models):
    """Robust accuracy per attack, with the controls, published beside pixel. attacks, threat_models: names, in order."""
    dataset, n = pool
    groups = {t: groups_of([row for row in rows if row["threat_model"] == t]) for t in threat_models}
    columns = [(t, group) for group in dict.fromkeys(g for found in groups.values() for g in found) for t in threat_models
               if group in groups[t]]
    keys = {key for found in groups.values() for cells in found.values() for key in cells}
    order = (*CONTROLS, *attacks)
    keys = sorted(keys, key=lambda key: (order.index(key[0]), str(key[1]), key[2] or 0))
    if not columns:
        return None
    grid = [["attack", *(f"{method}, ipc {ipc}, {t}" for t, (method, ipc) in columns)]]
    for key in keys:
        cells = [groups[t][group].get(key) for t, group in columns]
        kind = "" if key[0] in CONTROLS or key[2] is not None else " (minimum norm)"
        grid.append([label(*key) + kind, *(cell_text(cell) if cell else None for cell in cells)])
    if len(columns) > len(keys):  # the shorter side goes across the page
        grid = [list(column) for column in zip(*grid)]
    return Table(f"accuracy_{dataset}_{n}", f"Accuracy per attack, {dataset}, {n} test images (percent; mean +- standard "
                 "deviation over networks; in brackets the binomial 95 % interval)", grid[0], grid[1:])


def table_runs(runs):
    """The last figures of each run: distilled set and baselines."""
    table = Table("runs", "Distilled sets (accuracy in percent, mean +- standard deviation over networks)",
                  ["run", "set", "network", *COLUMNS.values(), "judged by", "n", "state"], [])
    for run in runs:
        last = run.of("final")
        state = "finished"
        if not last:
            last = {(e["set"], e["model"]): e for e in run.of("evaluation")}.values()
            done = max([e["iteration"] + 1 for e in run.of("iteration")], default=0)
            state = f"going, iteration {done} of {run.flags['Iteration']} or more"
        for e in last:
            table.rows.append([run.title(), e["set"], e["model"],
                               *(percent(e[key]).strip() if key in e else None for key in COLUMNS),
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
                  ["run", "device", "set", *COLUMNS.values(), "judged by", "n", "seeds"], [])
    for (title, _, device), seeds in groups.items():
        if len(seeds) < 2:
            continue
        runs = list(seeds.values())
        means = [(e, {key: seed_means(runs, e, key) for key in COLUMNS if key in e}) for e in runs[0].of("final")]
        rows = [(e, e["set"], values, False) for e, values in means]
        rows += [(ours, f"{ours['set']} minus {other['set']}", {key: values[key] - others[key] for key in values}, True)
                 for ours, values in means if ours["set"] == runs[0].flags["method"]
                 for other, others in means if other["set"] != ours["set"] and other["model"] == ours["model"]]
        table.rows += [[title, device, name, *(_over_seeds(values.get(key), sign) for key in COLUMNS), judged_by(e),
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


def results_markdown(content, threats):
    """results.md: a table of the grid for each threat model, the metrics, transfer, and warnings."""
    rows, lines = content["rows"], ["# Robustness", ""]
    if not rows:
        return "\n".join(lines + ["No result yet.", ""])
    lines += [f"{rows[0]['dataset']}, {rows[0]['n']} test images, seed {rows[0]['seed']}, {content['device']}, torch "
              f"{content['versions']['torch']}. Accuracy in percent; mean +- standard deviation over networks; in brackets the "
              "binomial 95 % interval for that many images. Passes: forward + backward per image."
              + (" Attacks computed in bf16, and images that were wrong in bf16 alone attacked again; judged in fp32."
                 if content["flags"].get("attack_precision") == "bf16" else ""), ""]
    inputs = content.get("inputs", {})
    lines += [*(f"- {path} taken as: {said['taken_as']}" for path, said in inputs.items()), ""] if inputs else []
    lines += headline(rows, content.get("num_classes"))
    for name in threats:
        groups = groups_of([row for row in rows if row["threat_model"] == name])
        if not groups:
            continue
        networks = {group: max(len(cell) for cell in cells.values()) for group, cells in groups.items()}
        lines += [f"## Threat model {name}", "", "| | passes | " + " | ".join(
            f"{method}, ipc {ipc}" + (f" ({networks[method, ipc]} networks)" if networks[method, ipc] > 1 else "")
            for method, ipc in groups) + " |", "|---|---|" + "---|" * len(groups)]
        keys = dict.fromkeys(key for cells in groups.values() for key in cells)
        for title, wanted in (("controls", lambda attack, eps: attack in CONTROLS),
                              ("bounded by eps", lambda attack, eps: eps is not None),
                              ("minimum norm, unbounded", lambda attack, eps: attack not in CONTROLS and eps is None)):
            section = [key for key in keys if wanted(key[0], key[2])]
            if section:
                lines.append(f"| *{title}* | |" + " |" * len(groups))
            for key in section:
                cells = [groups[group].get(key) for group in groups]
                there = [cell for cell in cells if cell]
                passes = "" if key[0] in CONTROLS else "{:.0f} + {:.0f}".format(
                    *(np.mean([mean_of(cell, what) for cell in there]) for what in ("forward", "backward")))
                lines.append(f"| {label(*key)} | {passes} | " + " | ".join(cell_text(c) if c else "" for c in cells) + " |")
        lines.append("")
    metrics = content["metrics"]
    if metrics:
        names = ("RR", "I-RR", "AE", "CREI", "I-CREI")
        lines += ["## Metrics", "", "Percent, pooled over the IPC settings named. AE depends on the machine "
                  f"({content['device']}).", "",
                  "| threat model | | form | method | ipc | " + " | ".join(names) + " | attacks |",
                  "|---" * (6 + len(names)) + "|"]
        for entry in metrics:
            note = ", ".join(entry["attacks"]) + (f"; missing: {', '.join(entry['missing'])}" if entry["missing"] else "")
            lines.append("| " + " | ".join([
                entry["threat_model"], entry["kind"], "targeted" if entry["targeted"] else "untargeted", entry["method"],
                ", ".join(map(str, entry["ipc"])), *(f"{entry[name]:.2f}" for name in names), note]) + " |")
        lines.append("")
    for title, matrix, crafted, evaluated_on in transfer_matrices(content["transfer"]):
        lines += [f"## Transfer, {title}", "", "I-RR in percent; rows: crafted on, columns: evaluated on.", "",
                  "| | " + " | ".join(evaluated_on) + " |", "|---" * (1 + len(evaluated_on)) + "|"]
        lines += [f"| {method} | " + " | ".join("" if np.isnan(v) else f"{v:.2f}" for v in values) + " |"
                  for method, values in zip(crafted, matrix)] + [""]
    warnings = warnings_of(content)
    lines += ["## Warnings", "", *(f"- {warning}" for warning in warnings or ["none"]), ""]
    return "\n".join(lines)


def headline(rows, num_classes=None):
    """Clean accuracy and AutoAttack at 2, 4 and 8 of 255 under `pixel`, as lines; how to get them where they are missing."""
    groups = groups_of([row for row in rows if row["threat_model"] == "pixel"])
    keys = {("Clean", None, None): "clean", **{("AA", False, eps): f"AutoAttack {255 * eps:g}/255" for eps in HEADLINE_EPS}}
    if not any(key in cells for cells in groups.values() for key in list(keys)[1:]):
        return ["AutoAttack under the valid threat model, the figure to quote, was not measured: `--threat_model pixel "
                "--attacks AA` does.", ""]
    lines = ["## Clean, and under AutoAttack (threat model pixel)", "", "| set | ipc | " + " | ".join(keys.values()) + " |",
             "|---" * (2 + len(keys)) + "|"]
    for (method, ipc), cells in groups.items():
        found = (cell_text(cells[key]) if key in cells else "" for key in keys)
        lines.append(f"| {method} | {ipc or ''} | {' | '.join(found)} |")
    least = chance(rows[0]["dataset"], num_classes)
    return [*lines, f"| *a constant classifier* | | {' | '.join([f'{least:g}'] * len(keys))} |", ""]


def warnings_of(content):
    """What was odd about the files, accuracies that are no better than chance, failed sanity checks, and attacks that raised
    the accuracy, as lines."""
    lines = [warning for said in content.get("inputs", {}).values() for warning in said["warnings"]]
    lines += below_chance(content.get("rows", []), content.get("num_classes"))
    lines += [f"{network}, {threat}: check '{check}' failed: {result['text']}"
             for network, threats in content["sanity"].items() for threat, checks in threats.items()
             for check, result in checks.items() if not result["passed"]]
    return lines + [f"{e['method']}, {e['threat_model']}, {'targeted' if e['targeted'] else 'untargeted'}: attacked accuracy "
                    f"is above clean accuracy ({', '.join(e['raised'])})" for e in content["metrics"] if e["raised"]]


def below_chance(rows, num_classes=None):
    """A line for each method whose clean accuracy cannot be told from that of a constant classifier, or is below it."""
    lines = []
    for (method, ipc), cells in groups_of([row for row in rows if row["attack"] == "Clean"]).items():
        clean = cells["Clean", None, None]
        n, least = clean[0]["n"], chance(clean[0]["dataset"], num_classes)
        accuracy = 100 * mean_of(clean)
        low = 100 * binomtest(round(accuracy / 100 * n), n).proportion_ci(method="wilson").low
        if low <= least:
            lines.append(f"{method}, ipc {ipc}: clean accuracy {accuracy:.1f} % of {n} images is no better than that of a "
                         f"constant classifier ({least:g} %): are the labels, the normalisation and the packing right?")
    return lines


def transfer_matrices(entries):
    """Yields (title, (crafted, evaluated) array of I-RR, crafting methods, evaluated methods) where there is any transfer."""
    for group in dict.fromkeys((e["threat_model"], e["targeted"], e["ipc"]) for e in entries):
        inside = {(e["crafted_on"], e["evaluated_on"]): e["I-RR"] for e in entries
                  if (e["threat_model"], e["targeted"], e["ipc"]) == group}
        if all(crafted == evaluated for crafted, evaluated in inside):
            continue
        crafted, evaluated_on = (list(dict.fromkeys(names)) for names in zip(*inside))
        threat, targeted, ipc = group
        yield (f"{threat} {'targeted' if targeted else 'untargeted'}, ipc {ipc}",
               np.array([[inside.get((c, e), np.nan) for e in evaluated_on] for c in crafted]), crafted, evaluated_on)
