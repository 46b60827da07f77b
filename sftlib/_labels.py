"""Names beside the points of a plot, where they cover nothing."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy


def label_points(
    axes, points: Mapping[str, tuple[float, float]], colours: Mapping[str, str] | None = None
) -> None:
    """Write each name beside its point: inside the plot, on nothing drawn, on no other name.

    A thin line leads from each name to its point.

    Args:
        axes: matplotlib's, with the points drawn, and nothing but markers, lines and
            whiskers.
        points: name → place, in the units of the axes.
        colours: of the names [black].

    Raises:
        ValueError: there is no room for a name.
    """
    import numpy

    figure = axes.get_figure()
    figure.draw_without_rendering()  # it gives the plot its place, on which pixels depend
    taken = _covered(axes)
    look: dict = {"ha": "center", "va": "center", "fontsize": 9}
    look["bbox"] = {"pad": 1, "facecolor": "none", "linewidth": 0}
    look["arrowprops"] = {"arrowstyle": "-", "color": "0.3", "linewidth": 0.7, "shrinkB": 4}
    for name, point in points.items():
        text = textwrap.fill(name, 22)
        label = axes.annotate(text, point, ha="center", fontsize=9)
        size = numpy.array(label.get_window_extent().size) + 4
        label.remove()
        at = axes.transData.transform(point)
        middle = _free_place(at, size, axes.bbox.extents, taken)
        if middle is None:
            raise ValueError(
                f"Expected room beside its point for each name, found none for {name!r}. "
                "Show fewer points, or shorten the names."
            )
        taken = numpy.vstack([taken, [*(middle - size / 2), *(middle + size / 2)]])
        aside = (middle - at) * 72 / figure.dpi  # in points, whatever the picture's resolution
        colour = (colours or {}).get(name, "black")
        axes.annotate(text, point, aside, textcoords="offset points", color=colour, **look)


def _covered(axes) -> numpy.ndarray:
    """Boxes (left, bottom, right, top in pixels) around all markers and along all lines: (N, 4)."""
    import numpy
    from matplotlib.collections import LineCollection

    boxes = []
    for drawn in axes.collections:
        if isinstance(drawn, LineCollection):  # whiskers
            ends = (drawn.get_transform().transform(x) for x in drawn.get_segments() if len(x))
            boxes += map(_along, ends)
            continue
        radius = 0.6 * drawn.get_sizes()[0] ** 0.5 * axes.figure.dpi / 72
        at = axes.transData.transform(drawn.get_offsets())
        boxes.append(numpy.hstack([at - radius, at + radius]))
    boxes += [_along(line.get_transform().transform(line.get_xydata())) for line in axes.lines]
    return numpy.vstack(boxes)


def _along(places: numpy.ndarray) -> numpy.ndarray:
    """Small boxes along a line through these places, in pixels: (N, 4)."""
    import numpy

    pairs = itertools.pairwise(places)
    at = numpy.vstack([*(numpy.linspace(start, end, 21) for start, end in pairs), places[:1]])
    return numpy.hstack([at - 1, at + 1])


def _free_place(
    at: numpy.ndarray, size: numpy.ndarray, frame: Sequence[float], taken: numpy.ndarray
) -> numpy.ndarray | None:
    """The middle of the nearest box of this size, beside `at`, in the frame and on nothing taken.

    All in pixels; the boxes in `taken` (N, 4) and `frame` (4) are left, bottom, right, top.
    """
    import numpy

    for distance in range(10, 200, 6):
        for angle in numpy.linspace(0, 2 * numpy.pi, 16, endpoint=False):  # to the right first
            way = numpy.array([numpy.cos(angle), numpy.sin(angle)])
            middle = at + way * (distance + size / 2)
            low, high = middle - size / 2, middle + size / 2
            inside = (low >= frame[:2]).all() and (high <= frame[2:]).all()
            if inside and not ((low < taken[:, 2:]) & (high > taken[:, :2])).all(axis=1).any():
                return middle
    return None
