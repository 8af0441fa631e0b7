"""What optimizers remember: dtypes that hold it, factored squares, and refusals of what would not work."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from elastic_lm.models.decoder import stack_layers
from elastic_lm.models.registry import init_params
from elastic_lm.models.sharding import make_mesh, param_shardings, stacked_shardings
from elastic_lm.testing import tiny_config
from elastic_lm.train.config import TrainConfig
from elastic_lm.train.method import ParameterGroup
from elastic_lm.train.optim import make_optimizer
from elastic_lm.train.state import create_state

# Adafactor factors what has 128 rows and columns.
CONFIG = tiny_config(n_layers=2, d_model=128, n_heads=4, d_mlp=256, vocab_size=256)
FLAT = {"schedule": "constant", "warmup": 0, "clip": 0.0, "weight_decay": 0.0, "lr": 1e-2}


def placed() -> Any:
    shardings = stacked_shardings(param_shardings(CONFIG, make_mesh(devices=jax.devices()[:1])))
    return jax.device_put(stack_layers(init_params(CONFIG, jax.random.key(0))), shardings)


def state_bytes(**options: Any) -> int:
    state = create_state(make_optimizer(TrainConfig(**options)), placed())
    return sum(leaf.nbytes for leaf in jax.tree.leaves(state.opt_state))


def test_bytes_of_a_state_are_as_its_config_says() -> None:
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(placed()))
    few = 1000  # counters
    assert 2 * size <= state_bytes() < 2 * size + few
    assert 1.5 * size <= state_bytes(nu_dtype="bfloat16") < 1.5 * size + few
    assert size <= state_bytes(mu_dtype="bfloat16", nu_dtype="bfloat16") < size + few
    assert state_bytes(optimizer="muon", nu_dtype="bfloat16") < state_bytes(optimizer="muon")
    assert state_bytes(optimizer="adafactor") < 0.2 * size


def updated(options: dict[str, Any], gradients: np.ndarray) -> tuple[np.ndarray, Any]:
    """Parameters and state after a step per gradient."""
    optimizer = make_optimizer(TrainConfig(**FLAT, **options))
    params = {"head": {"kernel": jnp.zeros(gradients.shape[1:])}}
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for gradient in gradients:
        updates, state = update({"head": {"kernel": jnp.asarray(gradient)}}, state, params)
        params = optax.apply_updates(params, updates)
    return np.asarray(params["head"]["kernel"]), state


@pytest.mark.parametrize("b2", [0.95, 0.995])
def test_squares_in_bfloat16_follow_those_in_float32(b2: float) -> None:
    """They rise and fall with the gradients; the share that rounding takes stays within a percent or two."""
    rng = np.random.default_rng(0)
    sizes = np.concatenate([np.full(300, 1.0), np.full(1500, 0.03)])
    gradients = rng.normal(size=(1800, 4, 8)).astype(np.float32) * sizes[:, None, None]

    def squares(options: dict[str, Any]) -> np.ndarray:
        _, state = updated({"b2": b2, **options}, gradients)
        found = [s.nu for s in jax.tree.leaves(state, is_leaf=is_adam) if is_adam(s)]
        return np.asarray(found[0]["head"]["kernel"], np.float32)

    wide, narrow = squares({}), squares({"nu_dtype": "bfloat16"})
    assert np.median(wide) < 2e-3  # they have fallen from about 1
    np.testing.assert_allclose(narrow, wide, rtol=0.5)
    bound = {0.95: 0.02, 0.995: 0.25}[b2]
    assert abs(np.mean(narrow / wide) - 1) < bound


def is_adam(state: Any) -> bool:
    return isinstance(state, optax.ScaleByAdamState)


def test_what_would_not_work_is_refused() -> None:
    with pytest.raises(ValueError, match=r"train\.nu_dtype='float16': must be float32 or bfloat16"):
        TrainConfig(nu_dtype="float16")
    with pytest.raises(ValueError, match=r"train\.nu_dtype='bfloat16': with b2=0\.999 .* never fall again"):
        TrainConfig(nu_dtype="bfloat16", b2=0.999)
    for field in ("mu_dtype", "nu_dtype"):
        with pytest.raises(ValueError, match=rf"train\.{field}='bfloat16': adafactor keeps"):
            TrainConfig(optimizer="adafactor", **{field: "bfloat16"})


def test_the_refused_memory_would_not_have_fallen() -> None:
    """Why b2=0.999 is refused: in bfloat16, 0.999 of a number is that number."""
    numbers = jnp.linspace(1.0, 2.0, 129)[:-1].astype(jnp.bfloat16)
    kept = (0.999 * numbers.astype(jnp.float32)).astype(jnp.bfloat16)
    chex.assert_trees_all_equal(kept, numbers)
    fallen = (0.996 * numbers.astype(jnp.float32)).astype(jnp.bfloat16)
    assert bool(jnp.all(fallen < numbers))


def test_adafactor_is_that_of_optax() -> None:
    """Without decay, and with updates that are not multiplied by the size of the parameter."""
    gradients = np.random.default_rng(0).normal(size=(5, 256, 128)).astype(np.float32)
    found, _ = updated({"optimizer": "adafactor"}, gradients)
    theirs = optax.adafactor(1e-2, multiply_by_parameter_scale=False)
    params = {"kernel": jnp.zeros((256, 128))}
    state = theirs.init(params)
    for gradient in gradients:
        updates, state = theirs.update({"kernel": jnp.asarray(gradient)}, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(found, params["kernel"], rtol=1e-6, atol=1e-8)


def test_adafactor_leaves_groups_to_adamw() -> None:
    params = {"routers": {"kernel": jnp.zeros((4, 8))}, "head": {"kernel": jnp.ones((4, 8))}}
    gradients = jax.tree.map(jnp.ones_like, params)
    groups = (ParameterGroup(("routers",), lr=0.5),)
    found = {}
    for name in ("adafactor", "adamw"):
        optimizer = make_optimizer(TrainConfig(**{**FLAT, "weight_decay": 0.1}, optimizer=name), groups)
        found[name], _ = optimizer.update(gradients, optimizer.init(params), params)
    chex.assert_trees_all_close(found["adafactor"]["routers"], found["adamw"]["routers"])
    np.testing.assert_allclose(found["adafactor"]["head"]["kernel"], -1e-2 * 1.1, rtol=1e-5)


def test_adafactor_learns() -> None:
    target = np.random.default_rng(0).normal(size=(256, 128)).astype(np.float32)
    optimizer = make_optimizer(TrainConfig(**FLAT, optimizer="adafactor"))
    params: Any = {"head": {"kernel": jnp.zeros_like(target)}}
    state = optimizer.init(params)

    @jax.jit
    def step(params: Any, state: Any) -> tuple[Any, Any]:
        gradients = jax.tree.map(lambda p: p - target, params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(400):
        params, state = step(params, state)
    assert float(jnp.mean(jnp.square(params["head"]["kernel"] - target))) < 0.05 * float(np.mean(target**2))
