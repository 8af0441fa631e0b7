"""An OpenAI-compatible server as Swift and Super: what is asked, and the scores of its log-probabilities."""

import contextlib
import json
import math
import re
import threading
from collections.abc import Iterator

import numpy as np
import openai_server
import pytest

from elastic_lm.cascade.cascade import Cascade
from elastic_lm.cascade.completions import LEAST, choice_named, choose, text_scores, written_tokens
from elastic_lm.cascade.endpoint import Endpoint
from elastic_lm.cascade.function import Function

QUICK = {"timeout": 5.0, "backoff": 0.01, "retries": 0}
PATHS = {"openai": "/v1/completions", "chat": "/v1/chat/completions"}
TEXTS = [f"question {i}" for i in range(8)]


@contextlib.contextmanager
def served(**how) -> Iterator[str]:
    server = openai_server.server(0, **how)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def token(*likeliest: tuple[str, float], style: str = "chat"):
    """The only token of a reply, the first of these."""
    logs = [(text, math.log(p) if p else LEAST) for text, p in likeliest]
    if style == "openai":
        found = {"token_logprobs": [logs[0][1]], "top_logprobs": [dict(logs)]}
    else:
        top = [{"token": text, "logprob": value} for text, value in logs]
        found = {"content": [{**top[0], "top_logprobs": top}]}
    return written_tokens({"logprobs": found})[0]


@pytest.mark.parametrize("style", ["openai", "chat"])
def test_a_server_is_swift_and_super(style: str) -> None:
    records = [{"text": text} for text in TEXTS]
    with served() as url:
        swift = Endpoint(url + PATHS[style], style=style, top_logprobs=3, **QUICK)
        super_ = Endpoint(url + PATHS["chat"], style="chat", **QUICK)
        answers = swift.answer(records)
        results = Cascade(swift, super_, 0.65, score="max_prob").answer(records)
    expected = [openai_server.known(text) for text in TEXTS]
    assert [answer.output for answer in answers] == [word for word, _ in expected]
    for answer, (word, p) in zip(answers, expected, strict=True):
        logs = np.asarray([value for _, value in openai_server.first_token(word, p, 3)])
        shares = np.exp(logs)
        assert answer.scores["max_prob"] == pytest.approx(p)
        assert answer.scores["logprob_min"] == pytest.approx(math.log(p))
        assert answer.scores["first_margin"] == pytest.approx(shares[0] - shares[1])
        assert answer.scores["energy"] == pytest.approx(np.log(shares.sum()))
    kept = [p >= 0.65 for _, p in expected]
    assert [result.model == "swift" for result in results] == kept
    assert {*kept} == {True, False}
    assert all(
        result.error is None and result.answer.scores == {} for result in results if result.model == "super"
    )


def test_what_is_sent() -> None:
    options = {"model": "small", "max_tokens": 1}
    record = {
        "text": "Which?",
        "choices": ["red", "blue"],
        "messages": [{"role": "system", "content": "Hm."}],
    }
    how = {"options": options, "top_logprobs": 2}

    def body(style: str, **more) -> dict:
        return Endpoint("http://h/", style=style, **how, **more)._body(record)

    common = {"temperature": 0, **options}
    asked = {"logprobs": True, "top_logprobs": 2}
    assert body("openai") == {**common, "prompt": "Which?", "logprobs": 2}
    assert body("openai", choices="letters")["prompt"] == "Which?\nA. red\nB. blue\nAnswer:"
    assert body("openai", choices="texts")["prompt"] == "Which?"
    assert body("chat") == {**common, "messages": record["messages"], **asked}
    text = "Which?\nA. red\nB. blue\nAnswer with the letter alone."
    alone = body("chat", choices="letters", messages_field="none")
    assert alone == {**common, "messages": [{"role": "user", "content": text}], **asked}
    silent = Endpoint("http://h/", style="chat", messages_field="none")._body(record)
    assert silent == {"temperature": 0, "messages": [{"role": "user", "content": "Which?"}]}


def test_scores_of_a_text_are_pooled() -> None:
    tokens = [token(("a", 0.5), ("b", 0.25)), token(("c", 0.9), ("d", 0.0))]
    scores = text_scores(tokens)
    assert scores["logprob"] == pytest.approx((math.log(0.5) + math.log(0.9)) / 2)
    assert scores["logprob_min"] == scores["first_logprob"] == pytest.approx(math.log(0.5))
    assert scores["margin"] == pytest.approx((0.25 + 0.9) / 2)
    assert scores["energy_min"] == pytest.approx(math.log(0.75))
    half = -(0.5 * math.log(0.5) + 2 * 0.25 * math.log(0.25))
    assert scores["first_entropy"] == pytest.approx(1 - half / math.log(3))
    assert text_scores([token(("a", 0.5))]).keys() & {"margin", "max_prob"} == {"max_prob"}
    bare = written_tokens({"logprobs": {"token_logprobs": [None, -1.0]}})  # the first of an echoed prompt
    assert text_scores(bare) == {"logprob": -1.0, "logprob_min": -1.0, "first_logprob": -1.0}


@pytest.mark.parametrize("style", ["openai", "chat"])
def test_choices_by_their_first_tokens(style: str) -> None:
    first = token((" B", 0.4), ("A", 0.2), ("B.", 0.1), ("The", 0.1), style=style)
    index, scores = choose(first, ["x", "y", "z"], "letters")
    assert index == 1
    assert scores["max_prob"] == pytest.approx(5 / 7)
    assert scores["margin"] == pytest.approx(3 / 7)
    assert scores["energy"] == pytest.approx(math.log(0.7))
    p = np.asarray([5, 2]) / 7
    assert scores["entropy"] == pytest.approx(1 + (p * np.log(p)).sum() / math.log(3))
    texts = ["blue", "black", "red"]
    index, scores = choose(token((" bl", 0.2), (" re", 0.3), (" blue", 0.1)), texts, "texts")
    assert index == 2
    assert scores["energy"] == pytest.approx(math.log(0.4))
    with pytest.raises(ValueError, match=r"first tokens are 'I': none of them begins a choice"):
        choose(token(("I", 0.9)), texts, "letters")
    with pytest.raises(ValueError, match=r"first tokens are ' bl', 're': the likeliest ones begin several"):
        choose(token((" bl", 0.5), ("re", 0.3)), texts, "texts")


def test_choices_by_the_text_alone() -> None:
    choices = ["Because", "A dog", "cat "]
    assert [choice_named(text, choices) for text in (" B.", "A dog", "cat", "A", "B) so", "Cats")] == [
        1,
        1,
        2,
        0,
        1,
        "Cats",
    ]


@pytest.mark.parametrize(
    ("reply", "named"),
    [("(B)", 1), ("b", 1), ("**B**", 1), ("B\nfor the sky is blue", 1), ("[C]", 2), ("D: so", 3)],
)
def test_a_letter_names_a_choice(reply: str, named: int) -> None:
    assert choice_named(reply, ["w", "x", "y", "z"]) == named


@pytest.mark.parametrize("reply", ["A better answer is B", "I think B", "Because", "", "E."])
def test_a_sentence_names_none(reply: str) -> None:
    assert choice_named(reply, ["w", "x", "y", "z"]) == reply


def test_a_server_without_log_probabilities_is_named() -> None:
    with served(logprobs=False) as url:
        swift = Endpoint(url + PATHS["chat"], style="chat", top_logprobs=2, **QUICK)
        with pytest.raises(
            ValueError, match=r"http://127.*choices\[0\].logprobs: the server returns none; ask"
        ) as e:
            Cascade(swift, Function(lambda record: 1), 0.0, score="logprob").answer([{"text": "a"}])
        assert "\n" not in str(e.value)
        (fine,) = Endpoint(url + PATHS["chat"], style="chat", **QUICK).answer([{"text": "a"}])
    assert (fine.output, fine.scores) == (openai_server.known("a")[0], {})


def test_one_reply_without_them_is_the_error_of_its_record() -> None:
    endpoint = Endpoint("http://h/", style="chat", top_logprobs=1)
    good = openai_server.reply(
        "/chat/completions", {"messages": [{"content": "a"}], "logprobs": True, "top_logprobs": 1}
    )
    bad = {"choices": [{"message": {"content": "a"}, "logprobs": None}]}
    replies = iter([good, bad])
    endpoint._post = lambda body: json.dumps(next(replies)).encode()
    assert endpoint.answer([{"text": "a"}])[0].error is None
    assert "the server returns none" in str(endpoint.answer([{"text": "a"}])[0].error)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"message": {"content": None}}, "choices[0].message.content=None: must be a text"),
        ({"message": {"content": ""}}, "the reply='': is empty"),
        ({"message": {"content": "a"}, "logprobs": {"content": [3]}}, "the log-probabilities cannot be read"),
        (
            {"message": {"content": "a"}, "logprobs": {"content": [{"logprob": 2}]}},
            "must be a log-probability",
        ),
    ],
)
def test_replies_that_cannot_be_read(choice: dict, message: str) -> None:
    endpoint = Endpoint("http://h/", style="chat", top_logprobs=1)
    endpoint._post = lambda body: json.dumps({"choices": [choice]}).encode()
    assert message in str(endpoint.answer([{"text": "a"}])[0].error)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"top_logprobs": 2}, 'top_logprobs=2: is read in the styles "openai" and "chat"'),
        ({"choices": "letters"}, "choices='letters': is read in the styles"),
        ({"style": "chat", "choices": "texts"}, "choices='texts': is read from log-probabilities"),
        ({"style": "chat", "choices": "words"}, "choices='words': must be one of"),
        ({"style": "chat", "top_logprobs": -1}, "top_logprobs=-1: must be a whole number"),
    ],
)
def test_options_that_do_not_fit(how: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Endpoint("http://h/", **how)
