"""The arms of run.py whose sub-networks routers choose, on the elastically trained model."""

import dataclasses
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from study import MODEL_FOLDER, Measurement, Model, Study, losses

import elastic_lm as el
from elastic_lm.bench.timing import interleave
from elastic_lm.models.decoder import stack_layers
from elastic_lm.width.picking import ROUTERS, Picking

STEPS, LR, WIDTH = 80, 1e-2, 256
TOKENS, ROUNDS = 64, 7


def trained(study: Study, name: str, **fields: Any) -> Model:
    """The elastic model with trained routers beside it; budgets are milliseconds of this study's table."""
    train = dataclasses.replace(
        study.recipe,
        init_from=str(study.folder / "elastic" / MODEL_FOLDER),
        steps=STEPS,
        warmup=5,
        lr=LR,
        weight_decay=0.0,
    )
    method = el.width.RouterTrainingConfig(
        budgets=(*sorted(study.settings.budgets), 1.0),
        priced="latency_ms",
        latency_table=str(study.folder.parent / "latency.json"),
        **fields,
    )
    return study.trained(name, train, method)


def static(study: Study) -> list[Measurement]:
    """One sub-network per budget, from routers trained end to end and by the surrogate."""
    rows = []
    schemes: dict[str, Any] = {"end to end": {}, "surrogate": {"scheme": "surrogate"}}
    for how, fields in schemes.items():
        name = f"router_{how.replace(' ', '_')}"
        model = trained(study, name, **fields)
        loss = losses(model, study.held_out)
        routers = el.width.Routers.load(study.folder / name / MODEL_FOLDER, study.config, study.table)
        for share in study.settings.budgets:
            budget = study.budget(share)
            subnet, likeliest = routers.subnet(budget), routers.likeliest(budget)
            row = study.row("router", how, share, subnet, loss(subnet))
            row["own"] = study.table.total(study.config, routers.shape.menu, likeliest) / budget.amount
            rows.append(row)
    return rows


def by_token(study: Study) -> list[Measurement]:
    """Widths chosen for every token, tilted to meet each budget on average over held-out text."""
    model = trained(study, "router_by_token", reads="hidden", router_width=32)
    routers = el.width.Routers.load(
        study.folder / "router_by_token" / MODEL_FOLDER, study.config, study.table
    )
    picking = Picking(routers.shape, study.table)
    params = {**stack_layers(model[1]), ROUTERS: routers.params}
    measured = jax.jit(lambda batch, share, tilt: _loss_and_cost(picking, params, batch, share, tilt))
    rows = []
    for share in study.settings.budgets:
        tilt = np.interp(share, routers.shape.anchors, routers.tilts)
        sums = jax.device_get([measured(batch, share, tilt) for batch in study.held_out])
        entropy, tokens, cost = np.sum(sums, axis=0)
        row: Measurement = {"arm": "router", "how": "by token", "budget": share, "subnet": None}
        row |= {"predicted": float(cost / len(sums)), "loss": float(entropy / tokens)}
        rows.append(row | {"relative": _relative_time(study, model, routers, share)})
    return rows


def _loss_and_cost(picking: Picking, params: Any, batch: Any, share: Any, tilt: Any) -> Any:
    share_B = jnp.full(batch.tokens.shape[:1], share)
    hidden, picked = picking.forward(params, batch, share_B, tilt=tilt)
    sums = picking.token_sums(params, batch, hidden)
    return jnp.stack([jnp.sum(sums.loss), jnp.sum(sums.weight), jnp.mean(picking.costs(picked))])


def _relative_time(study: Study, model: Any, routers: el.width.Routers, share: float) -> float:
    """Measured time per token of generated text against the whole model's, in turns."""
    elastic = el.SubnetChooser(study.config, routers.shape.menu, study.table, routers=routers)
    sampler = el.Sampler(el.Decoder(study.config), model[1], elastic=elastic)
    prompt = np.asarray(study.held_out[0].tokens[0, :64]).tolist()
    asked: dict[str, Any] = {
        "whole": {"subnet": el.Subnet.full(study.config)},
        "by token": {"budget": study.budget(share)},
    }
    sides = {
        name: lambda fields=fields: sampler.sample(prompt, TOKENS, ignore_eos=True, **fields)
        for name, fields in asked.items()
    }
    times = interleave(sides, ROUNDS)
    pairs = zip(times["by token"], times["whole"], strict=True)
    return statistics.median(own / whole for own, whole in pairs)
