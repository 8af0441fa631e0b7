"""How many devices each axis of the mesh has."""

import dataclasses

from elastic_lm.config.checks import require_types


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices per mesh axis; -1 on one axis = all that are left.

    Example:
      ```python
      import elastic_lm as el

      mesh = el.MeshConfig(data=1, fsdp=-1, tensor=2)  # two devices share each layer
      assert mesh.fsdp == -1
      ```
    """

    data: int = -1  # rows of a batch
    fsdp: int = 1  # rows of a batch and slices of every parameter
    tensor: int = 1  # heads, MLP width and vocabulary
    sequence: int = 1  # columns of rows, that is the tokens of long texts

    def __post_init__(self) -> None:
        require_types(self, "mesh.")
