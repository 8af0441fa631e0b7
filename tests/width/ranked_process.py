"""One of two processes that rank a model together, for `test_importance.py`.

Arguments: port of the coordinator, number of this process, file for what it found. Neither process sees all
of a parameter.
"""

import sys

import jax
import numpy as np

from elastic_lm.config.model import ModelConfig
from elastic_lm.data.batch import Batch
from elastic_lm.models.decoder import Params
from elastic_lm.models.sharding import batch_sharding, make_mesh, param_shardings
from elastic_lm.testing import random_params, tiny_config
from elastic_lm.width.importance import layer_scores, permute, rank


def inputs() -> tuple[ModelConfig, Params, Batch]:
    """What is ranked, and on what; the same in every process."""
    config = tiny_config(n_layers=2)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (4, 7), np.int32)
    positions = np.tile(np.arange(7, dtype=np.int32), (4, 1))
    ones = np.ones_like(tokens)
    arrays = (tokens, tokens, ones.astype(np.float32), positions, ones)
    return config, random_params(config), Batch(*map(jax.numpy.asarray, arrays))


def main(port: str, process: int, file: str) -> None:
    """Scores of a model on four devices, two of each process, and its sorted form."""
    jax.distributed.initialize(f"localhost:{port}", 2, process)
    assert (len(jax.devices()), len(jax.local_devices())) == (4, 2)
    mesh = make_mesh(1, 2, 2)
    config, params, batch = inputs()
    params = jax.device_put(params, param_shardings(config, mesh))
    batch = jax.device_put(batch, batch_sharding(mesh))
    kernel = params["layers_0"]["mlp"]["up"]["kernel"]
    assert not kernel.is_fully_addressable
    found = rank(config, params, [batch])
    _, placed = permute(config, params, found, groups=8)
    after = placed["layers_0"]["mlp"]["up"]["kernel"]
    assert after.sharding == kernel.sharding
    np.savez(
        file,
        neurons=found.neurons["layers_0"],
        heads=found.heads["layers_1"],
        channels=found.channels,
        layers=layer_scores(config, params, [batch]),
        **{f"shard_{i}": shard.data for i, shard in enumerate(after.addressable_shards)},
    )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
