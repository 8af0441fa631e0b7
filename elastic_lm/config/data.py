"""Where text comes from and how it becomes batches."""

import dataclasses
from typing import Literal, get_args

from elastic_lm.config.checks import (
    AT_LEAST_1,
    require,
    require_choice,
    require_each,
    require_seed,
    require_types,
)

DataSource = Literal["stdlib", "text", "jsonl", "instruction", "messages", "alpaca"]

Packing = Literal["concat", "first_fit"]

# How files end that are found in folders; files that are named themselves may end in anything.
TEXT_SUFFIXES = (".txt", ".txt.gz", ".py", ".py.gz", ".md", ".md.gz")
JSONL_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz")

PARQUET_SUFFIX = ".parquet"
RECORD_SUFFIXES = (*JSONL_SUFFIXES, PARQUET_SUFFIX)  # files of records


def is_json_lines(path: object) -> bool:
    """Whether a file's name says that it holds JSON lines."""
    return str(path).lower().endswith(JSONL_SUFFIXES)


def holds_records(path: object) -> bool:
    """Whether a file's name says that it holds records, as JSON or Parquet."""
    return str(path).lower().endswith(RECORD_SUFFIXES)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where text comes from and how it becomes batches.

    Example:
      ```python
      import elastic_lm as el

      data = el.DataConfig(source="text", paths=("train.txt",), eval_paths=("held_out.txt",), seq_len=512)
      assert data.packing == "concat"
      ```
    """

    # The interpreter's own library, text files, or records (JSON lines, JSON arrays, Parquet): of texts, of
    # prompts with responses, of chats, or of Alpaca's instruction, input and output. Of the last three, only
    # what is answered is learned.
    source: DataSource = "stdlib"
    paths: tuple[str, ...] = ()  # training files, folders or patterns such as *.jsonl; unused by stdlib
    eval_paths: tuple[str, ...] = ()  # held-out files or folders; unused by stdlib (its test split)
    text_field: str = "text"  # jsonl: key of the text
    prompt_field: str = "prompt"  # instruction: key of what is read but not learned
    response_field: str = "response"  # instruction: key of what is learned
    messages_field: str = "messages"  # messages: key of the list of messages
    tokenizer: str = ""  # folder or tokenizer.json; "" = that of train.init_from, or train a BPE
    seq_len: int = 256  # tokens per row
    batch_size: int = 16  # rows per optimizer step, over all devices
    packing: Packing = "concat"  # cut documents at row ends, or keep each whole and pad (truncating)
    span: int = 2048  # text is shuffled in pieces of about this many bytes, cut at line ends
    # Parts of the text that are packed by themselves, of which a process reads only those whose rows it has;
    # 1 = every process reads all text. The order of the data depends on it, and it stays for a whole run.
    shards: int = 1
    seed: int | None = None  # of the order of the data; None = train.seed

    def __post_init__(self) -> None:
        require_types(self, "data.")
        require_choice("data.source", self.source, get_args(DataSource))
        require_choice("data.packing", self.packing, get_args(Packing))
        require_each(self, "data.", ("seq_len", "batch_size", "span", "shards"), *AT_LEAST_1)
        require(
            self.batch_size % self.shards == 0,
            "data.shards",
            self.shards,
            f"must divide data.batch_size={self.batch_size}: every shard fills as many rows",
        )
        require_seed("data.seed", self.seed)
        require(
            self.source == "stdlib" or bool(self.paths),
            "data.paths",
            self.paths,
            f"source={self.source!r} reads files: name at least one",
        )
