"""The model of a training checkpoint: what the run would have left, had it ended at that step."""

from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from elastic_lm.checkpoints.native import check_target, is_step, read_state
from elastic_lm.files.local import local_path
from elastic_lm.models.decoder import Params
from elastic_lm.models.finite import check_finite
from elastic_lm.models.registry import Config
from elastic_lm.models.sharding import make_mesh
from elastic_lm.train.config import TaskRun, with_seeds
from elastic_lm.train.identity import check_identity
from elastic_lm.train.inputs import check_inputs, run_inputs
from elastic_lm.train.optim import make_optimizer
from elastic_lm.train.recipes import load_config
from elastic_lm.train.record import CONFIG_FILE
from elastic_lm.train.run import save_finished
from elastic_lm.train.state import TrainState, abstract_state, cast_params
from elastic_lm.train.tasks.run import prepare_task
from elastic_lm.train.text import prepare_text


def save_step_model(
    step: str | Path, target: str | Path, *, backbone: bool = False, overwrite: bool = False
) -> tuple[Config, Params]:
    """Makes a model of one checkpoint of a training run.

    A checkpoint holds what trains. Its run, which is described beside the checkpoints, adds the rest: frozen
    weights, data and tokenizer must be where they were. Moments of the optimizer are not read.

    Args:
      step: WORKDIR/checkpoints/STEP.
      target: folder of the new model.
      backbone: leave the exits out, as where another method is to begin from the layers.
      overwrite: replace an earlier model at `target`.

    Returns:
      (model config, canonical parameters), as they were saved.

    Raises:
      FileExistsError: `target` holds something that may not be replaced.
      FileNotFoundError: `step` is no training checkpoint, or what its run began with is gone.
      ValueError: the checkpoint is damaged, or the initial checkpoint or the data changed meanwhile.

    Example:
      ```python
      import tempfile

      import elastic_lm as el

      run = el.RunConfig(
          model=el.testing.tiny_config(vocab_size=300),
          data=el.DataConfig(source="stdlib", seq_len=32, batch_size=2),
          train=el.TrainConfig(steps=2, warmup=1, eval_batches=1),
      )
      with tempfile.TemporaryDirectory() as folder:
          el.train.fit(run, f"{folder}/run")
          config, params = el.train.save_step_model(f"{folder}/run/checkpoints/2", f"{folder}/model")
          assert el.load(f"{folder}/model")[0].config == config
      ```
    """
    folder = local_path(step).absolute()
    workdir = folder.parent.parent
    if not is_step(folder) or not (workdir / CONFIG_FILE).is_file():
        raise FileNotFoundError(
            f"{folder}: is no checkpoint of a training run; name WORKDIR/checkpoints/STEP, of a workdir with "
            f"{CONFIG_FILE}"
        )
    path = check_target(target, overwrite)
    config = with_seeds(load_config(str(workdir / CONFIG_FILE)))
    check_identity(config, workdir)

    mesh = make_mesh(devices=jax.devices()[:1])
    prepare: Any = prepare_task if isinstance(config, TaskRun) else prepare_text
    run = prepare(config, workdir, mesh)
    check_inputs(config, run_inputs(config, run), workdir)
    trainable, frozen = run.method.split(run.params)
    trainable = cast_params(trainable, config.train.param_dtype or "float32")
    optimizer = make_optimizer(config.train, run.method.parameter_groups())
    moments = jax.tree.map(lambda _: ocp.PLACEHOLDER, jax.eval_shape(optimizer.init, trainable))
    wanted: Any = {"step": ocp.PLACEHOLDER, "params": abstract_state(trainable), "opt_state": moments}
    trained = read_state(folder, TrainState(**wanted)).params
    check_finite(str(folder), trained)

    params = {**frozen, **trained}
    return save_finished(config, run, params, run.data, path, backbone=backbone, overwrite=overwrite)
