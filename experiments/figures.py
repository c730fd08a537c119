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
PROTOCOL = {
    "prefill": "question prefilled with the text",
    "decode": "question decoded after compression",
    "": "",
}


def score_name(row: dict) -> str:
    return "perplexity" if "perplexity" in row else "accuracy"


def point(panel: str, label: str, x: float, y: float, colour: str | None, marks: str) -> dict:
    """A point of `draw`."""
    return {"panel": panel, "label": label, "x": x, "y": y, "colour": colour, "marks": marks}


def cskv_points(row: dict, panel: str, x: float, marks: str, protocol: str, paper: str) -> list:
    """A row of CSKV, named and coloured by its factors, and beside it the paper's, if there is one:
    the label `paper`."""
    name = score_name(row)
    label = ", ".join(filter(None, ("cskv", row["factors"], protocol)))
    points = [point(panel, label, x, row[name], COLOURS[row["factors"].split(",")[0]], marks)]
    if row.get("paper") and name == "accuracy":
        points.append(point(panel, paper, x, float(row["paper"]), "black", ":"))
    return points


def accuracy_against_bytes(rows: list[dict], colours: dict, path: Path) -> None:
    """Every method in one picture: the score against the bytes really held, a panel a protocol.
    `colours` are of the caches; None lets matplotlib choose."""
    points = []
    for group in grouped(rows, "question", "cache", "factors", "ratio", "bits", "sinks").values():
        row = group[0]
        score = score_name(row)
        mean = fmean(one[score] for one in group)  # over the lengths
        removed = fmean(one["measured_ratio"] for one in group)
        kind = row["factors"].replace(" in 4 bits", "")
        label = f"{row['cache']}, {kind}" if kind else row["cache"]
        if int(row.get("sinks", 0)):
            label += f", {row['sinks']} sinks"
        colour = COLOURS["budget"] if kind.startswith("budget") else colours[row["cache"]]
        marks = "s" if row["cache"] == "asvd" else "o"
        marks += "--" if "optimal" in kind else "-"
        panel = PROTOCOL[row.get("question", "")]
        points.append(point(panel, label, removed, mean, colour, marks))
    xlabel = "measured compression ratio, means over the lengths"
    draw(points, path, xlabel=xlabel, ylabel=LABELS[score])


def perplexity_against_bytes(rows: list[dict], colours: dict, path: Path) -> None:
    """Perplexity against the bytes really held, a panel for each text and each length of context.
    KIVI's points are joined from none to some sinks, and so are those of factors of one kind."""
    points = []
    for row in rows:
        label, colour = row["cache"], colours[row["cache"]]
        marks = "o-" if row["bits"] == "16" else "o--"
        if row["factors"]:
            label += f", {row['factors']}"
        if row["factors"].startswith("budget"):
            colour, marks = COLOURS["budget"], "s-"
        elif row["factors"]:
            label += f", {row['bits']} bits"
        panel = f"{row['text']}, {row['context']} tokens"
        x, y = row["measured_ratio"], row["perplexity"]
        points.append(point(panel, label, x, y, colour, marks))
    xlabel = "measured compression ratio"
    draw(points, path, xlabel=xlabel, ylabel=LABELS["perplexity"], yscale="log")


def is_paper(point: dict) -> bool:
    """Sorts the paper's points behind all others, in the legend too."""
    return point["colour"] == "black"


def score_against_window(rows: list[dict], path: Path) -> None:
    """The score against the window: a panel a protocol, a line for each kind of factors."""
    points = []
    for row in rows:
        panel = PROTOCOL[row.get("question", "")]
        of_row = cskv_points(row, panel, row["window"], "o-", "", "the paper, LongChat-7B")
        if "interval" in row:
            of_row[0]["band"] = row["interval"]
        points += of_row
    points.sort(key=is_paper)
    ylabel = LABELS[score_name(rows[0])]
    draw(points, path, log_x=True, xlabel="window, tokens", ylabel=ylabel)


def score_against_split(rows: list[dict], path: Path) -> None:
    """The score against the share of the kept channels that keys get: a panel for each ratio, a
    line for each kind of factors and each protocol."""
    points = []
    for row in rows:
        share = 100 * row["kept_k"] / (row["kept_k"] + row["kept_v"])
        protocol = row.get("question", "")
        marks = "o--" if protocol == "decode" else "o-"
        panel = f"{row['ratio']:.0%} removed"
        paper = "the paper,\nprinted shares as kept"
        points += cskv_points(row, panel, share, marks, protocol, paper)
    points.sort(key=is_paper)
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
            shade = shades(i / max(1, layers - 1))
            few = layers <= 8 or i in (0, layers // 2, layers - 1)
            label = f"layer {i}" if few else f"_{i}"
            for n, y in enumerate(line, 1):
                points.append(point(title, label, n, y, shade, "-"))
        for removed in (0.5, 0.8):
            label, x = f"{removed:.0%} removed", (1 - removed) * d_kv
            for y in (relative.min().item(), 1.0):
                points.append(point(title, label, x, y, "tab:red", ":"))
    labels = {"xlabel": "singular value, in order", "ylabel": "relative to the first"}
    draw(points, path, yscale="log", **labels)


def loss_curves(curves: list[dict], path: Path) -> None:
    """Losses of every step, smoothed, over the floor; a panel for each ratio."""
    slowest = min(curve["lr"] for curve in curves)
    points = []
    for ratio, some in grouped(curves, "ratio").items():
        panel = f"{ratio:.0%} of the channels removed"
        for curve in some:
            marks = "--" if curve["lr"] == slowest else "-"
            label, colour = f"{curve['init']}, lr {curve['lr']:g}", COLOURS[curve["init"]]
            losses = curve["losses"]
            width = max(1, len(losses) // 50)
            for i in range(len(losses)):
                smooth = fmean(losses[max(0, i - width) : i + 1])
                points.append(point(panel, label, i, smooth, colour, marks))
        label = "floor of the samples\nmeasured before and after"
        for x in (0, len(losses) - 1):
            points.append(point(panel, label, x, some[0]["floor"], "black", ":"))
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
    for row in next(iter(sides.values())):
        last = row["layer"] + row.get("layers", 1) - 1
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
