"""--mesh: the devices that a model is divided over while a command runs it."""

import argparse
import dataclasses
from typing import TYPE_CHECKING

from elastic_lm.cli.parser import listed
from elastic_lm.config.checks import is_whole, require
from elastic_lm.config.mesh import MeshConfig

if TYPE_CHECKING:
    from jax.sharding import Mesh

AXES = tuple(field.name for field in dataclasses.fields(MeshConfig))


def add_mesh(parser: argparse.ArgumentParser) -> None:
    """Adds --mesh."""
    text = f"devices that the model and its rows are divided over, like data=2,tensor=4 ({listed(AXES)})"
    parser.add_argument("--mesh", type=mesh_config, metavar="AXIS=N,...", help=text)


def mesh_config(text: str) -> MeshConfig:
    """The sizes of a mesh, as a flag's type."""
    sizes: dict[str, int] = {}
    for part in text.split(","):
        axis, _, number = part.partition("=")
        try:
            size = int(number)
        except ValueError:
            size = 0
        if axis not in AXES or axis in sizes or not (size == -1 or is_whole(size, 1)):
            raise argparse.ArgumentTypeError(
                f"{text!r}: {part!r} is not one of {listed(AXES)} with a number of devices, each once, "
                "like data=2,tensor=4"
            )
        sizes[axis] = size
    # The devices that are left hold different rows, unless another axis takes them.
    rest = {"data": 1} if -1 in sizes.values() else {}
    return MeshConfig(**{**rest, **sizes})


def make(sizes: MeshConfig | None) -> "Mesh | None":
    """The mesh over all devices; None = the default device alone.

    Raises:
      ValueError: the sizes do not multiply to the number of devices, or there are several processes, of
        which each reads batches of its own.
    """
    if sizes is None:
        return None
    import jax

    from elastic_lm.models.sharding import make_mesh

    fix = "a mesh would span processes, which read different batches; leave it out, or start one process"
    require(jax.process_count() == 1, "--mesh", f"{jax.process_count()} processes", fix)
    axes = dataclasses.asdict(sizes).items()
    given = ",".join(f"{axis}={size}" for axis, size in axes if axis != "sequence" or size != 1)
    try:
        return make_mesh(**dataclasses.asdict(sizes))
    except ValueError:
        raise ValueError(
            f"--mesh {given}: does not fit {jax.device_count()} devices; the product must be that, and -1 on "
            "one axis stands for all that are left"
        ) from None
