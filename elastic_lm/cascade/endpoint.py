"""Black boxes as models of a cascade: a function of a row, or a service behind HTTP."""

import functools
import http.client
import io
import json
import math
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, get_args

from elastic_lm.cascade.answerer import Answer, Record, failed
from elastic_lm.config.cascade import RETRIES, TIMEOUT, Style
from elastic_lm.config.checks import AT_LEAST_1, NOT_NEGATIVE, POSITIVE, require, require_choice

BUSY = (408, 425, 429)  # statuses beside 5xx after which trying again may help


class Function:
    """A Python function as a model."""

    def __init__(self, function: Callable[..., Any], *, cost: float = 0.0, batches: bool = False) -> None:
        """Wraps a function.

        Args:
          function: from a row to its output, or to an `Answer` with scores and cost. What it raises is the
            error of that row.
          cost: FLOPs of a row, where the function does not answer with an `Answer`.
          batches: the function takes a list of rows and gives a list; what it raises is every row's error.
        """
        require(NOT_NEGATIVE[0](cost), "cost", cost, NOT_NEGATIVE[1])
        self._function, self._cost, self._batches = function, cost, batches

    def answer(self, rows: Sequence[Record]) -> list[Answer]:
        """See `answerers.Answerer`."""
        return self._whole(rows) if self._batches else [self._one(row) for row in rows]

    def _one(self, row: Record) -> Answer:
        began = time.perf_counter()
        try:
            output = self._function(row)
        except Exception as error:
            return failed(error, time.perf_counter() - began)
        return self._answer(output, time.perf_counter() - began)

    def _whole(self, rows: Sequence[Record]) -> list[Answer]:
        began = time.perf_counter()
        try:
            outputs = list(self._function(list(rows)))
            require(len(outputs) == len(rows), "outputs", len(outputs), f"give one per row ({len(rows)})")
        except Exception as error:
            return [failed(error, (time.perf_counter() - began) / len(rows)) for _ in rows]
        each = (time.perf_counter() - began) / max(len(rows), 1)
        return [self._answer(output, each) for output in outputs]

    def _answer(self, output: Any, seconds: float) -> Answer:
        return output if isinstance(output, Answer) else Answer(output, cost=self._cost, seconds=seconds)


class Endpoint:
    """A model behind HTTP: one POST of JSON per row, several at a time.

    Style "rows": the body is {"row": the row} and the reply {"output": ..., "scores": {name: number},
    "cost": number}, the last two as wanted; scores are finite, costs also at least 0. Style "openai" is a
    completion: the body is {"model", "prompt", "max_tokens", "temperature": 0} with the row's text as prompt,
    and the output is choices[0].text.

    Connections that fail, timeouts, and the statuses 408, 425, 429 and 5xx are tried again, each time after
    twice the wait; other statuses are errors at once. After a row for which that was in vain the service
    counts as down: rows get one try, until one succeeds.
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
        options: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        cost: float = 0.0,
    ) -> None:
        """Describes a service; nothing is sent yet.

        Args:
          url: where rows are posted to, http or https.
          timeout: seconds that a whole try may take, its reply included.
          retries: further tries per row.
          backoff: seconds before the first of them.
          workers: rows under way at once.
          style: "rows" or "openai".
          text_field: openai: field of the row that is the prompt.
          options: openai: further fields of the body, such as model and max_tokens.
          headers: of every request, such as Authorization.
          cost: FLOPs of a row, where the reply has none.

        Raises:
          ValueError: an argument is out of range.
        """
        require(url.startswith(("http://", "https://")), "url", url, "must begin with http:// or https://")
        require(POSITIVE[0](timeout), "timeout", timeout, POSITIVE[1])
        for name, value in (("retries", retries), ("backoff", backoff), ("cost", cost)):
            require(NOT_NEGATIVE[0](value), name, value, NOT_NEGATIVE[1])
        require(AT_LEAST_1[0](workers), "workers", workers, AT_LEAST_1[1])
        require_choice("style", style, get_args(Style))
        self.url, self._timeout, self._retries, self._backoff = url, timeout, retries, backoff
        self._workers, self._style, self._field, self._cost = workers, style, text_field, cost
        self._options, self._headers = dict(options or {}), dict(headers or {})
        self._down, self._opener = False, opener()

    def answer(self, rows: Sequence[Record]) -> list[Answer]:
        """See `answerers.Answerer`."""
        with ThreadPoolExecutor(min(self._workers, max(len(rows), 1))) as pool:
            return list(pool.map(self._one, rows))

    def _one(self, row: Record) -> Answer:
        began = time.perf_counter()
        try:
            body = json.dumps(self._body(row)).encode()
            return self._read(self._post(body), time.perf_counter() - began)
        except (OSError, ValueError, TypeError, LookupError) as error:
            return Answer(error=f"{self.url}: {_reason(error)}", seconds=time.perf_counter() - began)

    def _body(self, row: Record) -> dict[str, Any]:
        if self._style == "rows":
            return {"row": dict(row)}
        require(isinstance(row.get(self._field), str), self._field, row.get(self._field), "must be a text")
        return {"temperature": 0, **self._options, "prompt": row[self._field]}

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
        request = urllib.request.Request(self.url, body, headers)
        try:
            with self._opener.open(request, timeout=self._timeout) as reply:
                return reply.read()
        except http.client.HTTPException as error:
            raise ConnectionError(f"the reply broke off: {type(error).__name__} {error}") from error

    def _read(self, reply: bytes, seconds: float) -> Answer:
        rows = self._style == "rows"
        try:
            content = json.loads(reply)
            output = content["output"] if rows else content["choices"][0]["text"]
        except (ValueError, TypeError, LookupError) as error:
            wanted = '"output"' if rows else "choices[0].text"
            raise ValueError(f"the reply has no {wanted}: {reply[:80]!r}") from error
        scores, cost = (content.get("scores"), content.get("cost")) if rows else (None, None)
        require(isinstance(scores, dict | None), "scores", scores, "must map names to numbers")
        numbers = {name: _number(f"scores.{name}", value) for name, value in (scores or {}).items()}
        cost = self._cost if cost is None else _number("cost", cost)
        require(NOT_NEGATIVE[0](cost), "cost", cost, NOT_NEGATIVE[1])
        return Answer(output, numbers, cost, seconds)


def _number(name: str, value: Any) -> float:
    try:
        number = float(value)
    except (ValueError, TypeError, OverflowError):
        number = math.nan
    require(math.isfinite(number), name, value, "must be a finite number")
    return number


def _reason(error: BaseException) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP status {error.code} {error.reason}"
    if isinstance(error, urllib.error.URLError):
        return str(error.reason)
    return str(error) or type(error).__name__


def opener() -> urllib.request.OpenerDirector:
    """What opens requests with a timeout, until which the last byte of the reply must have come.

    Redirects are errors: they would turn a POST into a GET.
    """
    return urllib.request.build_opener(_Http, _Https, _NoRedirects)


class _Bounded(io.RawIOBase):
    """A socket's bytes, of which each read may wait until the deadline and no longer."""

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


class _Reply(http.client.HTTPResponse):
    def __init__(self, sock: Any, *args: Any, deadline: float, **named: Any) -> None:
        super().__init__(sock, *args, **named)
        self.fp = io.BufferedReader(_Bounded(self.fp.detach(), sock, deadline))


class _Http(urllib.request.HTTPHandler):
    def do_open(self, http_class: Any, req: Any, **how: Any) -> Any:
        return super().do_open(_in_time(http_class), req, **how)


class _Https(urllib.request.HTTPSHandler):
    def do_open(self, http_class: Any, req: Any, **how: Any) -> Any:
        return super().do_open(_in_time(http_class), req, **how)


def _in_time(http_class: Callable[..., Any]) -> Any:
    """Makes connections whose time runs from when they are made."""

    def connection(*args: Any, timeout: float, **named: Any) -> Any:
        made = http_class(*args, timeout=timeout, **named)
        made.response_class = functools.partial(_Reply, deadline=time.monotonic() + timeout)
        return made

    return connection


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any) -> None:
        return None
