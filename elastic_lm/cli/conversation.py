"""What `generate --chat` and `chat` share: prompts by the chat template, and text that appears in colour."""

import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

CONTEXT = 16  # tokens before a text that it is decoded after; some tokens read otherwise at the very start

if TYPE_CHECKING:
    from elastic_lm.data.tokenizer import Tokenizer
    from elastic_lm.decode.results import Sample
    from elastic_lm.report.colour import Colours, Span


def check_template(tokenizer: "Tokenizer", model: str) -> None:
    """Refuses a model that is no chat model.

    Raises:
      ValueError: its tokenizer has no chat template; names the model.
    """
    if tokenizer.chat_template is None:
        raise ValueError(
            f"{model}: has no chat template, so that it is no chat model: ask it with `generate` without "
            "--chat, or put its chat_template.jinja beside tokenizer.json"
        )


def prompt_ids(tokenizer: "Tokenizer", model: str, text: str, system: str | None) -> list[int]:
    """What a chat model reads when a user says something.

    Raises:
      ValueError: it is no chat model, or its template refuses the messages.
    """
    check_template(tokenizer, model)
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages.append({"role": "user", "content": text})
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True)


def hint(tokenizer: "Tokenizer", chat: bool, texts: Sequence[str]) -> None:
    """Says on stderr what to do where a chat model was asked without its template, and said nothing."""
    if not chat and tokenizer.chat_template is not None and any(not text.strip() for text in texts):
        print(
            "the model said nothing: it is a chat model and was asked without its chat template; add --chat, "
            "or talk to it with `elastic-lm chat`",
            file=sys.stderr,
        )


class Printer:
    """Prints text while it is generated, in the colours of depth."""

    def __init__(
        self,
        tokenizer: "Tokenizer",
        n_layers: int,
        colours: "Colours | None",
        *,
        exits: Sequence[int] = (),
        raw: bool = False,
    ) -> None:
        """Prints nothing yet.

        Args:
          tokenizer: of the model.
          n_layers: of what runs.
          colours: of the terminal; None = plain text.
          exits: layers of the exits of what runs.
          raw: control characters are printed as they are.
        """
        self._tokenizer = tokenizer
        self._n_layers = n_layers
        self._colours: Colours | None = colours
        self._exits = exits
        self._raw = raw

    def stream(self, before: str, prompt: Sequence[int], samples: "Iterable[Sample]") -> "Sample":
        """Prints a text, then what samples have more and more of, then the end of the line.

        Args:
          before: printed first, as it is.
          prompt: token ids that the samples continue.
          samples: of `stream_samples`; at least one.

        Returns:
          The last of them.
        """
        from elastic_lm.decode.results import sample_spans

        print(self._safe(before), end="", flush=True)
        # Every look decodes the text anew, so that a long conversation is left out of it.
        context, shown, sample = prompt[-CONTEXT:], 0, None
        for sample in samples:
            if len(sample.text) == shown:
                continue
            parts = [(sample.text[shown:], 0)]
            if self._colours:
                parts = _after(sample_spans(self._tokenizer, context, sample), shown)
            print(self._painted(parts), end="", flush=True)
            shown = len(sample.text)
        print(flush=True)
        assert sample is not None
        return sample

    def _painted(self, parts: "Sequence[Span]") -> str:
        from elastic_lm.report.colour import to_ansi

        safe = [(self._safe(text), depth) for text, depth in parts]
        return to_ansi(safe, self._n_layers, self._colours, exits=self._exits)

    def _safe(self, text: str) -> str:
        from elastic_lm.report.terminal import shown

        return text if self._raw else shown(text)


def _after(parts: "Sequence[Span]", count: int) -> "list[Span]":
    """The spans without their first `count` characters."""
    rest = []
    for text, depth in parts:
        if len(text) > count:
            rest.append((text[count:], depth))
        count = max(count - len(text), 0)
    return rest
