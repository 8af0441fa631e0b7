"""The models that a sampler serves: a whole one, and the sub-networks of it that were asked for last.

A sub-network is served as the ordinary smaller model that it is. It owns the arrays that its slice cuts
(`slicing.slice_params`) and the programs that are compiled for it, and both go when it is evicted.
Routers that read states have one model for all budgets, whose layers are a second copy of the whole one's.
"""

import collections
import dataclasses
import functools
import weakref
from collections.abc import Callable
from typing import Any

import jax

from elastic_lm.config.checks import AT_LEAST_1, require
from elastic_lm.config.model import ModelConfig
from elastic_lm.config.subnet import Budget, Subnet
from elastic_lm.decode.loop import run
from elastic_lm.decode.prefill import prefill, prefill_from_state
from elastic_lm.models.decoder import Params
from elastic_lm.width.chooser import Per, SubnetChooser, for_prompts, routed_model, routing
from elastic_lm.width.nested_decoder import ROUTING, NestedConfig
from elastic_lm.width.slicing import slice_params


def _jit_prefill(function: Callable[..., Any]) -> Any:
    """Static: the config, the capacity, the window. Traced: everything else."""
    return jax.jit(function, static_argnames=("config", "capacity", "window"))


def _jit_run(function: Callable[..., Any]) -> Any:
    """Static: the config, the mode. Traced: everything else."""
    return jax.jit(function, static_argnames=("config", "mode"), donate_argnames="state")


jit_prefill, jit_run = _jit_prefill(prefill), _jit_run(run)  # of whole models, for the life of the process
jit_prefill_from_state = _jit_prefill(prefill_from_state)


@dataclasses.dataclass(frozen=True, eq=False)
class Served:
    """A model in memory and the jitted functions that decode with it.

    Attributes:
      subnet: what it is of the whole model; None = all of it.
      config: its own, of a sub-network that of the slice; static.
      params: its canonical parameters.
      prefill: `prefill.prefill`, jitted.
      run: `loop.run`, jitted; the state is donated.
      per: who has widths of its own, where routers choose while it decodes.
      budget: of these routers; None = no routers choose while it decodes.
    """

    subnet: Subnet | None
    config: ModelConfig
    params: Params
    prefill: Any
    run: Any
    per: Per = "token"
    budget: Budget | None = None

    def for_prompts(self, tokens_BP: jax.Array, length_B: jax.Array) -> "Served":
        """The model for these prompts (see `routed.prompt_choices`): itself where they decide nothing."""
        if self.per == "token" or not isinstance(self.config, NestedConfig):
            return self
        config, params = for_prompts(self.config, self.params, tokens_BP, length_B)
        return dataclasses.replace(self, config=config, params=params)


class ServedModels:
    """The whole model and at most `keep` sub-networks of it, the least recently served of which go first."""

    def __init__(self, config: ModelConfig, params: Params, keep: int, inside: bool = False) -> None:
        """Creates the store; nothing is sliced yet.

        Args:
          config: the whole model.
          params: its canonical parameters, which are not copied.
          keep: sub-networks whose arrays and programs stay in memory.
          inside: arrays are sliced inside the programs, whenever these run; they take a slice's memory
            while these do, and none between.

        Raises:
          ValueError: `keep` is below 1.
        """
        require(AT_LEAST_1[0](keep), "keep_subnets", keep, AT_LEAST_1[1])
        self._whole = Served(None, config, params, jit_prefill, jit_run)
        self._slice = _sliced_inside if inside else _sliced
        self._keep, self._kept = keep, collections.OrderedDict[Subnet, Served]()
        self._routed: tuple[NestedConfig, Params] | None = None

    def serve(self, subnet: Subnet | None) -> Served:
        """The model that a sub-network is, sliced now unless it is in memory.

        Args:
          subnet: of the whole model; None = all of it.

        Returns:
          The model; where nothing is left out, the whole one with its own arrays and programs.

        Raises:
          ValueError: the subnet does not fit the whole model.
        """
        config, params = self._whole.config, self._whole.params
        if subnet is None or subnet == Subnet.full(config):
            return self._whole
        if subnet not in self._kept:
            subnet.check(config)
            while len(self._kept) >= self._keep:  # first, so that no more are in memory at any time
                self._kept.popitem(last=False)
            self._kept[subnet] = self._slice(config, params, subnet)
        self._kept.move_to_end(subnet)
        return self._kept[subnet]

    def route(self, elastic: SubnetChooser, budget: Budget) -> Served:
        """The model whose routers choose while it decodes.

        Args:
          elastic: with routers that read states.
          budget: below the whole model's cost.

        Raises:
          ValueError: the budget cannot be met.
        """
        assert elastic.routers is not None
        if self._routed is None:
            self._routed = routed_model(self._whole.config, self._whole.params, elastic.routers)
        config, params = self._routed
        params = {**params, ROUTING: routing(elastic.routers, budget)}
        return Served(None, config, params, jit_prefill, jit_run, elastic.per, budget)


def _sliced(config: ModelConfig, params: Params, subnet: Subnet) -> Served:
    """A sub-network with programs of its own: jax keeps those of one function together."""
    own = (_jit_prefill(functools.partial(prefill)), _jit_run(functools.partial(run)))
    served = Served(subnet, *slice_params(config, params, subnet), *own)
    _compiled.watch(served)
    return served


def _sliced_inside(config: ModelConfig, params: Params, subnet: Subnet) -> Served:
    """A sub-network that owns no arrays: its programs take the whole model's and slice them first.

    The slice lies in memory until a program ends. Slicing each layer where it is read would not serve in
    decoding, as every step would copy it (see `nested`).
    """

    def inside(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def program(own: ModelConfig, whole: Params, *rest: Any, **named: Any) -> Any:
            return function(own, slice_params(config, whole, subnet)[1], *rest, **named)

        return program

    own = (_jit_prefill(inside(prefill)), _jit_run(inside(run)))
    served = Served(subnet, subnet.sliced(config), params, *own)
    _compiled.watch(served)
    return served


class _Compiled:
    """Counts the programs of sub-networks, those of evicted ones too."""

    def __init__(self) -> None:
        self._alive, self._gone = weakref.WeakSet[Served](), 0

    def watch(self, served: Served) -> None:
        self._alive.add(served)
        weakref.finalize(served, self._retire, served.prefill, served.run).atexit = False

    def _retire(self, *functions: Any) -> None:
        self._gone += sum(map(_programs, functions))

    def count(self) -> int:
        return self._gone + sum(_programs(f) for s in self._alive for f in (s.prefill, s.run))


_compiled = _Compiled()


def compilations() -> int:
    """Programs compiled so far in this process for prefill and decoding, of models that are gone too."""
    return _compiled.count() + _programs(jit_prefill) + _programs(jit_run)


def _programs(function: Any) -> int:
    return function._cache_size()
