"""results.md: what evaluate.py found, for a reader."""
import numpy as np

from attacks import THREAT_MODELS
from reporting.metrics import transfer_matrices
from reporting.records import CLEAN, chance, mean_of, white_box_groups
from reporting.tables import (
    accuracy_text, attack_grid, ipc_text, markdown_grid, raised_note, wilson)
from runtime.measures import FORMS, HEADLINE_EPS

METRICS = ("RR", "I-RR", "AE", "CREI", "I-CREI")


def results_markdown(content):
    """content: of results.json. The headline, a grid for each threat model, metrics, transfer,
    warnings."""
    rows = content["rows"]
    if not rows:
        return "# Robustness\n\nNo result yet.\n"
    lines = ["# Robustness", "", *introduction(content), "", *headline(content), ""]
    for name in THREAT_MODELS:
        groups = {f"{method}, ipc {ipc}": cells
                  for (method, ipc), cells in white_box_groups(rows, name).items()}
        if groups:
            lines += [f"## Threat model {name}", "", *markdown_grid(*attack_grid(groups)), ""]
    if content["metrics"]:
        lines += ["## Metrics", "", "Percent, pooled over the IPC settings named. AE depends on "
                  f"the machine ({content['device']}).", "",
                  *metrics_grid(content["metrics"]), ""]
    for matrix in transfer_matrices(content["transfer"]):
        cells = np.where(np.isnan(matrix.values), None, matrix.values).tolist()
        lines += [f"## Transfer, {matrix.title}", "",
                  "I-RR in percent; rows: crafted on, columns: evaluated on.", "",
                  *markdown_grid(["", *matrix.evaluated_on],
                                 ([name, *line] for name, line in zip(matrix.crafted_on, cells))),
                  ""]
    warnings = warnings_of(content) or ["none"]
    return "\n".join([*lines, "## Warnings", "", *(f"- {text}" for text in warnings), ""])


def introduction(content):
    first = content["rows"][0]
    text = (f"{first['dataset']}, {first['n']} test images, seed {first['seed']}, "
            f"{content['device']}, torch {content['versions']['torch']}. Accuracy in percent; mean "
            "+- standard deviation over networks; in brackets the binomial 95 % interval for that "
            "many images. Attacks are bounded by eps; those of minimum norm are not.")
    if content["flags"].get("attack_precision") == "bf16":
        text += (" Attacks computed in bf16, and images that were wrong in bf16 alone attacked "
                 "again; judged in fp32.")
    inputs = [f"- {path} taken as: {about['taken_as']}"
              for path, about in content.get("inputs", {}).items()]
    return [text, "", *inputs] if inputs else [text]


def headline(content):
    """Clean accuracy and AutoAttack at 2, 4 and 8 of 255 under `pixel`; how to get them where they
    are missing."""
    groups = white_box_groups(content["rows"], "pixel")
    attacks = {("AA", False, eps): f"AutoAttack {255 * eps:g}/255" for eps in HEADLINE_EPS}
    if not any(key in cells for cells in groups.values() for key in attacks):
        return ["AutoAttack under the valid threat model, the figure to quote, was not measured: "
                "`--threat_model pixel --attacks AA` does."]
    columns = {CLEAN: "clean", **attacks}
    rows = [[*group, *(accuracy_text(cells.get(key)) for key in columns)]
            for group, cells in groups.items()]
    least = chance(content["rows"][0]["dataset"], content.get("num_classes"))
    rows.append(["*a constant classifier*", "", *[f"{least:g}"] * len(columns)])
    return ["## Clean, and under AutoAttack (threat model pixel)", "",
            *markdown_grid(["set", "ipc", *columns.values()], rows)]


def metrics_grid(entries):
    rows = []
    for e in entries:
        attacks = ", ".join(e["attacks"])
        if e["missing"]:
            attacks += f"; missing: {', '.join(e['missing'])}"
        rows.append([e["threat_model"], e["kind"], FORMS[e["targeted"]], e["method"],
                     ipc_text(e), *(e[name] for name in METRICS), attacks])
    return markdown_grid(["threat model", "", "form", "method", "ipc", *METRICS, "attacks"], rows)


def warnings_of(content):
    """Lines: odd files, accuracies no better than chance, failed sanity checks, and attacks that
    raised the accuracy."""
    lines = [warning for about in content.get("inputs", {}).values()
             for warning in about["warnings"]]
    lines += below_chance(content.get("rows", []), content.get("num_classes"))
    for network, threats in content["sanity"].items():
        for threat, checks in threats.items():
            lines += [f"{network}, {threat}: check '{name}' failed: {result['text']}"
                      for name, result in checks.items() if not result["passed"]]
    return lines + [f"{e['method']}, {e['threat_model']}, {FORMS[e['targeted']]}: {raised_note(e)}"
                    for e in content["metrics"] if e["raised"]]


def below_chance(rows, num_classes=None):
    """A line for each method whose clean accuracy is not above that of a constant classifier."""
    lines = []
    for (method, ipc), cells in white_box_groups(rows).items():
        clean = cells.get(CLEAN)
        if not clean:
            continue
        n, least = clean[0]["n"], chance(clean[0]["dataset"], num_classes)
        if wilson(clean)[0] <= least:
            lines.append(f"{method}, ipc {ipc}: clean accuracy {100 * mean_of(clean):.1f} % of {n} "
                         "images is no better than that of a constant classifier "
                         f"({least:g} %): are the labels, the normalisation and the packing right?")
    return lines
