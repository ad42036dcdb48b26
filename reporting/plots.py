"""Results as plots, with matplotlib."""
import itertools

import numpy as np

from formats.synset_file import mean_and_std, read_synset
from reporting.records import group_by
from runtime.measures import COLUMNS, FORMS
from runtime.safe_io import InputError, write_atomically


def save_figure(figure, path):
    write_atomically(path, lambda partial: figure.savefig(partial, dpi=150))


def new_figure(width, height, columns=1, **options):
    """A figure, in inches, and its axes in a row."""
    from matplotlib.figure import Figure  # slow to import
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False, **options)[0]


# ---- transfer
def figures_of_transfer(name, transfer, paper=None):
    """Heat maps of each setting of `transfer_of`, beside those of the paper (its Figure 3) where it
    has the same. Yields (name, figure)."""
    settings = group_by(transfer, lambda e: (e["threat_model"], FORMS[e["targeted"]], e["ipc"]))
    for (threat, form, ipc), entries in settings.items():
        if all(e["crafted_on"] == e["evaluated_on"] for e in entries):
            continue
        panels = {"ours": {(e["crafted_on"], e["evaluated_on"]): e["I-RR"] for e in entries}}
        if paper and (threat, ipc) == ("published", 50):
            names = itertools.product(paper["rows_crafting_network"],
                                      paper["columns_evaluated_network"])
            panels["published"] = dict(zip(names, np.ravel(paper[form])))
        yield (f"{name}_{threat}_{form}_ipc_{ipc}",
               heat_maps(f"{name}: I-RR (%), {threat} {form}, ipc {ipc}", panels))


def heat_maps(title, panels):
    """panels: {title: {(crafted on, evaluated on): percent}}, over the names of the first one."""
    rows, columns = (list(dict.fromkeys(names)) for names in zip(*panels["ours"]))
    width = 1.2 + len(panels) * (1.4 + 0.9 * len(columns))
    figure, axes = new_figure(width, 1.6 + 0.6 * len(rows), len(panels))
    for ax, (name, cells) in zip(axes, panels.items()):
        values = np.array([[cells.get((r, c), np.nan) for c in columns] for r in rows])
        image = ax.imshow(values, vmin=0, vmax=100, aspect="auto")
        for (i, j), value in np.ndenumerate(values):
            if not np.isnan(value):
                ax.text(j, i, f"{value:.1f}", ha="center", va="center",
                        color="w" if value < 60 else "k")
        ax.set_xticks(range(len(columns)), columns, rotation=30, ha="right")
        ax.set_yticks(range(len(rows)), rows)
        ax.set(xlabel="evaluated on", ylabel="crafted on", title=name)
    figure.suptitle(title)
    figure.colorbar(image, ax=list(axes))
    return figure


# ---- runs
def figure_4(runs, published):
    """Accuracy against --align_weight, of runs that are otherwise the same. Yields (name,
    figure)."""
    finals = [(run, event) for run in runs for event in run.events_of("final")
              if event["set"] == run.flags["method"]]
    sweeps = group_by(finals, lambda final: final[0].flags_without("align_weight", "num_exp",
                                                                   "method"))
    for number, sweep in enumerate(sweep for sweep in sweeps.values() if len(sweep) > 1):
        figure, (ax,) = new_figure(6.4, 4)
        for key, name in (("clean_acc", "clean"), ("robust_acc", "robust")):
            error_bars(ax, {run.flags["align_weight"]: event[key] for run, event in sweep},
                       label=f"{name}, ours (bars: standard deviation over networks)")
        run = sweep[0][0]
        if (run.flags["dataset"], run.flags["threat_model"]) == ("CIFAR10", "published"):
            paper = published["figure4_alpha_sweep_accuracy_CIFAR10_ipc50_read_off_plot"]
            ax.plot([*map(float, paper)], [*paper.values()], "k--",
                    label="published (ipc 50, read off the plot)")
        ax.set(xlabel="align_weight (the paper's alpha)", ylabel="accuracy (%)",
               title=run.setting())
        ax.legend()
        yield f"figure4_{number}", figure


def error_bars(ax, accuracies, **options):
    """Means and standard deviations, in percent. accuracies: {x: fractions}."""
    x = sorted(accuracies)
    values = [100 * np.array(accuracies[key]) for key in x]
    ax.errorbar(x, [v.mean() for v in values], [v.std() for v in values], marker="o", capsize=3,
                **options)


def figures_of_runs(runs):
    """Training curves. Yields (name, figure)."""
    names = [run.folder.name for run in runs]
    for run, name in zip(runs, names):
        parent = "" if names.count(name) == 1 else f"{run.folder.parent.name}_"
        yield f"curves_{parent}{name}", figure_run(run)


def figure_run(run):
    """Losses, w_f and accuracies against the outer iteration."""
    figure, (losses, weight, accuracies) = new_figure(12, 3.6, 3)
    for exp, events in group_by(run.events_of("iteration"), lambda e: e["exp"]).items():
        x, alpha = [e["iteration"] for e in events], 0.4 if exp else 1
        for i, name in enumerate(("robustness", "performance", "pool")):
            losses.plot(x, [e[f"loss_{name}"] for e in events], f"C{i}", alpha=alpha,
                        label=None if exp else name)
        weight.plot(x, [e["w_f"] for e in events], "C3.", alpha=alpha)
    for i, (key, name) in enumerate(COLUMNS.items()):
        events = [e for e in run.events_of("evaluation") if key in e and not e.get("final")]
        points = group_by([e for e in events if e["set"] == run.flags["method"]],
                          lambda e: e["iteration"])
        if points:
            error_bars(accuracies, {x: sum((e[key] for e in same), []) for x, same in
                                    points.items()}, color=f"C{i}", label=name)
        for e in events:
            if e["set"] == "random real" and e["exp"] == 0:
                accuracies.axhline(100 * np.mean(e[key]), color=f"C{i}", ls=":")
    for ax, title in ((losses, "losses"), (weight, "w_f of the network at hand (%)"),
                      (accuracies, "accuracy (%); dotted: random real images")):
        ax.set(xlabel="outer iteration", title=title)
        if ax.get_legend_handles_labels()[1]:
            ax.legend(fontsize=8)
    losses.set_yscale("log")
    weight.set_ylim(bottom=0)
    accuracies.set(xlim=(0, None), ylim=(0, None))
    figure.suptitle(run.title())
    return figure


# ---- sets
def figure_sets(paths, per_class=5):
    """The first images of each class of files of sets, side by side. Raises InputError."""
    from torchvision.utils import make_grid
    sets = [read_synset(path) for path in paths]
    figure, axes = new_figure(3.6 * len(sets), 6.4, len(sets))
    for ax, synset in zip(axes, sets):
        meta = synset.meta
        if meta.get("zca") or not {"classes", "mean", "std"} <= meta.keys():
            raise InputError(f"{synset.path}: whitened, or without classes, mean and std")
        mean, std = mean_and_std(meta)
        images = synset.sets[0].images * std + mean  # (C*ipc, 3, H, W), class-major
        shown = images.unflatten(0, (len(meta["classes"]), -1))[:, :per_class]
        grid = make_grid(shown.flatten(0, 1), nrow=shown.shape[1], pad_value=1.0).clamp(0, 1)
        ax.imshow(grid.permute(1, 2, 0).numpy(), interpolation="nearest")
        rows = (images.shape[2] + 2) * (np.arange(len(meta["classes"])) + 0.5)
        ax.set_yticks(rows, meta["classes"])
        ax.set_xticks([])
        method = meta.get("flags", {}).get("method", synset.path.stem)
        ax.set_title(f"{method}, {meta.get('threat_model', '')}", fontsize=10)
    return figure
