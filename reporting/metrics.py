"""The robustness metrics of BEARD and ROME from rows of results.json, pooled as the papers do.

The formulas are `utils.robustness_metrics`. Source: SPEC 3.3.
"""
import itertools
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from attacks import ATTACKS, THREAT_MODELS, get_threat_model
from reporting.records import CLEAN, attacked_itself, group_by, mean_of, white_box_groups
from runtime.measures import FORMS
from utils import robustness_metrics

WHITE_BOX = ("FGSM", "PGD", "PGD_L2", "CW", "Deepfool", "AA")  # the grid of the paper's Table 1
QUERY = tuple(name for name, attack in ATTACKS.items() if attack.query)
GRIDS = {"white-box": WHITE_BOX, "query": QUERY}
THREATS = {name: get_threat_model(name) for name in THREAT_MODELS}  # for their eps


def on_most_images(rows):
    """The rows on as many test images as the clean accuracy; a slow attack may have had fewer."""
    n = max((row["n"] for row in rows), default=0)
    return [row for row in rows if row["n"] == n]


def default_eps(attack, threat):
    return ATTACKS[attack].eps(threat) if ATTACKS[attack].eps else None


def metrics_of(rows, threats, crei_weight):
    """The metrics (percent) of each method, threat model, grid and form, pooled over IPC settings.

    rows: of results.json. threats: {name: ThreatModel}. Attacks count at their default eps; an
    accuracy is the mean over the networks of a setting. The dicts also say what was pooled, what is
    "missing" from the grid, and which attacks "raised" the accuracy.
    """
    entries, rows = [], on_most_images(rows)
    for name, threat in threats.items():
        by_method = {}  # {method: {ipc: {attack key: rows}}}
        for (method, ipc), cells in white_box_groups(rows, name).items():
            by_method.setdefault(method, {})[ipc] = cells
        for method, settings in by_method.items():
            settings = {ipc: settings[ipc] for ipc in sorted(settings, key=lambda ipc: ipc or 0)
                        if CLEAN in settings[ipc]}
            for (kind, grid), targeted in itertools.product(GRIDS.items(), FORMS):
                keys = [(attack, targeted, default_eps(attack, threat)) for attack in grid
                        if not targeted or ATTACKS[attack].targetable]
                pooled = pool_settings(settings, keys, crei_weight)
                if pooled:
                    entries.append({"dataset": rows[0]["dataset"], "method": method,
                                    "threat_model": name, "targeted": targeted, "kind": kind,
                                    **pooled})
    return entries


def pool_settings(settings, keys, crei_weight):
    """The metrics over {ipc: {attack key: rows}}, of the attacks `keys`; None if there is none, or
    the clean accuracy is 0."""
    clean = {ipc: cells[CLEAN] for ipc, cells in settings.items()}
    attacked = {(ipc, key): cells[key] for ipc, cells in settings.items()
                for key in keys if key in cells}
    if not attacked or not any(map(mean_of, clean.values())):
        return None
    metrics = robustness_metrics(
        [mean_of(rows) for rows in clean.values()],
        [mean_of(rows) for rows in attacked.values()],
        [mean_of(rows, "seconds") for rows in clean.values()],
        [mean_of(rows, "seconds") for rows in attacked.values()], crei_weight)
    missing = [key for key in itertools.product(settings, keys) if key not in attacked]
    raised = [key for key, rows in attacked.items() if mean_of(rows) > mean_of(clean[key[0]])]
    missing, raised = ([f"{key[0]} at ipc {ipc}" for ipc, key in found]
                       for found in (missing, raised))
    return {"ipc": list(settings), "n": next(iter(attacked.values()))[0]["n"],
            "networks": [len(rows) for rows in clean.values()],
            "attacks": list(dict.fromkeys(key[0] for _, key in attacked)),
            "missing": missing, "raised": raised, **metrics}


def transfer_of(rows, threats):
    """I-RR (percent) by crafting and evaluated method, threat model, form and IPC setting (the
    paper's Figure 3). Of a method with itself only networks attacked themselves count."""
    rows = on_most_images(rows)
    clean = {(row["threat_model"], row["evaluated_on"]): row["accuracy"]
             for row in rows if row["attack"] == "Clean"}
    settings = {row["evaluated_on"]: (row["method"], row["ipc"]) for row in rows}
    cells = {}  # {setting and methods: {attack: [(accuracy, clean accuracy) of each pair]}}
    for row in rows:
        threat, attack = row["threat_model"], row["attack"]
        clean_acc = clean.get((threat, row["evaluated_on"]))
        method, ipc = settings[row["evaluated_on"]]
        crafted_on, crafted_ipc = settings.get(row["crafted_on"], (None, None))
        if attack not in ATTACKS or not clean_acc or crafted_on is None or crafted_ipc != ipc:
            continue
        if row["eps"] == default_eps(attack, threats[threat]) and (
                crafted_on != method or attacked_itself(row)):
            cell = cells.setdefault((threat, row["targeted"], ipc, crafted_on, method), {})
            cell.setdefault(attack, []).append((row["accuracy"], clean_acc))
    entries = []
    for (threat, targeted, ipc, crafted_on, method), cell in cells.items():
        accuracies = [float(np.mean([accuracy for accuracy, _ in pairs]))
                      for pairs in cell.values()]
        clean_acc = float(np.mean([clean for pairs in cell.values() for _, clean in pairs]))
        metrics = robustness_metrics([clean_acc], accuracies, [0.0], [0.0])
        entries.append({"threat_model": threat, "targeted": targeted, "ipc": ipc,
                        "crafted_on": crafted_on, "evaluated_on": method,
                        "attacks": list(cell), "I-RR": metrics["I-RR"]})
    return entries


class TransferMatrix(NamedTuple):
    """I-RR in percent, (crafted on, evaluated on), NaN where it was not measured."""

    threat_model: str
    targeted: bool
    ipc: int
    crafted_on: list
    evaluated_on: list
    values: np.ndarray

    @property
    def title(self):
        return f"{self.threat_model} {FORMS[self.targeted]}, ipc {self.ipc}"


def transfer_matrices(entries):
    """A TransferMatrix for each threat model, form and ipc of `transfer_of` that has transfer."""
    matrices = []
    groups = group_by(entries, lambda e: (e["threat_model"], e["targeted"], e["ipc"]))
    for setting, group in groups.items():
        cells = {(e["crafted_on"], e["evaluated_on"]): e["I-RR"] for e in group}
        if any(crafted_on != evaluated_on for crafted_on, evaluated_on in cells):
            crafted_on, evaluated_on = (list(dict.fromkeys(names)) for names in zip(*cells))
            values = [[cells.get((c, e), np.nan) for e in evaluated_on] for c in crafted_on]
            matrices.append(TransferMatrix(*setting, crafted_on, evaluated_on, np.array(values)))
    return matrices


@dataclass
class Pool:
    """Rows of evaluate.py that may be pooled: of one data set, on n test images."""

    dataset: str
    n: int
    rows: list
    crei_weight: float

    @cached_property
    def metrics(self):
        return metrics_of(self.rows, THREATS, self.crei_weight)

    @cached_property
    def transfer(self):
        return transfer_of(self.rows, THREATS)
