"""Tasks of the lm-evaluation-harness, against its own model of transformers, and as a command."""

import gzip
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import elastic_lm as el
from elastic_lm.cli import harness as plugin
from elastic_lm.cli import main as cli
from elastic_lm.data.tokenizer import train_bpe
from elastic_lm.harness import tasks as harness_tasks
from elastic_lm.harness.model import harness_model
from elastic_lm.testing import random_params, tiny_config

lm_eval = pytest.importorskip("lm_eval", reason='needs pip install "elastic-lm[harness]"')
pytestmark = pytest.mark.long

TEXT = "Question: what is red?\nAnswer: an apple, a rose and the sun in the evening.\n"
ROWS: dict[str, list[dict[str, Any]]] = {
    "arc_easy_test": [
        {"query": f"Question: {q}\nAnswer:", "choices": ["an apple", "the sun", "red"], "gold": i % 3}
        for i, q in enumerate(["What is red?", "What is warm?", "Which colour?", "Who?", "When?"])
    ],
    "arc_easy_train": [
        {"query": f"Question: {q}\nAnswer:", "choices": ["yes", "no"], "gold": 0} for q in ("A?", "B?", "C?")
    ],
    "winogrande_val": [
        {
            "sentence": "Ann thanked Eve because _ had helped.",
            "option1": "Ann",
            "option2": "Eve",
            "answer": "2",
        }
    ],
    "winogrande_train_xl": [
        {"sentence": "The cup broke since _ fell.", "option1": "it", "option2": "he", "answer": "1"}
    ],
    "lambada_test": [{"text": "the sun is red and the rose is red"}, {"text": "an apple is red"}],
    "superglue_boolq_val_orig": [{"passage": "Roses are red.", "question": "are roses red", "label": "true"}],
    "boolq_train": [
        {"query": "The sun is hot.\nQuestion: is it cold?\nAnswer:", "choices": ["yes", "no"], "gold": 1}
    ],
    "piqa_val": [{"goal": "peel an apple", "sol1": "use a knife", "sol2": "use a rose", "label": 0}],
    "piqa_train": [{"goal": "cook", "sol1": "a", "sol2": "b", "label": 1}],
    "hellaswag_val_1k": [{"query": "Cooking: A man cooks. He", "choices": ["eats.", "flies."], "gold": 0}],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("eval")
    for name, rows in ROWS.items():
        with gzip.open(folder / f"{name}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of random weights with two exits, as a Hugging Face folder."""
    path = tmp_path_factory.mktemp("model") / "llama"
    tokenizer = train_bpe([TEXT], 300)
    config = tiny_config(exits=(1, 3), vocab_size=300, max_len=64)
    el.hf.export(config, random_params(config), path, tokenizer)
    return path


def asked(*args: Any) -> Any:
    return SimpleNamespace(args=args)


@pytest.fixture(scope="module")
def both(folder: Path) -> tuple[Any, Any]:
    pytest.importorskip("transformers", reason='needs pip install "elastic-lm[hf]"')
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    model, params = el.load(folder)
    ours = harness_model(model, params, el.Tokenizer.load(folder), batch_size=3)
    return ours, huggingface.HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=3)


def test_log_likelihoods_are_those_of_the_harness_on_transformers(both: tuple[Any, Any]) -> None:
    ours, theirs = both
    requests = [
        *(asked(TEXT, f" {letter}") for letter in "ABCD"),
        asked("Question: ", "what is red?"),
        asked("", "the sun"),
        asked("Answer:", " an apple, a rose"),
        asked(TEXT * 4, " and the sun"),  # longer than the model reads
    ]
    for (own, greedy), (other, other_greedy) in zip(
        ours.loglikelihood(requests), theirs.loglikelihood(requests, disable_tqdm=True), strict=True
    ):
        assert own == pytest.approx(other, abs=1e-3)
        assert greedy == other_greedy


def test_whole_texts_too(both: tuple[Any, Any]) -> None:
    ours, theirs = both
    requests = [asked(TEXT), asked(TEXT * 6), asked("a")]
    expected = theirs.loglikelihood_rolling(requests, disable_tqdm=True)
    assert ours.loglikelihood_rolling(requests) == pytest.approx(expected, abs=5e-3)


def test_continuations_too(both: tuple[Any, Any]) -> None:
    ours, theirs = both
    how = {"until": ["e"], "max_gen_toks": 12, "do_sample": False}
    requests = [asked("Question: what", how), asked(TEXT * 4, how), asked("an", how)]
    assert ours.generate_until(requests) == theirs.generate_until(requests, disable_tqdm=True)


def test_a_count_of_examples_is_forgotten_by_the_next(data: Path) -> None:
    loaded = harness_tasks.load_tasks(["arc_easy"], data)
    counts = []
    for count in (None, 5, 0, 5, None):
        (task,) = harness_tasks.with_examples(loaded, count)["tasks"].values()
        counts.append(task.get_config("num_fewshot"))
    assert counts == [0, 5, 0, 5, 0]


def test_prompts_and_targets_are_written_as_the_harness_writes_them(data: Path) -> None:
    loaded = harness_tasks.load_tasks(
        ["arc_easy", "winogrande", "lambada", "boolq", "piqa", "hellaswag"], data
    )
    tasks = harness_tasks.with_examples(loaded, 0)["tasks"]
    prompts = {}
    for name, task in tasks.items():
        task.build_all_requests(limit=1)
        prompts[name] = [instance.args for instance in task.instances]
    assert prompts["arc_easy"][0] == ("Question: What is red?\nAnswer:", " an apple")
    assert prompts["winogrande"] == [
        ("Ann thanked Eve because Ann", " had helped."),
        ("Ann thanked Eve because Eve", " had helped."),
    ]
    assert prompts["lambada_openai"] == [("the sun is red and the rose is", " red")]
    assert prompts["boolq"][0] == ("Roses are red.\nQuestion: are roses red?\nAnswer:", " no")
    assert prompts["piqa"][1] == ("Question: peel an apple\nAnswer:", " use a rose")
    assert prompts["hellaswag"][0] == ("Cooking: A man cooks. He", " eats.")
    assert [task.doc_to_target(task.task_docs[0]) for task in (tasks["boolq"], tasks["piqa"])] == [1, 0]

    # With the harness's own task files, where the fields of a question are called alike.
    loader = pytest.importorskip("lm_eval.tasks._yaml_loader")
    theirs = Path(lm_eval.__file__).parent / "tasks"
    same = {
        "arc_easy": "arc/arc_easy.yaml",
        "piqa": "piqa/piqa.yaml",
        "boolq": "super_glue/boolq/default.yaml",
        "lambada_openai": "lambada/lambada_openai.yaml",
        "mmlu": "mmlu/default/_default_template_yaml",
    }
    for name, file in same.items():
        own = loader.load_yaml(harness_tasks.TASK_FILES / f"{name}.yaml", resolve_func=False)
        other = loader.load_yaml(theirs / file, resolve_func=False)
        assert own["doc_to_text"] == other["doc_to_text"], name


def test_a_command_measures_every_depth(folder: Path, data: Path, tmp_path: Path) -> None:
    result, picture = tmp_path / "tasks.json", tmp_path / "curve.png"
    command = ["evaluate", "--model", folder, "--tasks", "arc_easy,lambada", "--tasks-data", data]
    flags = ["--limit", 3, "--rows", 2, "--json", result, "--plot", picture, "--subnet", "mlp=50%"]
    assert cli.main([str(part) for part in (*command, *flags)]) == 0

    (part,) = json.loads(result.read_text())["parts"]
    assert [(d["kind"], d["layers"]["arc_easy"]) for d in part["depths"]] == [
        ("exit", 1),
        ("exit", 3),
        ("full", 4),
    ]
    shares = [d["flops_share"]["arc_easy"] for d in part["depths"]]
    assert 0 < shares[0] < shares[1] < shares[2] < 1  # half of the neurons
    assert part["depths"][2]["tasks"]["lambada_openai"]["rows"] == 2
    assert picture.stat().st_size > 1000

    # One exit alone, of the whole model, as a model of the harness asked through its own registry.
    assert cli.main([str(part) for part in (*command, "--exit", 3, "--limit", 3, "--json", result)]) == 0
    (depth,) = json.loads(result.read_text())["parts"][0]["depths"]
    plugin.register()
    lm_class = __import__("lm_eval.api.registry", fromlist=["get_model"]).get_model("elastic_lm")
    added = {"batch_size": 1, "device": "cpu"}  # by the harness's command, whatever is typed
    model = lm_class.create_from_arg_string(f"path={folder},exit=3,batch_size=2", added)
    results = harness_tasks.run_tasks(model, harness_tasks.load_tasks(["arc_easy"], data), limit=3)
    assert harness_tasks.own_results(results)["arc_easy"] == depth["tasks"]["arc_easy"]


def test_what_is_refused(folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def said(*flags: object) -> str:
        assert cli.main(["evaluate", "--model", str(folder), *map(str, flags)]) == 2
        return capsys.readouterr().err.splitlines()[-1]

    assert "--limit 3: is about tasks; add --tasks" in said("--limit", 3)
    assert "--data" in said("--tasks", "arc_easy", "--data", tmp_path)
    assert "tasks='no_such': there is no such task" in said("--tasks", "no_such", "--tasks-data", data)
    assert "no such file of the tasks' data" in said("--tasks", "mmlu", "--tasks-data", data)
    assert "no such folder" in said("--tasks", "arc_easy", "--tasks-data", tmp_path / "nowhere")
    assert "exit=2: the model that runs has exits after layers (1, 3)" in said(
        "--tasks", "arc_easy", "--tasks-data", data, "--exit", 2
    )
