"""Figures for the lessons: labelled, described in words, readable with any colour vision.

Every figure is a `Picture`: an image with its description in words below it. A screen reader reads
the description, and it remains where images are not shown.

Where a figure takes a number, it also takes what several seeds gave: a list of numbers, or a
`Spread`. It then shows their mean and, by whiskers, the least and the greatest of them. A sentence
that says so is added to the description. No colour is used twice in a figure: where there are more
series than colours, `scatter` uses one colour, and the other figures raise an error.
"""

from __future__ import annotations

import html
import re
import textwrap
from base64 import b64encode
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from difflib import SequenceMatcher
from io import BytesIO
from math import isnan, nan
from statistics import fmean
from typing import TYPE_CHECKING, NamedTuple, cast

from sftlib._labels import label_points
from sftlib.experiments.spread import Spread

if TYPE_CHECKING:
    import pandas
    from IPython.display import HTML
    from matplotlib.figure import Figure
    from transformers import PreTrainedTokenizerBase

# Okabe & Ito, "Color Universal Design" (2008). Green and purple still look much alike to people who
# see no red or no green, so lines, hatches and markers differ as well.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
HATCHES = ("", "//", "..", "xx", "--", "\\\\")
LINES = ("-", "--", "-.", ":")
MARKERS = "osD^vPX*<>hd"
WHISKERS = {"ecolor": "black", "elinewidth": 1.2, "capsize": 3}
RANGE = "from the least to the greatest value"
FEW = 12  # points on a line: whiskers at more of them would hide it

Seeds = float | Sequence[float] | Spread
"""One number, or what several seeds gave."""


class Picture:
    """A finished figure with its description. As the last value of a cell, it is shown."""

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
    """A figure with one plot; its size is in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot(title=title, xlabel=x_label, ylabel=y_label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    return figure, axes


def curves(
    series: Mapping[str, tuple[Sequence, ...]],
    title: str,
    alt: str,
    x_label: str = "optimizer step",
    y_label: str = "loss (nats per token)",
    log_x: bool = False,
    from_zero: bool = True,
    direct: bool = False,
) -> Picture:
    """Lines over steps, for instance training losses.

    Args:
        series: name → (x values, y values), drawn in different colours and line styles, six at
            most. Each y value is a number or seeds. Whiskers show the seeds; with more than 12
            points on a line it is a shading. Two more sequences shade limits of your own.
        alt: what the figure shows, in a sentence or two. With limits of your own it must say what
            they are: a range or an interval.
        log_x: a logarithmic x axis with a tick at each x value (of more than 8, only at those that
            begin with 1, 2 or 5).
        from_zero: whether the y axis begins at 0. Without it small changes of large values show.
        direct: write the names beside the lines, at their highest points, and not in a legend.
    """
    figure, axes = _axes(title, x_label, y_label)
    _check_colours(series)
    found = {name: (list(x), _summarise(y), own) for name, (x, y, *own) in series.items()}
    _check_limits([own for *_, own in found.values()], alt)
    seeded = any(y.several for _, y, _ in found.values())
    shaded = max(len(x) for x, *_ in found.values()) > FEW
    for i, (name, (x, y, limits)) in enumerate(found.items()):
        look = {"label": name, "clip_on": not log_x} | _line_look(i)
        look["marker"] = MARKERS[i] if log_x or (seeded and not shaded) else None
        limits = [y.least, y.greatest] if y.several and shaded else limits
        aside = 5 * (i - (len(found) - 1) / 2) if seeded and not shaded else None
        _draw_line(axes, x, y, limits, aside, look)
    _tick(axes, {value for x, *_ in found.values() for value in x}, log_x)
    if from_zero:
        axes.set_ylim(bottom=0)
    if direct:
        axes.margins(y=0.15)
        tops = {name: max(zip(y.means, x, strict=True)) for name, (x, y, _) in found.items()}
        darker = {name: _darker(COLOURS[i]) for i, name in enumerate(found)}
        label_points(axes, {name: (x, y) for name, (y, x) in tops.items()}, darker)
    elif len(series) > 1:
        axes.legend(frameon=False)
    marks = ("Lines", f"the shading reaches {RANGE}") if shaded else ("Points",)
    counts = [count for _, y, _ in found.values() for count in y.counts]
    return Picture(figure, alt + _seeds_said(counts, *marks))


def _darker(colour: str) -> str:
    """A colour in which text is readable on white, and which still resembles this one."""
    from matplotlib.colors import to_hex, to_rgb

    red, green, blue = to_rgb(colour)
    return to_hex((0.6 * red, 0.6 * green, 0.6 * blue))


def _check_limits(limits: Iterable[Sequence], alt: str) -> None:
    """Raise an error if there are limits and the description does not say what they are."""
    if any(limits) and not re.search(r"\brange|\binterval", alt):
        raise ValueError(
            "Expected the word 'range' or 'interval' in the description, because limits are shaded "
            f"and only you know what they are; found {alt!r}. Add it, or give each y as its seeds."
        )


def _draw_line(
    axes, x: Sequence, y: _Summary, limits: Sequence, aside: float | None, look: dict
) -> None:
    """A line with the range between `limits` shaded. With `aside`, it has whiskers.

    Args:
        aside: points to the right by which it is moved, so that whiskers stand side by side.
        look: matplotlib's arguments.
    """
    from matplotlib.transforms import ScaledTranslation

    if aside is None:
        axes.plot(x, y.means, **look)
    else:
        drawn = axes.errorbar(x, y.means, y.whiskers, capsize=3, **look)
        move = ScaledTranslation(aside / 72, 0, axes.figure.dpi_scale_trans)
        for artist in drawn.get_children():
            artist.set_transform(artist.get_transform() + move)
    if limits:
        axes.fill_between(x, *limits, color=look["color"], alpha=0.2, linewidth=0)


def _tick(axes, values: Collection[float], log_x: bool) -> None:
    """Ticks on the x axis; see `curves`."""
    if log_x:
        ticks = sorted(values)
        if len(ticks) > 8:
            ticks = [value for value in ticks if f"{value:e}"[0] in "125"]
        axes.set_xscale("log")
        axes.set_xticks(ticks, [f"{value:,}" for value in ticks])
        axes.minorticks_off()
    else:
        axes.xaxis.get_major_locator().set_params(integer=True)  # there is no half step


def panels(
    runs: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]],
    title: str,
    alt: str,
    columns: int = 6,
) -> Picture:
    """Losses and gradient norms of many trainings: small figures with the same axes.

    The y axis is logarithmic down to 0.01, and has a zero below that.

    Args:
        runs: name of the panel → name of the line → (x values, y values). A name's line has the
            same colour and style in all panels. At the first NaN, a line ends with a cross.
        alt: what the figure shows, in a sentence or two.
    """
    from matplotlib.figure import Figure

    rows = -(-len(runs) // columns)
    figure = Figure(figsize=(1.9 * columns, 1.9 * rows + 0.6), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    names = list(dict.fromkeys(name for lines in runs.values() for name in lines))
    _check_colours(names)
    for axes, (run, lines) in zip(grid, runs.items(), strict=False):
        axes.set_title(run, loc="left", fontweight="bold", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)
        for name, (x, y) in lines.items():
            x, y = list(x), list(y)
            i = names.index(name)
            look = {"color": COLOURS[i], "linestyle": ("-", "--", ":")[i % 3]}
            axes.plot(x, y, label=name, marker="o" if len(x) < 9 else None, markersize=3, **look)
            first_nan = next((k for k, value in enumerate(y) if value != value), 0)
            if first_nan:
                last = first_nan - 1
                axes.plot(x[last], y[last], "X", color=look["color"], markersize=8)
        axes.set_yscale("symlog", linthresh=0.01)
        axes.set_yticks([0, 0.01, 0.1, 1, 10], ["0", "0.01", "0.1", "1", "10"])
        axes.set_ylim(0, 100)
        axes.minorticks_off()
    for axes in grid[len(runs) :]:
        axes.set_visible(False)
    figure.suptitle(title)
    figure.supxlabel("optimizer step", fontsize=10)
    figure.supylabel("loss (nats per token), grad_norm", fontsize=10)
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=len(labels), frameon=False)
    return Picture(figure, alt)


def compare(
    table: pandas.DataFrame, title: str, alt: str, y_label: str = "share of prompts (%)"
) -> Picture:
    """As `bars`, but for shares from 0 to 1, which are shown in per cent."""
    figure, axes, said = _bars(table, title, y_label, 100)
    axes.set_ylim(0, 112)
    return Picture(figure, alt + said)


def bars(
    table: pandas.DataFrame, title: str, alt: str, y_label: str, runs: str = "seeds"
) -> Picture:
    """Grouped bars: a group for each row of `table`, a bar for each column, values on the bars.

    Args:
        table: numbers or seeds, with the rows' and columns' names; six columns at most.
        alt: what the figure shows, in a sentence or two.
        runs: what the description calls the values behind a bar, such as "repetitions".
    """
    figure, axes, said = _bars(table, title, y_label)
    said = said.replace(" seeds", f" {runs}")
    low, high = axes.dataLim.intervaly
    axes.set_ylim(1.12 * min(low, 0), 1.12 * high)
    return Picture(figure, alt + said)


def stacked(table: pandas.DataFrame, title: str, alt: str, y_label: str) -> Picture:
    """Bars in layers: a bar for each row of `table`, a layer for each column, the sum on top.

    Args:
        table: numbers or seeds, with the rows' and columns' names; six columns at most. The
            whiskers are those of the sums.
        alt: what the figure shows, in a sentence or two.

    Raises:
        ValueError: a row has cells with different numbers of seeds.
    """
    figure, axes = _axes(title, "", y_label, (max(7, 1.1 * len(table)), 3.8))
    _check_colours(table.columns)
    below = [0.0] * len(table)
    for i, name in enumerate(table.columns):
        layer = _summarise(table[name]).means
        axes.bar(range(len(table)), layer, 0.7, bottom=below, **_bar_look(i, name))
        below = [low + high for low, high in zip(below, layer, strict=True)]
    by_seed = ([*map(sum, _by_seed(row))] for row in table.itertuples(index=False))
    sums = _summarise(row if len(row) > 1 else row[0] for row in by_seed)
    _whiskers_and_labels(axes, range(len(table)), sums, ".1f")
    _name_bars(axes, table)
    axes.set_ylim(0, 1.12 * axes.dataLim.y1)
    return Picture(figure, alt + _seeds_said(sums.counts, "Sums"))


def shards(
    divided: Mapping[str, Collection[str]],
    title: str,
    alt: str,
    kinds: Sequence[str] = ("weights", "gradients", "optimizer"),
    ranks: int = 2,
    numbers: int = 4,
) -> Picture:
    """What each rank keeps: a panel for each setting, a frame for each rank, a square per number.

    Args:
        divided: name of the setting → the kinds that are divided over the ranks. Of these a rank
            keeps its part, and of the others everything.
        alt: what the figure shows, in a sentence or two.
        kinds: a line of squares for each; six at most.
        numbers: squares in a line, a multiple of `ranks`.

    Raises:
        ValueError: there are more kinds than colours.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    _check_colours(kinds)
    height = len(kinds) + 1.3  # of a rank's frame and the gap below it
    figure = Figure(figsize=(1.9 * len(divided) + 0.6, 1.1 * ranks + 0.9), layout="constrained")
    looks = [_square_look(i) for i in range(len(kinds))]
    elsewhere: dict = {"facecolor": "white", "edgecolor": "grey", "linestyle": ":"}
    for axes, (name, parts) in zip(
        figure.subplots(1, len(divided), squeeze=False)[0], divided.items(), strict=True
    ):
        axes.set_title(name)
        for rank in range(ranks):
            top = -rank * height
            axes.text(numbers / 2, top + 0.15, f"rank {rank}", ha="center", fontsize=9)
            for line, kind in enumerate(kinds):
                own = range(rank * numbers // ranks, (rank + 1) * numbers // ranks)
                for number in range(numbers):
                    look = looks[line] if kind not in parts or number in own else elsewhere
                    place = (number + 0.06, top - line - 0.94)
                    axes.add_patch(Rectangle(place, 0.88, 0.88, **look))
        axes.set_xlim(-0.1, numbers + 0.1)
        axes.set_ylim(-ranks * height + 0.9, 0.8)
        axes.set_aspect("equal")
        axes.set_axis_off()
    handles = [Rectangle((0, 0), 1, 1, **look) for look in (*looks, elsewhere)]
    labels = [*kinds, "kept by another rank"]
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.suptitle(title)
    return Picture(figure, alt)


def _square_look(i: int) -> dict:
    return {"facecolor": COLOURS[i], "hatch": HATCHES[i], "edgecolor": "white"}


def _bars(table: pandas.DataFrame, title: str, y_label: str, scale: float = 1):
    """The figure, its plot, and the sentence about seeds."""
    figure, axes = _axes(title, "", y_label, (max(7, 1.1 * table.size), 3.8))
    _check_colours(table.columns)
    width = 0.8 / len(table.columns)
    columns = {name: _summarise(table[name], scale) for name in table.columns}
    whole = all(mean % 1 == 0 for found in columns.values() for mean in found.means)
    for i, (name, found) in enumerate(columns.items()):
        offset = (i - (len(table.columns) - 1) / 2) * width  # groups are centred on 0, 1, 2 …
        places = [group + offset for group in range(len(table))]
        axes.bar(places, found.means, width * 0.92, **_bar_look(i, name))
        _whiskers_and_labels(axes, places, found, ".0f" if whole else ".1f")
    _name_bars(axes, table)
    counts = [count for found in columns.values() for count in found.counts]
    return figure, axes, _seeds_said(counts, "Bars")


class _Summary(NamedTuple):
    """Of each bar or point: the mean, least and greatest of its seeds, and how many there are."""

    means: list[float]
    least: list[float]
    greatest: list[float]
    counts: list[int]

    @property
    def several(self) -> bool:
        """Whether anything has more than one seed."""
        return any(count > 1 for count in self.counts)

    @property
    def whiskers(self) -> list[list[float]]:
        """Their lengths below and above the means, as matplotlib wants them; NaN: no whisker."""
        means, least, greatest, counts = map(list, self)
        below = [max(0, mean - low) for mean, low in zip(means, least, strict=True)]
        above = [max(0, high - mean) for mean, high in zip(means, greatest, strict=True)]
        return [
            [length if count > 1 else nan for length, count in zip(lengths, counts, strict=True)]
            for lengths in (below, above)
        ]


def _summarise(values: Iterable[Seeds], scale: float = 1) -> _Summary:
    """Each value times `scale`."""
    found = [[scale * seed for seed in _seeds(value)] for value in values]
    means, least, greatest = ([of(seeds) for seeds in found] for of in (fmean, min, max))
    return _Summary(means, least, greatest, [*map(len, found)])


def _seeds(value: Seeds) -> tuple[float, ...]:
    """The numbers behind a bar or a point. A single one may be missing or NaN."""
    import numpy

    if not isinstance(value, Spread) and numpy.ndim(value) == 0:
        return (nan if value is None else float(cast("float", value)),)
    return (value if isinstance(value, Spread) else Spread(cast("Sequence", value))).values


def _by_seed(cells: Iterable[Seeds]) -> list[tuple[float, ...]]:
    """For each seed the values that belong together; a single number belongs to every seed."""
    found = [_seeds(cell) for cell in cells]
    counts = sorted({len(seeds) for seeds in found} - {1})
    if len(counts) > 1:
        raise ValueError(
            f"Expected the same number of seeds in values that belong together, found {counts}. "
            "Give each the same seeds, in the same order."
        )
    count = max(map(len, found))
    return [*zip(*(seeds if len(seeds) > 1 else seeds * count for seeds in found), strict=True)]


def _seeds_said(
    counts: Collection[int], marks: str, shown_by: str = f"whiskers reach {RANGE}"
) -> str:
    """The sentences on how a figure shows the seeds; empty where there is one of each."""
    several = [count for count in counts if count > 1]
    if not several:
        return ""
    least, most = min(several), max(several)
    number = f"{least} to {most}" if least < most else f"{most}"
    alone = f" {marks} of a single value have none." if 1 in counts else ""
    return f" {marks} are means of {number} seeds; {shown_by}.{alone}"


def _whiskers_and_labels(axes, places: Sequence[float], found: _Summary, spec: str) -> None:
    """Whiskers on the bars at `places`, and above each the mean."""
    if found.several:
        axes.errorbar(places, found.means, found.whiskers, fmt="none", **WHISKERS)
    for place, mean, top in zip(places, found.means, found.greatest, strict=True):
        if not isnan(mean):
            at, look = (place, max(0, top)), {"textcoords": "offset points", "ha": "center"}
            axes.annotate(format(mean, spec), at, (0, 2), **look)


def _check_colours(names: Collection) -> None:
    """Raise an error if there are more series than colours."""
    if len(names) > len(COLOURS):
        raise ValueError(
            f"Expected at most {len(COLOURS)} series, one for each colour that everybody can tell "
            f"from the others, found {len(names)}. Show fewer, or draw several figures."
        )


def _line_look(i: int) -> dict:
    """The look of the line number `i`: matplotlib's arguments."""
    return {"color": COLOURS[i], "linestyle": LINES[i % len(LINES)]}


def _bar_look(i: int, name: object) -> dict:
    return {"label": name, "color": COLOURS[i], "hatch": HATCHES[i], "edgecolor": "white"}


def _name_bars(axes, table: pandas.DataFrame) -> None:
    """Write the rows' names below the groups, and a legend of the columns below these."""
    names = [textwrap.fill(str(name), 13, break_long_words=False) for name in table.index]
    axes.set_xticks(range(len(table)), names)
    if len(table.columns) > 1:
        height = 1 + max(name.count("\n") for name in names)  # in lines of text
        place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.04 - 0.06 * height)}
        axes.legend(frameon=False, ncols=len(table.columns), **place)


def scatter(
    points: Mapping[str, tuple[Seeds, Seeds]],
    title: str,
    alt: str,
    x_label: str,
    y_label: str,
    log_x: bool = False,
) -> Picture:
    """A large marker for each name at the mean of its points, and a small one at each point.

    The names stand beside the large markers.

    Args:
        points: name → (x values, y values), one for each seed. Names differ in shape, and up to six
            of them in colour, too; twelve at most.
        log_x: a logarithmic x axis.
        alt: what the figure shows, in a sentence or two.

    Raises:
        ValueError: there are more than twelve names, or no room for them; a name has different
            numbers of x and y values.
    """
    figure, axes = _axes(title, x_label, y_label, (8, 4.2))
    if len(points) > len(MARKERS):
        raise ValueError(f"Expected at most {len(MARKERS)} names, found {len(points)}. Show fewer.")
    means, counts = {}, []
    for i, (name, (x, y)) in enumerate(points.items()):
        seeds = _by_seed((x, y))
        counts.append(len(seeds))
        colour = COLOURS[i if len(points) <= len(COLOURS) else 0]
        means[name] = _draw_seeds(axes, seeds, colour, MARKERS[i])
    axes.margins(0.08, 0.12)
    if log_x:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
    label_points(axes, means)
    return Picture(figure, alt + _seeds_said(counts, "Large marks", "small marks show each seed"))


def _draw_seeds(
    axes, seeds: Sequence[tuple[float, ...]], colour: str, marker: str
) -> tuple[float, float]:
    """A small marker at each seed, joined to a large one at their mean; returns the mean."""
    x, y = zip(*seeds, strict=True)
    mean = fmean(x), fmean(y)
    for seed in seeds:
        axes.plot(*zip(mean, seed, strict=True), color=colour, alpha=0.35, linewidth=1)
    look = {"color": colour, "marker": marker}
    axes.scatter(x, y, s=18, alpha=0.45, **look)
    axes.scatter(*mean, s=90, edgecolor="black", linewidth=0.6, zorder=3, **look)
    return mean


def cloud(
    groups: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    title: str,
    alt: str,
    x_label: str,
    y_label: str,
    log_x: bool = False,
) -> Picture:
    """A mark for each of many runs; groups differ in color and in shape.

    Args:
        groups: name → (x values, y values), one for each run; six groups at most. Later groups
            are drawn over earlier ones.
        alt: what the figure shows, in a sentence or two.
        log_x: a logarithmic x axis.
    """
    figure, axes = _axes(title, x_label, y_label, (8, 4.2))
    _check_colours(groups)
    for i, (name, (x, y)) in enumerate(groups.items()):
        look = {"color": COLOURS[i], "marker": MARKERS[i], "label": f"{name} ({len(x)})"}
        axes.scatter(list(x), list(y), s=30, alpha=0.6, linewidth=0, **look)
    if log_x:
        axes.set_xscale("log")
        low, high = axes.get_xlim()
        steps = (1, 2, 3, 5) if high / low < 100 else (1,)
        ticks = [step * 10.0**power for power in range(-9, 10) for step in steps]
        ticks = [tick for tick in ticks if low <= tick <= high]
        axes.set_xticks(ticks, [f"{tick:,g}" for tick in ticks])
        axes.minorticks_off()
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return Picture(figure, alt)


def small_multiples(
    plots: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[Seeds]]]],
    title: str,
    alt: str,
    x_label: str = "optimizer step",
    columns: int = 1,
    same_y: bool = False,
    best: Mapping[str, str] | None = None,
) -> Picture:
    """Small plots over one x axis, for lines that would cover each other in one plot.

    Args:
        plots: title of the plot → name of the line → (x values, y values). Each y value is a number
            or seeds: then a thin line is drawn for each seed, and a thick one for their mean. From
            the second line of a plot on there are hollow marks in place of a line.
        alt: what the figure shows, in a sentence or two.
        columns: plots side by side.
        same_y: whether all plots have one y axis. Each begins at zero, or below it where values do.
        best: title of a plot → "least" or "greatest": a mark on each seed's value of this kind.

    Raises:
        ValueError: a plot has more lines than there are colors.
    """
    from matplotlib.figure import Figure

    rows = -(-len(plots) // columns)
    figure = Figure(figsize=(max(7, 2.6 * columns), 1.7 * rows + 0.8), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=same_y, squeeze=False).flatten()
    counts: list[int] = []
    for axes, (name, lines) in zip(grid, plots.items(), strict=False):
        _check_colours(lines)
        axes.set_title(name, loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)
        for i, (label, (x, y)) in enumerate(lines.items()):
            seeds = _by_seed(y)
            look = _line_look(i) if not i else {"color": COLOURS[i], "linestyle": "none"}
            if i:
                look |= {"marker": MARKERS[i], "markerfacecolor": "none"}
            axes.plot(
                list(x), [fmean(values) for values in zip(*seeds, strict=True)], label=label, **look
            )
            if len(seeds) > 1:
                counts.append(len(seeds))
                _draw_each_seed(axes, list(x), seeds, COLOURS[i], (best or {}).get(name))
        if min(axes.dataLim.intervaly) >= 0:
            axes.set_ylim(bottom=0)
        else:
            axes.axhline(0, color="black", linewidth=0.8)
        if len(lines) > 1:
            axes.legend(frameon=False)
    for axes in grid[len(plots) :]:
        axes.set_visible(False)
    grid[0].xaxis.get_major_locator().set_params(integer=True)
    figure.suptitle(title)
    figure.supxlabel(x_label, fontsize=10)
    if counts:
        alt += f" Thick lines are means of {max(counts)} seeds; a thin line shows each seed."
    return Picture(figure, alt)


def _draw_each_seed(
    axes, x: Sequence[float], seeds: Sequence[Sequence[float]], colour: str, best: str | None
) -> None:
    """A thin line for each seed, with a mark on its least or greatest value."""
    for y in seeds:
        axes.plot(x, y, color=colour, alpha=0.35, linewidth=1)
        if best:
            at = y.index(min(y) if best == "least" else max(y))
            axes.plot(x[at], y[at], "D", color=COLOURS[5], markersize=6, alpha=0.7)


def histogram(
    series: Mapping[str, Sequence[float]],
    title: str,
    alt: str,
    x_label: str,
    bins: int = 20,
) -> Picture:
    """How values are distributed in each series, as shares, so that small series are visible too.

    Args:
        series: name → values; all series share the bins.
        alt: what the figure shows, in a sentence or two.
    """
    figure, axes = _axes(title, x_label, "share of its rows (%)")
    _check_colours(series)
    everything = [value for values in series.values() for value in values]
    low, high = min(everything), max(everything)
    edges = [low + (high - low) * i / bins for i in range(bins + 1)]
    for i, (name, values) in enumerate(series.items()):
        axes.hist(
            values,
            edges,
            weights=[100 / len(values)] * len(values),
            histtype="step",
            linewidth=1.8,
            label=f"{name} ({len(values)})",
            **_line_look(i),
        )
    axes.legend(frameon=False)
    return Picture(figure, alt)


def tokens(
    ids: Sequence[int],
    mask: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    counts: bool = True,
) -> HTML:
    """A conversation token by token: which tokens are learned, only read, or control tokens.

    Not only the colour shows it: learned tokens are bold and underlined, control tokens framed.

    Args:
        ids: token ids of one conversation, as `sftlib.chat.encode` gives them.
        mask: 1 where the model learns from the token, 0 where it only reads it; same length.
        counts: write below how many there are of each kind.

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
    n_learned = sum(map(bool, mask))
    numbers = f"{len(ids)} tokens: ", f" ({n_learned})", f" ({len(ids) - n_learned})"
    total, learned, read = numbers if counts else ("", "", "")
    legend = (
        f"{total}{_token('learned from', True, False)}{learned}, "
        f"{_token('only read', False, False)}{read}; "
        f"{_token('control token', False, True)} framed"
    )
    return HTML(f'<p style="line-height:2">{"".join(spans)}</p><p>{legend}</p>')


Encoded = tuple[Sequence[int], Sequence[int]]
"""A conversation's ids and its mask, as `tokens` takes them."""


def side_by_side(
    encodings: Mapping[str, Encoded], tokenizer: PreTrainedTokenizerBase, every: bool = True
) -> HTML:
    """Two encodings of a conversation in two columns, with a word where they differ.

    Tokens that both have stand beside each other, line by line. Between the columns stands "other
    tokens" where the ids differ, and "other mask" where the ids are the same and one encoding
    learns from a token that the other only reads. Tokens look as in `tokens`.

    Args:
        encodings: two names, each with ids and mask.
        every: whether to show all lines, or only those that differ.

    Raises:
        ValueError: there are not two encodings, or ids and mask of one differ in length.
    """
    from IPython.display import HTML

    if len(encodings) != 2:
        raise ValueError(f"Expected two encodings, found {len(encodings)}: {[*encodings]}.")
    for name, (ids, mask) in encodings.items():
        if len(ids) != len(mask):
            raise ValueError(
                f"{name}: expected one mask value per token ({len(ids)}), found {len(mask)}."
            )
    left, right = encodings.values()
    control = set(tokenizer.all_special_ids)
    counts = dict.fromkeys(("same", "left", "right", "mask"), 0)
    lines = []
    for word, one, other in _aligned(left, right, tokenizer):
        counts["same"] += len(one) if word != OTHER_TOKENS else 0
        counts["left"] += len(one) if word == OTHER_TOKENS else 0
        counts["right"] += len(other) if word == OTHER_TOKENS else 0
        counts["mask"] += len(one) if word == OTHER_MASK else 0
        if every or word:
            cells = ("".join(_spans(part, tokenizer, control)) for part in (one, other))
            lines.append(_line(word, *cells))
    names = [html.escape(name) for name in encodings]
    head = f"<th>{names[0]}</th><th>difference</th><th>{names[1]}</th>"
    said = (
        f"{counts['same']} tokens in both; {counts['left']} in {names[0]} alone, "
        f"{counts['right']} in {names[1]} alone; {counts['mask']} in both with another mask. "
        f"{_token('learned from', True, False)}, {_token('only read', False, False)}; "
        f"{_token('control token', False, True)} framed"
    )
    return HTML(f"<table><tr>{head}</tr>{''.join(lines)}</table><p>{said}</p>")


OTHER_TOKENS, OTHER_MASK = "other tokens", "other mask"
Marked = list[tuple[int, bool]]  # ids, and whether each is learned


def _aligned(
    left: Encoded, right: Encoded, tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[str, Marked, Marked]]:
    """Pieces of two encodings that belong beside each other, and a word for how they differ."""
    one, other = ([*zip(ids, map(bool, mask), strict=True)] for ids, mask in (left, right))
    found = SequenceMatcher(None, [*left[0]], [*right[0]], autojunk=False)
    for kind, start, end, other_start, other_end in found.get_opcodes():
        if kind != "equal":
            yield OTHER_TOKENS, one[start:end], other[other_start:other_end]
            continue
        piece: tuple[str, Marked, Marked] = ("", [], [])
        for mine, theirs in zip(one[start:end], other[other_start:other_end], strict=True):
            word = OTHER_MASK if mine != theirs else ""
            if piece[1] and word != piece[0]:
                yield piece
                piece = (word, [], [])
            piece = (word, [*piece[1], mine], [*piece[2], theirs])
            if "\n" in str(tokenizer.decode([mine[0]])):
                yield piece
                piece = ("", [], [])
        if piece[1]:
            yield piece


def _spans(
    marked: Marked, tokenizer: PreTrainedTokenizerBase, control: Collection[int]
) -> Iterator[str]:
    for i, learned in marked:
        yield _token(str(tokenizer.decode([i])), learned, i in control).removesuffix("<br>")


def _line(word: str, left: str, right: str) -> str:
    """A row of the table in `side_by_side`."""
    colour = "background:#fff4d6;color:#000;" if word else ""
    cell = f'<td style="{colour}text-align:left;vertical-align:top;line-height:2">'
    middle = f'<td style="{colour}text-align:center">{f"≠ {word}" if word else ""}</td>'
    return f"<tr>{cell}{left}</td>{middle}{cell}{right}</td></tr>"


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
