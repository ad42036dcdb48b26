"""results.md: what evaluate.py found, for a reader."""
from reporting.metrics import transfer_means
from reporting.records import CLEAN, chance, group_by, mean_of, white_box_groups
from reporting.statistics import ROBUST, table_robust, tables_of_references
from reporting.tables import table_accuracy, table_metrics, wilson
from runtime.measures import FORMS, attack_label


def results_markdown(content):
    """content: of results.json. The tables of a single evaluation, and warnings."""
    if not content["rows"]:
        return "# Robustness\n\nNo result yet.\n"
    rows = [{**row, "num_classes": content.get("num_classes")} for row in content["rows"]]
    dataset = rows[0]["dataset"]
    entries = content["metrics"] + transfer_means(content["transfer"])
    tables = [table_robust(dataset, rows, []), *tables_of_references(dataset, rows)]
    if not all(in_table_robust(row) for row in rows):
        numbers = group_by(rows, lambda row: row["n"])
        tables += [table_accuracy(dataset, n, of_n) for n, of_n in numbers.items()]
        tables.append(table_metrics(dataset, max(numbers), entries))
    lines = ["# Robustness", "", *introduction(content), ""]
    if not any((row["attack"], row["threat_model"]) == ("AA", "pixel") for row in rows):
        lines += ["AutoAttack under the valid threat model, the figure to quote, was not measured: "
                  "`--threat_model pixel --attacks AA` does.", ""]
    lines += [table.markdown() for table in tables if table]
    warnings = warnings_of(content) or ["none"]
    return "\n".join([*lines, "## Warnings", "", *(f"- {text}" for text in warnings), ""])


def in_table_robust(row):
    """Whether a row stands in the table of robust accuracies; the clamp of `pixel` does nothing."""
    label = attack_label(row["attack"], row["targeted"], row["eps"])
    own = row["crafted_on"] == row["evaluated_on"]
    return own and (f"{row['threat_model']}: {label}" in (*ROBUST, "pixel: Clamp-only"))


def introduction(content):
    first, flags = content["rows"][0], content["flags"]
    text = (f"{first['dataset']}, {first['n']} test images, seed {first['seed']}, "
            f"{content['device']}, torch {content['versions']['torch']}. Accuracy in percent. "
            "Attacks are bounded by eps where one stands behind them.")
    if any(row["attack"] == "AA" for row in content["rows"]):
        text += (f" AutoAttack: {flags['aa_iterations']} iterations, {flags['queries']} queries of "
                 f"Square{'' if is_standard(flags) else ', fewer than its standard: 100, 5000'}.")
    if flags.get("quick"):
        text += " `--quick`: networks trained for less than their set says."
    if flags.get("attack_precision") == "bf16":
        text += (" Attacks computed in bf16, and images that were wrong in bf16 alone attacked "
                 "again; judged in fp32.")
    inputs = [f"- {path} taken as: {about['taken_as']}"
              for path, about in content.get("inputs", {}).items()]
    return [text, "", *inputs] if inputs else [text]


def is_standard(flags):
    """Whether AutoAttack is as its authors have it."""
    return flags["aa_iterations"] >= 100 and flags["queries"] >= 5000


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
    return lines + [f"{e['method']}, {e['threat_model']}, {FORMS[e['targeted']]}: attacked "
                    f"accuracy is above clean accuracy ({', '.join(e['raised'])})"
                    for e in content["metrics"] if e["raised"]]


def below_chance(rows, num_classes=None):
    """A line for each method whose clean accuracy is not above that of a constant classifier."""
    lines = []
    for (method, ipc, _), cells in white_box_groups(rows).items():
        clean = cells.get(CLEAN)
        if not clean:
            continue
        n, least = clean[0]["n"], chance(clean[0]["dataset"], num_classes)
        if wilson(100 * mean_of(clean), n)[0] <= least:
            lines.append(f"{method}, ipc {ipc}: clean accuracy {100 * mean_of(clean):.1f} % of {n} "
                         "images is no better than that of a constant classifier "
                         f"({least:g} %): are the labels, the normalisation and the packing right?")
    return list(dict.fromkeys(lines))  # the same under both threat models
