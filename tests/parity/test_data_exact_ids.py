"""Records rendered with published vocabularies and templates: ids, mask, BOS and end by exact ids."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers import Tokenizer

from ollatune.data.position import Position, Record
from ollatune.data.records import RecordReader
from ollatune.data.render import Renderer
from ollatune.gguf.tokenizer import GGUFTokenizer
from ollatune.templates import Message
from tests.assets import hf_tokenizer_dir
from tests.parity.test_template_parity import by_transformers, template_of
from tests.vocab_metadata import vocab_metadata

# family: (vocabulary, id of BOS if the model is served with one, id that ends an answer)
FAMILIES = {
    "llama3.2": ("llama3_2", 128000, 128009),
    "qwen2.5": ("qwen2_5", None, 151645),
    "gemma3": ("gemma3", 2, 106),
}
QUESTIONS_AND_ANSWERS = [
    ("One?", "1"),
    ("Zwei? Größe “x” – 3,5 %", "Ja: {{ braces }} and {% tags %}\n\n  indented"),
    ("日本語で 🚀 please", "はい、どうぞ。 12345 apples"),
    ("{'a': [1, 2]}", "if (a < b) { return &c; }\t// end"),
]


@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("family", FAMILIES)
def test_ids_mask_bos_and_end_are_those_of_the_reference(family: str, system: str | None) -> None:
    vocabulary, bos_id, end_id = FAMILIES[family]
    reference = Tokenizer.from_file(str(hf_tokenizer_dir(vocabulary) / "tokenizer.json"))
    metadata = {key: value for key, (value, _) in vocab_metadata(vocabulary).items()}
    tokenizer = GGUFTokenizer.from_metadata(metadata)
    template = template_of(family)
    renderer = Renderer(tokenizer, template, max_length=4096)
    end = reference.id_to_token(end_id)
    for question, answer in QUESTIONS_AND_ANSWERS:
        value = {"instruction": question, "response": answer}
        reader = RecordReader(system=system)
        sample = reader(Record(value, Position("a.jsonl", 1)))
        (rendered,) = renderer(sample, Position("a.jsonl", 1))
        turns = ([Message("system", system)] if system else []) + [Message("user", question)]
        prompt = by_transformers(template, turns, add_generation_prompt=True)
        assert prompt is not None
        prompt_ids = reference.encode(prompt, add_special_tokens=False).ids
        answer_ids = reference.encode(answer + end, add_special_tokens=False).ids
        ids, mask = rendered.example.token_ids.tolist(), rendered.example.is_target
        assert ids[: len(prompt_ids)] == prompt_ids
        targets = np.flatnonzero(mask)
        assert targets.tolist() == list(range(len(prompt_ids), len(prompt_ids) + len(answer_ids)))
        assert rendered.example.token_ids[mask].tolist() == answer_ids
        assert answer_ids[-1] == end_id
        assert ids.count(bos_id) == (bos_id is not None)
        assert bos_id is None or ids[0] == bos_id
