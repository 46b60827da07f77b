"""DeepSpeed does on two CPU ranks what lesson 5 says: same losses, less memory, resumed exactly."""

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from sftlib.models import load
from sftlib.scale.launch import launch, unavailable
from sftlib.scale.memory import fsdp_bytes, zero_bytes
from sftlib.scale.planner import HOST_GRADIENTS, OPTIMIZER_STATES
from sftlib.training import config as sft_config

import pytest
import torch

from tests.ranks.data import batches

ROOT = Path(__file__).parents[1]
RANKS = ROOT / "tests" / "ranks"
TWO_NODES = ROOT / "tests" / "two_nodes.sh"
CONFIGS = sorted((ROOT / "deepspeed_configs").glob("*.json"))
ON_CPU = [path for path in CONFIGS if not path.stem.endswith(("_fp16", "_bf16"))]
BUCKET = 500_000  # elements, as tests/ranks/common.py has it

pytestmark = pytest.mark.skipif(bool(unavailable()), reason=f"no ranks here: {unavailable()}")


def run_ranks(script, folder, *args, **options):
    """What `launch` gives; logs are in the folder."""
    return launch(RANKS / script, *args, logs=folder / "logs", timeout=900, **options)


@pytest.fixture(scope="module")
def plain():
    """The losses of twenty steps in one process, without DeepSpeed."""
    model = load()[0].train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=0.0)
    data, losses = batches(), []

    def parts_of(batch):
        return [model(input_ids=micro, labels=micro).loss / len(batch) for micro in batch]

    untrained = sum(parts_of(data[-1])).item()
    for batch in data:
        parts = parts_of(batch)
        sum(parts).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(sum(parts).item())
    assert losses[-1] < untrained - 0.1
    return losses


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """Each stage in two precisions, and with offload: a row from each of the two ranks."""
    found = {}
    for row in run_ranks("stages.py", tmp_path_factory.mktemp("stages")).rows:
        found.setdefault(row["case"], []).append(row)
    return found


@pytest.mark.nightly  # lesson 5 does it at each commit
@pytest.mark.parametrize("stage", range(4))
def test_each_stage_learns_what_one_process_learns(stage, cases, plain):
    first, second = cases[f"{stage} float32"]
    assert first["losses"] == second["losses"]  # a mean over the ranks
    assert len(plain) == 20
    assert first["losses"] == pytest.approx(plain, abs=1e-5)


@pytest.mark.nightly  # lesson 5 does it at each commit
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stage", range(4))
def test_a_rank_keeps_what_the_formula_says(stage, dtype, cases, tiny):
    parameters = sum(p.numel() for p in tiny[0].parameters())
    expected = vars(zero_bytes(parameters, 2, stage, dtype))
    for row in cases[f"{stage} {dtype}"]:
        for kind, kept in row["kept"].items():
            bucket = BUCKET * getattr(torch, dtype).itemsize if kind == "gradients" else 0
            assert kept == pytest.approx(expected[kind], abs=0.05 * expected[kind] + bucket)


@pytest.mark.nightly  # lesson 5 does it at each commit
def test_bfloat16_learns_almost_what_float32_learns(cases, plain):
    for stage in (1, 2, 3):
        assert cases[f"{stage} bfloat16"][0]["losses"] == pytest.approx(plain[:2], abs=0.004)
    # DeepSpeed 0.19 takes a step with gradients of 0 before the first (FP16_UnfusedOptimizer), so
    # that Adam's bias correction is one step ahead.
    assert cases["0 bfloat16"][0]["losses"][1] > plain[1] + 0.0025


@pytest.mark.nightly  # lesson 5 does it at each commit
@pytest.mark.parametrize("stage", [2, 3])
def test_offload_changes_no_loss(stage, cases):
    losses = cases[f"{stage} offload"][0]["losses"]
    assert len(losses) == 8
    assert losses == pytest.approx(cases[f"{stage} float32"][0]["losses"][:8], abs=1e-6)


@pytest.fixture(scope="module")
def divided(tmp_path_factory):
    """FSDP2 on the same batches, and what an offloaded optimizer keeps; a row from each rank."""
    found = {}
    for row in run_ranks("fsdp.py", tmp_path_factory.mktemp("fsdp")).rows:
        found.setdefault(row["case"], []).append(row)
    return found


@pytest.mark.nightly  # lesson 5 does it at each commit
def test_fsdp_learns_what_zero_3_and_one_process_learn(divided, cases, plain):
    first, second = divided["FSDP2"]
    assert first["losses"] == second["losses"] and len(first["losses"]) == 20
    assert first["losses"] == pytest.approx(cases["3 float32"][0]["losses"], abs=1e-5)
    assert first["losses"] == pytest.approx(plain, abs=1e-5)
    assert divided["FSDP2 bfloat16"][0]["losses"] == pytest.approx(plain[:2], abs=0.004)


@pytest.mark.nightly  # lesson 5 does it at each commit
@pytest.mark.parametrize("case", ["FSDP2", "FSDP2 bfloat16", "FSDP2 keeping"])
def test_fsdp_keeps_and_sends_what_the_formulas_say(case, divided, tiny):
    sizes = {name: p.numel() for name, p in tiny[0].named_parameters()}
    whole, root = sum(sizes.values()), sum(n for name, n in sizes.items() if ".layers." not in name)
    width = 4 if case == "FSDP2" else 2
    # All is gathered and reduced once. The layers, not what is left, are gathered once more.
    sent = width * (2 * whole + (whole - root) * (case != "FSDP2 keeping"))
    for row in divided[case]:
        assert row["kept"] == pytest.approx(vars(fsdp_bytes(whole, 2)), rel=0.01)
        assert row["sent"] == pytest.approx([sent] * len(row["sent"]), rel=0.01)


@pytest.mark.nightly  # lesson 5 does it at each commit
def test_an_offloaded_optimizer_keeps_in_main_memory_what_the_planner_says(divided, tiny):
    parameters = sum(p.numel() for p in tiny[0].parameters())
    # beside a bucket of gradients in bfloat16 on each rank
    kept = [row["host"] - 2 * BUCKET for row in divided["offload"]]
    assert sum(kept) / parameters == pytest.approx(OPTIMIZER_STATES + HOST_GRADIENTS, abs=0.1)


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Two runs that saved after four steps and lost rank 1 after six: their folder and result."""
    folder = tmp_path_factory.mktemp("killed")
    return folder, {
        stage: run_ranks("resume.py", folder, 8, 6, folder / f"{stage}", check=False)
        for stage in (2, 3)
    }


@pytest.fixture(scope="module")
def resumed(killed):
    """The rows of both runs, resumed on two ranks up to the eighth step."""
    folder, _ = killed
    return run_ranks("resume.py", folder, 8, 0, folder / "2", folder / "3").rows


def by_step(rows, case):
    return {row["step"]: row["loss"] for row in rows if row["case"] == case}


@pytest.mark.nightly  # lesson 5 does it at each commit
@pytest.mark.parametrize("stage", [2, 3])
def test_a_run_goes_on_bit_for_bit_after_a_rank_was_killed(stage, killed, resumed, cases):
    before, after = by_step(killed[1][stage].rows, f"{stage}"), by_step(resumed, f"{stage}")
    assert "rank 1: killed by SIGKILL" in killed[1][stage].failures[0]
    assert [*before] == [*range(6)] and [*after] == [4, 5, 6, 7]
    uninterrupted = dict(enumerate(cases[f"{stage} float32"][0]["losses"][:8]))
    assert before | after == uninterrupted  # the same steps, on the same ranks: no tolerance
    assert before == {step: uninterrupted[step] for step in before}


@pytest.fixture(scope="module")
def alone(killed):
    """The rows of one rank that resumes both runs: as they are, and from universal checkpoints."""
    folder, _ = killed
    for stage in (2, 3):
        tag = (folder / f"{stage}" / "latest").read_text()
        source, target = folder / f"{stage}" / tag, folder / f"{stage}-universal" / tag
        run_module(
            "deepspeed.checkpoint.ds_to_universal",
            "--inject_missing_state",
            "--input_folder",
            source,
            "--output_folder",
            target,
        )
    folders = [folder / name for name in ("2-universal", "3-universal", "2", "3")]
    return run_ranks("resume.py", folder, 8, 0, *folders, ranks=1).rows


@pytest.mark.nightly
@pytest.mark.parametrize("stage", [2, 3])
def test_another_number_of_ranks_resumes_from_a_universal_checkpoint(stage, alone, cases):
    after = by_step(alone, f"{stage}-universal")
    assert [*after] == [4, 5, 6, 7]
    expected = cases[f"{stage} float32"][0]["losses"]
    assert [*after.values()] == pytest.approx(expected[4:8], abs=1e-5)


@pytest.mark.nightly
@pytest.mark.parametrize("stage", [2, 3])
def test_another_number_of_ranks_does_not_resume_without(stage, alone):
    (row,) = [row for row in alone if row["case"] == f"{stage}"]
    assert "used a DP world size of 2 but the current world size is 1" in row["error"]


@pytest.mark.nightly
@pytest.mark.parametrize("stage", [2, 3])
def test_the_parts_of_a_checkpoint_become_whole_weights(stage, killed, cases):
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    model = load()[0].train()
    model.load_state_dict(get_fp32_state_dict_from_zero_checkpoint(killed[0] / f"{stage}"))
    with torch.no_grad():
        losses = [model(input_ids=micro, labels=micro).loss.item() for micro in batches()[4]]
    logged = cases[f"{stage} float32"][0]["losses"]
    assert sum(losses) / 2 == pytest.approx(logged[4], abs=1e-5)
    assert abs(logged[4] - logged[3]) > 0.1


def keys(settings, section=""):
    """Each leaf of a configuration: its name and the section that it is in."""
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from keys(value, section or name)
        else:
            yield name, section


def test_the_readme_has_each_configuration_and_each_key():
    assert len(CONFIGS) >= 8
    files, table = (ROOT / "deepspeed_configs" / "README.md").read_text().split("| key |")
    listed = re.findall(r"^\| `(.+?\.json)` \|", files, re.M)
    assert sorted(listed) == [path.name for path in CONFIGS]
    rows = [row for row in table.splitlines() if row.startswith("| `")]
    named = {name.split(".")[-1] for row in rows for name in re.findall("`(.+?)`", row)}
    for path in CONFIGS:
        used = dict(keys(json.loads(path.read_text())))
        # an optimizer's own arguments are its class's: the row names the whole section
        assert {"optimizer" if used[key] == "optimizer" else key for key in used} <= named


@pytest.mark.integration
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_configuration_is_what_its_name_says(path, tiny):
    from deepspeed.runtime.config import DeepSpeedConfig
    from transformers.integrations.deepspeed import (
        HfTrainerDeepSpeedConfig,
        unset_hf_deepspeed_config,
    )

    precision = {kind: path.stem.endswith(f"_{kind}") for kind in ("fp16", "bf16")}
    args = sft_config(gradient_accumulation_steps=3, max_grad_norm=0.7, **precision)
    filled = HfTrainerDeepSpeedConfig(str(path))
    filled.trainer_config_process(args)
    filled.trainer_config_finalize(args, tiny[0], 100)
    unset_hf_deepspeed_config()
    assert "auto" not in json.dumps(filled.config)
    found = DeepSpeedConfig(filled.config)
    assert found.zero_optimization_stage == int(path.stem[len("zero")])
    assert found.float16_config.enabled == precision["fp16"]
    assert found.bfloat16_config.enabled == precision["bf16"]
    zero, offload = found.zero_config, path.stem.endswith("_offload")
    assert (zero.offload_optimizer is not None) == offload
    assert (zero.offload_param is not None) == (offload and found.zero_optimization_stage == 3)
    assert {part.device for part in (zero.offload_optimizer, zero.offload_param) if part} <= {"cpu"}
    # DeepSpeed ignores a key at the top that it does not know: each of ours has to arrive.
    assert found.train_micro_batch_size_per_gpu == args.per_device_train_batch_size
    assert found.gradient_accumulation_steps == 3 and found.gradient_clipping == 0.7
    assert found.zero_allow_untested_optimizer == (not offload)
    assert (found.optimizer_params or {}).get("lr") == (args.learning_rate if offload else None)
    assert found.steps_per_print == 10**9


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """Three steps of `tune` with each configuration that a CPU can run; a row for each."""
    lora = [f"{path}+lora" for path in ON_CPU if path.stem in ("zero2", "zero3")]
    folder = tmp_path_factory.mktemp("tuned")
    early = ON_CPU[0].with_name("zero3.json+early")
    rows = run_ranks("sft.py", folder, *ON_CPU, *lora, early).rows
    return {row["case"]: row for row in rows if row["rank"] == 0}


@pytest.mark.integration
@pytest.mark.parametrize("path", ON_CPU, ids=lambda path: path.stem)
def test_trl_learns_the_same_with_each_configuration(path, tuned):
    found, reference = tuned[path.name], tuned["zero0.json"]
    assert found["stage"] == int(path.stem[len("zero")]) and found["trained"] == 2_787_072
    assert ("cpu" in found["offload"]) == path.stem.endswith("_offload")
    assert len(reference["losses"]) == 3 and reference["losses"][0] > reference["losses"][2]
    assert found["losses"] == pytest.approx(reference["losses"], abs=1e-4)


@pytest.mark.integration
def test_a_model_is_divided_as_it_loads_if_the_configuration_is_there_first(tuned):
    late, early = tuned["zero3.json"], tuned["zero3.json+early"]
    assert (late["visible"], early["visible"]) == (2_787_072, 0)
    assert early["losses"] == pytest.approx(late["losses"], abs=1e-4)


@pytest.mark.integration
def test_trl_trains_adapters_the_same_with_zero_2_and_zero_3(tuned):
    two, three = tuned["zero2.json+lora"], tuned["zero3.json+lora"]
    assert two["trained"] == three["trained"] < 200_000
    assert (two["stage"], three["stage"]) == (2, 3)
    assert three["losses"] == pytest.approx(two["losses"], abs=1e-4)
    full = tuned["zero2.json"]["losses"]
    assert two["losses"][0] == pytest.approx(full[0], abs=1e-4)  # B is 0 as training begins
    assert two["losses"][2] != pytest.approx(full[2], abs=1e-3)


def environment():
    """That of a shell in which the course's environment is activated."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    quick = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
    return os.environ | quick | {"PATH": path, "PYTHONPATH": str(ROOT), "SFT_NO_BARS": "1"}


def run(*command, timeout=600):
    """What a command prints; neither it nor its children outlive that."""
    process = subprocess.Popen(
        list(map(str, command)),
        env=environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        printed = process.communicate(timeout=timeout)[0]
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(10)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, printed[-3000:]
    return printed


def run_module(name, *args):
    return run(sys.executable, "-m", name, *args)


def losses(printed):
    """The one row that ranks printed."""
    (row,) = [json.loads(line) for line in printed.splitlines() if line.startswith('{"losses"')]
    assert row["world"] == 2
    return row["losses"]


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """The losses of the small script under our own launch."""
    (row,) = run_ranks("launched.py", tmp_path_factory.mktemp("launched")).rows
    return row["losses"]


@pytest.mark.integration
def test_launch_runs_the_small_script(launched, plain):
    assert launched == pytest.approx(plain[:3], abs=1e-5)


@pytest.mark.integration
@pytest.mark.parametrize(
    "command",
    [
        "torchrun --nproc_per_node 2 --master_port",
        pytest.param(  # of a CPU, too; it adds --local_rank to arguments
            "deepspeed --num_gpus 2 --master_port", marks=pytest.mark.nightly
        ),
    ],
    ids=lambda command: command.split()[0],
)
def test_each_launcher_gives_the_losses_of_launch(command, launched, free_port):
    assert losses(run(*command.split(), free_port, RANKS / "launched.py")) == launched


@pytest.mark.nightly
def test_accelerate_gives_the_losses_of_launch(launched, free_port, tmp_path):
    settings = {  # on the command line --use_deepspeed and --cpu exclude each other
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "DEEPSPEED",
        "use_cpu": True,
        "num_machines": 1,
        "num_processes": 2,
        "machine_rank": 0,
        "main_process_port": free_port,
        "deepspeed_config": {"deepspeed_config_file": str(CONFIGS[0]), "zero3_init_flag": False},
    }
    file = tmp_path / "accelerate.json"
    file.write_text(json.dumps(settings))
    printed = run("accelerate", "launch", "--config_file", file, RANKS / "launched.py")
    assert losses(printed) == launched


@pytest.fixture(scope="module")
def namespaces():
    """Skips where two nodes cannot be made."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("two nodes need root and the command ip (package iproute2)")
    name = f"sft{os.getpid()}-probe"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "del", name], capture_output=True)
    if made.returncode:
        pytest.skip(f"no network namespaces here: {made.stderr.strip()}")


def left_over(process):
    """The namespaces that two_nodes.sh has made and not removed."""
    found = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    return re.findall(rf"^sft{process.pid}-\d", found, re.M)


@pytest.fixture
def two_nodes(namespaces):
    """Starts the script; a test that fails leaves nothing behind."""
    started = []

    def start(*command):
        # a shell's background ignores SIGINT, and nohup SIGHUP
        command = ["env", "--default-signal=INT,HUP", TWO_NODES, *command]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        process.terminate()
        process.communicate()


@pytest.mark.nightly
def test_two_nodes_see_each_other_and_vanish(two_nodes):
    script = 'echo "$NODE_RANK $MASTER_ADDR $MASTER_PORT"; ip -br addr show $GLOO_SOCKET_IFNAME'
    process = two_nodes("sh", "-c", script)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and not left_over(process)
    for rank in (0, 1):
        assert f"{rank} 10.77.0.1 29500" in printed and f"10.77.0.{rank + 1}/24" in printed


@pytest.mark.nightly
@pytest.mark.parametrize("failing", [0, 1])
def test_one_node_that_fails_ends_both(failing, two_nodes):
    process = two_nodes("sh", "-c", f"[ $NODE_RANK = {failing} ] && exit 7; sleep 99")
    process.communicate(timeout=120)
    assert process.returncode == 7 and not left_over(process)


@pytest.mark.nightly
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_two_nodes_vanish_when_interrupted(number, two_nodes):
    process = two_nodes("sh", "-c", "trap '' TERM; echo ready; while :; do sleep 1; done")
    assert [process.stdout.readline() for _ in (0, 1)] == ["ready\n"] * 2
    assert len(left_over(process)) == 2
    process.send_signal(number)
    process.communicate(timeout=120)
    assert process.returncode == 128 + number and not left_over(process)


@pytest.mark.nightly
def test_torchrun_on_two_nodes_gives_the_losses_of_launch(namespaces, launched):
    command = (
        "torchrun --nnodes 2 --node_rank $NODE_RANK --nproc_per_node 1 "
        f"--master_addr $MASTER_ADDR --master_port $MASTER_PORT {RANKS}/launched.py"
    )
    assert losses(run(TWO_NODES, "sh", "-c", command)) == launched


@pytest.mark.nightly
def test_deepspeed_on_two_nodes_gives_the_losses_of_launch(namespaces, launched, tmp_path):
    hosts = tmp_path / "hosts"
    hosts.write_text("10.77.0.1 slots=1\n10.77.0.2 slots=1\n")
    command = (
        f"deepspeed --hostfile {shlex.quote(str(hosts))} --no_ssh --node_rank $NODE_RANK "
        f"--master_addr $MASTER_ADDR --master_port $MASTER_PORT {RANKS}/launched.py"
    )
    assert losses(run(TWO_NODES, "sh", "-c", command)) == launched


SCALER = """
import os
os.environ["DS_ACCELERATOR"] = "cpu"
from sftlib.patches import without_builds
without_builds()
import torch
from deepspeed.runtime.fp16 import loss_scaler
from deepspeed.utils.logging import set_log_level_from_string
loss_scaler.dist.get_rank = lambda: 0
scaler = loss_scaler.DynamicLossScaler(4, 1000, 1, 1, True, dtype=torch.half)
scaler.update_scale(True)
print("halved to", scaler.cur_scale, flush=True)
set_log_level_from_string("info")  # what "log_level" in the file does
scaler.update_scale(True)
scaler.update_scale(True)
"""


@pytest.mark.integration
def test_an_overflow_is_told_at_level_info_and_ends_the_run_at_the_smallest_scale():
    done = subprocess.run([sys.executable, "-c", SCALER], capture_output=True, text=True, cwd=ROOT)
    said = done.stdout + done.stderr
    assert "halved to 2" in said and "Current loss scale already at minimum" in done.stderr
    assert said.count("OVERFLOW! Rank 0 Skipping step.") == 1, said
