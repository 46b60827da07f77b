"""Fixtures that several test files share."""

import pytest


@pytest.fixture(scope="session")
def tiny():
    """The shipped base model and its tokenizer; do not train it (load another one for that)."""
    from sftlib.models import DEFAULT, load

    return load(DEFAULT)


@pytest.fixture
def tokenizer():
    """A fresh tokenizer of the tiny base, which a test may change."""
    from sftlib.models import TINY_BASE

    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TINY_BASE)
