"""Chats to learn from: what the assistant says is learned, all of it, and nothing else."""

import json
from pathlib import Path

import numpy as np
import pytest
from test_chat_template import CHATML, MARKED, TALK, save_tokenizer

from elastic_lm.config.data import DataConfig
from elastic_lm.data import conversations, pipeline
from elastic_lm.data.tokenizer import Tokenizer

# Leaves out what was thought in all turns but the last one, without saying so by tags.
REWRITING = MARKED.replace("{%- generation %}", "").replace("{%- endgeneration %}", "")
CHAT = [message for message in TALK if message["role"] != "note"]


def write(file: Path, records: list[dict]) -> str:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(file)


def config(path: str, source: str = "messages", **fields) -> DataConfig:
    how = {"seq_len": 128, "batch_size": 2, "packing": "first_fit", **fields}
    return DataConfig(source=source, paths=(path,), eval_paths=(path,), **how)


def tokenizer_of(folder: Path, template: str | None) -> Tokenizer:
    return Tokenizer.load(save_tokenizer(folder, template))


def learned(tokenizer: Tokenizer, one: DataConfig) -> list[str]:
    """The texts that are learned, one for each run of learned tokens, special tokens included."""
    texts = []
    for batch in pipeline.eval_batches(one, tokenizer):
        for targets, weights in zip(batch["targets"], batch["weights"], strict=True):
            runs = np.split(targets, np.flatnonzero(np.diff(weights > 0)) + 1)
            kept = np.split(weights, np.flatnonzero(np.diff(weights > 0)) + 1)
            texts += [tokenizer.decode(r, special=True) for r, k in zip(runs, kept, strict=True) if k[0] > 0]
    return texts


def test_every_answer_is_learned_with_the_token_that_ends_it(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tmp_path / "t", CHATML)
    file = write(tmp_path / "chats.jsonl", [{"messages": CHAT}])
    answers = [f"{m['content']}<|im_end|>" for m in CHAT if m["role"] == "assistant"]
    assert learned(tokenizer, config(file)) == answers
    # What is read is the template's text, whole.
    ids, _ = conversations.encode_conversation(tokenizer, pipeline.documents(config(file), "train")[0])
    assert ids == tokenizer.apply_chat_template(CHAT)


def test_the_mask_is_that_of_transformers_where_the_template_has_tags(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = save_tokenizer(tmp_path / "t", MARKED)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    ours = Tokenizer.load(folder)
    file = write(tmp_path / "chats.jsonl", [{"messages": CHAT}, {"messages": CHAT[:3]}])
    source = pipeline.documents(config(file), "train")
    for i in range(2):
        ids, mask = conversations.encode_conversation(ours, source[i])
        other = theirs.apply_chat_template(
            source[i].messages, return_assistant_tokens_mask=True, return_dict=True
        )
        assert ids == other["input_ids"]
        assert mask == [bool(m) for m in other["assistant_masks"]]
        assert 0 < sum(mask) < len(mask)


def test_a_template_that_rewrites_makes_every_turn_a_row(tmp_path: Path) -> None:
    """Each row is what the model reads at that turn, and its answer."""
    tokenizer = tokenizer_of(tmp_path / "t", REWRITING)
    file = write(tmp_path / "chats.jsonl", [{"messages": CHAT}, {"messages": CHAT[:3]}])
    assert conversations.rewrites(tokenizer.chat_template) is False  # the probe has no thoughts
    thinking = REWRITING.replace(
        "else message['content'] }}", "else '<think>\\n</think>' + message['content'] }}"
    )
    tokenizer = tokenizer_of(tmp_path / "u", thinking)
    assert conversations.rewrites(tokenizer.chat_template)
    source = conversations.for_tokenizer(pipeline.documents(config(file), "train"), tokenizer)
    assert len(source) == 3
    for i, through in enumerate((3, 5, 3)):
        ids, mask = conversations.encode_conversation(tokenizer, source[i])
        before = tokenizer.apply_chat_template(CHAT[: through - 1], add_generation_prompt=True)
        assert ids == tokenizer.apply_chat_template(CHAT[:through])
        assert mask == [False] * len(before) + [True] * (len(ids) - len(before) - 1) + [False]


def test_a_chat_that_cannot_be_told_apart_is_refused(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tmp_path / "t", REWRITING)
    file = write(tmp_path / "chats.jsonl", [{"messages": CHAT}])
    with pytest.raises(ValueError, match=r"chats.jsonl line 1: the chat template rewrites message 3"):
        learned(tokenizer, config(file))


def test_sharegpt_and_tools_are_read(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tmp_path / "t", CHATML)
    talk = [{"from": "human", "value": "a?"}, {"from": "gpt", "value": "b!"}]
    file = write(tmp_path / "chats.jsonl", [{"conversations": talk, "tools": []}])
    assert learned(tokenizer, config(file, messages_field="conversations")) == ["b!<|im_end|>"]


TRIPLES = [
    {"instruction": "Add.", "input": "2\n\n3", "output": "5"},
    {"instruction": "Say hello.", "input": "", "output": "Hello größe"},
    {"instruction": "Be.", "output": "I am"},
]


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".parquet"])
def test_alpaca_is_read_as_it_comes(tmp_path: Path, ending: str) -> None:
    file = tmp_path / f"alpaca{ending}"
    if ending == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(TRIPLES), file)
    elif ending == ".json":
        file.write_text(json.dumps(TRIPLES, indent=2, ensure_ascii=False))
    else:
        write(file, TRIPLES)
    one = config(str(file), "alpaca")
    chat = tokenizer_of(tmp_path / "t", CHATML)
    assert sorted(learned(chat, one)) == ["5<|im_end|>", "Hello größe<|im_end|>", "I am<|im_end|>"]
    plain = tokenizer_of(tmp_path / "u", None)
    end = plain.backend.id_to_token(plain.eos_ids[0])
    assert sorted(learned(plain, one)) == [f"5{end}", f"Hello größe{end}", f"I am{end}"]
    ids, _ = conversations.encode_conversation(plain, pipeline.documents(one, "train")[0])
    assert plain.decode(ids) == "### Instruction:\nAdd.\n\n### Input:\n2\n\n3\n\n### Response:\n5"


def test_batches_for_training_are_shuffled_and_endless(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tmp_path / "t", CHATML)
    batches = iter(pipeline.train_batches(config(write(tmp_path / "a.jsonl", TRIPLES), "alpaca"), tokenizer))
    for _ in range(5):
        assert next(batches)["weights"].any()
    pipeline.check_learnable(config(str(tmp_path / "a.jsonl"), "alpaca"), tokenizer)


REFUSED = [
    ({"text": "a"}, "must be a list of messages like .*found no 'messages' among text"),
    ({"messages": "a"}, "must be a list of messages like .*found str among messages"),
    ({"messages": [{"content": "a"}]}, 'a message has no "role"; found: content'),
    ({"messages": CHAT[:2]}, "no message has the role 'assistant'"),
    ({"messages": [{"role": "assistant"}]}, "the chat template"),
]


@pytest.mark.parametrize(("record", "why"), REFUSED)
def test_records_that_are_no_chats_are_refused(tmp_path: Path, record: dict, why: str) -> None:
    tokenizer = tokenizer_of(tmp_path / "t", CHATML)
    with pytest.raises(ValueError, match=f"chats.jsonl line 1: .*{why}"):
        learned(tokenizer, config(write(tmp_path / "chats.jsonl", [record])))


def test_chats_need_a_template(tmp_path: Path) -> None:
    file = write(tmp_path / "chats.jsonl", [{"messages": CHAT}])
    with pytest.raises(ValueError, match=r"data.tokenizer: the tokenizer has none, .*name the folder"):
        learned(tokenizer_of(tmp_path / "t", None), config(file))
