"""Pictures of panels side by side, made with matplotlib (requirements-extra.txt)."""

from collections.abc import Callable
from pathlib import Path

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
    save_figure(figure, path)


def save_figure(figure, path: Path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110, bbox_inches="tight")
    pyplot().close(figure)


def draw_lines(
    rows: list[dict],
    panel: str,
    titles: dict,
    score: str,
    other: tuple[str, str],
    path: Path,
    **axes,
) -> None:
    """Column `score` of the rows against `x`: a panel for each value of the column `panel`, a line
    for each `label`, with its `colour`, its `marks` and, if it has one, its `band`.

    `other` is a column of further scores at these x, or "", and what their dotted line is called.
    """
    column, name = other

    def fill(axis, key: object, some: list[dict]) -> None:
        axis.set_title(titles.get(key, key), fontsize=11)
        if axes.get("xscale") == "log":
            axis.set_xscale("log", base=2)
        for label, line in grouped(some, "label").items():
            line = sorted(line, key=lambda row: row["x"])
            x, y = [row["x"] for row in line], [row[score] for row in line]
            colour = line[0]["colour"]
            axis.plot(x, y, line[0]["marks"], color=colour, label=label, alpha=0.85)
            if "band" in line[0]:
                low, high = zip(*(row["band"] for row in line), strict=True)
                axis.fill_between(x, low, high, color=colour, alpha=0.08)
        theirs = sorted({(row["x"], float(row[column])) for row in some if row.get(column)})
        if theirs and name:
            axis.plot(*zip(*theirs, strict=True), "k:", label=name)

    draw(grouped(rows, panel), fill, path, **axes)
