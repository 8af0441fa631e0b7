"""Text and labelled records as batches: tokenizers, sources, packing, a resumable pipeline."""

from etils import epy as _epy

from elastic_lm.files import library_messages as _messages  # noqa: F401 - before grain is imported

with _epy.lazy_api_imports(globals()):
    from elastic_lm.config.data import DataConfig
    from elastic_lm.config.task import TaskConfig
    from elastic_lm.data.batch import Batch
    from elastic_lm.data.chat_template import ChatTemplate
    from elastic_lm.data.ordered import windows
    from elastic_lm.data.piece_kinds import token_kinds
    from elastic_lm.data.pipeline import eval_batches, train_batches
    from elastic_lm.data.stdlib import stdlib_files
    from elastic_lm.data.tokenizer import Tokenizer, train_bpe

__all__ = [
    "Batch",
    "ChatTemplate",
    "DataConfig",
    "TaskConfig",
    "Tokenizer",
    "eval_batches",
    "stdlib_files",
    "token_kinds",
    "train_batches",
    "train_bpe",
    "windows",
]


def __dir__() -> list[str]:
    return __all__
