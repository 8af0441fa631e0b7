"""A Super behind a real HTTP server on this machine: what is sent, retried, and reported."""

import contextlib
import http.server
import json
import socket
import threading
import time
from collections import Counter

import pytest

from elastic_lm.cascade.answerer import Answer
from elastic_lm.cascade.cascade import Cascade
from elastic_lm.cascade.endpoint import Endpoint
from elastic_lm.cascade.function import Function

QUICK = {"timeout": 5.0, "backoff": 0.01}


@contextlib.contextmanager
def served(reply):
    """A server that answers `reply(body, tries of this body so far)` -> (status, text)."""
    seen: Counter[str] = Counter()
    requests: list[tuple[dict, dict]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            raw = self.rfile.read(int(self.headers["Content-Length"])).decode()
            requests.append((json.loads(raw), dict(self.headers)))
            status, text = reply(json.loads(raw), seen[raw])
            seen[raw] += 1
            with contextlib.suppress(OSError):  # who asked may have gone
                self.send_response(status)
                self.end_headers()
                self.wfile.write(text.encode())

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/x", requests
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_records_and_their_answers() -> None:
    def reply(body: dict, tries: int) -> tuple[int, str]:
        return 200, json.dumps({"output": body["row"]["n"] + 1, "scores": {"energy": 2}, "cost": 7})

    with served(reply) as (url, requests):
        answers = Endpoint(url, headers={"Authorization": "Bearer key"}, **QUICK).answer([{"n": 1}, {"n": 2}])
    assert answers == [Answer(2, {"energy": 2.0}, 7.0), Answer(3, {"energy": 2.0}, 7.0)]
    assert all(headers["Authorization"] == "Bearer key" for _, headers in requests)


def test_completions() -> None:
    with served(lambda body, tries: (200, '{"choices": [{"text": " yes"}]}')) as (url, requests):
        options = {"model": "big", "max_tokens": 4}
        endpoint = Endpoint(url, style="openai", options=options, cost=5.0, **QUICK)
        good, bad = endpoint.answer([{"text": "Is it?"}, {"question": "?"}])
    assert good == Answer(" yes", cost=5.0)
    assert bad.error is not None
    assert "the record has no text under 'text'; found: question" in bad.error
    assert requests[0][0] == {"model": "big", "max_tokens": 4, "temperature": 0, "prompt": "Is it?"}


def test_what_may_pass_is_tried_again_and_what_is_refused_is_not() -> None:
    def reply(body: dict, tries: int) -> tuple[int, str]:
        n = body["row"]["n"]
        if n == 0:
            return 400, "no"
        return (503, "busy") if n == 2 or tries < 2 else (200, '{"output": 1}')

    with served(reply) as (url, requests):
        endpoint = Endpoint(url, workers=1, **QUICK)
        refused, late, never, once = endpoint.answer([{"n": n} for n in range(4)])
        assert endpoint.answer([{"n": 3}, {"n": 4}])[0].error  # still down: one try each
        assert endpoint.answer([{"n": 3}, {"n": 5}])[0].output == 1
    assert refused.error == f"{url}: HTTP status 400 Bad Request"
    assert late.output == 1
    assert never.error == f"{url}: no answer after 3 tries: HTTP status 503 Service Unavailable"
    assert once.error == f"{url}: no answer after 1 tries: HTTP status 503 Service Unavailable"
    tries = Counter(body["row"]["n"] for body, _ in requests)
    assert tries == {0: 1, 1: 3, 2: 3, 3: 3, 4: 1, 5: 3}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<html>", "no \"output\": b'<html>'"),
        ("{}", 'no "output"'),
        ('{"output": 1, "scores": {"energy": Infinity}}', "scores.energy=inf: must be a finite number"),
        ('{"output": 1, "scores": {"energy": null}}', "scores.energy=None: must be a finite number"),
        ('{"output": 1, "scores": [1]}', "scores=[1]: must map names to numbers"),
        ('{"output": NaN}', "output=nan: must be JSON"),
        ('{"output": {"a": [-Infinity]}}', "must be JSON, which has neither NaN nor infinity"),
        ('{"output": 1, "cost": -5}', "cost=-5.0: must be at least 0 and finite"),
        ('{"output": 1, "cost": 1%s}' % ("0" * 400), "must be a finite number"),
    ],
)
def test_replies_that_are_none(text: str, message: str) -> None:
    with served(lambda body, tries: (200, text)) as (url, _):
        assert message in str(Endpoint(url, **QUICK).answer([{}])[0].error)


def test_a_cost_of_null_is_none() -> None:
    with served(lambda body, tries: (200, '{"output": 1, "scores": null, "cost": null}')) as (url, _):
        assert Endpoint(url, cost=3.0, **QUICK).answer([{}]) == [Answer(1, cost=3.0)]


def test_a_record_is_not_sent_elsewhere() -> None:
    with served(lambda body, tries: (302, "")) as (url, requests):
        assert "HTTP status 302" in str(Endpoint(url, **QUICK).answer([{}])[0].error)
    assert len(requests) == 1


@pytest.mark.parametrize(
    "start", [b"HTTP/1.1 200 OK\r\nContent-Length: 200\r\n\r\n", b"HTTP/1.1 200 OK\r\nX: ", b""]
)
def test_a_reply_that_drips_is_given_up_in_time(start: bytes) -> None:
    def drip() -> None:
        with listener.accept()[0] as line, contextlib.suppress(OSError):
            line.sendall(start)
            for _ in range(100):
                line.sendall(b" ")
                time.sleep(0.02)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=drip, daemon=True).start()
        began = time.perf_counter()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
        answer = Endpoint(url, timeout=0.2, retries=0).answer([{}])[0]
        assert time.perf_counter() - began < 1.5
    assert "timed out" in str(answer.error)


def test_a_service_that_is_down_costs_no_more_than_it_must() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/"
    endpoint = Endpoint(url, retries=1, backoff=0.05)
    swift = Function(lambda record: Answer("swift", {"energy": float(record["n"] % 2)}))
    began = time.perf_counter()
    results = Cascade(swift, endpoint, 0.5).answer([{"n": n} for n in range(200)])
    assert time.perf_counter() - began < 5
    assert [r.output for r in results[1::2]] == ["swift"] * 100
    assert all(r.error and "refused" in r.error and r.fallback == "swift" for r in results[::2])


def test_a_service_that_fails_for_some_records_gets_the_others_right() -> None:
    def reply(body: dict, tries: int) -> tuple[int, str]:
        n = body["row"]["n"]
        return (422, "no") if n % 3 == 0 else (200, json.dumps({"output": f"super {n}"}))

    swift = Function(lambda record: Answer(f"swift {record['n']}", {"energy": float(record["n"] % 2)}))
    with served(reply) as (url, requests):
        results = Cascade(swift, Endpoint(url, **QUICK), 0.5, batch_size=8).answer(
            [{"n": n} for n in range(60)]
        )
    assert len(requests) == 30
    for n, result in enumerate(results):
        if n % 2:
            assert result.output == f"swift {n}"
        elif n % 3:
            assert result.output == f"super {n}"
        else:
            assert "422" in str(result.error)
            assert (result.output, result.fallback) == (None, f"swift {n}")


def test_a_service_that_hangs_is_given_up() -> None:
    def reply(body: dict, tries: int) -> tuple[int, str]:
        time.sleep(0.3)
        return 200, "{}"

    with served(reply) as (url, _):
        answer = Endpoint(url, timeout=0.05, retries=0).answer([{}])[0]
    assert "timed out" in str(answer.error)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"url": "localhost:1"}, "must begin with http"),
        ({"timeout": 0}, "timeout=0"),
        ({"retries": -1}, "retries=-1"),
        ({"retries": 1.5}, "retries=1.5: must be a whole number"),
        ({"max_bytes": 2.5}, "max_bytes=2.5: must be at least 1, .* and whole"),
        ({"url": "http://x/a b?key=hush"}, "url=http://...: must be like .*a space as %20$"),
        ({"url": "http://x/\n?key=hush"}, "url=http://...: must be like"),
        ({"url": "http://x/\u00e9"}, "url=http://...: must be like"),
        ({"url": " http://me:hush@x"}, "url='http://x': must begin|url=http://...: must be like"),
        ({"headers": {"A": "hush\n"}}, r"headers\['A'\]: must be one line of Latin-1 text"),
        ({"headers": {"A": "hush\u2026"}}, r"headers\['A'\]"),
        ({"headers": {"A:": "hush"}}, r"headers\['A:'\]"),
        ({"headers": {"A": b"hush"}}, r"headers\['A'\]"),
        ({"workers": 0}, "workers=0"),
        ({"style": "grpc"}, "style='grpc'"),
    ],
)
def test_endpoint_refuses(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        Endpoint(**{"url": "http://x", **change})
    assert "hush" not in str(refused.value)


def test_a_long_reply_is_not_read_to_its_end() -> None:
    def reply(body: dict, tries: int) -> tuple[int, str]:
        return 200, json.dumps({"output": "x" * body["row"]["n"]})

    with served(reply) as (url, requests):
        short, long = Endpoint(url, max_bytes=1000, **QUICK).answer([{"n": 900}, {"n": 10**6}])
    assert short.error is None
    assert long.error is not None
    assert "the reply's bytes='over 1000': is more than max_bytes=1000" in long.error
    assert len(requests) == 2  # it would be as long again


@pytest.mark.parametrize("reply", ["[" * 200_000, '{"output": ' + "[" * 500 + "]" * 500 + "}"])
def test_a_deep_reply_is_the_error_of_its_record(reply: str) -> None:
    with served(lambda body, tries: (200, reply)) as (url, _):
        (answer,) = Endpoint(url, **QUICK).answer([{"n": 1}])
    assert answer.error is not None
    assert 'the reply has no "output"' in answer.error


def test_a_deep_record_is_its_own_error() -> None:
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    (answer,) = Endpoint("http://127.0.0.1:9/x", **QUICK).answer([{"n": deep}])
    assert answer.error is not None


def test_a_password_is_sent_and_never_shown() -> None:
    with served(lambda body, tries: (200, '{"output": 1}')) as (url, requests):
        address = url.replace("http://", "http://me:se%40cret@")
        endpoint = Endpoint(f"{address}?api_key=hidden", **QUICK)
        (answer,) = endpoint.answer([{"n": 1}])
    assert answer.output == 1
    assert requests[0][1]["Authorization"] == "Basic bWU6c2VAY3JldA=="
    assert endpoint.url == f"{url}?api_key=***"

    (failed,) = Endpoint("http://me:secret@127.0.0.1:9/x", retries=0, **QUICK).answer([{"n": 1}])
    assert failed.error is not None
    assert "secret" not in failed.error
    for wrong in ("http://me:secret/x@host", "http://me:secret@", "ftp://me:secret@host"):
        with pytest.raises(ValueError, match="url=") as caught:
            Endpoint(wrong)
        assert "secret" not in str(caught.value)
