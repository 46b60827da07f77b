"""Pictures are labelled and described; token pictures show text as it is."""

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
    viz.compare(pd.DataFrame({"x": [0.5], "y": [1.0]}, index=["set"]), "Bars", "alt")
    curves, bars = (figure.axes[0] for figure in figures)
    assert (curves.get_title(), curves.get_xlabel()) == ("Title", "optimizer step")
    assert curves.get_ylabel() == "loss (nats a token)" and curves.get_legend()
    assert bars.get_ylabel() == "share of prompts (%)"
    assert [t.get_text() for t in bars.texts] == ["50.0", "100.0"]


def test_tokens_count_and_escape(tokenizer):
    ids = tokenizer.encode("<b>a</b>\n<|im_end|>", add_special_tokens=False)
    mask = [0] * (len(ids) - 1) + [1]
    page = viz.tokens(ids, mask, tokenizer).data
    assert "<b>" not in page and "&lt;" in page and "⏎" in page
    assert f"{len(ids)} tokens" in page and "(1)" in page


def test_tokens_and_mask_must_match(tokenizer):
    with pytest.raises(ValueError, match="one mask value a token"):
        viz.tokens([1, 2], [0], tokenizer)
