"""Pictures are labelled and described; token pictures show text as it is."""

import random
import re

from sftlib import viz
from sftlib.experiments import Spread

import numpy as np
import pandas as pd
import pytest
from matplotlib.container import ErrorbarContainer

PNG = b"\x89PNG"


def shown(picture, monkeypatch):
    outputs = []
    monkeypatch.setattr("IPython.display.display", lambda data, **k: outputs.append((data, k)))
    picture._ipython_display_()
    return outputs


def test_a_picture_is_shown_with_its_description(monkeypatch):
    picture = viz.curves({"a": ([1, 2], [3.0, 1.0])}, "Loss falls", "The loss falls from 3 to 1.")
    (image, how), (caption, _) = shown(picture, monkeypatch)
    assert picture.png.startswith(PNG)
    assert image["text/plain"] == how["metadata"]["image/png"]["alt"] == picture.alt
    assert picture.alt in caption["text/markdown"]


def test_axes_carry_title_labels_and_units(monkeypatch):
    figures = []
    monkeypatch.setattr(viz, "Picture", lambda figure, alt: figures.append(figure))
    viz.curves({"a": ([1], [1.0]), "b": ([1], [2.0])}, "Title", "alt")
    viz.compare(pd.DataFrame({"x": [0.5], "y": [0.999]}, index=["set"]), "Bars", "alt")
    viz.curves({"alone": ([1], [1.0])}, "Title", "alt")
    curves, bars, alone = (figure.axes[0] for figure in figures)
    assert alone.get_legend() is None  # the title says what it is
    assert (curves.get_title(), curves.get_xlabel()) == ("Title", "optimizer step")
    assert curves.get_ylabel() == "loss (nats per token)" and curves.get_legend()
    assert bars.get_ylabel() == "share of prompts (%)"
    assert [t.get_text() for t in bars.texts] == ["50.0", "99.9"]


def test_names_below_bars_are_wrapped_between_words(monkeypatch):
    figures = []
    monkeypatch.setattr(viz, "Picture", lambda figure, alt: figures.append(figure))
    table = pd.DataFrame({"x": [0.5, 0.5]}, index=["heldout_wordings", "three rows copied"])
    viz.compare(table, "Bars", "alt")
    names = [label.get_text() for label in figures[0].axes[0].get_xticklabels()]
    assert names == ["heldout_wordings", "three rows\ncopied"]


def test_bars_show_the_numbers_as_they_are(monkeypatch):
    figures = []
    monkeypatch.setattr(viz, "Picture", lambda figure, alt: figures.append(figure))
    viz.bars(pd.DataFrame({"rows": [207, 99]}, index=["plural", "language"]), "T", "alt", "rows")
    [axes] = figures[0].axes
    assert [t.get_text() for t in axes.texts] == ["207", "99"] and axes.get_legend() is None
    assert axes.get_ylabel() == "rows" and axes.get_ylim()[1] > 207


def test_layers_stand_on_each_other_with_their_sum_on_top(monkeypatch):
    figures = []
    monkeypatch.setattr(viz, "Picture", lambda figure, alt: figures.append(figure))
    table = pd.DataFrame({"low": [2.0, 1.0], "high": [12.0, 6.04]}, index=["a", "b"])
    viz.stacked(table, "Title", "alt", "bytes")
    axes = figures[0].axes[0]
    boxes = [(bar.get_y(), round(bar.get_height(), 2)) for bar in axes.patches]
    assert boxes == [(0, 2), (0, 1), (2, 12), (1, 6.04)]
    assert [t.get_text() for t in axes.texts] == ["14.0", "7.0"]
    assert [t.get_text() for t in axes.get_legend().texts] == ["low", "high"]


def test_a_histogram_shows_shares_of_each_series(monkeypatch):
    figures = []
    monkeypatch.setattr(viz, "Picture", lambda figure, alt: figures.append(figure))
    viz.histogram({"a": [1, 1, 1, 3], "b": [3, 3]}, "T", "alt", "tokens", bins=2)
    [axes] = figures[0].axes
    heights = [patch.get_xy()[:, 1].max() for patch in axes.patches]
    assert sorted(heights) == [75, 100]
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ["a (4)", "b (2)"]


def test_curves_over_ratios_name_each_value(monkeypatch):
    figures = []
    monkeypatch.setattr(viz, "Picture", lambda figure, alt: figures.append(figure))
    viz.curves({"a": ((10, 1000), (1, 2))}, "T", "alt", log_x=True)
    [axes] = figures[0].axes
    assert axes.get_xscale() == "log"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["10", "1,000"]


def test_names_stand_beside_the_lines_instead_of_a_legend(monkeypatch):
    figures = []
    monkeypatch.setattr(viz, "Picture", lambda figure, alt: figures.append(figure))
    lines = {"a": ((1, 2, 4), ([1.0, 1.2], [5.0, 6.0], 2.0)), "b": ((1, 2), (3.0, 1.0))}
    viz.curves(lines, "T", "alt", log_x=True, direct=True)
    [axes] = figures[0].axes
    assert [(label.get_text(), label.xy) for label in axes.texts] == [
        *(("a", (2, 5.5)), ("b", (1, 3.0))),
    ]
    boxes = [label.get_window_extent() for label in axes.texts]
    assert axes.get_legend() is None and not boxes[0].overlaps(boxes[1])
    assert len({label.get_color() for label in axes.texts}) == 2


@pytest.mark.parametrize("from_zero", [True, False])
def test_the_y_axis_of_curves_begins_at_zero_or_near_the_lowest_value(monkeypatch, from_zero):
    figures = []
    monkeypatch.setattr(viz, "Picture", lambda figure, alt: figures.append(figure))
    viz.curves({"a": ((1, 2), (5.0, 6.0))}, "T", "alt", from_zero=from_zero)
    lowest, _ = figures[0].axes[0].get_ylim()
    assert lowest == 0 if from_zero else 4.5 < lowest < 5


def test_a_scatter_marks_each_point_and_their_mean(monkeypatch):
    figures = []
    monkeypatch.setattr(viz, "Picture", lambda figure, alt: figures.append(figure))
    points = {"DPO": ([1.0, 3.0], [0.2, 0.4]), "PPO": ([2.0], [0.8])}
    viz.scatter(points, "Title", "alt", "KL (nats)", "score")
    [axes] = figures[0].axes
    drawn = [collection.get_offsets().tolist() for collection in axes.collections]
    assert drawn[0] == [[1.0, 0.2], [3.0, 0.4]]
    assert drawn[1][0] == pytest.approx([2.0, 0.3])
    assert [t.get_text() for t in axes.texts] == ["DPO", "PPO"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("KL (nats)", "score")


def test_panels_share_axes_and_mark_where_a_line_breaks_off(monkeypatch):
    figures = []
    monkeypatch.setattr(viz, "Picture", lambda figure, alt: figures.append(figure))
    nan = float("nan")
    runs = {
        "A": {"loss": ([1, 2, 3], [2.0, 0.0, 0.0]), "grad_norm": ([1, 2, 3], [5.0, nan, nan])},
        "B": {"loss": ([1, 2, 3], [2.0, 1.0, 0.5])},
    }
    viz.panels(runs, "Title", "alt", columns=3)
    one, two, empty = figures[0].axes
    assert (one.get_title(loc="left"), two.get_title(loc="left")) == ("A", "B")
    assert one.get_ylim() == two.get_ylim() and not empty.get_visible()
    crosses = [mark for mark in one.lines if mark.get_marker() == "X"]
    assert [mark.get_xydata().tolist() for mark in crosses] == [[[1.0, 5.0]]]
    assert one.lines[0].get_linestyle() == two.lines[0].get_linestyle()
    assert len({mark.get_linestyle() for mark in one.lines[:2]}) == 2
    [legend] = figures[0].legends
    assert [text.get_text() for text in legend.get_texts()] == ["loss", "grad_norm"]


def test_small_multiples_share_x_and_draw_no_line_over_another(monkeypatch):
    figures = []
    monkeypatch.setattr(viz, "Picture", lambda figure, alt: figures.append((figure, alt)))
    plots = {
        "loss": {"usual": ([1, 2], [2.0, 1.0]), "given": ([1, 2], [2.0, 1.5])},
        "difference": {"given − usual": ([1, 2], [-0.5, 0.5])},
    }
    viz.small_multiples(plots, "Title", "Two plots.")
    [(figure, alt)] = figures
    loss, difference = figure.axes
    assert (loss.get_title(loc="left"), difference.get_legend(), alt) == (
        "loss",
        None,
        "Two plots.",
    )
    assert loss.get_xlim() == difference.get_xlim() and loss.get_ylim()[0] == 0
    assert [line.get_linestyle() for line in loss.lines] == ["-", "None"]
    assert difference.get_ylim()[0] < 0 and difference.lines[-1].get_ydata() == [0, 0]


def test_small_multiples_mark_each_seeds_best_value(monkeypatch):
    figures = []
    monkeypatch.setattr(viz, "Picture", lambda figure, alt: figures.append((figure, alt)))
    plots = {
        "loss": {"loss": ([4, 8], [[3.0, 1.0], [2.0, 5.0]])},
        "score": {"score": ([4, 8], [[0.1, 0.9], [0.5, 0.3]])},
    }
    viz.small_multiples(plots, "T", "Alt.", best={"loss": "least", "score": "greatest"}, columns=2)
    [(figure, alt)] = figures
    marks = [
        [tuple(line.get_xydata()[0]) for line in axes.lines if line.get_marker() == "D"]
        for axes in figure.axes
    ]
    assert marks == [[(8, 2), (4, 1)], [(8, 0.5), (4, 0.9)]]
    assert list(figure.axes[0].lines[0].get_ydata()) == [2, 3.5]
    assert alt == "Alt. Thick lines are means of 2 seeds; a thin line shows each seed."


# --- Seeds ---------------------------------------------------------------------------------------

SAID = "means of 3 seeds; whiskers reach from the least to the greatest value."


@pytest.fixture
def drawn(monkeypatch):
    """Calls a function of `viz`; returns the plot that it draws, and its description."""
    monkeypatch.setattr(viz, "Picture", lambda figure, alt: (figure.axes[0], alt))
    return lambda function, *given: function(*given)


def whiskers(axes):
    """(x, least, greatest) of each vertical whisker, in the order in which they were drawn."""
    bars = [c for c in axes.containers if isinstance(c, ErrorbarContainer)]
    lines = [line for _, _, collections in bars for line in collections[0].get_segments()]
    drawn = [line for line in lines if len(line)]  # where it is NaN, nothing is drawn
    return [(round(x, 2), round(low, 6), round(high, 6)) for (x, low), (_, high) in drawn]


@pytest.mark.parametrize("kind", [list, tuple, np.array, pd.Series, Spread])
def test_bars_show_the_mean_of_the_seeds_and_their_range(drawn, kind):
    table = pd.DataFrame({"score": {"a": kind([50.0, 60.0, 76.0]), "b": kind([10.0, 40.0, 25.0])}})
    axes, alt = drawn(viz.bars, table, "Title", "Two bars.", "points")
    assert [bar.get_height() for bar in axes.patches] == [62, 25]
    assert whiskers(axes) == [(0, 50, 76), (1, 10, 40)]
    assert [(text.get_text(), text.xy[1]) for text in axes.texts] == [("62", 76), ("25", 40)]
    assert alt == f"Two bars. Bars are {SAID}"
    assert axes.get_ylim()[1] > 76


def test_shares_of_seeds_become_per_cent_one_by_one(drawn):
    table = pd.DataFrame({"full": {"dev": [0.5, 0.75]}, "LoRA": {"dev": Spread([0.25, 0.75])}})
    axes, alt = drawn(viz.compare, table, "Title", "Two bars.")
    assert [bar.get_height() for bar in axes.patches] == [62.5, 50]
    assert whiskers(axes) == [(-0.2, 50, 75), (0.2, 25, 75)]
    assert "2 seeds" in alt


def test_a_single_value_beside_seeds_has_no_whisker_and_the_words_say_so(drawn):
    table = pd.DataFrame({"score": {"base": 20, "full": [70, 80], "LoRA": [60, 65, 70, 80, 90]}})
    axes, alt = drawn(viz.bars, table, "Title", "Bars.", "points")
    assert whiskers(axes) == [(1, 70, 80), (2, 60, 90)]
    assert "means of 2 to 5 seeds" in alt and alt.endswith("Bars of a single value have none.")


def test_without_seeds_nothing_is_added(drawn):
    table = pd.DataFrame({"score": {"a": 1.5, "b": 2.5}})
    for function in (viz.bars, viz.stacked):
        axes, alt = drawn(function, table, "Title", "Bars.", "points")
        assert alt == "Bars." and whiskers(axes) == []
    axes, alt = drawn(viz.curves, {"a": ([1, 2], [3.0, 2.0])}, "Title", "A line.")
    assert alt == "A line." and whiskers(axes) == []
    assert axes.lines[0].get_marker() == "None"


@pytest.mark.parametrize("function", [viz.bars, viz.compare, viz.stacked])
def test_a_cell_that_is_missing_has_no_bar_and_no_number(drawn, function):
    table = pd.DataFrame({"score": {"a": [0.5, 1.0], "b": None, "c": 1}})
    axes, alt = drawn(function, table, "Title", "Bars.", "points")
    assert [text.xy[0] for text in axes.texts] == [0, 2] and "2 seeds" in alt
    assert 0 < axes.get_ylim()[1] < 113


def test_a_bar_below_zero_is_shown_with_its_whisker(drawn):
    table = pd.DataFrame({"gain": {"a": [-3.0, -1.0, -2.0], "b": 1.0}})
    axes, _ = drawn(viz.bars, table, "Title", "Bars.", "points")
    assert axes.get_ylim()[0] < -3 and whiskers(axes) == [(0, -3, -1)]


def test_equal_seeds_have_a_whisker_of_no_length(drawn):
    table = pd.DataFrame({"score": {"a": [0.1] * 3, "b": [0.7] * 3}})  # means are rounded up, down
    axes, alt = drawn(viz.bars, table, "Title", "Bars.", "points")
    assert whiskers(axes) == [(0, 0.1, 0.1), (1, 0.7, 0.7)] and "3 seeds" in alt


def test_the_sum_of_layers_has_the_range_of_the_seeds_sums(drawn):
    table = pd.DataFrame({"low": {"a": 1.0, "b": 2.0}, "high": {"a": [2.0, 4.0], "b": 3.0}})
    table["top"] = pd.Series({"a": [3.0, 1.5], "b": 1.0})
    axes, alt = drawn(viz.stacked, table, "Title", "Layers.", "bytes")
    assert [bar.get_height() for bar in axes.patches] == [1, 2, 3, 3, 2.25, 1]
    assert [bar.get_y() for bar in axes.patches] == [0, 0, 1, 2, 4, 5]
    assert whiskers(axes) == [(0, 6, 6.5)]
    assert [text.get_text() for text in axes.texts] == ["6.2", "6.0"]
    assert "Sums are means of 2 seeds" in alt and "Sums of a single value have none." in alt
    with pytest.raises(ValueError, match=r"same number of seeds.*found \[2, 3\]"):
        viz.stacked(pd.DataFrame({"x": [[1, 2]], "y": [[1, 2, 3]]}), "T", "alt", "bytes")


def test_a_few_points_of_a_line_have_whiskers_side_by_side(drawn):
    series = {"a": ([1, 2], [[1, 2, 6], 5]), "b": ([1, 2], [Spread([4, 5, 6]), [0, 1, 2]])}
    axes, alt = drawn(viz.curves, series, "Title", "Lines.")
    assert whiskers(axes) == [(1, 1, 6), (1, 4, 6), (2, 0, 2)]
    a, b = (container[0] for container in axes.containers)
    assert a.get_ydata().tolist() == [3, 5] and a.get_marker() != b.get_marker()
    pixels = [line.get_transform().transform((1, 1))[0] for line in (a, b)]
    assert pixels[1] - pixels[0] == pytest.approx(5 / 72 * axes.figure.dpi)
    lines = [container[2][0].get_transform() for container in axes.containers]
    assert [line.transform((1, 1))[0] for line in lines] == pytest.approx(pixels)
    assert alt == f"Lines. Points are {SAID} Points of a single value have none."


def test_many_points_of_a_line_have_a_shading(drawn):
    steps = range(13)
    series = {"a": (steps, [[step, step + 2, step + 4] for step in steps]), "b": (steps, steps)}
    axes, alt = drawn(viz.curves, series, "Title", "Lines.")
    [shading] = axes.collections
    [outline] = [path.vertices for path in shading.get_paths()]
    assert outline[:, 1].min() == 0 and outline[:, 1].max() == 16
    assert axes.lines[0].get_ydata()[0] == 2 and whiskers(axes) == []
    assert "Lines are means of 3 seeds; the shading reaches from the least" in alt
    at_most = {"a": (steps[:-1], series["a"][1][:-1])}
    axes, alt = drawn(viz.curves, at_most, "Title", "Lines.")
    assert len(whiskers(axes)) == 12 and "whiskers" in alt


def test_limits_of_ones_own_are_shaded_and_must_be_explained(drawn):
    series = {"a": ([1, 2], [3.0, 2.0], [2.0, 1.0], [4.0, 3.0])}
    for alt in ("Mean and range of three seeds.", "With its 95 % interval."):
        axes, said = drawn(viz.curves, series, "Title", alt)
        [shading] = axes.collections
        assert shading.get_paths()[0].vertices[:, 1].max() == 4 and said == alt
    with pytest.raises(ValueError, match="the word 'range' or 'interval'.*found 'Arranged.'"):
        viz.curves(series, "Title", "Arranged.")


def test_a_single_value_may_be_nan_and_a_seed_may_not(drawn):
    axes, _ = drawn(viz.curves, {"a": ([1, 2], [3.0, float("nan")])}, "Title", "A line.")
    assert np.isnan(axes.lines[0].get_ydata()).tolist() == [False, True]
    with pytest.raises(ValueError, match="finite number for each seed"):
        viz.curves({"a": ([1], [[3.0, float("nan")]])}, "Title", "A line.")


def test_a_scatter_says_that_its_small_marks_are_seeds(drawn):
    points = {"a": ([1.0, 2.0, 3.0], Spread([1, 2, 3])), "cost known": (4.0, [5.0, 6.0, 7.0])}
    axes, alt = drawn(viz.scatter, points, "Title", "Points.", "cost (s)", "score")
    assert alt == "Points. Large marks are means of 3 seeds; small marks show each seed."
    assert axes.collections[2].get_offsets().tolist() == [[4, 5], [4, 6], [4, 7]]
    assert len(axes.lines) == 6  # from each mean to its seeds
    with pytest.raises(ValueError, match="same number of seeds"):
        viz.scatter({"a": ([1, 2], [1, 2, 3])}, "Title", "alt", "x", "y")


# --- Colours and labels --------------------------------------------------------------------------


def table_of(columns):
    return pd.DataFrame({f"column {i}": [1.0, 2.0] for i in range(columns)})


def lines_of(count):
    return {f"line {i}": ([1, 2], [i, i + 1]) for i in range(count)}


MANY = {
    "curves": lambda n: viz.curves(lines_of(n), "T", "alt"),
    "panels": lambda n: viz.panels({"A": lines_of(n)}, "T", "alt"),
    "small_multiples": lambda n: viz.small_multiples({"A": lines_of(n)}, "T", "alt"),
    "bars": lambda n: viz.bars(table_of(n), "T", "alt", "points"),
    "compare": lambda n: viz.compare(table_of(n) / 2, "T", "alt"),
    "stacked": lambda n: viz.stacked(table_of(n), "T", "alt", "points"),
    "histogram": lambda n: viz.histogram({f"s {i}": [1, 2, i] for i in range(n)}, "T", "alt", "x"),
}


@pytest.mark.parametrize("name", MANY)
def test_no_colour_is_used_for_two_series(monkeypatch, name):
    figures = []
    monkeypatch.setattr(viz, "Picture", lambda figure, alt: figures.append(figure))
    MANY[name](6)
    axes = figures[0].axes[0]
    marks = axes.lines if name in ("curves", "panels", "small_multiples") else axes.patches
    colours = {mark.get_edgecolor() if name == "histogram" else colour_of(mark) for mark in marks}
    assert len(colours) == 6
    with pytest.raises(ValueError, match="at most 6 series.*found 7"):
        MANY[name](7)


def colour_of(mark):
    return mark.get_color() if hasattr(mark, "get_color") else mark.get_facecolor()


@pytest.mark.parametrize(("count", "colours"), [(6, 6), (7, 1), (12, 1)])
def test_many_names_in_a_scatter_share_one_colour_and_differ_in_shape(drawn, count, colours):
    points = {f"name {i}": ([i], [i % 5]) for i in range(count)}
    axes, _ = drawn(viz.scatter, points, "T", "alt", "x", "y")
    assert len({tuple(marks.get_facecolor()[0][:3]) for marks in axes.collections}) == colours
    shapes = {marks.get_paths()[0].vertices.tobytes() for marks in axes.collections[1::2]}
    assert len(shapes) == count
    assert [text.get_text() for text in axes.texts] == [*points]


def test_a_long_name_in_a_scatter_is_wrapped(drawn):
    axes, _ = drawn(viz.scatter, {"PPO on the reward model": (1, 1)}, "T", "alt", "x", "y")
    assert axes.texts[0].get_text() == "PPO on the reward\nmodel"


def test_a_thirteenth_name_or_a_name_without_room_is_refused():
    points = {f"name {i}": ([i], [i]) for i in range(13)}
    with pytest.raises(ValueError, match="at most 12 names, found 13"):
        viz.scatter(points, "T", "alt", "x", "y")
    with pytest.raises(ValueError, match="Expected room .*Show fewer"):
        viz.scatter({"word " * 400: ([1], [1])}, "T", "alt", "x", "y")


@pytest.mark.integration
@pytest.mark.parametrize("seed", range(3))
def test_names_in_a_scatter_cover_no_mark_and_no_other_name(drawn, seed):
    rng = random.Random(seed)
    points = {}
    for i in range(12):
        x, y = rng.random(), rng.random() ** 4  # crowded at the bottom
        points[f"finetuning method {i}"] = ([x, x + 0.1, x - 0.1], [y, y + 0.05, y - 0.1])
    tall = "A title of several lines\n" * 6  # it makes the plot lower
    axes, _ = drawn(viz.scatter, points, tall, "alt", "x", "y")
    axes.figure.set_dpi(200)  # the labels stay where they are in a finer picture
    axes.figure.draw_without_rendering()
    boxes = [super(type(text), text).get_window_extent() for text in axes.texts]
    marks = [at for drawn in axes.collections for at in drawn.get_offsets()]
    marks += [line.get_xydata().mean(axis=0) for line in axes.lines]
    for i, box in enumerate(boxes):
        assert axes.bbox.contains(*box.p0) and axes.bbox.contains(*box.p1)
        assert not any(box.overlaps(other) for other in boxes[:i])
        assert not any(box.contains(*axes.transData.transform(at)) for at in marks)


def test_tokens_count_and_escape(tokenizer):
    ids = tokenizer.encode("<b>a</b>\n<|im_end|>", add_special_tokens=False)
    mask = [0] * (len(ids) - 1) + [1]
    page = viz.tokens(ids, mask, tokenizer).data
    assert "<b>" not in page and "&lt;" in page and "⏎" in page
    assert f"{len(ids)} tokens" in page and "(1)" in page
    assert page.count("underline") == 2  # the token that is learned, and the legend's


def test_tokens_without_counts_give_no_number_away(tokenizer):
    ids = tokenizer.encode("Hello you", add_special_tokens=False)
    page = viz.tokens(ids, [1] * len(ids), tokenizer, counts=False).data
    said = re.sub("<[^>]+>", "", page).replace("&nbsp;", " ")
    assert "learned from, only read; control token framed" in said and not re.search(r"\d", said)


def test_tokens_and_mask_must_match(tokenizer):
    with pytest.raises(ValueError, match="one mask value per token"):
        viz.tokens([1, 2], [0], tokenizer)


def columns(page):
    """The rows of a table of two encodings: left text, word, right text."""
    for row in re.findall(r"<tr><td.*?</tr>", page):
        left, word, right = (
            re.sub(r"<[^>]+>", "", cell).replace("&nbsp;", " ")
            for cell in re.findall(r"<td[^>]*>(.*?)</td>", row)
        )
        yield left, word, right


def encoded(tokenizer, text, learned=0):
    """Ids, and a mask that is 1 for the last tokens."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    return ids, [0] * (len(ids) - learned) + [1] * learned


def test_two_encodings_stand_line_by_line_and_other_tokens_are_named(tokenizer):
    pair = {
        "A": encoded(tokenizer, "<|im_start|>user\nHi."),
        "B": encoded(tokenizer, "<|im_start|>system\nHi."),
    }
    page = viz.side_by_side(pair, tokenizer).data
    assert [*columns(page)] == [
        ("&lt;|im_start|&gt;", "", "&lt;|im_start|&gt;"),
        ("user", "≠ other tokens", "system"),
        ("⏎", "", "⏎"),
        ("Hi.", "", "Hi."),
    ]
    assert "1 in A alone, 1 in B alone; 0 in both with another mask" in page


def test_the_same_tokens_with_another_mask_are_named_too(tokenizer):
    pair = {"A": encoded(tokenizer, "Hi.", 1), "B": encoded(tokenizer, "Hi.", 0)}
    count = len(pair["A"][0])
    page = viz.side_by_side(pair, tokenizer).data
    assert [*columns(page)][-1] == (".", "≠ other mask", ".")
    assert f"{count} tokens in both; 0 in A alone" in page
    assert "1 in both with another mask" in page
    only = viz.side_by_side(pair, tokenizer, every=False).data
    assert [word for _, word, _ in columns(only)] == ["≠ other mask"]


def test_a_token_in_one_encoding_alone_has_nothing_beside_it(tokenizer):
    pair = {"A": encoded(tokenizer, "Hi."), "B": encoded(tokenizer, "Hi.\n")}
    page = viz.side_by_side(pair, tokenizer).data
    assert [*columns(page)][-1] == ("", "≠ other tokens", "⏎")


def test_names_in_two_encodings_are_escaped(tokenizer):
    pair = {"<b>": encoded(tokenizer, "a"), "B": encoded(tokenizer, "a")}
    assert "<b>" not in viz.side_by_side(pair, tokenizer).data


def test_two_encodings_with_a_mask_each_are_needed(tokenizer):
    one = encoded(tokenizer, "Hi.")
    for pair in ({"A": one}, dict.fromkeys("ABC", one)):
        with pytest.raises(ValueError, match=f"Expected two encodings, found {len(pair)}"):
            viz.side_by_side(pair, tokenizer)
    with pytest.raises(ValueError, match="B: expected one mask value per token"):
        viz.side_by_side({"A": one, "B": (one[0], [1])}, tokenizer)


def test_the_bins_of_a_histogram_reach_from_the_lowest_value_to_the_highest(monkeypatch):
    figures = []
    monkeypatch.setattr(viz, "Picture", lambda figure, alt: figures.append(figure))
    series = {"a": [3.0, 4.0, 7.0], "b": [5.0]}
    viz.histogram(series, "title", "a picture", "value", bins=4)
    outlines = [patch.get_path().vertices for patch in figures[0].axes[0].patches]
    for outline in outlines:
        assert outline[:, 0].min() == 3.0 and outline[:, 0].max() == 7.0
    assert sorted({x for x, _ in outlines[0]}) == [3.0, 4.0, 5.0, 6.0, 7.0]


def test_shards_draws_a_square_for_each_number_and_fills_those_that_a_rank_keeps(monkeypatch):
    figures = []
    monkeypatch.setattr(viz, "Picture", lambda figure, alt: figures.append((figure, alt)))
    divided = {"none": [], "all": ["weights", "gradients", "optimizer"]}
    viz.shards(divided, "Title", "Squares.", ranks=2, numbers=4)
    (figure, alt), none_and_all = figures[0], figures[0][0].axes
    assert alt == "Squares." and [axes.get_title() for axes in none_and_all] == [*divided]
    filled = [
        sum(patch.get_facecolor()[:3] != (1, 1, 1) for patch in axes.patches)
        for axes in none_and_all
    ]
    assert [len(axes.patches) for axes in none_and_all] == [2 * 3 * 4] * 2
    assert filled == [24, 12]
    assert [text.get_text() for text in figure.legends[0].get_texts()][-1] == "kept by another rank"


def test_what_is_repeated_without_another_seed_is_not_called_a_seed(monkeypatch):
    said = []
    monkeypatch.setattr(viz, "Picture", lambda figure, alt: said.append(alt))
    viz.bars(pd.DataFrame({"ms": [[1, 2, 3]]}), "T", "Bars.", "ms", runs="repetitions")
    assert "means of 3 repetitions" in said[0] and "seed" not in said[0]


def test_a_cloud_has_a_mark_for_each_run_and_counts_them(drawn):
    groups = {"full": ([1, 2, 30], [0.1, 0.9, 0.8]), "LoRA": ([4, 5], [0.5, 0.6])}
    axes, alt = drawn(viz.cloud, groups, "T", "Marks.", "perplexity", "score", True)
    marks = [collection.get_offsets().tolist() for collection in axes.collections]
    assert marks == [[[1, 0.1], [2, 0.9], [30, 0.8]], [[4, 0.5], [5, 0.6]]]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["full (3)", "LoRA (2)"]
    assert axes.get_xscale() == "log" and alt == "Marks."
    assert [text.get_text() for text in axes.get_xticklabels()] == [
        "1",
        "2",
        "3",
        "5",
        "10",
        "20",
        "30",
    ]
    colours = {tuple(collection.get_facecolor()[0][:3]) for collection in axes.collections}
    assert len(colours) == 2
    with pytest.raises(ValueError, match="at most 6 series"):
        viz.cloud({str(n): ([1], [1]) for n in range(7)}, "T", "alt", "x", "y")
