"""The arms of run.py: each trains what it needs and measures sub-networks on held-out text.

An arm is a function of a `Study` that returns rows: `Study.row(...)`, or, where no one sub-network stands
for a budget, the same keys with `subnet` None, `predicted` as estimated and `relative`, the measured time per
decoded token relative to the whole model's. Trainings go to `study.folder / NAME`; the elastic model that a
router starts from is `elastic_model(study)`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from routers import by_token, static
from study import MENU, MODEL_FOLDER, Measurement, Model, Study, losses, own_loss

import elastic_lm as el
from elastic_lm.checkpoints.native import save_model
from elastic_lm.width import greedy, knapsack, measured_damage, random_subnets, uniform_subnet

Arm = Callable[[Study], list[Measurement]]
MLP_ONLY = el.Menu(mlp=MENU.mlp, heads=(1.0,))


def zero_shot(study: Study) -> list[Measurement]:
    """Sub-networks of the ranked base, which was never trained to be narrow: uniform ones, and knapsack."""
    model = study.ranked()
    rows, loss = uniform_rows(study, "zero-shot", model), losses(model, study.held_out)
    damage = measured_damage(study.config, MENU, losses(model, study.damage_text))
    for share in study.affordable(MENU, study.table):
        subnet = knapsack(study.config, MENU, study.table, study.budget(share), damage)
        rows.append(study.row("zero-shot", "knapsack", share, subnet, loss(subnet)))
    return rows


def elastic(study: Study) -> list[Measurement]:
    """Elastic training; sub-networks chosen uniformly, by search, and at random."""
    model = elastic_model(study)
    rows, loss = uniform_rows(study, "elastic", model), losses(model, study.held_out)
    trial = losses(model, study.damage_text)
    damage = measured_damage(study.config, MENU, trial)
    for share in study.affordable(MENU, study.table):
        given = (study.config, MENU, study.table, study.budget(share))
        chosen = [
            ("best uniform", min(uniform_within(study, share), key=trial)),
            ("greedy", greedy(*given, damage)),
            ("knapsack", knapsack(*given, damage)),
        ]
        drawn = random_subnets(*given, study.settings.random, seed=study.data.seed)
        chosen += [("random", subnet) for subnet in drawn]
        rows += [study.row("elastic", how, share, subnet, loss(subnet)) for how, subnet in chosen]
    return rows


def uniform_within(study: Study, share: float) -> list[el.Subnet]:
    """All uniform sub-networks of a budget."""
    subnets = el.width.uniform_subnets(study.config, MENU).values()
    most = study.budget(share).amount
    return [s for s in subnets if study.table.total(study.config, MENU, s) <= most]


def elastic_model(study: Study) -> Model:
    """The elastically trained model, its neurons and heads in the order of the ranked base."""
    s = study.settings
    teacher: Any = s.teacher if s.distil else "live"
    method = el.width.ElasticTrainingConfig(
        menu=MENU, samples=s.samples, smallest_share=s.smallest_share, distil=s.distil, teacher=teacher
    )
    return study.trained("elastic", from_ranked(study), method)


def matformer(study: Study) -> list[Measurement]:
    """MatFormer's training: one width of all MLPs per step, the whole one among them."""
    method = el.width.ElasticTrainingConfig(menu=MLP_ONLY, draw="one_per_step")
    model = study.trained("matformer", from_ranked(study), method)
    return uniform_rows(study, "matformer", model, MLP_ONLY)


def from_ranked(study: Study) -> el.TrainConfig:
    """A training of the ranked base, which is made where it is missing."""
    study.ranked()
    return dataclasses.replace(study.recipe, init_from=str(study.folder / "ranked" / MODEL_FOLDER))


def scratch(study: Study) -> list[Measurement]:
    """New models of the sizes of uniform sub-networks, each trained alone."""
    s, rows = study.settings, []
    train = dataclasses.replace(study.recipe, optimizer="muon", lr=s.scratch_lr)
    for share, subnet in alone(study):
        model = study.trained(f"scratch_{share:g}", train, model=subnet.sliced(study.config))
        rows.append(study.row("scratch", "alone", share, subnet, own_loss(model, study.held_out)))
    return rows


def tuned_slices(study: Study) -> list[Measurement]:
    """Uniform slices of the ranked base, each fine-tuned alone."""
    s, rows = study.settings, []
    for share, subnet in alone(study):
        start = study.folder / f"slice_{share:g}" / "start"
        if not start.is_dir():
            save_model(start, *el.slice_params(*study.ranked(), subnet), study.tokenizer)
        train = dataclasses.replace(study.recipe, lr=s.slice_lr, init_from=str(start))
        model = study.trained(f"slice_{share:g}", train)
        rows.append(study.row("slice", "alone", share, subnet, own_loss(model, study.held_out)))
    return rows


def alone(study: Study) -> list[tuple[float, el.Subnet]]:
    """The uniform sub-networks that models are trained alone for."""
    given = (study.config, MENU, study.table)
    return [(share, uniform_subnet(*given, study.budget(share))) for share in study.settings.alone]


def uniform_rows(study: Study, arm: str, model: Model, menu: el.Menu = MENU) -> list[Measurement]:
    """The whole model, and the largest uniform sub-network within each budget that the menu can meet."""
    loss, table = losses(model, study.held_out), of_menu(study.table, menu)
    full = el.Subnet.full(study.config)
    rows = [study.row(arm, "full", 1.0, full, loss(full))]
    for share in study.affordable(menu, table):
        subnet = uniform_subnet(study.config, menu, table, study.budget(share))
        rows.append(study.row(arm, "uniform", share, subnet, loss(subnet)))
    return rows


def of_menu(table: el.width.CostTable, menu: el.Menu) -> el.width.CostTable:
    """The costs of `MENU` that a menu with the same MLPs and the last of its heads has."""
    return dataclasses.replace(table, attention=tuple(a[-len(menu.heads) :] for a in table.attention))


ARMS: dict[str, Arm] = {
    "zero_shot": zero_shot,
    "elastic": elastic,
    "matformer": matformer,
    "scratch": scratch,
    "slices": tuned_slices,
    "static_router": static,
    "by_token": by_token,
}
