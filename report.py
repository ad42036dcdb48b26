"""The paper's tables and figures from result files, ours beside the published ones.

    python report.py result/                     all that the results allow, into result/report/
    python report.py result/released --table 1 --figure 3

Reads what evaluate.py (results.json) and the ROME scripts (metrics.jsonl, flags.json) have written,
finished or still going. Writes tables as Markdown and CSV, figures as PNG and PDF. Published
figures: published.json, with their source. Distributed under the MIT licence.
"""
import argparse
import json
import re
from pathlib import Path

from formats.inputs import read_input
from formats.synset_file import mean_and_std
from networks import NETWORKS
from reporting import plots, records, statistics, tables
from reporting.metrics import Pool
from runtime.command_line import fraction, run_script
from runtime.safe_io import InputError, write_text

HERE = Path(__file__).parent
BEGIN, END = "<!-- report: begin -->", "<!-- report: end -->"
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
        help="of the paper, or accuracies under a valid attack; default: all, and more")
    add("--figure", nargs="+", choices=("3", "4", "curves"), default=[],
        help="of the paper, or training curves; default: all")
    add("--compare", nargs="+", default=[], metavar="NAME",
        help="differences of these sets to the last one, or what a JSON file asks for "
        "(docs/evaluate.md)")
    add("--out", default="./result/report", metavar="DIR", help="folder for the report")
    add("--readme", metavar="FILE",
        help=f"put the tables between {BEGIN} and {END} in this file, or those that are named: "
        "<!-- report: begin NAME ... -->")
    add("--crei_weight", type=fraction, default=0.5, help="of RR against AE in CREI, 0 to 1")
    add("--show", nargs="+", default=[], metavar="SET",
        help="draw the first images of each class of these sets (.pt), side by side")
    return parser.parse_args(argv)


def main():
    args = parse_args()
    published = json.loads((HERE / "published.json").read_text(encoding="utf-8"))
    pools, runs, refused = read_results(args.results, args.crei_weight)
    wanted_tables, wanted_figures = args.table, args.figure
    if not (args.table or args.figure or args.compare):
        wanted_tables = ("robust", *POOL_TABLES, *RUN_TABLES)
        wanted_figures = ("3", "4", "curves")
    made = make_tables(wanted_tables, args.compare, pools, runs, published)

    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    for table in made:
        write_text(out / f"{table.name}.md", table.markdown())
        write_text(out / f"{table.name}.csv", table.csv())
    names = [table.name for table in made]
    for name, figure in make_figures(wanted_figures, args.show, pools, runs, published):
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
    evaluations, runs, refused = {}, [], []
    for path in records.find_results(paths):
        try:
            if path.suffix == ".json":
                evaluations[path] = records.read_rows(path)
            else:
                runs.append(records.read_run(path))
        except InputError as error:
            refused.append(str(error))
    pooled, contradicting = records.pool_rows(evaluations)
    refused += contradicting
    if not pooled and not runs:
        raise InputError("; ".join(refused) or f"no result yet below {', '.join(paths)}")
    pools = [Pool(dataset, n, rows, crei_weight) for (dataset, n), rows in pooled.items()]
    return pools, runs, refused


def make_tables(wanted, compare, pools, runs, published):
    """The Tables that there are results for. wanted: names; compare: of --compare."""
    made = []
    if "robust" in wanted or compare:
        made += tables_of_sets("robust" in wanted, compare, pools, runs)
    made += [make(pool, published) for pool in pools
             for name, make in POOL_TABLES.items() if name in wanted]
    made += [make(runs) for name, make in RUN_TABLES.items() if name in wanted]
    return list(filter(None, made))


def tables_of_sets(robust, compare, pools, runs):
    """Tables of each data set: what its sets are worth, if `robust`, and what --compare asks."""
    made, compared, methods = [], [], set()
    asked = statistics.read_comparisons(Path(compare[0])) if len(compare) == 1 else []
    for dataset in dict.fromkeys([*(run.flags["dataset"] for run in runs),
                                  *(pool.dataset for pool in pools)]):
        rows = [row for pool in pools if pool.dataset == dataset for row in pool.rows]
        own_runs = [run for run in runs if run.flags["dataset"] == dataset]
        accuracies, counts = statistics.accuracies_by_set(rows, own_runs)
        methods |= {method for method, _, _ in accuracies}
        if robust:
            sizes = [row["num_classes"] for row in rows] + [run.num_classes for run in own_runs]
            num_classes = next(filter(None, sizes), None)
            made.append(statistics.table_robust(dataset, accuracies, counts, num_classes))
        if len(compare) > 1:
            asked = statistics.compare_methods(dataset, compare, accuracies)
        compared += [statistics.table_comparison(entry, accuracies) for entry in asked
                     if entry.dataset in (None, dataset)]
    if len(compare) > 1 and not compared:
        raise InputError(f"--compare {' '.join(compare)}: no network and ipc that all of them "
                         f"have; there are {', '.join(sorted(methods))}")
    return made + compared


def make_figures(wanted, shown, pools, runs, published):
    """Yields (name, Figure). wanted: names of figures; shown: sets of --show."""
    if shown:
        yield "sets", figure_of_sets(shown)
    for pool in pools if "3" in wanted else ():
        yield from plots.figure_3(pool, published)
    if "4" in wanted:
        yield from plots.figure_4(runs, published)
    if "curves" in wanted:
        yield from plots.figures_of_runs(runs)


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
        return f"{match[0].split('-->')[0]}-->\n" + "\n".join(map(texts.get, wanted)) + END
    pattern = r"<!-- report: begin([^>]*)-->.*?" + re.escape(END)
    text, count = re.subn(pattern, section, path.read_text(encoding="utf-8"), flags=re.DOTALL)
    if not count:
        raise InputError(f"{path} has no lines {BEGIN} and {END}")
    write_text(path, text)


if __name__ == "__main__":
    run_script(main)
