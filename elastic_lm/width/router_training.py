"""Routers that choose the sub-network for a budget: Flextron's second stage, in two schemes.

A router gives the choices of every layer for a budget b, a share of the whole model's cost (`width.router`).
Every row of a batch draws a budget from the anchors; x is the sub-network that its routers pick with Gumbel
noise, c(x) its cost as a share of the whole model's, from a `CostTable`, measured or counted:

    miss(x, b)  = |c(x) / b - 1|, 0 where it is below DEAD_ZONE and b < 1
                  + WHOLE (mean over layers of (1 - y_largest)^2, summed over what is chosen)     where b = 1

    end_to_end    minimise over routers (and, jointly, the model)
                      (1 - d) CE(z_x) + d KL(p || q_x) + a miss(x, b)
    surrogate     minimise over routers
                      S(x) + a miss(x, b), S being a prediction of the loss (`width.surrogate`)

Both have the gradient of the straight-through choice. The first one needs a backward pass through the model,
the second none. As training goes on the noise fades: tau falls geometrically over TAU, the logits' scale
rises linearly over SCALE.

Routers that read states choose for every token (`end_to_end` only). c(x) is then a mean over the row, and
`width.tilts` holds the trained routers to their budgets.

Papers: Flextron, arXiv 2406.10260, sec. 3; Nemotron Elastic, arXiv 2511.16664 (budget loss, schedules).
"""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any, Literal, Self, get_args

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from elastic_lm.checkpoints.native import load_menu
from elastic_lm.config.checks import (
    AT_LEAST_1,
    NOT_NEGATIVE,
    POSITIVE,
    require,
    require_choice,
    require_defaults,
    require_each,
    require_shares,
)
from elastic_lm.config.model import ModelConfig
from elastic_lm.config.subnet import Budget, Menu
from elastic_lm.cost.counted import CostTable, Workload, counted_table
from elastic_lm.cost.latency_table import LatencyTable
from elastic_lm.data.batch import Batch
from elastic_lm.models.decoder import Params
from elastic_lm.processes import on_host
from elastic_lm.train.losses import (
    LOSS_CHUNK,
    Metrics,
)
from elastic_lm.train.method import Finished, Method, MethodConfig, ParameterGroup, RunData, options
from elastic_lm.width.picking import ROUTERS, Picking, row_mean
from elastic_lm.width.router import ROUTER_WIDTH
from elastic_lm.width.surrogate import SURROGATE, Surrogate, init_surrogate, rise, surrogate_loss
from elastic_lm.width.tilts import TILT_BATCHES, fit_tilts
from elastic_lm.width.trained_routers import RouterReads, Routers, RouterShape

Scheme = Literal["end_to_end", "surrogate"]
Priced = Literal["parameters", "flops", "memory_bytes", "latency_ms"]

DEAD_ZONE = 0.05  # relative miss of a budget that costs nothing
WHOLE = 10.0  # weight of choices that are not the largest where the budget is the whole model
TAU = (1.0, 0.05)  # temperature of the straight-through gradient, from the first to the last step
SCALE = (1.0, 10.0)  # of the logits against the noise
# Options, the option that decides whether they are read, and its values that have them read.
READ_WITH = (
    (("train_model", "distil"), "scheme", ("end_to_end",)),
    (("surrogate_error",), "scheme", ("surrogate",)),
    (("latency_table",), "priced", ("latency_ms",)),
    (("context",), "priced", ("flops", "memory_bytes")),
)
# Options that say how routers are made -> fields of `RouterShape`.
OF_SHAPE = {"budgets": "anchors", "reads": "reads", "router_width": "width"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterTrainingConfig(MethodConfig):
    """Options of `RouterTraining`, the `method` section of a run's config.

    Raises:
      ValueError: an option is out of its range, or not read with the others; names field, value and fix.

    Example:
      ```python
      import elastic_lm as el

      method = el.width.RouterTrainingConfig(budgets=(0.5, 0.75, 1.0), scheme="surrogate")
      ```
    """

    name: str = "routers"
    budgets: tuple[float, ...] = (0.5, 0.625, 0.75, 0.875, 1.0)  # shares of the whole model's cost
    priced: Priced = "parameters"  # what a budget is counted or measured in
    latency_table: str = ""  # latency_ms: file of elastic-lm latency build, of this device
    context: int = 0  # flops or memory_bytes: positions before the token that is decoded
    scheme: Scheme = "end_to_end"  # through the model, or by a surrogate of its loss
    reads: RouterReads = "budget"  # what they choose by; hidden: by every token's state, too
    router_width: int = ROUTER_WIDTH  # width of their hidden layer
    router_lr: float = 1.0  # their learning rate as a multiple of the model's
    budget_weight: float = 10.0  # a
    train_model: bool = False  # end_to_end: the model trains too
    distil: float = 0.0  # end_to_end: d; p of the whole model in this step, with no gradient through it
    surrogate_error: float = 0.5  # surrogate: mean error below which the routers train, in nats per token

    def __post_init__(self) -> None:
        require_shares("method.budgets", self.budgets)
        require_choice("method.priced", self.priced, get_args(Priced))
        require_choice("method.scheme", self.scheme, get_args(Scheme))
        require_choice("method.reads", self.reads, get_args(RouterReads))
        require_each(self, "method.", ("router_width",), *AT_LEAST_1)
        require_each(self, "method.", ("router_lr", "surrogate_error"), *POSITIVE)
        require_each(self, "method.", ("budget_weight", "context"), *NOT_NEGATIVE)
        require(0 <= self.distil <= 1, "method.distil", self.distil, "must be in [0, 1]")

        require(
            self.priced != "latency_ms" or bool(self.latency_table),
            "method.latency_table",
            self.latency_table,
            "name the file that elastic-lm latency build wrote on this device",
        )
        for fields, by, values in READ_WITH:
            value = getattr(self, by)
            if value not in values:
                unread = f"not read with method.{by}={value!r}, only with {' or '.join(values)}; set"
                require_defaults(self, "method.", fields, unread)
        require(
            self.scheme == "end_to_end" or self.reads == "budget",
            "method.reads",
            self.reads,
            "needs scheme='end_to_end': the surrogate predicts from one choice per row",
        )

    def check(self, run: Any) -> None:
        """Raises ValueError for a run without an elastic model."""
        require(
            bool(run.train.init_from),
            "train.init_from",
            run.train.init_from,
            "routers choose for an elastic model: name its folder",
        )


@dataclasses.dataclass(frozen=True)
class RouterTraining(RouterTrainingConfig, Method[Batch]):
    """Trains routers, and the model with them where wanted (Flextron, arXiv 2406.10260, sec. 3).

    Static under `jit`; parameters, batches and the step are traced.

    Raises:
      ValueError: a budget is below the least that the menu can cost, or an option contradicts `shape`.

    Example:
      ```python
      import jax
      import jax.numpy as jnp
      import elastic_lm as el
      from elastic_lm.testing import random_params, random_tokens, tiny_config

      config = tiny_config(elastic_groups=16)
      tokens = random_tokens(config, batch=2, length=17)
      ones = jnp.ones((2, 16), jnp.int32)
      batch = el.data.Batch(tokens[:, :-1], tokens[:, 1:], 1.0 * ones, jnp.cumsum(ones, 1) - 1, ones)

      menu = el.Menu(mlp=(0.5, 1.0), heads=(0.5, 1.0))
      shape = el.width.RouterShape(config, menu, anchors=(0.7, 1.0), width=16)
      table = el.width.counted_table(config, menu, "parameters")
      method = el.width.RouterTraining(shape=shape, table=table, steps=100)
      routers, model = method.split(el.train.stack_layers(random_params(config)))
      loss, metrics = jax.jit(method.loss)(routers, model, batch, jnp.int32(0))
      ```
    """

    section = RouterTrainingConfig

    shape: RouterShape  # model, menu, budgets; static
    table: CostTable  # costs of the menu's choices; static
    steps: int  # of the whole run, over which noise fades
    initial: Any = dataclasses.field(default=None, compare=False)  # routers to start from; None = new ones
    seed: int = 0  # of the draws and of new routers
    loss_chunk: int = LOSS_CHUNK  # columns of logits alive at once
    remat: bool = False  # recompute layers in the backward pass

    def __post_init__(self) -> None:
        # What the routers were made for decides. Options left at their defaults become what it says.
        for option, field in OF_SHAPE.items():
            value, made = getattr(self, option), getattr(self.shape, field)
            require(
                value in (made, getattr(RouterTrainingConfig, option)),
                option,
                value,
                f"shape has {field}={made!r}: leave {option} out, or make the shape with {value!r}",
            )
            object.__setattr__(self, option, made)
        super().__post_init__()

        whole = self.table.range(self.shape.menu)[1]
        for share in self.shape.anchors:
            self.table.check(Budget(**{self.table.kind: share * whole}), self.shape.menu)

    @property
    def config(self) -> ModelConfig:
        """The model, without exits."""
        return self.shape.config

    @property
    def picking(self) -> Picking:
        """What the routers pick, and its cost."""
        return Picking(self.shape, self.table, self.loss_chunk, self.remat)

    @classmethod
    def create(
        cls, section: MethodConfig, model: ModelConfig, params: Params, train: Any, mesh: Mesh
    ) -> tuple[Self, Params]:
        """The method for an elastic model: `train.init_from` holds its menu, and routers to be trained on.

        Raises:
          FileNotFoundError: init_from has no menu, or there is no latency table.
          ValueError: the budgets cannot be met, the table is of another model, menu or device, or the routers
            in init_from are of another form.
        """
        assert isinstance(section, RouterTrainingConfig)
        menu = load_menu(train.init_from)
        shape = RouterShape(model, menu, section.budgets, section.reads, section.router_width)
        method = cls(
            shape=shape,
            table=cost_table(section, model, menu),
            initial=initial_routers(section, shape, train.init_from),
            **options(cls, section, train),
        )
        return method, params

    def split(self, params: Params) -> tuple[Params, Params]:
        """Routers train, and the surrogate or the model with them where wanted."""
        routers, surrogate = jax.random.split(jax.random.key(self.seed))
        new: Params = {ROUTERS: self.initial or self.shape.init(routers)}
        if self.scheme == "surrogate":
            new[SURROGATE] = init_surrogate(self.shape, surrogate)

        # New parameters lie whole on every device of the model's mesh, where it has one.
        mesh = getattr(getattr(jax.tree.leaves(params)[0], "sharding", None), "mesh", None)
        new = new if mesh is None else jax.device_put(new, NamedSharding(mesh, PartitionSpec()))
        return ({**params, **new}, {}) if self.train_model else (new, params)

    def batches(self, batches: Iterator[Any], frozen: Params, data: RunData) -> Any:
        """The data as it comes.

        Raises:
          ValueError: routers that read states have no held-out text on which they are held to their budgets.
        """
        if self.reads == "hidden" and next(iter(data.held_out()), None) is None:
            raise ValueError(
                f"method.reads={self.reads!r}: such routers are held to budgets on held-out text: name more "
                "in data.eval_paths"
            )
        return batches

    def loss(
        self, trainable: Params, frozen: Params, batch: Batch, step: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        """What is minimised (equations at the top of this file), in nats per counted token.

        Args:
          trainable: first result of `split`, the model stacked.
          frozen: second result of `split`.
          batch: packed tokens, targets and weights.
          step: int32 scalar; with the seed it decides about budgets and noise. The parts of an accumulated
            batch share them.

        Returns:
          (scalar float32, metrics `loss`, `loss/picked` = mean cross-entropy of what was picked,
          `budget/miss` = mean |c(x) / b - 1|; with the surrogate `surrogate/error` and `surrogate/trusted`).
        """
        params = {**frozen, **trainable}

        # Every row draws a budget, and noise fades from step to step.
        budgets, noise = jax.random.split(jax.random.fold_in(jax.random.key(self.seed), step))
        anchors = jnp.asarray(self.shape.anchors)
        budget_B = anchors[jax.random.randint(budgets, (batch.tokens.shape[0],), 0, anchors.size)]
        progress = step / self.steps
        tau = TAU[0] * (TAU[1] / TAU[0]) ** progress
        scale = SCALE[0] + (SCALE[1] - SCALE[0]) * progress
        # The gradient takes the way through the surrogate, where there is one, and not through the model.
        picking, stops = self.picking, self.scheme == "surrogate"
        hidden, picked = picking.forward(
            params, batch, budget_B, key=noise, scale=scale, tau=tau, stops=stops
        )

        # a miss(x, b)
        off_B, whole_B = picking.misses(picked, budget_B)
        charged_B = jnp.where((off_B < DEAD_ZONE) & (budget_B < 1), 0.0, off_B) + WHOLE * whole_B
        miss = self.budget_weight * row_mean(charged_B, batch)
        metrics = {"budget/miss": row_mean(off_B, batch)}

        if self.scheme == "end_to_end":
            loss, entropy = self._quality(params, batch, hidden)
            return loss + miss, {"loss": loss + miss, "loss/picked": entropy, **metrics}

        rise_B, entropy = rise(picking, params, batch, hidden)
        network = Surrogate(self.shape.width)
        loss, surrogate = surrogate_loss(
            network, params[SURROGATE], batch, picked, rise_B, miss=miss, most_error=self.surrogate_error
        )
        return loss, {"loss": loss, "loss/picked": entropy, **metrics, **surrogate}

    def for_evaluation(self) -> "RouterEvaluation":
        """What the routers pick without noise."""
        return RouterEvaluation(self.picking)

    def finish(self, params: Params, data: RunData) -> Finished:
        """The model and, beside it, the routers; those that read states are tilted towards their budgets."""
        tilts: tuple[float, ...] = ()
        if self.reads == "hidden":
            held_out = data.placed(itertools.islice(data.held_out(), TILT_BATCHES))
            tilts = fit_tilts(self.picking, params, list(held_out))
        # On the host: one process alone writes them.
        routers = Routers(self.shape, on_host(params[ROUTERS]), self.table, tilts)
        model = {name: tree for name, tree in params.items() if name not in (ROUTERS, SURROGATE)}
        return Finished(model, self.shape.menu, routers.save)

    def parameter_groups(self) -> tuple[ParameterGroup, ...]:
        """Routers and the surrogate have no weight decay, and a learning rate of their own."""
        return (ParameterGroup((ROUTERS, SURROGATE), self.router_lr),)

    def _quality(self, params: Params, batch: Batch, hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
        """((1 - d) CE + d KL, CE), per counted token."""
        taught = jax.lax.stop_gradient(self.picking.whole(params, batch)) if self.distil else None
        sums, divergence_B = self.picking.row_sums(params, batch, hidden, taught)
        count = jnp.maximum(jnp.sum(sums.weight), 1.0)  # a batch of padding alone has no tokens
        entropy = jnp.sum(sums.loss) / count
        return (1 - self.distil) * entropy + self.distil * jnp.sum(divergence_B) / count, entropy


@dataclasses.dataclass(frozen=True)
class RouterEvaluation(Method[Batch]):
    """What routers pick without noise, at their anchors and between them."""

    picking: Picking

    def loss(
        self, trainable: Params, frozen: Params, batch: Batch, step: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        """Cross-entropy and cost of the likeliest choices at every budget.

        Args:
          trainable: first result of `split`, the model stacked.
          frozen: second result of `split`.
          batch: packed tokens, targets and weights.
          step: not used.

        Returns:
          (mean over the anchors, metrics `loss` and, for every anchor b and every mean of two neighbours,
          `loss/budget_<b>` in nats per counted token and `spent/budget_<b>`, cost over budget).
        """
        params, anchors = {**frozen, **trainable}, self.picking.shape.anchors
        between = [(low + high) / 2 for low, high in itertools.pairwise(anchors)]
        budgets = jnp.asarray([*anchors, *between], jnp.float32)

        def one(budget: jax.Array) -> tuple[jax.Array, jax.Array]:
            budget_B = jnp.full(batch.tokens.shape[:1], budget)
            hidden, picked = self.picking.forward(params, batch, budget_B)
            sums = self.picking.token_sums(params, batch, hidden)
            entropy = jnp.sum(sums.loss) / jnp.maximum(jnp.sum(sums.weight), 1.0)
            return entropy, row_mean(self.picking.costs(picked), batch) / budget

        # `map` runs one budget after the other by one program.
        losses, spent = jax.lax.map(one, budgets)

        names = [f"budget_{b:.4g}" for b in (*anchors, *between)]
        metrics = {f"loss/{name}": loss for name, loss in zip(names, losses, strict=True)}
        metrics |= {f"spent/{name}": share for name, share in zip(names, spent, strict=True)}
        mean = jnp.mean(losses[: len(anchors)])
        return mean, {"loss": mean, **metrics}


def cost_table(section: RouterTrainingConfig, model: ModelConfig, menu: Menu) -> CostTable:
    """Costs of a menu, of the kind that the budgets are in.

    Raises:
      FileNotFoundError: there is no latency table.
      ValueError: the latency table is of another model, menu or device.
    """
    if section.priced == "latency_ms":
        return LatencyTable.load(section.latency_table).checked(model, menu)
    return counted_table(model, menu, section.priced, Workload(context=section.context))


def initial_routers(section: RouterTrainingConfig, shape: RouterShape, folder: str) -> Params | None:
    """Routers beside the model in `folder`, to be trained on; None where there are none."""
    try:
        found = Routers.load(folder, shape.config)
    except FileNotFoundError:
        return None

    for option, field in OF_SHAPE.items():
        value, stored = getattr(section, option), getattr(found.shape, field)
        require(
            value == stored,
            f"method.{option}",
            value,
            f"the routers in {folder} have {stored!r}; set that, or take a model without routers",
        )
    return found.params
