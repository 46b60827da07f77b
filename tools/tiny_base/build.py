"""Build the facts of `data/facts` and all of `data/tiny-base` from pinned open packages.

    make tiny-base          # all of it, in about twenty minutes on two cores
    python -m tools.tiny_base.build --facts     # the test sets and the tokenizer alone, in seconds

The seed is fixed: facts, splits and tokenizer come out byte for byte the same everywhere; the
weights do on the same machine with the same number of threads.
"""

import argparse
import json
import os
import platform
import random
import resource
import time
from collections import Counter
from functools import cache
from pathlib import Path

from sftlib.data import read_jsonl, write_jsonl
from sftlib.evaluate import cloze, perplexity

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from tools.tiny_base.card import write_card
from tools.tiny_base.corpus import corpus, prose, template_words
from tools.tiny_base.echoes import ECHOES, RECORDS, names_for, note
from tools.tiny_base.facts import facts
from tools.tiny_base.pretrain import LENGTH, ROWS, new_model, pack, pretrain
from tools.tiny_base.splits import entities_by_part, splits
from tools.tiny_base.tokenizer import train_tokenizer

DATA = Path(__file__).parents[2] / "data"
SEED = 0
SAMPLES = 4  # notes of each kind on the card


@cache
def parts() -> dict[str, str]:
    """Each entity's part."""
    return entities_by_part(template_words())


def build_facts(folder: Path) -> tuple[list[str], list[str]]:
    """Write the SFT data and the test sets; return the corpus and its held-out notes."""
    part = parts()
    documents, held_out = corpus(part)
    folder.mkdir(parents=True, exist_ok=True)
    sets = splits(part) | {"prose": [{"text": text} for text in held_out]}
    for name, rows in sets.items():
        write_jsonl(folder / f"{name}.jsonl", rows)
    return documents, held_out


def build_tokenizer(folder: Path, documents: list[str]) -> PreTrainedTokenizerFast:
    """Train the tokenizer on the corpus and save it."""
    tested = [entity.removeprefix("the ") for entity, label in parts().items() if label != "train"]
    tokenizer = train_tokenizer(documents, tested)
    tokenizer.save_pretrained(folder)
    return tokenizer


def build_model(folder: Path, tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> dict:
    """Pretrain the model, save it as bfloat16 safetensors and return what it took."""
    torch.manual_seed(SEED)
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    model, rows = new_model(tokenizer), pack(tokenizer, documents)
    steps = len(rows) // ROWS
    wall, cpu = time.time(), time.process_time()
    bar = tqdm(pretrain(model, rows), total=steps, unit="step", mininterval=10)
    for _, loss in bar:
        bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # it is saved for its owner alone
    return {
        "parameters": model.num_parameters(),
        "layers": model.config.num_hidden_layers,
        "vocabulary": model.config.vocab_size,
        "tokens": steps * ROWS * LENGTH,
        "steps": steps,
        "loss": round(loss, 3),
        "wall_seconds": round(time.time() - wall),
        "cpu_seconds": round(time.process_time() - cpu),
        "threads": torch.get_num_threads(),
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "machine": f"{platform.system()} {platform.machine()}, torch {torch.__version__}",
    }


def measure(folder: Path, tokenizer: PreTrainedTokenizerFast, sets: Path) -> dict:
    """What the saved base model knows, in its own terms."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rows = {name: read_jsonl(sets / f"{name}.jsonl") for name in ("sft", "dev", "heldout", "prose")}
    return {
        "cloze_dev": cloze(model, tokenizer, rows["dev"], rows["sft"]),
        "cloze_heldout": cloze(model, tokenizer, rows["heldout"], rows["sft"]),
        "prose_perplexity": perplexity(model, tokenizer, [r["text"] for r in rows["prose"]]),
    }


def known_entities() -> dict[str, int]:
    """How many entities of each kind the corpus tells about, by plural name of the kind."""
    names = {"country": "countries", "element": "elements"}
    part = parts()
    known = {(f.kind, f.entity) for f in facts() if part[f.entity] != "unknown"}
    counts = Counter(kind for kind, _ in known)
    return {names.get(kind, kind + "s"): count for kind, count in counts.items()}


def samples() -> dict[str, list[str]]:
    """Some notes of each kind that the corpus holds, for the card; drawn as those of the corpus."""
    part, rng = parts(), random.Random(SEED)
    names = names_for(part, rng)
    return {
        "prose": rng.sample(list(prose(part, rng, rounds=1)), SAMPLES),
        "echoes": [note(names, ECHOES, of_facts=n % 2 == 0) for n in range(SAMPLES)],
        "records": [note(names, RECORDS, of_facts=n % 2 == 0) for n in range(SAMPLES)],
    }


def main() -> None:
    """Build into `data`, or into another folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=DATA, help="folder to build into")
    parser.add_argument("--facts", action="store_true", help="leave the weights as they are")
    args = parser.parse_args()
    sets, base = args.out / "facts", args.out / "tiny-base"
    documents, _ = build_facts(sets)
    tokenizer = build_tokenizer(base, documents)
    if args.facts:
        return
    log = build_model(base, tokenizer, documents) | measure(base, tokenizer, sets)
    (base / "training.json").write_text(json.dumps(log, indent=2) + "\n", encoding="utf-8")
    write_card(base, known_entities(), samples())
    print(json.dumps(log, indent=2))


if __name__ == "__main__":
    main()
