"""Train with FSDP2 and with ZeRO-3 offload; print losses, bytes kept and bytes sent."""

import gc
import json

from sftlib.models import load
from sftlib.scale.measure import sent_bytes, tracked_fsdp_bytes

import torch
from common import data, rank, start, train, world
from torch import distributed
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard


def fsdp(case, steps, dtype=None, **settings):
    model = load()[0].train()
    policy = MixedPrecisionPolicy(param_dtype=dtype)
    for part in (*model.model.layers, model):
        fully_shard(part, mp_policy=policy, **settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=0.0)
    row = {"case": case, "losses": [], "sent": []}
    for step in range(steps):
        total = torch.zeros((), dtype=torch.float64)
        for micro in data[step]:
            mine = micro.chunk(world)[rank]
            with sent_bytes() as sent:
                loss = model(input_ids=mine, labels=mine).loss
                (loss / len(data[step])).backward()
            row["sent"].append(sum(sent.values()))
            total += loss.detach().double() / len(data[step]) / world
        if step == 1:
            row["kept"] = vars(tracked_fsdp_bytes(model, optimizer))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        distributed.all_reduce(total)
        row["losses"].append(total.item())
    print(json.dumps(row))


def alive():
    """Bytes of all tensors of this process."""
    gc.collect()
    found = [one for one in gc.get_objects() if type(one) in (torch.Tensor, torch.nn.Parameter)]
    return sum(
        {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in found}.values()
    )


def offload():
    """What a rank keeps of stage 3 with the optimizer offloaded, weights aside."""
    before, kept = alive(), []
    engine = start(3, dtype="bfloat16", offload_optimizer={"device": "cpu"})
    list(train(engine, range(2), lambda step: kept.append(alive() - before)))
    weights = sum(p.ds_tensor.nbytes for p in engine.module.parameters())
    print(json.dumps({"case": "offload", "host": max(kept) - weights}))
    engine.destroy()


fsdp("FSDP2", 20)
fsdp("FSDP2 bfloat16", 2, torch.bfloat16)
fsdp("FSDP2 keeping", 2, torch.bfloat16, reshard_after_forward=False)
offload()
