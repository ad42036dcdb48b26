"""The paper's tables and figures from result files, ours beside the published ones.

    python report.py result/                     all that the results allow, into result/report/
    python report.py result/released --table 1 --figure 3

Reads what evaluate.py (results.json) and the ROME scripts (metrics.jsonl, flags.json) have written, finished or still going.
Writes Markdown, CSV and LaTeX tables, and every picture as PNG and PDF. Published figures: published.json, with their source.
Distributed under the MIT licence.
"""
import argparse
import json
import re
from pathlib import Path

import numpy as np
import torch

import utils
from attacks import ATTACKS, THREAT_MODELS, attack, get_threat_model
from runtime.command_line import at_least, fraction, run_script
from reporting.statistics import (figures_of, place_of, read_comparisons, table_comparison, table_robust,
                               usual_comparison)
from datasets import NUM_CLASSES, load_dataset
from formats.inputs import choose_normalisation, read_input, take_flags, understand
from reporting.plots import figure_3, figure_4, figure_run, figure_sets
from reporting.records import chance, find, pools, read_rows, read_run
from runtime.safe_io import InputError, write_atomically, write_text
from runtime.seeding import make_generator, derive_seed
from formats.synset_file import mean_and_std
from reporting.tables import Table, table_accuracy, table_runs, table_seeds
from networks import NETWORKS, network_for
from synsets import protocol_of, training_set
from utils import metrics_of, transfer_of

HERE = Path(__file__).parent
METRICS = ("RR", "CREI", "I-RR", "I-CREI")
PAPER_IPC = [1, 10, 50]  # what Table 1 pools
BEGIN, END = "<!-- report: begin -->", "<!-- report: end -->"


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("results", nargs="+", metavar="PATH", help="results.json, metrics.jsonl, or folders with them somewhere inside")
    add("--table", nargs="+", choices=("1", "2", "4", "robust"), default=[], help="of the paper, or what the sets are worth "
        "under a valid attack; default: all, and more")
    add("--figure", nargs="+", choices=("3", "4", "curves"), default=[], help="of the paper, or the training curves of the "
        "runs; default: all")
    add("--compare", nargs="+", default=[], metavar="NAME", help="figures of these sets and their differences to the last one: "
        "--compare ROME Random; or, for more, a JSON file that says which (docs/robustness.md)")
    add("--out", default="./result/report", metavar="DIR", help="folder for the report")
    add("--readme", metavar="FILE", help=f"replace what stands between {BEGIN} and {END} in this file by the tables; or in "
        "several places, each by the tables that it names: <!-- report: begin NAME ... -->")
    add("--crei_weight", type=fraction, default=0.5, help="of RR against AE in CREI, 0 to 1")
    add("--tsne", metavar="SET", help="also draw a t-SNE of embeddings of real, attacked and these synthetic images (a .pt)")
    add("--show", nargs="+", default=[], metavar="SET", help="also draw the first images of each class of these sets (.pt), "
        "side by side")
    add("--data_path", default="./data", help="folder of cifar10.npz, cifar100.npz, for --tsne")
    add("--seed", type=at_least(0), default=0, help="of --tsne")
    return parser.parse_args(argv)


# -------------------------------------------------------------------------------------------------------------- tables
def threats_of(dataset):
    """The threat models, for their eps; they need no images for that."""
    class Data:
        num_classes = NUM_CLASSES.get(dataset, 10)

        @staticmethod
        def normalize(x):
            return x
        denormalize = normalize
    return {name: get_threat_model(name, Data) for name in THREAT_MODELS}


def table_1(pool, rows, published, crei_weight):
    """White-box metrics of each method, published threat model beside pixel."""
    dataset, n = pool
    entries = {(e["method"], e["targeted"], e["threat_model"]): e
               for e in metrics_of(rows, threats_of(dataset), crei_weight) if e["kind"] == "white-box"}
    if not entries:
        return None
    paper = published["table1_white_box_pooled_over_ipc_1_10_50"].get(dataset, {})
    table = Table(f"table1_{dataset}_{n}", f"Table 1, {dataset}, {n} test images: white-box metrics (percent)",
                  ["method", "form", "ipc", *(f"{threat} {m}" for threat in THREAT_MODELS for m in METRICS)], [])
    methods = list(dict.fromkeys(method for method, _, _ in entries))
    lacking = {}  # what -> methods
    for targeted in (True, False):
        form = "targeted" if targeted else "untargeted"
        for method in methods:
            found = {t: entries.get((method, targeted, t)) for t in THREAT_MODELS}
            if not any(found.values()):
                continue
            pooled = {threat: ", ".join(map(str, e["ipc"])) for threat, e in found.items() if e}
            ipc = pooled.popitem()[1] if len(set(pooled.values())) == 1 else "; ".join(map(": ".join, pooled.items()))
            cells = []
            for threat, entry in found.items():
                reference = paper.get(method, {}).get(form, {}) if threat == "published" and entry else {}
                same = bool(entry) and not entry["missing"] and entry["ipc"] == PAPER_IPC
                cells += [(entry[m] if entry else None, reference.get(m), same) for m in METRICS]
                if entry and entry["missing"]:
                    lacking.setdefault(f"{form}, {threat}: without {', '.join(entry['missing'])}", []).append(method)
                if entry and entry["raised"]:
                    table.notes.append(f"{method} {form} {threat}: attacked accuracy is above clean accuracy "
                                       f"({', '.join(entry['raised'])})")
            table.rows.append([method, form, ipc, *cells])
    table.notes += [f"{what}: {', '.join(names)}" for what, names in lacking.items()]
    table.notes.insert(0, "In brackets: the published figure, pooled over ipc 1, 10 and 50 and all attacks, and the difference "
                       "where ours pools the same. CREI and I-CREI depend on the machine's timings as well.")
    absent = [method for method in paper if method not in methods]
    if absent:
        table.notes.append(f"no results of {', '.join(absent)}")
    return table


def table_2(pool, rows, published, crei_weight):
    """Black-box I-RR of each method: transfer (mean over the other crafting methods) and query attacks."""
    dataset, n = pool
    threats = threats_of(dataset)
    query = {(e["method"], e["targeted"], e["threat_model"]): e
             for e in metrics_of(rows, threats, crei_weight) if e["kind"] == "query"}
    transfer = {}
    for e in transfer_of(rows, threats):
        if e["crafted_on"] != e["evaluated_on"]:
            transfer.setdefault((e["evaluated_on"], e["targeted"], e["threat_model"]), []).append(e)
    if not (query or transfer):
        return None
    paper = published["table2_black_box_I-RR_CIFAR10_ipc50"] if dataset == "CIFAR10" else {}
    table = Table(f"table2_{dataset}_{n}", f"Table 2, {dataset}, {n} test images: black-box I-RR (percent)",
                  ["method", "form", *(f"{t} {kind}" for t in THREAT_MODELS for kind in ("transfer", "query"))], [])
    crafted_on = {}  # what -> methods
    for method in dict.fromkeys(key[0] for key in (*transfer, *query)):
        for targeted in (True, False):
            form, cells = "targeted" if targeted else "untargeted", []
            for threat in THREAT_MODELS:
                reference = paper.get(method, {}).get(form, {}) if threat == "published" else {}
                found, asked = transfer.get((method, targeted, threat), []), query.get((method, targeted, threat))
                cells += [(float(np.mean([e["I-RR"] for e in found])) if found else None, reference.get("transfer"), False),
                          (asked and asked["I-RR"], reference.get("query"),
                           bool(asked) and asked["ipc"] == [50] and not asked["missing"])]
                for e in found:
                    what = f"{form}, {threat}, ipc {e['ipc']}: {', '.join(e['attacks'])}"
                    crafted_on.setdefault(what, {})[e["crafted_on"]] = True
            table.rows.append([method, form, *cells])
    table.notes.append("Transfer: mean of I-RR over the crafting methods that are there, the method itself left out. How the "
                       "paper pools its seven crafting networks is not known, so no difference is given.")
    table.notes += [f"transfer {what}, crafted on {', '.join(methods)}" for what, methods in crafted_on.items()]
    return table


def table_4(pool, rows, published, crei_weight):
    """The ablation: methods named as its rows."""
    dataset, n = pool
    paper = published["table4_ablation_CIFAR10_ipc50"]
    entries = {(e["method"], e["targeted"], e["threat_model"]): e
               for e in metrics_of(rows, threats_of(dataset), crei_weight) if e["kind"] == "white-box"}
    names = [name for name in paper if any(method.removesuffix("-pixel") == name for method, _, _ in entries)]
    if not names:
        return None
    table = Table(f"table4_{dataset}_{n}", f"Table 4, {dataset}, {n} test images: ablation (percent)",
                  ["distilled", "ipc", "attacked", "form", "I-RR", "I-CREI"], [])
    lacking = {}  # what -> methods
    for (method, targeted, threat), e in entries.items():
        if method.removesuffix("-pixel") in names:
            form = "targeted" if targeted else "untargeted"
            comparable = threat == "published" and dataset == "CIFAR10" and method in paper
            reference = paper[method][form] if comparable else {}
            same = e["ipc"] == [50] and not e["missing"]
            table.rows.append([method, ", ".join(map(str, e["ipc"])), threat, form,
                               *((e[m], reference.get(m), same) for m in ("I-RR", "I-CREI"))])
            if e["missing"]:
                lacking.setdefault(f"{form}, {threat}: without {', '.join(e['missing'])}", []).append(method)
    table.notes += [f"{what}: {', '.join(methods)}" for what, methods in lacking.items()]
    if any(cell[1] is not None for row in table.rows for cell in row[4:]):
        table.notes.insert(0, "In brackets: the published figure, of ConvNet at ipc 50 under all attacks, and the difference "
                           "where ours has the same ipc and attacks.")
    table.notes += [f"no results of {name}" for name in paper if name not in names]
    return table


# ------------------------------------------------------------------------------------------------------------- figures
def figure_tsne(path, data_path, seed):
    """t-SNE (scikit-learn) of embeddings of real, PGD-attacked and synthetic images, by a network trained on the set."""
    import matplotlib.pyplot as plt
    from sklearn.manifold import TSNE
    one = read_input(path, NETWORKS, is_set=True)
    take_flags(one)
    meta = one.synset.meta
    if one.dataset is None or one.model is None or "threat_model" not in meta:
        raise InputError(f"{path} does not say its data set, network and threat model; --tsne takes a set of a ROME script")
    data, model = load_dataset(one.dataset, data_path), one.model
    choose_normalisation([one], data)
    understand(one, data)
    print(f"{path} taken as: {one.taken_as}", *(f"warning: {warning}" for warning in one.warnings), sep="\n")
    threat, sets, pack = get_threat_model(meta["threat_model"], data), one.synset.sets, one.synset.pack
    images, labels = training_set(sets[0], pack)
    net = network_for(data, model, derive_seed(seed, "tsne", "init"))
    utils.train_on_set(net, images, labels, generator=make_generator(seed, "tsne", "train"), **protocol_of(meta))
    real, real_labels = data.get_batch("test", slice(600))
    attacked = attack(net, real, real_labels, threat, targeted=False, generator=make_generator(seed, "tsne", "attack"))
    with torch.no_grad():
        embeddings = [net.embed_and_classify(x)[0].numpy() for x in (real, attacked, images)]
    points = TSNE(random_state=seed, init="pca").fit_transform(np.concatenate(embeddings))
    figure, axes = plt.subplots(1, 2, figsize=(11, 5), layout="constrained")
    ends = np.cumsum([0, *map(len, embeddings)])
    for ax, shown in zip(axes, ((0, "real test images"), (1, "the same, attacked"))):
        for part, name, marker, size in ((shown[0], shown[1], ".", 40), (2, "synthetic", "*", 90)):
            colours = (sets[0].labels.repeat(pack**2) if part == 2 else real_labels) % 10
            xy = points[ends[part]:ends[part + 1]]
            ax.scatter(xy[:, 0], xy[:, 1], s=size, c=colours, cmap="tab10", vmin=0, vmax=9, marker=marker, label=name,
                       edgecolors="k" if part == 2 else "none", linewidths=0.5)
        ax.set(xticks=[], yticks=[])
        ax.legend(loc="upper right")
    figure.suptitle(f"t-SNE of embeddings, {data.name}, {model} trained on {Path(path).name}; colour: class")
    return figure


def figure_of_sets(paths):
    """The stored images of the first set of each file."""
    shown, classes = {}, None
    for path in paths:
        one = read_input(path, NETWORKS, is_set=True)
        meta = one.synset.meta
        if not {"dataset", "classes", "mean", "std"} <= set(meta) or meta.get("zca") or classes not in (None, meta["classes"]):
            raise InputError(f"{path} does not say its data set and normalisation, is whitened, or of another data set than "
                             "the others")
        mean, std = mean_and_std(meta)
        one.synset.normalise(lambda pixels: (pixels - mean) / std)  # noqa: B023
        print(f"{path} taken as: {one.synset.describe(meta['dataset'], meta['mean'], meta['std'], False)}")
        name = f"{meta.get('flags', {}).get('method', Path(path).stem)}, {meta.get('threat_model', '')}"
        classes, shown[name] = meta["classes"], one.synset.sets[0].images * std + mean
    return figure_sets(shown, classes)


# ---------------------------------------------------------------------------------------------------------------- main
def main():
    args = parse_args()
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    published = json.loads((HERE / "published.json").read_text(encoding="utf-8"))
    out, refused, evaluations, runs = Path(args.out), [], {}, {}
    result_files, run_files = find(args.results)
    for files, read, kept in ((result_files, lambda path: read_rows(path, ATTACKS, THREAT_MODELS), evaluations),
                              (run_files, read_run, runs)):
        for path in files:
            try:
                kept[path] = read(path)
            except InputError as error:
                refused.append(str(error))
    pooled_rows, left_out = pools(evaluations)
    refused, runs = refused + left_out, list(runs.values())
    if not pooled_rows and not runs:
        raise InputError("; ".join(refused) or f"no result yet below {', '.join(args.results)}")
    all_of_it = not args.table and not args.figure and not args.compare

    out.mkdir(parents=True, exist_ok=True)
    tables, figures = [], []

    def draw(named_figures):
        for name, figure in named_figures:
            for ending in ("png", "pdf"):
                write_atomically(out / f"{name}.{ending}", lambda partial: figure.savefig(partial, dpi=150))  # noqa: B023
            plt.close(figure)
            figures.append(name)

    if args.tsne:
        draw([("tsne", figure_tsne(args.tsne, args.data_path, args.seed))])
    if args.show:
        draw([("sets", figure_of_sets(args.show))])
    for pool, pooled in pooled_rows.items():
        for number, make in ((1, table_1), (2, table_2), (4, table_4)):
            if all_of_it or str(number) in args.table:
                tables.append(make(pool, pooled, published, args.crei_weight))
        if all_of_it:
            tables.append(table_accuracy(pool, pooled, ATTACKS, THREAT_MODELS))
        if all_of_it or "3" in args.figure:
            draw(figure_3(pool, transfer_of(pooled, threats_of(pool[0])), published))
    robust, by_file = all_of_it or "robust" in args.table, len(args.compare) == 1
    comparisons = read_comparisons(Path(args.compare[0])) if by_file else []
    rows_of = {run.flags["dataset"]: [] for run in runs}
    for (dataset, _), rows in pooled_rows.items():
        rows_of.setdefault(dataset, []).extend(rows)
    for dataset, rows in rows_of.items() if robust or args.compare else ():
        of_sets, counts = figures_of(dataset, rows, runs)
        if robust:
            sizes = [row["num_classes"] for row in rows] + [run.num_classes for run in runs if run.flags["dataset"] == dataset]
            least = chance(dataset, next((size for size in sizes if size), None))
            tables.insert(0, table_robust(dataset, of_sets, counts, least))
        if by_file:
            add_metrics(of_sets, rows, threats_of(dataset), args.crei_weight)
        elif args.compare and (len(rows_of) == 1 or any(group[0].removesuffix("-pixel") == name.removesuffix("-pixel")
                                                        for group in of_sets for name in args.compare)):
            comparisons = usual_comparison(dataset, args.compare, of_sets)
        tables += [table_comparison(asked, of_sets) for asked in comparisons if asked.get("dataset", dataset) == dataset]
    if all_of_it or "4" in args.figure:
        draw(figure_4(runs, published))
    if all_of_it:
        tables += [table_seeds(runs), table_runs(runs)]
    if all_of_it or "curves" in args.figure:
        names = [run.folder.name for run in runs]
        draw(("curves_" + ("" if names.count(run.folder.name) == 1 else f"{run.folder.parent.name}_") + run.folder.name,
              figure_run(run)) for run in runs)
    tables = [table for table in tables if table]
    for table in tables:
        for ending, text in (("md", table.markdown()), ("csv", table.csv()), ("tex", table.latex())):
            write_text(out / f"{table.name}.{ending}", text)
    if args.readme:
        replace_sections(Path(args.readme), tables)
    print("\n".join(table.markdown() for table in tables))
    for line in refused:
        print(f"refused: {line}")
    print(f"{len(tables)} table(s), {len(figures)} figure(s) in {out}: {', '.join([t.name for t in tables] + figures)}")


def add_metrics(figures, rows, threats, crei_weight):
    """Add I-RR of each network, by threat model and form, to the `figures` of reporting.statistics."""
    of_networks = {}
    for row in rows:
        if row["crafted_on"] == row["evaluated_on"]:
            of_networks.setdefault(row["evaluated_on"], []).append(row)
    for network in of_networks.values():
        group, one = place_of(network[0])
        for e in metrics_of(network, threats, crei_weight):
            if e["kind"] == "white-box":
                name = f"{e['threat_model']}: I-RR {'targeted' if e['targeted'] else 'untargeted'}"
                figures[group].setdefault(name, {}).setdefault(one, []).append(e["I-RR"])


def replace_sections(path, tables):
    """Put tables between the pairs of markers of a file: all of them, or those that a first marker names. Raises InputError if
    there are no markers, or a table is not there."""
    text, named = path.read_text(encoding="utf-8"), {table.name: table for table in tables}

    def body(match):
        wanted = match[1].split() or list(named)
        if set(wanted) - set(named):
            raise InputError(f"{path} asks for {', '.join(sorted(set(wanted) - set(named)))}; there is {', '.join(named)}")
        return f"{match[0].split('-->')[0]}-->\n" + "\n".join(named[name].markdown() for name in wanted) + END
    new, count = re.subn(r"<!-- report: begin([^>]*)-->.*?" + re.escape(END), body, text, flags=re.DOTALL)
    if not count:
        raise InputError(f"{path} has no lines {BEGIN} and {END}")
    write_text(path, new)


if __name__ == "__main__":
    run_script(main)
