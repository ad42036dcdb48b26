"""The paper's tables and figures from result files, ours beside the published ones.

    python report.py result/                     all that the results allow, into result/report/
    python report.py result/released --table metrics --figure 3

Reads what evaluate.py (results.json) and the ROME scripts (metrics.jsonl, flags.json) have written,
finished or still going. Writes tables as Markdown and CSV, figures as PNG and PDF. Published
figures: published.json, with their source. Distributed under the MIT licence.
"""
import argparse
import json
import re
from pathlib import Path

from reporting import leaderboard, plots, statistics, tables
from reporting.metrics import metrics_of, transfer_means, transfer_of
from reporting.records import read_results
from runtime.command_line import run_script
from runtime.safe_io import InputError, write_text

HERE = Path(__file__).parent
END = "<!-- report: end -->"  # of a table in a page
TABLES, FIGURES = ("robust", "metrics", "accuracy", "runs"), ("3", "4", "curves")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("results", nargs="*", metavar="PATH",
        help="results.json, metrics.jsonl, or folders with them somewhere inside")
    add("--table", nargs="+", choices=TABLES, default=[],
        help="metrics: Tables 1, 2 and 4 of the paper; robust: accuracies under a valid attack; "
             "default: all")
    add("--figure", nargs="+", choices=FIGURES, default=[],
        help="of the paper, or training curves; default: all")
    add("--compare", type=Path, metavar="FILE",
        help="also the sets and differences that a JSON file asks for (docs/evaluate.md)")
    add("--leaderboard", type=Path, metavar="FILE",
        help="also the table and plot of the sets that a leaderboard.json lists")
    add("--out", default="./result/report", metavar="DIR", help="folder for the report")
    add("--readme", type=Path, metavar="PAGE",
        help="put tables between <!-- report: begin NAME ... --> and <!-- report: end --> in it")
    add("--show", nargs="+", default=[], metavar="SET",
        help="draw the first images of each class of these sets (.pt), side by side")
    args = parser.parse_args(argv)
    if not args.results and not args.leaderboard:
        parser.error("nothing to report: give results or --leaderboard")
    if args.results and not (args.table or args.figure or args.compare):
        args.table, args.figure = TABLES, FIGURES
    return args


def main():
    args = parse_args()
    published = json.loads((HERE / "published.json").read_text(encoding="utf-8"))
    pools, runs, refused = read_results(args.results) if args.results else ({}, [], [])
    made = make_tables(args.table, args.compare, pools, runs, published)
    figures = make_figures(args.figure, args.show, pools, runs, published)
    if args.leaderboard:
        measured, printed = leaderboard.read_leaderboard(args.leaderboard)
        made += [leaderboard.table_measured(measured), leaderboard.table_printed(printed)]
        figures = [*figures, ("leaderboard", leaderboard.figure_leaderboard(measured))]

    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    if args.leaderboard:
        write_text(out / "accuracies.json", leaderboard.leaderboard_json(measured, printed))
    for table in made:
        write_text(out / f"{table.name}.md", table.markdown())
        write_text(out / f"{table.name}.csv", table.csv())
    names = [table.name for table in made]
    for name, figure in figures:
        plots.save_figure(figure, out / f"{name}.png")
        plots.save_figure(figure, out / f"{name}.pdf")
        names.append(name)
    if args.readme:
        replace_sections(args.readme, made)
    print("\n".join(table.markdown() for table in made))
    for line in refused:
        print(f"refused: {line}")
    print(f"{len(made)} table(s), {len(names) - len(made)} figure(s) in {out}: {', '.join(names)}")


def make_tables(wanted, compare, pools, runs, published):
    """The Tables that there are results for. wanted: names; compare: of --compare."""
    made = []
    for dataset in dict.fromkeys([*(run.flags["dataset"] for run in runs),
                                  *(dataset for dataset, _ in pools)]):
        rows = [row for key, pool in pools.items() if key[0] == dataset for row in pool]
        own_runs = [run for run in runs if run.flags["dataset"] == dataset]
        if "robust" in wanted:
            made.append(statistics.table_robust(dataset, rows, own_runs))
        if compare:
            accuracies, _ = statistics.accuracies_by_set(rows, own_runs)
            made += statistics.tables_of_comparisons(compare, dataset, accuracies)
    for (dataset, n), rows in pools.items():
        if "metrics" in wanted:
            entries = metrics_of(rows) + transfer_means(transfer_of(rows))
            made.append(tables.table_metrics(dataset, n, entries, published))
        if "accuracy" in wanted:
            made.append(tables.table_accuracy(dataset, n, rows))
    if "runs" in wanted:
        made.append(tables.table_runs(runs))
    return list(filter(None, made))


def make_figures(wanted, shown, pools, runs, published):
    """Yields (name, Figure). wanted: names of figures; shown: sets of --show."""
    if shown:
        yield "sets", plots.figure_sets(shown)
    if "3" in wanted:
        for (dataset, n), rows in pools.items():
            paper = published["figure3_transfer_I-RR_CIFAR10_ipc50"]
            yield from plots.figures_of_transfer(f"figure3_{dataset}_{n}", transfer_of(rows),
                                                 paper if dataset == "CIFAR10" else None)
    if "4" in wanted:
        yield from plots.figure_4(runs, published)
    if "curves" in wanted:
        yield from plots.figures_of_runs(runs)


def replace_sections(path, made):
    """Put tables between the markers of a page that name them. Raises InputError if there are no
    markers, or a table is not there."""
    texts = {table.name: table.markdown() for table in made}

    def section(match):
        unknown = sorted({*match[2].split()} - {*texts})
        if unknown:
            raise InputError(f"{path} asks for {', '.join(unknown)}; there is {', '.join(texts)}")
        return f"{match[1]}\n" + "\n".join(texts[name] for name in match[2].split()) + END
    pattern = r"(<!-- report: begin ([^>]*)-->).*?" + re.escape(END)
    text, count = re.subn(pattern, section, path.read_text(encoding="utf-8"), flags=re.DOTALL)
    if not count:
        raise InputError(f"{path} has no lines <!-- report: begin NAME --> and {END}")
    write_text(path, text)


if __name__ == "__main__":
    run_script(main)
