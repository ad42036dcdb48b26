"""The accuracies that an evaluation measures: their names in files and in tables."""
import numpy as np

# Accuracies in a row of an Evaluator (fractions) and their names in tables. `robust_acc` is at the
# eps of the threat model, 8/255; smaller ones are measured under `pixel` only.
COLUMNS = {"clean_acc": "clean", "clamp_acc": "clamp-only", "robust_2_acc": "robust 2/255",
           "robust_4_acc": "robust 4/255", "robust_acc": "robust 8/255"}
ACCURACIES = ("clean_acc", "clamp_acc", "robust_acc")  # those that every row has
CONTROLS = ("Clean", "Clamp-only")
KILOBYTES = "kB: images + labels + labellers"  # the heading of what `kilobytes` says
FULL = "full"  # the method of networks of pretrain.py: all real images
RANDOM = "-random"  # behind a method: random images in place of those of its set
HARD = "-hard"  # behind both: the classes alone, where the set has other labels
FORMS = {True: "targeted", False: "untargeted"}


def attack_label(attack, targeted, eps=None):
    """An attack as tables name it: 'PGD untargeted 8/255'. targeted: None where it has no form."""
    form = "" if targeted is None else f" {FORMS[targeted]}"
    return f"{attack}{form}" + ("" if eps is None else f" {255 * eps:g}/255")


def kilobytes(stored):
    """'307 + 0.1 + 49', in kB, of `SyntheticSet.stored_bytes()`; '' of None."""
    values = [stored[key] / 1000 for key in ("images", "labels", "labellers")] if stored else []
    return " + ".join(f"{x:.0f}" if x >= 10 else f"{x:.2g}" for x in values)


def by_model(rows):
    """Rows -> {network name: {column: list, "n": int, "bytes": of the set, where known}}, without
    columns that were not measured."""
    models = {}
    for row in rows:
        same = {key: row[key] for key in ("n", "bytes") if key in row}
        columns = models.setdefault(row["model"], same)
        for key in (*COLUMNS, "select_acc"):
            if row.get(key) is not None:
                columns.setdefault(key, []).append(row[key])
    return models


def percent(values):
    """'mean +- std' of fractions, in percent; the population std, as the field reports it."""
    return f"{100 * np.mean(values):5.2f} +- {100 * np.std(values):4.2f}"
