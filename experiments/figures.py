"""The figures of experiments/, made with matplotlib (requirements-extra.txt)."""

import math
from pathlib import Path
from statistics import fmean

from torch import Tensor

from experiments.tables import grouped
from support.command import UserError, replacing


def pyplot():
    """matplotlib's pyplot, drawing to files. Raises `UserError` if it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("figures need matplotlib; pip install -r requirements-extra.txt") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def draw(points: list[dict], path: Path, log_x: bool = False, **settings) -> None:
    """Draws lines, in a panel for each `panel` of the points, and there one for each `label`, in
    the same colour everywhere. A point has also `x`, `y` and the `marks` of its line as matplotlib
    calls them; `settings` are those of matplotlib's axes."""
    panels = grouped(points, "panel")
    labels = list(grouped(points, "label"))
    colours = pyplot().get_cmap("tab20")
    rows = math.ceil(len(panels) / 3)
    columns = math.ceil(len(panels) / rows)
    size = {"figsize": (5.6 * columns + 3, 4.4 * rows), "layout": "constrained", "squeeze": False}
    figure, axes = pyplot().subplots(rows, columns, sharey=True, **size)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, (title, own) in zip(axes.flat, panels.items(), strict=False):
        axis.set_title(title, fontsize=11)
        axis.grid(alpha=0.3)
        if log_x:
            axis.set_xscale("log", base=2)
            axis.xaxis.set_major_formatter("{x:,.0f}")
        for label, line in grouped(own, "label").items():
            line.sort(key=lambda point: point["x"])
            x = [point["x"] for point in line]
            y = [point["y"] for point in line]
            axis.plot(x, y, line[0]["marks"], color=colours(labels.index(label) % 20), label=label)
        axis.set(**settings)
        if settings.get("yscale") == "log":
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter("{x:g}")
    figure.legend(*axis.get_legend_handles_labels(), fontsize=8, loc="outside right center")
    save_figure(figure, path)


def save_figure(figure, path: Path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110, bbox_inches="tight")
    pyplot().close(figure)


def point(panel: str, label: str, x: float, y: float, marks: str = "o-") -> dict:
    """A point of `draw`."""
    return {"panel": panel, "label": label, "x": x, "y": y, "marks": marks}


def scores(rows: list[dict], path: Path, x: str, xlabel: str, log_x: bool = False) -> None:
    """The score of every cache against its column `x`; means over LongEval's lengths. A panel for
    each protocol, or for each text and length of context; the paper's scores beside ours. Of
    perplexity it is that over the full cache's where this is known."""
    score = next(name for name in ("of_full", "perplexity", "accuracy") if name in rows[0])
    keys = ["question", "text", "context", "cache", "factors", "ratio", "bits", "sinks"]
    if x != "measured_ratio":
        keys.append(x)
    points = []
    for group in grouped(rows, *keys).values():
        row = group[0]
        panel = row.get("question") or f"{row['text']}, {row['context']} tokens"
        parts = [row["cache"], row["factors"]]
        if x != "measured_ratio":
            parts.append(f"{row['ratio']:.0%}")
        elif "optimal" in row["factors"] and row["bits"] != "16":
            parts.append(f"{row['bits']} bits")
        if row["sinks"]:
            parts.append(f"{row['sinks']} sinks")
        label = ", ".join(filter(None, parts))
        at = fmean([one[x] for one in group])
        marks = "o--" if "optimal" in row["factors"] else "o-"
        points.append(point(panel, label, at, fmean([one[score] for one in group]), marks))
        if x != "measured_ratio" and row["paper"] and score == "accuracy":
            paper = f"the paper, LongChat-7B, {row['ratio']:.0%}"
            points.append(point(panel, paper, at, float(row["paper"]), ":"))
    of_axis = {"ylabel": "perplexity", "yscale": "log"}
    if score == "of_full":
        of_axis["ylabel"] = "perplexity over the full cache's"
    if score == "accuracy":
        of_axis = {"ylabel": "LongEval, share answered right"}
    draw(points, path, log_x, xlabel=xlabel, **of_axis)


def singular_values(values: Tensor, path: Path) -> None:
    """values [layers, 2, d_kv], largest first, of keys and values; each layer's largest is 1. Of
    four layers."""
    layers, _, d_kv = values.shape
    relative = (values / values[..., :1]).clamp(min=1e-4)
    points = []
    for side, title in enumerate(("keys, before RoPE", "values, before RoPE")):
        for i in sorted({0, layers // 3, 2 * layers // 3, layers - 1}):
            for n, y in enumerate(relative[i, side].tolist(), 1):
                points.append(point(title, f"layer {i}", n, y, "-"))
        for removed in (0.5, 0.8):
            for y in (relative.min().item(), 1.0):
                points.append(point(title, f"{removed:.0%} removed", (1 - removed) * d_kv, y, ":"))
    labels = {"xlabel": "singular value, in order", "ylabel": "relative to the first"}
    draw(points, path, yscale="log", **labels)


def loss_curves(curves: list[dict], path: Path) -> None:
    """Losses of every step, smoothed, over the floor; a panel for each ratio."""
    points = []
    for curve in curves:
        panel = f"{curve['ratio']:.0%} of the channels removed"
        losses = curve["losses"]
        width = max(1, len(losses) // 50)
        for i in range(len(losses)):
            smooth = fmean(losses[max(0, i - width) : i + 1])
            points.append(point(panel, f"{curve['init']}, lr {curve['lr']:g}", i, smooth, "-"))
            points.append(point(panel, "floor", i, curve["floor"], ":"))
    draw(points, path, yscale="log", xlabel="step", ylabel="loss (equation 2)")


def budget_plan(rows: list[dict], path: Path) -> None:
    """What each side of each layer keeps: its rank as a colour, and rank and bits written in it."""
    sides = grouped(rows, "of")
    layers = len(rows) // 2
    most = max(row["rank"] for row in rows)
    names = []
    for row in next(iter(sides.values())):
        last = row["layer"] + row["layers"] - 1
        names.append(f"{row['layer']}" if last == row["layer"] else f"{row['layer']} to {last}")
    width = 0.42 if max(map(len, names)) < 3 else 0.85
    figure, axis = pyplot().subplots(figsize=(1.5 + width * layers, 2.2))
    ranks = [[row["rank"] for row in side] for side in sides.values()]
    image = axis.imshow(ranks, cmap="viridis", vmin=0, vmax=most, aspect="auto")
    for y, side in enumerate(sides.values()):
        for x, row in enumerate(side):
            colour = "black" if row["rank"] > 0.6 * most else "white"
            text = f"{row['rank']}\nx {row['bits']:.2g}"
            axis.text(x, y, text, ha="center", va="center", fontsize=8, color=colour)
    axis.set(xlabel="layer", yticks=range(len(sides)), yticklabels=list(sides))
    axis.set_xticks(range(layers), names)
    figure.colorbar(image, label="rank", pad=0.01)
    save_figure(figure, path)


def time_against_tokens(rows: list[dict], path: Path) -> None:
    """Milliseconds of a decode step against tokens, a line for each cache of experiments.speed."""
    points = [point("", row["cache"], row["tokens"], row["decode_ms"]) for row in rows]
    ticks = sorted({row["tokens"] for row in rows})
    labels = {"xlabel": "tokens in the cache", "ylabel": "milliseconds of a decode step"}
    draw(points, path, log_x=True, xticks=ticks, ylim=(0, None), **labels)


def scores_against_time(
    scores: list[dict], times: dict[str, float], tokens: int, path: Path
) -> None:
    """Perplexity over the full cache's against the time of a step over the full cache's, which
    `times` has for the factors of each row; a panel for each text."""
    points = []
    for row in scores:
        name = row["factors"]
        panel = f"{row['text']}, {row['context']} tokens"
        points.append(point(panel, name, times[name], row["of_full"], "o"))
    time = f"time of a step over the full cache's, {tokens:,} tokens"
    draw(points, path, xlabel=time, ylabel="perplexity over the full cache's")
