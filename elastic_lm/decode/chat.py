"""`Chat`: a conversation of several turns, of which each reads only what the last one did not know."""

import contextlib
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any

from elastic_lm.config.checks import require, require_at_least_1, require_type
from elastic_lm.config.decoding import MAX_NEW_TOKENS
from elastic_lm.data.chat_template import Message, plain_messages
from elastic_lm.data.tokenizer import NO_TEMPLATE, Tokenizer
from elastic_lm.decode.prefix import PrefixCache
from elastic_lm.decode.results import Sample
from elastic_lm.decode.sampler import Sampler
from elastic_lm.decode.settings import make_settings, room_behind


class Chat:
    """A conversation with a chat model.

    Every turn is the continuation of the whole conversation as the chat template writes it, token for token.
    The keys and values of the beginning that it shares with the last turn are not computed again: where a
    template only appends, a turn reads what is new; where it rewrites earlier turns, such as one that leaves
    out older thoughts, it reads on from the first change. Exits, thresholds, lossless decoding and
    sub-networks are those of the sampler. An answer ends where the model has no room for more; with LongRoPE,
    one that would pass the original context ends there, and the next turn reads everything anew.

    Attributes:
      history: messages so far, the system's included, as mappings with "role" and "content". It may be
        changed between turns.
      sampler: that answers.
      reused: tokens of the last turn's prompt that were not processed again.

    Example:
      ```python
      import elastic_lm as el

      model, params = el.load(el.embedded_model())
      sampler = el.Sampler(model, params, el.Tokenizer.load(el.embedded_model()))

      # A chat model's tokenizer brings its template; the embedded model is none.
      template = "{% for m in messages %}# {{ m.content }}\\n{% endfor %}"
      chat = el.Chat(sampler, system="Be short.", chat_template=template, max_new_tokens=8)
      print(chat.send("import os").text)
      print([message["role"] for message in chat.history])  # ["system", "user", "assistant"]
      ```
    """

    def __init__(
        self,
        sampler: Sampler,
        *,
        system: str | None = None,
        history: Sequence[Message] = (),
        tools: Sequence[Message] | None = None,
        chat_template: str | None = None,
        variables: Mapping[str, Any] | None = None,
        max_new_tokens: int = MAX_NEW_TOKENS,
        **settings: Any,
    ) -> None:
        """Begins a conversation; nothing is computed yet.

        Args:
          sampler: with the tokenizer of a chat model.
          system: text of a message of the role "system" that comes first; None = what the template says
            without one.
          history: messages to go on from.
          tools: JSON schemas of functions, for the template.
          chat_template: name of one of the tokenizer's templates, or another one; None = its default.
          variables: further variables of the template, such as {"enable_thinking": False}.
          max_new_tokens: tokens of an answer at most.
          **settings: how tokens are drawn, as in `Sampler.sample`.

        Raises:
          ValueError: the tokenizer has no template, or a setting is unknown or out of range.
        """
        tokenizer = sampler.tokenizer
        right = isinstance(tokenizer, Tokenizer)
        require(right, "tokenizer", tokenizer, "a chat needs an el.Tokenizer; give it to the sampler")
        assert isinstance(tokenizer, Tokenizer)
        own = tokenizer.chat_template is not None or chat_template is not None
        require(own, "chat_template", None, NO_TEMPLATE)
        require_type("system", system, str | None)
        require_at_least_1("max_new_tokens", max_new_tokens)
        make_settings(settings)

        self.sampler = sampler
        self._tokenizer = tokenizer
        begin = [*([] if system is None else [{"role": "system", "content": system}]), *history]
        if begin:
            plain_messages(begin)
        self._begin = [dict(message) for message in begin]
        self._how = {"tools": tools, "chat_template": chat_template, **(variables or {})}
        self._max_new_tokens = max_new_tokens
        self._settings = settings
        self.reset()

    def reset(self) -> None:
        """Goes back to the messages that the conversation began with."""
        self.history: list[dict[str, Any]] = [dict(message) for message in self._begin]
        self._prefix = PrefixCache()

    @property
    def reused(self) -> int:
        """Tokens of the last turn's prompt that were not processed again."""
        return self._prefix.reused

    def prompt(self, text: str | None = None) -> list[int]:
        """Token ids that the next answer continues.

        Args:
          text: what the user says; None = the history as it is.

        Raises:
          ValueError: the template refuses the messages.
        """
        messages = self.history if text is None else [*self.history, {"role": "user", "content": text}]
        return self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, **self._how)

    def send(self, text: str, max_new_tokens: int | None = None, **settings: Any) -> Sample:
        """Says something and waits for the answer.

        Args:
          text: what the user says.
          max_new_tokens: tokens of the answer at most, for this turn.
          **settings: other settings than those of the chat, for this turn; `exit` and `lossless`, too.

        Returns:
          The answer; its text is in `history`, too.

        Raises:
          ValueError: the template refuses the messages, the conversation has become too long for the model,
            or as in `Sampler.sample`. The history is then as before.
        """
        *_, sample = self.stream_samples(text, max_new_tokens, **settings)
        return sample

    def stream(self, text: str, max_new_tokens: int | None = None, **settings: Any) -> Iterator[str]:
        """Says something and yields the answer piece by piece.

        Args:
          text: what the user says.
          max_new_tokens: as in `send`.
          **settings: as in `send`.

        Yields:
          Pieces that together are the answer. If the iterator is closed early, the history has what there is
          by then.

        Raises:
          ValueError: as in `send`.
        """
        shown = ""
        with contextlib.closing(self.stream_samples(text, max_new_tokens, **settings)) as samples:
            for sample in samples:
                if len(sample.text) > len(shown):
                    yield sample.text[len(shown) :]
                    shown = sample.text

    def stream_samples(
        self, text: str, max_new_tokens: int | None = None, **settings: Any
    ) -> Generator[Sample, None, None]:
        """`stream` with depths: yields again and again the answer as far as it is known.

        Args:
          text: what the user says.
          max_new_tokens: as in `send`.
          **settings: as in `send`.

        Yields:
          As `Sampler.stream_samples`.

        Raises:
          ValueError: as in `send`.
        """
        require_type("text", text, str)
        prompt = self.prompt(text)
        sampler, known = self.sampler, len(self.history)
        wanted = self._max_new_tokens if max_new_tokens is None else max_new_tokens
        require_at_least_1("max_new_tokens", wanted)
        room = room_behind(sampler.config, len(prompt))
        if room < 1:
            raise ValueError(
                f"the conversation has {len(prompt)} tokens, which leave no room for an answer within the "
                f"model's max_len={sampler.config.max_len}: begin anew with reset(), or shorten history"
            )

        how = self._settings | settings
        if not how.get("ignore_eos", False):
            how["stop_tokens"] = (*how.get("stop_tokens", ()), *end_tokens(self._tokenizer))
        answer, ended = None, False
        samples = sampler.stream_samples(prompt, min(wanted, room), prefix=self._prefix, **how)
        self.history.append({"role": "user", "content": text})
        try:
            with contextlib.closing(samples):
                for answer in samples:
                    yield answer
            ended = True
        except (GeneratorExit, KeyboardInterrupt):
            ended = True
            raise
        finally:
            if ended and answer is not None:
                self.history.append({"role": "assistant", "content": answer.text})
            else:
                del self.history[known:]


def end_tokens(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Tokens that end what the assistant says, beside those of the model's own config."""
    ids = list(tokenizer.eos_ids)
    template = tokenizer.chat_template
    if template is not None and "eos_token" in template.special_tokens:
        named = tokenizer.backend.token_to_id(template.special_tokens["eos_token"])
        ids += [named] if named is not None and named not in ids else []
    return tuple(i for i in ids if tokenizer.limit is None or i < tokenizer.limit)
