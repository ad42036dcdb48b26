"""Sets of several seeds: their accuracies, and the differences between them with intervals."""
import itertools
import json
import math
import re

import numpy as np
from scipy.stats import ttest_ind

from formats.inputs import NETWORK_NAME
from reporting.metrics import metrics_of
from reporting.records import attacked_itself, chance, check, group_by, refuse_damaged
from reporting.tables import Table, lay_out, mean_std, turned, wilson, with_interval
from runtime.measures import (COLUMNS, FORMS, FULL, HARD, KILOBYTES, RANDOM, attack_label,
                              kilobytes)

SET_NUMBER = re.compile(r"_(\d+)-\d+\.pth$")  # which set of its file evaluate.py trained it on
ROBUST = {"pixel: Clean": "clean",
          **{f"pixel: PGD20 untargeted {eps}/255": f"PGD-20 {eps}/255" for eps in (1, 2, 4, 8)},
          **{f"pixel: AA untargeted {eps}/255": f"AutoAttack {eps}/255" for eps in (1, 2, 4, 8)}}


# ---- accuracies
def accuracies_by_set(rows, runs):
    """{(method, network, ipc): {measure: {set: [percent of each network]}}}, and the numbers of
    test images that they were measured on, {measure: {(method, network, ipc): {n, ...}}}.

    A measure: "pixel: PGD20 untargeted 2/255". rows: of evaluate.py. runs: RunRecords. Their last
    figures join the rows under `pixel`; under `published`, where a grid is to come from the same
    networks, their measure is "in the run: ...". "-hard" behind a method: without its soft labels.
    """
    accuracies, counts = {}, {}
    networks = group_by(filter(attacked_itself, rows), lambda row: row["evaluated_on"])
    for group, measure, name, values, n in itertools.chain(
            *map(accuracies_of_network, networks.values()), *map(accuracies_of_run, runs)):
        of_sets = accuracies.setdefault(group, {}).setdefault(measure, {})
        of_sets.setdefault(name, []).extend(values)
        counts.setdefault(measure, {}).setdefault(group, set()).add(n)
    return accuracies, counts


def group_of(row):
    """(method, network, ipc) of a row of evaluate.py."""
    network = NETWORK_NAME.match(row["evaluated_on"])
    return row["method"], network["model"] if network else "", row["ipc"]


def accuracies_of_network(rows):
    """Yields (group, measure, set, [percent], n) of the attacks on a network, and its I-RR."""
    group, file, of_most_images = group_of(rows[0]), rows[0]["evaluated_on"], {}
    number = SET_NUMBER.search(file)
    name = number[1] if number else file
    for row in sorted(rows, key=lambda row: row["n"]):
        label = attack_label(row["attack"], row["targeted"], row["eps"])
        of_most_images[f"{row['threat_model']}: {label}"] = row
    for measure, row in of_most_images.items():
        yield group, measure, name, [100 * row["accuracy"]], row["n"]
    for entry in metrics_of(rows):
        if entry["kind"] == "white-box":
            measure = f"{entry['threat_model']}: I-RR {FORMS[entry['targeted']]}"
            yield group, measure, name, [entry["I-RR"]], entry["n"]


def accuracies_of_run(run):
    """Yields the same of the last figures of a run."""
    flags, pixel = run.flags, run.flags["threat_model"] == "pixel"
    names = names_of_run(run)
    where, judge = ("pixel", "PGD20 untargeted") if pixel else ("in the run", "PGD targeted")
    for event in run.events_of("final"):
        if event["set"] not in names or pixel and "robust_2_acc" not in event:
            continue  # older runs under `pixel` were judged by a targeted attack
        group = names[event["set"]], event["model"], flags["ipc"]
        for column in COLUMNS.keys() & event.keys():
            measure = f"{where}: {COLUMNS[column].capitalize().replace('Robust', judge)}"
            for k, values in enumerate(np.array_split(event[column], flags.get("num_exp", 1))):
                name = f"{k} of seed {flags['seed']}" if flags.get("seed") else str(k)
                yield group, measure, name, 100 * values, event["n"]


def bytes_of_sets(rows, runs):
    """{(method, network, ipc): what each of its sets stores}, where that is known."""
    found = {group_of(row): row["bytes"] for row in rows if row.get("bytes")}
    for run in runs:
        names = names_of_run(run)
        for event in run.events_of("final"):
            if event.get("bytes") and event["set"] in names:
                found[names[event["set"]], event["model"], run.flags["ipc"]] = event["bytes"]
    return found


def names_of_run(run):
    """{set of a run: its name in tables}."""
    method = run.flags["method"] + ("-pixel" if run.flags["threat_model"] == "pixel" else "")
    return {run.flags["method"]: method, f"{run.flags['method']}, hard labels": f"{method}{HARD}"}


def set_means(of_sets):
    """Percent, (sets,): the mean over the networks of each. of_sets: {set: [percent]}."""
    return np.array([np.mean(values) for _, values in sorted(of_sets.items())])


def count_text(cells):
    """How many sets stand behind cells: '1 to 3', or '3' where they are all the same."""
    return range_text(map(len, cells))


def range_text(numbers):
    """'500 to 1000' of the numbers 1000, 500 and 700."""
    numbers = sorted(numbers)
    return " to ".join(map(str, dict.fromkeys((numbers[0], numbers[-1]))))


def cells_of_sets(measured, titles):
    """{column: '20.3 +- 1.1' over sets}, and how many they are. titles: {measure: column}."""
    found = {title: measured[measure] for measure, title in titles.items() if measure in measured}
    cells = {title: mean_std(set_means(of_sets), 1, ddof=1) for title, of_sets in found.items()}
    return cells and {**cells, "sets": count_text(found.values())}


def robust_cells(measured, counts):
    """`cells_of_sets` of ROBUST; those of AutoAttack, which is made on few images, with their
    binomial interval. measured: {measure: {set: [percent]}}; counts: {measure: {n, ...}}."""
    cells = cells_of_sets(measured, ROBUST)
    for measure, title in ROBUST.items():
        if " AA " in measure and title in cells:
            mean, n = set_means(measured[measure]).mean(), min(counts[measure])
            cells[title] = with_interval(cells[title], mean, n)
    return cells


def table_robust(dataset, rows, runs):
    """What sets are worth under `pixel`, beside a constant classifier; None without attacks."""
    accuracies, counts = accuracies_by_set(rows, runs)
    groups = sorted((group for group, cells in accuracies.items()
                     if len(ROBUST.keys() & cells.keys()) > 1),
                    key=lambda group: (group[1], group[2] or 0, group[0]))
    if not groups:
        return None
    sizes = [row.get("num_classes") for row in rows] + [run.num_classes for run in runs]
    least = f"{chance(dataset, next(filter(None, sizes), None)):.1f}"
    cells = {group: robust_cells(accuracies[group],
                                 {measure: found.get(group) for measure, found in counts.items()})
             for group in groups}
    found = {name for row in cells.values() for name in row} - {"sets"}
    for group, stored in bytes_of_sets(rows, runs).items():
        if group in cells:
            cells[group][KILOBYTES] = kilobytes(stored)
    cells = {("constant classifier", "", ""): dict.fromkeys(found, least), **cells}
    numbers = {name: sorted(set().union(*counts[measure].values()))
               for measure, name in ROBUST.items() if name in found}
    images = "; ".join(f"{name} {', '.join(map(str, ns))}" for name, ns in numbers.items())
    return Table(
        f"robust_{dataset}", f"Robustness under the valid threat model `pixel`, {dataset} "
        "(accuracy in percent; mean +- standard deviation over sets of several seeds, of each the "
        "mean over its networks; of AutoAttack also the binomial 95 % interval)",
        *lay_out(("set", "network", "ipc"), cells, (*ROBUST.values(), "sets", KILOBYTES)),
        [f"test images: {images}. PGD-20: untargeted, with a random start. Where two numbers of "
         "sets stand, AutoAttack was made on the fewer."])


def tables_of_references(dataset, rows):
    """How far sets are above random images, and above real ones: a Table for each of the two that
    was evaluated with them."""
    accuracies, counts = accuracies_by_set(rows, [])
    full = {group_of(row)[1]: group_of(row) for row in rows
            if row["method"] == FULL and trained_without_attack(row["evaluated_on"])}
    random = {group: (random_method(group[0]), *group[1:]) for group in accuracies}
    real = {group: full.get(group[1]) for group in accuracies if group[0] != FULL}
    tables = [
        table_above(f"control_{dataset}", "Above random real images of the same number, with the "
                    "same labels and training (percentage points: DD-Ranking's IOR; in brackets "
                    "the 95 % interval of that many images)", random, accuracies, counts),
        table_above(f"full_{dataset}", "Above training on all real images with hard labels "
                    "(percentage points: DD-Ranking's HLR with the other sign; likewise)", real,
                    accuracies, counts)]
    return list(filter(None, tables))


def random_method(method):
    """Of the control of a method: 'ROME-random-hard' of 'ROME-hard'."""
    base = method.removesuffix(HARD)
    return base + RANDOM + method[len(base):]


def trained_without_attack(file):
    network = NETWORK_NAME.match(file)
    return network and network["trained"] == "None"


def table_above(name, title, references, accuracies, counts):
    """references: {group: the one that it is compared with}. None where there is none of them."""
    cells = {}
    for group, reference in references.items():
        measured, other = accuracies[group], accuracies.get(reference, {})
        row = {ROBUST[measure]: above_text(
            set_means(measured[measure]).mean(), min(counts[measure][group]),
            set_means(other[measure]).mean(), min(counts[measure][reference]))
            for measure in ROBUST if measure in measured and measure in other}
        if row:
            cells[group] = row
    return Table(name, title, *lay_out(("set", "network", "ipc"), cells, ROBUST.values())
                 ) if cells else None


def above_text(one, n, other, other_n):
    """'+2.1 [-0.3, 4.5]': the difference of two accuracies in percent, of n and other_n images.

    Interval: Newcombe 1998, method 10, for independent images; those here are the same, so it is
    rather too wide.
    """
    (low, high), (other_low, other_high) = wilson(one, n), wilson(other, other_n)
    below = math.hypot(one - low, other_high - other)
    above = math.hypot(high - one, other - other_low)
    return f"{one - other:+.1f} [{one - other - below:.1f}, {one - other + above:.1f}]"


# ---- comparisons
def tables_of_comparisons(path, dataset, accuracies):
    """The Tables that a JSON file asks for (docs/evaluate.md). Raises InputError."""
    made = []
    with refuse_damaged(path, "file of comparisons"):
        for asked in json.loads(path.read_text()):
            check(asked, {"measures": lambda measures: isinstance(measures, list)})
            make = table_sets if "sets" in asked else table_differences
            if asked.get("dataset") in (None, dataset):
                made.append(make(asked, accuracies))
    return made


def table_sets(asked, accuracies):
    """Sets side by side."""
    measures = asked["measures"]
    groups = [(one["set"], one["network"], one["ipc"]) for one in asked["sets"]]
    cells = {group: cells_of_sets(accuracies.get(group, {}), dict(zip(measures, measures)))
             for group in groups}
    found = {group: row for group, row in cells.items() if row}
    return Table(
        asked["name"], f"{asked['title']} (percent; mean +- standard deviation over sets)",
        *turned(*lay_out(("set", "network", "ipc"), found, (*measures, "sets"))),
        ["no results of {}, {}, {} a class".format(*group) for group in cells.keys() - found]
    ) if found else None


def table_differences(asked, accuracies):
    """Differences between sets, with intervals, and what they say of a claim."""
    cells, missing, measures = {}, [], asked["measures"]
    for pair, ipc in ((pair, ipc) for pair in asked["pairs"] for ipc in pair["ipc"]):
        label = f"{pair['of']} - {pair['than']}, {pair['network']}, {ipc} a class"
        one, other = (accuracies.get((pair[key], pair["network"], ipc), {})
                      for key in ("of", "than"))
        claim = pair.get("claim")
        found = [measure for measure in measures if measure in one and measure in other]
        if not found:
            missing.append(f"no results: {label}")
            continue
        row = {name: difference_with_interval(one[name], other[name], claim) for name in found}
        row["sets"] = count_text([cell[name] for name in found for cell in (one, other)])
        cells[(f"{claim} ({label})" if claim else label,)] = row
    return Table(
        asked["name"], f"{asked['title']} (percentage points, with the 95 % interval by Welch's "
        "method over sets)", *lay_out([""], cells, (*measures, "sets")), missing
    ) if cells else None


def difference_with_interval(one, other, claim=None):
    """'+9.0 [5.1, 12.9]: supported' of two {set: [percent]}, with Welch's interval; a verdict for a
    claim, no interval for single sets."""
    one, other = set_means(one), set_means(other)
    low = high = one.mean() - other.mean()
    text = f"{low:+.1f}"
    if min(len(one), len(other)) < 2:
        return text
    if np.ptp(one) > 0 or np.ptp(other) > 0:
        low, high = ttest_ind(one, other, equal_var=False).confidence_interval(0.95)
    verdict = "supported" if low > 0 else "refuted" if high < 0 else "not supported"
    return f"{text} [{low:.1f}, {high:.1f}]" + (f": {verdict}" if claim else "")
