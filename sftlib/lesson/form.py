"""The form in which a student predicts: buttons for options, a field for a number.

It is made of the widgets that ipywidgets itself has. JupyterLab (with `jupyterlab_widgets`), VS
Code and Colab have the programs for these, and fetch nothing. A widget with a program of its own
(anywidget) is looked for in the network by VS Code and Colab. A button in plain HTML cannot reach
the kernel in JupyterLab or VS Code.

Keyboard: Tab goes from button to button, Space or Enter chooses. Radio buttons would need the arrow
keys, which JupyterLab keeps for moving between cells. Screen readers: a button's title repeats the
question, its name says whether it is chosen, and the line below is announced when it changes.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

from sftlib.lesson.questions import Number, Options, Question, escaped

if TYPE_CHECKING:
    from ipywidgets import HTML, Widget

Choose = Callable[[Any], tuple[Any, str]]
VIEW = "application/vnd.jupyter.widget-view+json"
# Borders and the ring around what has the focus stand out from light and dark pages (3:1 at least);
# what is chosen differs by a ✓ and its weight, too. `!important`: ipywidgets removes the ring.
STYLE = """<style>
.sft-prediction { padding: 4px; max-width: 46em; }
.sft-prediction .widget-html-content { line-height: 1.4; white-space: normal; }
.sft-prediction .widget-button { width: auto; height: auto; min-height: 32px; margin: 3px;
  padding: 4px 12px; text-align: left; white-space: normal; line-height: 1.4;
  border: 1px solid #767676; }
.sft-prediction .widget-button.sft-chosen { font-weight: 600; border-color: currentColor;
  box-shadow: inset 0 0 0 1px currentColor; }
.sft-prediction .widget-text { width: auto; height: auto; margin: 3px; flex-wrap: wrap; }
.sft-prediction .widget-text input { flex: 0 0 10em; border: 1px solid #767676 !important; }
.sft-prediction :is(button, input):focus-visible { outline: 3px solid #2b83d6 !important;
  outline-offset: 1px; }
</style>"""


class Shown:
    """A question as front ends show it: as a form, or as a list where there are no widgets."""

    def __init__(self, question: Question, note: str = "", form: Widget | None = None) -> None:
        self.question, self.note, self.form = question, note, form

    def __repr__(self) -> str:
        return "\n".join([*self.question.lines(), *([self.note] if self.note else [])])

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, Any]:
        note = f"\n\n{escaped(self.note)}" if self.note else ""
        bundle: dict[str, Any] = {"text/plain": repr(self)}
        bundle["text/markdown"] = self.question.markdown() + note
        if self.form is not None:
            view = {"version_major": 2, "version_minor": 0, "model_id": self.form.model_id}
            bundle[VIEW] = view
        return bundle


def form(question: Question, chosen: Any, note: str, choose: Choose) -> Widget:
    """The widget for a question.

    Args:
        chosen: what was predicted before; None if nothing was.
        note: the line below the answers.
        choose: is called with each answer; it returns what is predicted now, and the new note.
    """
    from ipywidgets import HTML, VBox

    below = HTML(_note(note))
    make = _field if isinstance(question.answer, Number) else _buttons
    answers = make(question, chosen, choose, below)
    box = VBox([HTML(f"{STYLE}<b>{_html(question.text)}</b>"), *answers, below])
    box.add_class("sft-prediction")
    return box


def close(form: Widget, note: str) -> None:
    """Take no more answers, and say why: a page that was loaded again keeps showing its forms."""
    _, *answers, below = cast(Any, form).children
    for answer in answers:
        answer.disabled = True
    below.value = _note(note)


def _buttons(question: Question, chosen: Any, choose: Choose, below: HTML) -> Sequence[Widget]:
    from ipywidgets import Button

    options = cast(Options, question.answer).options
    buttons = [Button() for _ in options]

    def mark(chosen: Any) -> None:
        for number, (button, option) in enumerate(zip(buttons, options, strict=True), 1):
            name, is_chosen = f"{number}. {option.replace('`', '')}", option == chosen
            button.description = f"✓ {name}" if is_chosen else name
            button.tooltip = f"{'Predicted' if is_chosen else 'Predict'}: {question.text}"
            (button.add_class if is_chosen else button.remove_class)("sft-chosen")

    def clicked(button: Any) -> None:
        chosen, note = choose(options[buttons.index(button)])
        mark(chosen)
        below.value = _note(note)

    for button in buttons:
        button.on_click(clicked)
    mark(chosen)
    return buttons


def _field(question: Question, chosen: Any, choose: Choose, below: HTML) -> Sequence[Widget]:
    from ipywidgets import Text

    answer = cast(Number, question.answer)
    label = str(answer)
    label = label[0].upper() + label[1:]  # the unit stays as it is
    value = "" if chosen is None else f"{chosen:.12g}"
    style = {"description_width": "initial"}
    field = Text(value=value, description=f"{label}:", continuous_update=False, style=style)
    field.tooltip = question.text

    def changed(change: dict) -> None:
        try:
            below.value = _note(choose(answer.read(change["new"]))[1])
        except ValueError as problem:
            below.value = _note(str(problem), "alert")

    field.observe(changed, "value")
    return [field]


def _note(text: str, role: str = "status") -> str:
    """The line below, as something that screen readers say when it changes."""
    return f'<span role="{role}">{_html(text)}</span>'


def _html(text: str) -> str:
    return re.sub("`([^`]+)`", r"<code>\1</code>", html.escape(text))
