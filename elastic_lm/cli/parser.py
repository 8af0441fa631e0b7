"""What can be typed after `elastic-lm`, and the help that teaches it."""

import argparse
import difflib
import functools
import inspect
from collections.abc import Sequence
from typing import Any, NoReturn

from elastic_lm.cli.cascade.flags import add_route

DESCRIPTION = """\
Pretrained language models whose compute is a dial.

  elastic-lm quickstart                 the whole story on a small model that comes with the package
  elastic-lm COMMAND --help             what a command does, with examples

A typical session on a model of your own:

  elastic-lm train --config configs/ee_tuning.py --config.train.init_from=hf-dir --workdir runs/exits
  elastic-lm calibrate --model runs/exits/model --data held_out.txt --target 0.99 --out thresholds.json
  elastic-lm generate --model runs/exits/model --thresholds thresholds.json --prompt "Once upon"
"""

GATELESS = "max_prob, margin, entropy, logit_margin, energy, cosine"
METRICS = f"{GATELESS}, learned (exits with gates)"

BUDGETS = ("latency_ms", "parameters", "flops", "memory_bytes")  # fields of `elastic.Budget`

EPILOG = "ELASTIC_LM_DEBUG=1 (or --debug after the command) shows where an error came from."


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line and suggest the closest option."""

    def __init__(self, **kwargs: Any) -> None:
        shape = functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=30, width=110)
        super().__init__(formatter_class=shape, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")

    def refuse(self, unknown: Sequence[str]) -> NoReturn:
        """Reports arguments that no option takes, with the closest known option."""
        near = difflib.get_close_matches(unknown[0].partition("=")[0], self._options(), n=1)
        hint = f": did you mean {near[0]}?" if near else ""
        self.error(f"unknown argument {unknown[0]}{hint}")

    def _options(self) -> list[str]:
        """Names of all options, those of sub-commands too."""
        own = [name for action in self._actions for name in action.option_strings]
        actions = [a for a in self._actions if isinstance(a, argparse._SubParsersAction)]
        return own + [name for a in actions for parser in a.choices.values() for name in parser._options()]


def build_parsers() -> tuple[Parser, dict[str, Parser]]:
    """The top parser and the parser of every command."""
    parser = Parser(prog="elastic-lm", description=DESCRIPTION, epilog=EPILOG)
    choices = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")
    commands: dict[str, Parser] = {}
    of_models = (_convert, _export, _train, _calibrate, _latency, _generate, _evaluate, _route)
    for add in (_quickstart, *of_models, _bench):
        name = add.__name__.lstrip("_")
        description = inspect.cleandoc(add.__doc__ or "")
        command = choices.add_parser(name, help=description.splitlines()[0], description=description)
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        add(command)
        commands[name] = command
    return parser, commands


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share like 0.99") from None
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a share between 0 and 1")
    return value


def _fractions(text: str) -> tuple[float, ...]:
    return tuple(_fraction(part) for part in text.split(","))


def _budget(text: str) -> dict[str, float]:
    kind, _, amount = text.partition("=")
    if kind not in BUDGETS:
        raise argparse.ArgumentTypeError(f"{text!r} is not KIND=AMOUNT, KIND one of {', '.join(BUDGETS)}")
    try:
        return {kind: float(amount)}
    except ValueError:
        raise argparse.ArgumentTypeError(f"{amount!r} in {text!r} is not a number") from None


def _layers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of layers like 3,6,9") from None


def _model(parser: Parser) -> None:
    text = "Hugging Face folder or elastic checkpoint (default: the embedded model)"
    parser.add_argument("--model", metavar="DIR", help=text)


def _data(parser: Parser, purpose: str) -> None:
    parser.add_argument(
        "--data",
        nargs="+",
        metavar="FILE",
        default=[],
        help=f"{purpose}: text files, folders or .jsonl with a `text` field (default: Python's own library)",
    )


def _quickstart(parser: Parser) -> None:
    """Main job end to end: exits attached, tuned, calibrated, and measured against full depth.

    elastic-lm quickstart                              a few minutes on two CPU cores
    elastic-lm quickstart --hf-dir my-model --data book.txt
    elastic-lm quickstart --from-scratch               pretrains the small model first

    Writes report.json, curve.png, text.html, the elastic checkpoint and thresholds files to --out.
    """
    add = parser.add_argument
    add("--out", default="runs/quickstart", metavar="DIR", help="results go here (default: %(default)s)")
    add("--hf-dir", metavar="DIR", help="your own Hugging Face checkpoint instead of the embedded model")
    _data(parser, "your own text")
    add("--from-scratch", action="store_true", help="pretrain the small model instead of loading it")
    add("--pretrain-steps", type=int, default=300, metavar="N", help="with --from-scratch (default: 300)")
    add(
        "--exits",
        type=_layers,
        metavar="L,L",
        help="layers with an exit (default: one, after three quarters of them)",
    )
    add("--kind", default="norm", help="exit kind: embedding, norm, mlp or block (default: %(default)s)")
    add("--steps", type=int, metavar="N", help="EE-tuning steps (default: 60)")
    add("--targets", type=_fractions, metavar="A,A", help="agreements (default: 0.9,0.95,0.98,0.99,0.995)")
    add("--metric", default="margin", help=f"confidence: {GATELESS} (default: %(default)s)")
    add("--seed", type=int, default=0, help="of exits, shuffles and sampling (default: 0)")
    add(
        "--tiny",
        action="store_true",
        help="under a minute: checks that everything works, numbers mean little",
    )
    _colour(parser)


def _convert(parser: Parser) -> None:
    """Hugging Face folder -> elastic checkpoint, tensor by tensor.

    elastic-lm convert --from hf-dir --to ckpt
    elastic-lm convert --from hf-dir --to ckpt --dtype bfloat16
    """
    parser.add_argument(
        "--from", dest="source", required=True, metavar="HF_DIR", help="config.json, *.safetensors"
    )
    parser.add_argument("--to", dest="target", required=True, metavar="DIR", help="new checkpoint folder")
    _dtype(parser, "default: float32 on CPU, elsewhere as stored")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier checkpoint at --to")


def _dtype(parser: Parser, help: str) -> None:
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help=help)


def _export(parser: Parser) -> None:
    """Elastic checkpoint -> Hugging Face folder that `transformers` and vLLM load.

    elastic-lm export --from runs/exits/model --to hf-dir
    elastic-lm export --from runs/x/model --to hf-dir --dtype bfloat16 --without-exits

    Exits go into a file of their own that `transformers` ignores; this package reads them back.
    """
    parser.add_argument("--from", dest="source", required=True, metavar="DIR", help="elastic checkpoint")
    parser.add_argument("--to", dest="target", required=True, metavar="HF_DIR", help="new folder")
    _dtype(parser, "of the stored weights (default: as in the checkpoint)")
    parser.add_argument("--without-exits", action="store_true", help="write the full-depth model only")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export at --to")


def _train(parser: Parser) -> None:
    """Pretrains a model or tunes exits, as a config says; run it again to resume.

    elastic-lm train --config configs/ee_tuning.py --workdir runs/exits
    elastic-lm train --config configs/embedded.py:tiny --workdir runs/tiny --config.train.lr=3e-4

    `--config path:argument` hands the argument to the file's get_config; every key of the config can be
    overridden with --config.section.key=value. Unknown keys are refused with a suggestion. The workdir
    holds checkpoints, metrics.jsonl and, at the end, model/.
    """
    parser.add_argument("--config", required=True, metavar="FILE[:ARG]", help="a file with get_config")
    parser.add_argument("--workdir", required=True, metavar="DIR", help="checkpoints and metrics go here")


def _calibrate(parser: Parser) -> None:
    """Finds the exits' thresholds for a target agreement with the full model, on held-out text.

    elastic-lm calibrate --model runs/exits/model --data held_out.txt --target 0.99 --out thresholds.json
    elastic-lm calibrate --model runs/exits/model --target 0.9 --epsilon 0.05 --seq-len 64 --tokens 100000
    elastic-lm calibrate --model runs/exits/model --forecast
    elastic-lm calibrate --model runs/exits/model --data own.jsonl   (from `generate --unprompted`)

    The file records model, data, metric, target and the measured curve. Use text that was not trained on.
    Without --epsilon the target is an average over the held-out text. With it, half of the held-out rows
    test that it holds for new text, except with this probability; many short rows serve this best.
    --forecast also predicts speed-ups at batch size 1, before anything is timed.
    """
    _model(parser)
    _data(parser, "held-out text")
    add = parser.add_argument
    add(
        "--target",
        type=_fraction,
        default=0.99,
        help="share of tokens equal to the full model's (default: 0.99)",
    )
    add("--metric", default="max_prob", help=f"confidence: {METRICS} (default: %(default)s)")
    add(
        "--strategy",
        choices=("joint", "max_coverage", "min_coverage", "midpoint", "platt"),
        default="joint",
        help="how thresholds are chosen: all exits jointly, or each by its own most confident tokens",
    )
    add("--epsilon", type=_fraction, metavar="P", help="guarantee the target except with this probability")
    add(
        "--delta",
        type=_fraction,
        metavar="S",
        help="with --epsilon: also guarantee that at most this share of rows is below the target",
    )
    add("--forecast", action="store_true", help="predict speed-ups and what looking at an exit costs")
    add("--window", type=int, default=16, metavar="W", help="of `generate`, for --forecast (default: 16)")
    add("--tokens", type=int, default=20_000, metavar="N", help="held-out tokens to read (default: 20000)")
    add("--seq-len", type=int, default=256, metavar="T", help="tokens per row (default: 256)")
    add("--out", default="thresholds.json", metavar="FILE", help="default: %(default)s")


def _latency(parser: Parser) -> None:
    """Measures what every module and choice of a menu takes on this device, or checks such a table.

    elastic-lm latency build --model ckpt --context 512 --out latency.json
    elastic-lm latency verify --model ckpt --table latency.json --json verify.json
    elastic-lm latency verify --json verify.json        builds a table first

    The prefill and decoding programs of sub-networks take turns with the full model's; costs of modules are
    fitted to their times. Without --model: a 12-layer Llama (d 768, vocabulary 32000) with random weights.
    A checkpoint of an elastic model brings its menu; --mlp, --heads and --groups choose others.
    verify times random sub-networks of the menu and prints predicted / measured.
    """
    add = parser.add_argument
    add("action", choices=("build", "verify"), metavar="build|verify")
    add("--model", metavar="DIR", help="Hugging Face folder or elastic checkpoint (default: random weights)")
    add("--table", metavar="FILE", help="verify: from `latency build` (default: build one first)")
    add("--out", metavar="FILE", help="the table that is built goes here (build: default latency.json)")
    add("--batch", type=int, metavar="N", help="sequences decoded together (default: 1)")
    add("--context", type=int, metavar="N", help="tokens of the prompt (default: 128)")
    add("--mlp", type=_fractions, metavar="S,S", help="shares of the neurons (default: 0.25,0.5,0.75,1)")
    heads = "shares of the heads in every key/value group (default: 0.5,1; 1 where halves are not whole)"
    add("--heads", type=_fractions, metavar="S,S", help=heads)
    groups = "shares of the key/value groups (default: 1; 0.5,1 where heads cannot be halved)"
    add("--groups", type=_fractions, metavar="S,S", help=groups)
    add("--subnets", type=int, metavar="N", help="verify: random sub-networks (default: 20)")
    add("--rounds", type=int, default=5, metavar="N", help="timed rounds per program (default: 5)")
    add("--seed", type=int, default=0, help="of prompts, random weights and sub-networks (default: 0)")
    add("--json", metavar="FILE", help="verify: write rows, sub-networks, hardware and versions here")
    add("--tiny", action="store_true", help="a model that only checks that everything works")


def _generate(parser: Parser) -> None:
    """Continues prompts; every token reports the depth that it needed.

    elastic-lm generate --prompt "def main():" --max-new-tokens 100 --stream
    elastic-lm generate --model ckpt --thresholds thresholds.json --prompts-file in.jsonl --json out.jsonl
    elastic-lm generate --model ckpt --thresholds thresholds.json --prompt "Once" --temperature 0.8
    elastic-lm generate --model ckpt --thresholds thresholds.json --prompt "Once" --lossless
    elastic-lm generate --model ckpt --unprompted 200 --temperature 1 --json own.jsonl
    elastic-lm generate --model ckpt --budget latency_ms=4 --latency-table latency.json --prompt "Once"

    A prompts file has one prompt per line, or JSON lines with a `prompt` field; its prompts run as one batch.
    Without --thresholds every token uses the full depth. --budget runs a sub-network of a model that was
    trained with configs/flextron.py.
    """
    _model(parser)
    add = parser.add_argument
    add("--prompt", action="append", default=[], metavar="TEXT", help="may be given several times")
    add("--prompts-file", metavar="FILE", help="one prompt per line, or .jsonl")
    add(
        "--unprompted",
        type=int,
        default=0,
        metavar="N",
        help="N texts from the model's first token on instead, as JSON lines, e.g. to calibrate on",
    )
    add("--max-new-tokens", type=int, default=64, metavar="N", help="default: %(default)s")
    add("--thresholds", metavar="FILE", help="from `calibrate` or `quickstart`")
    add("--threshold", type=float, metavar="C", help="one confidence for every exit instead (0 exits always)")
    add(
        "--metric",
        help=f"with --threshold: {METRICS} (default: max_prob)",
    )
    kinds = ", ".join(BUDGETS)
    add("--budget", type=_budget, metavar="KIND=N", help=f"what the model that runs may cost: {kinds}")
    add("--latency-table", metavar="FILE", help="with --budget latency_ms=N: from `latency build`")
    counted = "with --budget flops=N or memory_bytes=N: positions before the decoded token (default: 0)"
    add("--context", type=int, metavar="N", help=counted)
    add("--temperature", type=float, default=0.0, help="0 = always the likeliest token (default)")
    add("--top-k", type=int, default=0, metavar="K", help="0 = all (default)")
    add("--top-p", type=float, default=1.0, metavar="P", help="1 = all (default)")
    add("--min-p", type=float, default=0.0, metavar="P", help="relative to the likeliest; 0 = none (default)")
    add("--repetition-penalty", type=float, default=1.0, metavar="R", help="1 = none (default)")
    add("--seed", type=int, default=0, help="default: 0")
    add("--stop", action="append", default=[], metavar="TEXT", help="ends a text; may be given several times")
    add(
        "--window",
        type=int,
        default=16,
        metavar="W",
        help="tokens that may wait for their deep layers (default: 16)",
    )
    add("--fire-share", type=float, default=0.0, metavar="S", help="0 = latency, 1 = throughput (default: 0)")
    add("--lossless", action="store_true", help="early tokens are drafts, verified by the full model")
    add("--draft", type=int, metavar="K", help="with --lossless: drafts per verification (default: adapts)")
    add(
        "--missing",
        choices=("exact", "propagate"),
        default="exact",
        help="keys and values of early tokens in deeper layers: computed later, or CALM's approximation",
    )
    add("--stream", action="store_true", help="print while generating (one prompt)")
    add("--json", metavar="FILE", help="JSON lines: prompt, text, tokens, exit_layers, stats; - = stdout")
    _colour(parser)


def _evaluate(parser: Parser) -> None:
    """Perplexity of the full model and of every exit; with thresholds, agreement and mean depth.

    elastic-lm evaluate --model runs/exits/model --data test.txt
    elastic-lm evaluate --model runs/exits/model --thresholds thresholds.json --json result.json
    """
    _model(parser)
    _data(parser, "test text")
    add = parser.add_argument
    add("--thresholds", metavar="FILE", help="also measure this exit policy")
    add("--tokens", type=int, default=20_000, metavar="N", help="tokens to read (default: 20000)")
    add("--seq-len", type=int, default=256, metavar="T", help="tokens per row (default: 256)")
    add("--json", metavar="FILE", help="write the numbers here too; - = stdout only")


def _route(parser: Parser) -> None:
    """A small model answers rows, a large one those that the small one is not sure of.

    elastic-lm route fit --swift small --super large --data val.jsonl --super-accuracy --out rule.json
    elastic-lm route run --swift small --super large --rule rule.json --data in.jsonl --out out.jsonl

    Classifiers, encoder-decoders and decoders (text, or multiple choice where rows have choices); the Super
    may be a service behind HTTP.
    """
    add_route(parser, _fraction)


def _bench(parser: Parser) -> None:
    """Measures speed against what the hardware or a competitor allows.

    elastic-lm bench decode --json decode.json

    Sides of a comparison take turns in one process and medians are reported.
    """
    add = parser.add_argument
    add("name", metavar="NAME", help="a benchmark, e.g. decode")
    add("--json", metavar="FILE", help="write rows, hardware and versions here")
    add("--tiny", action="store_true", help="a model that only checks that the benchmark runs")
    add("--rounds", type=int, default=5, metavar="N", help="timed rounds per side (default: 5)")
    add("--seed", type=int, default=0, help="of weights and prompts (default: 0)")
    add("--model", default="", metavar="DIR", help="decode: also draft with the exits of this checkpoint")


def _colour(parser: Parser) -> None:
    choices = ("auto", "always", "never")
    parser.add_argument("--color", choices=choices, default="auto", help="text coloured by exit depth")
