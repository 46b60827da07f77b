"""An LLM that writes SFT data: OpenAI, any compatible server, the local teacher, a recording.

`Teacher` finds the source and asks it. `parse_pairs` reads its answers. `generate_pairs` asks until
there are enough usable pairs, and loses none of them.
"""

from sftlib.teacher.client import Completion, Refused, Teacher, TeacherError, Unreadable
from sftlib.teacher.generation import Generated, Prices, generate_pairs
from sftlib.teacher.pairs import PAIR_SCHEMA, Pair, PairError, parse_pairs

__all__ = [
    "PAIR_SCHEMA",
    "Completion",
    "Generated",
    "Pair",
    "PairError",
    "Prices",
    "Refused",
    "Teacher",
    "TeacherError",
    "Unreadable",
    "generate_pairs",
    "parse_pairs",
]
