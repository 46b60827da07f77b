"""What every lesson's notebook uses: its work folder, its claims, its predictions, its versions."""

from sftlib.lesson.cells import begin
from sftlib.lesson.claims import claim
from sftlib.lesson.versions import environment

__all__ = ["begin", "claim", "environment"]
