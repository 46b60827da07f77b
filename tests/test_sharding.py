"""What is measured on ranks: bytes that collectives send, bytes kept, seconds by repetition."""

import json

from sftlib.experiments import sharding
from sftlib.models import load
from sftlib.scale.measure import sent_bytes, tracked_fsdp_bytes
from sftlib.scale.memory import Bytes, fsdp_bytes

import pytest
import torch
from torch import distributed


@pytest.fixture
def alone(tmp_path):
    """A process group of this process alone."""
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def test_each_collective_is_counted_by_the_tensor_that_it_moves(alone):
    whole, part = torch.ones(10), torch.ones(10)
    with sent_bytes() as sent:
        distributed.all_reduce(whole)
        distributed.all_reduce(whole)
        distributed.all_gather_into_tensor(whole, part)
        distributed.reduce_scatter_tensor(part, whole)
        distributed.reduce(whole, 0)
        distributed.barrier()
    assert sent == {
        "allreduce_": 2 * 2 * 40,
        "_allgather_base_": 40,
        "_reduce_scatter_base_": 40,
        "reduce_": 40,
    }


def test_what_is_sent_outside_of_the_block_is_not_counted(alone):
    distributed.all_reduce(torch.ones(3))
    with sent_bytes() as sent:
        torch.ones(3) + 1
    distributed.all_reduce(torch.ones(3))
    assert sent == {}


def test_fsdp_keeps_what_adam_keeps_in_float32_divided_by_the_ranks():
    assert vars(fsdp_bytes(1000, 4)) == {"weights": 1000, "gradients": 1000, "optimizer": 2000}
    assert fsdp_bytes(10, 3).weights == 14  # rounded up
    for wrong in ({"parameters": -1, "world_size": 2}, {"parameters": 1, "world_size": 0}):
        with pytest.raises(ValueError, match="found world_size"):
            fsdp_bytes(**wrong)


def test_without_ranks_the_tracked_bytes_are_those_of_all_tensors():
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(3)).sum().backward()
    assert vars(tracked_fsdp_bytes(model, optimizer)) == {
        "weights": 32,
        "gradients": 32,
        "optimizer": 0,
    }
    optimizer.step()
    assert tracked_fsdp_bytes(model, optimizer).optimizer == 2 * 32 + 2 * 4  # and two step counts


def test_batches_are_blocks_of_prose_in_order(tiny):
    first, later = (sharding.batches(tiny[1], 3, skip) for skip in (0, 2))
    assert first.shape == (3, 2, 2, 16)
    assert torch.equal(first[2], later[0]) and not torch.equal(first[0], first[1])


def test_a_repetition_is_as_slow_as_its_slower_rank():
    rows = [
        {"case": "a", "rank": rank, "seconds": seconds}
        for rank, repetitions in enumerate(
            [[[1, 9, 2, 2, 2], [5, 6, 7, 8, 9]], [[3, 3, 3, 3, 3], [9, 4, 9, 9, 9]]]
        )
        for seconds in repetitions
    ]
    rows += [{"case": "b", "rank": 0, "seconds": [7]}, {"case": "c", "rank": 0, "error": ""}]
    assert sharding.seconds_per_step(rows, "a").values == (3, 5)  # the fastest steps: 1, 5; 3, 4


def test_repetitions_that_timed_more_steps_are_not_compared_with_those_that_timed_fewer():
    rows = [{"case": "a", "rank": 0, "seconds": [1.0] * count} for count in (17, 5)]
    with pytest.raises(ValueError, match="Expected 5 timed steps .* found 17"):
        sharding.seconds_per_step(rows, "a")


@pytest.mark.parametrize("steps, timed", [(20, 5), (8, 5), (7, 4), (2, 0)])
def test_each_run_times_the_same_steps_after_the_same_warm_up(alone, capsys, steps, timed):
    data = torch.ones(steps, 1, 1, 1)
    sharding.measure("a", data, torch.sum, lambda last: None, lambda: Bytes(1, 2, 3))
    row = json.loads(capsys.readouterr().out)
    assert len(row["seconds"]) == timed and len(row["losses"]) == steps


def test_the_rate_of_a_repetition_is_that_of_rank_0s_fastest_all_reduce():
    rows = [
        {"case": "all-reduce", "rank": rank, "rates": [rank + rate, 3]}
        for rate in (1, 5)
        for rank in (1, 0)
    ]
    assert sharding.bytes_per_second(rows).values == (3, 5)


def test_one_process_clips_each_gradient_at_one():
    """Which `check_launch` asks of two ranks."""
    model, tokenizer = load()
    data = sharding.batches(tokenizer, 3)
    chance = torch.Generator().manual_seed(0)
    data[1] = torch.randint(len(tokenizer), data[1].shape, generator=chance)  # a large gradient
    found = sharding.one_process(model, data)
    model = load()[0]
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=0.0)
    norms = []
    for step, batch in enumerate(data):
        loss = torch.stack([model(input_ids=rows, labels=rows).loss for rows in batch]).mean()
        assert found[step] == pytest.approx(loss.item(), abs=1e-5)  # which the order of sums costs
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        optimizer.step()
        optimizer.zero_grad()
    assert min(norms) > 1 and max(norms) > 3 * min(norms)  # so the limit changes the weights
