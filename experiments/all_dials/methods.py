"""Five methods and their combinations on one pretrained model, at equal tokens, against measured time.

COMMAND   python experiments/all_dials/methods.py --model SMOLLM2 --data data/english --eval DATA/eval \\
              --trivia DATA/text --out runs/all_dials
HARDWARE  two CPU cores
DURATION  README.md; every cell is kept, `--resume` goes on
EXPECTED  README.md beside this file

The model is ranked and gets exits in closed form (`study.base`), which changes nothing that it computes: all
dials in one checkpoint. Parts, in the order in which they run:

    forward   nothing trains: exits copied and in closed form, sub-networks (half or three quarters of the
              neurons, layers left out), exits of sub-networks; loss and agreement on held-out instructions
              (Alpaca, as in Sorted LLaMA)
    search    sub-networks that a knapsack chooses layer by layer for what two of these cost
    time      milliseconds per token of everything that decodes differently, in turns in one process
    train     ee_tuning, self_supervised, soft, joint (LayerSkip's recipe with self-distillation), elastic
              (Flextron's first stage), and plain fine-tuning as the control: the same number of tokens each,
              --steps of AdamW, three seeds (of the order of the text)
    combine   closed forms on top of what was trained (seed 0): exits of soft, and of the elastic model's
              sub-network
    tasks     multiple choice at every depth (`MultipleChoice`, per byte), of the base and of seed 0
    trivia    TriviaQA, exact match, three examples in the prompt, of the base and of seed 0

Agreement is with the untrained whole model. Full depth of a model that trained on 4,000 tokens of the very
kind of text that it is tested on is another model; its own loss says whether that is good or bad.
"""

import argparse
import functools
import gzip
import itertools
import json
import re
import string
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import matplotlib
import numpy as np
from study import (
    Cells,
    Model,
    Record,
    Seen,
    base,
    batches,
    begin,
    by_depth,
    calibrated,
    copied_exits,
    exit_layers,
    fitted_exits,
    held_out_records,
    look,
    markdown,
    parser,
    records,
    spread,
    train,
)

import elastic_lm as el
from elastic_lm.cascade import MultipleChoice
from elastic_lm.checkpoints.loading import load_decoder
from elastic_lm.checkpoints.native import save_model
from elastic_lm.models.decoder import Decoder, stack_layers
from elastic_lm.quickstart import measure
from elastic_lm.train.pretraining import Pretraining
from elastic_lm.width.switched import MenuIndices

matplotlib.use("Agg")
PARTS = ("forward", "search", "time", "train", "combine", "tasks", "trivia")
ARMS = ("ee_tuning", "self_supervised", "soft", "joint", "elastic", "plain")
MENU = el.Menu(mlp=(0.5, 0.75, 1.0), heads=(1.0,))  # of elastic training
SEARCHED = (0.25, 0.5, 1.0)  # widths of MLPs that the knapsack chooses from
DROPPED = (3, 6)  # layers left out, of 30
TASKS = ("arc_easy_val", "piqa_val")
WINDOW = 16


def main() -> None:
    """Runs the parts; rewrites methods.json after every cell, then prints the tables and draws."""
    args = parse()
    out = begin(args)
    if args.tiny:
        args.steps, args.new_tokens, args.rounds, args.prompts = 2, 6, 1, 1
        args.task_rows, args.trained_rows, args.trivia_rows = 4, 4, 4
    cells = Cells(out / "methods.json", args)
    study = Study(args, out, cells)
    for part in args.parts:
        getattr(study, part)()
    print(tables(cells.found))
    plot(cells.found, out / "methods.png")


def parse() -> argparse.Namespace:
    """Command line."""
    found = parser(__doc__, "runs/all_dials")
    found.add_argument("--trivia", default="data/text", help="folder with triviaqa_dpr_test.jsonl.gz and dev")
    found.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    found.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    found.add_argument("--steps", type=int, default=8)
    found.add_argument("--lr", type=float, default=1e-4, help="of the layers; exits learn ten times as fast")
    found.add_argument("--prompts", type=int, default=3, help="that are timed")
    found.add_argument("--timed", nargs="*", default=[], help="names of the table; none = everything")
    found.add_argument("--new-tokens", type=int, default=48)
    found.add_argument("--rounds", type=int, default=5)
    found.add_argument("--task-rows", type=int, default=200, help="of each task, for the base")
    found.add_argument(
        "--trained-rows", type=int, default=100, help="the first of them, for what was trained"
    )
    found.add_argument("--trivia-rows", type=int, default=64)
    return found.parse_args()


class Study:
    """The parts of the study, on one base."""

    def __init__(self, args: argparse.Namespace, out: Path, cells: Cells) -> None:
        self.args, self.out, self.cells = args, out, cells
        self.model, self.tokenizer = base(args, out)
        self.plain = el.depth.without_exits(*self.model)
        self.layers = exit_layers(self.model[0].n_layers)
        self.held_out = list(batches(args, self.tokenizer, "held_out"))

    @functools.cached_property
    def fitting(self) -> list[el.data.Batch]:
        """What closed forms are fitted on."""
        text = batches(self.args, self.tokenizer, "train", seed=100)
        return list(itertools.islice(text, self.args.fit_batches))

    @functools.cached_property
    def seen(self) -> Seen:
        """The base on held-out text, kept in OUT/seen.npz."""
        return base_seen(self.out, self.model, self.held_out)

    @property
    def reference(self) -> np.ndarray:
        """The untrained whole model's tokens."""
        return self.seen.choice[:, -1]

    def report(self, model: Model, exits: bool = True) -> Record:
        """Every depth, and all exits together where there are some."""
        seen = look(model, self.held_out)
        found: Record = {"depths": by_depth(seen, self.reference)}
        return found | ({"calibrated": calibrated(seen, self.reference)} if exits else {})

    # ------------------------------------------------------------------ nothing trains

    def forward(self) -> None:
        """Exits and sub-networks of the model as it is."""
        got = self.cells.get
        got(
            "forward/exits in closed form",
            lambda: {
                "depths": by_depth(self.seen, self.reference),
                "calibrated": calibrated(self.seen, self.reference),
            },
        )
        got("forward/exits copied", lambda: self.report(copied_exits(self.plain)))
        for name, subnet in self.subnets().items():
            small = el.slice_params(*self.plain, subnet)
            got(f"forward/{name}", lambda small=small: self.report(small, exits=False) | self.size(small))
        for name in self.with_exits():
            got(f"forward/{name} x exits", lambda name=name: self.report(self.small_with_exits(name)))

    def size(self, small: Model) -> Record:
        """Parameters, the whole model's being 1."""
        count = [sum(leaf.size for leaf in jax.tree.leaves(params)) for params in (small[1], self.plain[1])]
        return {"parameters": count[0] / count[1]}

    def subnets(self) -> dict[str, el.Subnet]:
        """The sub-networks that are looked at."""
        config = self.plain[0]
        scores = np.asarray(self.cells.get("layer scores", self.layer_scores))
        found = {f"mlp {share}": el.Subnet.uniform(config, mlp=share) for share in (0.75, 0.5)}
        for of_30 in DROPPED:
            count = max(1, round(of_30 * config.n_layers / 30))
            lost = set(np.argsort(scores)[:count].tolist())
            kept = [i for i in range(config.n_layers) if i not in lost]
            found[f"without {count} layers"] = el.Subnet.uniform(config, layers=kept)
        for name, subnet in self.cells.found.get("knapsack", {"value": {}})["value"].items():
            found[name] = el.Subnet(**{k: v if k == "d_model" else tuple(v) for k, v in subnet.items()})
        return found

    def search(self) -> None:
        """Sub-networks that a knapsack chooses layer by layer."""
        scores = np.asarray(self.cells.get("layer scores", self.layer_scores))
        self.cells.get("knapsack", lambda: self.knapsacks(scores, self.subnets()))
        self.forward()

    def layer_scores(self) -> list[float]:
        """What the logits change without each layer, on one row of training text."""
        return el.width.layer_scores(*self.plain, [self.one_row]).tolist()

    @property
    def one_row(self) -> el.data.Batch:
        """Training text that layers and neurons are compared on, again and again."""
        return jax.tree.map(lambda x: x[:1], self.fitting[0])

    def knapsacks(self, scores: np.ndarray, uniform: dict[str, el.Subnet]) -> dict[str, Record]:
        """The best sum of measured damages for what two of the uniform ones cost."""
        config, params = self.plain
        dropped = tuple(np.argsort(scores)[: max(1, round(DROPPED[-1] * config.n_layers / 30))].tolist())
        menu = el.Menu(mlp=SEARCHED, heads=(1.0,), dropped=dropped)
        method = el.width.ElasticTraining(config, menu=menu)
        stacked, text = stack_layers(params), self.one_row
        sums = jax.jit(lambda params, choice: method.token_sums(params, choice, text))

        def loss(subnet: el.Subnet) -> float:
            found = jax.device_get(sums(stacked, MenuIndices.of(config, menu, subnet)))
            return float(found.cross_entropy / found.weight)

        damage = el.width.measured_damage(config, menu, loss)
        table = el.width.counted_table(config, menu, "parameters")
        dense = el.Menu(mlp=(0.75, 1.0), heads=(1.0,), dropped=dropped)
        costs = el.width.counted_table(config, dense, "parameters")
        found = {}
        for name in ("mlp 0.75", next(n for n in uniform if n.startswith("without"))):
            budget = el.Budget(parameters=costs.total(config, dense, uniform[name]) * (1 + 1e-6))
            chosen = el.width.knapsack(config, menu, table, budget, damage)
            found[f"knapsack at {name}"] = vars(chosen)
        return found

    def with_exits(self) -> list[str]:
        """Sub-networks that get exits of their own."""
        names = list(self.subnets())
        return [next(n for n in names if n.startswith("without"))]

    def small_with_exits(self, name: str) -> Model:
        """A sub-network with exits in closed form, fitted to the sub-network itself."""
        small = el.slice_params(*self.plain, self.subnets()[name])
        return fitted_exits(small, exit_layers(small[0].n_layers), self.fitting)

    # ------------------------------------------------------------------ time

    def time(self) -> None:
        """Everything that decodes differently takes turns."""
        self.cells.get("time", self.timed)

    def timed(self) -> Record:
        made = {name: make() for name, make in self.samplers().items() if self.wanted(name)}
        found = measure.generate(made, prompts_of_one_bucket(self), self.args.new_tokens, self.args.rounds)
        full = found["full depth"]
        return {
            name: {
                "ms": 1000 / one.tokens_per_s,
                "relative": 1 / one.speedup(full),
                "spread": one.spread(full) / one.speedup(full) ** 2,
                "mean_layers": one.mean_layers,
                "tokens_per_pass": one.tokens_per_pass,
            }
            for name, one in found.items()
        }

    def wanted(self, name: str) -> bool:
        """Whether something is timed."""
        return not self.args.timed or name == "full depth" or name in self.args.timed

    def samplers(self) -> dict[str, Callable[[], el.Sampler]]:
        """What makes each sampler, by what it is called in the tables."""
        whole, few = self.plain, self.with_exits()

        def of(model: Model, **options: Any) -> Callable[[], el.Sampler]:
            return lambda: el.Sampler(Decoder(model[0]), model[1], window=WINDOW, **options)

        def small(name: str, target: float | None = None, **options: Any) -> Callable[[], el.Sampler]:
            def make() -> el.Sampler:
                if target is None:
                    return of(el.slice_params(*whole, self.subnets()[name]), **options)()
                model = self.small_with_exits(name)
                layers = [e.layer for e in model[0].exits]
                return of(model, exit=self.policy(f"{name} x exits", target, layers), **options)()

            return make

        lookup = {"lossless": True, "lookup": True}
        own = "exits in closed form"
        found = {"full depth": of(whole), "lookup": of(whole, **lookup)}
        for target in (0.9, 0.95):
            found[f"exits at {target}"] = of(self.model, exit=self.policy(own, target, self.layers))
        found["exits x lookup"] = of(self.model, exit=self.policy(own, 0.9, self.layers), **lookup)
        found[f"{self.layers[-1]} layers"] = of(el.depth.extract(*whole, self.layers[-1]))
        for name in self.subnets():
            found[name] = small(name)
        for name in few:
            found[f"{name} x exits at 0.9"] = small(name, 0.9)
            found[f"{name} x lookup"] = small(name, **lookup)
            found[f"{name} x exits x lookup"] = small(name, 0.9, **lookup)
        return found

    def policy(self, cell: str, target: float, layers: Sequence[int]) -> el.ConfidenceExit:
        """The thresholds that a cell of the first part chose."""
        rows = self.cells.found[f"forward/{cell}"]["value"]["calibrated"]
        thresholds = next(row["thresholds"] for row in rows if row["target"] == target)
        return el.ConfidenceExit("margin", tuple(thresholds), tuple(layers))

    # ------------------------------------------------------------------ training

    def train(self) -> None:
        """Every method and seed; the models of seed 0 are kept."""
        for seed, arm in itertools.product(self.args.seeds, self.args.arms):
            self.cells.get(f"train/{arm}/{seed}", lambda arm=arm, seed=seed: self.trained(arm, seed))

    def trained(self, arm: str, seed: int) -> Record:
        """One training, and every depth or width of what came out."""
        text = batches(self.args, self.tokenizer, "train", seed=seed)
        how = {"steps": self.args.steps, "lr": self.args.lr}
        exits = tuple(e.name for e in self.model[0].exits)
        config, params = self.model if arm in ("ee_tuning", "self_supervised", "joint") else self.plain
        if arm in ("ee_tuning", "self_supervised"):
            how["lr"] *= 10
        if arm == "joint":
            how |= {"faster": exits, "factor": 10.0}
        params, about = train(self.method(arm, config, seed), params, text, **how)
        model = (config, params)
        if seed == self.args.seeds[0] and not (self.out / "trained" / arm).is_dir():
            save_model(self.out / "trained" / arm, config, params, self.tokenizer)

        if arm in ("soft", "plain"):
            model = copied_exits(model)
        if arm != "elastic":
            return {"training": about, **self.report(model)}
        found = {"training": about, **self.report(model, exits=False), "widths": {}}
        for name, subnet in self.subnets().items():
            if name.startswith("mlp"):
                small = el.slice_params(*model, subnet)
                found["widths"][name] = self.report(small, exits=False)["depths"][-1]
        return found

    def method(self, arm: str, config: el.ModelConfig, seed: int) -> Any:
        """The library's method of an arm."""
        makers: dict[str, Callable[[], Any]] = {
            "ee_tuning": lambda: el.depth.EETuning(config),
            "self_supervised": lambda: el.depth.SelfSupervisedExits(config, seed=seed),
            "soft": lambda: el.depth.SortedFineTuning(config, depths=self.layers, seed=seed),
            "joint": lambda: el.depth.JointTraining(config, distil=1.0),
            "elastic": lambda: el.width.ElasticTraining(config, menu=MENU, samples=1, distil=1.0, seed=seed),
            "plain": lambda: Pretraining(config),
        }
        return makers[arm]()

    def kept(self, arm: str) -> Model:
        """What was trained with the first seed."""
        decoder, params = load_decoder(self.out / "trained" / arm)
        return decoder.config, params

    def combine(self) -> None:
        """Closed forms on top of training."""
        got = self.cells.get
        if (self.out / "trained" / "soft").is_dir():
            fitted = lambda: fitted_exits(self.kept("soft"), self.layers, self.fitting)  # noqa: E731
            got("combine/soft x exits in closed form", lambda: self.report(fitted()))
        if (self.out / "trained" / "elastic").is_dir():

            def narrow() -> Record:
                small = el.slice_params(*self.kept("elastic"), self.subnets()["mlp 0.75"])
                return self.report(fitted_exits(small, self.layers, self.fitting))

            got("combine/elastic, mlp 0.75 x exits in closed form", narrow)

    # ------------------------------------------------------------------ tasks

    def tasks(self) -> None:
        """Multiple choice."""
        got, args = self.cells.get, self.args
        for task in TASKS:
            rows = records(args, task, args.task_rows)
            fewer = rows[: args.trained_rows]
            got(f"tasks/{task}/base", lambda rows=rows: choices(self.model, self.tokenizer, rows))
            for name, subnet in self.subnets().items():
                small = el.slice_params(*self.plain, subnet)
                got(f"tasks/{task}/{name}", lambda s=small, r=fewer: choices(s, self.tokenizer, r))
            for arm in args.arms:
                if (self.out / "trained" / arm).is_dir():
                    got(
                        f"tasks/{task}/{arm}",
                        lambda arm=arm, r=fewer: choices(self.shown(arm), self.tokenizer, r),
                    )

    def shown(self, arm: str) -> Model:
        """A trained model with its exits."""
        model = self.kept(arm)
        return copied_exits(model) if arm in ("soft", "plain") else model

    def trivia(self) -> None:
        """TriviaQA at full depth, and of the models that end at an exit."""
        got, count = self.cells.get, self.args.trivia_rows
        asked = questions(Path(self.args.trivia), count)
        got("trivia/base", lambda: exact_match(self.plain, self.tokenizer, asked))
        for name, subnet in self.subnets().items():
            small = el.slice_params(*self.plain, subnet)
            got(f"trivia/{name}", lambda s=small: exact_match(s, self.tokenizer, asked))
        for arm in ("plain", "soft", "joint", "elastic"):
            if (self.out / "trained" / arm).is_dir():
                whole = lambda arm=arm: el.depth.without_exits(*self.kept(arm))  # noqa: E731
                got(f"trivia/{arm}", lambda w=whole: exact_match(w(), self.tokenizer, asked))


def base_seen(out: Path, model: Model, text: Sequence[el.data.Batch]) -> Seen:
    """The base on held-out text, kept in OUT/seen.npz."""
    file = out / "seen.npz"
    if not file.is_file():
        seen = look(model, text)
        np.savez(file, **vars(seen))
    kept = np.load(file)
    layers = tuple(kept["layers"].tolist())
    return Seen(layers, *(kept[name] for name in ("nats", "choice", "margin", "targets", "row")))


def prompts_of_one_bucket(study: Study) -> list[list[int]]:
    """Held-out instructions of 33 to 64 tokens."""
    room = range(33, 65) if not study.args.tiny else range(2, 33)
    found = []
    for record in held_out_records(study.args, 200):
        ids = study.tokenizer.encode(record["prompt"], bos=True)[: room.stop - 1]
        if len(ids) in room:
            found.append(ids)
    return found[: study.args.prompts]


def choices(model: Model, tokenizer: el.Tokenizer, rows: list[Record]) -> list[Record]:
    """Accuracy of every exit and of full depth; every depth goes on from the one before."""
    config, params = model
    found, answers = [], None
    for layer in (*(e.layer for e in config.exits), None):
        chooser = MultipleChoice(
            Decoder(config), params, tokenizer, exit=layer, normalise="bytes", keep_state=layer is not None
        )
        answers = chooser.answer(rows) if answers is None else chooser.resume(rows, answers)
        right = [a.output == row["gold"] for a, row in zip(answers, rows, strict=True)]
        found.append(
            {
                "layers": layer or config.n_layers,
                "accuracy": float(np.mean(right)),
                "rows": len(rows),
                "outputs": [a.output for a in answers],
            }
        )
    for one in found:
        one["same answer as full depth"] = float(np.mean(np.equal(one["outputs"], found[-1]["outputs"])))
    return found


def questions(folder: Path, count: int) -> list[tuple[str, list[str]]]:
    """(prompt, right answers) of TriviaQA, with three examples of the dev file in every prompt."""

    def read(name: str) -> list[Record]:
        text = gzip.decompress((folder / f"triviaqa_dpr_{name}.jsonl.gz").read_bytes()).decode()
        return [json.loads(line) for line in itertools.islice(text.splitlines(), count)]

    shown = "".join(f"Question: {r['question']}\nAnswer: {r['answers'][0]}\n\n" for r in read("dev")[:3])
    return [(f"{shown}Question: {r['question']}\nAnswer:", r["answers"]) for r in read("test")]


def exact_match(model: Model, tokenizer: el.Tokenizer, asked: list[tuple[str, list[str]]]) -> float:
    """Share of greedy answers that are one of the right ones, without case, articles and punctuation."""
    sampler, right = el.Sampler(Decoder(model[0]), model[1], tokenizer), []
    for start in range(0, len(asked), 16):
        some = asked[start : start + 16]
        texts = [s.text for s in sampler.sample([prompt for prompt, _ in some], 12, stop=["\n"])]
        right += [
            normal(text) in {normal(answer) for answer in answers}
            for text, (_, answers) in zip(texts, some, strict=True)
        ]
    return float(np.mean(right))


def normal(text: str) -> str:
    """An answer as TriviaQA compares it."""
    kept = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())


# ---------------------------------------------------------------------- tables


def tables(cells: dict[str, Any]) -> str:
    """Everything that is there, as Markdown."""
    value = {name: cell["value"] for name, cell in cells.items()}
    parts = [
        frozen_table(value),
        trained_table(value),
        exits_table(value),
        time_table(value),
        task_table(value),
    ]
    return "\n\n".join([part for part in parts if part] + front_lines(value))


def frozen_table(value: Record) -> str:
    """Depths and widths of the model as it is."""
    rows = []
    for name, found in value.items():
        if name.startswith(("forward/", "combine/")):
            depths = found["depths"]
            for one in depths if "exits" in name else depths[-1:]:
                rows.append(
                    [name.partition("/")[2], one["layers"], f"{one['loss']:.3f}", f"{one['agreement']:.3f}"]
                )
    return markdown(["nothing trains, or seed 0", "layers", "nats/token", "agreement"], rows) if rows else ""


def by_arm(value: Record) -> dict[str, list[Record]]:
    """Trainings, seed by seed."""
    found: dict[str, list[Record]] = {}
    for name, one in value.items():
        if name.startswith("train/"):
            found.setdefault(name.split("/")[1], []).append(one)
    return found


def trained_table(value: Record) -> str:
    """Every depth or width of every method, over seeds."""
    rows = []
    for arm, runs in by_arm(value).items():
        seconds = spread([run["training"]["seconds"] for run in runs], 0)
        for i, one in enumerate(runs[0]["depths"]):
            columns = [[run["depths"][i][k] for run in runs] for k in ("loss", "accuracy", "agreement")]
            rows.append([arm, f"{one['layers']} layers", seconds, *map(spread, columns)])
        for width in runs[0].get("widths", {}):
            columns = [[run["widths"][width][k] for run in runs] for k in ("loss", "accuracy", "agreement")]
            rows.append([arm, width, seconds, *map(spread, columns)])
    header = ["trained", "depth or width", "seconds", "nats/token", "accuracy", "agreement"]
    return markdown(header, rows) if rows else ""


def exits_table(value: Record) -> str:
    """All exits together, calibrated for the model's own full depth."""
    named = {n.partition("/")[2]: [f] for n, f in value.items() if n.startswith(("forward/", "combine/"))}
    rows = []
    for name, runs in {**named, **by_arm(value)}.items():
        for i, one in enumerate(runs[0].get("calibrated", ())):
            keys = ("mean_layers", "agreement with own full depth", "agreement", "loss")
            columns = [[run["calibrated"][i][k] for run in runs] for k in keys]
            rows.append([name, one["target"], *map(spread, columns)])
    header = [
        "exits together",
        "target",
        "mean layers",
        "agreement, own full depth",
        "agreement",
        "nats/token",
    ]
    return markdown(header, rows) if rows else ""


def time_table(value: Record) -> str:
    """Milliseconds per token, with prefill."""
    if "time" not in value:
        return ""
    rows = [
        [name, f"{t['ms']:.1f}", f"{t['relative']:.2f}", f"{t['spread']:.2f}", f"{t['mean_layers']:.1f}"]
        for name, t in value["time"].items()
    ]
    return markdown(["decoded", "ms/token", "full depth = 1", "spread", "mean layers"], rows)


def task_table(value: Record) -> str:
    """Accuracies."""
    rows = []
    for name, found in value.items():
        if name.startswith("tasks/"):
            _, task, model = name.split("/")
            rows += [
                [
                    task,
                    model,
                    one["layers"],
                    one["rows"],
                    f"{one['accuracy']:.3f}",
                    f"{one['same answer as full depth']:.3f}",
                ]
                for one in found
            ]
        if name.startswith("trivia/"):
            rows.append(["TriviaQA, exact match", name.split("/")[1], "", "", f"{found:.3f}", ""])
    header = ["task", "model", "layers", "rows", "accuracy", "same answer as its full depth"]
    return markdown(header, rows) if rows else ""


# ---------------------------------------------------------------------- the front


def points(value: Record) -> list[Record]:
    """Everything whose time and quality are known: dial, name, time relative to full depth, quality."""
    if "time" not in value:
        return []
    found = []

    def add(dial: str, name: str, quality: Record) -> None:
        if name in value["time"]:
            time = value["time"][name]
            found.append(
                {
                    "dial": dial,
                    "name": name,
                    "relative": time["relative"],
                    "ms": time["ms"],
                    **{k: quality[k] for k in ("loss", "agreement")},
                }
            )

    closed = value["forward/exits in closed form"]
    add("none", "full depth", closed["depths"][-1])
    add("lookup", "lookup", closed["depths"][-1])
    add("combined", "exits x lookup", closed["depths"][-1])
    for name in ("exits in closed form", "exits copied"):
        for one in value[f"forward/{name}"]["depths"][:-1]:
            add("depth", f"{one['layers']} layers", one)
    for one in closed["calibrated"]:
        add("exits", f"exits at {one['target']}", one)
    for name, cell in value.items():
        if not name.startswith("forward/") or "exits" in name:
            continue
        name = name.partition("/")[2]
        quality = cell["depths"][-1]
        add("width", name, quality)
        add("combined", f"{name} x lookup", quality)
        add("combined", f"{name} x exits x lookup", quality)
        for one in value.get(f"forward/{name} x exits", {}).get("calibrated", ()):
            add("combined", f"{name} x exits at {one['target']}", one)
    return found


def front(found: list[Record], better: Callable[[Record], float]) -> list[Record]:
    """The points that no other one beats in time and quality."""
    kept: list[Record] = []
    for one in sorted(found, key=lambda p: (p["relative"], -better(p))):
        if not kept or better(one) > better(kept[-1]):
            kept.append(one)
    return kept


def front_lines(value: Record) -> list[str]:
    """For every point on the front of a single dial: what all dials together have at no more time."""
    found = points(value)
    if not found:
        return []
    lines = []
    for name, better in (("agreement", lambda p: p["agreement"]), ("loss", lambda p: -p["loss"])):
        rows = []
        for dial in ("depth", "exits", "width", "lookup"):
            single = [p for p in found if p["dial"] in (dial, "none")]
            for point in front(single, better):
                others = [p for p in found if p["relative"] <= point["relative"]]
                best = max(others, key=better)
                rows.append(
                    [
                        dial,
                        point["name"],
                        f"{point['relative']:.2f}",
                        f"{point[name]:.3f}",
                        best["name"],
                        f"{best['relative']:.2f}",
                        f"{best[name]:.3f}",
                    ]
                )
        header = ["front of", "point", "time", name, "best of all dials in that time", "time", name]
        lines.append(markdown(header, rows))
    return lines


def plot(cells: dict[str, Any], file: Path) -> None:
    """Agreement and loss over time per token; the front of each dial and of all together."""
    from matplotlib import pyplot

    found = points({name: cell["value"] for name, cell in cells.items()})
    if not found:
        return
    figure, panels = pyplot.subplots(1, 2, figsize=(13, 5))
    marks = {"none": "k*", "depth": "C0o", "exits": "C1s", "width": "C2^", "lookup": "C3D", "combined": "C4P"}
    qualities = (("agreement", lambda p: p["agreement"]), ("loss", lambda p: -p["loss"]))
    for axes, (name, better) in zip(panels, qualities, strict=True):
        for dial, mark in marks.items():
            own = [p for p in found if p["dial"] == dial]
            axes.plot([p["ms"] for p in own], [p[name] for p in own], mark, label=dial, linestyle="")
        best = front(found, better)
        axes.plot([p["ms"] for p in best], [p[name] for p in best], "k-", linewidth=0.8, label="front")
        for p in best:
            axes.annotate(p["name"], (p["ms"], p[name]), (4, 4), textcoords="offset points", fontsize=7)
        axes.set_xlabel("milliseconds per token, prefill included")
        axes.set_ylabel({"agreement": "agreement with the whole model", "loss": "nats per token"}[name])
        axes.grid(alpha=0.3)
    panels[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
