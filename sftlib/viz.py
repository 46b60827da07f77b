"""Pictures and tables that read well: labelled, described in words, safe for colour-blind readers.

Every figure is a `Picture`: the image, and below it its description in words, which a screen
reader reads and which stays where images do not show.
"""

from __future__ import annotations

import html
import textwrap
from base64 import b64encode
from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas
    from IPython.display import HTML
    from matplotlib.figure import Figure
    from transformers import PreTrainedTokenizerBase

# Okabe & Ito, "Color Universal Design" (2008): told apart with any kind of colour vision.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
HATCHES = ("", "//", "..", "xx", "--", "\\\\")


class Picture:
    """A finished figure with its description; shown by being the last value of a cell."""

    def __init__(self, figure: Figure, alt: str) -> None:
        buffer = BytesIO()
        figure.savefig(buffer, format="png", dpi=100, bbox_inches="tight")
        self.png, self.alt = buffer.getvalue(), alt

    def _ipython_display_(self) -> None:
        from IPython.display import display

        data = {"image/png": b64encode(self.png).decode(), "text/plain": self.alt}
        display(data, metadata={"image/png": {"alt": self.alt}}, raw=True)
        display({"text/markdown": f"*{self.alt}*", "text/plain": self.alt}, raw=True)


def _axes(title: str, x_label: str, y_label: str, size: tuple[float, float] = (7, 3.5)):
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot(title=title, xlabel=x_label, ylabel=y_label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    return figure, axes


def curves(
    series: Mapping[str, tuple[Sequence[float], ...]],
    title: str,
    alt: str,
    x_label: str = "optimizer step",
    y_label: str = "loss (nats per token)",
    log_x: bool = False,
) -> Picture:
    """Lines over steps, for instance training losses.

    Args:
        series: name → (x values, y values), drawn in different colours and line styles; with two
            more, lowest and highest y values, the range between them is shaded.
        alt: what the figure shows, in a sentence or two.
        log_x: space the x values by their ratio, and mark and name them (of many, those that begin
            with 1, 2 or 5).
    """
    figure, axes = _axes(title, x_label, y_label)
    styles = ("-", "--", "-.", ":")
    for i, (name, (x, y, *limits)) in enumerate(series.items()):
        look = {"color": COLOURS[i % len(COLOURS)], "linestyle": styles[i % 4], "label": name}
        axes.plot(x, y, marker="o" if log_x else None, clip_on=not log_x, **look)
        if limits:
            axes.fill_between(x, *limits, color=COLOURS[i % len(COLOURS)], alpha=0.2, linewidth=0)
    if log_x:
        marked = sorted({value for x, *_ in series.values() for value in x})
        if len(marked) > 8:
            marked = [value for value in marked if f"{value:e}"[0] in "125"]
        axes.set_xscale("log")
        axes.set_xticks(marked, [f"{value:,}" for value in marked])
        axes.minorticks_off()
    else:
        axes.xaxis.get_major_locator().set_params(integer=True)  # there is no half step
    axes.set_ylim(bottom=0)
    if len(series) > 1:
        axes.legend(frameon=False)
    return Picture(figure, alt)


def panels(
    runs: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]],
    title: str,
    alt: str,
    x_label: str = "optimizer step",
    y_label: str = "loss (nats per token), grad_norm",
    columns: int = 6,
) -> Picture:
    """Many small figures with common axes, for instance one a training.

    The y axis is logarithmic down to 0.01, and has a zero below that.

    Args:
        runs: name of the panel → name of the line → (x values, y values); the lines of a name look
            alike in all panels, told apart by colour and line style. Where a value is NaN, the line
            ends with a cross.
        alt: what the figure shows, in a sentence or two.
    """
    from matplotlib.figure import Figure

    rows = -(-len(runs) // columns)
    figure = Figure(figsize=(1.9 * columns, 1.9 * rows + 0.6), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    names = list(dict.fromkeys(name for lines in runs.values() for name in lines))
    for axes, (run, lines) in zip(grid, runs.items(), strict=False):
        axes.set_title(run, loc="left", fontweight="bold", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)
        for name, (x, y) in lines.items():
            x, y = list(x), list(y)
            i = names.index(name)
            look = {"color": COLOURS[i % len(COLOURS)], "linestyle": ("-", "--", ":")[i % 3]}
            axes.plot(x, y, label=name, marker="o" if len(x) < 9 else None, markersize=3, **look)
            broken = [at for at, value in enumerate(y) if value != value]
            if broken and broken[0]:
                last = broken[0] - 1
                axes.plot(x[last], y[last], "X", color=look["color"], markersize=8)
        axes.set_yscale("symlog", linthresh=0.01)
        axes.set_yticks([0, 0.01, 0.1, 1, 10], ["0", "0.01", "0.1", "1", "10"])
        axes.set_ylim(0, 100)
        axes.minorticks_off()
    for axes in grid[len(runs) :]:
        axes.set_visible(False)
    figure.suptitle(title)
    figure.supxlabel(x_label, fontsize=10)
    figure.supylabel(y_label, fontsize=10)
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=len(labels), frameon=False)
    return Picture(figure, alt)


def compare(
    table: pandas.DataFrame, title: str, alt: str, y_label: str = "share of prompts (%)"
) -> Picture:
    """Grouped bars of shares: as `bars`, with values from 0 to 1 shown in per cent."""
    figure, axes = _bars(100 * table, title, y_label)
    axes.set_ylim(0, 112)
    return Picture(figure, alt)


def bars(table: pandas.DataFrame, title: str, alt: str, y_label: str) -> Picture:
    """Grouped bars: a group for each row of `table`, a bar for each column, values on the bars.

    Args:
        table: numbers, with the rows' and columns' names.
        alt: what the figure shows, in a sentence or two.
    """
    figure, axes = _bars(table, title, y_label)
    axes.set_ylim(0, 1.12 * table.to_numpy().max())
    return Picture(figure, alt)


def stacked(table: pandas.DataFrame, title: str, alt: str, y_label: str) -> Picture:
    """Bars in layers: a bar for each row of `table`, a layer for each column, the sum on top.

    Args:
        table: numbers, with the rows' and columns' names.
        alt: what the figure shows, in a sentence or two.
    """
    figure, axes = _axes(title, "", y_label, (max(7, 1.1 * len(table)), 3.8))
    below = 0 * table.sum(axis=1)
    for i, name in enumerate(table.columns):
        drawn = axes.bar(range(len(table)), table[name], 0.7, bottom=below, **_look(i, name))
        below = below + table[name]
    axes.bar_label(drawn, [f"{total:.1f}" for total in below], padding=2)
    _name_bars(axes, table)
    axes.set_ylim(0, 1.12 * below.max())
    return Picture(figure, alt)


def _bars(table: pandas.DataFrame, title: str, y_label: str):
    figure, axes = _axes(title, "", y_label, (max(7, 1.1 * table.size), 3.8))
    width = 0.8 / len(table.columns)
    whole = bool((table == table.round()).all(axis=None))
    for i, name in enumerate(table.columns):
        at = [group + (i - (len(table.columns) - 1) / 2) * width for group in range(len(table))]
        drawn = axes.bar(at, table[name], width * 0.92, **_look(i, name))
        axes.bar_label(drawn, fmt="%.0f" if whole else "%.1f", padding=2)
    _name_bars(axes, table)
    return figure, axes


def _look(i: int, name: object) -> dict:
    colour, hatch = COLOURS[i % len(COLOURS)], HATCHES[i % len(HATCHES)]
    return {"label": name, "color": colour, "hatch": hatch, "edgecolor": "white"}


def _name_bars(axes, table: pandas.DataFrame) -> None:
    names = [textwrap.fill(str(name), 13, break_long_words=False) for name in table.index]
    axes.set_xticks(range(len(table)), names)
    if len(table.columns) > 1:
        lines = 1 + max(name.count("\n") for name in names)
        place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.04 - 0.06 * lines)}
        axes.legend(frameon=False, ncols=len(table.columns), **place)


MARKERS = "osD^vPX*<>hd"


def scatter(
    points: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    title: str,
    alt: str,
    x_label: str,
    y_label: str,
    log_x: bool = False,
) -> Picture:
    """A marker for each name at the mean of its points, and its points small around it.

    Args:
        points: name → (x values, y values), for instance one of each a seed; told apart by colour
            and shape.
        log_x: space the x values by their ratio.
        alt: what the figure shows, in a sentence or two.
    """
    figure, axes = _axes(title, x_label, y_label, (8, 4.2))
    for i, (name, (x, y)) in enumerate(points.items()):
        look = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}
        axes.scatter(x, y, s=18, alpha=0.45, **look)
        mean = sum(x) / len(x), sum(y) / len(y)
        axes.scatter(*mean, s=90, edgecolor="black", linewidth=0.6, label=name, **look)
    if log_x:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return Picture(figure, alt)


def histogram(
    series: Mapping[str, Sequence[float]],
    title: str,
    alt: str,
    x_label: str,
    y_label: str = "share of its rows (%)",
    bins: int = 20,
) -> Picture:
    """How values are distributed in each series, as shares, so that small series show too.

    Args:
        series: name → values; all series share the bins.
        alt: what the figure shows, in a sentence or two.
    """
    figure, axes = _axes(title, x_label, y_label)
    values = [value for one in series.values() for value in one]
    low, high = min(values), max(values)
    edges = [low + (high - low) * i / bins for i in range(bins + 1)]
    styles = ("-", "--", "-.", ":")
    for i, (name, one) in enumerate(series.items()):
        axes.hist(
            one,
            edges,
            weights=[100 / len(one)] * len(one),
            histtype="step",
            linewidth=1.8,
            linestyle=styles[i % 4],
            color=COLOURS[i % len(COLOURS)],
            label=f"{name} ({len(one)})",
        )
    axes.legend(frameon=False)
    return Picture(figure, alt)


def tokens(
    ids: Sequence[int],
    mask: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    counts: bool = True,
) -> HTML:
    """A conversation token by token: learned from, only read, and control tokens.

    Colour is never the only sign: learned tokens are bold and underlined, control tokens framed.

    Args:
        ids: token ids of one conversation, as `sftlib.chat.encode` gives them.
        mask: 1 where the model learns from the token, 0 where it only reads it; same length.
        counts: say below how many there are of each kind.

    Raises:
        ValueError: `ids` and `mask` differ in length.
    """
    from IPython.display import HTML

    if len(ids) != len(mask):
        raise ValueError(f"Expected one mask value per token ({len(ids)}), found {len(mask)}.")
    control = set(tokenizer.all_special_ids)
    spans = [
        _token(str(tokenizer.decode([i])), bool(m), i in control)
        for i, m in zip(ids, mask, strict=True)
    ]
    n = sum(map(bool, mask))
    numbers = f"{len(ids)} tokens: ", f" ({n})", f" ({len(ids) - n})"
    total, learned, read = numbers if counts else ("", "", "")
    legend = (
        f"{total}{_token('learned from', True, False)}{learned}, "
        f"{_token('only read', False, False)}{read}; "
        f"{_token('control token', False, True)} framed"
    )
    return HTML(f'<p style="line-height:2">{"".join(spans)}</p><p>{legend}</p>')


def _token(text: str, learned: bool, control: bool) -> str:
    style = "background:#FBE3B5;color:#000;font-weight:bold;text-decoration:underline;"
    if not learned:
        style = "background:#E3EEF6;color:#000;"
    border = "2px solid #0072B2" if control else "1px solid #fff"
    shown = html.escape(text).replace("\n", "⏎").replace(" ", "&nbsp;")
    broken = "<br>" if text.endswith("\n") else ""
    return (
        f'<code style="{style}border:{border};border-radius:4px;padding:1px 2px;'
        f'white-space:pre">{shown}</code><wbr>{broken}'
    )
