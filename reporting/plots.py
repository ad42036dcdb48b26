"""Results as plots. The functions figure_* return or yield matplotlib figures."""
import re

import numpy as np

from attacks import ATTACKS, THREAT_MODELS
from reporting.metrics import transfer_matrices
from reporting.records import mean_of, white_box_groups
from reporting.tables import attack_name
from runtime.measures import COLUMNS, CONTROLS, FORMS
from runtime.safe_io import write_atomically


def save_figure(figure, path):
    write_atomically(path, lambda partial: figure.savefig(partial, dpi=150))


def file_name(title):
    return re.sub("[^a-z0-9]+", "_", title)


def new_figure(width, height, columns=1, **options):
    """A figure, in inches, and its axes in a row."""
    from matplotlib.figure import Figure  # slow to import
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False, **options)[0]


# ---- evaluate.py
def draw_results(content, folder):
    """Bars of all attacks, and transfer. content: of results.json."""
    for name in THREAT_MODELS:
        groups = white_box_groups(content["rows"], name)
        if groups:
            title = f"Threat model {name}, {content['rows'][0]['n']} test images"
            save_figure(figure_grid(title, groups), folder / f"grid_{name}.png")
    for matrix in transfer_matrices(content["transfer"]):
        figure = figure_transfer(matrix, {matrix.title: matrix.values})
        save_figure(figure, folder / f"transfer_{file_name(matrix.title)}.png")


def figure_grid(title, groups):
    """Bars of accuracy, by attack and set. groups: of `white_box_groups`."""
    keys = list(dict.fromkeys(key for cells in groups.values() for key in cells))
    keys.sort(key=lambda key: (*CONTROLS, *ATTACKS).index(key[0]))
    width = 0.8 / len(groups)
    figure, (ax,) = new_figure(max(6.4, 0.5 * len(keys) * (1 + 0.3 * len(groups))), 4)
    for i, ((method, ipc), cells) in enumerate(groups.items()):
        found = [(k + i * width, cells[key]) for k, key in enumerate(keys) if key in cells]
        spread = [100 * np.std([row["accuracy"] for row in rows]) for _, rows in found]
        ax.bar([x for x, _ in found], [100 * mean_of(rows) for _, rows in found], width,
               yerr=spread, label=f"{method}, ipc {ipc}")
    ax.set_xticks(range(len(keys)), map(attack_name, keys), rotation=45, ha="right")
    ax.set(ylabel="accuracy (%)", ylim=(0, 100), title=title)
    ax.legend()
    return figure


def figure_transfer(matrix, panels, title=None):
    """Heat maps over the names of a TransferMatrix. panels: {title: values like the matrix's}."""
    rows, columns = matrix.values.shape
    width = 1.2 + len(panels) * (1.4 + 0.9 * columns)
    figure, axes = new_figure(width, 1.6 + 0.6 * rows, len(panels))
    for ax, (name, values) in zip(axes, panels.items()):
        image = ax.imshow(values, vmin=0, vmax=100, aspect="auto")
        for (i, j), value in np.ndenumerate(values):
            if not np.isnan(value):
                ax.text(j, i, f"{value:.1f}", ha="center", va="center",
                        color="w" if value < 60 else "k")
        turned = {"rotation": 30, "ha": "right"} if max(map(len, matrix.evaluated_on)) > 8 else {}
        ax.set_xticks(range(columns), matrix.evaluated_on, **turned)
        ax.set_yticks(range(rows), matrix.crafted_on)
        ax.set(xlabel="evaluated on", ylabel="crafted on", title=name)
    figure.suptitle(title or "I-RR (%)")
    figure.colorbar(image, ax=list(axes))
    return figure


# ---- report.py
def figure_3(pool, published):
    """Transfer, the published figures beside ours. Yields (name, figure)."""
    paper = published["figure3_transfer_I-RR_CIFAR10_ipc50"]
    names = paper["columns_evaluated_network"]
    for matrix in transfer_matrices(pool.transfer):
        panels = {f"ours, {pool.n} images": matrix.values}
        if (pool.dataset, matrix.threat_model, matrix.ipc) == ("CIFAR10", "published", 50):
            panels["published"] = np.array([
                [paper[FORMS[matrix.targeted]][names.index(crafted_on)][names.index(evaluated_on)]
                 if {crafted_on, evaluated_on} <= {*names} else np.nan
                 for evaluated_on in matrix.evaluated_on] for crafted_on in matrix.crafted_on])
        title = f"I-RR (%), {pool.dataset}, {matrix.title}"
        yield (f"figure3_{pool.dataset}_{pool.n}_{file_name(matrix.title)}",
               figure_transfer(matrix, panels, title))


def figure_4(runs, published):
    """Accuracy against --align_weight, of runs that are otherwise the same. Yields (name,
    figure)."""
    sweeps = {}
    for run in runs:
        final = [e for e in run.events_of("final") if e["set"] == run.flags["method"]]
        if final:
            sweep = sweeps.setdefault(run.flags_without("align_weight", "num_exp", "method"), {})
            sweep[run.flags["align_weight"]] = run, final[0]
    for number, sweep in enumerate(sweep for sweep in sweeps.values() if len(sweep) > 1):
        figure, (ax,) = new_figure(6.4, 4)
        weights = sorted(sweep)
        for key, name in (("clean_acc", "clean"), ("robust_acc", "robust")):
            error_bars(ax, {weight: sweep[weight][1][key] for weight in weights},
                       label=f"{name}, ours (bars: standard deviation over networks)")
        run = sweep[weights[0]][0]
        if (run.flags["dataset"], run.flags["threat_model"]) == ("CIFAR10", "published"):
            paper = published["figure4_alpha_sweep_accuracy_CIFAR10_ipc50_read_off_plot"]
            ax.plot([*map(float, paper)], [*paper.values()], "k--",
                    label="published (ipc 50, read off the plot)")
        ax.set(xlabel="align_weight (the paper's alpha)", ylabel="accuracy (%)",
               title=run.setting())
        ax.legend()
        yield f"figure4_{number}", figure


def error_bars(ax, accuracies, **options):
    """Means and standard deviations, in percent. accuracies: {x: fractions}, in order."""
    values = [100 * np.array(fractions) for fractions in accuracies.values()]
    ax.errorbar([*accuracies], [v.mean() for v in values], [v.std() for v in values], marker="o",
                capsize=3, **options)


def figures_of_runs(runs):
    """Training curves. Yields (name, figure)."""
    names = [run.folder.name for run in runs]
    for run in runs:
        name = run.folder.name
        parent = "" if names.count(name) == 1 else f"{run.folder.parent.name}_"
        yield f"curves_{parent}{name}", figure_run(run)


def figure_run(run):
    """Losses, w_f and accuracies against the outer iteration."""
    figure, (losses, weight, accuracies) = new_figure(12, 3.6, 3)
    iterations = run.events_of("iteration")
    for exp in dict.fromkeys(e["exp"] for e in iterations):
        events = [e for e in iterations if e["exp"] == exp]
        x, first = [e["iteration"] for e in events], exp == iterations[0]["exp"]
        alpha = 1 if first else 0.4
        for i, name in enumerate(("robustness", "performance", "pool")):
            losses.plot(x, [e[f"loss_{name}"] for e in events], f"C{i}", alpha=alpha,
                        label=name if first else None)
        weight.plot(x, [e["w_f"] for e in events], "C3.", alpha=alpha)
    losses.set(xlabel="outer iteration", yscale="log", title="losses")
    weight.set(xlabel="outer iteration", title="w_f of the network at hand (%)")
    weight.set_ylim(bottom=0)
    if iterations:
        losses.legend(fontsize=8)
    for i, (key, name) in enumerate(COLUMNS.items()):
        plot_accuracy(accuracies, run, key, name, f"C{i}")
    accuracies.set(xlabel="outer iteration", title="accuracy (%); dotted: random real images")
    accuracies.set_ylim(bottom=0)
    accuracies.set_xlim(left=0)
    figure.suptitle(run.title())
    return figure


def plot_accuracy(ax, run, key, name, color):
    """One accuracy of the distilled sets at each evaluation, and of random real images."""
    points = {}
    for e in run.events_of("evaluation"):
        if key in e and e["set"] == run.flags["method"] and not e.get("final"):
            points.setdefault(e["iteration"], []).extend(e[key])
        elif key in e and e["set"] == "random real" and e["exp"] == 0:
            ax.axhline(100 * np.mean(e[key]), color=color, ls=":")
    if points:
        error_bars(ax, dict(sorted(points.items())), color=color, label=name)
        ax.legend(fontsize=8)


def figure_sets(sets, classes, per_class=5):
    """Stored images of sets side by side, a row a class. sets: {title: pixels (C*ipc, 3, H, W) in
    [0, 1], class-major}."""
    from torchvision.utils import make_grid
    figure, axes = new_figure(0.6 + 2.9 * len(sets), 0.6 + 0.58 * len(classes), len(sets),
                              gridspec_kw={"wspace": 0.02})
    for ax, (title, images) in zip(axes, sets.items()):
        shown = images.unflatten(0, (len(classes), -1))[:, :per_class]
        grid = make_grid(shown.flatten(0, 1), nrow=shown.shape[1], pad_value=1.0).clamp(0, 1)
        ax.imshow(grid.permute(1, 2, 0), interpolation="nearest")
        ax.set_title(title, fontsize=10)
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    height = images.shape[2] + 2
    axes[0].set_yticks([2 + height * (c + 0.5) for c in range(len(classes))], classes, fontsize=9)
    axes[0].tick_params(length=0)
    return figure
