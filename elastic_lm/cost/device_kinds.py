"""What is published of the devices that JAX runs on, by the name that JAX gives them."""

from elastic_lm.cost.topologies import CHIPS, Chip

# Names that several devices with other numbers share are left out: there, nothing is known.
KINDS = {
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "Tesla T4": "t4",
    "NVIDIA L4": "l4",
    "NVIDIA A100-SXM4-40GB": "a100-40gb",
    "NVIDIA A100-PCIE-40GB": "a100-40gb",
    "NVIDIA A100-SXM4-80GB": "a100-80gb",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA B200": "b200",
}


def chip_of(kind: str) -> Chip | None:
    """The published numbers of a device.

    Args:
      kind: `jax.Device.device_kind`.

    Returns:
      The chip; None where nothing is known of it, as of CPUs.

    Example:
      ```python
      from elastic_lm.cost.device_kinds import chip_of

      assert chip_of("TPU v5 lite").hbm_bandwidth == 819e9
      assert chip_of("cpu") is None
      ```
    """
    name = KINDS.get(kind)
    return None if name is None else CHIPS[name]


def bandwidth_share(gb_per_s: float, kind: str) -> float | None:
    """The share of its memory's published bandwidth that a device reaches; None where nothing is known.

    Args:
      gb_per_s: 1e9 bytes per second, of one device.
      kind: `jax.Device.device_kind`.
    """
    chip = chip_of(kind)
    return None if chip is None else 1e9 * gb_per_s / chip.hbm_bandwidth
