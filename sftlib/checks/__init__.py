"""One `check_…` per exercise: ✓ for a right answer, the likely cause for a wrong one.

A check is the last line of a cell, which shows its verdict. An exercise that was not attempted (the
answer is still `...`) says so and is no error, so a notebook with open exercises runs to its end.

| file | what it does |
|---|---|
| `exercise` | `@exercise`, what all checks have in common: open answers, errors, seeds |
| `reading` | answers of any type as plain Python values |
| `functions` | `compare`: a student's function against a right one, on many inputs |
| `causes` | why a student found this number |
| `held_out` | `beats`: what a student's rows or model score on held-out questions |
| `verdict`, `progress` | what a check says, and what is solved |

The checks stand in one file per lesson, named after it.
"""

from sftlib.checks.chatml import (
    batch_to_mask,
    broken_batches,
    check_bugs,
    check_mask,
    check_pipeline,
    check_template,
)
from sftlib.checks.deepspeed import check_configs, check_stages, check_zero_memory
from sftlib.checks.held_out import beats
from sftlib.checks.llama3 import (
    check_form_and_content,
    check_gpu_hours,
    check_rehearsal,
    check_schedule,
)
from sftlib.checks.lora_vs_full import (
    check_adapted_layer,
    check_fair_comparison,
    check_memory,
    check_storing,
    check_trainable,
)
from sftlib.checks.metrics import (
    check_diagnosis,
    check_learning_rate,
    check_repairs,
    check_train_output,
)
from sftlib.checks.progress import progress
from sftlib.checks.sft_data import (
    check_cleaning,
    check_cost,
    check_leaks,
    check_parser,
    check_validator,
    dirty_rows,
)
from sftlib.checks.trl_preferences import (
    check_advantages,
    check_beats_refusing,
    check_dpo_loss,
    check_methods,
)
from sftlib.checks.trl_sft import (
    check_completion_labels,
    check_loss_curve,
    check_modern_call,
    check_training_steps,
    loss_curves,
)
from sftlib.checks.two_ranks import check_launch
from sftlib.checks.verdict import NOT_ATTEMPTED, Verdict
from sftlib.checks.what_is_sft import (
    check_exact_match,
    check_example,
    check_knowledge,
    check_learned_tokens,
    check_rows,
)

__all__ = [
    "NOT_ATTEMPTED",
    "Verdict",
    "batch_to_mask",
    "beats",
    "broken_batches",
    "check_adapted_layer",
    "check_advantages",
    "check_beats_refusing",
    "check_bugs",
    "check_cleaning",
    "check_completion_labels",
    "check_configs",
    "check_cost",
    "check_diagnosis",
    "check_dpo_loss",
    "check_exact_match",
    "check_example",
    "check_fair_comparison",
    "check_form_and_content",
    "check_gpu_hours",
    "check_knowledge",
    "check_launch",
    "check_leaks",
    "check_learned_tokens",
    "check_learning_rate",
    "check_loss_curve",
    "check_mask",
    "check_memory",
    "check_methods",
    "check_modern_call",
    "check_parser",
    "check_pipeline",
    "check_rehearsal",
    "check_repairs",
    "check_rows",
    "check_schedule",
    "check_stages",
    "check_storing",
    "check_template",
    "check_train_output",
    "check_trainable",
    "check_training_steps",
    "check_validator",
    "check_zero_memory",
    "dirty_rows",
    "loss_curves",
    "progress",
]
