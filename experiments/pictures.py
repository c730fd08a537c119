"""Pictures of panels side by side, made with matplotlib (requirements-extra.txt)."""

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


def draw(points: list[dict], path: Path, log_x: bool = False, **settings) -> None:
    """Draws lines, in a panel for each `panel` of the points, and there one for each `label`, in
    the same colour everywhere. A point has also `x`, `y` and the `marks` of its line as matplotlib
    calls them; `settings` are those of matplotlib's axes."""
    panels = grouped(points, "panel")
    labels = list(grouped(points, "label"))
    colours = pyplot().get_cmap("tab20")
    size = (5.6 * len(panels), 4.4)
    figure, axes = pyplot().subplots(1, len(panels), figsize=size, squeeze=False, sharey=True)
    for axis, (title, own) in zip(axes[0], panels.items(), strict=True):
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
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    save_figure(figure, path)


def save_figure(figure, path: Path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110, bbox_inches="tight")
    pyplot().close(figure)
