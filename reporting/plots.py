"""Results as plots. The functions figure_* return or yield matplotlib figures."""
import re

import numpy as np

from attacks import ATTACKS, THREAT_MODELS
from reporting.metrics import transfer_matrices
from reporting.records import mean_of, white_box_groups
from runtime.measures import COLUMNS, CONTROLS, FORMS, attack_label
from runtime.safe_io import write_atomically


def save_figure(figure, path, **options):
    write_atomically(path, lambda partial: figure.savefig(partial, dpi=150, **options))


def file_name(title):
    return re.sub("[^a-z0-9]+", "_", title)


def new_figure(width, height, columns=None, layout="constrained", **options):
    """A figure, in inches, and its axes: one, or a row of `columns`."""
    from matplotlib.figure import Figure  # slow to import
    figure = Figure(figsize=(width, height), layout=layout)
    axes = figure.subplots(1, columns or 1, squeeze=False, **options)[0]
    return figure, axes if columns else axes[0]


# ---- evaluate.py
def draw_results(content, folder):
    """Bars of all attacks, accuracy against eps, transfer. content: of results.json."""
    figures = {}
    for name in THREAT_MODELS:
        groups = white_box_groups(content["rows"], name)
        if groups:
            figures[f"grid_{name}"] = figure_grid(name, groups, content["rows"][0]["n"])
            figures[f"eps_{name}"] = figure_eps(name, groups)
    for matrix in transfer_matrices(content["transfer"]):
        rows, columns = matrix.values.shape
        figure, ax = new_figure(2.4 + 0.9 * columns, 1.8 + 0.7 * rows, layout=None)
        figure.colorbar(heat_map(ax, matrix, matrix.values))
        ax.set_title(f"I-RR (%), {matrix.title}")
        figures[f"transfer_{file_name(matrix.title)}"] = figure
    for name, figure in figures.items():
        if figure:
            save_figure(figure, folder / f"{name}.png", bbox_inches="tight")


def figure_grid(threat, groups, n):
    """Bars of accuracy, by attack and set. groups: of `white_box_groups`."""
    keys = list(dict.fromkeys(key for cells in groups.values() for key in cells))
    keys.sort(key=lambda key: (*CONTROLS, *ATTACKS).index(key[0]))
    inches, width = max(6.4, 0.5 * len(keys) * (1 + 0.3 * len(groups))), 0.8 / len(groups)
    figure, ax = new_figure(inches, 4, layout=None)
    for i, ((method, ipc), cells) in enumerate(groups.items()):
        shift = (i - (len(groups) - 1) / 2) * width
        found = [(k + shift, cells[key]) for k, key in enumerate(keys) if key in cells]
        spread = [100 * np.std([row["accuracy"] for row in rows]) for _, rows in found]
        ax.bar([x for x, _ in found], [100 * mean_of(rows) for _, rows in found], width,
               yerr=spread, label=f"{method}, ipc {ipc}")
    ax.set_xticks(range(len(keys)), [attack_label(*key) for key in keys], rotation=45, ha="right")
    title = f"Threat model {threat}, {n} test images"
    note = "\nshaded: minimum-norm attacks, without eps"
    for k, (attack, _, eps) in enumerate(keys):
        if attack not in CONTROLS and eps is None:
            ax.axvspan(k - 0.5, k + 0.5, color="0.92", zorder=0)
            title = title.removesuffix(note) + note
    ax.set(ylabel="accuracy (%)", ylim=(0, 100), title=title)
    ax.legend()
    return figure


def figure_eps(threat, groups):
    """Accuracy against eps; None where no attack has two radii."""
    curves = {}
    for (method, ipc), cells in groups.items():
        for (attack, targeted, eps), rows in cells.items():
            if eps is not None:
                name = f"{method}, ipc {ipc}: {attack_label(attack, targeted)}"
                curves.setdefault(name, {})[255 * eps] = 100 * mean_of(rows)
    curves = {name: sorted(curve.items()) for name, curve in curves.items() if len(curve) > 1}
    if not curves:
        return None
    figure, ax = new_figure(6.4, 4, layout=None)
    for name, curve in curves.items():
        ax.plot(*zip(*curve), "o-", label=name)
    ax.set(xlabel="eps (1/255, attack space)", ylabel="accuracy (%)",
           title=f"Threat model {threat}")
    ax.set_ylim(bottom=0)
    ax.legend(fontsize=8)
    return figure


def heat_map(ax, matrix, values):
    """Draw `values` (percent) over the names of a TransferMatrix. Returns the image."""
    image = ax.imshow(values, vmin=0, vmax=100, aspect="auto")
    for (i, j), value in np.ndenumerate(values):
        if not np.isnan(value):
            color = "w" if value < 60 else "k"
            ax.text(j, i, f"{value:.1f}", ha="center", va="center", color=color)
    names = matrix.evaluated_on
    turned = {"rotation": 30, "ha": "right"} if max(map(len, names)) > 8 else {}
    ax.set_xticks(range(len(names)), names, **turned)
    ax.set_yticks(range(len(matrix.crafted_on)), matrix.crafted_on)
    ax.set(xlabel="evaluated on", ylabel="crafted on")
    return image


# ---- report.py
def figure_3(pool, published):
    """Transfer heat maps, the published ones beside ours. Yields (name, figure)."""
    for matrix in transfer_matrices(pool.transfer):
        panels = {f"ours, {pool.n} images": matrix.values}
        if (pool.dataset, matrix.threat_model, matrix.ipc) == ("CIFAR10", "published", 50):
            panels["published"] = published_transfer(matrix, published)
        rows, columns = matrix.values.shape
        width = 1.2 + len(panels) * (1.4 + 0.9 * columns)
        figure, axes = new_figure(width, 1.6 + 0.6 * rows, len(panels))
        for ax, (name, values) in zip(axes, panels.items()):
            image = heat_map(ax, matrix, values)
            ax.set_title(name)
        figure.suptitle(f"I-RR (%), {pool.dataset}, {matrix.title}")
        figure.colorbar(image, ax=list(axes))
        yield f"figure3_{pool.dataset}_{pool.n}_{file_name(matrix.title)}", figure


def published_transfer(matrix, published):
    """The published I-RR of the methods of a TransferMatrix, NaN where there is none."""
    paper = published["figure3_transfer_I-RR_CIFAR10_ipc50"]
    names, values = paper["columns_evaluated_network"], paper[FORMS[matrix.targeted]]
    cells = {(crafted_on, evaluated_on): values[i][j] for i, crafted_on in enumerate(names)
             for j, evaluated_on in enumerate(names)}
    return np.array([[cells.get((crafted_on, evaluated_on), np.nan)
                      for evaluated_on in matrix.evaluated_on] for crafted_on in matrix.crafted_on])


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
        figure, ax = new_figure(6.4, 4)
        weights = sorted(sweep)
        for key, name in (("clean_acc", "clean"), ("robust_acc", "robust")):
            error_bars(ax, weights, [sweep[weight][1][key] for weight in weights],
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


def error_bars(ax, x, accuracies, **options):
    """Means and standard deviations, in percent, of a list of fractions at each x."""
    values = [100 * np.array(fractions) for fractions in accuracies]
    ax.errorbar(x, [v.mean() for v in values], [v.std() for v in values], marker="o", capsize=3,
                **options)


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
        style = {"alpha": 1 if first else 0.4}
        for i, name in enumerate(("robustness", "performance", "pool")):
            losses.plot(x, [e[f"loss_{name}"] for e in events], f"C{i}",
                        label=name if first else None, **style)
        weight.plot(x, [e["w_f"] for e in events], "C3.", **style)
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
        if key not in e:
            continue
        if e["set"] == run.flags["method"] and not e.get("final"):
            points.setdefault(e["iteration"], []).extend(e[key])
        elif e["set"] == "random real" and e["exp"] == 0:
            ax.axhline(100 * np.mean(e[key]), color=color, ls=":")
    if points:
        iterations = sorted(points)
        error_bars(ax, iterations, [points[it] for it in iterations], color=color, label=name)
        ax.legend(fontsize=8)


def figure_sets(sets, classes, per_class=5):
    """Stored images of sets side by side, a row a class. sets: {title: pixels (C*ipc, 3, H, W) in
    [0, 1], class-major}."""
    from torchvision.utils import make_grid
    figure, axes = new_figure(0.6 + 2.9 * len(sets), 0.6 + 0.58 * len(classes), len(sets),
                              gridspec_kw={"wspace": 0.02})
    for ax, (title, images) in zip(axes, sets.items()):
        ipc = len(images) // len(classes)
        shown = images.unflatten(0, (len(classes), ipc))[:, :per_class].flatten(0, 1)
        grid = make_grid(shown, nrow=min(ipc, per_class), pad_value=1.0).clamp(0, 1)
        ax.imshow(grid.permute(1, 2, 0), interpolation="nearest")
        ax.set_title(title, fontsize=10)
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    height = images.shape[2] + 2
    ticks = [2 + height * (c + 0.5) for c in range(len(classes))]
    axes[0].set_yticks(ticks, classes, fontsize=9)
    axes[0].tick_params(length=0)
    return figure


def figure_tsne(points, labels, title):
    """points: (N, 2) of real, attacked and synthetic images, labels (N,): lists of three."""
    figure, axes = new_figure(11, 5, 2)
    names = ("real test images", "the same, attacked", "synthetic")
    for part, ax in enumerate(axes):
        for k, style in ((part, {"marker": ".", "s": 40, "edgecolors": "none"}),
                         (2, {"marker": "*", "s": 90, "edgecolors": "k"})):
            ax.scatter(*points[k].T, c=labels[k] % 10, cmap="tab10", vmin=0, vmax=9,
                       label=names[k], linewidths=0.5, **style)
        ax.set(xticks=[], yticks=[])
        ax.legend(loc="upper right")
    figure.suptitle(title)
    return figure
