"""An encoder on a task of GLUE, or SuperGLUE's BoolQ or CB, alone or towards a larger model's answers.

COMMAND   hf download google-bert/bert-base-uncased --local-dir models/bert-base-uncased
          elastic-lm train --config glue:DATA,sst2 --workdir runs/sst2
          another encoder: --config.train.init_from=HF_DIR
          towards a teacher that was tuned on the same task:
          --config.method.teacher_from=runs/sst2/model --config.method.distil=0.7
          heads after layers 3 and 6 as well, each a Swift inside the model: --config.exits="(3, 6)"
          (them alone, on a tuned model that stays as it is: --config.train.init_from=runs/sst2/model
          --config.method.tuned=exits)
          a head on the encoder of a T5, by which `elastic-lm cascade --score encoder_energy` goes:
          --config.train.init_from=T5_DIR --config.method.tuned=head --config.task.prefix="sst2 sentence: "
          files of your own: --config.task.paths="('my.csv',)" --config.task.text_field=review
HARDWARE  one accelerator, or a CPU for small encoders
DURATION  on one CPU core a 6-layer encoder of width 384 reads about 15 sentences of 32 tokens per second
EXPECTED  see experiments/elang

`DATA` holds NAME_train.jsonl.gz and NAME_dev.jsonl.gz as listed below (JSON lines, CSV or TSV, packed or
not, under any name that is given as task.paths and task.eval_paths). `z_loss` keeps energies comparable, by
which a cascade decides (`elastic-lm cascade`).
"""

from pathlib import Path

from ml_collections import ConfigDict

PAIR = {"text_field": "sentence1", "pair_field": "sentence2"}
PREMISE = {"text_field": "premise", "pair_field": "hypothesis"}
TASKS = {
    "cola": ("glue_cola_train", "glue_cola_dev", {"text_field": "sentence", "max_len": 64}),
    "sst2": ("glue_sst2_train", "glue_sst2_dev", {"text_field": "sentence", "max_len": 64}),
    "mrpc": ("glue_mrpc_train", "glue_mrpc_dev", PAIR),
    "rte": ("glue_rte_train", "glue_rte_dev", {**PAIR, "max_len": 256}),
    "stsb": ("glue_stsb_train", "glue_stsb_dev", {**PAIR, "problem": "regression"}),
    "qnli": ("glue_qnli_train", "glue_qnli_dev", {"text_field": "question", "pair_field": "sentence"}),
    "qqp": ("glue_qqp_train", "glue_qqp_dev", {"text_field": "question1", "pair_field": "question2"}),
    "mnli": ("glue_mnli_train", "glue_mnli_dev_matched", PREMISE),
    "wnli": ("glue_wnli_train", "glue_wnli_dev", PAIR),
    "cb": ("superglue_cb_train", "superglue_cb_val", {**PREMISE, "max_len": 256}),
    "boolq": (
        "superglue_boolq_train",
        "superglue_boolq_val",
        {"text_field": "question", "pair_field": "passage", "max_len": 256},
    ),
}


def get_config(arg: str = "data/glue,sst2") -> ConfigDict:
    """The recipe; `arg` = the folder with the files, a comma and the name of the task."""
    folder, _, name = (arg or "data/glue,sst2").rpartition(",")
    if name not in TASKS:
        raise ValueError(f"--config glue:{arg}: write FOLDER,TASK with a task of {', '.join(TASKS)}")
    train, held_out, fields = TASKS[name]
    regression = fields.get("problem") == "regression"
    config = ConfigDict()
    config.task = {"paths": (_file(folder, train),), "eval_paths": (_file(folder, held_out),), **fields}
    config.method = {"name": "task_tuning", "z_loss": 0.0 if regression else 1e-4}
    config.train = {
        "init_from": "models/bert-base-uncased",
        "steps": 1000,
        "lr": 1e-4,
        "schedule": "linear",
        "min_lr": 0.0,
        "warmup": 100,
        "weight_decay": 0.01,
        "log_every": 20,
        "eval_every": 250,
        "eval_batches": 0,
        "save_every": 250,
    }
    return config


def _file(folder: str, name: str) -> str:
    """The file of that name with the first suffix that is there."""
    suffixes = (".jsonl.gz", ".jsonl", ".csv", ".tsv")
    files = [Path(folder) / f"{name}{suffix}" for suffix in suffixes]
    return str(next((file for file in files if file.is_file()), files[0]))
