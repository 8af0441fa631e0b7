"""A cascade of three members over many records, fitted, guaranteed, killed and resumed.

    python tests/killed_chain.py --folder /tmp/chain [--records 2000] [--kills 6]

The first two members are an exit of a small encoder and the whole of it, tuned here on a made-up task. The
last is a server of chat completions, a process that listens on a port. `elastic-lm cascade fit` and `run` are
killed (SIGKILL) while the server is slow and while it is down, and the server itself is killed and comes
back. What the last run leaves is what a run that nobody killed leaves.
"""

import argparse
import contextlib
import json
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import openai_server
import optax

import elastic_lm as el
from elastic_lm.cascade.classifier import classify
from elastic_lm.cascade.joint_rule import JointRule
from elastic_lm.cascade.scores import PLAIN
from elastic_lm.checkpoints.native import save_model
from elastic_lm.config.encoder import EncoderConfig
from elastic_lm.data.padding import padded
from elastic_lm.data.tokenizer import Tokenizer, train_bpe
from elastic_lm.files.journal import read_records
from elastic_lm.models.task_heads import exit_encoder

GOOD, BAD, FILL = (
    ("good", "fine", "great"),
    ("bad", "poor", "awful"),
    ("film", "the", "was", "it", "so", "plot"),
)
LABELS = ("no", "yes")
COLUMNS = 16
STATES = ("well", "slow", "down")  # of the server while a run is killed
DEADLINE = 1800.0  # seconds for one process; far above what it takes


def drawn(count: int, seed: int, hard: float = 0.4) -> list[dict[str, Any]]:
    """Records of words that say yes or no; in hard ones "not" turns what comes after it, not before."""
    rng, records = random.Random(seed), []
    while len(records) < count:
        words = rng.choices(FILL, k=rng.randint(2, 8))
        good = rng.random() < 0.5
        place = rng.randint(0, len(words))
        words.insert(place, rng.choice(GOOD if good else BAD))
        turned = False
        if rng.random() < hard:
            cut = rng.randint(0, len(words))
            words.insert(cut, "not")
            turned = cut <= place
        label = LABELS[good != turned]
        if rng.random() < 0.04:  # what nobody can tell from the words
            label = LABELS[1 - LABELS.index(label)]
        text = " ".join([*words, str(len(records))])
        records.append({"text": text, "label": label, "kind": "turned" if turned else "plain"})
    return records


def tuned(folder: Path, steps: int) -> None:
    """Saves an encoder with an exit after the first of its layers, tuned on the task."""
    records = drawn(4000, seed=1)
    tokenizer = train_bpe([record["text"] for record in records], 320)
    shape: dict[str, Any] = {"d_model": 32, "n_layers": 3, "n_heads": 4, "d_mlp": 64, "max_len": 32}
    config = EncoderConfig(vocab_size=320, **shape, n_labels=2, labels=LABELS, exits=(1,))
    params = el.init_params(config, jax.random.key(0))
    rows = [encoded(tokenizer, record) for record in records]

    def loss(params, tokens, mask, labels):
        total = 0.0
        for own, part in ((config, params), exit_encoder(config, params, 1)):
            logits = classify(own, part, tokens, mask, jnp.zeros_like(tokens), scoring=PLAIN).logits
            total += jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))
        return total

    optimizer = optax.adam(3e-3)

    @jax.jit
    def step(params, state, *batch):
        value, grads = jax.value_and_grad(loss)(params, *batch)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state, value

    rng, state = np.random.default_rng(0), optimizer.init(params)
    for _ in range(steps):
        chosen = [rows[i] for i in rng.integers(0, len(rows), 64)]
        tokens = padded([ids for ids, _ in chosen], 64, COLUMNS)
        mask = padded([[1] * len(ids) for ids, _ in chosen], 64, COLUMNS).astype(bool)
        params, state, value = step(params, state, tokens, mask, np.asarray([label for _, label in chosen]))
    print(f"the encoder is tuned: loss {float(value):.3f} of exit and whole together", flush=True)
    save_model(folder, config, params, tokenizer)


def encoded(tokenizer: Tokenizer, record: dict[str, Any]) -> tuple[list[int], int]:
    ids, _ = tokenizer.encode_pair(record["text"], None, max_len=COLUMNS)
    return ids, LABELS.index(record["label"])


class Server:
    """The last member, a process that can be slow, killed and started again."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder, folder / "requests.jsonl"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.process: subprocess.Popen | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1/chat/completions"

    def start(self, slow: float = 0.0) -> None:
        words = ("--answers", str(self.folder / "answers.json"), "--log", str(self.log), "--slow", str(slow))
        command = [sys.executable, openai_server.__file__, str(self.port), *words]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert self.process.stdout is not None
        assert int(self.process.stdout.readline()) == self.port

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.communicate()
        self.process = None

    def asked(self) -> Counter[str]:
        """How often each text was asked about."""
        if not self.log.exists():
            return Counter()
        return Counter(
            json.loads(line)["messages"][-1]["content"] for line in self.log.read_text().splitlines()
        )


@contextlib.contextmanager
def served(folder: Path) -> Iterator[Server]:
    server = Server(folder)
    try:
        server.start()
        yield server
    finally:
        if server.process:
            server.kill()


def whole_lines(place: Path) -> int:
    """Lines of the file, or of the one file that a pattern fits; 0 = there is none yet."""
    found = list(place.parent.glob(place.name))
    return found[0].read_bytes().count(b"\n") if found else 0


def killed_at(command: list[str], out: Path, lines: int) -> int | None:
    """Kills a command once so many lines are there, and counts them; None = it had ended before."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    began = time.monotonic()
    while process.poll() is None and whole_lines(out) < lines and time.monotonic() - began < DEADLINE:
        time.sleep(0.002)
    process.kill()
    process.communicate()
    return whole_lines(out) if process.returncode == -signal.SIGKILL else None


def finish(command: list[str]) -> tuple[str, str]:
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, done.stderr


def run(folder: Path, records: int = 2000, kills: int = 6, steps: int = 400, seed: int = 0) -> dict[str, Any]:
    """Fits, kills and resumes.

    Args:
      folder: an empty one.
      records: labelled ones that are fitted on, and as many others that are answered.
      kills: of `cascade run`; `cascade fit` is killed twice.
      steps: of tuning.
      seed: of the moments.

    Returns:
      What was found, by name.
    """
    chance = random.Random(seed)
    tuned(folder / "model", steps)
    sets = {"fit": drawn(records, seed=2), "run": drawn(records, seed=3)}
    for name, own in sets.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in own))
    truth = {record["text"]: record["label"] for own in sets.values() for record in own}
    # The server is right about 97 of 100 texts.
    said = {
        text: word if chance.random() < 0.97 else LABELS[1 - LABELS.index(word)]
        for text, word in truth.items()
    }
    (folder / "answers.json").write_text(json.dumps(said))

    with served(folder) as server:
        members = ["--swift", f"{folder}/model@exit=1", "--between", f"{folder}/model", "--super", server.url]
        command = [sys.executable, "-m", "elastic_lm", "cascade"]
        common = [*members, "--style", "chat", "--super-cost", "1e9", "--batch-size", "16", "--retries", "0"]
        rule = folder / "rule.json"
        goal = ["--risk", "0.05", "--epsilon", "0.05", "--slice-by", "kind", "--out", str(rule)]
        fit = [*command, "fit", *common, "--data", f"{folder}/fit.jsonl", *goal]
        told = {"fit": fitted(fit, folder, server, records)}
        print(told["fit"].pop("table"), flush=True)
        found = JointRule.load(rule)
        assert found.guarantee is not None
        assert found.guarantee.achieved

        asked = server.asked()
        answer = [*command, "run", *common, "--data", f"{folder}/run.jsonl", "--rule", str(rule)]
        straight, out = folder / "straight.jsonl", folder / "out" / "out.jsonl"
        out.parent.mkdir()
        print(finish([*answer, "--out", str(straight)])[0], flush=True)
        told["run"] = killed_run([*answer, "--out", str(out)], out, server, records, kills, chance)
        told["run"]["equal to the bit"] = out.read_bytes() == straight.read_bytes()
        assert same(list(read_records(out)), list(read_records(straight)))
        assert {path.name for path in out.parent.iterdir()} == {"out.jsonl", "out.jsonl.run.json"}
        told["run"]["requests"] = sum((server.asked() - asked).values())

    lines = list(read_records(out))
    assert [line["index"] for line in lines] == list(range(records))
    right = [line["output"] == record["label"] for line, record in zip(lines, sets["run"], strict=True)]
    of_server = [said[record["text"]] == record["label"] for record in sets["run"]]
    told["run"] |= {
        "answered by": dict(Counter(line["model"] for line in lines)),
        "accuracy": float(np.mean(right)),
        "accuracy of the server alone": float(np.mean(of_server)),
        "requests of a run that nobody kills": sum(line["model"] == "super" for line in lines),
        "allowed loss": found.guarantee.loss,
    }
    assert np.mean(of_server) - np.mean(right) <= found.guarantee.loss
    return told


def fitted(command: list[str], folder: Path, server: Server, records: int) -> dict[str, Any]:
    """Kills a fit twice, and lets it end; what is in its file is not asked again."""
    answers = folder / "rule.answers-*.jsonl"
    there = [killed_at(command, answers, int(share * records)) for share in (0.3, 0.7)]
    table, errors = finish(command)
    assert f"{there[1]} of {records} records are there already" in errors
    twice = sum(server.asked().values()) - records
    return {"kills at": there, "table": table, "asked again, as in flight when killed": twice}


def killed_run(
    command: list[str], out: Path, server: Server, records: int, kills: int, chance: random.Random
) -> dict[str, Any]:
    """Kills a run again and again, with the server slow, down and back, and lets it end."""
    killed: list[tuple[str, int]] = []
    for number in range(kills):
        done, state = whole_lines(out), STATES[number % len(STATES)]
        server.kill()
        if state != "down":
            server.start(slow=0.1 if state == "slow" else 0.01)
        aim = done + max(1, int((records - done) * chance.uniform(0.1, 0.3)))
        found = killed_at(command, out, aim)
        if state == "down":
            server.start()
        if found is None:
            break
        assert found >= done, "a line was lost"
        assert [line["index"] for line in read_records(out)] == list(range(found))
        killed.append((state, found))

    finish(command)
    failed = [line["index"] for line in read_records(out) if "error" in line]
    if failed:
        _, again = finish([*command, "--retry-failed"])
        assert f"{len(failed)} records had failed, 0 of them are without an answer still" in again
    return {
        "kills, the server and the lines that were there": killed,
        "failed while it was down": len(failed),
    }


def same(lines: list[dict[str, Any]], others: list[dict[str, Any]]) -> bool:
    """Whether two outputs say the same; scores may differ by the rounding of other batches."""
    near = all(
        np.isclose(a.pop("score"), b.pop("score"), atol=1e-5) for a, b in zip(lines, others, strict=True)
    )
    return near and lines == others


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="a new folder")
    parser.add_argument("--records", type=int, default=2000)
    parser.add_argument("--kills", type=int, default=6)
    parser.add_argument("--steps", type=int, default=400)
    given = parser.parse_args()
    given.folder.mkdir(parents=True)
    print(json.dumps(run(given.folder, given.records, given.kills, given.steps), indent=2))
