"""Trained routers: the sub-network for a budget, and their file beside the model's.

For a budget the routers give log-probabilities of every choice. The likeliest choice of every layer may miss
the budget by what training left open, and by more between the budgets that were trained for or with the
latencies of another device. Therefore the likeliest sub-network within the budget is taken: a knapsack whose
damages are what a choice loses in log-probability. Then single choices grow, those that lose the least per
cost first, until no larger one fits. A budget is never exceeded.
"""

import dataclasses
import itertools
import json
import math
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from elastic_lm.config.checks import require, require_choice
from elastic_lm.config.model import ModelConfig
from elastic_lm.config.parse import from_dict
from elastic_lm.config.subnet import Budget, Menu, Subnet
from elastic_lm.cost.counted import CostTable
from elastic_lm.files.atomic import naming, read_json, write_text_whole
from elastic_lm.files.checksums import check_files, update_checksums
from elastic_lm.files.hub import local_model
from elastic_lm.models.decoder import Params
from elastic_lm.models.finite import check_tensor
from elastic_lm.width.router import ROUTER_WIDTH, Router, budget_code, init_router, layer_router
from elastic_lm.width.search import Damage, knapsack
from elastic_lm.width.search_space import Move, Space

FORMAT = "elastic_lm routers 1"
WEIGHTS, DESCRIPTION = "routers.safetensors", "routers.json"
RouterReads = Literal["budget", "hidden"]


@dataclasses.dataclass(frozen=True)
class RouterShape:
    """What routers are made for: they read a budget, or a budget and states, and choose from a menu.

    Raises:
      ValueError: the routers cannot choose from this menu, or a field is out of its range.

    Example:
      ```python
      import jax
      import elastic_lm as el

      menu = el.Menu(mlp=(0.5, 1.0), heads=(0.5, 1.0))
      shape = el.width.RouterShape(el.testing.tiny_config(), menu, anchors=(0.7, 1.0), width=16)
      params = shape.init(jax.random.key(0))  # of routers that nothing has trained yet
      ```
    """

    config: ModelConfig  # the whole model, all layers of one size; static
    menu: Menu  # what may be chosen; groups and channels stay whole; static
    anchors: tuple[float, ...]  # budgets that are trained for, as shares of the whole model's cost
    reads: RouterReads = "budget"  # "budget": one sub-network per budget; "hidden": a choice per token, too
    width: int = ROUTER_WIDTH  # of the routers' hidden layers

    def __post_init__(self) -> None:
        require_choice("reads", self.reads, get_args(RouterReads))
        require(self.width >= 1, "width", self.width, "must be at least 1")
        increasing = list(self.anchors) == sorted(set(self.anchors)) and self.anchors[-1:] == (1.0,)
        require(
            increasing and self.anchors[0] > 0,
            "anchors",
            self.anchors,
            "must be shares of the whole model's cost in (0, 1], increasing, the last one 1.0",
        )

        for field in ("groups", "d_model"):
            require(
                getattr(self.menu, field) == (1.0,),
                f"menu.{field}",
                getattr(self.menu, field),
                "routers choose heads, neurons and layers; make the model elastic with (1.0,) here",
            )
        require(
            self.reads == "budget" or not self.menu.dropped,
            "menu.dropped",
            self.menu.dropped,
            "routers that read states choose widths alone; set ()",
        )

        sizes = [self.config.sizes(i) for i in range(self.config.n_layers)]
        require(
            not self.config.heterogeneous,
            "sizes of the layers (neurons, heads, groups)",
            sizes,
            "routers need layers of one size",
        )
        self.menu.sizes(self.config)  # checks that the menu fits the model

    @property
    def depth_router(self) -> Router:
        """The router of the number of layers that are left out; it reads the budget alone."""
        return Router(self.width, (("dropped", len(self.menu.dropped) + 1),))

    def init(self, key: jax.Array) -> Params:
        """New routers: {"layers": stacked over layers, "depth": ...}.

        Args:
          key: typed PRNG key.
        """
        layers, depth = jax.random.split(key)
        keys = jax.random.split(layers, self.config.n_layers)
        router = layer_router(self.menu, self.width)
        inputs = len(self.anchors) + (self.config.d_model if self.reads == "hidden" else 0)
        stacked = jax.vmap(lambda key: init_router(router, inputs, key))(keys)
        return {"layers": stacked, "depth": init_router(self.depth_router, len(self.anchors), depth)}

    def layer_logits(self, params: Params, code: jax.Array) -> dict[str, jax.Array]:
        """Logits of one layer's choices.

        Args:
          params: of that layer's router.
          code: [..., inputs], the budget's code, joined with the state where states are read.

        Returns:
          {"heads", "mlp": [..., choices]}.
        """
        logits: Any = layer_router(self.menu, self.width).apply({"params": params}, code)
        return logits

    def all_logits(self, params: Params, code_BA: jax.Array) -> tuple[dict[str, jax.Array] | None, jax.Array]:
        """Logits that depend on nothing but the budget.

        Args:
          params: from `init`.
          code_BA: from `budget_code`.

        Returns:
          ({"heads", "mlp": [L, B, choices]}, None where states are read; [B, left out + 1]).
        """
        depth: Any = self.depth_router.apply({"params": params["depth"]}, code_BA)
        if self.reads == "hidden":
            return None, depth["dropped"]
        layers = jax.vmap(lambda layer: self.layer_logits(layer, code_BA))(params["layers"])
        return layers, depth["dropped"]

    @property
    def kept(self) -> np.ndarray:
        """[left out + 1, L] float32: 1 where a layer stays when the first n of `menu.dropped` go."""
        place = {layer: n for n, layer in enumerate(self.menu.dropped)}
        most = len(place)
        place_L = np.asarray([place.get(i, most) for i in range(self.config.n_layers)])
        return (place_L >= np.arange(most + 1)[:, None]).astype(np.float32)


def shares(table: CostTable, menu: Menu) -> dict[str, jax.Array]:
    """Costs of the choices, with all key/value groups, as shares of the whole model's cost.

    Args:
      table: costs of the menu's choices.
      menu: what may be chosen.

    Returns:
      {"heads", "mlp": [L, choices] float32}.
    """
    whole = table.range(menu)[1]
    heads = jnp.asarray([[groups[-1] for groups in layer] for layer in table.attention])
    return {"heads": heads / whole, "mlp": jnp.asarray(table.mlp) / whole}


def _damage(config: ModelConfig, menu: Menu, scores: list[np.ndarray]) -> Damage:
    """How much less likely every choice is than the largest one.

    Args:
      config: the whole model.
      menu: what may be chosen.
      scores: log-probabilities of the values of every gene of `search_space`.
    """
    lost = [tuple((score[-1] - score).tolist()) for score in scores[:-1]]
    attention = tuple(tuple((d,) for d in choices) for choices in lost[::2])
    # A layer that is left out makes no choice. It counts as if it had made its likeliest ones.
    gone = {
        layer: float(scores[-1][n] - scores[-1][n + 1]) + min(lost[2 * layer]) + min(lost[2 * layer + 1])
        for n, layer in enumerate(menu.dropped)
    }
    return Damage(attention, tuple(lost[1::2]), tuple(gone.get(i, math.inf) for i in range(config.n_layers)))


@dataclasses.dataclass(frozen=True)
class Routers:
    """Trained routers and the costs that they choose by.

    Raises:
      ValueError: the number of tilts is wrong.

    Example:
      ```python
      import jax
      import elastic_lm as el
      from elastic_lm.testing import tiny_config

      config, menu = tiny_config(), el.Menu()
      shape = el.width.RouterShape(config, menu, anchors=(0.6, 0.8, 1.0))
      params = shape.init(jax.random.key(0))  # untrained: the recipe `routers` trains them
      routers = el.width.Routers(shape, params, el.width.counted_table(config, menu, "parameters"))
      routers.subnet(el.Budget(parameters=30_000))  # a `Subnet` of at most 30,000 parameters
      ```

    Paper: Flextron, arXiv 2406.10260.
    """

    shape: RouterShape
    params: Params  # from `RouterShape.init`, trained
    table: CostTable  # costs of the menu's choices, of the kind of the budgets
    tilts: tuple[float, ...] = ()  # per anchor, where states are read: how much costs raise logits

    def __post_init__(self) -> None:
        count = len(self.shape.anchors) if self.shape.reads == "hidden" else 0
        require(
            len(self.tilts) == count,
            "tilts",
            self.tilts,
            f"needs {count}: one per anchor where states are read, else none",
        )

    def subnet(self, budget: Budget) -> Subnet:
        """The likeliest sub-network for a budget, never above it.

        Args:
          budget: of the table's kind; at or above the whole model's cost it gives the whole model.

        Returns:
          A sub-network of the menu.

        Raises:
          ValueError: the budget is of another kind or below the cheapest sub-network, or the routers read
            states and choose for every token.
        """
        config, menu = self.shape.config, self.shape.menu
        space, scores = Space(config, menu, self.table, budget), self._scores(budget)

        # Only a knapsack can promise a budget: the loss that routers are trained with leaves a margin of 5 %
        # unpunished, and between the anchors nothing was trained at all.
        found = knapsack(config, menu, self.table, budget, _damage(config, menu, scores))

        # A layer that the knapsack leaves out would come back with its likeliest choices.
        likeliest = tuple(int(np.argmax(score)) for score in scores)
        kept = [m // 2 in found.layers for m in range(2 * config.n_layers)] + [True]
        each = zip(space.genes(found), likeliest, kept, strict=True)
        genes = tuple(gene if stays else likely for gene, likely, stays in each)

        def price(move: Move) -> float:
            return (scores[move.place][genes[move.place]] - scores[move.place][move.value]) / move.cost

        # What the budget leaves is spent.
        while growths := [m for m in space.moves(genes) if m.cost > 0 and space.fits(m.of(genes))]:
            genes = min(growths, key=price).of(genes)
        return space.subnet(genes)

    def likeliest(self, budget: Budget) -> Subnet:
        """What the routers pick by themselves, which may miss the budget.

        Args:
          budget: of the table's kind.

        Raises:
          ValueError: as `subnet` does.
        """
        space = Space(self.shape.config, self.shape.menu, self.table, budget)
        return space.subnet(tuple(int(np.argmax(score)) for score in self._scores(budget)))

    def _scores(self, budget: Budget) -> list[np.ndarray]:
        """Log-probabilities of the values of every gene of `search_space`."""
        require(
            self.shape.reads == "budget",
            "reads",
            self.shape.reads,
            "these routers choose for every token, no sub-network is fixed by a budget; train others",
        )
        whole = self.table.range(self.shape.menu)[1]
        share = budget.of(whole).amount / whole
        code = budget_code(jnp.asarray([share]), self.shape.anchors)
        layers, dropped = self.shape.all_logits(self.params, code)
        assert layers is not None
        pairs = zip(layers["heads"][:, 0], layers["mlp"][:, 0], strict=True)
        logits = [*itertools.chain.from_iterable(pairs), dropped[0]]
        return [np.asarray(jax.nn.log_softmax(r), np.float64) for r in logits]

    def save(self, folder: str | Path) -> None:
        """Writes the routers beside the model that they were trained with.

        Args:
          folder: of that model's checkpoint.
        """
        folder = Path(folder)
        arrays = {"/".join(k.key for k in path): np.asarray(jax.device_get(leaf))
                  for path, leaf in jax.tree_util.tree_leaves_with_path(self.params)}  # fmt: skip
        described = {
            "menu": dataclasses.asdict(self.shape.menu),
            "anchors": self.shape.anchors,
            "reads": self.shape.reads,
            "width": self.shape.width,
            "table": dataclasses.asdict(self.table),
            "tilts": self.tilts,
        }
        with naming(folder / WEIGHTS):
            save_file(arrays, folder / WEIGHTS, {"format": FORMAT})
        text = json.dumps({"format": FORMAT, **described}, indent=2) + "\n"
        write_text_whole(folder / DESCRIPTION, text)
        update_checksums(folder, (WEIGHTS, DESCRIPTION))

    @classmethod
    def load(cls, folder: str | Path, config: ModelConfig, table: CostTable | None = None) -> "Routers":
        """Reads the routers beside a model.

        Args:
          folder: of the model's checkpoint.
          config: the model.
          table: costs to choose by instead of those that the routers were trained with, such as the
            latencies of this device.

        Returns:
          The routers.

        Raises:
          FileNotFoundError: there are none.
          ValueError: the files are damaged, or of another model or menu.
        """
        folder = local_model(folder, weights=False)
        if not (folder / DESCRIPTION).is_file() or not (folder / WEIGHTS).is_file():
            raise FileNotFoundError(f"{folder}: no routers here; train some with --config routers")
        check_files(folder, (WEIGHTS, DESCRIPTION))
        try:
            described = read_json(folder / DESCRIPTION)
            form = described.pop("format", None)
            require(form == FORMAT, "format", form, f"is not {FORMAT!r}")
            stored = from_dict(CostTable, described.pop("table"))
            tilts = tuple(map(float, described.pop("tilts")))
            shape = from_dict(RouterShape, {"config": dataclasses.asdict(config.with_exits(())), **described})
            flat = load_file(folder / WEIGHTS)
        except (ValueError, TypeError, KeyError, SafetensorError) as error:
            raise ValueError(f"{folder}: not usable routers ({error}); train them again") from error

        wanted = jax.eval_shape(shape.init, jax.random.key(0))

        def read(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
            name = "/".join(k.key for k in path)
            found = flat[name].shape if name in flat else None
            require(
                found == leaf.shape,
                f"{folder / WEIGHTS}: {name}",
                found,
                f"the model and menu need {leaf.shape}; these routers are of another model",
            )
            check_tensor(f"{folder / WEIGHTS}: tensor {name!r}", flat[name])
            return jnp.asarray(flat[name])

        return cls(shape, jax.tree_util.tree_map_with_path(read, wanted), table or stored, tilts)
