"""One of several processes that do the jobs of a file, [[what, arguments], ...]; `together` starts it."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import elastic_lm as el


def train(config: str, workdir: str) -> None:
    """A whole run; the rows that this process places are kept in a file."""
    import jax
    import numpy as np

    from elastic_lm.train import step, text
    from elastic_lm.train.recipes import load_config
    from elastic_lm.train.tasks import run as tasks

    kept: list[Any] = []

    def place(arrays: Any, mesh: Any, batch: type) -> Any:
        fields = arrays if isinstance(arrays, dict) else dataclasses.asdict(arrays)
        if "tokens" in fields:  # no cached taps
            kept.append(np.asarray(fields["tokens"]))
        return step.place_batch(arrays, mesh, batch)

    for module in (text, tasks):
        module.place_batch = place
    el.fit(load_config(config), workdir)
    np.savez(f"{workdir}.rows{jax.process_index()}.npz", *kept)


def command(*arguments: str) -> None:
    """A command of the package."""
    from elastic_lm.cli import main as cli

    status = cli.main(arguments)
    assert status == 0, f"{arguments}: status {status}"


def export(folder: str, target: str) -> None:
    """A model whose parameters are spread over all processes, as a Hugging Face folder."""
    import jax

    from elastic_lm.files.fingerprints import weights_fingerprint
    from elastic_lm.models.sharding import make_mesh

    model, params = el.load(folder, mesh=make_mesh(1, jax.device_count(), 1))
    assert not all(leaf.is_fully_replicated for leaf in jax.tree.leaves(params))
    el.hf.export(model.config, params, target)
    assert Path(target, "config.json").is_file()  # in every process
    Path(f"{target}.{jax.process_index()}").write_text(weights_fingerprint(params))


def meshes(folder: str) -> None:
    """What several processes saved, on one, four and eight devices of this one."""
    import jax
    import numpy as np

    from elastic_lm.models.sharding import make_mesh

    _, one = el.load(folder)
    for sizes in ((2, 2, 1), (2, 2, 2)):
        count = int(np.prod(sizes))
        _, spread = el.load(folder, mesh=make_mesh(*sizes, devices=jax.devices()[:count]))
        for leaf, due in zip(jax.tree.leaves(spread), jax.tree.leaves(one), strict=True):
            assert len(leaf.devices()) == count
            np.testing.assert_array_equal(leaf, due)


def main() -> None:
    """Does the jobs in order."""
    el.start_processes(timeout=120)
    for what, arguments in json.loads(Path(sys.argv[1]).read_text()):
        globals()[what](*arguments)


if __name__ == "__main__":
    main()
