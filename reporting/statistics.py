"""Sets of several seeds: their accuracies, and the differences between them with intervals."""
import itertools
import json
import re
from typing import NamedTuple

import numpy as np

from formats.inputs import NETWORK_NAME
from reporting.metrics import THREATS, metrics_of
from reporting.records import CLEAN, attacked_itself, chance, group_by, refuse_damaged
from reporting.tables import Table, mean_std
from runtime.measures import FORMS, HEADLINE_EPS, attack_label
from runtime.safe_io import InputError

SET_NUMBER = re.compile(r"_(\d+)-\d+\.pth$")  # which set of its file evaluate.py trained it on
RADII = (1 / 255, *HEADLINE_EPS)
# The attack behind each column of a run, by threat model.
RUN_ATTACKS = {
    "published": {"robust_acc": ("PGD", True, HEADLINE_EPS[-1])},
    "pixel": {column: ("PGD20", False, eps) for column, eps in zip(
        ("robust_2_acc", "robust_4_acc", "robust_acc"), HEADLINE_EPS)}}


# ---- accuracies
def accuracies_by_set(rows, runs):
    """{(method, network, ipc): {measure: {set: [percent of each network]}}}, and the numbers of
    test images that they were measured on, {measure: {n, ...}}.

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
        counts.setdefault(measure, set()).add(n)
    return accuracies, counts


def accuracies_of_network(rows):
    """Yields (group, measure, set, [percent], n) of the attacks on a network, and its I-RR."""
    first = rows[0]
    network = NETWORK_NAME.match(first["evaluated_on"])
    number = SET_NUMBER.search(first["evaluated_on"])
    group = first["method"], network["model"] if network else "", first["ipc"]
    name = number[1] if number else first["evaluated_on"]
    for row in rows:
        measure = measure_name(row["threat_model"], row["attack"], row["targeted"], row["eps"])
        yield group, measure, name, [100 * row["accuracy"]], row["n"]
    for entry in metrics_of(rows, THREATS, 0.5):  # the weight plays no part in I-RR
        if entry["kind"] == "white-box":
            measure = f"{entry['threat_model']}: I-RR {FORMS[entry['targeted']]}"
            yield group, measure, name, [entry["I-RR"]], entry["n"]


def accuracies_of_run(run):
    """Yields the same of the last figures of a run."""
    flags, pixel = run.flags, run.flags["threat_model"] == "pixel"
    method = flags["method"] + ("-pixel" if pixel else "")
    names = {flags["method"]: method, f"{flags['method']}, hard labels": f"{method}-hard"}
    columns = {"clean_acc": CLEAN, "clamp_acc": ("Clamp-only", None, None),
               **RUN_ATTACKS["pixel" if pixel else "published"]}
    for event in run.events_of("final"):
        if event["set"] not in names or not columns.keys() <= event.keys():
            continue  # older runs under `pixel` were judged by a targeted attack
        group = names[event["set"]], event["model"], flags["ipc"]
        for column, attack in columns.items():
            measure = measure_name("pixel" if pixel else "in the run", *attack)
            for k, values in enumerate(np.array_split(event[column], flags.get("num_exp", 1))):
                name = f"{k} of seed {flags['seed']}" if flags.get("seed") else str(k)
                yield group, measure, name, 100 * values, event["n"]


def measure_name(threat, *attack):
    return f"{threat}: {attack_label(*attack)}"


def set_means(of_sets):
    """Percent, (sets,): the mean over the networks of each. of_sets: {set: [percent]}."""
    return np.array([np.mean(values) for _, values in sorted(of_sets.items())])


def spread_text(of_sets):
    """'20.3 +- 1.1' over sets; None without any."""
    return mean_std(set_means(of_sets), 1, ddof=1) if of_sets else None


def count_text(cells):
    """How many sets stand behind cells: '1 to 3', or '3' where they are all the same."""
    numbers = {len(of_sets) for of_sets in cells if of_sets}
    return " to ".join(map(str, sorted({min(numbers), max(numbers)})))


def table_robust(dataset, accuracies, counts, num_classes):
    """What sets are worth under `pixel`, beside a constant classifier."""
    names = {measure_name("pixel", *CLEAN): "clean"}
    for (attack, title), eps in itertools.product(
            (("PGD20", "PGD-20"), ("AA", "AutoAttack")), RADII):
        names[measure_name("pixel", attack, False, eps)] = f"{title} {255 * eps:g}/255"
    groups = {group: cells for group, cells in accuracies.items()
              if len(names.keys() & cells.keys()) > 1}
    if not groups:
        return None
    names = {measure: name for measure, name in names.items()
             if any(measure in cells for cells in groups.values())}
    table = Table(
        f"robust_{dataset}", f"Robustness under the valid threat model `pixel`, {dataset} "
        "(accuracy in percent; mean +- standard deviation over sets of several seeds, of each the "
        "mean over its networks)", ["set", "network", "ipc", *names.values(), "sets"])
    least = [f"{chance(dataset, num_classes):.1f}"] * len(names)
    table.rows.append(["constant classifier", "", "", *least, ""])
    for group in sorted(groups, key=lambda group: (group[1], group[2] or 0, group[0])):
        cells = [groups[group].get(measure) for measure in names]
        table.rows.append([*group, *map(spread_text, cells), count_text(cells)])
    images = "; ".join(f"{name} {', '.join(map(str, sorted(counts[measure])))}"
                       for measure, name in names.items())
    table.notes = [f"test images: {images}. PGD-20: untargeted, with a random start. Where two "
                   "numbers of sets stand, AutoAttack was made on the fewer."]
    return table


# ---- comparisons
class Comparison(NamedTuple):
    """A table of groups (method, network, ipc) side by side, or of differences between them."""

    name: str
    title: str
    measures: list
    sets: list = []  # of groups
    pairs: list = []  # of (claim or "", group, group): a claim is that the first is above the other
    dataset: str = None  # None: any
    sentences: bool = False


def read_comparisons(path):
    """The Comparisons that a JSON file asks for (docs/evaluate.md). Raises InputError."""
    with refuse_damaged(path, "file of comparisons"):
        comparisons = []
        for entry in json.loads(path.read_text()):
            sets = [(one["set"], one["network"], one["ipc"]) for one in entry.get("sets", [])]
            pairs = [(pair.get("claim", ""), (pair["of"], pair["network"], ipc),
                      (pair["than"], pair["network"], ipc))
                     for pair in entry.get("pairs", []) for ipc in pair["ipc"]]
            comparisons.append(Comparison(**{**entry, "sets": sets, "pairs": pairs}))
            if not isinstance(entry["measures"], list):
                raise TypeError(f"measures: {entry['measures']}")
        return comparisons


def compare_methods(dataset, names, accuracies):
    """What `--compare A B ...` asks for: these methods and their differences to the last one, where
    all have the same network and ipc. Measures: clean and attacks under `pixel`, else all."""
    settings = group_by(accuracies, lambda group: group[0])
    common = set.intersection(*({group[1:] for group in settings.get(name, [])} for name in names))
    sets = [(name, *setting) for setting in sorted(common, key=str) for name in names]
    if not sets:
        return []
    pairs = [("", group, (names[-1], *group[1:])) for group in sets if group[0] != names[-1]]
    measured = {measure for group in sets for measure in accuracies[group]}
    usual = [CLEAN, *itertools.product(("PGD20", "PGD", "AA"), (False,), RADII)]
    usual = [measure_name("pixel", *attack) for attack in usual]
    measures = [measure for measure in usual if measure in measured] or sorted(measured)
    name = "compare_" + re.sub(r"[^A-Za-z0-9]+", "_", "_".join(names)) + f"_{dataset}"
    return [Comparison(name, f"{', '.join(names)} on {dataset}", measures, sets),
            Comparison(f"{name}_differences", f"Differences to {names[-1]} on {dataset}", measures,
                       pairs=pairs)]


def table_comparison(asked, accuracies):
    """The table of a Comparison; None if there is nothing for it."""
    return (table_sets if asked.sets else table_differences)(asked, accuracies)


def table_sets(asked, accuracies):
    """Measures down, sets across."""
    groups = {group: [accuracies.get(group, {}).get(measure) for measure in asked.measures]
              for group in asked.sets}
    missing = [group for group, cells in groups.items() if not any(cells)]
    groups = {group: cells for group, cells in groups.items() if any(cells)}
    if not groups:
        return None
    names, models, ipcs = zip(*groups)
    common = ""
    for parts in (models, [f"{ipc} a class" for ipc in ipcs]):
        if len(set(parts)) == 1:  # the title names it, else each column
            common += f", {parts[0]}"
        else:
            names = map(", ".join, zip(names, parts))
    rows = [[measure, *map(spread_text, cells)]
            for measure, *cells in zip(asked.measures, *groups.values()) if any(cells)]
    rows.append(["sets", *map(count_text, groups.values())])
    return Table(asked.name, f"{asked.title}{common} (percent; mean +- standard deviation over "
                 "sets)", ["", *names], rows,
                 ["no results of {}, {}, {} a class".format(*group) for group in missing])


def table_differences(asked, accuracies):
    """Differences between sets, with intervals."""
    table = Table(asked.name, f"{asked.title} (percentage points, with the 95 % interval by "
                  "Welch's method over sets)", ["", *asked.measures, "sets"],
                  sentences=asked.sentences)
    missing = []
    for claim, group, reference in asked.pairs:
        name = "{} - {}, {}, {} a class".format(group[0], *reference)
        one, other = accuracies.get(group, {}), accuracies.get(reference, {})
        there = one.keys() & other.keys() & set(asked.measures)
        if not there:
            missing.append(name)
            continue
        cells = [difference_text(one[measure], other[measure], bool(claim))
                 if measure in there else None for measure in asked.measures]
        sets = count_text([cells[measure] for measure in there for cells in (one, other)])
        table.rows.append([f"{claim} ({name})" if claim else name, *cells, sets])
    if missing:
        table.notes.append(f"no results: {'; '.join(missing)}")
    return table if table.rows else None


def difference_text(one, other, claimed):
    """'+9.0 [5.1, 12.9]: supported' of two {set: [percent]}; a verdict for a claim, no interval for
    single sets."""
    difference, low, high = welch(set_means(one), set_means(other))
    if np.isnan(low):
        return f"{difference:+.1f}"
    conclusion = f": {verdict(low, high)}" if claimed else ""
    return f"{difference:+.1f} [{low:.1f}, {high:.1f}]{conclusion}"


def welch(one, other):
    """The difference of two means and its 95 % interval by Welch's method (scipy): NaN where one
    has a single value, the difference itself where nothing varies."""
    from scipy import stats
    difference = float(np.mean(one) - np.mean(other))
    if min(len(one), len(other)) < 2:
        return difference, np.nan, np.nan
    if np.ptp(one) == np.ptp(other) == 0:
        return difference, difference, difference
    interval = stats.ttest_ind(one, other, equal_var=False).confidence_interval(0.95)
    return difference, float(interval.low), float(interval.high)


def verdict(low, high):
    """What an interval says of the claim that a difference is above 0."""
    return "supported" if low > 0 else "refuted" if high < 0 else "not supported"
