"""The pictures of experiments/paper.py, made with matplotlib (requirements-extra.txt).

Each function gets the rows of a table, or what a figure needs, and writes one PNG.
"""

from collections.abc import Callable
from pathlib import Path
from statistics import fmean

from torch import Tensor

from experiments.caches import CACHES
from support.command import UserError, replacing

COLOURS = {
    "random": "tab:gray",
    "svd": "tab:red",
    "asvd": "tab:orange",
    "optimal": "tab:blue",
    "attention": "tab:purple",
}
LABELS = {"accuracy": "LongEval, share answered right", "perplexity": "perplexity"}
PROTOCOL = {
    "prefill": "question prefilled with the text",
    "decode": "question decoded after compression",
    "": "",
}


def pyplot():
    """matplotlib's pyplot, drawing to files. Raises `UserError` if it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("figures need matplotlib; pip install -r requirements-extra.txt") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def draw(panels: dict, fill: Callable, path: Path, **settings) -> None:
    """One panel beside the other: `fill(axis, key, content)` draws the lines of each item of
    `panels`, `settings` are those of matplotlib's axes. The legend stands at the right."""
    size = 5.6 * len(panels), 4.4
    figure, axes = pyplot().subplots(1, len(panels), figsize=size, squeeze=False, sharey=True)
    for axis, (key, content) in zip(axes[0], panels.items(), strict=True):
        axis.set(**settings)
        axis.grid(alpha=0.3)
        fill(axis, key, content)
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110, bbox_inches="tight")
    pyplot().close(figure)


def grouped(rows: list[dict], *keys: str) -> dict:
    """Rows by the value of a key, or the values of several, in the order of first appearance."""
    result: dict = {}
    for row in rows:
        values = tuple(row.get(key, "") for key in keys)
        result.setdefault(values if len(keys) > 1 else values[0], []).append(row)
    return result


def score_of(rows: list[dict]) -> str:
    return "perplexity" if "perplexity" in rows[0] else "accuracy"


def accuracy_against_bytes(rows: list[dict], path: Path) -> None:
    """Every method in one picture: the score against the bytes really held, a panel a protocol."""
    score = score_of(rows)

    def fill(axis, question: str, some: list[dict]) -> None:
        axis.set_title(PROTOCOL[question], fontsize=11)
        kinds = [{**row, "kind": row["factors"].replace(" in 4 bits", "")} for row in some]
        for (cache, kind), own in grouped(kinds, "cache", "kind").items():
            points = [
                [fmean(row[name] for row in group) for name in ("measured_ratio", score)]
                for group in grouped(own, "ratio", "bits").values()  # the mean over lengths
            ]
            axis.plot(
                *zip(*sorted(points), strict=True),
                "s" if cache == "asvd" else "o",
                linestyle="--" if "optimal" in kind else "-",
                color=CACHES[cache].colour,
                label=f"{cache}, {kind}" if kind else cache,
                alpha=0.85,
            )

    x = "measured compression ratio, means over the lengths"
    draw(grouped(rows, "question"), fill, path, xlabel=x, ylabel=LABELS[score])


def score_against_window(rows: list[dict], path: Path) -> None:
    """The score against the window: a panel a protocol, a line for each kind of factors."""
    score = score_of(rows)

    def fill(axis, question: str, some: list[dict]) -> None:
        axis.set_title(PROTOCOL[question], fontsize=11)
        axis.set_xscale("log", base=2)
        for factors, line in grouped(some, "factors").items():
            x, y = [row["window"] for row in line], [row[score] for row in line]
            colour = COLOURS[factors.split(",")[0]]
            axis.plot(x, y, "o-", color=colour, label=f"cskv, {factors}")
            if score == "accuracy":
                low, high = zip(*(row["interval"] for row in line), strict=True)
                axis.fill_between(x, low, high, color=colour, alpha=0.12)
        paper = [(row["window"], float(row["paper"])) for row in some if row["paper"]]
        if paper and score == "accuracy":
            axis.plot(*zip(*paper, strict=True), "k:", label="the paper, LongChat-7B")

    draw(grouped(rows, "question"), fill, path, xlabel="window, tokens", ylabel=LABELS[score])


def score_against_split(rows: list[dict], path: Path) -> None:
    """The score against the share of the kept channels that keys get: a panel for each ratio, a
    line for each kind of factors and each protocol."""
    score = score_of(rows)

    def points(line: list[dict], of: str) -> list[tuple[float, float]]:
        return sorted((r["kept_k"] / (r["kept_k"] + r["kept_v"]), float(r[of])) for r in line)

    def fill(axis, ratio: float, some: list[dict]) -> None:
        axis.set_title(f"{ratio:.0%} removed", fontsize=11)
        axis.xaxis.set_major_formatter(lambda x, _: f"{x:.0%}")
        for (question, factors), line in grouped(some, "question", "factors").items():
            axis.plot(
                *zip(*points(line, score), strict=True),
                "o--" if question == "decode" else "o-",
                color=COLOURS[factors.split(",")[0]],
                label=", ".join(part for part in (f"cskv, {factors}", question) if part),
                alpha=0.8,
            )
        paper = list(grouped([row for row in some if row["paper"]], "question").values())
        if paper and score == "accuracy":
            line = points(paper[0], "paper")
            axis.plot(*zip(*line, strict=True), "k:", label="the paper,\nprinted shares as kept")

    x = "keys' share of the kept channels"
    draw(grouped(rows, "ratio"), fill, path, xlabel=x, ylabel=LABELS[score])


def singular_values(values: Tensor, path: Path) -> None:
    """values [layers, 2, d_kv], largest first, of keys and values; each layer's largest is 1."""
    layers, _, d_kv = values.shape
    shades = pyplot().get_cmap("viridis")

    def fill(axis, name: str, lines: Tensor) -> None:
        axis.set_title(f"{name}, before RoPE", fontsize=11)
        for i, line in enumerate(lines):
            few = layers <= 8 or i in (0, layers // 2, layers - 1)
            y, label = (line / line[0]).clamp(min=1e-4), f"layer {i}" if few else None
            axis.plot(range(1, d_kv + 1), y, color=shades(i / max(1, layers - 1)), label=label)
        for removed in (0.5, 0.8):
            kept = (1 - removed) * d_kv
            axis.axvline(kept, color="tab:red", linestyle=":")
            text = {"rotation": 90, "ha": "right", "va": "bottom", "color": "tab:red"}
            axis.annotate(f"{removed:.0%} removed ", (kept, 1e-4), fontsize=8, **text)

    labels = {"xlabel": "singular value, in order", "ylabel": "relative to the first"}
    panels = {"keys": values[:, 0], "values": values[:, 1]}
    draw(panels, fill, path, yscale="log", **labels)


def loss_curves(curves: list[dict], path: Path) -> None:
    """Losses of every step, smoothed, over the floor; a panel for each ratio."""
    slowest = min(curve["lr"] for curve in curves)

    def fill(axis, ratio: float, some: list[dict]) -> None:
        axis.set_title(f"{ratio:.0%} of the channels removed", fontsize=11)
        for curve in some:
            losses, width = curve["losses"], max(1, len(curve["losses"]) // 50)
            axis.plot(
                [fmean(losses[max(0, i - width) : i + 1]) for i in range(len(losses))],
                color=COLOURS[curve["init"]],
                linestyle="--" if curve["lr"] == slowest else "-",
                label=f"{curve['init']}, lr {curve['lr']:g}",
            )
        floor = "floor of the samples\nmeasured before and after"
        axis.axhline(some[0]["floor"], color="black", linestyle=":", label=floor)

    labels = {"xlabel": "step", "ylabel": "loss (equation 2)"}
    draw(grouped(curves, "ratio"), fill, path, yscale="log", **labels)
