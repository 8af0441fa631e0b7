"""Bad commands: what is typed, which files lie there, and what has to be said about it.

A command is typed in an empty folder; `{name}` stands for a folder or file of `small_world`. It is refused
before anything on disk changes.
"""

import dataclasses
import gzip
from collections.abc import Mapping
from typing import Any

from small_world import LINE


@dataclasses.dataclass(frozen=True)
class Case:
    """One bad command.

    Attributes:
      command: as it is typed after `elastic-lm`.
      says: texts that its one line has, in this order, with " … " between them: the thing, then the fix.
      more: further arguments, as they are.
      status: of the process.
      copies: name of a folder here -> the folder of the world that is copied there.
      changes: JSON file here -> keys that are changed.
      cut: file here -> bytes that are left of it.
      removed: files and folders that are removed here.
      files: file here -> what it holds, written last.
      leaves: what may lie here afterwards and did not before.
      notes: lines before the last one.
      prints: something is printed before the refusal.
      long: compiles, or takes long for another reason.
    """

    command: str
    says: str
    _: dataclasses.KW_ONLY
    more: tuple[str, ...] = ()
    status: int = 2
    copies: Mapping[str, str] = dataclasses.field(default_factory=dict)
    changes: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    cut: Mapping[str, int] = dataclasses.field(default_factory=dict)
    removed: tuple[str, ...] = ()
    files: Mapping[str, str | bytes] = dataclasses.field(default_factory=dict)
    leaves: tuple[str, ...] = ()
    notes: int = 0
    prints: bool = False
    long: bool = False

    @property
    def id(self) -> str:
        """Its name among the tests."""
        made = [*self.copies, *self.cut, *self.removed, *(name for name in self.files if len(name) < 20)]
        keys = [
            f"{key}={value!r}"[:60] for changed in self.changes.values() for key, value in changed.items()
        ]
        contents = [str(value)[:24] for value in self.files.values()]
        return " ".join((self.command, *map(repr, self.more), *made, *keys, *contents))[:200]


DEEP = "[" * 200_000
FILE = {"file": "in the way"}
TEXT = "".join(LINE.format(i) for i in range(40))


def generate(flags: str, says: str, **more: Any) -> Case:
    return Case(f"generate --model {{hf}} --prompt a {flags}", says, **more)


GENERATE = [
    # Prompts.
    Case("chat", "the embedded model: has no chat template … put its chat_template.jinja beside"),
    Case("chat --model nowhere", "nowhere"),
    Case("chat --lossless", "--lossless: nothing drafts"),
    Case("generate --prompt a --mesh rows=2", "--mesh: 'rows=2': … is not one of data, fsdp, tensor"),
    Case("evaluate --mesh data=2,data=2", "--mesh: 'data=2,data=2': … each once"),
    Case("generate --prompt a --mesh tensor=999", "--mesh data=-1,fsdp=1,tensor=999: does not fit … devices"),
    Case("generate --chat --prompt a", "the embedded model: has no chat template … without --chat"),
    Case("generate --prompt a --system Be.", "--system Be.: goes with --chat; add it"),
    Case("generate --chat --unprompted 1", "--unprompted 1: the model begins by itself; leave --chat out"),
    Case("generate --prompt a --n 0", "--n 0: must be at least 1"),
    Case("generate --prompt a --n 2", "--n 2: greedy samples are all the same; give --temperature 1"),
    Case("generate --prompt a --logprobs", "--logprobs: stand in the JSON lines … give --json FILE"),
    Case("generate", "no prompt: give --prompt TEXT or --prompts-file FILE"),
    Case("generate --prompt ''", "--prompt 1 is empty: give at least one character"),
    Case("generate --prompt a --prompt ''", "--prompt 2 is empty"),
    Case("generate --prompts-file nowhere.txt", "nowhere.txt: No such file"),
    Case("generate --prompts-file .", ".: Is a directory"),
    Case("generate --prompts-file p.txt", "no prompt: give", files={"p.txt": "\n\n"}),
    Case("generate --prompts-file p.txt", "p.txt … UTF-8", files={"p.txt": b"caf\xe9\n"}),
    Case("generate --prompts-file p.txt", "p.txt … UTF-8", files={"p.txt": "abc".encode("utf-16")}),
    Case(
        "generate --prompts-file p.jsonl",
        "p.jsonl line 1 is not JSON … write one object per line",
        files={"p.jsonl": "{"},
    ),
    Case("generate --prompts-file p.jsonl", "p.jsonl line 2", files={"p.jsonl": '{"prompt": "a"}\n[]\n'}),
    Case("generate --prompts-file p.jsonl", "p.jsonl line 1", files={"p.jsonl": '{"text": "a"}\n'}),
    Case(
        "generate --prompts-file p.jsonl", "prompt=5 must be a string", files={"p.jsonl": '{"prompt": 5}\n'}
    ),
    Case("generate --prompts-file p.jsonl", "p.jsonl line 1 is empty", files={"p.jsonl": '{"prompt": ""}\n'}),
    Case(
        "generate --prompts-file p.jsonl",
        "p.jsonl line 1 … half of a character",
        files={"p.jsonl": '{"prompt": "\\ud800"}\n'},
    ),
    Case("generate --prompts-file p.jsonl", "p.jsonl line 1", files={"p.jsonl": DEEP}),
    Case("generate --model {hf}", "--prompt 1 … half of a character", more=("--prompt", "\udcff")),
    Case("generate --model {hf} --stream --prompt a --prompt b", "--stream shows one prompt at a time"),
    Case("generate --model {hf}", "prompt 0 has … max_len=128 … shorten", more=("--prompt", "def f" * 500)),
    # Numbers.
    *(
        generate(f"--{flag} {value}", f"{flag.replace('-', '_')}={shown} … must be")
        for flag, value, shown in (
            ("temperature", "nan", "nan"),
            ("temperature", "inf", "inf"),
            ("temperature", "-1", "-1.0"),
            ("top-k", "-1", "-1"),
            ("top-p", "1.5", "1.5"),
            ("top-p", "-0.1", "-0.1"),
            ("top-p", "nan", "nan"),
            ("min-p", "2", "2.0"),
            ("min-p", "nan", "nan"),
            ("repetition-penalty", "0", "0.0"),
            ("repetition-penalty", "-1", "-1.0"),
            ("repetition-penalty", "inf", "inf"),
            ("fire-share", "2", "2.0"),
            ("fire-share", "-1", "-1.0"),
            ("fire-share", "nan", "nan"),
            ("max-new-tokens", "0", "0"),
            ("max-new-tokens", "-1", "-1"),
        )
    ),
    generate("--top-k 4294967297", "top_k=4294967297 … must be"),
    generate("--top-k 2147483648", "top_k=2147483648 … must be"),
    generate("--seed -1", "seed=-1 … must be"),
    generate("--max-new-tokens 1000000", "max_new_tokens=1000000 … max_len=128"),
    *(
        generate(f"--{flag} {value}", f"argument --{flag}: invalid {kind} value: '{value}' … --help")
        for flag, value, kind in (
            ("temperature", "warm", "float"),
            ("top-k", "1.5", "int"),
            ("top-p", "p", "float"),
            ("seed", "x", "int"),
            ("max-new-tokens", "1e3", "int"),
            ("window", "w", "int"),
            ("threshold", "x", "float"),
            ("unprompted", "x", "int"),
            ("draft", "x", "int"),
        )
    ),
    generate("--window 0", "--window 0: must be at least 1"),
    generate("--stop ''", "stop … at least one character"),
    generate("--color purple", "argument --color: invalid choice: 'purple'"),
    # Exits.
    generate("--lossless", "--lossless: nothing drafts; give"),
    generate("--lookup", "--lookup: copied tokens are verified with --lossless only; add it"),
    generate("--draft 2", "--draft 2: drafts are verified with --lossless only; add it"),
    generate("--drafter mlp=0.5", "--drafter mlp=0.5: drafts are verified with --lossless only; add it"),
    generate(
        "--lossless --lookup --drafter mlp=0.5",
        "--drafter mlp=0.5: drafts alone, for the whole model; leave --lookup out",
    ),
    generate(
        "--lossless --drafter layers=0,99",
        "--drafter layers=0,99: subnet.layers=(0, 99): the model has … layers",
    ),
    generate("--lossless --drafter none.json", "none.json … "),
    generate("--lossless --lookup --draft 0", "draft=0: must be at least 1 and below window=16"),
    generate("--lossless --lookup --draft 99", "draft=99: must be at least 1 and below window=16"),
    generate("--lossless --threshold 0.5 --window 1", "window=1: lossless decoding needs at least 2"),
    generate("--missing frob", "argument --missing: invalid choice: 'frob'"),
    generate("--missing propagate", "--missing propagate: is about early tokens; give"),
    generate("--missing propagate --threshold 0.5 --lossless", "missing='propagate' … use 'exact'"),
    generate("--metric margin", "--metric margin: goes with --threshold"),
    generate("--metric frob --threshold 0.5", "metric='frob' … margin"),
    generate("--metric learned --threshold 0.5", "metric='learned' … gate"),
    generate("--threshold -1", "thresholds=(-1.0, -1.0): must be finite and at least 0"),
    generate("--threshold nan", "thresholds=(nan, nan): must be finite"),
    generate("--threshold 0.5 --thresholds {thresholds}", "--threshold 0.5: give one of them"),
    Case(
        "generate --model {bare} --prompt a --threshold 0.5", "the model has no exits: attach and tune them"
    ),
    Case("generate --model {bare} --prompt a --thresholds {thresholds}", "the model has no exits"),
    generate("--thresholds nowhere.json", "nowhere.json: no such thresholds file; `elastic-lm calibrate`"),
    generate("--thresholds {other_thresholds}", "exits after layers (2,), the model has (1, 2): calibrate"),
    *(
        generate(
            "--thresholds t.json",
            f"t.json: not a usable thresholds file … {why} … calibrate again",
            files={"t.json": text},
        )
        for text, why in (
            ("", "Expecting value"),
            ("{", "Expecting"),
            ("[]", '"format" is not'),
            ('{"format": "other"}', '"format" is not'),
            ('{"format": "elastic_lm thresholds 1"}', "needs metric"),
            (DEEP, "deep"),
            (b"\xff\xfe", "utf-8"),
        )
    ),
    *(
        generate(
            "--thresholds t.json",
            f"t.json … {says}",
            files={
                "t.json": (
                    f'{{"format": "elastic_lm thresholds 1", "metric": "max_prob", "thresholds": [0.5, 0.5], '
                    f'"layers": [1, 2], {entry}}}'
                )
            },
        )
        for entry, says in (
            ('"thresholds": [NaN, 0.5]', "thresholds=(nan, 0.5)"),
            ('"thresholds": [-1, 0.5]', "must be finite and at least 0"),
            ('"thresholds": [0.5]', "needs one per exit"),
            ('"thresholds": "half"', "must be a tuple"),
            ('"metric": "frob"', "metric='frob'"),
            ('"gates": [0.5]', "gates=(0.5,)"),
            ('"treshold": 1', "treshold"),
            ('"provenance": null', "provenance"),
            ('"provenance": {"model": "n_layers"}', "provenance"),
        )
    ),
    # Budgets.
    generate("--budget latency=4", "'latency=4' is not KIND=AMOUNT, KIND one of latency_ms"),
    generate("--budget flops", "'' in 'flops' is not a number"),
    generate("--budget flops=-1", "budget.flops=-1.0: must be positive"),
    generate("--budget flops=nan", "budget.flops=nan: must be positive and finite"),
    generate("--budget latency_ms=4", "needs --latency-table FILE; write one"),
    generate("--latency-table {table}", "is read for --budget latency_ms=N; add that"),
    generate("--budget-context 4", "--budget-context 4: is read for --budget flops=N or memory_bytes=N"),
    generate("--budget flops=1e9", "has no menu.json: train an elastic model"),
    Case("generate --model {ck} --prompt a --budget flops=1", "budget.flops=1.0: the cheapest sub-network"),
    Case(
        "generate --model {ck} --prompt a --budget latency_ms=4 --latency-table no.json",
        "no.json: no such latency table",
    ),
    Case(
        "generate --model {ck} --prompt a --budget latency_ms=4 --latency-table t.json",
        "t.json: not a usable latency table … measure again",
        files={"t.json": "{}"},
    ),
    Case(
        "generate --model ck --prompt a --budget flops=1e9",
        "menu.json … menu.mlp=(2.0,) … shares",
        copies={"ck": "ck"},
        changes={"ck/menu.json": {"mlp": [2.0]}},
    ),
    # Texts without a prompt.
    generate("--unprompted -1", "--unprompted -1: must be at least 1"),
    generate("--unprompted 2", "--unprompted 2: the model begins by itself; leave prompts out"),
    Case("generate --unprompted 2", "--unprompted 2: greedy texts are all the same; give --temperature 1"),
    Case("generate --unprompted 2 --temperature 1 --stream", "leave --stream out"),
    # Where it goes.
    generate(
        "--json file/x.json", "file/x.json: file is a file and no folder; choose another path", files=FILE
    ),
    generate("--json .", ".: Is a directory"),
    generate(
        "--json hdfs://bucket/x.json", "hdfs://bucket/x.json: remote paths of this kind are not supported"
    ),
    # Flags.
    generate("--tempertaure 1", "unknown argument --tempertaure: did you mean --temperature?"),
    generate("frob", "unknown argument frob"),
    generate("--prompt", "argument --prompt: expected one argument"),
    # Previews.
    generate("--preview nowhere.safetensors", "nowhere.safetensors"),
    generate("--preview p.safetensors", "p.safetensors", files={"p.safetensors": "no tensors"}),
    # Models.
    Case(
        "generate --prompt a --model nowhere",
        "nowhere: expected a Hugging Face folder … no such folder … ORG/NAME",
    ),
    Case("generate --prompt a --model file", "file: expected a Hugging Face folder", files=FILE),
    Case("generate --prompt a --model folder", "folder: expected … found ['x']", files={"folder/x": ""}),
    Case(
        "generate --prompt a --model hdfs://bucket/m",
        "hdfs://bucket/m: remote paths of this kind are not supported",
    ),
    Case("generate --prompt a --model {enc}", "holds an encoder … where a decoder is needed; name"),
    Case("generate --prompt a --model {t5}", "holds an encoder_decoder … where a decoder is needed; name"),
]


def hf(says: str, **entries: Any) -> Case:
    """A model folder whose config.json says something else."""
    return Case(
        "convert --from hf --to new",
        says,
        copies={"hf": "hf"},
        changes={"hf/config.json": entries},
    )


def weights(says: str, **more: Any) -> Case:
    return Case("convert --from hf --to new", says, copies={"hf": "bare"}, **more)


MODEL_FOLDERS = [
    hf("model_type='frob' … supported", model_type="frob"),
    hf("model_type", model_type=None),
    hf("hidden_size=0", hidden_size=0),
    hf("hidden_size=-1", hidden_size=-1),
    hf("hidden_size='16'", hidden_size="16"),
    hf("hidden_size=16.5", hidden_size=16.5),
    hf("hidden_size", hidden_size=None),
    hf("num_hidden_layers=0", num_hidden_layers=0),
    hf("num_hidden_layers='3'", num_hidden_layers="3"),
    hf("hf: missing tensors 'model.layers.3 … hf/config.json describes", num_hidden_layers=4),
    hf("num_hidden_layers=1000000", num_hidden_layers=10**6),
    hf("num_attention_heads=3", num_attention_heads=3),
    hf("num_attention_heads=0", num_attention_heads=0),
    hf("num_key_value_heads=3", num_key_value_heads=3),
    hf("vocab_size=0", vocab_size=0),
    hf("embed_tokens.weight … (300, 16) … 299", vocab_size=299),
    hf("intermediate_size=0", intermediate_size=0),
    hf("rms_norm_eps='small'", rms_norm_eps="small"),
    hf("rms_norm_eps=-1", rms_norm_eps=-1),
    hf("rope_theta=0", rope_theta=0, rope_parameters=None),
    hf(
        "'longrope'}: short_factor is missing",
        rope_scaling={"rope_type": "longrope"},
    ),
    hf("rope_type='spiral' is not supported; supported", rope_scaling={"rope_type": "spiral"}),
    hf("needs a factor; add it", rope_scaling={"rope_type": "linear"}),
    hf("rope_scaling='linear': must be one flat mapping", rope_scaling="linear"),
    hf("max_position_embeddings=0", max_position_embeddings=0),
    hf("max_position_embeddings='long'", max_position_embeddings="long"),
    hf("eos_token_id … 'x'", eos_token_id="x"),
    hf("eos_token_id … 1000000000000", eos_token_id=10**12),
    hf("hidden_act='frob'", hidden_act="frob"),
    hf("tie_word_embeddings='yes'", tie_word_embeddings="yes"),
    hf("attention_bias", attention_bias="yes"),
    hf("quantization_config", quantization_config={"quant_method": "gptq"}),
    hf("elastic", elastic={"exits": [{"layer": 99}]}),
    hf("elastic", elastic={"exits": [{"layre": 1}]}),
    hf("elastic", elastic=5),
    weights("config.json: not valid JSON … again", files={"hf/config.json": "{"}),
    weights("config.json: not valid JSON", files={"hf/config.json": ""}),
    weights("config.json: must hold a JSON object, not a list", files={"hf/config.json": "[]"}),
    weights("config.json: not valid JSON", files={"hf/config.json": b"\xff\xfe\x00"}),
    weights("config.json", files={"hf/config.json": DEEP}),
    weights("hf/config.json", removed=("hf/config.json",)),
    weights("hf/model.safetensors: no such file", removed=("hf/model.safetensors",)),
    weights(
        "model.safetensors: damaged … cannot read tensor 'lm_head.weight' (",
        cut={"hf/model.safetensors": 9000},
    ),
    weights("model.safetensors: damaged", cut={"hf/model.safetensors": 100}),
    weights("model.safetensors: damaged", cut={"hf/model.safetensors": 0}),
    weights("model.safetensors: damaged", files={"hf/model.safetensors": b"\xff" * 64}),
    weights(
        "pytorch_model.bin … Pickled weights are never read",
        removed=("hf/model.safetensors",),
        files={"hf/pytorch_model.bin": "pickle"},
    ),
    *(
        weights(says, removed=("hf/model.safetensors",), files={"hf/model.safetensors.index.json": text})
        for text, says in (
            ("{", "index.json: not valid JSON"),
            ("{}", "weight_map must map tensor names to files"),
            ('{"weight_map": {"a": 5}}', "weight_map must map tensor names to files"),
            ('{"weight_map": {"a": "../x"}}', "outside the folder"),
        )
    ),
    Case(
        "convert --from hf --to new",
        "shard.safetensors: no such file … copy the missing shard",
        copies={"hf": "bare"},
        removed=("hf/model.safetensors",),
        files={"hf/model.safetensors.index.json": '{"weight_map": {"a": "shard.safetensors"}}'},
    ),
    Case(
        "generate --prompt a --model hf",
        "no tokenizer at hf/tokenizer.json",
        copies={"hf": "bare"},
        removed=("hf/tokenizer.json",),
    ),
    Case(
        "generate --prompt a --model hf",
        "hf/tokenizer.json is not a tokenizer.json",
        copies={"hf": "bare"},
        files={"hf/tokenizer.json": "{}"},
    ),
    Case(
        "convert --from hf --to new",
        "hf/tokenizer.json is not a tokenizer.json",
        copies={"hf": "bare"},
        files={"hf/tokenizer.json": "5"},
    ),
    Case(
        "generate --prompt a --model hf",
        "tokenizer_config.json: eos_token=5: must be a string",
        copies={"hf": "bare"},
        removed=("hf/generation_config.json",),
        changes={"hf/config.json": {"eos_token_id": None}},
        files={"hf/tokenizer_config.json": '{"eos_token": 5}'},
    ),
    # Checkpoints of our own.
    *(
        Case(
            "generate --prompt a --model ck",
            says,
            copies={"ck": "ck"},
            changes={"ck/elastic_config.json": entries},
        )
        for entries, says in (
            ({"kind": "frob"}, "elastic_config.json: kind='frob': must be one of decoder"),
            ({"kind": ["decoder"]}, "elastic_config.json: kind=['decoder']: must be one of"),
            ({"d_modle": 1}, "unknown key model.d_modle=1: did you mean model.d_model?"),
            ({"d_model": "16"}, "model.d_model='16': must be of type int"),
            ({"d_model": 0}, "d_model=0: must be at least 1"),
            ({"n_layers": 5}, "ck/params does not hold the parameters"),
            ({"exits": [{"layer": 9}]}, "exits=(9,) … n_layers=3"),
            ({"exits": [{}]}, "needs model.exits[0].layer"),
            ({"dtype": "int8"}, "dtype='int8': must be one of float32"),
            ({"rope": {"theta": -1}}, "rope.theta=-1"),
            ({"windows": [1]}, "windows=(1,): needs one entry per layer"),
        )
    ),
    Case(
        "generate --prompt a --model ck",
        "ck/params does not hold",
        copies={"ck": "ck"},
        removed=("ck/params",),
    ),
    Case(
        "generate --prompt a --model ck",
        "elastic_config.json: not valid JSON",
        copies={"ck": "ck"},
        files={"ck/elastic_config.json": "{"},
    ),
    Case(
        "generate --prompt a --model ck",
        "no tokenizer at ck/tokenizer.json",
        copies={"ck": "ck"},
        removed=("ck/tokenizer.json",),
    ),
]

CONVERT = [
    Case("convert", "the following arguments are required: --from, --to"),
    Case("convert --from {hf}", "required: --to"),
    Case("convert --from nowhere --to new", "nowhere: no such folder. Expected a Hugging Face folder"),
    Case(
        "convert --from file --to new",
        "file: not a folder; pass the folder that holds config.json",
        files=FILE,
    ),
    Case(
        "convert --from hdfs://bucket/hf --to new",
        "hdfs://bucket/hf: remote paths of this kind are not supported",
    ),
    Case("convert --from {ck} --to new", "config.json: no such file. Expected a Hugging Face folder"),
    Case(
        "convert --from {hf} --to hdfs://bucket/new",
        "hdfs://bucket/new: remote paths of this kind are not supported",
    ),
    Case(
        "convert --from {hf} --to file",
        "file: is no elastic checkpoint and is not replaced; choose another path",
        files=FILE,
    ),
    Case(
        "convert --from {hf} --to file/new", "file is a file and no folder; choose another path", files=FILE
    ),
    Case(
        "convert --from {hf} --to folder",
        "is no elastic checkpoint and is not replaced",
        files={"folder/thesis.txt": "mine"},
    ),
    Case(
        "convert --from {hf} --to folder --overwrite",
        "is no elastic checkpoint and is not replaced",
        files={"folder/thesis.txt": "mine"},
    ),
    Case(
        "convert --from {hf} --to ck",
        "exists already; choose another path, or overwrite it (--overwrite",
        copies={"ck": "ck"},
    ),
    Case(
        "convert --from {hf} --to ck --overwrite",
        "thesis.txt: not written by this package",
        copies={"ck": "ck"},
        files={"ck/params/thesis.txt": "mine"},
    ),
    Case(
        "convert --from hf --to hf --overwrite",
        "is no elastic checkpoint and is not replaced",
        copies={"hf": "hf"},
    ),
    Case("convert --from {hf} --to new --backbone", "--backbone is for checkpoints of a training run"),
    Case(
        "convert --from run/checkpoints/2 --to new",
        "run/checkpoints/2: is no checkpoint of a training run; name WORKDIR/checkpoints/STEP",
        files={"run/checkpoints/2/state/d": "x", "run/checkpoints/2/data/d": "x"},
    ),
    Case(
        "convert --from run/checkpoints/2 --to new --dtype float16",
        "--dtype float16: is not for a run",
        files={"run/checkpoints/2/state/d": "x", "run/checkpoints/2/data/d": "x"},
    ),
    Case("convert --from {hf} --to new --dtype int8", "argument --dtype: invalid choice: 'int8'"),
    Case("convert --from {hf} --to new --dtpye float16", "unknown argument --dtpye: did you mean --dtype?"),
]

EXPORT = [
    Case("export --to new", "required: --from"),
    Case("export --from nowhere --to new", "nowhere: expected a Hugging Face folder … or a checkpoint"),
    Case(
        "export --from hdfs://bucket/ck --to new",
        "hdfs://bucket/ck: remote paths of this kind are not supported",
    ),
    Case(
        "export --from {ck} --to hdfs://bucket/x",
        "hdfs://bucket/x: remote paths of this kind are not supported",
    ),
    Case(
        "export --from {ck} --to file",
        "file: exists already; choose another path, or overwrite it (--overwrite",
        files=FILE,
    ),
    Case("export --from {ck} --to file --overwrite", "file: is no Hugging Face folder", files=FILE),
    Case("export --from {ck} --to file/new", "file is a file and no folder; choose another path", files=FILE),
    Case(
        "export --from {ck} --to hf",
        "hf: exists already; choose another path, or overwrite it (--overwrite",
        copies={"hf": "hf"},
    ),
    Case(
        "export --from {ck} --to hf --overwrite",
        "hf/README.md: not written by an export",
        copies={"hf": "hf"},
        files={"hf/README.md": "mine"},
    ),
    Case(
        "export --from {ck} --to folder --overwrite",
        "folder: is no Hugging Face folder",
        files={"folder/thesis.txt": "mine"},
    ),
    Case("export --from {ck} --to new --dtype int8", "argument --dtype: invalid choice: 'int8'"),
    Case("export --from nowhere --to hf", "hf: exists already", copies={"hf": "hf"}),
]

RECIPE = """\
def get_config(arg=""):
    return {
        "model": {"vocab_size": 300, "d_model": 16, "n_layers": 2, "n_heads": 2, "d_mlp": 16, "max_len": 64},
        "data": {"source": "text", "paths": ["t.txt"], "seq_len": 32, "batch_size": 2},
        "train": {"steps": 3, "warmup": 1},
    }
"""
TASK = """\
def get_config(arg=""):
    return {
        "task": {"paths": ["t.jsonl"], "text_field": "text"},
        "train": {"steps": 3, "warmup": 1, "init_from": INIT},
    }
"""


def config(text: str, says: str, **more: Any) -> Case:
    """A config file of a user."""
    return Case("train --config c.py --workdir w", says, files={"c.py": text, "t.txt": TEXT}, **more)


def override(flags: str, says: str, **more: Any) -> Case:
    """A recipe that runs, with something changed."""
    files = {"c.py": RECIPE, "t.txt": TEXT, **more.pop("files", {})}
    return Case(f"train --config c.py --workdir w {flags}", says, files=files, **more)


def set_to(key: str, value: str, says: str = "", **more: Any) -> Case:
    return override(f'"--config.{key}={value}"', says or f"{key}={value}", **more)


def task(
    flags: str,
    says: str,
    record: str = '{"text": "a", "label": "b"}\n{"text": "a", "label": "c"}\n',
    **more: Any,
) -> Case:
    files = {"c.py": TASK.replace("INIT", "'enc'"), "t.jsonl": record}
    return Case(f"train --config c.py --workdir w {flags}", says, files=files, copies={"enc": "enc"}, **more)


PUSH = [
    Case("push --model {ck}", "required: --to"),
    Case("push --model {ck} --to my-model", "name='my-model': must be ORG/NAME, as the Hub names models"),
    Case("push --model {ck} --to a/b@c", "name='a/b@c': must be ORG/NAME, as the Hub names models"),
    Case(
        "push --model nowhere --to a/b",
        "nowhere: holds no model to push; push sends a folder of this machine",
    ),
    Case(
        "push --model hdfs://bucket/m --to a/b",
        "hdfs://bucket/m: remote paths of this kind are not supported",
    ),
    Case("push --model {ck} --to a/b", "a/b: HF_HUB_OFFLINE is set: unset it to push"),
]

HUB = [
    Case(
        "generate --prompt a --model no/such",
        "no/such: no such folder here … HF_HUB_OFFLINE is set: unset it",
    ),
    Case("convert --from no/such --to new", "no/such: no such folder here … HF_HUB_OFFLINE is set: unset it"),
    Case(
        "convert --from a.gguf --to new", "a.gguf: is no GGUF file that can be read", files={"a.gguf": "no"}
    ),
    Case("convert --from b.gguf --to new", "b.gguf: no such folder"),
]

TRAIN = [
    Case("train", "required: --workdir"),
    Case("train --config c.py", "required: --workdir"),
    Case("train --workdir w", "nothing to train: give --config RECIPE or FILE, or --gin_file FILE"),
    Case("train --config nowhere.py --workdir w", "config file nowhere.py does not exist"),
    Case("train --config th.json --workdir w", "config file th.json does not exist"),
    Case("train --config th.json --workdir w", "th.json: describes no run", files={"th.json": "{}"}),
    Case("train --config th.json --workdir w", "th.json: is not JSON", files={"th.json": "{"}),
    Case("train --config th.json --workdir w", "th.json: describes no run", files={"th.json": "[]"}),
    Case("train --config c.txt --workdir w", "c.txt: a config is a Python file", files={"c.txt": "{}"}),
    Case(
        "train --config c.gin --workdir w", "c.gin: a gin file is given with --gin_file", files={"c.gin": ""}
    ),
    # Several processes.
    Case("train --config c.py --workdir w --processes 0", "--processes 0: must be at least 1"),
    Case("train --config c.py --workdir w --start-timeout 0", "--start-timeout 0.0: must be above 0"),
    Case("train --config c.py --workdir w --processes 2", "coordinator=None: is not given: name coordinator"),
    Case(
        "train --config c.py --workdir w --coordinator host --processes 2 --process 1",
        "coordinator='host': must be HOST:PORT, the address of process 0 and a free port",
    ),
    Case(
        "evaluate --coordinator host:1 --processes 2 --process 2",
        "process=2: must be a number from 0 to 1, of processes=2",
    ),
    Case(
        "calibrate --coordinator localhost:1 --processes 2 --process 1 --start-timeout 0.2",
        "--coordinator localhost:1: process 1 cannot reach process 0 there ( … start it, name its address",
    ),
    # Gin.
    Case("train --gin_file none.gin --workdir w", "gin file none.gin does not exist"),
    Case("train --gin_file c.gin --config c.py --workdir w", "--gin_file c.gin … leave one out"),
    Case("train --gin_param A.b=1 --config c.py --workdir w", "--gin_param A.b=1 … leave one out"),
    Case(
        "train --gin_file c.gin --config.train.lr=1 --workdir w",
        "--config.train.lr=1 is not an override of a gin file: write --gin_param",
    ),
    Case(
        "train --gin_param TrainConfig.lrr=1 --workdir w",
        "TrainConfig has no parameter lrr: did you mean lr?",
    ),
    Case(
        "train --gin_file c.gin --workdir w",
        "c.gin line 1: there is no TrianConfig: did you mean TrainConfig?",
        files={"c.gin": "TrianConfig.lr = 1.0\n"},
    ),
    Case(
        "train --gin_file c.gin --workdir w",
        "c.gin line 1: … fix the line",
        files={"c.gin": "TrainConfig.lr = \n"},
    ),
    Case(
        "train --gin_file c.gin --workdir w",
        "model=None: describe a model, or name a checkpoint",
        files={"c.gin": "TrainConfig.lr = 1.0\n"},
    ),
    Case("train --config . --workdir w", "config file . does not exist"),
    # Traces.
    override("--profile 3:1", "--profile='3:1': the first step comes after the last"),
    override("--profile none", "--profile='none': must be FIRST:LAST, such as 10:13, or a count of steps"),
    override("--profile 2:4", "log.profile='2:4': the run has train.steps=3; name fewer or earlier ones"),
    set_to("log.peak_tflops", "-1", "log.peak_tflops=-1"),
    config("", "config file c.py has no function get_config: define"),
    config("get_config = 5", "config file c.py has no function get_config: define"),
    config("def get_config(:\n", "c.py line 1: SyntaxError: … fix this line"),
    config("x = 1\n\n  y = 2\n", "c.py line 3: IndentationError: … fix this line"),
    config(
        "import no_such_module\n",
        "c.py line 1: ModuleNotFoundError: No module named 'no_such_module'; install it",
    ),
    config("from elastic_lm import frob\n", "c.py line 1: ImportError: … fix the file"),
    config("x = {}\nx['a']\n", "c.py line 2: KeyError: 'a'; fix the file"),
    config(
        "def get_config(arg):\n    return 1 / 0\n",
        "c.py line 2: ZeroDivisionError: division by zero; fix the file",
    ),
    config(
        "def get_config():\n    return {}\n", "c.py: TypeError: get_config() takes 0 positional arguments"
    ),
    config("def get_config(arg):\n    return get_config(arg)\n", "c.py line 2: RecursionError"),
    config("import sys\nsys.exit(3)\n", "c.py line 2: SystemExit: 3; fix the file"),
    config("def get_config(arg):\n    raise SystemExit\n", "c.py line 2: SystemExit"),
    config("def get_config(arg):\n    pass\n", "c.py: get_config returned None: it must return a RunConfig"),
    config(
        "def get_config(arg):\n    return [1]\n", "c.py: get_config returned [1]: it must return a RunConfig"
    ),
    config("def get_config(arg):\n    raise ValueError('arg must be big')\n", "c.py line 2: arg must be big"),
    config(
        "from elastic_lm import TrainConfig\ndef get_config(arg):\n    return TrainConfig(steps=0)\n",
        "c.py line 3: train.steps=0: must be at least 1",
    ),
    config("def get_config(arg):\n    return {'train': 5}\n", "train=5: must be a mapping"),
    config("def get_config(arg):\n    return {'model': None, 'data': []}\n", "data=[]: must be a mapping"),
    config("def get_config(arg):\n    return {'tarin': {}}\n", "unknown key tarin={}: did you mean train?"),
    config("def get_config(arg):\n    return {5: {}}\n", "unknown key 5={}"),
    config("def get_config(arg):\n    return {}\n", "model=None: describe a model, or name a checkpoint"),
    config(b"def get_config(arg):\n    return '\xff'\n", "c.py … SyntaxError: … utf-8"),
    # Overrides.
    override("--steps 2", "'--steps' is not an override: write --config.section.key=value"),
    override("--config.train.steps", "'--config.train.steps' is not an override"),
    override("frob", "'frob' is not an override"),
    override("--config.train.lr --config.train.steps=2", "'--config.train.lr' is not an override"),
    override("--config.train.steps 0", "train.steps=0: must be at least 1"),
    set_to("exits[0].layer", "2", "exits[0].layer: exits has 0 entries"),
    set_to("data.paths[1]", "t.txt", "data.paths[1]: data.paths has 1 entries, counted from 0"),
    set_to("seed", "-1", "seed=-1: must be in [0, 2**32)"),
    set_to("log.writers", "csv", "log.writers[0]='csv': must be one of jsonl, tensorboard, wandb"),
    set_to("log.writers", "none_such:X", "log.writers[0]='none_such:X': none_such cannot be imported"),
    override("--sweep train.seed", "--sweep='train.seed': write KEY=VALUE,VALUE"),
    override("--sweep train.seed=0,0", "--sweep='train.seed=0,0': names 0 twice"),
    override("--sweep train.steps=3,0", "train.steps=0: must be at least 1"),
    override("--sweep train.stepz=3", "unknown key train.stepz=3: did you mean train.steps?"),
    set_to("train.stepz", "2", "unknown key train.stepz=2: did you mean train.steps?"),
    set_to("trian.steps", "2", "unknown key trian"),
    set_to("train.steps.more", "2", "train.steps.more: steps has no keys of its own"),
    set_to("train.steps", "many", "train.steps='many': must be of type int"),
    set_to("train.steps", "1.5", "train.steps=1.5: must be of type int"),
    set_to("train.steps", "0", "train.steps=0: must be at least 1"),
    set_to("train.steps", "none", "train.steps=None: must be of type int"),
    set_to("train.lr", "0", "train.lr=0: must be positive and finite"),
    set_to("train.lr", "-1e-3", "train.lr=-0.001: must be positive and finite"),
    set_to("train.lr", "1e999", "train.lr=inf: must be positive and finite"),
    set_to("train.lr", "nan", "train.lr='nan': must be of type float"),
    set_to("train.b1", "1.0", "train.b1=1.0: must be in [0, 1)"),
    set_to("train.clip", "-1", "train.clip=-1: must be at least 0"),
    set_to("train.save_minutes", "-1", "train.save_minutes=-1: must be at least 0"),
    set_to("train.keep_period", "-2", "train.keep_period=-2: must be at least 0"),
    set_to("train.warmup", "3", "train.warmup=3: must be below steps=3"),
    set_to("train.min_lr", "2", "train.min_lr=2: is a share of lr"),
    set_to("train.schedule", "frob", "train.schedule='frob': must be one of cosine"),
    set_to("train.optimizer", "sgd", "train.optimizer='sgd': must be one of adamw"),
    set_to("train.dtype", "int8", "train.dtype='int8': must be one of"),
    set_to("train.seed", "-1", "train.seed=-1: must be in [0, 2**32)"),
    set_to("train.seed", "4294967296", "train.seed=4294967296: must be in [0, 2**32)"),
    set_to("train.accumulate", "3", "train.accumulate=3: must divide data.batch_size=2"),
    set_to("train.remat", "maybe", "train.remat='maybe': must be True or False, or one of none"),
    set_to("train.nu_dtype", "float16", "train.nu_dtype='float16': must be float32 or bfloat16"),
    set_to("train.attention", "splash", "train.attention='splash': runs on TPUs, and the devices are cpu"),
    set_to("mesh.sequence", "3", "sequence=3 does not fit"),
    set_to("train.init_layers", "1", "train.init_layers=1: keeps layers of a checkpoint: name it"),
    set_to("train.init_from", "nowhere", "no tokenizer at nowhere"),
    set_to("train.init_from", "hdfs://bucket/m", "hdfs://bucket/m"),
    set_to("data.batch_size", "0", "data.batch_size=0: must be at least 1"),
    set_to("data.shards", "3", "data.shards=3: must divide data.batch_size=2: every shard"),
    set_to("data.seq_len", "0", "data.seq_len=0: must be at least 1"),
    set_to("data.seq_len", "128", "data.seq_len=128: above model.max_len=64; shorten it"),
    set_to("data.source", "web", "data.source='web': must be one of stdlib"),
    set_to("data.paths", "('no*.txt',)", "data path no*.txt: no file matches this pattern"),
    set_to("data.packing", "tight", "data.packing='tight': must be one of"),
    set_to("data.paths", "()", "data.paths=(): source='text' reads files: name at least one"),
    set_to("data.paths", "5", "data.paths=5: must be a tuple: write ('5',)"),
    set_to("data.paths", "(5,)", "data.paths[0]=5: must be of type str"),
    set_to("data.paths", "('nowhere.txt',)", "data path nowhere.txt: does not exist"),
    set_to(
        "data.paths",
        "('empty.txt',)",
        "empty.txt is empty: remove it from the data paths",
        files={"empty.txt": ""},
    ),
    set_to(
        "data.paths", "('folder',)", "data path folder: no file ending in .txt", files={"folder/x.bin": ""}
    ),
    set_to(
        "data.paths", "('t.txt.gz',)", "t.txt.gz is not a complete gzip file", files={"t.txt.gz": "no gzip"}
    ),
    set_to(
        "data.paths",
        "('t.txt.gz',)",
        "t.txt.gz is not a complete gzip file",
        files={"t.txt.gz": gzip.compress(b"abc" * 99, mtime=0)[:-9]},
    ),
    set_to(
        "data.paths",
        "('l.txt',)",
        "l.txt … UTF-8",
        files={"l.txt": b"caf\xe9 " * 999},
    ),
    set_to("data.tokenizer", "nowhere", "no tokenizer at nowhere"),
    set_to("model", "5", "model=5: must be a mapping"),
    set_to("model.n_heads", "3", "d_model=16: is not a multiple of n_heads=3"),
    set_to("model.vocab_size", "100", "vocab_size=100: byte-level BPE needs at least 257"),
    set_to("model.vocab_size", "2000000000", "64,000,003,664 parameters … make it smaller"),
    set_to("model.norm", "batch", "norm='batch': must be one of rmsnorm"),
    set_to("exits", "(1,)", "exits[0]=1: must be a mapping"),
    set_to("exits", "({'layer': 1},)", "method.name='pretraining': trains no exits: choose"),
    set_to("method.name", "frob", "frob"),
    set_to("method", "5", "method=5"),
    set_to("mesh.tensor", "64", "mesh"),
    set_to("mesh.data", "0", "mesh"),
    override("'--config.method.name=ee_tuning'", "exits"),
    # Workdirs.
    override("--workdir file", "file is a file and no folder; choose another path", files=FILE),
    override("--workdir file/w", "file is a file and no folder; choose another path", files=FILE),
    override("--workdir hdfs://bucket/w", "hdfs://bucket/w: remote paths of this kind are not supported"),
    override("", "the next `elastic-lm quickstart` replaces it; choose another", files={"w/.quickstart": ""}),
    override("", "w/run.json: does not describe a run … choose another workdir", files={"w/run.json": "{"}),
    override("", "w/run.json", files={"w/run.json": DEEP}),
    override(
        "", "w/model: is no elastic checkpoint and is not replaced", files={"w/model/thesis.txt": "mine"}
    ),
    # Tasks.
    task("--config.task.problem=frob", "task.problem='frob': must be one of classification"),
    task("--config.method.temperature=0", "method={'temperature': 0}: must be a mapping with a name: one of"),
    task("'--config.task.paths=()'", "task.paths=(): name the training files"),
    task("\"--config.task.paths=('nowhere',)\"", "data path nowhere: does not exist"),
    task("\"--config.task.labels=('a','a')\"", "task.labels=('a', 'a'): names a class twice"),
    task("--config.task.max_len=0", "task.max_len=0: must be at least 1"),
    task("--config.task.batch_size=0", "task.batch_size=0: must be at least 1"),
    task("--config.task.problem=text_to_text", "encoder"),
    task(
        "--config.task.text_field=txt --config.task.max_len=16",
        "has no text under 'txt'; found: text, label",
        leaves=("w", "w/*"),
        prints=True,
        long=True,
    ),
    task("--config.task.label_field=lable", "t.jsonl line 1 … 'lable'"),
    task("", "t.jsonl line 1 is not JSON", record="{"),
    task("", "t.jsonl: no records in it", record="[]\n"),
    task("", "t.jsonl is empty", record=""),
    task("", "task.label_field=label=['b']: is the same everywhere", record='{"text": "a", "label": "b"}\n'),
    task("--config.train.init_from=nowhere", "nowhere"),
    task(
        "--config.method.name=task_tuning --config.method.temperature=0",
        "method.temperature=0: must be positive",
    ),
    task(
        "--config.method.name=task_tuning --config.method.distil=0.5",
        "method.distil=0.5: goes with method.teacher_from=''",
    ),
]

QUICKSTART = [
    Case("quickstart --out file", "file is a file and no folder; choose another path", files=FILE),
    Case("quickstart --out file/x", "file is a file and no folder; choose another path", files=FILE),
    Case("quickstart --out hdfs://bucket/x", "hdfs://bucket/x: remote paths of this kind are not supported"),
    Case(
        "quickstart --out q",
        "q was not written by an earlier quickstart … choose another --out",
        files={"q/report.json": "mine"},
    ),
    Case(
        "quickstart --out q",
        "q/model was not written by an earlier quickstart",
        files={"q/model/thesis.txt": "mine"},
    ),
    Case(
        "quickstart --hf-dir hf --from-scratch",
        "--from-scratch trains a model and --hf-dir hf reads one: give one",
    ),
    Case("quickstart --steps 1", "steps=1: at least 2 steps are needed"),
    Case("quickstart --pretrain-steps 0", "pretrain_steps=0: at least 2 steps are needed"),
    Case("quickstart --steps x", "argument --steps: invalid int value: 'x'"),
    Case("quickstart --exits x", "'x' is not a list of layers like 3,6,9"),
    Case("quickstart --exits 1,1", "exits=(1, 1): name every layer once"),
    Case("quickstart --exits 0", "exit.layer=0: layers are counted from 1"),
    Case("quickstart --exits 1 --kind frob", "exit.kind='frob': must be one of embedding"),
    Case("quickstart --minutes 0", "minutes=0.0: must be above 0"),
    Case("quickstart --minutes nan", "minutes=nan: must be above 0"),
    Case("quickstart --targets 2", "2 is not a share between 0 and 1"),
    Case("quickstart --targets ''", "'' is not a share like 0.99"),
    Case("quickstart --targets 0.9,x", "'x' is not a share like 0.99"),
    Case("quickstart --metric frob", "metric='frob': must be one of"),
    Case("quickstart --metric learned", "metric='learned': reads gates"),
    Case("quickstart --seed -1", "seed=-1: must be in [0, 2**32)"),
    Case("quickstart --seed 4294967296", "seed=4294967296: must be in [0, 2**32)"),
    Case("quickstart --color purple", "argument --color: invalid choice: 'purple'"),
    Case("quickstart --ot x", "unknown argument --ot: did you mean --out?"),
    Case(
        "quickstart --hf-dir nowhere --out q",
        "nowhere: expected a Hugging Face folder",
        prints=True,
        leaves=("q",),
    ),
    Case("quickstart --hf-dir {enc} --out q", "holds an encoder", prints=True, leaves=("q",)),
    Case("quickstart --hf-dir {hf} --exits 9 --out q", "9 … 3 layers", prints=True, leaves=("q",)),
    Case(
        "quickstart --hf-dir {bare} --data nowhere --out q",
        "data path nowhere: does not exist",
        prints=True,
        leaves=("q", "q/text"),
    ),
]


LONG_ROWS = "--data {book} --seq-len 256 --tokens 512"


def held_out(command: str) -> list[Case]:
    """What `calibrate`, `evaluate` and `preview` refuse alike."""
    start = f"{command} --model {{hf}}"
    return [
        Case(f"{start} --tokens 0", "--tokens 0: must be at least 1"),
        Case(f"{start} --seq-len 0", "--seq-len 0: must be at least 1"),
        Case(f"{start} --tokens x", "argument --tokens: invalid int value: 'x'"),
        Case(f"{start} --data nowhere.txt", "data path nowhere.txt: does not exist"),
        Case(f"{start} --data", "argument --data: expected at least one argument"),
        Case(
            f"{start} --data a.txt b.jsonl", "--data a.txt b.jsonl: give text files or JSON lines, not both"
        ),
        Case(f"{start} --data empty.txt", "empty.txt is empty: remove it", files={"empty.txt": ""}),
        Case(f"{start} --data t.txt.gz", "t.txt.gz is not a complete gzip file", files={"t.txt.gz": "no"}),
        Case(f"{start} --data d.jsonl", "d.jsonl line 1 is not JSON", files={"d.jsonl": "{\n"}),
        Case(
            f"{start} --data d.jsonl",
            "d.jsonl line 2 has no text under 'text'; found: txt",
            files={"d.jsonl": '{"text": "a"}\n{"txt": "a"}\n'},
        ),
        Case(f"{start} --data d.jsonl", "d.jsonl line 1", files={"d.jsonl": DEEP}),
        Case(
            f"{start} --data d.jsonl",
            "d.jsonl line 1",
            files={"d.jsonl": '{"text": "\\ud800"}\n'},
        ),
        Case(
            f"{start} --data l.txt",
            "l.txt … UTF-8",
            files={"l.txt": b"caf\xe9 " * 2000},
        ),
        Case(f"{command} --model nowhere", "nowhere: expected a Hugging Face folder"),
        Case(f"{command} --model {{enc}}", "holds an encoder"),
        Case(
            f"{command} --model hdfs://bucket/m",
            "hdfs://bucket/m: remote paths of this kind are not supported",
        ),
    ]


CALIBRATE = [
    *held_out("calibrate"),
    Case(f"calibrate --model {{hf}} {LONG_ROWS}", "seq_len=256: above max_len=128; shorten"),
    *(
        Case(f"calibrate --model {{hf}} {flags}", says)
        for flags, says in (
            ("--target 0", "argument --target: 0 is not a share between 0 and 1"),
            ("--target 2", "argument --target: 2 is not a share between 0 and 1"),
            ("--target x", "argument --target: 'x' is not a share like 0.99"),
            ("--target nan", "argument --target: nan is not a share between 0 and 1"),
            ("--margin -0.1", "--margin -0.1: must be a share from 0 to below 1"),
            ("--margin 1", "--margin 1.0: must be a share from 0 to below 1"),
            ("--margin nan", "--margin nan: must be a share from 0 to below 1"),
            ("--margin 0.01 --epsilon 0.05", "--margin 0.01: with --epsilon … leave it out"),
            ("--metric frob", "metric='frob': must be one of"),
            ("--metric learned --data {book} --seq-len 32", "metric='learned' … gate"),
            ("--strategy frob", "argument --strategy: invalid choice: 'frob'"),
            ("--epsilon 2", "argument --epsilon: 2 is not a share between 0 and 1"),
            ("--delta 0.1", "--delta 0.1: is part of a guarantee; give --epsilon too"),
            ("--epsilon 0.1 --strategy platt", "--strategy platt: with --epsilon thresholds are joint"),
            ("--window 0", "--window 0: must be at least 1"),
            ("--continuations -1", "--continuations -1: must be at least 0"),
            ("--new-tokens 0", "--new-tokens 0: must be at least 1"),
            ("--out .", ".: Is a directory"),
            (
                "--out hdfs://bucket/t.json",
                "hdfs://bucket/t.json: remote paths of this kind are not supported",
            ),
            ("--outt x", "unknown argument --outt: did you mean --out?"),
        )
    ),
    Case(
        "calibrate --model {hf} --out file/t.json",
        "file is a file and no folder; choose another path",
        files=FILE,
    ),
    Case("calibrate --model {bare} --data {book} --tokens 64 --seq-len 16", "has no exits: tune some"),
    Case(
        "calibrate --model {hf} --data t.txt --seq-len 32 --continuations 0",
        "1 held-out sequence(s): at least 2 are needed",
        files={"t.txt": "def f(x)"},
        long=True,
    ),
]

DRAFTER = [
    Case(f"drafter --model {{hf}} {flags}", says)
    for flags, says in (
        ("--prompts 0", "--prompts 0: must be at least 1"),
        ("--prompts x", "argument --prompts: invalid int value: 'x'"),
        ("--new-tokens 0", "--new-tokens 0: must be at least 2"),
        ("--window 1", "--window 1: must be at least 2"),
        ("--batch-size 0", "--batch-size 0: must be at least 1"),
        ("--data nowhere.txt", "data path nowhere.txt: does not exist"),
        ("--dtype int8", "argument --dtype: invalid choice: 'int8'"),
    )
]

EVALUATE = [
    *held_out("evaluate"),
    Case(f"evaluate --model {{hf}} {LONG_ROWS}", "--context 256: must be at most 128"),
    Case("evaluate --model {hf} --thresholds nowhere.json", "nowhere.json: no such thresholds file"),
    Case(
        "evaluate --model {hf} --thresholds {other_thresholds}",
        "exits after layers (2,), the model has (1, 2)",
    ),
    Case("evaluate --model {bare} --thresholds {thresholds}", "the model has none"),
    Case(
        "evaluate --model {hf} --json file/x.json",
        "file is a file and no folder; choose another path",
        files=FILE,
    ),
    Case("evaluate --model {hf} --limit 3", "--limit 3: is about tasks; add --tasks NAME,NAME"),
    Case("evaluate --model {hf} --tasks piqa --stride 2", "--stride 2: is about text; leave it out"),
    Case("evaluate --model {hf} --tasks , --limit 3", "--tasks: ',' names no task"),
    Case("evaluate --model {hf} --tasks piqa --num-fewshot -1", "--num-fewshot -1: must be at least 0"),
    Case("evaluate --model {hf} --continuations -1", "--continuations -1: must be at least 0"),
    Case("evaluate --model {hf} --treshold 1", "unknown argument --treshold: did you mean --thresholds?"),
]

PREVIEW = [
    *held_out("preview"),
    Case("preview --model {hf} --agreement 2", "argument --agreement: 2 is not a share between 0 and 1"),
    Case("preview --model {hf} --agreement x", "argument --agreement: 'x' is not a share like 0.99"),
    Case(
        "preview --model {hf} --out file/p", "file is a file and no folder; choose another path", files=FILE
    ),
]

PLAN = [
    Case("plan --model {hf} --targets 1", "--targets 1.0: must be below 1"),
    Case("plan --model {hf} --targets x", "'x' is not a share like 0.99"),
    Case("plan --model {hf} --targets 0.9,-1", "-1 is not a share between 0 and 1"),
    Case("plan --model {hf} --minutes 0", "--minutes 0.0: must be above 0"),
    Case("plan --model {hf} --minutes nan", "--minutes nan: must be above 0"),
    Case("plan --model {hf} --batch-size 0", "--batch-size 0: must be at least 1"),
    Case("plan --model {hf} --window 1", "--window 1: must be at least 2"),
    Case("generate --prompt a --dtype int8", "argument --dtype: invalid choice: 'int8'"),
    Case("generate --prompt a --profile p --stream", "--profile p: traces one call … leave --stream out"),
    Case("quickstart --dtype int8", "argument --dtype: invalid choice: 'int8'"),
    Case("plan --model {hf} --dtype int8", "argument --dtype: invalid choice: 'int8'"),
    Case("plan --model {hf} --json file/x", "file is a file and no folder; choose another path", files=FILE),
    Case("plan --model {hf} --json .", ".: Is a directory"),
    Case("plan --model nowhere", "nowhere: expected a Hugging Face folder"),
    Case("plan --model {enc}", "holds an encoder"),
    Case("plan --model {hf} --data nowhere", "nowhere: does not exist"),
    Case("plan --model {hf} --data t.txt", "--data", files={"t.txt": "def f"}),
    Case("plan --model {hf} --minuets 1", "unknown argument --minuets: did you mean --minutes?"),
]

SUBNETS = [
    Case("subnets --model nowhere", "nowhere: expected a Hugging Face folder"),
    Case("subnets --model {enc}", "holds an encoder"),
    Case("subnets --model {ck} --add a", "--add a: say what it is: --subnet mlp=50%"),
    Case("subnets --model {ck} --subnet mlp=50%", "--subnet and --budget say what --add NAME is"),
    Case("subnets --model {ck} --data t.txt", "--data t.txt: is read with --measure", files={"t.txt": "a"}),
    Case("subnets --model {ck} --names whole", "--names whole: is read with --measure"),
    Case("subnets --measure", "--model: the embedded model is not changed; name a folder"),
    Case("subnets --model {ck} --remove w5", "subnet='w5': the model has no sub-network … did you mean w50"),
    Case("subnets --model {ck} --add-table nowhere.csv", "nowhere.csv: no such table of sub-networks"),
    Case(
        "subnets --model {ck} --add-table t.csv",
        "t.csv: columns=['a', 'b']: there is no name and no FFN Hidden Dims",
        files={"t.csv": "a,b\n1,2\n"},
    ),
]

LATENCY = [
    Case("latency", "required: build|verify"),
    Case("latency frob", "argument build|verify: invalid choice: 'frob'"),
    Case("latency build --table {table}", "--table … goes with `latency verify`; leave it out"),
    Case("latency build --json x", "--json x: goes with `latency verify`; leave it out"),
    Case("latency build --subnets 3", "--subnets 3: goes with `latency verify`; leave it out"),
    Case("latency verify --table {table} --mlp 0.5,1", "--mlp … is settled by --table"),
    Case("latency verify --table nowhere.json", "nowhere.json: no such latency table; measure again"),
    Case(
        "latency verify --table t.json",
        "t.json: not a usable latency table … measure again",
        files={"t.json": "[]"},
    ),
    Case(
        "latency verify --table t.json",
        "t.json: not a usable latency table",
        files={"t.json": DEEP},
    ),
    Case("latency verify --tiny --table {table}", "table.json: model … measure again"),
    Case("latency verify --subnets 0", "--subnets 0: must be at least 1"),
    Case("latency build --rounds 0", "--rounds 0: must be at least 1"),
    Case("latency build --seed -1", "--seed -1: must be in [0, 2**32)"),
    Case("latency build --tiny --model {ck}", "--tiny: stands for a model of its own"),
    Case("latency build --tiny --batch 0", "workload.batch=0: must be at least 1"),
    Case("latency build --tiny --context -1", "workload.context=-1: must be at least 0"),
    Case("latency build --tiny --context 0", "workload.context=0: must be from 1 to"),
    Case("latency build --tiny --context 100000", "workload.context=100000: must be from 1 to"),
    Case("latency build --tiny --mlp 2", "2 is not a share between 0 and 1"),
    Case("latency build --tiny --mlp 0.5", "menu.mlp=(0.5,): must be shares … the last one 1.0"),
    Case("latency build --tiny --mlp 0.3,1", "menu.mlp=0.3: must give"),
    Case("latency build --model nowhere", "nowhere: expected a Hugging Face folder"),
    Case("latency build --model {enc}", "holds an encoder"),
    Case("latency build --out file/x", "file is a file and no folder; choose another path", files=FILE),
]

BENCH = [
    Case("bench", "required: NAME"),
    Case("bench nope", "benchmark 'nope' does not exist: choose from decode"),
    Case("bench decode --rounds 0", "--rounds 0: must be at least 1"),
    Case("bench decode --rounds x", "argument --rounds: invalid int value: 'x'"),
    Case("bench decode --seed -1", "--seed -1: must be in [0, 2**32)"),
    Case("bench widths --seed 4294967296", "--seed 4294967296: must be in [0, 2**32)"),
    Case("bench decode --json file/x", "file is a file and no folder; choose another path", files=FILE),
    Case("bench real --tiny", "--model: bench real measures a model of your own; name its folder"),
    Case("bench real --model nowhere", "nowhere: expected a Hugging Face folder"),
    Case("bench real --model {enc}", "holds an encoder"),
    Case("bench real --model {hf} --data nowhere", "data path nowhere: does not exist"),
    Case("bench real --model {hf} --data t.txt", "--data", files={"t.txt": "def f"}),
    Case("bench train --tniy", "unknown argument --tniy: did you mean --tiny?"),
]


def fit(flags: str, says: str, **more: Any) -> Case:
    command = f"cascade fit --swift {{enc}} --super {{enc}} --data {{records}} {flags}"
    return Case(command, says, **more)


def run(flags: str, says: str, **more: Any) -> Case:
    command = f"cascade run --swift {{enc}} --super {{enc}} --data {{records}} --out o.jsonl {flags}"
    return Case(command, says, **more)


ANSWERED_BY_AN_EXIT = "cascade run --super {hf} --swift-exit 1 --data {choices} --threshold 1 --out o.jsonl"

CASCADE = [
    Case("cascade", "required: fit|run"),
    Case("cascade frob", "invalid choice: 'frob'"),
    Case("cascade fit --swift a --super b", "required: --data"),
    Case(
        "cascade run --super {enc} --data {records} --threshold 1 --out o.jsonl",
        "--swift: name the small model, or --swift-exit",
    ),
    Case("cascade run --swift {enc} --super {enc} --data {records} --threshold 1", "required: --out"),
    run("", "--rule None, --threshold None: give one of them"),
    run("--threshold 1 --rule {rule}", "give one of them"),
    run("--rule {rule} --score margin", "--score margin: is settled by --rule; leave it out"),
    run("--rule nowhere.json", "nowhere.json: no such cascade rule; `elastic-lm cascade fit` writes one"),
    run("--rule r.json", "r.json: not a usable cascade rule", files={"r.json": "[]"}),
    run("--rule r.json", "r.json: not a usable cascade rule", files={"r.json": DEEP}),
    run(
        "--rule r.json",
        "threshold=inf: must be a finite number",
        files={"r.json": '{"format": "elastic_lm routing 1", "threshold": Infinity}'},
    ),
    run(
        "--rule r.json",
        "threshold='1': must be of type float",
        files={"r.json": '{"format": "elastic_lm routing 1", "threshold": "1"}'},
    ),
    run(
        "--rule r.json",
        "provenance",
        files={"r.json": '{"format": "elastic_lm routing 1", "threshold": 1, "provenance": null}'},
    ),
    run("--threshold nan", "threshold=nan: must be a finite number"),
    run("--threshold x", "argument --threshold: 'x' is no number, nor numbers with commas"),
    run("--threshold 1 --swift-exit 1", "--swift-exit 1: is an exit of the Super; leave --swift out"),
    run("--threshold 1 --batch-size 0", "--batch-size=0: must be at least 1"),
    run("--threshold 1 --temperature 0", "temperature=0.0: must be positive"),
    run("--threshold 1 --centre median", "argument --centre: invalid choice: 'median'"),
    run("--threshold 1 --score frob", "--score='frob': must be one of energy"),
    run("--threshold 1 --seed -1", "--seed -1: must be in [0, 2**32)"),
    run("--threshold 1 --super-cost -1", "--super-cost=-1.0: must be at least 0"),
    run("--threshold 1 --super-cost 1", "--super-cost=1.0: is of a service"),
    run("--threshold 1 --max-len 0", "max_len=0: must be at least 1"),
    run("--threshold 1 --max-len 9999", "max_len=9999: must be … 64"),
    run("--threshold 1 --max-new-tokens 4", "--max-new-tokens=4: is read by … leave it out"),
    run(
        "--threshold 1 --template '{text}'",
        "--template='{text}': is read by encoder-decoders",
    ),
    run("--threshold 1 --style openai", "--style='openai': is read by services"),
    run(
        "--threshold 1 --text-field txt",
        "--text-field='txt': is no field of the first record … which has text, label",
    ),
    run("--threshold 1 --pair-field txt", "--pair-field='txt': is no field of the first record"),
    run(
        "--threshold 1 --choices-field chioces", "--choices-field='chioces': is no field of the first record"
    ),
    Case(
        f"{ANSWERED_BY_AN_EXIT} --choices-field chioces",
        "--choices-field='chioces': is no field of the first record … which has text, choices, label",
    ),
    Case(
        "cascade run --super {hf} --swift-exit 9 --data {choices} --threshold 1 --out o.jsonl",
        "9",
    ),
    Case(
        "cascade run --super {bare} --swift-exit 1 --data {choices} --threshold 1 --out o.jsonl",
        "exit",
    ),
    Case(
        "cascade run --super {t5} --swift-exit 1 --data {records} --threshold 1 --out o.jsonl",
        "--swift-exit 1 … has no exits; name a model",
    ),
    Case(
        "cascade run --swift {t5} --super {t5} --data {records} --threshold 1 --out o --template '{txt}'",
        "--template='{txt}': its {txt} is no field",
    ),
    Case(
        "cascade run --swift {t5} --super {t5} --data {records} --threshold 1 --out o.jsonl --template '{'",
        "--template {",
    ),
    Case(
        "cascade run --swift {t5} --super {t5} --data {records} --threshold 1 --out o.jsonl --labels a,a",
        "--labels='a,a': must be different texts",
    ),
    Case(
        "cascade run --swift {reg} --super {enc} --data {records} --threshold 1 --out o.jsonl",
        "is a regression",
    ),
    Case("cascade run --swift nowhere --super {enc} --data {records} --threshold 1 --out o.jsonl", "nowhere"),
    Case("cascade run --swift {enc} --super nowhere --data {records} --threshold 1 --out o.jsonl", "nowhere"),
    Case(
        "cascade run --swift Function:no.py --super {enc} --data {records} --threshold 1 --out o.jsonl",
        "no.py: No such file",
    ),
    Case(
        "cascade run --swift Function:f.py --super {enc} --data {records} --threshold 1 --out o.jsonl",
        "f.py has no function answer: define",
        files={"f.py": ""},
    ),
    Case(
        "cascade run --swift Function:f.py --super {enc} --data {records} --threshold 1 --out o.jsonl",
        "f.py line 1: SyntaxError: … fix this line",
        files={"f.py": "def answer(:"},
    ),
    Case(
        "cascade run --swift Function:f.py --super {enc} --data {records} --threshold 1 --out o.jsonl",
        "f.py line 1: SystemExit: 3",
        files={"f.py": "raise SystemExit(3)"},
    ),
    Case(
        "cascade run --swift Answer:f.py --super {enc} --data {records} --threshold 1 --out o.jsonl",
        "is no answerer that a command can make",
        files={"f.py": ""},
    ),
    Case(
        "cascade run --swift {enc} --super http://h --data nowhere.jsonl --threshold 1 --out o.jsonl",
        "nowhere.jsonl",
    ),
    Case(
        "cascade run --swift {enc} --super {enc} --data d.jsonl --threshold 1 --out o.jsonl",
        "--data='d.jsonl': holds no record",
        files={"d.jsonl": ""},
    ),
    Case(
        "cascade run --swift {enc} --super {enc} --data d.jsonl --threshold 1 --out o.jsonl",
        "d.jsonl line 1",
        files={"d.jsonl": "{"},
    ),
    Case(
        "cascade run --swift {enc} --super {enc} --data d.jsonl --threshold 1 --out o.jsonl",
        "d.jsonl line 1",
        files={"d.jsonl": "[1]\n"},
    ),
    Case(
        "cascade run --swift {enc} --super {enc} --data d.jsonl --threshold 1 --out o.jsonl",
        "d.jsonl",
        files={"d.jsonl": DEEP},
    ),
    run(
        "--threshold 1",
        "o.jsonl: exists and was not written by a run like this; choose another path",
        files={"o.jsonl": "mine\n"},
    ),
    run("--threshold 1 --out file/o.jsonl", "file is a file and no folder; choose another path", files=FILE),
    run("--threshold 1 --out .", "."),
    # Fitting.
    fit("", "one of the arguments --target-accuracy --target-cost --super-accuracy"),
    fit("--super-accuracy --risk 0.1", "not allowed with argument"),
    fit("--target-accuracy 2", "2 is not a share between 0 and 1"),
    fit("--target-cost -1", "--target-cost=-1.0: must be at least 0"),
    fit("--target-cost nan", "--target-cost=nan: must be at least 0"),
    fit("--risk 0", "0 is not a share between 0 and 1"),
    fit("--super-accuracy --epsilon 0.1", "--epsilon 0.1: is part of a guarantee; give --risk too"),
    fit("--super-accuracy --tolerance -1", "--tolerance=-1.0: must be at least 0"),
    fit("--super-accuracy --cost joules", "argument --cost: invalid choice: 'joules'"),
    fit(
        "--super-accuracy --out file/r.json", "file is a file and no folder; choose another path", files=FILE
    ),
    fit(
        "--super-accuracy --label-field lable",
        "records.jsonl record 1: no 'lable': --label-field names",
    ),
    fit(
        "--super-accuracy --super http://h --style openai",
        "--super-cost 0: the service does not say what a record costs",
    ),
]

CASES = [
    *GENERATE,
    *MODEL_FOLDERS,
    *CONVERT,
    *EXPORT,
    *PUSH,
    *HUB,
    *TRAIN,
    *QUICKSTART,
    *CALIBRATE,
    *DRAFTER,
    *EVALUATE,
    *PREVIEW,
    *PLAN,
    *LATENCY,
    *SUBNETS,
    *BENCH,
    *CASCADE,
]
