"""Sets of several seeds: their figures, the differences between them with their intervals, and what these say of a claim."""
import json
import re

import numpy as np

from formats.inputs import NETWORK_NAME
from reporting.records import label
from runtime.measures import HEADLINE_EPS
from runtime.safe_io import InputError
from reporting.tables import Table

OF_A_SET = re.compile(r"_(\d+)-\d+\.pth$")  # how a network's name ends that evaluate.py trained: on which set of its file
RADII = (1 / 255, *HEADLINE_EPS)
CONTROLS_OF_A_RUN = {"clean_acc": ("Clean", None, None), "clamp_acc": ("Clamp-only", None, None)}
OF_A_RUN = {  # threat model -> what its measures are called by, and the attack behind each column of a run
    "published": ("in the run", {**CONTROLS_OF_A_RUN, "robust_acc": ("PGD", True, HEADLINE_EPS[-1])}),
    "pixel": ("pixel", {**CONTROLS_OF_A_RUN, **{column: ("PGD20", False, eps) for column, eps in zip(
        ("robust_2_acc", "robust_4_acc", "robust_acc"), HEADLINE_EPS)}})}
VERDICTS = ("refuted", "not supported", "supported")


def figures_of(dataset, rows, runs):
    """Accuracies of all sets, {(method, network, ipc): {measure: {set: [percent of each network]}}}, and the number of test
    images that they were measured on, {measure: {n, ...}}.

    A measure is the threat model and the attack, such as "pixel: PGD20 untargeted 2/255". rows: of results of evaluate.py on
    this data set, each attack on the images that it was given; only networks that were attacked themselves count. runs:
    RunRecords; under `pixel` their last figures join those of evaluate.py on the same set; under `published`, where all of a
    grid is to come from the same networks, they stand beside it, as "in the run: PGD targeted 8/255". "-hard" behind a method:
    learned without its soft labels.
    """
    figures, counts = {}, {}

    def take(group, measure, one, values, n):
        figures.setdefault(group, {}).setdefault(measure, {}).setdefault(one, []).extend(100 * value for value in values)
        counts.setdefault(measure, set()).add(n)
    for row in rows:
        if row["crafted_on"] == row["evaluated_on"]:
            group, one = place_of(row)
            take(group, measure_name(row["threat_model"], row["attack"], row["targeted"], row["eps"]), one, [row["accuracy"]],
                 row["n"])
    for run in runs:
        flags, threat = run.flags, run.flags["threat_model"]
        ours = flags["method"] + ("-pixel" if threat == "pixel" else "")
        where, columns = OF_A_RUN.get(threat, OF_A_RUN["published"])  # flags.json may be a stranger's
        named = {flags["method"]: ours, f"{flags['method']}, hard labels": f"{ours}-hard"}
        for e in run.of("final") if flags["dataset"] == dataset else []:
            if e["set"] not in named or not columns.keys() <= e.keys():  # `pixel`, when it was judged by a targeted attack
                continue
            for column, attack in columns.items():
                for k, values in enumerate(np.array_split(e[column], flags.get("num_exp", 1))):
                    one = str(k) if not flags.get("seed") else f"{k} of seed {flags['seed']}"
                    take((named[e["set"]], e["model"], flags["ipc"]), measure_name(where, *attack), one, values, e["n"])
    return figures, counts


def table_robust(dataset, figures, counts, least):
    """What a set is worth under `pixel`: clean, PGD-20 and AutoAttack by set and network, beside a constant classifier, which
    gets `least` percent right."""
    wanted = {measure_name("pixel", "Clean", None, None): "clean",
              **{measure_name("pixel", attack, False, eps): f"{name} {255 * eps:g}/255"
                 for attack, name in (("PGD20", "PGD-20"), ("AA", "AutoAttack")) for eps in RADII}}
    groups = {group: cells for group, cells in figures.items() if sum(measure in wanted for measure in cells) > 1}
    if not groups:
        return None
    columns = {measure: name for measure, name in wanted.items() if any(measure in cells for cells in groups.values())}
    table = Table(f"robust_{dataset}", f"Robustness under the valid threat model `pixel`, {dataset} (accuracy in percent; mean "
                  "+- standard deviation over sets of several seeds, of each the mean over its networks)",
                  ["set", "network", "ipc", *columns.values(), "sets"], [])
    table.rows.append(["constant classifier", "", "", *(f"{least:.1f}" for _ in columns), ""])
    for (method, model, ipc), cells in sorted(groups.items(), key=lambda item: (item[0][1], item[0][2] or 0, item[0][0])):
        numbers = [len(cells[measure]) for measure in columns if measure in cells]
        table.rows.append([method, model, ipc, *(mean_and_spread(of_sets(cells.get(measure))) for measure in columns),
                           least_to_most(numbers)])
    table.notes.append("test images: " + "; ".join(f"{name} {', '.join(map(str, sorted(counts[measure])))}"
                                                   for measure, name in columns.items())
                       + ". PGD-20: untargeted, with a random start. Where two numbers of sets stand, AutoAttack was made on "
                       "the fewer.")
    return table


def measure_name(threat, attack, targeted, eps):
    return f"{threat}: {label(attack, targeted, eps)}"


def place_of(row):
    """Where the network of a row belongs among the figures: ((method, network, ipc), its set)."""
    match, of_a_set = (pattern(row["evaluated_on"]) for pattern in (NETWORK_NAME.match, OF_A_SET.search))
    return ((row["method"], match["model"] if match else "", row["ipc"]),
            of_a_set[1] if of_a_set else row["evaluated_on"])


def least_to_most(numbers):
    """'1 to 3', or '3' where they are all the same."""
    return " to ".join(map(str, sorted({min(numbers), max(numbers)})))


def of_sets(cells):
    """Percent, one figure a set, (sets,): the mean over its networks. cells: {set: [percent of each network]}, or None."""
    return np.array([np.mean(values) for _, values in sorted((cells or {}).items())])


def mean_and_spread(values):
    """'20.3 +- 1.1', the sample standard deviation; None for no values."""
    if len(values) == 0:
        return None
    return f"{np.mean(values):.1f}" + (f" +- {np.std(values, ddof=1):.1f}" if len(values) > 1 else "")


def welch(one, other):
    """The difference of two means and its 95 % interval by Welch's method (scipy): (difference, low, high). The interval is NaN
    where one of the two has a single value; where nothing varies it is the difference."""
    from scipy import stats
    difference = float(np.mean(one) - np.mean(other))
    if min(len(one), len(other)) < 2:
        return difference, np.nan, np.nan
    if np.ptp(one) == np.ptp(other) == 0:
        return difference, difference, difference
    interval = stats.ttest_ind(one, other, equal_var=False).confidence_interval(0.95)
    return difference, float(interval.low), float(interval.high)


def verdict(low, high):
    """What an interval says of the claim that a difference is above 0: one of VERDICTS."""
    return VERDICTS[2] if low > 0 else VERDICTS[0] if high < 0 else VERDICTS[1]


def read_comparisons(path):
    """The tables that a file of comparisons asks for, a list of dicts: name, title, measures (a list), and either `sets`,
    [{"set", "network", "ipc"}, ...], or `pairs`, [{"of", "than", "network", "ipc": [...], "claim" (optional)}, ...], as
    sentences with "sentences": true. Raises InputError if it is something else."""
    entries = {"sets": {"set": str, "network": str, "ipc": int},
               "pairs": {"of": str, "than": str, "network": str, "ipc": list, "claim": str}}

    def check(where, kinds):
        for key, kind in kinds.items():
            if not isinstance(where.get(key, "" if key == "claim" else None), kind):
                raise TypeError(f"{key} of {where} is no {kind.__name__}")
    if not path.is_file():
        raise InputError(f"--compare {path}: there is no such file; give one, or the names of at least two sets")
    try:
        tables = json.loads(path.read_text())
        for table in tables:
            (what,) = set(entries) & set(table)
            check(table, {"name": str, "title": str, "measures": list, what: list})
            for entry in table[what]:
                check(entry, entries[what])
        return tables
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise InputError(f"{path} is damaged or no file of comparisons ({type(error).__name__}: {error})") from None


def usual_comparison(dataset, names, figures):
    """The tables that `--compare A B ...` stands for, as `read_comparisons` returns them: figures of these sets, and the
    differences of each to the last one, for each network and number of images a class that they have in common.

    A name may leave out the "-pixel" of its threat model. Clean accuracy and attacks under `pixel`, those that were measured.
    Raises InputError for a name that no result has.
    """
    there = {method for method, _, _ in figures}
    stem = "compare_" + re.sub(r"[^A-Za-z0-9]+", "_", "_".join(names)) + f"_{dataset}"
    names = [name if name in there or f"{name}-pixel" not in there else f"{name}-pixel" for name in names]
    unknown = [name for name in names if name not in there]
    if unknown:
        raise InputError(f"--compare {' '.join(names)}: no result of {', '.join(unknown)} on {dataset}; there are "
                         f"{', '.join(sorted(there))}")
    settings = [{(model, ipc) for method, model, ipc in figures if method == name} for name in names]
    common = sorted(set.intersection(*settings), key=str)
    if not common:
        raise InputError(f"--compare {' '.join(names)}: no network and number of images a class that all of them have")
    measured = {measure for (method, model, ipc), cells in figures.items() if method in names and (model, ipc) in common
                for measure in cells}
    wanted = [measure_name("pixel", "Clean", None, None), *(measure_name("pixel", attack, False, eps)
                                                            for attack in ("PGD20", "PGD", "AA") for eps in RADII)]
    chosen = [measure for measure in wanted if measure in measured] or sorted(measured)
    *compared, reference = names
    sets = [{"set": name, "network": model, "ipc": ipc} for model, ipc in common for name in names]
    pairs = [{"of": name, "than": reference, "network": model, "ipc": [ipc]} for model, ipc in common for name in compared]
    return [{"name": stem, "title": f"{', '.join(names)} on {dataset}", "measures": chosen, "sets": sets},
            {"name": f"{stem}_differences", "title": f"Differences to {reference} on {dataset}", "measures": chosen,
             "pairs": pairs}]


def table_comparison(asked, figures):
    """A table of `read_comparisons`; None if there is nothing for it. figures: of `figures_of`."""
    return table_sets(asked, figures) if "sets" in asked else table_differences(asked, figures)


def table_sets(asked, figures):
    """Measures down, sets across: mean and standard deviation over sets."""
    found = {group: {measure: cells for measure, cells in figures.get(group, {}).items() if measure in asked["measures"]}
             for group in ((one["set"], one["network"], one["ipc"]) for one in asked["sets"])}
    groups = {group: cells for group, cells in found.items() if cells}
    measures = [measure for measure in asked["measures"] if any(measure in cells for cells in groups.values())]
    if not measures:
        return None
    names, common = [group[0] for group in groups], ""
    for part in ([network for _, network, _ in groups], [f"{ipc} a class" for *_, ipc in groups]):
        if len(set(part)) == 1:  # the title says it, else each column
            common += f", {part[0]}"
        else:
            names = [f"{name}, {its}" for name, its in zip(names, part)]
    table = Table(asked["name"], f"{asked['title']}{common} (percent; mean +- standard deviation over sets)",
                  ["", *names], [])
    table.rows = [[measure, *(mean_and_spread(of_sets(cells.get(measure))) for cells in groups.values())]
                  for measure in measures]
    table.rows.append(["sets", *(least_to_most([len(sets) for sets in cells.values()]) for cells in groups.values())])
    table.notes += [f"no results of {group[0]}, {group[1]}, {group[2]} a class" for group, cells in found.items() if not cells]
    return table


def table_differences(asked, figures):
    """Differences between sets as a Table; None if there is none to be had. asked: of `read_comparisons`.

    Where a pair has a claim, namely that `of` is above `than`, each difference says whether it supports it.
    """
    table = Table(asked["name"], f"{asked['title']} (percentage points, with the 95 % interval by Welch's method over sets)",
                  ["", *asked["measures"], "sets"], [], sentences=bool(asked.get("sentences")))
    missing = []
    for pair in asked["pairs"]:
        for ipc in pair["ipc"]:
            one, other = (figures.get((pair[key], pair["network"], ipc), {}) for key in ("of", "than"))
            name = f"{pair['of']} - {pair['than']}, {pair['network']}, {ipc} a class"
            cells, sizes = [], set()
            for measure in asked["measures"]:
                a, b = of_sets(one.get(measure)), of_sets(other.get(measure))
                if not len(a) or not len(b):
                    cells.append(None)
                    continue
                difference, low, high = welch(a, b)
                sizes |= {len(a), len(b)}
                text = f"{difference:+.1f}" + ("" if np.isnan(low) else f" [{low:.1f}, {high:.1f}]")
                cells.append(text + (f": {verdict(low, high)}" if "claim" in pair and not np.isnan(low) else ""))
            if not sizes:
                missing.append(name)
                continue
            table.rows.append([f"{pair['claim']} ({name})" if "claim" in pair else name, *cells, least_to_most(sizes)])
    if missing:
        table.notes.append(f"no results: {'; '.join(missing)}")
    return table if table.rows else None
