"""The figures of experiments/: which points of a table's rows they show (pictures.py draws)."""

from pathlib import Path
from statistics import fmean

from torch import Tensor

from experiments.pictures import draw, pyplot, save_figure
from experiments.tables import grouped

COLOURS = {
    "random": "tab:gray",
    "svd": "tab:red",
    "asvd": "tab:orange",
    "optimal": "tab:blue",
    "attention": "tab:purple",
    "budget": "tab:red",
}
LABELS = {"accuracy": "LongEval, share answered right", "perplexity": "perplexity"}


def score_name(row: dict) -> str:
    return "perplexity" if "perplexity" in row else "accuracy"


def point(panel: str, label: str, x: float, y: float, colour: str | None, marks: str) -> dict:
    """A point of `draw`."""
    return {"panel": panel, "label": label, "x": x, "y": y, "colour": colour, "marks": marks}


def score_against_bytes(rows: list[dict], colours: dict, path: Path) -> None:
    """Every method in one picture: the score, a mean over LongEval's lengths, against the bytes
    really held; a panel for each protocol, or for each text and length of context. `colours` are of
    the caches; None lets matplotlib choose."""
    score = score_name(rows[0])
    keys = ["question", "text", "context", "cache", "factors", "ratio", "bits", "sinks"]
    points = []
    for group in grouped(rows, *keys).values():
        row = group[0]
        factors = row["factors"]
        panel = f"question: {row['question']}" if "question" in row else ""
        if "text" in row:
            panel = f"{row['text']}, {row['context']} tokens"
        colour, marks = colours[row["cache"]], "o-"
        if factors.startswith("budget"):
            colour, marks = COLOURS["budget"], "s-"
        elif "optimal" in factors:
            marks = "o--"
        parts = [row["cache"], factors]
        if "optimal" in factors and row["bits"] != "16":
            parts.append(f"{row['bits']} bits")
        if row["sinks"]:
            parts.append(f"{row['sinks']} sinks")
        label = ", ".join(filter(None, parts))
        removed = fmean([one["measured_ratio"] for one in group])
        mean = fmean([one[score] for one in group])
        points.append(point(panel, label, removed, mean, colour, marks))
    yscale = "log" if score == "perplexity" else "linear"
    draw(points, path, xlabel="measured ratio", ylabel=LABELS[score], yscale=yscale)


def cskv_points(row: dict, panel: str, x: float, protocol: str = "") -> list[dict]:
    """A row of CSKV, named and coloured by its factors, and the paper's beside it, if any."""
    score = score_name(row)
    label = ", ".join(filter(None, ("cskv", row["factors"], protocol)))
    colour = COLOURS[row["factors"].split(",")[0]]
    marks = "o--" if protocol == "decode" else "o-"
    points = [point(panel, label, x, row[score], colour, marks)]
    if row["paper"] and score == "accuracy":
        points.append(point(panel, "the paper, LongChat-7B", x, float(row["paper"]), "black", ":"))
    return points


def score_against_window(rows: list[dict], path: Path) -> None:
    """A panel for each protocol, a line for each kind of factors."""
    points = []
    for row in rows:
        points += cskv_points(row, row.get("question", ""), row["window"])
    draw(points, path, log_x=True, xlabel="window, tokens", ylabel=LABELS[score_name(rows[0])])


def score_against_split(rows: list[dict], path: Path) -> None:
    """A panel for each ratio, a line for each kind of factors and each protocol."""
    points = []
    for row in rows:
        share = 100 * row["kept_k"] / (row["kept_k"] + row["kept_v"])
        panel = f"{row['ratio']:.0%} removed"
        points += cskv_points(row, panel, share, row.get("question", ""))
    xlabel = "keys' share of the kept channels, %"
    draw(points, path, xlabel=xlabel, ylabel=LABELS[score_name(rows[0])])


def singular_values(values: Tensor, path: Path) -> None:
    """values [layers, 2, d_kv], largest first, of keys and values; each layer's largest is 1."""
    layers, _, d_kv = values.shape
    relative = (values / values[..., :1]).clamp(min=1e-4)
    shades = pyplot().get_cmap("viridis")
    points = []
    for side, title in enumerate(("keys, before RoPE", "values, before RoPE")):
        for i, line in enumerate(relative[:, side].tolist()):
            few = layers <= 8 or i in (0, layers // 2, layers - 1)
            label = f"layer {i}" if few else f"_{i}"  # matplotlib leaves _i out of the legend
            for n, y in enumerate(line, 1):
                points.append(point(title, label, n, y, shades(i / max(1, layers - 1)), "-"))
        for removed in (0.5, 0.8):
            for y in (relative.min().item(), 1.0):
                x = (1 - removed) * d_kv
                points.append(point(title, f"{removed:.0%} removed", x, y, "tab:red", ":"))
    labels = {"xlabel": "singular value, in order", "ylabel": "relative to the first"}
    draw(points, path, yscale="log", **labels)


def loss_curves(curves: list[dict], path: Path) -> None:
    """Losses of every step, smoothed, over the floor; a panel for each ratio."""
    slowest = min(curve["lr"] for curve in curves)
    points = []
    for curve in curves:
        panel = f"{curve['ratio']:.0%} of the channels removed"
        marks = "--" if curve["lr"] == slowest else "-"
        label = f"{curve['init']}, lr {curve['lr']:g}"
        losses = curve["losses"]
        width = max(1, len(losses) // 50)
        for i in range(len(losses)):
            smooth = fmean(losses[max(0, i - width) : i + 1])
            points.append(point(panel, label, i, smooth, COLOURS[curve["init"]], marks))
            floor = "floor of the samples\nmeasured before and after"
            points.append(point(panel, floor, i, curve["floor"], "black", ":"))
    draw(points, path, yscale="log", xlabel="step", ylabel="loss (equation 2)")


def budget_plan(rows: list[dict], path: Path) -> None:
    """What each side of each layer keeps: its rank as a colour, and rank and bits written in it."""
    sides = grouped(rows, "of")
    layers = len(rows) // 2
    most = max(row["rank"] for row in rows)
    figure, axis = pyplot().subplots(figsize=(1.5 + 0.42 * layers, 2.2))
    ranks = [[row["rank"] for row in side] for side in sides.values()]
    image = axis.imshow(ranks, cmap="viridis", vmin=0, vmax=most, aspect="auto")
    for y, side in enumerate(sides.values()):
        for x, row in enumerate(side):
            colour = "black" if row["rank"] > 0.6 * most else "white"
            text = f"{row['rank']}\nx {row['bits']}"
            axis.text(x, y, text, ha="center", va="center", fontsize=8, color=colour)
    axis.set(xlabel="layer", yticks=range(len(sides)), yticklabels=list(sides))
    names = []
    for row in rows[:layers]:
        last = row["layer"] + row["layers"] - 1
        names.append(f"{row['layer']}" if last == row["layer"] else f"{row['layer']} to {last}")
    axis.set_xticks(range(layers), names)
    figure.colorbar(image, label="rank", pad=0.01)
    save_figure(figure, path)


def time_against_tokens(rows: list[dict], path: Path) -> None:
    """Milliseconds of a decode step against tokens, a line for each cache of experiments.speed."""
    points = []
    for row in rows:
        marks = "o--" if row["cache"].startswith("transformers") else "o-"
        points.append(point("", row["cache"], row["tokens"], row["decode_ms"], None, marks))
    ticks = sorted({row["tokens"] for row in rows})
    labels = {"xlabel": "tokens in the cache", "ylabel": "milliseconds of a decode step"}
    draw(points, path, log_x=True, xticks=ticks, ylim=(0, None), **labels)
