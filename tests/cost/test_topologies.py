"""Topologies by name: how many devices and hosts, and what is refused."""

import pytest

from elastic_lm.cost.topologies import CHIPS, GIB, described_mesh, devices, parse_topology


@pytest.mark.parametrize(
    ("name", "same_as", "size", "hosts"),
    [
        ("v5e:4x8", "v5e:4x8", 32, 8),
        ("v5litepod-32", "v5e:4x8", 32, 8),
        ("v6e-8", "v6e:2x4", 8, 2),
        ("v5p:4x4x4", "v5p:4x4x4", 64, 16),
        ("v5p-256", "v5p:4x4x8", 128, 32),  # the name counts TensorCores, two per chip
        ("v5p-512", "v5p:4x8x8", 256, 64),
        ("V5E:1", "v5e:1x1", 1, 1),
        ("a100-80gb:8", "a100-80gb:8", 8, 1),
        ("h100", "h100:1", 1, 1),
        ("h100:16", "h100:16", 16, 2),
    ],
)
def test_names(name: str, same_as: str, size: int, hosts: int) -> None:
    topology = parse_topology(name)
    assert (topology.name, topology.size, topology.hosts) == (same_as, size, hosts)
    assert parse_topology(same_as) == topology


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v9", "must be one of v5e, v5p, v6e, t4"),
        ("v5e-7", "no common slice of v5e has 7 chips"),
        ("v5e:3x3", "hosts have 2x2 chips"),
        ("v5e:2x2x2", "must be 2 sizes, such as v5e:4x8"),
        ("h100:2x2", "must be 1 sizes, such as h100:8"),
        ("h100:0", "must be one of"),
    ],
)
def test_refused_names(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_topology(name)


def test_facts_of_chips_are_in_range() -> None:
    assert CHIPS["v5e"].hbm_bytes == 16 * GIB
    for chip in CHIPS.values():
        assert chip.flops / chip.hbm_bandwidth > 1
        assert chip.ring_bandwidth <= chip.hbm_bandwidth


def test_meshes_of_devices_that_are_not_there() -> None:
    with pytest.raises(ValueError, match="programs for h100 compile on one alone"):
        devices(parse_topology("h100:8"))
    with pytest.raises(
        ValueError, match=r"start it with XLA_FLAGS=--xla_force_host_platform_device_count=4096"
    ):
        devices(parse_topology("cpu:4096"))
    with pytest.raises(ValueError, match="must be 3 sizes whose product is 1"):
        described_mesh(parse_topology("cpu:1"), (2, 1, 1))
