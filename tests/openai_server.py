"""A server of the OpenAI API whose replies are known: openai_server.py PORT [--answers FILE].

Chat and text completions with log-probabilities. Asked about a text it writes a word, of a probability that
follows from the text alone, or the word that a file has for it, so that every reply can be computed
beforehand. It may run as a process of its own, so that a cascade is killed beside it, or it beside a cascade.
"""

import argparse
import contextlib
import http.server
import json
import math
import threading
import time
import zlib
from pathlib import Path
from typing import Any

WORDS = ("no", "yes", "maybe", "never", "always")  # the likeliest tokens, in any order


def known(text: str) -> tuple[str, float]:
    """(what the model writes about a text, the probability of its first token)."""
    drawn = zlib.crc32(text.encode())
    return WORDS[drawn % 2], 0.35 + 0.6 * (drawn // 2 % 1000) / 1000


def first_token(word: str, p: float, count: int) -> list[tuple[str, float]]:
    """The `count` likeliest first tokens with their log-probabilities, the written one first."""
    others = [other for other in WORDS if other != word][: count - 1]
    return [(word, math.log(p)), *((one, math.log((1 - p) / 8) - i) for i, one in enumerate(others))]


def reply(
    path: str, body: dict[str, Any], logprobs: bool = True, answers: dict[str, str] | None = None
) -> dict[str, Any]:
    """What the server sends for a body; without `logprobs` it is one that returns none."""
    chat = path.endswith("/chat/completions")
    text = body["messages"][-1]["content"] if chat else body["prompt"]
    word, p = known(text)
    word = (answers or {}).get(text, word)
    count = body.get("top_logprobs", 0) if chat else body.get("logprobs") or 0
    likeliest = first_token(word, p, count) if count else []
    if chat:
        tokens = [{"token": one, "logprob": value} for one, value in likeliest]
        content = [{"token": word, "logprob": math.log(p), "top_logprobs": tokens}]
        told = {"content": content} if body.get("logprobs") and logprobs else None
        choice = {"index": 0, "message": {"role": "assistant", "content": word}, "logprobs": told}
    else:
        told = {"tokens": [word], "token_logprobs": [math.log(p)], "top_logprobs": [dict(likeliest)]}
        choice = {"index": 0, "text": word, "logprobs": told if count and logprobs else None}
    return {"object": "chat.completion" if chat else "text_completion", "choices": [choice]}


def server(
    port: int,
    *,
    slow: float = 0.0,
    logprobs: bool = True,
    log: Path | None = None,
    answers: dict[str, str] | None = None,
) -> Any:
    """A server on this machine that is ready to serve."""
    writing = threading.Lock()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            time.sleep(slow)
            content = json.dumps(reply(self.path, body, logprobs, answers)).encode()
            if log:
                with writing, log.open("a") as file:
                    file.write(json.dumps(body) + "\n")
            with contextlib.suppress(OSError):  # who asked may have been killed
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    return http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("port", type=int, help="0 = any; the chosen one is printed")
    parser.add_argument("--slow", type=float, default=0.0, help="seconds that a reply takes")
    parser.add_argument("--none", action="store_true", help="no log-probabilities are returned")
    parser.add_argument("--log", type=Path, help="where every body goes, a line each")
    parser.add_argument("--answers", type=Path, help="JSON: what it writes about a text, by text")
    given = parser.parse_args()
    words = json.loads(given.answers.read_text()) if given.answers else None
    made = server(given.port, slow=given.slow, logprobs=not given.none, log=given.log, answers=words)
    print(made.server_port, flush=True)
    made.serve_forever()
