"""Bad calls of the Python API: what is called, and what has to be said about it.

Every call raises a ValueError (or an OSError about a file) whose message names the thing, before anything is
compiled.
"""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import elastic_lm as el
from elastic_lm.bounds import clopper_pearson, hoeffding_bentkus
from elastic_lm.cascade import Answer, Endpoint, Function, Measurements, Scoring, fit_rule
from elastic_lm.cascade.guarantee import CascadeRisk
from elastic_lm.checkpoints import native
from elastic_lm.cost.counted import Workload
from elastic_lm.data import train_bpe
from elastic_lm.depth.calibration import fit_thresholds
from elastic_lm.quickstart.options import Options as Quickstart
from elastic_lm.report.writers import JsonlWriter
from elastic_lm.testing import random_params, tiny_config
from elastic_lm.train import RunConfig as Run
from elastic_lm.train import fit, load_config

CONFIG = tiny_config(exits=(2,), n_layers=3)
OTHER = tiny_config(n_layers=3, d_model=16)
PARAMS = random_params(CONFIG)
T5 = el.EncoderDecoderConfig(vocab_size=64, d_model=16, n_layers=1, n_heads=2, d_mlp=32)
T5_PARAMS = random_params(T5)
TOKENIZER = train_bpe(["some text"], 260)
WIDE = tiny_config(n_layers=1, vocab_size=260)
MENU = el.Menu(mlp=(0.5, 1.0), heads=(0.5, 1.0))
POLICY = el.ConfidenceExit("max_prob", (0.5,), (2,))
SUBNET = el.Subnet.uniform(CONFIG, mlp=0.5)
SWIFT = Function(lambda record: Answer("a", {"energy": 1.0}))
RULE = el.CascadeRule(1.0, "energy")
QUALITIES = {"swift": [1, 0], "super_": [1, 1]}


@dataclasses.dataclass(frozen=True)
class Call:
    """One bad call.

    Attributes:
      name: of the case.
      call: takes an empty folder.
      says: texts that the message has, in this order, with " … " between them.
      error: what it raises.
    """

    name: str
    call: Callable[[pathlib.Path], Any]
    says: str
    error: type[Exception] = ValueError


def sampler(**options: Any) -> el.Sampler:
    return el.Sampler(el.Decoder(CONFIG), PARAMS, window=2, **options)


def sample(says: str, prompt: Any = None, **settings: Any) -> Call:
    prompt = [1, 2] if prompt is None else prompt
    name = f"sample({prompt!r:.40}, {', '.join(f'{k}={v!r:.40}' for k, v in settings.items())})"
    return Call(name, lambda _: sampler().sample(prompt, **{"max_new_tokens": 4, **settings}), says)


def made(says: str, make: Callable[..., Any], *values: Any, **fields: Any) -> Call:
    shown = [f"{value!r:.30}" for value in values] + [f"{k}={v!r:.30}" for k, v in fields.items()]
    return Call(f"{make.__qualname__}({', '.join(shown)})", lambda _: make(*values, **fields), says)


def trained(says: str, **fields: Any) -> Call:
    return made(says, el.TrainConfig, **fields)


def observations(n: int = 40) -> el.depth.Observations:
    draw = np.random.default_rng(0).uniform(size=(n, 1)).astype(np.float32)
    return el.depth.Observations(
        layers=(2,),
        n_layers=3,
        confidence=draw,
        agrees=draw > 0.3,
        correct=np.zeros((n, 2), bool),
        nats=np.zeros((n, 2), np.float32),
        weights=np.ones(n, np.float32),
        targets=np.zeros(n, np.int32),
        sequence=np.arange(n) // 4,
    )


def fitted(says: str, **how: Any) -> Call:
    return made(says, fit_thresholds, observations(), **{"metric": "margin", **how})


def damaged_metrics(folder: pathlib.Path) -> None:
    (folder / "metrics.jsonl").write_bytes(b'{"step": 1}\n\x80\n')
    JsonlWriter(folder / "metrics.jsonl")


SAMPLES = [
    sample("prompt=b'abc': must be text, token ids, or a list of either", b"abc"),
    sample("prompt=5: must be text", 5),
    sample("n=0: must be at least 1", n=0),
    sample("n=2: greedy samples are all the same; give temperature=1", n=2),
    sample("top_logprobs=65: must be from 0 to 64", top_logprobs=65),
    made("tokenizer=None: a chat needs an el.Tokenizer", lambda: el.Chat(sampler())),
    sample("prompt={'a': 1}: must be text", {"a": 1}),
    sample("prompt 0=b'abc': must be text, or whole numbers", [b"abc"]),
    sample("prompt 0=[1.5]: must be text, or whole numbers", [[1.5]]),
    sample("prompt 0=1.5: must be text", [1.5, 2.5]),
    sample("prompt=[]: give at least one prompt", []),
    sample("prompt 0 is empty: give at least one token", [[]]),
    sample("prompt 0 holds token id 64, outside the vocabulary of 64", [64]),
    sample("prompt 0 holds token id -1", [-1]),
    sample("tokenizer=None: text prompts need one", "abc"),
    sample("prompt 0 has 200 tokens … max_len=128: shorten", [1] * 200),
    sample("max_new_tokens='3': must be a whole number", max_new_tokens="3"),
    sample("max_new_tokens=1.5: must be a whole number", max_new_tokens=1.5),
    sample("max_new_tokens=None: must be a whole number", max_new_tokens=None),
    sample("max_new_tokens=0: must be at least 1", max_new_tokens=0),
    sample("temperature='hot': must be finite numbers", temperature="hot"),
    sample("temperature=None: must be finite numbers", temperature=None),
    sample("temperature=nan: must be finite numbers", temperature=float("nan")),
    sample("temperature=True: must be finite numbers", temperature=True),
    sample("temperature=-1: must be at least 0.0", temperature=-1),
    sample("temperature has 2 entries: give one value, or one per prompt (1)", temperature=[1.0, 1.0]),
    sample("temperature=[[1], [1, 2]]: must be finite numbers", temperature=[[1], [1, 2]]),
    sample("top_k=1.5: must be finite whole numbers", top_k=1.5),
    sample("top_k='all': must be finite whole numbers", top_k="all"),
    sample("top_k=-1: must be an integer from 0", top_k=-1),
    sample("top_k=4294967297", top_k=2**32 + 1),
    sample("top_k=2147483648", top_k=2**31),
    sample("top_p='x': must be finite numbers", top_p="x"),
    sample("top_p=2: must be between 0.0 and 1.0", top_p=2),
    sample("min_p=-1: must be between 0.0 and 1.0", min_p=-1),
    sample("repetition_penalty=0: must be at least", repetition_penalty=0),
    sample("seed=1.5: must be finite whole numbers", seed=1.5),
    sample("seed='a': must be finite whole numbers", seed="a"),
    sample("stop=5: must be a text, or several", stop=5),
    sample("stop=(5,): must be a text, or several", stop=[5]),
    sample("stop=b'a': must be a text", stop=b"a"),
    sample("stop='': a stop string needs at least one character", stop=""),
    sample("stop_tokens holds token id -1, outside the vocabulary of 64", stop_tokens=(-1,)),
    sample("stop_tokens holds token id 64, outside the vocabulary", stop_tokens=(64,)),
    sample("stop_tokens holds token id 1000000000000", stop_tokens=(10**12,)),
    sample("stop_tokens=5: must be token ids, in a tuple", stop_tokens=5),
    sample("stop_tokens=(1.5,): must be token ids", stop_tokens=(1.5,)),
    sample("ignore_eos='no': must be True or False", ignore_eos="no"),
    sample("unknown setting temprature=1: known ones are temperature", temprature=1),
    sample("lossless='no': must be True or False", lossless="no"),
    sample("lossless=1: must be True or False", lossless=1),
    sample("lossless has 2 entries", lossless=[True, False]),
    sample("exit='x': must be a policy such as el.ConfidenceExit", exit="x"),
    sample("exit=0.5: must be a policy", exit=0.5),
    sample("must be a policy", exit=el.ConfidenceExit),
    sample("exit has 2 policies: give one, or one per prompt (1)", exit=[POLICY, POLICY]),
    sample("exits after layers (1,), the model has (2,)", exit=el.ConfidenceExit("max_prob", (0.5,), (1,))),
    sample("subnet='half': must be of type Subnet", subnet="half"),
    sample("budget=5: must be of type Budget", budget=5),
    sample("sub-networks for budgets are chosen by", budget=el.Budget(flops=1e9)),
    sample("each says what runs; give one of them", budget=el.Budget(flops=1e9), subnet=SUBNET),
    sample("subnet.mlp[0]", subnet=el.Subnet((0,), (999,), (1,), (1,), 32)),
    Call("stream(bytes)", lambda _: list(sampler().stream(b"abc")), "prompt=b'abc': must be text"),
    Call("stream(two)", lambda _: list(sampler().stream([1], max_new_tokens="x")), "max_new_tokens='x'"),
    Call(
        "a lone surrogate",
        lambda _: el.Sampler(el.Decoder(WIDE), random_params(WIDE), TOKENIZER).sample("\ud800", 2),
        "half of a character … give complete Unicode text",
    ),
]

SAMPLERS = [
    made("model=str: a sampler needs a decoder", el.Sampler, "model", PARAMS),
    made(
        "model=EncoderDecoder: a sampler needs a decoder; use el.TextToText",
        el.Sampler,
        el.EncoderDecoder(T5),
        T5_PARAMS,
    ),
    made(
        "shape of params embed/table=(64, 32): the model has (64, 16) there",
        el.Sampler,
        el.Decoder(OTHER),
        PARAMS,
    ),
    made("shape of params embed/table=None", el.Sampler, el.Decoder(CONFIG), {}),
    made("shape of params embed/table=None", el.Sampler, el.Decoder(CONFIG), None),
    *(
        Call(
            f"Sampler({name}={value!r:.40})",
            lambda _, n=name, v=value: (
                sampler(**{n: v}) if n != "window" else el.Sampler(el.Decoder(CONFIG), PARAMS, window=v)
            ),
            says,
        )
        for name, value, says in (
            ("window", 0, "window=0: must be at least 1"),
            ("window", "8", "window='8': must be a whole number"),
            ("window", 2.5, "window=2.5: must be a whole number"),
            ("fire_share", 2.0, "fire_share=2.0: must be a share"),
            ("fire_share", "all", "fire_share='all': must be a number"),
            ("stream_every", 0, "stream_every=0: must be at least 1"),
            ("lossless", "no", "lossless='no': must be True or False"),
            ("lookup", 1, "lookup=1: must be True or False"),
            ("together", None, "together=None: must be True or False"),
            ("draft", 0, "draft=0: must be at least 1"),
            ("draft", "2", "draft='2': must be a whole number"),
            ("missing", "frob", "missing='frob': must be exact or propagate"),
            ("exit", "x", "exit='x': must be a policy"),
            ("exit", el.ConfidenceExit("max_prob", (0.5,), (1,)), "the model has (2,)"),
            ("subnet", "half", "subnet='half': must be of type Subnet"),
            ("budget", "small", "budget='small': must be of type Budget"),
            ("elastic", MENU, "elastic"),
            ("preview", "p.safetensors", "preview='p.safetensors': must be of type HeadPreview"),
            ("keep_subnets", 0, "keep_subnets=0: must be at least 1"),
            ("options", {"window": 2}, "options={'window': 2}: must be of type DecodeOptions"),
            ("options", el.DecodeOptions(), "window=2: give either options or single fields"),
        )
    ),
    made("max_len=0: must be at least 1", el.TextToText, el.EncoderDecoder(T5), T5_PARAMS, max_len=0),
    made("max_len='9': must be a whole number", el.TextToText, el.EncoderDecoder(T5), T5_PARAMS, max_len="9"),
    made("model=Decoder: must be an EncoderDecoder", el.TextToText, el.Decoder(CONFIG), PARAMS),
    made("shape of params", el.TextToText, el.EncoderDecoder(T5), PARAMS),
    *(
        Call(
            f"TextToText.generate({source!r}, {settings})",
            lambda _, s=source, k=settings: el.TextToText(el.EncoderDecoder(T5), T5_PARAMS).generate(s, **k),
            says,
        )
        for source, settings, says in (
            (b"abc", {}, "sources=b'abc': must be text, token ids"),
            ([b"abc"], {}, "source 0=b'abc': must be text, or whole numbers"),
            ([1.5], {}, "source 0=1.5: must be text"),
            ([], {}, "sources=[]: give at least one"),
            ([[]], {}, "source 0=[]: is empty"),
            ([99], {}, "source 0 holds token id 99, outside the vocabulary of 64"),
            ("abc", {}, "tokenizer=None: text needs one"),
            ([1], {"max_new_tokens": "3"}, "max_new_tokens='3': must be a whole number"),
            ([1], {"max_new_tokens": 0}, "max_new_tokens=0: must be at least 1"),
            ([1], {"top_k": 1.5}, "top_k=1.5: must be finite whole numbers"),
            ([1], {"stop_tokens": (-1,)}, "stop_tokens holds token id -1"),
            ([1], {"energy_temperature": 0}, "energy_temperature=0"),
            ([1], {"frob": 1}, "unknown setting frob=1"),
        )
    ),
]

CONFIGS = [
    made("vocab_size='64': must be a whole number", el.ModelConfig, "64", 16, 1, 2, 32),
    made("d_model=16.5: must be a whole number", el.ModelConfig, 64, 16.5, 1, 2, 32),
    made("n_layers=True: must be a whole number", el.ModelConfig, 64, 16, True, 2, 32),
    made("n_layers=0: must be at least 1", el.ModelConfig, 64, 16, 0, 2, 32),
    made("d_model=16: is not a multiple of n_heads=3", el.ModelConfig, 64, 16, 1, 3, 32),
    made("windows=[]: must be a tuple: write ()", tiny_config, windows=[]),
    made("windows[0]='8': must be a whole number", tiny_config, windows=("8",)),
    made("norm_eps='small': must be a number", tiny_config, norm_eps="small"),
    made("tied='yes': must be True or False", tiny_config, tied="yes"),
    made("dtype='int8': must be one of float32", tiny_config, dtype="int8"),
    made("rope='dynamic': must be of type RopeConfig", tiny_config, rope="dynamic"),
    made("rope.theta='big': must be a number", el.RopeConfig, theta="big"),
    made("rope.factor=0.5: must be at least 1", el.RopeConfig, factor=0.5),
    made("rope.scaling='ntk': must be one of none", el.RopeConfig, scaling="ntk"),
    made(
        "max_len=128: must be at most rope.original_max_len=64",
        tiny_config,
        rope=el.RopeConfig(scaling="dynamic", factor=2.0, original_max_len=64),
    ),
    made("exit.layer='2': must be a whole number", el.ExitConfig, "2"),
    made("exit.layer=0: layers are counted from 1", el.ExitConfig, 0),
    made("exit.kind='frob': must be one of", el.ExitConfig, 2, kind="frob"),
    made("exit.temperature=0: must be positive", el.ExitConfig, 2, temperature=0),
    made("vocab_size='9': must be a whole number", el.EncoderConfig, "9", 16, 1, 2, 32),
    made("labels='yes': must be a tuple: write ('yes',)", el.EncoderConfig, 9, 16, 1, 2, 32, labels="yes"),
    made("d_mlp='9': must be a whole number", el.EncoderDecoderConfig, 9, 16, 1, 2, "9"),
    made(
        "data.paths='t.txt': must be a tuple: write ('t.txt',)", el.DataConfig, source="text", paths="t.txt"
    ),
    made(
        "data.paths=['t.txt']: must be a tuple: write ('t.txt',)",
        el.DataConfig,
        source="text",
        paths=["t.txt"],
    ),
    made("data.seq_len='256': must be a whole number", el.DataConfig, seq_len="256"),
    made("data.seed=-1: must be in [0, 2**32)", el.DataConfig, seed=-1),
    made("task.paths='t': must be a tuple", el.TaskConfig, paths="t"),
    made("task.paths=(): name the training files", el.TaskConfig),
    made("mesh.data='all': must be a whole number", el.MeshConfig, data="all"),
    trained("train.steps='9': must be a whole number", steps="9"),
    trained("train.steps=0: must be at least 1", steps=0),
    trained("train.lr='1e-3': must be a number", lr="1e-3"),
    trained("train.lr=nan: must be positive and finite", lr=float("nan")),
    trained("train.lr=None: must be a number", lr=None),
    trained("train.warmup=1000: must be below steps=1000", warmup=1000),
    trained("train.seed=4294967296: must be in [0, 2**32)", seed=2**32),
    trained("train.remat='no': must be True or False", remat="no"),
    trained("train.nu_dtype='bfloat16': with b2=0.999", nu_dtype="bfloat16", b2=0.999),
    trained("train.init_from=5: must be a text", init_from=5),
    made("model='tiny': must be of type ModelConfig", Run, model="tiny"),
    made("exits=[]: must be a tuple", Run, exits=[]),
    made("method='ee_tuning'", Run, method="ee_tuning"),
    made("data={}: must be of type DataConfig", Run, data={}),
    made("train=None: must be of type TrainConfig", Run, train=None),
    made("model=None: describe a model, or name a checkpoint", Run),
    made("minutes='5': must be a number", Quickstart, minutes="5"),
    made("targets=0.9: must be a tuple: write (0.9,)", Quickstart, targets=0.9),
]

DIALS = [
    made("budget={}: set exactly one of latency_ms", el.Budget),
    made("budget.flops='1': must be a number", el.Budget, flops="1"),
    made("budget.flops=0.0: must be positive", el.Budget, flops=0),
    made("budget.flops=nan: must be positive and finite", el.Budget, flops=float("nan")),
    made("budget.flops=True: must be a number", el.Budget, flops=True),
    made("set exactly one of", el.Budget, flops=1, parameters=1),
    made("mlp=nan: must be a share in (0, 1]", el.Subnet.uniform, CONFIG, mlp=float("nan")),
    made("mlp='half': must be a share in (0, 1]", el.Subnet.uniform, CONFIG, mlp="half"),
    made("mlp=0.3: must give a whole number of the 64 neurons", el.Subnet.uniform, CONFIG, mlp=0.3),
    made("depth=2: must give", el.Subnet.uniform, CONFIG, depth=2),
    made("subnet.layers=(9,): the model has 3 layers", el.Subnet.uniform, CONFIG, layers=(9,)),
    made("subnet.layers='01': must be a tuple of whole numbers", el.Subnet, "01", (1, 1), (1, 1), (1, 1), 8),
    made("subnet.layers=[0]: must be a tuple of whole numbers", el.Subnet, [0], (1,), (1,), (1,), 8),
    made("subnet.mlp=(): needs one size", el.Subnet, (0,), (), (1,), (1,), 8),
    made("subnet.mlp=(1.5,): must be a tuple of whole numbers", el.Subnet, (0,), (1.5,), (1,), (1,), 8),
    made("subnet.d_model='8': must be a whole number", el.Subnet, (0,), (1,), (1,), (1,), "8"),
    made("menu.mlp=0.5: must be a tuple: write (0.5,)", el.Menu, mlp=0.5),
    made("menu.mlp[0]='half': must be a number", el.Menu, mlp=("half", 1.0)),
    made("menu.mlp=(1.0, 0.5): must be shares in (0, 1], increasing", el.Menu, mlp=(1.0, 0.5)),
    made("menu.mlp=(): must be shares", el.Menu, mlp=()),
    made("menu.dropped=(1, 1): names a layer twice", el.Menu, dropped=(1, 1)),
    made("workload.batch='1': must be a whole number", Workload, batch="1"),
    made("workload.context=-1: must be at least 0", Workload, context=-1),
    made("menu.mlp=0.3: must give", el.SubnetChooser, CONFIG, el.Menu(mlp=(0.3, 1.0))),
    made(
        "budget.parameters=1.0: the cheapest sub-network",
        el.SubnetChooser(CONFIG, MENU).subnet,
        el.Budget(parameters=1),
    ),
    made("subnet.mlp[0]", el.slice_params, CONFIG, PARAMS, el.Subnet((0,), (999,), (1,), (1,), 32)),
    made("metric='frob'", el.ConfidenceExit, "frob", (0.5,), (2,)),
    made("thresholds=0.5: must be a tuple: write (0.5,)", el.ConfidenceExit, "margin", 0.5, (2,)),
    made("thresholds[0]='x': must be a number", el.ConfidenceExit, "margin", ("x",), (2,)),
    made("thresholds=(nan,): must be finite", el.ConfidenceExit, "margin", (float("nan"),), (2,)),
    made("needs one per exit, after layers (2,)", el.ConfidenceExit, "margin", (0.5, 0.5), (2,)),
    made("layers=[2]: must be a tuple: write (2,)", el.ConfidenceExit, "margin", (0.5,), [2]),
    made("layer='2': must be a whole number", el.StaticExit, "2", (2,)),
    made("tau='x': must be a number", el.DecayedExit, POLICY, tau="x"),
    made("tau=-1: must be at least 0", el.DecayedExit, POLICY, tau=-1),
    made("base=5: must be a policy", el.DecayedExit, 5),
    made("first=2, last=4: depths fall", el.DepthSchedule, 2, 4, (2,)),
    made("first='4': must be a number", el.DepthSchedule, "4", 1, (2,)),
    made("target=1.0: a guarantee needs a share", el.RiskControl, 1.0),
    made("target='0.9': must be a number", el.RiskControl, "0.9"),
    made("epsilon=0: must be a probability", el.RiskControl, 0.9, epsilon=0),
    made("delta=2: must be a share of sequences", el.RiskControl, 0.9, delta=2),
    fitted("target=0: must be a share in (0, 1]", target=0),
    fitted("target=2: must be a share in (0, 1]", target=2),
    fitted("margin=1: must be a share of tokens", margin=1),
    fitted("margin=0.1: is not part of a guarantee", margin=0.1, risk=el.RiskControl(0.9)),
    fitted("active=(1,): the model has exits after layers (2,)", active=(1,)),
    fitted("strategy='frob'", strategy="frob"),
    made("config.exits=(): attach and tune exits first", el.depth.calibrate, OTHER, {}, []),
    made("metric='frob'", el.depth.calibrate, CONFIG, PARAMS, [], metric="frob"),
    made(
        "exits=(2, 9): the model has only n_layers=3",
        lambda: el.attach_exits(CONFIG, PARAMS, [el.ExitConfig(9)], jax.random.key(0)),
    ),
    made("exits=(2, 2)", lambda: el.attach_exits(CONFIG, PARAMS, [el.ExitConfig(2)], jax.random.key(0))),
    made("allowed=0: must be a share", hoeffding_bentkus, 0.1, 10, 0),
    made("wrong=11: must be a count of n=10 trials", clopper_pearson, 11, 10, 0.05),
    Call(
        "a row beyond learned positions",
        lambda _: jax.eval_shape(
            el.Decoder(tiny_config(position="learned", max_len=8)).init,
            jax.random.key(0),
            jnp.zeros((1, 9), jnp.int32),
        ),
        "length of a row=9: is more than max_len=8",
    ),
]

CASCADES = [
    made("swift=None: must be an answerer", el.Cascade, None, None, RULE),
    made("super_='big': must be an answerer", el.Cascade, SWIFT, "big", RULE),
    made("must be an answerer", el.Cascade, Function, SWIFT, RULE),
    made("rule='x': must be a number", el.Cascade, SWIFT, SWIFT, "x"),
    made("rule=None: must be a number", el.Cascade, SWIFT, SWIFT, None),
    made("threshold=nan: must be a finite number", el.Cascade, SWIFT, SWIFT, float("nan")),
    made("batch_size=0: must be at least 1", el.Cascade, SWIFT, SWIFT, 1.0, batch_size=0),
    made("score=5: must be a text", el.Cascade, SWIFT, SWIFT, 1.0, score=5),
    Call(
        "a score that nobody gives",
        lambda _: el.Cascade(SWIFT, SWIFT, el.CascadeRule(1.0, "frob")).answer([{}]),
        "score='frob': the Swift's answer to record 0 has energy; choose one",
    ),
    made("threshold='1': must be a number", el.CascadeRule, "1"),
    made("threshold=inf: must be a finite number", el.CascadeRule, float("inf")),
    made("score='': must name a score", el.CascadeRule, 1.0, ""),
    made("score=5: must be a text", el.CascadeRule, 1.0, 5),
    made("temperature=0: must be positive", el.CascadeRule, 1.0, temperature=0),
    made("seed=-1: must be in [0, 2**32)", el.CascadeRule, 1.0, seed=-1),
    made("temperature='warm': must be a number", Scoring, "warm"),
    made("centre='median': must be one of", Scoring, centre="median"),
    made("risk.loss=0: must be an accuracy", CascadeRisk, 0),
    made("risk.loss='1 %': must be a number", CascadeRisk, "1 %"),
    made(
        "goal={}: set exactly one of",
        fit_rule,
        Measurements.of([1.0, 2.0], **QUALITIES, cost_swift=1.0, cost_super=2.0),
    ),
    made("url='host': must begin with http://", Endpoint, "host"),
    made("url=5: must be a text", Endpoint, 5),
    made("timeout=0: must be positive", Endpoint, "http://h", timeout=0),
    made("timeout='1': must be positive", Endpoint, "http://h", timeout="1"),
    made("retries=-1: must be", Endpoint, "http://h", retries=-1),
    made("workers=0: must be at least 1", Endpoint, "http://h", workers=0),
    made("style='frob': must be one of rows", Endpoint, "http://h", style="frob"),
    made("cost=-1: must be at least 0", Function, str, cost=-1),
    made("function=5: must be a function", Function, 5),
]

FILES = [
    Call(
        "load(nowhere)", lambda f: el.load(f / "no"), "no: expected a Hugging Face folder", FileNotFoundError
    ),
    made("path=5: must be a path", el.load, 5),
    made("path=None: must be a path", el.load, None),
    made("hdfs://b/m: remote paths of this kind are not supported", el.load, "hdfs://b/m"),
    made("dtype='int8': must be one of float32", el.load, el.embedded_model(), dtype="int8"),
    made("weights='int4': must be 'int8', or None", el.load, el.embedded_model(), weights="int4"),
    Call(
        "Tokenizer.load(nowhere)", lambda f: el.Tokenizer.load(f / "no"), "no tokenizer at", FileNotFoundError
    ),
    made("text=5: must be text", TOKENIZER.encode, 5),
    made("text=b'a': must be text", TOKENIZER.encode, b"a"),
    made("vocab_size=9: byte-level BPE needs at least 257", train_bpe, ["a"], 9),
    Call(
        "ConfidenceExit.load(nowhere)",
        lambda f: el.ConfidenceExit.load(f / "t.json"),
        "t.json: no such thresholds file",
        FileNotFoundError,
    ),
    Call(
        "CascadeRule.load(nowhere)",
        lambda f: el.CascadeRule.load(f / "r.json"),
        "r.json: no such cascade rule",
        FileNotFoundError,
    ),
    Call(
        "LatencyTable.load(nowhere)",
        lambda f: el.LatencyTable.load(f / "l.json"),
        "l.json: no such latency table",
        FileNotFoundError,
    ),
    Call(
        "SubnetChooser.load(nowhere)",
        lambda f: el.SubnetChooser.load(f),
        "is not an elastic checkpoint",
        FileNotFoundError,
    ),
    Call("damaged metrics", damaged_metrics, "metrics.jsonl: is not UTF-8 text … move it away"),
    Call(
        "load_config(nowhere)",
        lambda f: load_config(str(f / "c.py")),
        "c.py does not exist",
        FileNotFoundError,
    ),
    Call(
        "export to a remote folder",
        lambda _: el.hf.export(CONFIG, PARAMS, "hdfs://b/m"),
        "hdfs://b/m: remote paths of this kind are not supported",
    ),
    Call(
        "export of other params",
        lambda f: el.hf.export(OTHER, PARAMS, f / "m"),
        "params embed/table has shape (64, 32), but the config asks for (64, 16)",
    ),
    Call(
        "save to a remote folder",
        lambda _: native.save_model("hdfs://b/m", CONFIG, PARAMS, None),
        "hdfs://b/m: remote paths of this kind",
    ),
    Call(
        "fit into a remote folder",
        lambda _: fit(Run(model=tiny_config(vocab_size=300)), "hdfs://b/w"),
        "hdfs://b/w: remote paths of this kind are not supported",
    ),
    Call(
        "a batch that is longer than the model",
        lambda _: el.depth.observe(tiny_config(max_len=8), PARAMS, [batch(9)]),
        "seq_len=9: above max_len=8",
    ),
]


def batch(length: int) -> el.data.Batch:
    ones = np.ones((2, length), np.int32)
    return el.data.Batch(ones, ones, 1.0 * ones, np.cumsum(ones, 1) - 1, ones)


CALLS = [*SAMPLES, *SAMPLERS, *CONFIGS, *DIALS, *CASCADES, *FILES]
