"""Decoding on a mesh: the tokens of one device, and caches that are really divided."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import elastic_lm as el
from elastic_lm.cli.main import main
from elastic_lm.cli.mesh_flag import make
from elastic_lm.config.mesh import MeshConfig
from elastic_lm.decode.state import DecodeState
from elastic_lm.models.placement import heads_over, mesh_of, rows_beside, rows_over
from elastic_lm.models.sharding import make_mesh, param_shardings
from elastic_lm.nn.int8 import quantised
from elastic_lm.testing import random_params, random_tokens, tiny_config

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")

PROMPTS = [[1, 2, 3, 1, 2, 3, 1, 2], [4, 5, 4, 5], [6], [7, 8, 9, 7, 8]]
CONFIG = tiny_config(exits=(1,), n_layers=2)  # small, because every way compiles programs of its own
WINDOW = 3
POLICY = el.ConfidenceExit("max_prob", thresholds=(0.037,), layers=(1,))
WAYS = {
    "plain": {},
    "exits": {"exit": POLICY},
    "propagated": {"exit": POLICY, "missing": "propagate"},
    "lossless": {"exit": POLICY, "lossless": True},
    "lookup": {"lossless": True, "lookup": True, "draft": 2},
    "lookup_and_exits": {"exit": POLICY, "lossless": True, "lookup": True, "draft": 2},
}


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG)


def placed(params, mesh: Mesh):
    return jax.device_put(params, param_shardings(CONFIG, mesh))


def tokens(params, prompts, settings=None, **options):
    sampler = el.Sampler(el.Decoder(CONFIG), params, window=WINDOW, **options)
    samples = sampler.sample(prompts, 12, **(settings or {}))
    return [sample.tokens for sample in samples], [sample.exit_layers for sample in samples]


@pytest.mark.parametrize("way", WAYS)
def test_a_mesh_gives_the_tokens_of_one_device(params, way: str) -> None:
    alone = tokens(params, PROMPTS, **WAYS[way])
    assert tokens(placed(params, make_mesh(2, 2, 2)), PROMPTS, **WAYS[way]) == alone
    if way in ("exits", "propagated"):
        assert {depth for row in alone[1] for depth in row} == {1, 2}


@pytest.mark.parametrize("sizes", [(4, 1, 2), (1, 4, 2), (8, 1, 1)], ids=str)
def test_drawn_tokens_and_single_rows_are_the_same_on_a_mesh(params, sizes: tuple[int, int, int]) -> None:
    on_mesh = placed(params, make_mesh(*sizes))
    drawn = {"temperature": 0.8, "top_k": 20, "repetition_penalty": 1.1, "seed": [1, 2, 3, 4]}
    assert tokens(on_mesh, PROMPTS, drawn, exit=POLICY) == tokens(params, PROMPTS, drawn, exit=POLICY)
    assert tokens(on_mesh, PROMPTS[:1], exit=POLICY) == tokens(params, PROMPTS[:1], exit=POLICY)


def running(params, rows: int) -> DecodeState:
    """The state after three iterations."""
    sampler = el.Sampler(el.Decoder(CONFIG), params, window=WINDOW, exit=POLICY)
    _, state, controls = sampler._prefill(sampler._call(PROMPTS[:rows]), 12)
    return sampler._serve(None, None).run(CONFIG, sampler.params, state, controls, 3, "exact")


def test_caches_and_states_are_divided(params) -> None:
    mesh = make_mesh(2, 2, 2)
    state = running(placed(params, mesh), 4)
    parts = {x.addressable_shards[0].data.shape for layer in state.cache for x in layer}
    assert parts == {(1, CONFIG.n_kv_heads // 2, state.cache[0][0].shape[2], CONFIG.head_dim)}
    assert {x.addressable_shards[0].data.shape for x in state.hidden} == {(1, WINDOW, CONFIG.d_model)}
    assert state.tokens.sharding.is_fully_replicated
    assert state.done.sharding.is_fully_replicated


def test_rows_that_do_not_divide_are_whole_on_every_device(params) -> None:
    state = running(placed(params, make_mesh(4, 1, 2)), 3)
    assert state.cache[0][0].addressable_shards[0].data.shape[:2] == (3, 1)


def test_what_a_mesh_can_divide() -> None:
    mesh = make_mesh(2, 2, 2)
    assert [rows_over(mesh, rows) for rows in (1, 2, 3, 4)] == [(), ("data",), (), ("data", "fsdp")]
    assert rows_over(make_mesh(1, 4, 2), 8) == ("fsdp",)
    assert [heads_over(mesh, heads) for heads in (1, 2, 3, 4)] == [None, "tensor", None, "tensor"]
    assert heads_over(make_mesh(8, 1, 1), 4) is None


def test_sub_networks_run_on_the_mesh_of_the_model(params) -> None:
    # One key/value head of each layer is left, which two devices cannot share.
    part = el.Subnet.uniform(CONFIG, mlp=0.5, groups=0.5)
    on_mesh = placed(params, make_mesh(4, 1, 2))
    for inside in (False, True):
        how = {"subnet": part, "slice_inside": inside}
        assert tokens(on_mesh, PROMPTS, **how) == tokens(params, PROMPTS, **how)


@pytest.mark.parametrize("inside", [False, True])
def test_sub_networks_in_8_bits_run_on_a_mesh(params, inside: bool) -> None:
    part = el.Subnet.uniform(CONFIG, mlp=0.5, groups=0.5)
    how = {"subnet": part, "slice_inside": inside}
    on_mesh = quantised(placed(params, make_mesh(2, 2, 2)))
    assert tokens(on_mesh, PROMPTS) == tokens(quantised(params), PROMPTS)
    assert tokens(on_mesh, PROMPTS, **how) == tokens(quantised(params), PROMPTS, **how)


def test_several_processes_take_no_mesh_of_a_command(monkeypatch) -> None:
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match=r"--mesh=.2 processes.: .* leave it out"):
        make(MeshConfig(data=8))


def test_a_conversation_goes_on_from_divided_caches(params) -> None:
    answers = []
    for held in (params, placed(params, make_mesh(4, 1, 2))):
        sampler, prefix = el.Sampler(el.Decoder(CONFIG), held, window=WINDOW, exit=POLICY), el.PrefixCache()
        first = sampler.sample(PROMPTS[0], 8, prefix=prefix).tokens
        second = sampler.sample([*PROMPTS[0], *first, 5, 6], 8, prefix=prefix).tokens
        answers.append((first, second, prefix.reused))
    assert answers[0] == answers[1]
    assert answers[0][2] > len(PROMPTS[0])


def test_text_is_read_by_the_devices_that_hold_its_rows(params) -> None:
    text = np.asarray(random_tokens(CONFIG, 4, 17))
    ones = np.ones((4, 16), np.int32)
    batch = el.data.Batch(text[:, :-1], text[:, 1:], 1.0 * ones, np.cumsum(ones, 1) - 1, ones)
    on_mesh = placed(params, make_mesh(4, 1, 2))
    assert rows_beside(on_mesh, batch).tokens.addressable_shards[0].data.shape == (1, 16)
    alone, together = (el.depth.observe(CONFIG, held, [batch]) for held in (params, on_mesh))
    np.testing.assert_array_equal(alone.agrees, together.agrees)
    np.testing.assert_allclose(alone.nats, together.nats, rtol=1e-5, atol=1e-5)


def test_parameters_on_one_device_or_another_mesh_divide_nothing(params) -> None:
    assert mesh_of(params) is None
    assert mesh_of(placed(params, make_mesh(1, 1, 1, devices=jax.devices()[:1]))) is None
    rows = Mesh(np.asarray(jax.devices()), ("x",))
    assert mesh_of(jax.device_put(params, NamedSharding(rows, PartitionSpec()))) is None


def test_heads_that_do_not_divide_are_refused(tmp_path) -> None:
    plain = CONFIG.with_exits(())
    el.hf.export(plain, random_params(plain), tmp_path / "model")
    with pytest.raises(ValueError, match=r"attn.qkv.kernel .*: 2 cannot be split over tensor=4"):
        el.load(tmp_path / "model", mesh=make_mesh(2, 1, 4))


def test_commands_decode_on_a_mesh(capsys) -> None:
    said = []
    for more in ("", "--mesh data=2,fsdp=2,tensor=2"):
        command = "generate --prompt import --prompt def --max-new-tokens 6 --color never"
        assert main(f"{command} {more}".split()) == 0
        said.append([line for line in capsys.readouterr().out.splitlines() if "tokens/s" not in line])
    assert said[0] == said[1]
