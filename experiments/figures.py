"""The pictures of experiments/, made with matplotlib (requirements-extra.txt).

Each function gets the rows of a table, or what a figure needs, and writes one PNG.
"""

from pathlib import Path
from statistics import fmean

from torch import Tensor

from experiments.pictures import draw, draw_lines, pyplot, save_figure
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


def draw_scores(rows: list[dict], panel: str, titles: dict, paper: str, path: Path, **axes) -> None:
    """Accuracy or perplexity, and the paper's own accuracy in a line of that name: `draw_lines`."""
    score = "perplexity" if "perplexity" in rows[0] else "accuracy"
    theirs = ("paper", paper) if score == "accuracy" else ("", "")
    draw_lines(rows, panel, titles, score, theirs, path, ylabel=LABELS[score], **axes)


def accuracy_against_bytes(rows: list[dict], colours: dict, path: Path) -> None:
    """Every method in one picture: the score against the bytes really held, a panel a protocol.
    `colours` are of the caches; None lets matplotlib choose."""
    lines = []
    for group in grouped(rows, "question", "cache", "factors", "ratio", "bits", "sinks").values():
        row, kind = group[0], group[0]["factors"].replace(" in 4 bits", "")
        means = {
            name: fmean(one[name] for one in group)
            for name in ("measured_ratio", "accuracy", "perplexity")
            if name in row
        }  # over the lengths
        marks = ("s" if row["cache"] == "asvd" else "o") + ("--" if "optimal" in kind else "-")
        label = f"{row['cache']}, {kind}" if kind else row["cache"]
        label += f", {row['sinks']} sinks" if int(row.get("sinks", 0)) else ""
        own = {"question": row.get("question", ""), "x": means["measured_ratio"], "paper": ""}
        own |= {"colour": colours[row["cache"]], "label": label, "marks": marks}
        own |= {"colour": COLOURS["budget"]} if kind == "budget" else {}
        lines.append({**means, **own})
    xlabel = "measured compression ratio, means over the lengths"
    draw_scores(lines, "question", PROTOCOL, "", path, xlabel=xlabel)


def perplexity_against_bytes(rows: list[dict], colours: dict, path: Path) -> None:
    """Perplexity against the bytes really held, a panel for each text and each length of context.
    KIVI's points are joined from none to some sinks, and so are those of factors of one kind."""
    lines = []
    for row in rows:
        kind = f", {row['factors']}" if row["factors"] else ""
        kind += f", {row['bits']} bits" if row["factors"] and row["bits"] in ("16", "4") else ""
        own = {"panel": f"{row['text']}, {row['context']} tokens", "x": row["measured_ratio"]}
        own |= {"label": row["cache"] + kind, "colour": colours[row["cache"]], "paper": ""}
        own |= {"marks": "o-" if row["bits"] == "16" else "o--"}
        own |= {"marks": "s-", "colour": COLOURS["budget"]} if row["factors"] == "budget" else {}
        lines.append({**row, **own})
    xlabel = "measured compression ratio"
    draw_scores(lines, "panel", {}, "", path, xlabel=xlabel, yscale="log")


def of_factors(row: dict, x: float, marks: str, label: str = "") -> dict:
    """A row of CSKV as a point of `draw_scores`."""
    name = ", ".join(part for part in ("cskv", row["factors"], label) if part)
    colour = COLOURS[row["factors"].split(",")[0]]
    return {**row, "x": x, "label": name, "colour": colour, "marks": marks}


def score_against_window(rows: list[dict], path: Path) -> None:
    """The score against the window: a panel a protocol, a line for each kind of factors."""
    lines = [of_factors(row, row["window"], "o-") for row in rows]
    lines = [{**row, "band": row["interval"]} if "interval" in row else row for row in lines]
    axes = {"xlabel": "window, tokens", "xscale": "log"}
    draw_scores(lines, "question", PROTOCOL, "the paper, LongChat-7B", path, **axes)


def score_against_split(rows: list[dict], path: Path) -> None:
    """The score against the share of the kept channels that keys get: a panel for each ratio, a
    line for each kind of factors and each protocol."""
    lines = []
    for row in rows:
        share, question = row["kept_k"] / (row["kept_k"] + row["kept_v"]), row.get("question", "")
        marks = "o--" if question == "decode" else "o-"
        lines.append(of_factors(row, 100 * share, marks, question))
    titles = {row["ratio"]: f"{row['ratio']:.0%} removed" for row in rows}
    paper, xlabel = "the paper,\nprinted shares as kept", "keys' share of the kept channels, %"
    draw_scores(lines, "ratio", titles, paper, path, xlabel=xlabel)


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


def budget_plan(rows: list[dict], path: Path) -> None:
    """What each side of each layer keeps: its rank as a colour, and rank and bits written in it."""
    sides = grouped(rows, "of")
    layers, most = len(rows) // 2, max(row["rank"] for row in rows)
    figure, axis = pyplot().subplots(figsize=(1.5 + 0.42 * layers, 2.2))
    ranks = [[row["rank"] for row in side] for side in sides.values()]
    image = axis.imshow(ranks, cmap="viridis", vmin=0, vmax=most, aspect="auto")
    for y, side in enumerate(sides.values()):
        for x, row in enumerate(side):
            colour = "black" if row["rank"] > 0.6 * most else "white"
            text = f"{row['rank']}\nx {row['bits']}"
            axis.text(x, y, text, ha="center", va="center", fontsize=8, color=colour)
    axis.set(xlabel="layer", yticks=range(len(sides)), yticklabels=list(sides))
    axis.set_xticks(range(layers))
    figure.colorbar(image, label="rank", pad=0.01)
    save_figure(figure, path)


def time_against_tokens(rows: list[dict], path: Path) -> None:
    """Milliseconds of a decode step against tokens, a line for each cache of experiments.speed."""

    def fill(axis, _: str, lines: dict) -> None:
        for name, points in lines.items():
            x, y = ([point[key] for point in points] for key in ("tokens", "decode_ms"))
            style = "--" if name.startswith("transformers") else "-"
            axis.plot(x, y, marker="o", linestyle=style, label=name)
        axis.set_ylim(bottom=0)
        axis.set_xscale("log", base=2)
        axis.set_xticks(sorted({row["tokens"] for row in rows}))
        axis.xaxis.set_major_formatter("{x:,.0f}")

    labels = {"xlabel": "tokens in the cache", "ylabel": "milliseconds of a decode step"}
    draw({"": grouped(rows, "cache")}, fill, path, **labels)
