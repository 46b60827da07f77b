"""What the formulas count is what PEFT, PyTorch and the papers say; what measures is exact."""

from sftlib.models import TINY_BASE, load
from sftlib.scale.measure import peak_bytes, saved_bytes, step_bytes, tracked_bytes
from sftlib.scale.memory import (
    Bytes,
    activation_bytes,
    adam_bytes,
    linear_shapes,
    lora_parameters,
    lora_targets,
    nf4_bytes,
    parameters,
    zero_bytes,
)

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

GPT3 = {f"h.{i}.attn.{name}": (12288, 12288) for i in range(96) for name in ("q", "k", "v", "o")}
SHAPES = [
    {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "vocab_size": 300}
    | {"num_attention_heads": 4, "num_key_value_heads": 4},
    {"hidden_size": 96, "intermediate_size": 128, "num_hidden_layers": 3, "vocab_size": 500}
    | {"num_attention_heads": 6, "num_key_value_heads": 2},
]
BATCH, LENGTH = 4, 64


def on_meta(config, **lora):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        return get_peft_model(model, LoraConfig(**lora)) if lora else model


def llama(shape, dtype="float32", r=0, checkpointing=False):
    """A small Llama that is trained, with LoRA on all linear layers where there is a rank."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**shape)).to(getattr(torch, dtype)).train()
    if checkpointing:
        model.activation_checkpointing_enable()
        model.enable_input_require_grads()
    return get_peft_model(model, LoraConfig(r=r, target_modules="all-linear")) if r else model


def ids(shape):
    torch.manual_seed(0)
    return torch.randint(shape["vocab_size"], (BATCH, LENGTH))


def test_gpt2_small_has_the_known_counts():
    names = ["c_attn", "c_proj"]
    model = on_meta(GPT2Config())
    assert parameters(model).total == parameters(model).trainable == 124_439_808
    assert lora_parameters(model, 16, names) == 1_622_016
    lora = parameters(on_meta(GPT2Config(), r=16, target_modules=names, fan_in_fan_out=True))
    assert (lora.trainable, lora.total) == (1_622_016, 126_061_824)
    assert f"{lora.share:.4%}" == "1.2867%"


def test_gpt3_counts_as_in_the_lora_paper():
    assert lora_parameters(GPT3, 1, ["q", "v"]) == 4_718_592
    assert lora_parameters(GPT3, 8, ["q", "v"]) == 37_748_736


def test_llama3_8b_has_the_known_counts():
    sizes = {"vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336}
    config = LlamaConfig(
        **sizes, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8
    )
    model = on_meta(config)
    assert parameters(model).total == 8_030_261_248
    assert lora_parameters(model, 16, "all-linear") == 41_943_040
    wrapped = on_meta(config, r=16, target_modules="all-linear")
    assert parameters(wrapped).trainable == 41_943_040


@pytest.mark.parametrize("r", [1, 8, 64])
@pytest.mark.parametrize(
    "target_modules",
    ["all-linear", ["q_proj", "v_proj"], ["down_proj"], ["layers.1.self_attn.q_proj", "up_proj"]]
    + [r".*\.(q|k)_proj", r"model\.layers\.[01]\.mlp\..*_proj"],
)
def test_lora_parameters_are_those_that_peft_trains(target_modules, r):
    config = AutoConfig.from_pretrained(TINY_BASE)
    wrapped = on_meta(config, r=r, target_modules=target_modules)
    count = lora_parameters(on_meta(config), r, target_modules)
    assert count == parameters(wrapped).trainable > 0
    assert lora_parameters(wrapped, r, target_modules) == count


@pytest.mark.parametrize("tied", [True, False])
def test_adapters_and_trained_rows_do_not_change_the_linear_layers(tied):
    config = LlamaConfig(**SHAPES[1], tie_word_embeddings=tied)
    model = on_meta(config)
    plain = linear_shapes(model)
    assert len(plain) == 7 * 3 and not any("lm_head" in name for name in plain)
    assert plain["model.layers.2.self_attn.k_proj"] == (96, 32)
    rows = {"embed_tokens": [1]} if tied else {"embed_tokens": [1], "lm_head": [1]}
    lora = {"r": 2, "target_modules": "all-linear"}
    assert linear_shapes(on_meta(config, **lora)) == plain
    assert linear_shapes(on_meta(config, **lora, trainable_token_indices=rows)) == plain


def test_the_shapes_of_gpt2_are_inputs_times_outputs():
    model = on_meta(GPT2Config(n_layer=1, n_embd=64, n_head=2))
    assert isinstance(model, GPT2LMHeadModel)
    assert linear_shapes(model)["transformer.h.0.attn.c_attn"] == (64, 192)
    assert linear_shapes(model)["transformer.h.0.mlp.c_proj"] == (256, 64)


@pytest.mark.parametrize(
    ("target_modules", "idle"),
    [
        (["query", "value"], "'query'"),
        (["q", "querry", "v"], "]: 'querry' fits none"),
        ([], "[]: an empty list fits none"),
        (r".*\.attn", r".*\\.attn"),  # a pattern is for the whole name
        ("q", "'q'"),
    ],
)
def test_names_that_fit_nothing_are_named_beside_those_that_there_are(target_modules, idle):
    with pytest.raises(ValueError) as error:
        lora_targets(GPT3, 8, target_modules)
    message = str(error.value)
    assert idle in message and "k, o, q, v" in message and "all-linear" in message


def test_a_pattern_that_is_none_is_refused_with_its_fault():
    with pytest.raises(ValueError, match=r"found '\*\.q': nothing to repeat at position 0"):
        lora_targets(GPT3, 8, "*.q")


def test_a_name_is_a_whole_part_of_a_name():
    shapes = {"h.0.q": (4, 4), "h.0.uq": (4, 4), "h.1.q": (4, 4)}
    assert set(lora_targets(shapes, 1, ["q"])) == {"h.0.q", "h.1.q"}
    assert set(lora_targets(shapes, 1, ["0.q"])) == {"h.0.q"}


@pytest.mark.parametrize("r", [0, -4, 8.0, "8", None, True])
def test_a_rank_is_a_whole_number_above_zero(r):
    with pytest.raises(ValueError, match=f"found r={r!r}:"):
        lora_targets(GPT3, r, "all-linear")


def test_a_rank_is_not_above_that_of_the_smallest_matrix():
    shapes = {"a.q": (64, 64), "a.k": (64, 16), "a.v": (64, 32)}
    assert lora_targets(shapes, 16, "all-linear") == shapes
    with pytest.raises(ValueError, match=r"at most 16, found r=17: the matrix of a\.k is 64 × 16"):
        lora_targets(shapes, 17, "all-linear")
    assert lora_targets(shapes, 32, ["q", "v"]) == {"a.q": (64, 64), "a.v": (64, 32)}


def test_adam_bytes_are_those_of_its_sources():
    assert adam_bytes(1000) == Bytes(4000, 4000, 8000)
    assert adam_bytes(1000, precision="bfloat16") == Bytes(2000, 2000, 4000)
    assert adam_bytes(1000, precision="mixed") == Bytes(2000, 2000, 12_000)
    assert adam_bytes(1000, precision="mixed").total == 16_000
    assert adam_bytes(10, 1000) == Bytes(4040, 40, 80)
    assert adam_bytes(10, 1000, "mixed", "bfloat16") == Bytes(2020, 20, 120)
    # 4 bits each, a byte for each 64 and 4 for each 256 of those: 8192 + 256 + 4
    assert adam_bytes(0, 16_384, frozen_dtype="nf4") == Bytes(8452, 0, 0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_nf4_bytes_are_those_of_a_base_that_bitsandbytes_loads(tiny, dtype):
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    packed, _ = load(dtype=getattr(torch, dtype), quantization_config=four_bits, device_map="cpu")
    states = [p.quant_state for p in packed.parameters() if hasattr(p, "quant_state")]
    scales = sum(state.absmax.nbytes + state.state2.absmax.nbytes for state in states)
    real = sum(p.nbytes for p in packed.parameters()) + scales
    assert len(states) == 21 and nf4_bytes(tiny[0], dtype) == pytest.approx(real, rel=1e-3)


@pytest.mark.parametrize("options", [{"precision": "fp8"}, {"frozen_dtype": "fp8"}])
def test_an_unknown_precision_or_dtype_is_told_with_the_known_ones(options):
    with pytest.raises(ValueError, match="Expected one of float32, bfloat16, .*found 'fp8'"):
        adam_bytes(1, 1, **options)


# Table 1 of the ZeRO paper (arXiv 1910.02054): GB per device, for 4, 16, 64, 256, 1024 devices.
PAPER = {
    (7.5e9, 1): (52.5, 35.6, 31.4, 30.4, 30.1),
    (7.5e9, 2): (41.3, 21.6, 16.6, 15.4, 15.1),
    (7.5e9, 3): (30, 7.5, 1.88, 0.47, 0.12),
    (128e9, 1): (896, 608, 536, 518, 513),
    (128e9, 2): (704, 368, 284, 263, 257),
    (128e9, 3): (512, 128, 32, 8, 2),
    (1e12, 1): (7000, 4750, 4187, 4046, 4011),
    (1e12, 2): (5500, 2875, 2218, 2054, 2013),
    (1e12, 3): (4000, 1000, 250, 62.5, 15.6),
}


@pytest.mark.parametrize(("size", "stage"), PAPER)
def test_zero_bytes_are_those_of_the_papers_table(size, stage):
    for ranks, expected in zip((4, 16, 64, 256, 1024), PAPER[size, stage], strict=True):
        found = zero_bytes(int(size), ranks, stage, "float16").total / 1e9
        assert found == pytest.approx(expected, rel=4e-3, abs=0.005)  # as printed
    assert zero_bytes(int(size), 1, stage) == adam_bytes(int(size), precision="mixed")
    assert zero_bytes(int(size), 64, 0) == adam_bytes(int(size), precision="mixed")


def test_zero_divides_weights_last_and_frozen_ones_with_them():
    stages = [zero_bytes(1000, 3, stage, frozen=200) for stage in range(4)]
    assert [bytes_.weights for bytes_ in stages] == [2400, 2400, 2400, 800]
    assert [bytes_.gradients for bytes_ in stages] == [2000, 2000, 667, 667]
    assert [bytes_.optimizer for bytes_ in stages] == [12000, 4000, 4000, 4000]


def test_in_float32_the_optimizer_keeps_a_copy_from_stage_1_on():
    assert zero_bytes(1000, 2, 0, "float32") == adam_bytes(1000)
    assert vars(zero_bytes(1000, 2, 3, "float32")) == dict(
        weights=2000, gradients=2000, optimizer=6000
    )


@pytest.mark.parametrize(
    ("given", "expected", "found"),
    [
        ({"stage": 4}, "from 0 to 3", "4"),
        ({"stage": "2"}, "from 0 to 3", "'2'"),
        ({"world_size": 0}, "at least one rank", "world_size=0"),
        ({"parameters": -1}, "no negative", "parameters=-1"),
        ({"frozen": -1}, "no negative", "frozen=-1"),
        ({"dtype": "mixed"}, "float32, bfloat16, float16", "'mixed'"),
    ],
)
def test_what_zero_cannot_be_asked_is_told(given, expected, found):
    with pytest.raises(ValueError, match=expected) as error:
        zero_bytes(**{"parameters": 10, "world_size": 2, "stage": 1} | given)
    assert found in str(error.value)


@pytest.mark.parametrize("dtype", ["nf4", "fp8"])
def test_activations_are_counted_in_the_dtypes_that_compute(dtype):
    with pytest.raises(ValueError, match=f"Expected one of float32, bfloat16, found '{dtype}'"):
        activation_bytes(LlamaConfig(**SHAPES[0]), 1, 1, dtype)


@pytest.mark.parametrize(
    ("dtype", "r"), [("float32", 0), ("float32", 8), ("bfloat16", 8)], ids=["full", "LoRA", "bf16"]
)
def test_after_a_step_there_is_what_adam_bytes_says(dtype, r):
    model = AutoModelForCausalLM.from_pretrained(TINY_BASE, dtype=getattr(torch, dtype))
    if r:
        model = get_peft_model(model, LoraConfig(r=r, target_modules="all-linear"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    tokens = torch.arange(16)[None]
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    count = parameters(model)
    expected = adam_bytes(count.trainable, count.total - count.trainable, frozen_dtype=dtype)
    found = tracked_bytes(model, optimizer)
    assert found.weights == pytest.approx(expected.weights, rel=1e-3)
    assert found.gradients == pytest.approx(expected.gradients, rel=1e-3)
    assert found.optimizer == pytest.approx(expected.optimizer, rel=1e-3)
    assert found.total == pytest.approx(expected.total, rel=1e-3)


def test_a_measured_step_has_the_bytes_of_its_parts_and_a_peak_above_them():
    model = AutoModelForCausalLM.from_pretrained(TINY_BASE, dtype=torch.float32)
    tokens = torch.arange(64).reshape(4, 16)
    found = step_bytes(model, tokens, torch.optim.AdamW(model.parameters()))
    expected = adam_bytes(parameters(model).total)
    for kind in ("weights", "gradients", "optimizer"):
        assert found[kind] == pytest.approx(getattr(expected, kind), rel=1e-3)
    activations = activation_bytes(model.config, 4, 16, "float32", 0)
    assert found["activations"] == pytest.approx(activations, rel=0.01)
    assert found["peak"] > found["weights"] + found["optimizer"] + found["activations"]


def test_saved_bytes_are_exact_and_leave_the_weights_aside():
    layer = torch.nn.Linear(3, 5, bias=False)
    given = torch.ones(2, 3, requires_grad=True)
    with saved_bytes(layer) as saved:
        layer(given).square().sum()
    assert saved.total == 4 * (2 * 3 + 2 * 5)  # the input, and what is squared; not the weight


@pytest.mark.parametrize("r", [0, 8])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=["MHA", "GQA"])
def test_activation_bytes_are_what_autograd_saves(shape, dtype, r):
    model, tokens = llama(shape, dtype, r), ids(shape)
    with saved_bytes(model) as saved:
        model(input_ids=tokens, labels=tokens)
    expected = activation_bytes(model.config, BATCH, LENGTH, dtype, r)
    assert saved.total == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("r", [0, 8])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_checkpointing_keeps_no_more_than_is_said_and_far_less_than_without(dtype, r):
    shape = SHAPES[1] | {"num_hidden_layers": 8}
    alive = {}
    for checkpointing in (False, True):
        model, tokens = llama(shape, dtype, r, checkpointing), ids(shape)
        with peak_bytes([*model.parameters(), *model.buffers(), tokens]) as measured:
            before = measured.now
            loss = model(input_ids=tokens, labels=tokens).loss
            alive[checkpointing] = measured.now - before
        assert loss.requires_grad
    bound = activation_bytes(model.config, BATCH, LENGTH, dtype, r, checkpointing=True)
    without = activation_bytes(model.config, BATCH, LENGTH, dtype, r)
    assert without == pytest.approx(alive[False], rel=0.01)
    assert alive[True] <= bound < without / 2


def test_peak_bytes_follow_tensors_as_they_come_and_go():
    with peak_bytes() as peak:
        first = torch.zeros(1000)
        assert (peak.now, peak.peak) == (4000, 4000)
        del first
        assert (peak.now, peak.peak) == (0, 4000)
        second = torch.zeros(500, dtype=torch.float64)
        third = second + 1
        assert (peak.now, peak.peak) == (8000, 8000)
        del second
        fourth = torch.zeros(250)
    assert (peak.now, peak.peak) == (5000, 8000)
    del third, fourth
    assert (peak.now, peak.peak) == (0, 8000)


def test_peak_bytes_count_what_was_there_before_and_views_once():
    before = torch.zeros(250)
    with peak_bytes([before, before[:10]]) as peak:
        views = [before.view(10, 25), before[5:], before.view(10, 25).T]
        assert (peak.now, peak.peak) == (1000, 1000)
        made = torch.zeros(100)
        part = made[:1]
        del made
        assert peak.now == 1400, "a view keeps all of its tensor"
        del part
        before.add_(1)
        assert (peak.now, peak.peak) == (1000, 1400)
    del views


def test_peak_bytes_are_the_same_in_each_run():
    def step():
        model, tokens = llama(SHAPES[0]), ids(SHAPES[0])
        optimizer = torch.optim.AdamW(model.parameters())
        with peak_bytes(model.parameters()) as peak:
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
        return peak.peak, tracked_bytes(model, optimizer).total

    first, tracked = step()
    assert step()[0] == first > tracked
