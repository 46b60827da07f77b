"""Pictures are labelled and described; token pictures show text as it is."""

import re

from sftlib import viz

import pandas as pd
import pytest

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


def test_a_scatter_marks_each_point_and_their_mean(monkeypatch):
    figures = []
    monkeypatch.setattr(viz, "Picture", lambda figure, alt: figures.append(figure))
    points = {"DPO": ([1.0, 3.0], [0.2, 0.4]), "PPO": ([2.0], [0.8])}
    viz.scatter(points, "Title", "alt", "KL (nats)", "score")
    [axes] = figures[0].axes
    drawn = [collection.get_offsets().tolist() for collection in axes.collections]
    assert drawn[0] == [[1.0, 0.2], [3.0, 0.4]]
    assert drawn[1][0] == pytest.approx([2.0, 0.3])
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ["DPO", "PPO"]
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


def test_the_bins_of_a_histogram_reach_from_the_lowest_value_to_the_highest(monkeypatch):
    figures = []
    monkeypatch.setattr(viz, "Picture", lambda figure, alt: figures.append(figure))
    series = {"a": [3.0, 4.0, 7.0], "b": [5.0]}
    viz.histogram(series, "title", "a picture", "value", bins=4)
    outlines = [patch.get_path().vertices for patch in figures[0].axes[0].patches]
    for outline in outlines:
        assert outline[:, 0].min() == 3.0 and outline[:, 0].max() == 7.0
    assert sorted({x for x, _ in outlines[0]}) == [3.0, 4.0, 5.0, 6.0, 7.0]
