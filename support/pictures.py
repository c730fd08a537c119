"""Pictures of panels side by side, made with matplotlib (requirements-extra.txt)."""

from collections.abc import Callable
from pathlib import Path

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
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110, bbox_inches="tight")
    pyplot().close(figure)
