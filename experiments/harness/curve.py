"""Tasks at every exit of a real model, and of its sub-networks: accuracy against compute.

    python experiments/harness/curve.py --hf-dir SMOLLM2 --text wikitext2_raw_valid.txt --tasks-data FOLDER \\
        --out runs/harness_curve --tasks arc_easy piqa lambada_openai --limit 500

Exits after `--layers` are fitted in closed form on the text (`el.depth.fit_exits`, `kind="linear"`), in one
pass and one solve each; nothing is trained. The model with its exits lies in OUT/model afterwards, and
`elastic-lm evaluate --tasks` measures it: every question is read once for all depths.
"""

import argparse
import json
from pathlib import Path

import jax
import numpy as np

import elastic_lm as el
from elastic_lm.checkpoints.native import save_model
from elastic_lm.cli import main as command

ROWS, SEQ_LEN = 4, 256


def batches(tokenizer: el.Tokenizer, text: str, tokens: int) -> list[el.data.Batch]:
    """The beginning of a text in packed rows."""
    ids = tokenizer.encode(Path(text).read_text()[: 8 * tokens])[:tokens]
    count = (len(ids) - 1) // SEQ_LEN // ROWS * ROWS
    arrays = np.asarray(ids[: count * SEQ_LEN + 1], np.int32)
    rows = arrays[:-1].reshape(-1, ROWS, SEQ_LEN), arrays[1:].reshape(-1, ROWS, SEQ_LEN)
    ones = np.ones((ROWS, SEQ_LEN), np.int32)
    return [
        el.data.Batch(own, following, 1.0 * ones, np.cumsum(ones, 1) - 1, ones)  # pyright: ignore
        for own, following in zip(*rows, strict=True)
    ]


def model_with_exits(flags: argparse.Namespace, folder: Path) -> None:
    """Fits the exits and saves the model."""
    model, params = el.load(flags.hf_dir, dtype="float32")
    tokenizer = el.Tokenizer.load(flags.hf_dir)
    exits = tuple(el.ExitConfig(layer, kind="linear", tied=True, init="fit") for layer in flags.layers)
    config, params = el.attach_exits(model.config, params, exits, jax.random.key(0))
    params = el.depth.fit_exits(config, params, batches(tokenizer, flags.text, flags.tokens))
    save_model(folder, config, params, tokenizer)


def main() -> None:
    """Fits, measures and draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--hf-dir", required=True)
    parser.add_argument("--text", required=True, help="that exits are fitted on")
    parser.add_argument("--tasks-data", required=True)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--tasks", nargs="+", default=["arc_easy", "piqa", "lambada_openai"])
    parser.add_argument("--layers", type=int, nargs="+", default=[10, 14, 18, 22, 26])
    parser.add_argument("--tokens", type=int, default=32_768, help="of the text")
    parser.add_argument("--limit", type=int, default=500)
    parser.add_argument("more", nargs="*", help="further flags of `elastic-lm evaluate`, after --")
    flags = parser.parse_args()

    folder = flags.out / "model"
    if not folder.is_dir():
        flags.out.mkdir(parents=True, exist_ok=True)
        model_with_exits(flags, folder)
    files = ["--json", str(flags.out / "curve.json"), "--plot", str(flags.out / "curve.png")]
    asked = ["--tasks", ",".join(flags.tasks), "--tasks-data", flags.tasks_data, "--limit", str(flags.limit)]
    status = command.main(["evaluate", "--model", str(folder), *asked, *files, *flags.more])
    if status:
        raise SystemExit(status)
    found = json.loads((flags.out / "curve.json").read_text())
    found |= {"layers": flags.layers, "fitted_on": f"{Path(flags.text).name}, {flags.tokens} tokens"}
    (flags.out / "curve.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
