"""What 8-bit kernels do to a model's predictions on real text.

    python experiments/int8/quality.py MODEL_FOLDER TEXT.jsonl.gz --rows 4 --length 256

Prints nats per token in the file's dtype and in 8 bits, the Kullback-Leibler divergence between the two, how
often they agree on the likeliest token, and the bytes of both.
"""

import argparse
import gzip
import json

import jax
import jax.numpy as jnp
import numpy as np

import elastic_lm as el
from elastic_lm.cost.stored import step_bytes, stored_bytes


def main() -> None:
    """Reads the flags, and prints one line of JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    flags = parser.parse_args()

    tokenizer = el.data.Tokenizer.load(flags.model)
    with gzip.open(flags.text, "rt") as file:
        texts = [json.loads(line)["text"] for line in file]
    rows = [ids for ids in map(tokenizer.encode, texts) if len(ids) > flags.length][: flags.rows]
    tokens = jnp.asarray([ids[: flags.length + 1] for ids in rows], jnp.int32)

    found = {}
    for weights in (None, "int8"):
        model, params = el.load(flags.model, weights=weights)
        run = jax.jit(lambda params, row, model=model: model.apply({"params": params}, row[None, :-1]).logits)
        logits = [np.asarray(jax.nn.log_softmax(run(params, row))) for row in tokens]
        found[weights] = np.concatenate(logits)
        config = model.config
    wide, small = found[None], found["int8"]
    targets = np.asarray(tokens[:, 1:])[..., None]
    result = {
        "tokens": targets.size,
        "nats": {
            name or config.param_dtype: float(-np.mean(np.take_along_axis(log_p, targets, -1)))
            for name, log_p in found.items()
        },
        "kl": float(np.mean(np.sum(np.exp(wide) * (wide - small), axis=-1))),
        "agreement": float(np.mean(wide.argmax(-1) == small.argmax(-1))),
        "stored_bytes": [stored_bytes(config), stored_bytes(config, "int8")],
        "step_bytes": [step_bytes(config), step_bytes(config, "int8")],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
