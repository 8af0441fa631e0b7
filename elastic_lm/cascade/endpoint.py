"""A model behind HTTP as a model of a cascade: HTTP with a deadline for the whole request.

What is sent to a server of the OpenAI API, and how its log-probabilities become scores, is in `completions`.

A socket's timeout limits only each read, so a server that sends a byte now and then could hold a record
forever. Here a reply has to be complete by a deadline: the time that is left becomes the socket's timeout
before every read.
"""

import base64
import functools
import http.client
import io
import json
import math
import operator
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, get_args
from urllib.parse import unquote, urlsplit, urlunsplit

from elastic_lm.cascade import completions
from elastic_lm.cascade.answerer import Answer, Record, text_in
from elastic_lm.cascade.completions import NoLogProbabilities
from elastic_lm.config.cascade import COMPLETIONS, RETRIES, TIMEOUT, AskedChoices, Style, without_secrets
from elastic_lm.config.checks import (
    is_whole,
    require,
    require_at_least_1,
    require_choice,
    require_not_negative,
    require_positive,
    require_type,
)
from elastic_lm.config.parse import parse_json

MOST_BYTES = 2**24  # of a reply, unless `max_bytes` says otherwise
# Where a reply has its output, by style, and how messages call that.
OUTPUTS: Mapping[str, tuple[tuple[str | int, ...], str]] = {
    "rows": (("output",), '"output"'),
    "openai": (("choices", 0, "text"), "choices[0].text"),
    "chat": (("choices", 0, "message", "content"), "choices[0].message.content"),
}
BUSY = (408, 425, 429)  # statuses below 500 after which trying again may help


class Endpoint:
    """A model behind HTTP: one POST of JSON per record, several at a time.

    In the style "rows" the body is {"row": record}, and the reply is {"output": ..., "scores": {name:
    number}, "cost": number}. Scores and cost may be left out; scores have to be finite, a cost finite and at
    least 0.

    The styles "openai" and "chat" are text completions and chat completions of the OpenAI API. The body is
    {"model", "max_tokens", "temperature": 0} with the record's text as "prompt", or with its messages, or its
    text as one of a user, as "messages". The output is choices[0].text, or choices[0].message.content. With
    `top_logprobs` the server's log-probabilities become scores (`elastic_lm.cascade.completions`): logprob,
    energy, max_prob, margin and entropy, so that it can be the Swift. Asked about choices, it answers with
    the index of one, as `MultipleChoice` does, by the log-probabilities of the reply's first token.

    Failed connections, timeouts and the statuses 408, 425, 429 and 5xx are tried again, after a wait that
    doubles each time; any other status is an error at once. After a record for which every try failed, the
    service counts as down: each record gets one try only, until one succeeds.

    Example:
      ```python
      from elastic_lm.cascade import Answer, Cascade, Endpoint, Function

      swift = Function(lambda record: Answer("spam", {"energy": record["sure"]}))
      super_ = Endpoint("http://localhost:8000/answer", timeout=5.0, retries=1, cost=2e9)

      # Only records that are passed on are sent; the Swift keeps this one.
      (result,) = Cascade(swift, super_, 0.5).answer([{"text": "You won!", "sure": 0.9}])
      assert (result.output, result.model) == ("spam", "swift")

      # A server of chat completions as a Swift: its log-probabilities are the scores.
      url = "http://localhost:8000/v1/chat/completions"
      chat = Endpoint(url, style="chat", top_logprobs=5, choices="letters", options={"model": "small"})
      ```
    """

    def __init__(
        self,
        url: str,
        *,
        timeout: float = TIMEOUT,
        retries: int = RETRIES,
        backoff: float = 0.5,
        workers: int = 8,
        style: Style = "rows",
        text_field: str = "text",
        messages_field: str = "messages",
        choices_field: str = "choices",
        choices: AskedChoices = "ignored",
        top_logprobs: int = 0,
        options: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        cost: float = 0.0,
        max_bytes: int = MOST_BYTES,
    ) -> None:
        """Describes a service; nothing is sent yet.

        Args:
          url: where records are posted to, http or https. A user and a password in it are sent as a header,
            and stand in no message.
          timeout: seconds that a try may take, until the last byte of its reply.
          retries: further tries per record.
          backoff: seconds to wait before the first of them.
          workers: records under way at once.
          style: "rows", "openai" or "chat".
          text_field: openai, chat: field of the record that is the prompt.
          messages_field: chat: field with messages, which stand in place of the text where a record has them.
          choices_field: openai, chat: field with the choices, a list of texts.
          choices: openai, chat: "letters" writes the choices after the prompt and asks for a letter; "texts"
            leaves the prompt as it is, and the reply is to begin with a choice; "ignored" asks for a text.
          top_logprobs: openai, chat: likeliest tokens whose log-probabilities are asked for; 0 = no scores.
          options: openai, chat: further fields of the body, such as model and max_tokens.
          headers: of every request, such as Authorization.
          cost: FLOPs of a record, where the reply has none.
          max_bytes: of a reply; a longer one is the error of its record, and is not read to its end.

        Raises:
          ValueError: an argument is out of range.
        """
        require_type("url", url, str)
        shown = without_secrets(url.strip())
        require(url.startswith(("http://", "https://")), "url", shown, "must begin with http:// or https://")
        address, login = _split_login(url, shown)
        require_positive("timeout", timeout)
        require(is_whole(retries), "retries", retries, "must be a whole number of at least 0")
        for name, value in (("backoff", backoff), ("cost", cost)):
            require_not_negative(name, value)
        require_at_least_1("workers", workers)
        require_at_least_1("max_bytes", max_bytes)
        require_choice("style", style, get_args(Style))
        require_choice("choices", choices, get_args(AskedChoices))
        require(is_whole(top_logprobs), "top_logprobs", top_logprobs, "must be a whole number of at least 0")
        api = style in COMPLETIONS
        for name, value in {"top_logprobs": top_logprobs or None, "choices": choices}.items():
            fix = 'is read in the styles "openai" and "chat"; leave it out'
            require(api or value in (None, "ignored"), name, value, fix)
        scored = top_logprobs > 0 or choices != "texts"
        require(scored, "choices", choices, "is read from log-probabilities; set top_logprobs too")
        _check_headers(headers or {})

        self.url, self._address, self._max_bytes = shown, address, max_bytes
        self._timeout, self._retries, self._backoff, self._workers = timeout, retries, backoff, workers
        self._style, self._text_field, self._cost = style, text_field, cost
        self._messages_field, self._choices_field = messages_field, choices_field
        self._choices: AskedChoices = choices
        self._top_logprobs = int(top_logprobs)
        self._any_logprobs = False  # whether a reply has had some
        self._options, self._headers = dict(options or {}), {**login, **(headers or {})}
        self._down = False
        self._opener = opener_with_deadline()

    def answer(self, records: Sequence[Record]) -> list[Answer]:
        """Answers records, as in `Answerer.answer`.

        Raises:
          ValueError: log-probabilities are asked for, and the server returns none and has not returned any
            before.
        """
        with ThreadPoolExecutor(min(self._workers, max(len(records), 1))) as pool:
            return list(pool.map(self._answer_one, records))

    def _answer_one(self, record: Record) -> Answer:
        began = time.perf_counter()
        try:
            body = json.dumps(self._body(record)).encode()
            return self._parse(record, self._post(body), time.perf_counter() - began)
        except NoLogProbabilities as error:
            # From the first reply on, it is the server that has none.
            if not self._any_logprobs:
                raise NoLogProbabilities(f"{self.url}: {error}") from None
            return Answer(error=f"{self.url}: {error}", seconds=time.perf_counter() - began)
        except (OSError, ValueError, TypeError, LookupError, RecursionError) as error:
            return Answer(error=f"{self.url}: {_reason(error)}", seconds=time.perf_counter() - began)

    def _body(self, record: Record) -> dict[str, Any]:
        if self._style == "rows":
            return {"row": dict(record)}
        body: dict[str, Any] = {"temperature": 0, **self._options}
        choices = completions.asked_choices(record, self._choices, self._choices_field)
        if self._style == "openai":
            prompt = text_in(record, self._text_field)
            prompt = completions.lettered(prompt, choices, "Answer:") if self._lists(choices) else prompt
            asked = {"logprobs": self._top_logprobs} if self._top_logprobs else {}
            return {**body, "prompt": prompt, **asked}

        messages = completions.messages_of(record, self._messages_field, self._text_field)
        messages = completions.with_choices(messages, choices) if self._lists(choices) else messages
        asked = {"logprobs": True, "top_logprobs": self._top_logprobs} if self._top_logprobs else {}
        return {**body, "messages": messages, **asked}

    def _lists(self, choices: Sequence[str]) -> bool:
        """Whether the choices stand in what is sent."""
        return bool(choices) and self._choices == "letters"

    def _post(self, body: bytes) -> bytes:
        """The reply, after as many tries as it takes."""
        tries = 1 if self._down else 1 + self._retries
        for i in range(tries):
            if i:
                time.sleep(self._backoff * 2 ** (i - 1))
            try:
                reply = self._try(body)
            except OSError as error:
                if isinstance(error, urllib.error.HTTPError) and error.code < 500 and error.code not in BUSY:
                    raise
                if i + 1 == tries:
                    self._down = True
                    raise ConnectionError(f"no answer after {tries} tries: {_reason(error)}") from error
            else:
                self._down = False
                return reply
        raise AssertionError("unreachable")

    def _try(self, body: bytes) -> bytes:
        headers = {"Content-Type": "application/json", **self._headers}
        request = urllib.request.Request(self._address, body, headers)
        try:
            with self._opener.open(request, timeout=self._timeout) as reply:
                content = reply.read(self._max_bytes + 1)
                fix = f"is more than max_bytes={self._max_bytes}: ask for less, or give a larger max_bytes"
                require(len(content) <= self._max_bytes, "the reply's bytes", f"over {self._max_bytes}", fix)
                if reply.length:  # bytes that were announced and did not come
                    raise ConnectionError(f"the reply broke off: {reply.length} bytes are missing")
                return content
        except http.client.HTTPException as error:  # is no OSError, but is worth another try as well
            raise ConnectionError(f"the reply broke off: {type(error).__name__} {error}") from error

    def _parse(self, record: Record, reply: bytes, seconds: float) -> Answer:
        path, wanted = OUTPUTS[self._style]
        try:
            content = parse_json(reply)
            output = functools.reduce(operator.getitem, path, content)
        except (ValueError, TypeError, LookupError) as error:
            raise ValueError(f"the reply has no {wanted}: {reply[:80]!r}") from error
        _check_output(output)
        if self._style in COMPLETIONS:
            require(isinstance(output, str), wanted, output, "must be a text; is the model one that writes?")
            output, scores = self._read_text(record, output, content["choices"][0])
            return Answer(output, scores, self._cost, seconds=seconds)

        scores, cost = content.get("scores"), content.get("cost")
        require(isinstance(scores, dict | None), "scores", scores, "must map names to numbers")
        numbers = {name: _finite(f"scores.{name}", value) for name, value in (scores or {}).items()}
        cost = self._cost if cost is None else _finite("cost", cost)
        require_not_negative("cost", cost)
        return Answer(output, numbers, cost, seconds=seconds)

    def _read_text(
        self, record: Record, text: str, choice: Mapping[str, Any]
    ) -> tuple[str | int, dict[str, float]]:
        """(output, scores) of a completion.

        Args:
          record: what was asked.
          text: that was written.
          choice: `choices[0]` of the reply, with the text's log-probabilities.

        Raises:
          NoLogProbabilities: there are none, and they were asked for.
          ValueError: the reply does not tell the choice, or how sure it is.
        """
        choices = completions.asked_choices(record, self._choices, self._choices_field)
        if not self._top_logprobs:
            return completions.choice_named(text, choices) if choices else text, {}

        tokens = completions.written_tokens(choice)
        if not tokens:
            require(bool(text), "the reply", text, "is empty, and nothing tells how sure it is")
            fix = "returns none; ask one that does (the last member of a cascade needs none)"
            raise NoLogProbabilities(f"choices[0].logprobs: the server {fix}")
        self._any_logprobs = True
        if choices:
            return completions.choose(tokens[0], choices, self._choices)
        return text, completions.text_scores(tokens)


def _split_login(url: str, shown: str) -> tuple[str, dict[str, str]]:
    """(an address without user and password, the header that they become).

    Raises:
      ValueError: the address has no host or no number as its port, or holds characters that are sent in
        no address.
    """
    fix = "must be like http://host:8000/path; write a / or @ in a password as %2F or %40, and a space as %20"
    try:
        parts = urlsplit(url)
        right = bool(parts.hostname) and (parts.port is None or parts.port > 0)
        right = right and url.isprintable() and " " not in url and (parts.path + parts.query).isascii()
    except ValueError:  # its message may hold the password
        right = False
    if not right:
        raise ValueError(f"url={shown.partition('://')[0]}://...: {fix}")

    bare = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
    if parts.username is None:
        return bare, {}
    login = f"{unquote(parts.username)}:{unquote(parts.password or '')}".encode()
    return bare, {"Authorization": f"Basic {base64.b64encode(login).decode()}"}


def _check_headers(headers: Mapping[str, str]) -> None:
    """Refuses headers that cannot be sent, without their values, which may be keys."""
    for name, value in headers.items():
        right = isinstance(name, str) and isinstance(value, str) and ":" not in name and name.isascii()
        if not right or not name or not name.isprintable() or any(c in "\r\n\0" or c > "\xff" for c in value):
            raise ValueError(
                f"headers[{name!r}]: must be one line of Latin-1 text; look for a line end or a character "
                "that was copied along"
            )


def _check_output(output: Any) -> None:
    """Refuses an answer with NaN or infinity in it, which is no JSON."""
    try:
        json.dumps(output, allow_nan=False)
    except ValueError:
        require(False, "output", output, "must be JSON, which has neither NaN nor infinity")


def _finite(name: str, value: Any) -> float:
    """A value of a reply as a number.

    Raises:
      ValueError: it is none, or not finite.
    """
    try:
        number = float(value)
    except (ValueError, TypeError, OverflowError):
        number = math.nan
    require(math.isfinite(number), name, value, "must be a finite number")
    return number


def _reason(error: BaseException) -> str:
    """What an error says, in words for a person."""
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP status {error.code} {error.reason}"
    if isinstance(error, urllib.error.URLError):
        return str(error.reason)
    return str(error) or type(error).__name__


def opener_with_deadline() -> urllib.request.OpenerDirector:
    """An opener whose `timeout` is a deadline for the whole request, the reply's last byte included.

    Redirects are errors, because following one would turn the POST into a GET.
    """
    return urllib.request.build_opener(_HttpHandler, _HttpsHandler, _NoRedirects)


class _HttpHandler(urllib.request.HTTPHandler):
    def do_open(self, http_class: Any, req: Any, **options: Any) -> Any:
        return super().do_open(_with_deadline(http_class), req, **options)


class _HttpsHandler(urllib.request.HTTPSHandler):
    def do_open(self, http_class: Any, req: Any, **options: Any) -> Any:
        return super().do_open(_with_deadline(http_class), req, **options)


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any) -> None:
        return None


def _with_deadline(http_class: Callable[..., Any]) -> Any:
    """Makes connections whose deadline is `timeout` seconds after they are made."""

    def connection(*args: Any, timeout: float, **options: Any) -> Any:
        made = http_class(*args, timeout=timeout, **options)
        made.response_class = functools.partial(_Reply, deadline=time.monotonic() + timeout)
        return made

    return connection


class _Reply(http.client.HTTPResponse):
    """A reply that is read, headers and all, through a stream with a deadline."""

    def __init__(self, sock: Any, *args: Any, deadline: float, **options: Any) -> None:
        super().__init__(sock, *args, **options)
        self.fp = io.BufferedReader(_StreamWithDeadline(self.fp.detach(), sock, deadline))


class _StreamWithDeadline(io.RawIOBase):
    """A socket's bytes; a read waits until the deadline at most."""

    def __init__(self, raw: Any, socket: Any, deadline: float) -> None:
        self._raw, self._socket, self._deadline = raw, socket, deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        self._socket.settimeout(left)
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()
