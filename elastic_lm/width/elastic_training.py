"""Elastic training: one model whose narrower sub-networks are models too, for many widths.

A subnet x chooses, in every layer, a share of the MLP neurons, of the query heads in each key/value group and
of these groups from a `Menu`, and may leave out layers; it computes what its slice computes
(`width.slicing`). Where heads share no groups, the groups are the heads.
With z the logits of the whole model, z_s those of subnet x_s, q_s = softmax(z_s), N counted tokens:

    minimise over all parameters:    CE(z) + (1/S) sum_{s=1..S} [(1 - d) CE(z_s) + d KL(p || q_s)]
    CE(z) = (1/N) sum -log softmax(z)_{x_next},    KL(p || q) = (1/N) sum sum_v p_v (log p_v - log q_v)

    x_s      drawn anew in every step, each layer's choices for itself ("per_layer") or one for all layers
             ("uniform"); with probability `smallest_share`, x_1 is the menu's smallest subnet
    d        `distil`
    p        softmax(z) of the whole model: of this step, with no gradient through it ("live", the trainable
             teacher of Nemotron Elastic), or of the parameters that training began with ("frozen")

- Flextron, first stage: d = 0; its exact sampling could not be verified, this one is ours.
- MatFormer: CE(z_1) alone ("one_per_step"), x_1 the same granularity in all layers, every one as often, the
  whole model among them.

Choices are traced: one compiled step serves all subnets, and pays for the widths that were drawn. A frozen
teacher is a second copy of the parameters in memory, and one more forward pass of the whole model.

Papers: Flextron, arXiv 2406.10260; MatFormer, arXiv 2310.07707; Nemotron Elastic, arXiv 2511.16664.
"""

import dataclasses
import itertools
import math
from typing import Any, Literal, Self, get_args

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from elastic_lm.config.checks import (
    AT_LEAST_1,
    NOT_NEGATIVE,
    require,
    require_choice,
    require_defaults,
    require_each,
)
from elastic_lm.config.model import ModelConfig
from elastic_lm.config.subnet import Menu, Subnet
from elastic_lm.data.batch import Batch
from elastic_lm.models.decoder import Decoder, Params, vocab_logits
from elastic_lm.nn.remat import Remat
from elastic_lm.nn.vocab_head import Head
from elastic_lm.processes import is_first
from elastic_lm.train.losses import (
    LOSS_CHUNK,
    Metrics,
    TokenSums,
    chunked_cross_entropy,
    imitation_loss,
    sum_over_chunks,
    token_sums,
)
from elastic_lm.train.method import TEACHER, Finished, Method, MethodConfig, RunData, options
from elastic_lm.train.state import TrainState
from elastic_lm.width.importance import STORAGE_GROUPS
from elastic_lm.width.ranking import rank_state
from elastic_lm.width.switched import MenuIndices, elastic_taps

Draw = Literal["per_layer", "uniform", "one_per_step"]
TeacherKind = Literal["live", "frozen"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ElasticTrainingConfig(MethodConfig):
    """Options of `ElasticTraining`, the `method` section of a run's config.

    Raises:
      ValueError: an option is out of its range, or not read with the others; names field, value and fix.

    Example:
      ```python
      import elastic_lm as el

      menu = el.Menu(mlp=(0.25, 0.5, 1.0), heads=(0.5, 1.0))
      method = el.width.ElasticTrainingConfig(menu=menu, distil=0.5)
      ```
    """

    name: str = "flextron"
    menu: Menu = dataclasses.field(default=Menu(heads=(1.0,)))  # channels must stay whole
    draw: Draw = "per_layer"  # which subnets; one_per_step reads none of the next four fields
    samples: int = 2  # S
    smallest_share: float = 0.5  # probability that x_1 is the smallest
    distil: float = 0.0  # d
    teacher: TeacherKind = "live"  # p, where d > 0
    elastic_groups: int = 0  # storage groups of neurons; 0 = the model's own, or as many as the widths allow
    rank_batches: int = 16  # batches that rank neurons and heads of init_from, unless it is ranked

    def __post_init__(self) -> None:
        require_choice("method.draw", self.draw, get_args(Draw))
        require_choice("method.teacher", self.teacher, get_args(TeacherKind))
        require_each(self, "method.", ("samples", "rank_batches"), *AT_LEAST_1)
        require_each(self, "method.", ("elastic_groups",), *NOT_NEGATIVE)
        require_each(
            self, "method.", ("smallest_share", "distil"), lambda v: 0 <= v <= 1, "must be in [0, 1]"
        )

        require(
            self.menu.d_model == (1.0,),
            "method.menu.d_model",
            self.menu.d_model,
            "is one width for all layers, which switches inside the layers cannot choose; set (1.0,)",
        )
        if self.draw == "one_per_step":
            unread = f"not read with method.draw={self.draw!r}, only with per_layer or uniform; set"
            require_defaults(self, "method.", ("samples", "smallest_share", "teacher", "distil"), unread)
        require(
            self.teacher == "live" or self.distil > 0,
            "method.teacher",
            self.teacher,
            "not read with method.distil=0.0; raise that, or set 'live'",
        )

    def check(self, run: Any) -> None:
        """Refuses a number of ranking batches for a new model, which there is nothing to rank in."""
        if not run.train.init_from:
            unread = "not read with train.init_from='', which is not ranked; name a model, or set"
            require_defaults(self, "method.", ("rank_batches",), unread)


@dataclasses.dataclass(frozen=True)
class ElasticTraining(ElasticTrainingConfig, Method[Batch]):
    """Trains every parameter on the losses of the whole model and of random subnets (Flextron).

    Static under `jit`; parameters, batches and the step are traced. Paper: arXiv 2406.10260.

    Raises:
      ValueError: the menu does not fit the model.

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

      method = el.width.ElasticTraining(config, menu=el.Menu(mlp=(0.5, 1.0), heads=(1.0,)))
      trainable, frozen = method.split(random_params(config))
      loss, metrics = jax.jit(method.loss)(trainable, frozen, batch, jnp.int32(0))
      ```
    """

    section = ElasticTrainingConfig

    config: ModelConfig  # the model, ranked (`width.importance`) or new; its exits are not used; static
    seed: int = 0  # of the draws
    loss_chunk: int = LOSS_CHUNK  # columns of logits alive at once, of the teacher and of one subnet
    remat: Remat = False  # recompute layers in the backward pass
    unsorted: bool = False  # a pretrained model whose neurons and heads `begin` sorts

    def __post_init__(self) -> None:
        super().__post_init__()
        self.menu.sizes(self.config)

    @classmethod
    def create(
        cls, section: MethodConfig, model: ModelConfig, params: Params, train: Any, mesh: Mesh
    ) -> tuple[Self, Params]:
        """The method for a model, to which storage groups are added where it has none.

        Raises:
          ValueError: the menu or the groups do not fit the model.
        """
        assert isinstance(section, ElasticTrainingConfig)
        unsorted = not model.elastic_groups
        if unsorted:
            groups = section.elastic_groups or storage_groups(model, section.menu)
            model = dataclasses.replace(model, elastic_groups=groups)
        require(
            section.elastic_groups in (0, model.elastic_groups),
            "method.elastic_groups",
            section.elastic_groups,
            f"the model has {model.elastic_groups} already; set 0 to keep",
        )

        pretrained = bool(train.init_from)
        try:
            method = cls(model, unsorted=unsorted and pretrained, **options(cls, section, train))
        except ValueError as error:
            raise _about_method(error, model) from error
        return method, params

    def split(self, params: Params) -> tuple[Params, Params]:
        """Everything trains; a frozen teacher is a copy of `params` under the key `TEACHER`.

        The copy is made before `begin` sorts the model, which does not matter: sorted or not, it computes the
        same.
        """
        return params, {TEACHER: jax.tree.map(jnp.copy, params)} if self._has_frozen_teacher else {}

    def begin(self, state: TrainState, frozen: Params, data: RunData) -> TrainState:
        """Sorts a pretrained model by importance on the first training batches."""
        if not self.unsorted:
            return state
        if is_first():
            print(f"ranking neurons and heads on {self.rank_batches} batches", flush=True)
        first = itertools.islice(iter(data.train), self.rank_batches)
        return rank_state(self.config, state, data.placed(first))

    def loss(
        self, trainable: Params, frozen: Params, batch: Batch, step: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        """Loss of the whole model and of this step's subnets, in nats per counted token.

        Args:
          trainable: first result of `split`, canonical or stacked.
          frozen: second result of `split`.
          batch: packed tokens, targets and weights.
          step: int32 scalar; decides about the subnets. The parts of an accumulated batch share them.

        Returns:
          (scalar float32, metrics `loss` and, unless one subnet is drawn per step, `loss/final` and
          `accuracy/final` of the whole model, `loss/sampled` = mean cross-entropy of the subnets and, with
          distillation, `kl/sampled`).
        """
        subnets = self.subnets(step)
        if self.draw == "one_per_step":
            sums = self.token_sums(trainable, jax.tree.map(lambda x: x[0], subnets), batch)
            loss = sums.loss / jnp.maximum(sums.weight, 1.0)
            return loss, {"loss": loss}

        final, sampled, divergence = self._sums(trainable, frozen, batch, subnets)
        count = jnp.maximum(final.weight, 1.0)  # a batch of padding alone has no tokens
        entropy, divergence = sampled / count / self.samples, divergence / count / self.samples
        loss = final.loss / count + (1.0 - self.distil) * entropy + self.distil * divergence

        metrics = {"loss": loss, "loss/final": final.loss / count, "accuracy/final": final.correct / count}
        distilled = {"kl/sampled": divergence} if self.distil else {}
        return loss, {**metrics, "loss/sampled": entropy, **distilled}

    def for_evaluation(self) -> "ElasticEvaluation":
        """The cross-entropy of the menu's uniform subnets."""
        return ElasticEvaluation(self)

    def finish(self, params: Params, data: RunData) -> Finished:
        """The model without the teacher, and the menu that it is elastic for."""
        own = {name: tree for name, tree in params.items() if name != TEACHER}
        return Finished(own, self.menu)

    def subnets(self, step: jax.Array | int) -> MenuIndices:
        """Subnets of a step, [S, L] each; one for one_per_step. Seed and step decide."""
        key = jax.random.fold_in(jax.random.key(self.seed), step)
        layers = self.config.n_layers
        if self.draw == "one_per_step":
            return draw_subnets(key, self.menu, layers, 1, uniform=True)
        return draw_subnets(
            key,
            self.menu,
            layers,
            self.samples,
            smallest_share=self.smallest_share,
            uniform=self.draw == "uniform",
        )

    def token_sums(self, params: Params, subnet: MenuIndices, batch: Batch) -> TokenSums:
        """Cross-entropy of one subnet.

        Args:
          params: canonical or stacked parameters.
          subnet: [L] each; traced.
          batch: packed tokens, targets and weights.

        Returns:
          TokenSums of float32 scalars.
        """
        features, head = self._features(params, subnet, batch), self._head(params)
        return chunked_cross_entropy(self.config, features, head, batch, chunk=self.loss_chunk)

    @property
    def _has_frozen_teacher(self) -> bool:
        return self.draw != "one_per_step" and self.distil > 0 and self.teacher == "frozen"

    def _sums(
        self, params: Params, frozen: Params, batch: Batch, subnets: MenuIndices
    ) -> tuple[TokenSums, jax.Array, jax.Array]:
        """(sums of the whole model, cross-entropy and KL summed over subnets and tokens)."""
        # States before the vocabulary heads, of the whole model, of its subnets and of the teacher. `map`
        # runs one subnet after the other by one program.
        head = self._head(params)
        full = self._full_features(params, batch)
        each = jax.lax.map(lambda subnet: self._features(params, subnet, batch), subnets)
        teacher_head, taught = head, None
        if self._has_frozen_teacher:
            original = jax.lax.stop_gradient(frozen[TEACHER])
            teacher_head, taught = self._head(original), self._full_features(original, batch)

        # The backward pass computes a student's logits again, so that those of one subnet exist at a time.
        @jax.checkpoint
        def student(
            features: jax.Array, teacher: jax.Array | None, targets: jax.Array, weights: jax.Array
        ) -> tuple[jax.Array, jax.Array]:
            logits = vocab_logits(self.config, features, head)
            entropy = token_sums(logits, targets, weights).loss
            if teacher is None:
                return entropy, jnp.zeros_like(entropy)
            return entropy, jnp.sum(weights * imitation_loss("kl", teacher, logits))

        def one(piece: Any) -> tuple[TokenSums, jax.Array, jax.Array]:
            full, taught, each, targets, weights = piece
            logits = vocab_logits(self.config, full, head)
            teacher = logits if taught is None else vocab_logits(self.config, taught, teacher_head)
            held = jax.lax.stop_gradient(teacher) if self.distil else None
            losses = [student(features, held, targets, weights) for features in each]
            entropy, divergence = (sum(sums, jnp.zeros(())) for sums in zip(*losses, strict=True))
            return token_sums(logits, targets, weights), entropy, divergence

        arrays = (full, taught, list(each), batch.targets, batch.weights)
        return sum_over_chunks(one, arrays, self.loss_chunk)

    def _features(self, params: Params, subnet: MenuIndices, batch: Batch) -> jax.Array:
        """[B, T, D] of one subnet for the vocabulary head."""
        depth = self.config.n_layers
        taps = elastic_taps(
            self.config,
            self.menu,
            params,
            batch.tokens,
            subnet,
            depths=(depth,),
            positions_BT=batch.positions,
            segments_BT=batch.segments,
            remat=self.remat,
        )
        return Decoder(self.config).bind({"params": params}).final_features(taps[depth].hidden)

    def _full_features(self, params: Params, batch: Batch) -> jax.Array:
        """[B, T, D] of the whole model, without branches."""
        decoder, depth = Decoder(self.config, self.remat).bind({"params": params}), self.config.n_layers
        taps = decoder.taps(batch.tokens, (depth,), batch.positions, batch.segments)
        return decoder.final_features(taps[depth].hidden)

    def _head(self, params: Params) -> Head:
        """The vocabulary head."""
        return Decoder(self.config).bind({"params": params}).final_head()


@dataclasses.dataclass(frozen=True)
class ElasticEvaluation(Method[Batch]):
    """Cross-entropy of a menu's uniform subnets; nothing is drawn."""

    method: ElasticTraining

    def loss(
        self, trainable: Params, frozen: Params, batch: Batch, step: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        """Mean cross-entropy of the subnets that `uniform_subnets` names, in nats per counted token.

        Args:
          trainable: first result of `split`, canonical or stacked.
          frozen: not used.
          batch: packed tokens, targets and weights.
          step: not used.

        Returns:
          (scalar float32, metrics `loss`, for every subnet `loss/<name>`, and `accuracy/final`).
        """
        config, menu = self.method.config, self.method.menu
        subnets = uniform_subnets(config, menu)
        each = [MenuIndices.of(config, menu, subnet) for subnet in subnets.values()]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
        sums = jax.lax.map(lambda subnet: self.method.token_sums(trainable, subnet, batch), stacked)

        count = jnp.maximum(sums.weight[0], 1.0)
        losses = dict(zip(subnets, sums.cross_entropy / count, strict=True))
        mean = jnp.mean(sums.cross_entropy) / count
        accuracy = sums.correct[list(subnets).index("final")] / count
        named = {f"loss/{name}": loss for name, loss in losses.items()}
        return mean, {"loss": mean, **named, "accuracy/final": accuracy}


def draw_subnets(
    key: jax.Array,
    menu: Menu,
    n_layers: int,
    samples: int,
    *,
    smallest_share: float = 0.0,
    uniform: bool = False,
) -> MenuIndices:
    """Independent random subnets, one of which is often the smallest.

    Args:
      key: typed PRNG key; traced.
      menu: what may be chosen; static.
      n_layers: L; static.
      samples: S; static.
      smallest_share: probability that the first one is the menu's smallest; static.
      uniform: all layers take the same choice, instead of each its own; static.

    Returns:
      The subnets, [S, L] each.
    """
    drawn, coin = jax.random.split(key)
    keys = jax.random.split(drawn, samples)
    subnets = jax.vmap(lambda key: draw_subnet(key, menu, n_layers, uniform=uniform))(keys)

    # The first choice of every axis is the smallest one, and all layers that may go are gone.
    stays = jnp.asarray([i not in menu.dropped for i in range(n_layers)])
    first = jnp.zeros(n_layers, jnp.int32)
    smallest = MenuIndices(first, first, stays, first)
    taken = jax.random.bernoulli(coin, smallest_share) & (jnp.arange(samples) == 0)
    return jax.tree.map(lambda one, all_: jnp.where(taken[:, None], one, all_), smallest, subnets)


def draw_subnet(key: jax.Array, menu: Menu, n_layers: int, *, uniform: bool = False) -> MenuIndices:
    """A random subnet of a menu, every choice equally likely.

    Args:
      key: typed PRNG key; traced.
      menu: what may be chosen; static. Channels stay whole.
      n_layers: L; static.
      uniform: all layers take the same choice, instead of each its own; static.

    Returns:
      The subnet, [L] each.
    """
    mlp, heads, depth, groups = jax.random.split(key, 4)
    shape = () if uniform else (n_layers,)

    def indices(key: jax.Array, shares: tuple[float, ...]) -> jax.Array:
        return jnp.broadcast_to(jax.random.randint(key, shape, 0, len(shares)), (n_layers,))

    # Layers go in the order of `menu.dropped`: the first n of them, n drawn from 0 to all.
    left_out = jax.random.randint(depth, (), 0, len(menu.dropped) + 1)
    place = {layer: n for n, layer in enumerate(menu.dropped)}
    place_L = jnp.asarray([place.get(layer, len(place)) for layer in range(n_layers)])

    return MenuIndices(
        mlp=indices(mlp, menu.mlp),
        heads=indices(heads, menu.heads),
        keep=place_L >= left_out,
        groups=indices(groups, menu.groups),
    )


def uniform_subnets(config: ModelConfig, menu: Menu) -> dict[str, Subnet]:
    """The subnets that held-out text is read by: every uniform width of a menu, and its smallest subnet.

    Args:
      config: the whole model.
      menu: what may be chosen.

    Returns:
      {name: subnet}: "final" is the whole model, "smallest" the smallest subnet of all, and
      "mlp_0.5_heads_1" has half of the neurons and all heads of all layers. An axis with a single choice,
      here groups, is left out of the name.

    Example:
      ```python
      import elastic_lm as el
      from elastic_lm.testing import tiny_config

      menu = el.Menu(mlp=(0.5, 1.0), heads=(0.5, 1.0))
      named = el.width.uniform_subnets(tiny_config(), menu)
      assert list(named) == ["smallest", "mlp_0.5_heads_1", "mlp_1_heads_0.5", "final"]
      ```
    """
    elastic = [axis for axis in ("mlp", "heads", "groups") if len(getattr(menu, axis)) > 1]
    names: dict[Subnet, str] = {}
    for shares in itertools.product(*(getattr(menu, axis) for axis in elastic)):
        named: dict[str, Any] = dict(zip(elastic, shares, strict=True))
        name = "_".join(f"{axis}_{share:g}" for axis, share in named.items())
        names[Subnet.uniform(config, **named)] = name
    names |= {menu.smallest(config): "smallest", menu.largest(config): "final"}
    return {name: subnet for subnet, name in names.items()}


def storage_groups(config: ModelConfig, menu: Menu) -> int:
    """As many storage groups of neurons, up to `STORAGE_GROUPS`, as divide every width of a menu."""
    neurons = (config.sizes(i)[0] for i in range(config.n_layers))
    # A share that gives no whole number of neurons is refused later, with the nearest ones that do.
    widths = [round(share * size) for size in neurons for share in menu.mlp]
    return math.gcd(STORAGE_GROUPS, *widths)


def _about_method(error: ValueError, model: ModelConfig) -> ValueError:
    """The same error about a menu, with the name that its field has in a run's config."""
    message = str(error)
    if not message.startswith("menu."):
        return error

    message = f"method.{message}"
    alone = any(heads == groups for _, heads, groups in map(model.sizes, range(model.n_layers)))
    if alone and message.startswith("method.menu.heads"):
        message += "; this model's heads share no key/value groups: set method.menu.heads=(1.0,) and choose "
        message += "heads by method.menu.groups"
    return ValueError(message)
