"""Differences between the sets of the study: python compare.py, from the root of the repository.

A set's accuracy is that of the network trained on it; three sets of each kind. Difference of the means, and its 95 % interval by
Welch's method (scipy).
"""
import json
from pathlib import Path

from scipy import stats

SETS = Path(__file__).parent / "sets"
COLUMNS = {"clean": "clean_acc", "2/255": "robust_2_acc", "4/255": "robust_4_acc"}
PAIRS = [(f"{better}-{ipc}", f"{than}-{ipc}") for ipc in (1, 10, 50) for better, than in (
    ("ROME-unpacked", "Random-unpacked"), ("ROME", "Random"), ("ROME-4x4", "Random-4x4"), ("Baseline", "Random"), ("ROME", "Baseline"),
    ("Disagree", "Random-4x4"), ("Pool-4x4", "Random-4x4"), ("Random-4x4", "Random"), ("Random", "Random-unpacked"))]


def accuracies(name, column, method=None):
    """Of the sets of a folder, in percent; of the rows called `method`, else of the final ones."""
    lines = map(json.loads, (SETS / name / "metrics.jsonl").read_text().splitlines())
    rows = [line for line in lines if line["event"] == "evaluation" and (line["set"] == method if method else line.get("final"))]
    return [100 * row[column][0] for row in rows]


def line(name, one, other):
    cells = []
    for column in COLUMNS.values():
        a, b = one(column), other(column)
        interval = stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
        cells.append(f"{sum(a) / len(a) - sum(b) / len(b):+.1f} [{interval.low:.1f}, {interval.high:.1f}]")
    print(f"| {name} | " + " | ".join(cells) + " |")


print("| | " + " | ".join(COLUMNS) + " |\n|---|" + "---|" * len(COLUMNS))
for better, than in PAIRS:
    if (SETS / better).exists() and (SETS / than).exists():
        line(f"{better} - {than}", lambda c, n=better: accuracies(n, c), lambda c, n=than: accuracies(n, c))
for folder in sorted(path.parent for path in SETS.glob("*/metrics.jsonl")):
    hard = f"{folder.name.rsplit('-', 1)[0]}, hard labels"
    if accuracies(folder.name, "clean_acc", hard):
        line(f"{folder.name}: labels - classes alone", lambda c, f=folder: accuracies(f.name, c),
             lambda c, f=folder, h=hard: accuracies(f.name, c, h))
