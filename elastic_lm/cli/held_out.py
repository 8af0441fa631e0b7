"""Held-out text as `calibrate` and `evaluate` name it: flags, options, and the batches that they describe.

An exit policy is also tried on text that is generated with it: prompts are the beginnings of held-out rows.
"""

import argparse
import dataclasses
import itertools
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

from elastic_lm.cli.mesh_flag import add_mesh
from elastic_lm.cli.parser import ModelOptions, add_data, add_model, require_flag
from elastic_lm.config.data import TEXT_SUFFIXES, DataConfig, DataSource, holds_records
from elastic_lm.config.mesh import MeshConfig
from elastic_lm.quickstart.options import HELD_OUT_TOKENS

if TYPE_CHECKING:
    from elastic_lm.config.subnet import Subnet
    from elastic_lm.data.batch import Batch
    from elastic_lm.data.stdlib import Split
    from elastic_lm.data.tokenizer import Tokenizer
    from elastic_lm.decode.generated import GeneratedText
    from elastic_lm.depth.policies import ConfidenceExit
    from elastic_lm.models.decoder import Decoder, Params

ROWS = 8  # rows per batch
SEQ_LEN = 256  # tokens per row
PROMPT_TOKENS = 32  # of a row that is continued


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeldOutOptions(ModelOptions):
    """A model, and the text that it is measured on."""

    data: tuple[str, ...] = ()  # text files and folders, or JSON lines; () = the Python standard library
    tokens: int = HELD_OUT_TOKENS  # most tokens to read
    seq_len: int | None = SEQ_LEN  # tokens per row

    def __post_init__(self) -> None:
        super().__post_init__()
        for flag, value in (("--tokens", self.tokens), ("--seq-len", self.seq_len)):
            require_flag(value is None or value >= 1, flag, value, "must be at least 1")
        kinds = set(map(holds_records, self.data))
        require_flag(len(kinds) < 2, "--data", " ".join(self.data), "give text files or JSON lines, not both")

    @property
    def source(self) -> DataSource:
        """Where `DataConfig` finds the text."""
        if not self.data:
            return "stdlib"
        return "jsonl" if holds_records(self.data[0]) else "text"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContinuedOptions(HeldOutOptions):
    """Held-out text, and how much of it is continued with an exit policy."""

    mesh: MeshConfig | None = None  # devices that share the work; None = the first one does it
    continuations: int = 4  # texts that are generated; 0 = none
    new_tokens: int = 64  # tokens of each

    def __post_init__(self) -> None:
        super().__post_init__()
        require_flag(self.continuations >= 0, "--continuations", self.continuations, "must be at least 0")
        require_flag(self.new_tokens >= 1, "--new-tokens", self.new_tokens, "must be at least 1")


def add_held_out(
    parser: argparse.ArgumentParser, purpose: str, *rows: str, seq_len: str | None = None
) -> None:
    """Adds the flags of `HeldOutOptions`.

    Args:
      parser: of the command.
      purpose: what the command uses the text for.
      rows: other names of --seq-len.
      seq_len: another help text of --seq-len.
    """
    add_model(parser)
    add_data(parser, purpose)
    add, defaults = parser.add_argument, HeldOutOptions
    add("--tokens", type=int, metavar="N", help=f"tokens to read of it (default: {defaults.tokens})")
    shown = seq_len or f"tokens per row (default: {defaults.seq_len})"
    add("--seq-len", *rows, type=int, metavar="T", help=shown)


def add_continued(
    parser: argparse.ArgumentParser, purpose: str, *rows: str, seq_len: str | None = None
) -> None:
    """Adds the flags of `ContinuedOptions`.

    Args:
      parser: of the command.
      purpose: what the command uses the text for.
      rows: other names of --seq-len.
      seq_len: another help text of --seq-len.
    """
    add_held_out(parser, purpose, *rows, seq_len=seq_len)
    add_mesh(parser)
    add, defaults = parser.add_argument, ContinuedOptions
    count = (
        "texts generated with the thresholds, whose agreement is told beside that on given text; 0 = none "
    )
    add("--continuations", type=int, metavar="N", help=f"{count}(default: {defaults.continuations})")
    add("--new-tokens", type=int, metavar="N", help=f"tokens of each (default: {defaults.new_tokens})")


def held_out_batches(
    options: HeldOutOptions,
    tokenizer: "Tokenizer",
    split: "Split",
    independent: bool = False,
    sources: bool = False,
) -> "tuple[Iterable[Batch], str]":
    """Batches of the text that --data names, or of a split of the Python standard library.

    Args:
      options: which text, and how much of it.
      tokenizer: of the model.
      split: used where --data is empty.
      independent: rows should be independent of each other: JSON lines are kept whole, each in one row, and
        text cut from fewer files than there are rows is warned about.
      sources: batches say which of `held_out_files` each token is from.

    Returns:
      (packed batches, a description of the text).

    Raises:
      FileNotFoundError: a file does not exist.
    """
    from elastic_lm.data import pipeline
    from elastic_lm.data.batch import Batch

    data = held_out_config(options)
    paths, count = options.data, -(-options.tokens // (data.seq_len * ROWS))
    if independent:
        data = independent_rows(data, count * ROWS, split)

    arrays = itertools.islice(pipeline.eval_batches(data, tokenizer, split, sources=sources), count)
    name = " ".join(paths) or f"{split} split of the Python standard library"
    return (Batch(**fields) for fields in arrays), f"{name}, up to {options.tokens} tokens"


def held_out_config(options: HeldOutOptions) -> DataConfig:
    """Where the text is that --data names, and the shape of its batches."""
    return DataConfig(
        source=options.source,
        paths=options.data,
        eval_paths=options.data,
        seq_len=options.seq_len or SEQ_LEN,
        batch_size=ROWS,
    )


def held_out_files(options: HeldOutOptions, split: "Split") -> list[str]:
    """Names of the files that `sources` of `held_out_batches` number, without the folder that all are in."""
    import os

    from elastic_lm.data import pipeline

    files = pipeline.eval_files(held_out_config(options), split)
    folder = os.path.commonpath([os.path.dirname(file) for file in files])
    return [os.path.relpath(file, folder) if folder else file for file in files]


def independent_rows(data: DataConfig, rows: int, split: "Split") -> DataConfig:
    """JSON lines are kept whole, each in one row; text files are cut, with a warning where they are few."""
    if data.source == "jsonl":
        return dataclasses.replace(data, packing="first_fit")
    from elastic_lm.data.sources import find_files
    from elastic_lm.data.stdlib import stdlib_files

    files = find_files(data.paths, TEXT_SUFFIXES) if data.paths else stdlib_files(split)
    if len(files) < rows:
        print(
            f"up to {rows} rows are cut from {len(files)} files, and rows of one file are not "
            "independent as the guarantee assumes: JSON lines with one document each are safer",
            file=sys.stderr,
        )
    return data


def with_prompts(
    batches: "Iterable[Batch]", options: ContinuedOptions, max_len: int, bos_id: int | None
) -> "tuple[list[list[int]], Iterable[Batch]]":
    """The beginnings of the first rows, and all batches, the first ones included.

    Args:
      batches: from `held_out_batches`; read as far as prompts are needed.
      options: how many prompts.
      max_len: longest text that the model takes.
      bos_id: put first where the tokenizer has one and the row does not begin with it.

    Returns:
      (at most `options.continuations` prompts of equal length, batches).
    """
    length = min(PROMPT_TOKENS, options.seq_len or PROMPT_TOKENS, max(1, max_len // 3))
    prompts: list[list[int]] = []
    read, batches = [], iter(batches)
    while len(prompts) < options.continuations and (batch := next(batches, None)) is not None:
        read.append(batch)
        for tokens, segments in zip(batch.tokens, batch.segments, strict=True):
            # The whole prompt is of one document, and none of it is padding.
            if segments[0] > 0 and (segments[:length] == segments[0]).all():
                ids = [int(token) for token in tokens[:length]]
                prompts.append(ids if bos_id in (None, ids[0]) else [bos_id, *ids[:-1]])
    if options.continuations and not prompts:
        print(
            f"generated text is not looked at: no row begins with {length} tokens of one document; give "
            "longer documents",
            file=sys.stderr,
        )
    return prompts[: options.continuations], itertools.chain(read, batches)


def generated_text(
    model: "Decoder",
    params: "Params",
    policy: "ConfidenceExit",
    prompts: list[list[int]],
    options: ContinuedOptions,
    subnet: "Subnet | None" = None,
) -> "GeneratedText | None":
    """What a policy's own text is like; None where no prompt is continued, or no exit is ever used.

    Args:
      model: with its exits.
      params: its canonical parameters.
      policy: for these exits.
      prompts: from `with_prompts`.
      options: how many tokens.
      subnet: the part of the model that runs; None = all of it.
    """
    from elastic_lm.decode import generated
    from elastic_lm.decode.sampler import Sampler

    if not prompts or min(policy.thresholds) > 1:
        return None
    new_tokens = min(options.new_tokens, model.config.max_len - len(prompts[0]))
    return generated.measure(Sampler(model, params, exit=policy, subnet=subnet), prompts, new_tokens)


def generated_line(found: "GeneratedText") -> str:
    """Agreement on generated text in one line."""
    return (
        f"on text generated with these thresholds: agreement {found.agreement:.4f} of {found.tokens} tokens, "
        f"{found.repeats:.1%} repeats ({found.full_repeats:.1%} at full depth)"
    )
