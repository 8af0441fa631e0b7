"""What routers pick for a budget, run through the model, and what it costs.

With y the choices of every layer (`width.router`) and K the layers that a row keeps,

    c(x) = (fixed cost + sum over K of y_heads . costs_heads + y_mlp . costs_mlp) / cost of the whole model

Routers that read states choose for every token; c(x) is then a mean over the row.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from elastic_lm.cost.counted import CostTable
from elastic_lm.data.batch import Batch
from elastic_lm.models.decoder import Decoder, Params, vocab_logits
from elastic_lm.nn.remat import Remat
from elastic_lm.train.losses import LOSS_CHUNK, TokenSums, imitation_loss, sum_over_chunks, token_sums
from elastic_lm.width.gated import Picks, gated_hidden
from elastic_lm.width.router import budget_code, router_input, straight_through
from elastic_lm.width.trained_routers import RouterShape, shares

ROUTERS = "routers"  # key of their parameters


@dataclasses.dataclass(frozen=True)
class Picking:
    """What routers of one shape pick, and its cost; static under `jit`."""

    shape: RouterShape  # model, menu, budgets
    table: CostTable  # costs of the menu's choices
    loss_chunk: int = LOSS_CHUNK  # columns of logits alive at once
    remat: Remat = False  # recompute layers in the backward pass

    def forward(
        self,
        params: Params,
        batch: Batch,
        budget_B: jax.Array,
        *,
        key: jax.Array | None = None,
        scale: jax.Array | float = 1.0,
        tau: jax.Array | float = 1.0,
        tilt: jax.Array | float = 0.0,
        stops: bool = False,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Runs what the routers pick for every row's budget.

        Args:
          params: model, stacked, and routers.
          batch: packed tokens.
          budget_B: float32 shares of the whole model's cost.
          key: of the noise; None = the likeliest choices.
          scale: of the logits.
          tau: of the gradient.
          tilt: times its cost as a share of the whole model's, raises a choice's logit where states are read.
          stops: no gradient reaches the routers through the model; where states are read it always does.

        Returns:
          ([B, T, D] state after the last layer, {"heads", "mlp": [L, B, choices], "dropped": [B, choices]}).
        """
        shape, routers = self.shape, params[ROUTERS]
        heads_key, mlp_key, depth_key = (None,) * 3 if key is None else jax.random.split(key, 3)
        code_BA = budget_code(budget_B, shape.anchors)

        # The budget alone decides how many layers are left out.
        layers, dropped_BC = shape.all_logits(routers, code_BA)
        dropped_BC = straight_through(dropped_BC, depth_key, scale, tau)
        keep_LB = (dropped_BC @ shape.kept).T

        # Routers that read states pick for every token; the others have picked before the first layer.
        pick = functools.partial(_picks, scale=scale, tau=tau)
        if layers is None:
            keys = [None if k is None else jax.random.split(k, len(keep_LB)) for k in (heads_key, mlp_key)]
            tilts = [tilt * costs for costs in self._shares()]
            given = (routers["layers"], *tilts, *keys)
            hidden, picked = self._by_token(params, batch, code_BA, pick, given, keep_LB=keep_LB)
        else:
            picked = pick(layers, heads_key, mlp_key)
            hidden = self._by_row(params, batch, picked, keep_LB, stops=stops)
        return hidden, {"heads": picked.heads, "mlp": picked.mlp, "dropped": dropped_BC}

    def _by_token(
        self,
        params: Params,
        batch: Batch,
        code_BA: jax.Array,
        pick: Callable[..., Picks],
        given: Any,
        *,
        keep_LB: jax.Array,
    ) -> tuple[jax.Array, Picks]:
        """([B, T, D] last state, mean picks) where every layer picks for each token, from its own input.

        Args:
          params: model, stacked.
          batch: packed tokens.
          code_BA: of the budgets.
          pick: from a layer's logits and keys to its picks.
          given: (routers, tilts of heads, of neurons, keys of heads, of neurons), layers first.
          keep_LB: 1 where a row runs a layer.
        """

        def of_state(given: Any, hidden: jax.Array) -> Picks:
            router, heads_tilt, mlp_tilt, *keys = given
            logits = self.shape.layer_logits(router, router_input(code_BA[:, None], hidden))
            tilted = {"heads": logits["heads"] + heads_tilt, "mlp": logits["mlp"] + mlp_tilt}
            return pick(tilted, *keys)

        return self._gated(params, batch, of_state, given, keep_LB)

    def _by_row(
        self, params: Params, batch: Batch, picked: Picks, keep_LB: jax.Array, *, stops: bool
    ) -> jax.Array:
        """[B, T, D] last state where `picked`, [L, B, choices], says what all tokens of a row take."""
        given = jax.tree.map(lambda x: x[:, :, None], picked)
        if stops:
            given, keep_LB = jax.lax.stop_gradient((given, keep_LB))
        return self._gated(params, batch, lambda given, _: given, given, keep_LB)[0]

    def _gated(
        self,
        params: Params,
        batch: Batch,
        pick: Callable[[Any, jax.Array], Picks],
        given: Any,
        keep_LB: jax.Array,
    ) -> tuple[jax.Array, Picks]:
        """`gated_hidden` over a batch."""
        return gated_hidden(
            self.shape.config,
            self.shape.menu,
            params,
            batch.tokens,
            pick,
            given=given,
            keep_LB=keep_LB,
            positions_BT=batch.positions,
            segments_BT=batch.segments,
            remat=self.remat,
        )

    def misses(self, picked: dict[str, jax.Array], budget_B: jax.Array) -> tuple[jax.Array, jax.Array]:
        """How far what was picked is from the budgets.

        Args:
          picked: second result of `forward`.
          budget_B: float32 shares of the whole model's cost.

        Returns:
          ([B] relative distance from the budget; [B] squared distance from the whole model, where the budget
          is the whole model, else 0).
        """
        largest = [picked[name][..., -1] for name in ("heads", "mlp")]
        far_B = sum(jnp.mean(jnp.square(1 - last), axis=0) for last in largest)
        far_B = far_B + jnp.square(1 - picked["dropped"][:, 0])
        return jnp.abs(self.costs(picked) / budget_B - 1), jnp.where(budget_B >= 1, far_B, 0.0)

    def costs(self, picked: dict[str, jax.Array]) -> jax.Array:
        """[B] cost of what was picked, as a share of the whole model's."""
        whole = self.table.range(self.shape.menu)[1]
        attention, mlp = self._shares()
        layers_LB = jnp.einsum("lbc,lc->lb", picked["heads"], attention)
        layers_LB = layers_LB + jnp.einsum("lbc,lc->lb", picked["mlp"], mlp)
        keep_LB = (picked["dropped"] @ self.shape.kept).T
        return self.table.fixed / whole + jnp.sum(keep_LB * layers_LB, axis=0)

    def _shares(self) -> tuple[jax.Array, jax.Array]:
        """Costs of the choices of heads and of neurons, [L, choices], as shares of the whole model's."""
        costs = shares(self.table, self.shape.menu)
        return costs["heads"], costs["mlp"]

    def token_sums(self, params: Params, batch: Batch, hidden: jax.Array) -> TokenSums:
        """[B] sums of every row, from the state after the last layer."""
        return self.row_sums(params, batch, hidden)[0]

    def whole(self, params: Params, batch: Batch) -> jax.Array:
        """[B, T, D] state of the whole model after its last layer."""
        config = self.shape.config
        decoder, depth = Decoder(config, self.remat).bind({"params": params}), config.n_layers
        return decoder.taps(batch.tokens, (depth,), batch.positions, batch.segments)[depth].hidden

    def row_sums(
        self, params: Params, batch: Batch, hidden: jax.Array, taught: jax.Array | None = None
    ) -> tuple[TokenSums, jax.Array]:
        """([B] sums of every row, [B] KL to the logits of `taught`)."""
        config = self.shape.config
        decoder = Decoder(config).bind({"params": params})
        head = decoder.final_head()
        rows = jax.vmap(token_sums)

        def one(piece: Any) -> tuple[TokenSums, jax.Array]:
            features, teacher, targets, weights = piece
            logits = vocab_logits(config, features, head)
            sums = rows(logits, targets, weights)
            if teacher is None:
                return sums, jnp.zeros_like(sums.loss)
            losses = imitation_loss("kl", vocab_logits(config, teacher, head), logits)
            return sums, jnp.sum(weights * losses, axis=1)

        teacher = None if taught is None else decoder.final_features(taught)
        arrays = (decoder.final_features(hidden), teacher, batch.targets, batch.weights)
        return sum_over_chunks(one, arrays, self.loss_chunk)


def _picks(logits: dict[str, jax.Array], heads_key: Any, mlp_key: Any, *, scale: Any, tau: Any) -> Picks:
    """One-hot choices of heads and neurons, with the noise of the keys; None = without noise."""
    return Picks(
        heads=straight_through(logits["heads"], heads_key, scale, tau),
        mlp=straight_through(logits["mlp"], mlp_key, scale, tau),
    )


def row_mean(x_B: jax.Array, batch: Batch) -> jax.Array:
    """Mean over rows by their tokens; rows of padding do not count."""
    tokens_B = jnp.sum(batch.segments > 0, axis=1)
    return jnp.sum(x_B * tokens_B) / jnp.maximum(jnp.sum(tokens_B), 1)
