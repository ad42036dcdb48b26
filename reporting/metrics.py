"""The robustness metrics of BEARD and ROME from rows of results.json, pooled as the papers do.

The formulas are `utils.robustness_metrics`. Source: SPEC 3.3.
"""
import itertools

import numpy as np

from attack_grid import QUERY, WHITE_BOX
from attacks import ATTACKS, THREAT_MODELS, get_threat_model
from reporting.records import CLEAN, attacked_itself, group_by, mean_of, white_box_groups
from runtime.measures import FORMS
from utils import robustness_metrics

KINDS = {"white-box": WHITE_BOX, "query": QUERY}  # of attacks
THREATS = {name: get_threat_model(name) for name in THREAT_MODELS}  # for their eps


def on_most_images(rows):
    """The rows on as many test images as the clean accuracy; a slow attack may have had fewer."""
    n = max((row["n"] for row in rows), default=0)
    return [row for row in rows if row["n"] == n]


def default_eps(attack, threat):
    return ATTACKS[attack].eps(threat) if ATTACKS[attack].eps else None


def metrics_of(rows, threats=THREATS, crei_weight=0.5):
    """The metrics (percent) of each method, threat model, grid and form, pooled over IPC settings.

    rows: of results.json. threats: {name: ThreatModel}. Attacks count at their default eps; an
    accuracy is the mean over the networks of a setting. The dicts also say what was pooled, what is
    "missing" from the grid, and which attacks "raised" the accuracy.
    """
    entries, rows, methods = [], on_most_images(rows), {}
    for (method, ipc, threat), cells in white_box_groups(rows).items():
        if CLEAN in cells:
            methods.setdefault((threat, method), {})[ipc] = cells  # {ipc: {attack key: rows}}
    for ((threat, method), settings), (kind, grid), targeted in itertools.product(
            methods.items(), KINDS.items(), FORMS):
        keys = [(attack, targeted, default_eps(attack, threats[threat])) for attack in grid
                if not targeted or ATTACKS[attack].targetable]
        pooled = pool_settings(settings, keys, crei_weight)
        if pooled:
            entries.append({"method": method, "kind": kind, "threat_model": threat,
                            "targeted": targeted, **pooled})
    return entries


def pool_settings(settings, keys, crei_weight):
    """The metrics over {ipc: {attack key: rows}}; None without `keys`, or if clean is 0."""
    settings = dict(sorted(settings.items(), key=lambda setting: setting[0] or 0))
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
    return {"ipc": list(settings), "n": next(iter(attacked.values()))[0]["n"],
            "attacks": list(dict.fromkeys(key[0] for _, key in attacked)),
            "missing": [f"{key[0]} at ipc {ipc}" for ipc, key in itertools.product(settings, keys)
                        if (ipc, key) not in attacked],
            "raised": [f"{key[0]} at ipc {ipc}" for (ipc, key), rows in attacked.items()
                       if mean_of(rows) > mean_of(clean[ipc])], **metrics}


def transfer_of(rows, threats=THREATS):
    """I-RR (percent) by crafting and evaluated method, threat model, form and IPC setting (the
    paper's Figure 3). Of a method with itself only networks attacked themselves count."""
    rows = on_most_images(rows)
    settings = {row["evaluated_on"]: (row["method"], row["ipc"]) for row in rows}
    clean = {(row["threat_model"], row["evaluated_on"]): row["accuracy"]
             for row in rows if row["attack"] == "Clean"}

    def counts(row):
        attack, threat = row["attack"], row["threat_model"]
        method, ipc = settings.get(row["crafted_on"], (None, None))
        return (method is not None and ipc == row["ipc"] and attack in ATTACKS
                and row["eps"] == default_eps(attack, threats[threat])
                and (method != row["method"] or attacked_itself(row))
                and clean.get((threat, row["evaluated_on"])))

    entries = []
    for (threat, targeted, ipc, crafted_on, method), cell in group_by(
            filter(counts, rows), lambda row: (
                row["threat_model"], row["targeted"], row["ipc"], settings[row["crafted_on"]][0],
                row["method"])).items():
        attacks = group_by(cell, lambda row: row["attack"])
        clean_acc = np.mean([clean[threat, row["evaluated_on"]]
                             for same in attacks.values() for row in same])
        metrics = robustness_metrics([clean_acc], [*map(mean_of, attacks.values())], [0.0], [0.0])
        entries.append({"threat_model": threat, "targeted": targeted, "ipc": ipc,
                        "crafted_on": crafted_on, "evaluated_on": method,
                        "attacks": list(attacks), "I-RR": metrics["I-RR"]})
    return entries


def transfer_means(entries):
    """Entries like those of `metrics_of`: the mean I-RR over the other methods that the attacks
    were crafted on. entries: of `transfer_of`."""
    means = []
    for (method, targeted, threat), same in group_by(
            [e for e in entries if e["crafted_on"] != e["evaluated_on"]],
            lambda e: (e["evaluated_on"], e["targeted"], e["threat_model"])).items():
        means.append({
            "method": method, "targeted": targeted, "threat_model": threat, "kind": "transfer",
            "ipc": list(dict.fromkeys(e["ipc"] for e in same)), "missing": [],
            "attacks": list(dict.fromkeys(attack for e in same for attack in e["attacks"])),
            "crafted_on": list(dict.fromkeys(e["crafted_on"] for e in same)),
            "I-RR": mean_of(same, "I-RR")})
    return means
