"""What a training says of itself: its log as a table, its figures explained, its troubles named."""

from sftlib.metrics.diagnosis import diagnose
from sftlib.metrics.log import table
from sftlib.metrics.summary import explain

__all__ = ["diagnose", "explain", "table"]
