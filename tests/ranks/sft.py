"""Three steps of TRL's trainer with each of the configurations named.

`+lora` trains adapters; with `+early` the configuration is there before the model is loaded.
"""

import gc
import json
import sys
from pathlib import Path

from sftlib.data import read_facts
from sftlib.models import load
from sftlib.training import config as sft_config
from sftlib.training import tune

from accelerate.state import AcceleratorState
from datasets import Dataset
from peft import LoraConfig
from transformers import set_seed
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

rows = Dataset.from_list([{"messages": row["messages"]} for row in read_facts("sft")[:48]])
lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
for argument in sys.argv[1:]:
    path, _, special = argument.partition("+")
    config = json.loads(Path(path).read_text())
    if "optimizer" in config:  # else DeepSpeed compiles its own for two minutes
        config["optimizer"]["params"]["torch_adam"] = True
        path = config
    set_seed(0)
    settings = {"deepspeed": path, "max_steps": 3, "per_device_train_batch_size": 4}
    args = sft_config(**settings) if special == "early" else None
    model, tokenizer = load()
    visible = sum(p.numel() for p in model.parameters())
    trainer = tune(model, tokenizer, rows, lora if special == "lora" else None, **settings)
    engine = trainer.model_wrapped
    line = {
        "case": Path(argument).name,
        "losses": [log["loss"] for log in trainer.state.log_history if "loss" in log],
        "visible": visible,
        "stage": engine.zero_optimization_stage(),
        "trained": sum(
            getattr(p, "ds_numel", p.numel()) for p in trainer.model.parameters() if p.requires_grad
        ),
        "offload": str(engine.zero_offload_optimizer() and engine.zero_offload_optimizer().device),
    }
    print(json.dumps(line))
    engine.destroy()
    del trainer, engine, args
    gc.collect()
    unset_hf_deepspeed_config()
    AcceleratorState._reset_state(reset_partial_state=False)  # another configuration may come
