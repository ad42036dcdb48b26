"""The paper's tables and figures from result files, ours beside the published ones.

    python report.py result/                     all that the results allow, into result/report/
    python report.py result/released --table 1 --figure 3

Reads what evaluate.py (results.json) and the ROME scripts (metrics.jsonl, flags.json) have written,
finished or still going. Writes tables as Markdown, CSV and LaTeX, figures as PNG and PDF. Published
figures: published.json, with their source. Distributed under the MIT licence.
"""
import argparse
import json
import re
from pathlib import Path

import numpy as np
import torch

from attacks import attack, get_threat_model
from datasets import load_dataset
from formats.inputs import check_and_normalise, choose_normalisation, read_input, take_flags
from formats.synset_file import mean_and_std
from networks import NETWORKS, network_for
from reporting import plots, records, statistics, tables
from reporting.metrics import Pool
from runtime.command_line import at_least, fraction, run_script
from runtime.safe_io import InputError, write_text
from runtime.seeding import derive_seed, make_generator
from synsets import TrainConfig, training_set
from utils import train_on_set

HERE = Path(__file__).parent
BEGIN, END = "<!-- report: begin -->", "<!-- report: end -->"
TSNE_IMAGES = 600  # real test images in the t-SNE
POOL_TABLES = {"1": tables.table_1, "2": tables.table_2, "4": tables.table_4,
               "accuracy": tables.table_accuracy}  # (Pool, published figures) -> Table
RUN_TABLES = {"seeds": tables.table_seeds, "runs": tables.table_runs}  # (runs) -> Table


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("results", nargs="+", metavar="PATH",
        help="results.json, metrics.jsonl, or folders with them somewhere inside")
    add("--table", nargs="+", choices=("1", "2", "4", "robust"), default=[],
        help="of the paper, or what the sets are worth under a valid attack; default: all, and "
        "more")
    add("--figure", nargs="+", choices=("3", "4", "curves"), default=[],
        help="of the paper, or the training curves of the runs; default: all")
    add("--compare", nargs="+", default=[], metavar="NAME",
        help="figures of these sets and their differences to the last one: --compare ROME Random; "
        "or, for more, a JSON file that says which (docs/evaluate.md)")
    add("--out", default="./result/report", metavar="DIR", help="folder for the report")
    add("--readme", metavar="FILE",
        help=f"replace what stands between {BEGIN} and {END} in this file by the tables; or in "
        "several places, each by the tables that it names: <!-- report: begin NAME ... -->")
    add("--crei_weight", type=fraction, default=0.5, help="of RR against AE in CREI, 0 to 1")
    add("--tsne", metavar="SET", help="also draw a t-SNE of embeddings of real, attacked and these "
        "synthetic images (a .pt)")
    add("--show", nargs="+", default=[], metavar="SET",
        help="also draw the first images of each class of these sets (.pt), side by side")
    add("--data_path", default="./data", help="folder of cifar10.npz, cifar100.npz, for --tsne")
    add("--seed", type=at_least(0), default=0, help="of --tsne")
    return parser.parse_args(argv)


def main():
    args = parse_args()
    published = json.loads((HERE / "published.json").read_text(encoding="utf-8"))
    pools, runs, refused = read_results(args.results, args.crei_weight)
    wanted_tables, wanted_figures = set(args.table), set(args.figure)
    if not (args.table or args.figure or args.compare):
        wanted_tables = {"robust", *POOL_TABLES, *RUN_TABLES}
        wanted_figures = {"3", "4", "curves"}
    made = make_tables(wanted_tables, args.compare, pools, runs, published)

    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    for table in made:
        write_text(out / f"{table.name}.md", table.markdown())
        write_text(out / f"{table.name}.csv", table.csv())
        write_text(out / f"{table.name}.tex", table.latex())
    names = [table.name for table in made]
    for name, figure in make_figures(args, wanted_figures, pools, runs, published):
        plots.save_figure(figure, out / f"{name}.png")
        plots.save_figure(figure, out / f"{name}.pdf")
        names.append(name)
    if args.readme:
        replace_sections(Path(args.readme), made)
    print("\n".join(table.markdown() for table in made))
    for line in refused:
        print(f"refused: {line}")
    print(f"{len(made)} table(s), {len(names) - len(made)} figure(s) in {out}: {', '.join(names)}")


def read_results(paths, crei_weight):
    """Pools, RunRecords, and a line for each file that is refused. Raises InputError if no file is
    left."""
    refused = []

    def read_all(files, read):
        found = {}
        for path in files:
            try:
                found[path] = read(path)
            except InputError as error:
                refused.append(str(error))
        return found
    evaluation_files, run_files = records.find_results(paths)
    evaluations = read_all(evaluation_files, records.read_rows)
    runs = list(read_all(run_files, records.read_run).values())
    pooled, contradicting = records.pool_rows(evaluations)
    refused += contradicting
    if not pooled and not runs:
        raise InputError("; ".join(refused) or f"no result yet below {', '.join(paths)}")
    pools = [Pool(dataset, n, rows, crei_weight) for (dataset, n), rows in pooled.items()]
    return pools, runs, refused


def make_tables(wanted, compare, pools, runs, published):
    """The Tables that there are results for. wanted: names; compare: of --compare."""
    robust, compared = [], []
    comparisons = statistics.read_comparisons(Path(compare[0])) if len(compare) == 1 else []
    datasets = dict.fromkeys([*(run.flags["dataset"] for run in runs),
                              *(pool.dataset for pool in pools)])
    for dataset in datasets if "robust" in wanted or compare else ():
        rows = [row for pool in pools if pool.dataset == dataset for row in pool.rows]
        own_runs = [run for run in runs if run.flags["dataset"] == dataset]
        accuracies, counts = statistics.accuracies_by_set(rows, own_runs)
        if "robust" in wanted:
            sizes = [row["num_classes"] for row in rows] + [run.num_classes for run in own_runs]
            num_classes = next(filter(None, sizes), None)
            robust.insert(0, statistics.table_robust(dataset, accuracies, counts, num_classes))
        if comparisons:
            statistics.add_improved_rr(accuracies, rows)
        asked = [entry for entry in comparisons if entry.get("dataset", dataset) == dataset]
        if len(compare) > 1 and (len(datasets) == 1 or statistics.has_any(accuracies, compare)):
            asked = statistics.comparisons_of(dataset, compare, accuracies)
        compared += [statistics.table_comparison(entry, accuracies) for entry in asked]
    of_pools = [make(pool, published) for pool in pools
                for name, make in POOL_TABLES.items() if name in wanted]
    of_runs = [make(runs) for name, make in RUN_TABLES.items() if name in wanted]
    return list(filter(None, [*robust, *of_pools, *compared, *of_runs]))


def make_figures(args, wanted, pools, runs, published):
    """Yields (name, Figure). wanted: names of figures."""
    if args.tsne:
        yield "tsne", figure_tsne(args.tsne, args.data_path, args.seed)
    if args.show:
        yield "sets", figure_of_sets(args.show)
    for pool in pools if "3" in wanted else ():
        yield from plots.figure_3(pool, published)
    if "4" in wanted:
        yield from plots.figure_4(runs, published)
    if "curves" in wanted:
        yield from plots.figures_of_runs(runs)


# ---- figures of .pt files
def figure_tsne(path, data_path, seed):
    """t-SNE (scikit-learn) of embeddings of real, PGD-attacked and synthetic images, by a network
    that is trained on the set."""
    from sklearn.manifold import TSNE
    source = read_input(path, NETWORKS, is_set=True)
    take_flags(source)
    meta = source.synset.meta
    if source.dataset is None or source.model is None or "threat_model" not in meta:
        raise InputError(f"{path} does not say its data set, network and threat model; --tsne "
                         "takes a set of a ROME script")
    data = load_dataset(source.dataset, data_path)
    choose_normalisation([source], data)
    check_and_normalise(source, data)
    warnings = (f"warning: {warning}" for warning in source.warnings)
    print(f"{path} taken as: {source.description}", *warnings, sep="\n")

    stored, pack = source.synset.sets[0], source.synset.pack
    image_syn, label_syn = training_set(stored, pack)
    net = network_for(data, source.model, derive_seed(seed, "tsne", "init"))
    train_on_set(net, image_syn, label_syn, TrainConfig.from_meta(meta),
                 make_generator(seed, "tsne", "train"))
    img_real, labels = data.get_batch("test", slice(TSNE_IMAGES))
    img_adv = attack(net, img_real, labels, get_threat_model(meta["threat_model"], data),
                     targeted=False, generator=make_generator(seed, "tsne", "attack"))
    with torch.no_grad():
        embeddings = [net.embed_and_classify(images)[0].numpy()
                      for images in (img_real, img_adv, image_syn)]
    points = TSNE(random_state=seed, init="pca").fit_transform(np.concatenate(embeddings))
    points = np.split(points, np.cumsum(list(map(len, embeddings)))[:-1])
    classes = [labels, labels, stored.labels.repeat(pack**2)]
    return plots.figure_tsne(points, classes, f"t-SNE of embeddings, {data.name}, {source.model} "
                             f"trained on {Path(path).name}; colour: class")


def figure_of_sets(paths):
    """The stored images of the first set of each file."""
    shown, classes = {}, None
    for path in paths:
        synset = read_input(path, NETWORKS, is_set=True).synset
        meta = synset.meta
        known = {"dataset", "classes", "mean", "std"} <= set(meta) and not meta.get("zca")
        if not known or classes not in (None, meta["classes"]):
            raise InputError(f"{path} does not say its data set and normalisation, is whitened, or "
                             "of another data set than the others")
        classes, (mean, std) = meta["classes"], mean_and_std(meta)
        synset.normalise(lambda pixels: (pixels - mean) / std)  # noqa: B023
        about = synset.describe(meta["dataset"], meta["mean"], meta["std"], False)
        print(f"{path} taken as: {about}")
        method = meta.get("flags", {}).get("method", Path(path).stem)
        shown[f"{method}, {meta.get('threat_model', '')}"] = synset.sets[0].images * std + mean
    return plots.figure_sets(shown, classes)


def replace_sections(path, made):
    """Put tables between the pairs of markers of a file: all, or those that the first marker names.

    Raises InputError if there are no markers, or a table is not there."""
    texts = {table.name: table.markdown() for table in made}

    def section(match):
        wanted = match[1].split() or list(texts)
        unknown = sorted(set(wanted) - set(texts))
        if unknown:
            raise InputError(f"{path} asks for {', '.join(unknown)}; there is {', '.join(texts)}")
        marker = match[0].split("-->")[0]
        return f"{marker}-->\n" + "\n".join(texts[name] for name in wanted) + END
    pattern = r"<!-- report: begin([^>]*)-->.*?" + re.escape(END)
    text, count = re.subn(pattern, section, path.read_text(encoding="utf-8"), flags=re.DOTALL)
    if not count:
        raise InputError(f"{path} has no lines {BEGIN} and {END}")
    write_text(path, text)


if __name__ == "__main__":
    run_script(main)
