"""Sets of several seeds: their accuracies, and the differences between them with intervals."""
import itertools
import json
import re

import numpy as np

from formats.inputs import NETWORK_NAME
from reporting.metrics import THREATS, metrics_of
from reporting.records import CLEAN, DAMAGES, attacked_itself, chance, group_by
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
# What a file of comparisons holds: a list of tables, with "sets" or "pairs".
COMPARISON = {"name": str, "title": str, "measures": list}
COMPARED = {"sets": {"set": str, "network": str, "ipc": int},
            "pairs": {"of": str, "than": str, "network": str, "ipc": list}}


# ---- accuracies
def accuracies_by_set(rows, runs):
    """{(method, network, ipc): {measure: {set: [percent of each network]}}}, and the numbers of
    test images that they were measured on, {measure: {n, ...}}.

    A measure: "pixel: PGD20 untargeted 2/255". rows: of evaluate.py. runs: RunRecords. Their last
    figures join the rows under `pixel`; under `published`, where a grid is to come from the same
    networks, their measure is "in the run: ...". "-hard" behind a method: without its soft labels.
    """
    accuracies, counts = {}, {}
    entries = itertools.chain(accuracies_of_rows(rows), *map(accuracies_of_run, runs))
    for group, measure, name, values, n in entries:
        of_sets = accuracies.setdefault(group, {}).setdefault(measure, {})
        of_sets.setdefault(name, []).extend(100 * value for value in values)
        counts.setdefault(measure, set()).add(n)
    return accuracies, counts


def accuracies_of_rows(rows):
    """Yields (group, measure, set, accuracies, n) of networks that were attacked themselves."""
    for row in filter(attacked_itself, rows):
        measure = measure_name(row["threat_model"], row["attack"], row["targeted"], row["eps"])
        yield *group_and_set(row, measure), [row["accuracy"]], row["n"]


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
                yield group, measure, name, values, event["n"]


def measure_name(threat, attack, targeted, eps):
    return f"{threat}: {attack_label(attack, targeted, eps)}"


def group_and_set(row, measure):
    """(method, network, ipc), measure and set of a row, by the name of its network."""
    name = row["evaluated_on"]
    network, number = NETWORK_NAME.match(name), SET_NUMBER.search(name)
    group = row["method"], network["model"] if network else "", row["ipc"]
    return group, measure, number[1] if number else name


def add_improved_rr(accuracies, rows):
    """Add I-RR of each network, by threat model and form, to `accuracies_by_set`."""
    networks = group_by(filter(attacked_itself, rows), lambda row: row["evaluated_on"])
    for of_network in networks.values():
        for entry in metrics_of(of_network, THREATS, 0.5):  # the weight plays no part in I-RR
            if entry["kind"] == "white-box":
                group, measure, name = group_and_set(
                    of_network[0], f"{entry['threat_model']}: I-RR {FORMS[entry['targeted']]}")
                of_sets = accuracies[group].setdefault(measure, {})
                of_sets.setdefault(name, []).append(entry["I-RR"])


def set_means(of_sets):
    """Percent, (sets,): the mean over the networks of each. of_sets: {set: [percent]}, or None."""
    return np.array([np.mean(values) for _, values in sorted((of_sets or {}).items())])


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
    for attack, title in (("PGD20", "PGD-20"), ("AA", "AutoAttack")):
        for eps in RADII:
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


def read_comparisons(path):
    """The tables that a file asks for: dicts of COMPARISON and a list of one of COMPARED. A pair
    may have a "claim" (text), a table "sentences": true. Raises InputError for anything else."""
    def check(values, kinds):
        for key, kind in kinds.items():
            if not isinstance(values.get(key), kind):
                raise TypeError(f"{key} of {values} is no {kind.__name__}")
    if not path.is_file():
        raise InputError(f"--compare {path}: there is no such file; give one, or the names of at "
                         "least two sets")
    try:
        tables = json.loads(path.read_text())
        for table in tables:
            (kind,) = set(COMPARED) & set(table)
            check(table, {**COMPARISON, kind: list})
            for entry in table[kind]:
                check({"claim": "", **entry}, {**COMPARED[kind], "claim": str})
        return tables
    except (*DAMAGES, AttributeError) as error:
        raise InputError(f"{path} is damaged or no file of comparisons ({type(error).__name__}: "
                         f"{error})") from None


def comparisons_of(dataset, names, accuracies):
    """What `--compare A B ...` asks for, like `read_comparisons`: these sets and their differences
    to the last one, for each network and ipc that all have. Measures: clean and attacks under
    `pixel`, else all. A name may leave out "-pixel"."""
    methods = {method for method, _, _ in accuracies}
    stem = "compare_" + re.sub(r"[^A-Za-z0-9]+", "_", "_".join(names)) + f"_{dataset}"
    names = [name if name in methods or f"{name}-pixel" not in methods else f"{name}-pixel"
             for name in names]
    asked, unknown = f"--compare {' '.join(names)}", [name for name in names if name not in methods]
    if unknown:
        raise InputError(f"{asked}: no result of {', '.join(unknown)} on {dataset}; there are "
                         f"{', '.join(sorted(methods))}")
    settings = group_by(accuracies, lambda group: group[0])
    common = set.intersection(*({group[1:] for group in settings[name]} for name in names))
    if not common:
        raise InputError(f"{asked}: no network and number of images a class that all of them have")
    sets = [{"set": name, "network": model, "ipc": ipc}
            for model, ipc in sorted(common, key=str) for name in names]
    *compared, reference = names
    pairs = [{**one, "of": one["set"], "than": reference, "ipc": [one["ipc"]]}
             for one in sets if one["set"] in compared]
    measured = {measure for one in sets for measure in accuracies[tuple(one.values())]}
    usual = [CLEAN, *itertools.product(("PGD20", "PGD", "AA"), (False,), RADII)]
    usual = [measure_name("pixel", *attack) for attack in usual]
    measures = [measure for measure in usual if measure in measured] or sorted(measured)
    return [{"name": stem, "title": f"{', '.join(names)} on {dataset}", "measures": measures,
             "sets": sets},
            {"name": f"{stem}_differences", "title": f"Differences to {reference} on {dataset}",
             "measures": measures, "pairs": pairs}]


def has_any(accuracies, names):
    """Whether one of the methods, with or without "-pixel", is among the names."""
    stems = {name.removesuffix("-pixel") for name in names}
    return any(method.removesuffix("-pixel") in stems for method, _, _ in accuracies)


def table_comparison(asked, accuracies):
    """A table of `read_comparisons`; None if there is nothing for it."""
    return (table_sets if "sets" in asked else table_differences)(asked, accuracies)


def table_sets(asked, accuracies):
    """Measures down, sets across."""
    groups, missing = {}, []
    for group in ((one["set"], one["network"], one["ipc"]) for one in asked["sets"]):
        cells = accuracies.get(group, {})
        if any(measure in cells for measure in asked["measures"]):
            groups[group] = cells
        else:
            missing.append("no results of {}, {}, {} a class".format(*group))
    if not groups:
        return None
    names, common = [group[0] for group in groups], ""
    for parts in ([model for _, model, _ in groups], [f"{ipc} a class" for *_, ipc in groups]):
        if len(set(parts)) == 1:  # the title names it, else each column
            common += f", {parts[0]}"
        else:
            names = list(map(", ".join, zip(names, parts)))
    table = Table(asked["name"], f"{asked['title']}{common} (percent; mean +- standard deviation "
                  "over sets)", ["", *names], notes=missing)
    grid = {measure: [cells.get(measure) for cells in groups.values()]
            for measure in asked["measures"]}
    grid = {measure: cells for measure, cells in grid.items() if any(cells)}
    table.rows = [[measure, *map(spread_text, cells)] for measure, cells in grid.items()]
    table.rows.append(["sets", *map(count_text, zip(*grid.values()))])
    return table


def table_differences(asked, accuracies):
    """Differences between sets; a claim is that `of` is above `than`."""
    table = Table(asked["name"], f"{asked['title']} (percentage points, with the 95 % interval by "
                  "Welch's method over sets)", ["", *asked["measures"], "sets"],
                  sentences=bool(asked.get("sentences")))
    missing = []
    for pair, ipc in ((pair, ipc) for pair in asked["pairs"] for ipc in pair["ipc"]):
        name = f"{pair['of']} - {pair['than']}, {pair['network']}, {ipc} a class"
        one, other = (accuracies.get((pair[key], pair["network"], ipc), {})
                      for key in ("of", "than"))
        there = [measure for measure in asked["measures"] if measure in one and measure in other]
        cells = [difference_text(set_means(one[measure]), set_means(other[measure]),
                                 "claim" in pair) if measure in there else None
                 for measure in asked["measures"]]
        if there:
            sets = count_text([cells[measure] for measure in there for cells in (one, other)])
            claim = f"{pair['claim']} ({name})" if "claim" in pair else name
            table.rows.append([claim, *cells, sets])
        else:
            missing.append(name)
    if missing:
        table.notes.append(f"no results: {'; '.join(missing)}")
    return table if table.rows else None


def difference_text(one, other, claimed):
    """'+9.0 [5.1, 12.9]: supported'; a verdict for a claim, no interval for single sets."""
    difference, low, high = welch(one, other)
    if np.isnan(low):
        return f"{difference:+.1f}"
    conclusion = f": {verdict(low, high)}" if claimed else ""
    return f"{difference:+.1f} [{low:.1f}, {high:.1f}]{conclusion}"
