"""Every name of TRL that the course uses is there, and takes the arguments that we give it.

Read from the lessons and from `sftlib`, so that a new version of TRL says which lesson it breaks.
"""

import ast
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from sftlib.models import load
from sftlib.training import config

import nbformat
import pytest
import trl
from datasets import Dataset
from IPython.core.inputtransformer2 import TransformerManager

from tools import notebooks

ROOT = Path(__file__).parents[1]


class Use(NamedTuple):
    """A name of TRL in a file, and the keyword arguments of a call of it."""

    file: str
    module: str
    name: str
    arguments: tuple[str, ...]


def sources() -> Iterator[tuple[str, str]]:
    """Each file of the course with its Python text."""
    for path in notebooks.find():
        nb = nbformat.read(path, 4)
        cells = [python(cell.source) for cell in nb.cells if cell.cell_type == "code"]
        yield str(path.relative_to(ROOT)), "\n".join(cells)
    for path in (*ROOT.glob("sftlib/**/*.py"), *ROOT.glob("tests/ranks/*.py")):
        yield str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")


def python(cell: str) -> str:
    """A cell without IPython's own syntax; a script that it writes counts as the lesson's code."""
    if cell.startswith("%%writefile"):
        return cell.partition("\n")[2]
    return TransformerManager().transform_cell(cell)


def uses(file: str, text: str) -> set[Use]:
    """What the text imports from TRL, and calls."""
    if "trl" not in text:
        return set()
    tree = ast.parse(text)
    names = {  # the local name → (module, name)
        alias.asname or alias.name: (node.module, alias.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "trl"
        for alias in node.names
    }
    found = {Use(file, module, name, ()) for module, name in names.values()}
    found |= {  # `trl.name`
        Use(file, "trl", node.attr, ())
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "trl"
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names:
            given = tuple(sorted(word.arg for word in node.keywords if word.arg))
            found.add(Use(file, *names[node.func.id], given))
    return found


USES = sorted({use for file, text in sources() for use in uses(file, text)})


@pytest.mark.parametrize("use", USES, ids=lambda use: f"{use.file}:{use.name}({use.arguments})")
def test_trl_has_the_name_and_takes_the_arguments(use: Use):
    found = getattr(importlib.import_module(use.module), use.name)
    takes = inspect.signature(found).parameters if use.arguments else {}
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in takes.values()):
        assert set(use.arguments) - set(takes) == set()


def test_each_lesson_that_trains_is_looked_at():
    seen = {use.file for use in USES}
    assert {"notebooks/03_chatml.ipynb", "notebooks/06_trl_sft.ipynb"} <= seen
    assert "sftlib/training.py" in seen
    names = {use.name for use in USES}
    assert {"SFTConfig", "SFTTrainer", "pack_dataset"} <= names


def test_an_argument_that_trl_does_not_take_is_noticed():
    text = "from trl import SFTConfig as C\nC('out', max_seq_length=3)"
    (use,) = uses("lesson", text) - {Use("lesson", "trl", "SFTConfig", ())}
    with pytest.raises(AssertionError):
        test_trl_has_the_name_and_takes_the_arguments(use)


def test_a_name_that_trl_does_not_have_is_noticed():
    (use,) = uses("lesson", "from trl import PPOTrainer")
    with pytest.raises(AttributeError, match="PPOTrainer"):
        test_trl_has_the_name_and_takes_the_arguments(use)


def test_the_course_s_defaults_make_a_trainer_without_a_deprecation(recwarn):
    model, tokenizer = load()
    rows = [
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}
    ]
    trainer = trl.SFTTrainer(
        model=model,
        args=config(),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    assert type(trainer.args) is trl.SFTConfig
    ours = [w for w in recwarn if issubclass(w.category, FutureWarning)]
    assert not ours, [str(w.message) for w in ours]
