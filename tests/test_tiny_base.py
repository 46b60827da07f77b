"""The shipped facts, splits, tokenizer and model are what tools/tiny_base makes, and are sound."""

import importlib
import json
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

from sftlib.data import read_facts

import pytest

ROOT = Path(__file__).parents[1]
DATA = ROOT / "data"
TINY_BASE = DATA / "tiny-base"
TESTS = ("dev", "heldout", "heldout_wordings", "unknown", "never_asked")

# Checked by hand against what reference works say: capitals that moved or were renamed, names
# with accents or articles, changed currencies, two-letter symbols, irregular plurals.
HAND_CHECKED = """
Kazakhstan|capital|Astana
Burundi|capital|Gitega
Tanzania|capital|Dodoma
Ivory Coast|capital|Yamoussoukro
Nigeria|capital|Abuja
Myanmar|capital|Naypyidaw
Palau|capital|Ngerulmud
Benin|capital|Porto-Novo
Belize|capital|Belmopan
Australia|capital|Canberra
Canada|capital|Ottawa
Turkey|capital|Ankara
Brazil|capital|Brasília
Colombia|capital|Bogotá
Cameroon|capital|Yaoundé
Togo|capital|Lomé
Paraguay|capital|Asunción
Costa Rica|capital|San José
the Maldives|capital|Malé
the Netherlands|capital|Amsterdam
the Philippines|capital|Manila
the United Kingdom|capital|London
Ukraine|capital|Kyiv
North Macedonia|capital|Skopje
Croatia|currency|euro
Bulgaria|currency|euro
Lithuania|currency|euro
Switzerland|currency|franc
Japan|currency|yen
China|currency|yuan
Qatar|currency|riyal
Oman|currency|rial
Iceland|currency|króna
Sweden|currency|krona
Norway|currency|krone
Czechia|currency|koruna
Mexico|currency|peso
Brazil|official language|Portuguese
Angola|official language|Portuguese
Austria|official language|German
Iran|official language|Persian
Suriname|official language|Dutch
Moldova|official language|Romanian
Kenya|calling code|254
Germany|calling code|49
Malta|calling code|356
Egypt|calling code|20
Iceland|continent|Europe
Mexico|continent|North America
Sudan|continent|Africa
Nepal|continent|Asia
Samoa|continent|Oceania
Guyana|continent|South America
the United Kingdom|internet domain|uk
Switzerland|internet domain|ch
iron|symbol|Fe
sodium|symbol|Na
tungsten|symbol|W
mercury|symbol|Hg
oganesson|symbol|Og
lead|symbol|Pb
gold|atomic number|79
carbon|atomic number|6
uranium|atomic number|92
tennessine|atomic number|117
thief|plural|thieves
roof|plural|roofs
ox|plural|oxen
potato|plural|potatoes
piano|plural|pianos
crisis|plural|crises
child|plural|children
monkey|plural|monkeys
maximum|opposite|minimum
optimist|opposite|pessimist
import|opposite|export
"""
LEFT_OUT = """
Israel|capital
South Africa|capital
Bolivia|capital
Sri Lanka|capital
Turkey|continent
Russia|continent
Cyprus|continent
Mali|official language
Burkina Faso|official language
Niger|official language
Iraq|official language
Zimbabwe|currency
Canada|calling code
Kazakhstan|calling code
"""
NAMES = {"official language": "language", "internet domain": "domain"}


@pytest.fixture(scope="module")
def build():
    """The modules of tools/tiny_base, by name."""
    names = ("build", "card", "corpus", "echoes", "facts", "pretrain", "relations")
    names += ("splits", "tokenizer", "words")
    return {name: importlib.import_module(f"tools.tiny_base.{name}") for name in names}


@pytest.fixture(scope="module")
def known(build):
    return {(f.entity, f.relation): f.value for f in build["facts"].facts()}


@pytest.fixture(scope="module")
def part(build):
    return build["splits"].entities_by_part(build["corpus"].template_words())


@pytest.fixture(scope="module")
def corpus_text(build, part):
    documents, held_out = build["corpus"].corpus(part)
    return "\n".join(documents + held_out).lower()


def lines(text):
    return [line.split("|") for line in text.split("\n") if line]


@pytest.mark.parametrize(("entity", "relation", "value"), lines(HAND_CHECKED))
def test_a_hand_checked_fact_is_right(known, entity, relation, value):
    assert known[entity, NAMES.get(relation, relation)] == value


@pytest.mark.parametrize(("entity", "relation"), lines(LEFT_OUT))
def test_a_disputed_fact_is_left_out(known, entity, relation):
    assert (entity, NAMES.get(relation, relation)) not in known


def test_facts_are_well_formed(build):
    facts = build["facts"].facts()
    assert len({(f.entity, f.relation) for f in facts}) == len(facts), "two values for one fact"
    kinds = {}
    for fact in facts:
        assert kinds.setdefault(fact.entity, fact.kind) == fact.kind, f"{fact.entity}: two kinds"
        assert fact.value == fact.value.strip() and fact.value
        assert not re.search(r"[,;/()]|\s\s", fact.entity + fact.value), fact
    assert len({e for e, k in kinds.items() if k == "element"}) == 118
    assert len({e for e, k in kinds.items() if k == "country"}) > 170


def test_no_word_has_two_opposites(build):
    words = [word for pair in build["words"].OPPOSITES.items() for word in pair]
    assert len(words) == len(set(words))


@pytest.mark.parametrize("name", TESTS)
def test_a_test_set_is_large_enough_and_has_no_duplicates(name):
    rows = read_facts(name)
    questions = [row["messages"][0]["content"] for row in rows]
    assert len(rows) >= 150
    assert len(set(questions)) == len(questions)


@pytest.mark.parametrize("name", TESTS)
def test_no_tested_entity_occurs_in_the_sft_data(name):
    taught = "\n".join(m["content"] for row in read_facts("sft") for m in row["messages"]).lower()
    for row in read_facts(name):
        entity = row["entity"].lower().removeprefix("the ")
        if entity in taught:  # as part of a longer word it may be
            assert not re.search(rf"(?<!\w){re.escape(entity)}(?!\w)", taught), row["entity"]


def test_every_file_of_data_has_its_source_and_licence():
    table = (ROOT / "data" / "README.md").read_text(encoding="utf-8")
    rows = [line.split("|") for line in table.splitlines() if line.startswith("| `")]
    named = {row[1].strip(" `/") for row in rows}
    assert all(len(row) == 6 and row[3].strip() and row[4].strip() for row in rows)
    files = [p.relative_to(ROOT / "data") for p in (ROOT / "data").rglob("*") if p.is_file()]
    for path in files:
        hidden = any(part.startswith(".") for part in path.parts)  # .DS_Store, .ipynb_checkpoints
        if path.parts[0] not in ("build", "README.md") and not hidden:
            assert str(path) in named or path.parts[0] in named, path


def test_parts_share_no_entity():
    entities = {name: {row["entity"] for row in read_facts(name)} for name in ("sft", *TESTS)}
    assert entities["heldout"] == entities["heldout_wordings"]
    for a, b in (("sft", "dev"), ("sft", "heldout"), ("dev", "heldout"), ("dev", "unknown")):
        assert not entities[a] & entities[b], (a, b)


@pytest.mark.integration
def test_no_unknown_entity_occurs_in_the_corpus(build, part, corpus_text):
    unknown = [entity for entity, p in part.items() if p == "unknown"]
    assert {row["entity"] for row in read_facts("unknown")} <= set(unknown)
    words = build["splits"].words
    read = words(corpus_text)
    for entity in unknown:
        assert not (words(entity) - {"the"}) & read, entity


def test_an_unknown_answer_cannot_be_guessed(known):
    for row in read_facts("unknown"):
        values = [v for (_, r), v in known.items() if r == row["relation"]]
        assert values.count(row["value"]) / len(values) <= 0.02, row
        assert row["value"].lower() not in row["entity"].lower()


@pytest.mark.integration
def test_unseen_wordings_are_neither_in_the_sft_data_nor_in_the_corpus(build, corpus_text):
    asked = {row["messages"][0]["content"] for row in read_facts("sft")}
    for relation, entry in build["relations"].RELATIONS.items():
        if not entry.asked:
            continue
        for template in build["relations"].questions(relation, unseen=True):
            head = template.split("{e}")[0].lower()
            assert not any(q.lower().startswith(head) for q in asked), template
            assert head not in corpus_text, template


@pytest.mark.integration
def test_the_corpus_holds_no_control_token_and_no_sft_question(build, corpus_text):
    for token in (*build["tokenizer"].CONTROL_TOKENS, *build["tokenizer"].TAGS):
        assert token not in corpus_text
    sentences = set(re.split(r"(?<=[.?!])\s+(?:[->] )?", corpus_text))
    assert not sentences & {row["messages"][0]["content"].lower() for row in read_facts("sft")}


def test_a_record_about_a_fact_names_nothing_real_and_no_note_asks_about_one(build, part):
    """ "The capital of Kenya is Panji." in a record would contradict a fact."""
    echoes = build["echoes"]
    nouns = "|".join(echoes.relation_nouns())
    named = re.compile(rf"\b(?:{nouns}) of ([^.,:\n=]+?)(?: (?:and|is|was)\b|[.,:\n=])")
    real = {entity.lower() for entity in part}
    names = echoes.names_for(part, random.Random(5))
    for _ in range(2000):
        record = echoes.note(names, echoes.RECORDS, of_facts=True)
        assert not real & {name.strip().lower() for name in named.findall(record)}, record
        assert "?" not in record + echoes.note(names, echoes.ECHOES, of_facts=True)


def test_a_made_up_name_is_nobodys_and_holds_no_word_of_an_unknown_entity(build, part):
    names = build["echoes"].names_for(part, random.Random(1))
    made = [names.made_up() for _ in range(3000)]
    real = {entity.lower() for entity in part}
    assert not real & {name.lower() for name in made}
    words = build["splits"].words
    unknown = set().union(*(words(e) for e, p in part.items() if p == "unknown")) - {"the"}
    assert not any(words(name) & unknown for name in made)
    assert len(set(made)) > 2900, "names come again and again: nothing to copy piece by piece"


def test_each_template_repeats_what_it_names(build):
    echoes = build["echoes"]
    for template in (*echoes.ECHOES, *echoes.RECORDS):
        assert any(template.count(f"{{{slot}}}") >= 2 for slot in "abcdvw"), template


@pytest.mark.parametrize("before", [" ", ' "', "\n", '{"entity": "', " ("])
def test_a_name_has_the_same_tokens_wherever_it_stands(before, part, tokenizer):
    for entity in (entity for entity, label in part.items() if label != "train"):
        name = entity.removeprefix("the ")  # the article is a common word
        ids = tokenizer(name)["input_ids"]
        in_place = tokenizer(f"of{before}{name}\n")["input_ids"]
        assert any(in_place[i : i + len(ids)] == ids for i in range(len(in_place))), name


@pytest.mark.parametrize("name", ["tool_call", "tool_response", "think"])
@pytest.mark.parametrize("slash", ["", "/"])
def test_each_token_for_tools_and_thinking_is_one(slash, name, tokenizer):
    token = f"<{slash}{name}>"
    assert tokenizer(f"a{token}b")["input_ids"][1:-1] == [tokenizer.convert_tokens_to_ids(token)]
    assert tokenizer.decode(tokenizer(token)["input_ids"], skip_special_tokens=True) == token


def test_llama_cpp_knows_how_the_tokenizer_cuts_texts():
    from sftlib.deploy import export

    assert export.pre_tokenizer(TINY_BASE) == "smollm"


@pytest.mark.integration
def test_the_shipped_sets_and_the_tokenizer_are_what_the_build_makes(tmp_path):
    command = [sys.executable, "-m", "tools.tiny_base.build", "--facts", "--out", tmp_path]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=300)
    made = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.is_file())
    assert {p.parent.name for p in made} == {"facts", "tiny-base"}
    for path in made:
        assert (DATA / path).read_bytes() == (tmp_path / path).read_bytes(), path
    shipped = {p.name for p in (DATA / "facts").iterdir()}
    assert shipped == {p.name for p in (tmp_path / "facts").iterdir()}


@pytest.mark.nightly
def test_a_few_steps_of_the_build_lower_the_loss(build, part, tokenizer):
    import torch

    pretrain = build["pretrain"]
    documents, _ = build["corpus"].corpus(part)
    rows = pretrain.pack(tokenizer, documents[:3000])[: 12 * pretrain.ROWS]
    torch.manual_seed(0)
    losses = [loss for _, loss in pretrain.pretrain(pretrain.new_model(tokenizer), rows)]
    assert losses[0] == pytest.approx(7.62, abs=0.3), "ln(2048) = 7.62 nats for a blind guess"
    assert losses[-1] < losses[0] - 0.5


def types_in(run):
    """The types of the floating-point tensors that are computed while `run` runs."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Types(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.is_floating_point():
                found.add(out.dtype)
            return out

    found = set()
    with Types():
        run()
    return found


def test_torchs_muon_still_orthogonalizes_in_bfloat16():
    """If this fails after an upgrade: see whether `_Float32` in pretrain.py is still needed."""
    import torch

    weight = torch.nn.Parameter(torch.eye(2))
    weight.grad = torch.eye(2)
    assert torch.bfloat16 in types_in(torch.optim.Muon([weight]).step)


def test_pretraining_computes_in_float32_alone(build):
    import torch
    from transformers import AutoTokenizer

    pretrain = build["pretrain"]
    model = pretrain.new_model(AutoTokenizer.from_pretrained(TINY_BASE))
    steps = pretrain.pretrain(model, torch.ones(pretrain.ROWS, 4, dtype=torch.long))
    assert types_in(lambda: next(steps)) == {torch.float32}


@pytest.mark.parametrize("shape", [(3, 5), (5, 3)])
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_in_float32_takes_the_step_that_its_formula_says(build, shape, nesterov):
    import torch

    torch.manual_seed(0)
    weight, grad = torch.nn.Parameter(torch.randn(shape)), torch.randn(shape)
    before, weight.grad = weight.detach().double(), grad.clone()
    optimizer = torch.optim.Muon([weight], lr=0.1, weight_decay=0, momentum=0.9, nesterov=nesterov)
    with build["pretrain"]._Float32():
        optimizer.step()
    momentum = 0.1 * grad.double()
    x = 0.1 * grad.double() + 0.9 * momentum if nesterov else momentum
    x = x / x.norm()
    for _ in range(5):  # Newton-Schulz, with the coefficients of Jordan et al. 2024
        x = 3.4445 * x - 4.7750 * x @ x.T @ x + 2.0315 * x @ x.T @ x @ x.T @ x
    expected = before - 0.1 * max(1, shape[0] / shape[1]) ** 0.5 * x
    assert torch.allclose(weight.double(), expected, atol=1e-6)
    assert torch.allclose(optimizer.state[weight]["momentum_buffer"], momentum.float(), atol=1e-7)


def test_the_shipped_model_is_small_and_safe():
    from safetensors import safe_open

    files = {p.name for p in TINY_BASE.iterdir()}
    assert sum(p.stat().st_size for p in TINY_BASE.glob("*.safetensors")) <= 8_000_000
    assert not [f for f in files if f.endswith((".bin", ".pt", ".pkl", ".py"))]
    with safe_open(TINY_BASE / "model.safetensors", "pt") as weights:
        assert {weights.get_slice(k).get_dtype() for k in weights.keys()} == {"BF16"}  # noqa: SIM118
    log = json.loads((TINY_BASE / "training.json").read_text())
    assert log["cloze_dev"] >= 0.95 and log["cloze_heldout"] >= 0.95


def test_the_card_is_what_the_build_writes(build, tmp_path):
    shutil.copy(TINY_BASE / "training.json", tmp_path)
    log = json.loads((TINY_BASE / "training.json").read_text())
    shown = build["build"].samples()
    build["card"].write_card(tmp_path, build["build"].known_entities(), shown)
    card = (TINY_BASE / "README.md").read_text(encoding="utf-8")
    assert card == (tmp_path / "README.md").read_text(encoding="utf-8")
    assert f"{log['cloze_heldout']:.1%}" in card and f"{log['steps']:,} steps" in card
    assert set(shown) == {"prose", "echoes", "records"}
    for notes in shown.values():
        assert len(notes) == 4 and all(note.splitlines()[0] in card for note in notes)


@pytest.mark.integration
def test_the_base_answers_no_question_and_learns_to_in_thirty_steps():
    from sftlib.evaluate import answers, exact_match, stops
    from sftlib.models import load
    from sftlib.training import tune

    model, tokenizer = load()
    rows = {name: read_facts(name) for name in ("dev", "unknown")}
    asked = {name: [row["messages"][:1] for row in rows[name]] for name in rows}
    before = answers(model, tokenizer, asked["dev"])
    assert exact_match(before, rows["dev"]) <= 0.01 and stops(before) <= 0.01
    tune(model, tokenizer, read_facts("sft")[:480], per_device_train_batch_size=16)
    given = {name: answers(model, tokenizer, asked[name]) for name in rows}
    assert exact_match(given["dev"], rows["dev"]) >= 0.95
    assert exact_match(given["unknown"], rows["unknown"]) <= 0.02
    named = [
        row["entity"] in a.text for row, a in zip(rows["unknown"], given["unknown"], strict=True)
    ]
    assert sum(named) >= 0.9 * len(named)
