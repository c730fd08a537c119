"""The pictures of experiments/paper.py, made with matplotlib (requirements-extra.txt).

Each function gets the rows of a table, or what a figure needs, and writes one PNG.
"""

from pathlib import Path

from torch import Tensor

from support.command import UserError, replacing

COLOURS = {
    "full": "black",
    "streaming": "tab:gray",
    "h2o": "tab:brown",
    "asvd": "tab:orange",
    "cskv": "tab:blue",
    "kivi-4": "tab:green",
    "kivi-2": "limegreen",
    "random": "tab:gray",
    "svd": "tab:red",
    "optimal": "tab:blue",
    "attention": "tab:purple",
}
LABELS = {"accuracy": "LongEval, share answered right", "perplexity": "perplexity"}


def pyplot():
    """matplotlib's pyplot, drawing to files. Raises `UserError` if it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("figures need matplotlib; pip install -r requirements-extra.txt") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save(figure, path: Path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110, bbox_inches="tight")
    pyplot().close(figure)


def panels(rows: list[dict], key: str) -> dict:
    """Rows by the value of `key`, in the order of their first appearance; one panel each."""
    result: dict = {}
    for row in rows:
        result.setdefault(row.get(key, ""), []).append(row)
    return result


def measured(rows: list[dict]) -> str:
    return "perplexity" if "perplexity" in rows[0] else "accuracy"


def subplots(count: int, height: float = 4.2):
    figure, axes = pyplot().subplots(
        1, count, figsize=(5.6 * count, height), squeeze=False, sharey=True
    )
    return figure, axes[0]


def start_panel(axis, title: str, x: str, y: str) -> None:
    axis.set_title(title, fontsize=11)
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.grid(alpha=0.3)


PROTOCOL = {
    "prefill": "question prefilled with the text",
    "decode": "question decoded after compression",
    "": "",
}


def accuracy_against_bytes(rows: list[dict], path: Path) -> None:
    """Every method in one picture: the score against the bytes really held, a panel a protocol."""
    score, by_question = measured(rows), panels(rows, "question")
    figure, axes = subplots(len(by_question), 4.8)
    for axis, (question, some) in zip(axes, by_question.items(), strict=True):
        start_panel(
            axis,
            PROTOCOL[question],
            "measured compression ratio, means over the lengths",
            LABELS[score],
        )
        lines: dict = {}
        for row in some:  # the mean over lengths, at the mean ratio
            label = ", ".join(part for part in (row["cache"], row["factors"]) if part)
            label = label.replace(" in 4 bits", "") if row["cache"] == "cskv" else label
            lines.setdefault(label, {}).setdefault((row["ratio"], row["bits"]), []).append(row)
        for label, points in lines.items():
            cache, *kind = label.split(", ", 1)
            means = sorted(
                tuple(
                    sum(r[name] for r in group) / len(group) for name in ("measured_ratio", score)
                )
                for group in points.values()
            )
            axis.plot(
                *zip(*means, strict=True),
                "o" if cache != "asvd" else "s",
                linestyle="--" if kind and "optimal" in kind[0] else "-",
                color=COLOURS[cache],
                label=label,
                markersize=6,
                alpha=0.85,
            )
    axes[-1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    save(figure, path)


def score_against(rows: list[dict], name: str, path: Path) -> None:
    """The score against a power of two, such as the window: a line for each kind of factors."""
    score, by_question = measured(rows), panels(rows, "question")
    figure, axes = subplots(len(by_question))
    for axis, (question, some) in zip(axes, by_question.items(), strict=True):
        start_panel(axis, PROTOCOL[question], f"{name}, tokens", LABELS[score])
        axis.set_xscale("log", base=2)
        for factors, line in panels(some, "factors").items():
            x, y = [row[name] for row in line], [row[score] for row in line]
            colour = COLOURS[factors.split(",")[0]]
            axis.plot(x, y, "o-", color=colour, label=f"cskv, {factors}")
            if score == "accuracy":
                low, high = zip(*(row["interval"] for row in line), strict=True)
                axis.fill_between(x, low, high, color=colour, alpha=0.12)
        paper = [(row[name], float(row["paper"])) for row in some if row["paper"]]
        if paper and score == "accuracy":
            axis.plot(*zip(*paper, strict=True), "k:", label="the paper, LongChat-7B")
        axis.legend(fontsize=9)
    save(figure, path)


def score_against_split(rows: list[dict], path: Path) -> None:
    """The score against the share of the kept channels that keys get: a panel for each ratio, a
    line for each kind of factors and each protocol."""
    score, by_ratio = measured(rows), panels(rows, "ratio")

    def points(line: list[dict], of: str) -> list[tuple[float, float]]:
        return sorted((r["kept_k"] / (r["kept_k"] + r["kept_v"]), float(r[of])) for r in line)

    figure, axes = subplots(len(by_ratio))
    for axis, (ratio, some) in zip(axes, by_ratio.items(), strict=True):
        start_panel(axis, f"{ratio:.0%} removed", "keys' share of the kept channels", LABELS[score])
        axis.xaxis.set_major_formatter(lambda x, _: f"{x:.0%}")
        for question, own in panels(some, "question").items():
            for factors, line in panels(own, "factors").items():
                axis.plot(
                    *zip(*points(line, score), strict=True),
                    "o--" if question == "decode" else "o-",
                    color=COLOURS[factors.split(",")[0]],
                    label=", ".join(part for part in (f"cskv, {factors}", question) if part),
                    alpha=0.8,
                )
        paper = [row for row in own if row["paper"]]
        if paper and score == "accuracy":
            line = points(paper, "paper")
            axis.plot(*zip(*line, strict=True), "k:", label="the paper,\nprinted shares as kept")
    axes[-1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    save(figure, path)


def singular_values(values: Tensor, path: Path) -> None:
    """values [layers, 2, d_kv], largest first, of keys and values; each layer's largest is 1."""
    figure, axes = subplots(2)
    colours = pyplot().get_cmap("viridis")
    for j, (axis, name) in enumerate(zip(axes, ("keys", "values"), strict=True)):
        start_panel(
            axis, f"{name}, before RoPE", "singular value, in order", "relative to the first"
        )
        axis.set_yscale("log")
        for i, line in enumerate(values[:, j]):
            shade = colours(i / max(1, len(values) - 1))
            few = len(values) <= 8 or i in (0, len(values) // 2, len(values) - 1)
            label = f"layer {i}" if few else None
            y = (line / line[0]).clamp(min=1e-4)
            axis.plot(range(1, len(line) + 1), y, color=shade, label=label, alpha=0.8)
        for removed in (0.5, 0.8):
            axis.axvline((1 - removed) * values.shape[2], color="tab:red", linestyle=":")
            axis.annotate(
                f"{removed:.0%} removed ",
                ((1 - removed) * values.shape[2], axis.get_ylim()[0]),
                rotation=90,
                ha="right",
                va="bottom",
                fontsize=8,
                color="tab:red",
            )
        axis.legend(fontsize=9)
    save(figure, path)


def loss_curves(curves: list[dict], path: Path) -> None:
    """Losses of every step, smoothed, over the floor; a panel for each ratio."""
    by_ratio = panels(curves, "ratio")
    figure, axes = subplots(len(by_ratio))
    for axis, (ratio, some) in zip(axes, by_ratio.items(), strict=True):
        start_panel(axis, f"{ratio:.0%} of the channels removed", "step", "loss (equation 2)")
        axis.set_yscale("log")
        for curve in some:
            losses, width = curve["losses"], max(1, len(curve["losses"]) // 50)
            smooth = [
                sum(losses[max(0, i - width) : i + 1]) / len(losses[max(0, i - width) : i + 1])
                for i in range(len(losses))
            ]
            slow = curve["lr"] == min(other["lr"] for other in some)
            axis.plot(
                smooth,
                color=COLOURS[curve["init"]],
                linestyle="--" if slow else "-",
                label=f"{curve['init']}, lr {curve['lr']:g}",
            )
        axis.axhline(
            some[0]["floor"],
            color="black",
            linestyle=":",
            label="floor of the samples\nmeasured before and after",
        )
    axes[-1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    save(figure, path)
