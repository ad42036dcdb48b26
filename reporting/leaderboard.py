"""The leaderboard: distilled sets side by side under AutoAttack, of the file that lists them."""
import json
from pathlib import Path

from reporting.plots import new_figure
from reporting.records import (check, find_results, is_number, is_text, read_results,
                               refuse_damaged)
from reporting.statistics import (ROBUST, accuracies_by_set, bytes_of_sets, range_text,
                                  robust_cells, set_means)
from reporting.tables import Table, lay_out
from runtime.measures import KILOBYTES, kilobytes
from runtime.safe_io import InputError

BYTES = ("images", "labels", "labellers")
MARKS = {"none": "s", "hard": "o", "stored": "^", "online": "D"}  # of labels, in the figure
CLEAN_MEASURE, HEADLINE = "pixel: Clean", "pixel: AA untargeted 2/255"
MEASURED = {**dict.fromkeys(("name", "set", "network", "folder"), is_text),
            "labels": lambda v: v in MARKS,
            "ipc": lambda v: v is None or is_number(v, 1, kinds=[int]),
            "results": lambda v: isinstance(v, list) and v and all(map(is_pattern, v))}
PRINTED = {**dict.fromkeys(("name", "network", "training", "source"), is_text),
           "ipc": lambda v: is_number(v, 1, kinds=[int]),
           "figures": lambda v: all(is_text(k) and is_number(x, 0, 100) for k, x in v.items())}


def is_pattern(text):
    """Of folders below that of the leaderboard.json."""
    parts = Path(text).parts
    return parts and not {"..", "/"} & {*parts} and str(Path(text)) == text


def read_leaderboard(path):
    """(measured entries, printed ones) of a leaderboard.json; docs/leaderboard.md says what they
    hold. A measured one gets `accuracies`, {measure: {set: [percent]}}, `counts` and `bytes`, from
    its results; they are ordered by AutoAttack at 2/255. Raises InputError."""
    path = Path(path)
    with refuse_damaged(path, "leaderboard"):
        content = json.loads(path.read_text())
        for entry in content["measured"]:
            check(entry, MEASURED)
            check(entry.get("bytes", dict.fromkeys(BYTES, 0)), dict.fromkeys(BYTES, is_number))
        for entry in content["printed"]:
            check(entry, PRINTED)
    for entry in content["measured"]:
        add_accuracies(entry, path.parent)
    return (sorted(content["measured"], key=lambda entry: -mean_percent(entry, HEADLINE)),
            content["printed"])


def add_accuracies(entry, root):
    """Read the results of an entry, below `root`. Raises InputError where its figures are missing.
    """
    folders = [str(folder) for pattern in entry["results"] for folder in sorted(root.glob(pattern))]
    if not folders:
        raise InputError(f"{entry['name']}: there is no {', '.join(entry['results'])} in {root}")
    pools, runs, refused = read_results(folders)
    rows = [row for pool in pools.values() for row in pool]
    wrong = refused + [f"{data} is not CIFAR10" for data, _ in pools if data != "CIFAR10"]
    if wrong:
        raise InputError(f"{entry['name']}: {'; '.join(wrong)}")
    entry["autoattack"] = autoattack_of(find_results(folders))
    group = entry["set"], entry["network"], entry["ipc"]
    with refuse_damaged(f"{root / entry['folder']}", f"result of {' '.join(map(str, group))}"):
        accuracies, counts = accuracies_by_set(rows, runs)
        entry["accuracies"] = {name: accuracies[group][name] for name in ROBUST
                               if name in accuracies[group]}
        entry["counts"] = {name: counts[name][group] for name in entry["accuracies"]}
        entry["bytes"] = bytes_of_sets(rows, runs).get(group, entry.get("bytes"))  # older results
        mean_percent(entry, CLEAN_MEASURE), mean_percent(entry, HEADLINE)


def autoattack_of(paths):
    """'5000' queries of Square, of results.json. Raises InputError if AutoAttack was shortened."""
    queries = set()
    for path in paths:
        content = json.loads(path.read_text()) if path.name == "results.json" else {"rows": []}
        if any(row["attack"] == "AA" for row in content["rows"]):
            flags = {"aa_iterations": 0, "queries": 0, **content.get("flags", {})}
            if flags.get("quick") or flags["aa_iterations"] < 100:
                raise InputError(f"{path}: a leaderboard is not for --quick, nor for an AutoAttack "
                                 f"of {flags['aa_iterations']} iterations")
            queries.add(flags["queries"])
    return ", ".join(map(str, sorted(queries)))


def mean_percent(entry, measure):
    """Percent, over the sets."""
    return set_means(entry["accuracies"][measure]).mean()


def table_measured(entries):
    cells = {}
    for rank, entry in enumerate(entries, 1):
        row = robust_cells(entry["accuracies"], entry["counts"])
        row["kB"] = kilobytes(entry["bytes"])
        row["images"] = range_text(entry["counts"][CLEAN_MEASURE])
        row["of AutoAttack"] = range_text(entry["counts"][HEADLINE])
        row["queries"] = entry["autoattack"]
        row["results"] = f"[{entry['folder']}](../experiments/{entry['folder']})"
        cells[rank, entry["name"], entry["labels"], entry["network"], entry["ipc"] or ""] = row
    return Table(
        "leaderboard", "Distilled sets of CIFAR-10 under the valid threat model `pixel` (percent; "
        "mean +- standard deviation over sets; of AutoAttack the binomial 95 % interval)",
        *lay_out(("#", "set", "labels", "network", "ipc"), cells,
                 (*ROBUST.values(), "sets", "images", "of AutoAttack", "queries", "kB", "results")),
        [f"kB: {KILOBYTES.removeprefix('kB: ')}. images: of the test set; of AutoAttack, at 2/255; "
         "queries: of Square in it. A constant classifier has 10 % everywhere."])


def leaderboard_json(measured, printed):
    """What the table shows, as text; accuracies in percent, of each network of each set."""
    return json.dumps({"measured": measured, "printed": printed}, indent=1, default=sorted) + "\n"


def table_printed(entries):
    cells = {tuple(entry[key] for key in ("name", "network", "ipc", "training")):
             {**entry["figures"], "source": entry["source"]} for entry in entries}
    return Table("printed", "Printed by others and not measured here (percent)",
                 *lay_out(("set", "network", "ipc", "training"), cells))


def figure_leaderboard(entries):
    """AutoAttack at 2/255 against clean accuracy; the area of a point goes with the set's kB."""
    figure, (ax,) = new_figure(7, 5)
    for labels, marker in MARKS.items():
        same = [(rank, entry) for rank, entry in enumerate(entries, 1) if entry["labels"] == labels]
        if same:
            sizes = [20 + sum(entry["bytes"].values()) / 5e3 if entry["bytes"] else 20
                     for _, entry in same]
            points = [[mean_percent(entry, measure) for measure in (CLEAN_MEASURE, HEADLINE)]
                      for _, entry in same]
            ax.scatter(*zip(*points), sizes, marker=marker, alpha=0.6, label=f"labels: {labels}")
            for (rank, _), point in zip(same, points):
                ax.annotate(str(rank), point, xytext=(5, 4), textcoords="offset points",
                            fontsize=8)
    ax.axhline(10, color="grey", linestyle=":", label="constant classifier")
    ax.set(xlabel="clean accuracy (%)", ylabel="AutoAttack at 2/255 (%)", ylim=(0, None))
    ax.legend()
    return figure
