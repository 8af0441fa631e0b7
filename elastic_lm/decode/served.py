"""The models that a sampler serves: the whole one, and those of its sub-networks that were served last.

A sub-network is served as an ordinary smaller model. It owns the arrays that are sliced for it and the
programs that are compiled for it, and both leave memory when it is evicted. Routers that read states need
one more model, which serves all budgets: a second copy of the whole model's layers, whose widths the routers
choose while it decodes.
"""

import collections
import dataclasses
import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from elastic_lm.config.drafter import Drafter
from elastic_lm.config.model import ModelConfig
from elastic_lm.config.subnet import Budget, Subnet
from elastic_lm.decode.drafting import DRAFTER, drafter_params
from elastic_lm.decode.loop import run
from elastic_lm.decode.prefill import prefill, prefill_from_state
from elastic_lm.models.decoder import Params
from elastic_lm.models.placement import mesh_of, placed_for_decoding
from elastic_lm.models.sharding import fitting_shardings, put_fitting
from elastic_lm.width.chooser import Per, SubnetChooser, budget_inputs, nested_model, with_prompt_choices
from elastic_lm.width.nested_decoder import WIDTH_INPUTS, NestedConfig, nested_params
from elastic_lm.width.row_widths import menu_of, row_choices
from elastic_lm.width.slicing import slice_params


def _jit_prefill(function: Callable[..., Any]) -> Any:
    """Static: the config, the mesh, the capacity, the window, whether rows look up, the copies."""
    names = ("config", "capacity", "window", "lookup", "copies", "mesh")
    return jax.jit(function, static_argnames=names)


def _jit_run(function: Callable[..., Any]) -> Any:
    """Static: the config, the mode, the mesh, the drafter. Traced: everything else."""
    return jax.jit(function, static_argnames=("config", "mode", "mesh", "drafter"), donate_argnames="state")


# The programs of whole models, which stay for the life of the process.
jit_prefill = _jit_prefill(prefill)
jit_run = _jit_run(run)
jit_prefill_from_state = jax.jit(prefill_from_state, static_argnames=("config", "capacity", "window"))


@dataclasses.dataclass(frozen=True, eq=False)
class Served:
    """A model in memory and the jitted functions that decode with it.

    Attributes:
      subnet: the part of the whole model that this is; None = all of it.
      config: of this model, so of a sub-network the config of its slice; static.
      params: canonical parameters of this model.
      prefill: `prefill.prefill`, jitted.
      run: `loop.run`, jitted; the state is donated.
      per: whether routers choose widths for every token or for every prompt.
      budget: that routers keep while the model decodes; None = no routers choose.
      mesh: that the parameters lie on, and the state with them; None = of one device.
      drafter: the sub-network of this model that drafts for it; None = none does.
    """

    subnet: Subnet | None
    config: ModelConfig
    params: Params
    prefill: Any
    run: Any
    per: Per = "token"
    budget: Budget | None = None
    mesh: Mesh | None = None
    drafter: Drafter | None = None

    def for_prompts(self, tokens_BP: jax.Array, length_B: jax.Array) -> "Served":
        """This model, with the widths that its routers choose for these prompts if they choose per prompt."""
        if self.per == "token" or not isinstance(self.config, NestedConfig):
            return self
        config, params = with_prompt_choices(self.config, self.params, tokens_BP, length_B)
        return dataclasses.replace(self, config=config, params=params)


class ServedModels:
    """The whole model and at most `keep` of its sub-networks; the one served longest ago is evicted first."""

    def __init__(self, config: ModelConfig, params: Params, keep: int, slice_inside: bool = False) -> None:
        """Creates the store; nothing is sliced yet.

        Args:
          config: the whole model.
          params: its canonical parameters, which are not copied.
          keep: sub-networks whose arrays and programs stay in memory; at least 1.
          slice_inside: arrays are sliced inside the programs whenever these run, and take memory only then.
        """
        mesh = mesh_of(params)
        params = placed_for_decoding(params, config.dtype)
        self._whole = Served(None, config, params, *_whole_programs(mesh), mesh=mesh)
        self._slice = _sliced_inside if slice_inside else _sliced
        self._slice_inside = slice_inside
        self._keep = keep
        self._kept = collections.OrderedDict[Subnet, Served]()
        self._nested: tuple[NestedConfig, Params] | None = None
        self._drafted: Served | None = None
        self._rows: tuple[NestedConfig, Params] | None = None

    def serve(self, subnet: Subnet | None) -> Served:
        """A sub-network as a model, sliced now unless it is in memory.

        Args:
          subnet: fits the whole model; None = all of it.

        Returns:
          The model; where nothing is left out, the whole one with its own arrays and programs.
        """
        config, params = self._whole.config, self._whole.params
        if subnet is None or subnet == Subnet.full(config):
            return self._whole

        if subnet not in self._kept:
            # Evicted before slicing, so that no more than `keep` slices are in memory at any time.
            while len(self._kept) >= self._keep:
                self._kept.popitem(last=False)
            self._kept[subnet] = self._slice(config, params, subnet, self._whole.mesh)

        self._kept.move_to_end(subnet)
        return self._kept[subnet]

    def with_routers(self, chooser: SubnetChooser, budget: Budget) -> Served:
        """The model whose routers choose its widths while it decodes.

        Args:
          chooser: one with routers that read states.
          budget: below the cost of the whole model.

        Raises:
          ValueError: the routers cannot keep the budget.
        """
        assert chooser.routers is not None
        if self._nested is None:
            config, params = nested_model(self._whole.config, self._whole.params, chooser.routers)
            self._nested = config, placed_for_decoding(params, config.dtype)

        # The budget is traced, so that one model and one program serve all budgets.
        config, params = self._nested
        params = {**params, WIDTH_INPUTS: budget_inputs(chooser.routers, budget)}
        mesh = self._whole.mesh
        return Served(None, config, params, *_whole_programs(mesh), chooser.per, budget, mesh)

    def with_rows(self, subnets: Sequence[Subnet]) -> Served:
        """The nested form of the model, in which every row runs as a sub-network of its own.

        Args:
          subnets: one per row; they differ in neurons and heads alone.

        Returns:
          The model. Its layers are a copy of the whole model's, as with routers, which stays in memory until
          rows of other widths are asked for.
        """
        config = self._whole.config
        menu = menu_of(config, subnets)
        if self._rows is None or self._rows[0].menu != menu:
            self._rows = None  # the copy that goes, goes before the next one is made
            nested = NestedConfig.of(config, menu, per_token=False)
            params = nested_params(nested, self._whole.params)
            self._rows = nested, placed_for_decoding(params, config.dtype)
        nested, params = self._rows
        params = {**params, WIDTH_INPUTS: row_choices(config, menu, subnets)}
        mesh = self._whole.mesh
        return Served(None, nested, params, *_whole_programs(mesh), mesh=mesh)

    def with_drafter(self, drafter: Drafter) -> Served:
        """The whole model with a sub-network that drafts for it; the last one stays in memory.

        Args:
          drafter: fits the whole model, whose exits are left out.

        Returns:
          The model. What the sub-network cuts out of a layer is copied once, here, or inside the program
          whenever it runs; layers that are only left out take no memory.
        """
        if self._drafted is None or self._drafted.drafter != drafter:
            whole = self._whole
            config, params = whole.config.with_exits(()), whole.params
            if not self._slice_inside:
                params = drafter_params(config, params, drafter)
                small = drafter.subnet.sliced(config)
                if whole.mesh is not None:
                    params[DRAFTER] = put_fitting(params[DRAFTER], fitting_shardings(small, whole.mesh))
                params[DRAFTER] = placed_for_decoding(params[DRAFTER], config.dtype)
            prefill, run = _whole_programs(whole.mesh)
            run = functools.partial(run, drafter=drafter)
            self._drafted = Served(None, config, params, prefill, run, mesh=whole.mesh, drafter=drafter)
        return self._drafted


def _whole_programs(mesh: Mesh | None) -> tuple[Any, Any]:
    """Prefill and loop of whole models, on a mesh or on one device."""
    if mesh is None:
        return jit_prefill, jit_run
    return functools.partial(jit_prefill, mesh=mesh), functools.partial(jit_run, mesh=mesh)


def _sliced(config: ModelConfig, params: Params, subnet: Subnet, mesh: Mesh | None) -> Served:
    """A sub-network with arrays and programs of its own."""
    on: Any = {} if mesh is None else {"mesh": mesh}
    # `functools.partial` makes new functions. JAX keeps the programs of one function until the function goes,
    # so that those of an evicted sub-network would otherwise stay.
    programs = _jit_prefill(functools.partial(prefill, **on)), _jit_run(functools.partial(run, **on))
    config, params = slice_params(config, params, subnet)
    if mesh is not None:
        params = put_fitting(params, fitting_shardings(config, mesh))
    served = Served(subnet, config, placed_for_decoding(params, config.dtype), *programs, mesh=mesh)
    _compiled.watch(served)
    return served


def _sliced_inside(config: ModelConfig, params: Params, subnet: Subnet, mesh: Mesh | None) -> Served:
    """A sub-network without arrays of its own: its programs take the whole model's and slice them first.

    The slice lies in memory until a program ends. Slicing each layer where it is read would not do, because
    XLA copies a slice of a kernel in every step of a loop.
    """

    on: Any = {} if mesh is None else {"mesh": mesh}

    def slicing(function: Callable[..., Any]) -> Callable[..., Any]:
        # `wraps` keeps the names of the parameters, by which `jit` knows what is static and what is donated.
        @functools.wraps(function)
        def program(sliced_config: ModelConfig, whole: Params, *rest: Any, **named: Any) -> Any:
            return function(sliced_config, slice_params(config, whole, subnet)[1], *rest, **named, **on)

        return program

    programs = (_jit_prefill(slicing(prefill)), _jit_run(slicing(run)))
    served = Served(subnet, subnet.sliced(config), params, *programs, mesh=mesh)
    _compiled.watch(served)
    return served


class _Compiled:
    """Counts the programs of sub-networks, evicted ones included."""

    def __init__(self) -> None:
        self._alive = weakref.WeakSet[Served]()
        self._gone = 0

    def watch(self, served: Served) -> None:
        self._alive.add(served)
        # When the model goes, its programs go with it: their number is added up before.
        weakref.finalize(served, self._retire, served.prefill, served.run).atexit = False

    def _retire(self, *functions: Any) -> None:
        self._gone += sum(map(_programs, functions))

    def count(self) -> int:
        return self._gone + sum(_programs(f) for s in self._alive for f in (s.prefill, s.run))


_compiled = _Compiled()


def compilations() -> int:
    """Programs compiled so far in this process for prefill and decoding, also of models that are gone."""
    return _compiled.count() + _programs(jit_prefill) + _programs(jit_run)


def _programs(function: Any) -> int:
    return function._cache_size()
