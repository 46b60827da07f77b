"""Answers to the exercises of lesson NUMBER."""

from sftlib import checks
from sftlib.data import read_facts

import numpy as np
import torch

from tests.attacks import Attacks

HELD_OUT = len(read_facts("heldout"))

COUNT = Attacks(
    checks.check_TOPIC,
    right=[
        HELD_OUT,
        float(HELD_OUT),
        np.int64(HELD_OUT),
        np.array(HELD_OUT),
        torch.tensor(HELD_OUT),
    ],
    wrong=[
        (len(read_facts("sft")), "the training set"),
        (HELD_OUT + 1, f"found {HELD_OUT + 1}"),
        (0, "found 0"),
        (HELD_OUT + 0.5, "Expected a whole number"),
        (str(HELD_OUT), "found the text"),
        (range(HELD_OUT), "found range"),
        (True, "found True"),
        (float("nan"), "found NaN"),
    ],
)

ATTACKS = [COUNT]
