"""Prompt lookup on a pretrained chat model: are all tokens those of full depth, and how much faster is it?

COMMAND   python experiments/real_model/lookup.py MODEL TEXT check --prompts 16 --json lookup.json
          python experiments/real_model/lookup.py MODEL TEXT time --prompts 4 --rounds 5 --json lookup.json
          python experiments/real_model/lookup.py MODEL TEXT show --json lookup.json
HARDWARE  a CPU; a quarter of an hour for `check`, five minutes for `time`; --kinds, --batches and
          --temperatures cut both into parts, which one JSON collects
EXPECTED  README.md

MODEL is a Hugging Face folder with its chat template in `chat_template.jinja` (read with the package jinja2),
TEXT raw WikiText. Prompts of four kinds come from the last third of the text: `repeat` a paragraph,
`summarise` it and `chat` about an article in the model's chat format, and `continue` a paragraph's first
tokens as plain text. A text ends where the model ends it, or after 64 tokens.

`check` compares every token with full depth's. `time` gives the speed relative to full depth: the median over
rounds of turns in one process, without the time of a one-token call; at batch B, B prompts are one call.
"""

import argparse
import functools
import itertools
import json
import re
import statistics
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy as np

import elastic_lm as el
from elastic_lm.bench.timing import interleave
from elastic_lm.decode.results import Sample
from elastic_lm.files.atomic import write_text_whole
from elastic_lm.report.machine import hardware, versions

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NEW = 64
CONTINUED = 64  # tokens of a text that is continued
PARAGRAPH = (350, 700)  # characters
ASK = {
    "repeat": "Repeat the following paragraph word for word.\n\n{paragraph}",
    "summarise": "Summarise the following paragraph in one or two sentences.\n\n{paragraph}",
    "chat": "What can you tell me about {title}?",
}
KINDS = ("repeat", "summarise", "continue", "chat")


def main() -> None:
    """Checks, times or shows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("part", choices=["check", "time", "show"])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=4, help="of each kind")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--temperatures", nargs="+", type=float, default=[0.0, 0.8])
    options = parser.parse_args()

    found = json.loads(options.json.read_text()) if options.json.exists() else {}
    if options.part == "show":
        show(found, options.json.with_suffix(".png"))
        return

    model, params = el.load(options.model)
    tokenizer = el.Tokenizer.load(options.model)
    samplers = {
        "full": el.Sampler(model, params),
        "lookup": el.Sampler(model, params, lossless=True, lookup=True),
    }
    by_kind = prompts(options.model, options.text, tokenizer, options.prompts)
    measure = check if options.part == "check" else functools.partial(compare, rounds=options.rounds)
    for batch, temperature, kind in itertools.product(options.batches, options.temperatures, options.kinds):
        name = f"batch {batch}, temperature {temperature:g}, {kind}"
        settings = {"temperature": temperature, "seed": 1} if temperature else {}
        rows = by_kind[kind]
        batches = [rows[i : i + batch] for i in range(0, len(rows), batch)]
        result = measure(samplers, batches, settings)
        found.setdefault(options.part, {})[name] = result
        print(name, result, flush=True)

        found |= {"hardware": hardware(), "versions": versions(), "new_tokens": NEW}
        write_text_whole(options.json, json.dumps(found, indent=1) + "\n")


def prompts(model: Path, text: Path, tokenizer: el.Tokenizer, count: int) -> dict[str, list[list[int]]]:
    """Token ids of `count` prompts of each kind, spread over the last third of a text."""
    template = jinja2.Template((model / "chat_template.jinja").read_text())
    lines = text.read_text().splitlines()
    lines = [plain(line) for line in lines[2 * len(lines) // 3 :]]

    titles = [match[1] for line in lines if (match := re.fullmatch(r"= ([^=]+) =", line))]
    paragraphs = [line for line in lines if PARAGRAPH[0] <= len(line) <= PARAGRAPH[1]]

    def spread(pieces: list[str], kind: int) -> list[str]:
        """Pieces at equal distances; other kinds of prompts get others."""
        return [pieces[(i * len(pieces) // count + kind) % len(pieces)] for i in range(count)]

    def chat(kind: str, **piece: str) -> list[int]:
        message = {"role": "user", "content": ASK[kind].format(**piece)}
        return tokenizer.encode(template.render(messages=[message], add_generation_prompt=True))

    return {
        "repeat": [chat("repeat", paragraph=p) for p in spread(paragraphs, 0)],
        "summarise": [chat("summarise", paragraph=p) for p in spread(paragraphs, 1)],
        "continue": [tokenizer.encode(p)[:CONTINUED] for p in spread(paragraphs, 2)],
        "chat": [chat("chat", title=t) for t in spread(titles, 0)],
    }


def plain(line: str) -> str:
    """A line of WikiText as people write it: without spaces around punctuation."""
    line = re.sub(r" @(.)@ ", r"\1", line.strip())
    line = re.sub(r" ([,.;:!?%)\]]|'s\b|n't\b)", r"\1", line)
    return re.sub(r"([(\[$]) ", r"\1", line)


def check(
    samplers: dict[str, el.Sampler], batches: list[list[list[int]]], settings: dict[str, Any]
) -> dict[str, Any]:
    """Tokens of all prompts, and how many of them differ."""
    tokens = differing = copied = verifications = 0
    for rows in batches:
        full, lookup = (sampler.sample(rows, NEW, **settings) for sampler in samplers.values())
        for one, other in zip(full, lookup, strict=True):
            tokens += len(one.tokens)
            longest = itertools.zip_longest(one.tokens, other.tokens)
            differing += sum(a != b for a, b in longest)
        copied += lookup[0].stats.copied
        verifications += lookup[0].stats.verifications
    return {"tokens": tokens, "differing": differing, "copied": copied, "verifications": verifications}


def compare(
    samplers: dict[str, el.Sampler],
    batches: list[list[list[int]]],
    settings: dict[str, Any],
    *,
    rounds: int,
) -> dict[str, Any]:
    """Speed relative to full depth of each batch, and the accepted tokens per verification."""
    speeds, accepted = [], []
    for rows in batches:

        def sample(name: str, count: int, rows: list[list[int]] = rows) -> list[Sample]:
            return samplers[name].sample(rows, count, **settings)

        first = interleave({name: functools.partial(sample, name, 1) for name in samplers}, 3)
        whole = interleave({name: functools.partial(sample, name, NEW) for name in samplers}, rounds)
        own = {name: np.asarray(whole[name]) - np.median(first[name]) for name in samplers}
        speeds.append(float(np.median(own["full"] / own["lookup"])))
        accepted.append(sample("lookup", NEW)[0].stats.accepted_per_verification)
    return {
        "speed": statistics.mean(speeds),
        "speeds": [round(speed, 3) for speed in speeds],
        "accepted_per_verification": [round(each, 2) for each in accepted],
    }


def show(found: dict[str, Any], png: Path) -> None:
    """Prints the tables and draws the speed of every prompt."""
    checked = found.get("check", {}).values()
    tokens, differing = (sum(part[field] for part in checked) for field in ("tokens", "differing"))
    print(f"{tokens} tokens compared, {differing} differ\n")

    timed = found.get("time", {})
    print("| prompts | mean | speed of each | accepted per verification |\n|---|---|---|---|")
    for name, result in timed.items():
        each = ", ".join(f"{speed:.2f}" for speed in result["speeds"])
        accepted = ", ".join(f"{a:.1f}" for a in result["accepted_per_verification"])
        print(f"| {name} | {result['speed']:.2f} | {each} | {accepted} |")

    _, axis = plt.subplots(figsize=(7, 0.4 * len(timed) + 1), layout="constrained")
    for row, result in enumerate(timed.values()):
        axis.plot(result["speeds"], [row] * len(result["speeds"]), "o", markersize=4, color="tab:blue")
        axis.plot([result["speed"]], [row], "|", markersize=14, color="tab:red")
    axis.axvline(1, color="0.6", linewidth=1)
    axis.set_yticks(range(len(timed)), list(timed))
    axis.invert_yaxis()
    axis.set(xlabel="speed relative to full depth: each call (dots), mean (bars)")
    plt.savefig(png, dpi=110)


if __name__ == "__main__":
    main()
