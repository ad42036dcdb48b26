"""Results as pictures. The functions figure_* return matplotlib figures, or yield them with a name."""
import re

import numpy as np

from reporting.records import groups_of, label, mean_of
from runtime.measures import COLUMNS, CONTROLS
from runtime.safe_io import write_atomically
from reporting.tables import transfer_matrices


def draw_results(content, threats, attacks, folder):
    """grid_<threat>.png (bars), eps_<threat>.png (accuracy against eps), transfer_<threat>_<form>_<ipc>ipc.png (heat map).

    threats, attacks: names, in order.
    """
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def save(figure, name):
        write_atomically(folder / name, lambda partial: figure.savefig(partial, dpi=150, bbox_inches="tight"))
        plt.close(figure)

    for name in threats:
        groups = groups_of([row for row in content["rows"] if row["threat_model"] == name])
        if not groups:
            continue
        keys = list(dict.fromkeys(key for cells in groups.values() for key in cells))
        keys.sort(key=lambda key: (*CONTROLS, *attacks).index(key[0]))
        figure, axes = plt.subplots(figsize=(max(6.4, 0.5 * len(keys) * (1 + 0.3 * len(groups))), 4))
        width = 0.8 / len(groups)
        for i, ((method, ipc), cells) in enumerate(groups.items()):
            found = [(k, cells[key]) for k, key in enumerate(keys) if key in cells]
            axes.bar([k + (i - (len(groups) - 1) / 2) * width for k, _ in found], [100 * mean_of(c) for _, c in found], width,
                     yerr=[100 * np.std([row["accuracy"] for row in c]) for _, c in found], label=f"{method}, ipc {ipc}")
        axes.set_xticks(range(len(keys)), [label(*key) for key in keys], rotation=45, ha="right")
        unbounded = [k for k, key in enumerate(keys) if key[0] not in CONTROLS and key[2] is None]
        for k in unbounded:
            axes.axvspan(k - 0.5, k + 0.5, color="0.92", zorder=0)
        axes.set(ylabel="accuracy (%)", ylim=(0, 100), title=f"Threat model {name}, {content['rows'][0]['n']} test images"
                 + ("\nshaded: minimum-norm attacks, without eps" if unbounded else ""))
        axes.legend()
        save(figure, f"grid_{name}.png")

        curves = {}
        for (method, ipc), cells in groups.items():
            for (attack, targeted, eps), cell in cells.items():
                if eps is not None:
                    curves.setdefault((method, ipc, attack, targeted), {})[255 * eps] = 100 * mean_of(cell)
        curves = {key: dict(sorted(curve.items())) for key, curve in curves.items() if len(curve) > 1}
        if curves:
            figure, axes = plt.subplots(figsize=(6.4, 4))
            for (method, ipc, attack, targeted), curve in curves.items():
                axes.plot(list(curve), list(curve.values()), "o-", label=f"{method}, ipc {ipc}: {label(attack, targeted)}")
            axes.set(xlabel="eps (1/255, attack space)", ylabel="accuracy (%)", title=f"Threat model {name}")
            axes.set_ylim(bottom=0)
            axes.legend(fontsize=8)
            save(figure, f"eps_{name}.png")

    for title, matrix, crafted, evaluated_on in transfer_matrices(content["transfer"]):
        figure, axes = plt.subplots(figsize=(2.4 + 0.9 * len(evaluated_on), 1.8 + 0.7 * len(crafted)))
        figure.colorbar(heat_map(axes, matrix, crafted, evaluated_on))
        axes.set_title(f"I-RR (%), {title}")
        save(figure, f"transfer_{re.sub('[^a-z0-9]+', '_', title)}.png")


def heat_map(axes, matrix, crafted, evaluated_on):
    """Draw percentages, (crafted, evaluated), with their figures. Returns the image, for a colour bar."""
    image = axes.imshow(matrix, vmin=0, vmax=100, aspect="auto")
    for (i, j), value in np.ndenumerate(matrix):
        if not np.isnan(value):
            axes.text(j, i, f"{value:.1f}", ha="center", va="center", color="w" if value < 60 else "k")
    long = max(map(len, evaluated_on)) > 8
    axes.set_xticks(range(len(evaluated_on)), evaluated_on, **({"rotation": 30, "ha": "right"} if long else {}))
    axes.set_yticks(range(len(crafted)), crafted)
    axes.set(xlabel="evaluated on", ylabel="crafted on")
    return image


def figure_3(pool, transfer, published):
    """Transfer heat maps, the published ones beside ours where there are some. transfer: of utils.transfer_of. Yields (name,
    figure)."""
    import matplotlib.pyplot as plt
    dataset, n = pool
    paper = published["figure3_transfer_I-RR_CIFAR10_ipc50"]
    for title, ours, crafted, evaluated_on in transfer_matrices(transfer):
        panels = [(f"ours, {n} images", ours)]
        form = "targeted" if "untargeted" not in title else "untargeted"
        if dataset == "CIFAR10" and title.startswith("published ") and title.endswith(" ipc 50"):
            where = paper["columns_evaluated_network"]
            panels.append(("published", np.array([[paper[form][where.index(c)][where.index(e)] if c in where and e in where
                                                   else np.nan for e in evaluated_on] for c in crafted])))
        figure, axes = plt.subplots(1, len(panels), figsize=(1.2 + len(panels) * (1.4 + 0.9 * len(evaluated_on)),
                                                             1.6 + 0.6 * len(crafted)), squeeze=False, layout="constrained")
        for ax, (name, matrix) in zip(axes[0], panels):
            image = heat_map(ax, matrix, crafted, evaluated_on)
            ax.set_title(name)
        figure.suptitle(f"I-RR (%), {dataset}, {title}")
        figure.colorbar(image, ax=axes)
        yield f"figure3_{dataset}_{n}_{re.sub('[^a-z0-9]+', '_', title)}", figure


def figure_sets(sets, classes, per_class=5):
    """Stored images of sets side by side, a row a class. sets: {title: pixels (C*ipc, 3, H, W) in [0, 1], class-major}."""
    import matplotlib.pyplot as plt
    from torchvision.utils import make_grid
    figure, axes = plt.subplots(1, len(sets), figsize=(0.6 + 2.9 * len(sets), 0.6 + 0.58 * len(classes)), squeeze=False,
                                layout="constrained", gridspec_kw={"wspace": 0.02})
    for ax, (title, images) in zip(axes[0], sets.items()):
        ipc = len(images) // len(classes)
        shown = images.unflatten(0, (len(classes), ipc))[:, :per_class].flatten(0, 1)
        grid = make_grid(shown, nrow=min(ipc, per_class), pad_value=1.0).clamp(0, 1)
        ax.imshow(grid.permute(1, 2, 0), interpolation="nearest")
        ax.set_title(title, fontsize=10)
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    height = images.shape[2] + 2
    axes[0, 0].set_yticks([2 + height * (c + 0.5) for c in range(len(classes))], classes, fontsize=9)
    axes[0, 0].tick_params(length=0)
    return figure


def figure_4(runs, published):
    """Accuracy against --align_weight, of runs that differ in nothing else but their name and number of sets. Yields (name,
    figure)."""
    import matplotlib.pyplot as plt
    sweeps = {}
    for run in runs:
        final = [e for e in run.of("final") if e["set"] == run.flags["method"]]
        if final:
            sweep = sweeps.setdefault(run.other_flags("align_weight", "num_exp", "method"), {})
            sweep[run.flags["align_weight"]] = (run, final[0])
    for number, sweep in enumerate(s for s in sweeps.values() if len(s) > 1):
        figure, ax = plt.subplots(figsize=(6.4, 4), layout="constrained")
        weights = sorted(sweep)
        for key, name in (("clean_acc", "clean"), ("robust_acc", "robust")):
            values = [100 * np.array(sweep[w][1][key]) for w in weights]
            ax.errorbar(weights, [v.mean() for v in values], [v.std() for v in values], marker="o", capsize=3,
                        label=f"{name}, ours (bars: standard deviation over networks)")
        run = sweep[weights[0]][0]
        if run.flags["dataset"] == "CIFAR10" and run.flags["threat_model"] == "published":
            paper = published["figure4_alpha_sweep_accuracy_CIFAR10_ipc50_read_off_plot"]
            ax.plot([float(w) for w in paper], list(paper.values()), "k--", label="published (ipc 50, read off the plot)")
        ax.set(xlabel="align_weight (the paper's alpha)", ylabel="accuracy (%)", title=run.setting())
        ax.legend()
        yield f"figure4_{number}", figure


def figure_run(run):
    """Losses, w_f and accuracies against the outer iteration."""
    import matplotlib.pyplot as plt
    figure, (losses, weight, accuracies) = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    iterations = run.of("iteration")
    for exp in dict.fromkeys(e["exp"] for e in iterations):
        events = [e for e in iterations if e["exp"] == exp]
        style = {"alpha": 1 if exp == iterations[0]["exp"] else 0.4}
        for i, name in enumerate(("robustness", "performance", "pool")):
            losses.plot([e["iteration"] for e in events], [e[f"loss_{name}"] for e in events], f"C{i}", **style,
                        label=name if style["alpha"] == 1 else None)
        weight.plot([e["iteration"] for e in events], [e["w_f"] for e in events], "C3.", **style)
    losses.set(xlabel="outer iteration", yscale="log", title="losses")
    weight.set(xlabel="outer iteration", title="w_f of the network at hand (%)")
    weight.set_ylim(bottom=0)
    if iterations:
        losses.legend(fontsize=8)
    for i, (key, name) in enumerate(COLUMNS.items()):
        points = {}
        for e in run.of("evaluation"):
            if key not in e:
                continue
            if e["set"] == run.flags["method"] and not e.get("final"):
                points.setdefault(e["iteration"], []).extend(e[key])
            elif e["set"] == "random real" and e["exp"] == 0:
                accuracies.axhline(100 * np.mean(e[key]), color=f"C{i}", ls=":")
        if points:
            values = [100 * np.array(points[it]) for it in sorted(points)]
            accuracies.errorbar(sorted(points), [v.mean() for v in values], [v.std() for v in values], color=f"C{i}",
                                marker="o", capsize=3, label=name)
            accuracies.legend(fontsize=8)
    accuracies.set(xlabel="outer iteration", title="accuracy (%); dotted: random real images")
    accuracies.set_ylim(bottom=0)
    accuracies.set_xlim(left=0)
    figure.suptitle(run.title())
    return figure
