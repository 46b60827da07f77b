"""Fixtures that several test files share."""

import socket

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


@pytest.fixture
def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.fixture
def somebody_comes(monkeypatch):
    """Call it in a test: from then on no variable says that outputs are compared or stored."""

    def come():  # not before: pytest sets its own variable again when the test begins
        for name in ("CI", "PYTEST_CURRENT_TEST", "SFT_NO_BARS"):
            monkeypatch.delenv(name, raising=False)

    return come
