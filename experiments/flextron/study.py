"""What every arm of run.py is given: data, menu, latency table and budgets, and how a loss is measured."""

import dataclasses
import functools
import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax

import elastic_lm as el
from elastic_lm.checkpoints.loading import load_decoder
from elastic_lm.checkpoints.native import save_model
from elastic_lm.data import Batch
from elastic_lm.models.decoder import Params, stack_layers
from elastic_lm.train.losses import TokenSums
from elastic_lm.train.run import MODEL_FOLDER
from elastic_lm.width.elastic_training import STORAGE_GROUPS
from elastic_lm.width.switched import MenuIndices

Measurement = dict[str, Any]
Model = tuple[el.ModelConfig, Params]

MENU = el.Menu(mlp=(0.25, 0.5, 0.75, 1.0), heads=(1 / 3, 2 / 3, 1.0))
WHOLE = el.Menu(mlp=(1.0,), heads=(1.0,))  # of a model that is measured as it is
RANK_BATCHES = 16


@dataclasses.dataclass(frozen=True)
class Settings:
    """Flags that arms read."""

    steps: int
    lr: float
    slice_lr: float
    scratch_lr: float
    distil: float
    teacher: str
    samples: int
    smallest_share: float
    budgets: tuple[float, ...]  # shares of the whole model's time per decoded token
    alone: tuple[float, ...]  # those of them that models are trained alone for
    random: int  # random sub-networks per budget
    held_out: int  # batches
    damage: int  # batches


@dataclasses.dataclass(frozen=True)
class Study:
    """One seed of the study.

    Attributes:
      base: folder of the pretrained model.
      folder: of this seed; finished trainings lie in folder / NAME / model.
      data: text and the shape of a batch, with the seed.
      table: decoding costs of `MENU` on this device, in milliseconds.
      settings: the flags.
    """

    base: str
    folder: Path
    data: el.DataConfig
    table: el.width.CostTable
    settings: Settings

    @functools.cached_property
    def config(self) -> el.ModelConfig:
        """The ranked model's config."""
        return elastic_config(self.base)

    @functools.cached_property
    def tokenizer(self) -> el.Tokenizer:
        """The base model's."""
        return el.Tokenizer.load(self.base)

    @functools.cached_property
    def held_out(self) -> list[Batch]:
        """The first batches of the held-out text."""
        return batches(el.data.eval_batches(self.data, self.tokenizer), self.settings.held_out)

    @functools.cached_property
    def damage_text(self) -> list[Batch]:
        """A few training batches in an order of their own, for searches."""
        data = dataclasses.replace(self.data, seed=self.data.seed + 1000)
        return batches(el.data.train_batches(data, self.tokenizer), self.settings.damage)

    def budget(self, share: float) -> el.Budget:
        """A share of the whole model's time."""
        return el.Budget(latency_ms=share * self.table.range(MENU)[1])

    def affordable(self, menu: el.Menu, table: el.width.CostTable) -> list[float]:
        """The budgets that a menu can meet."""
        least = table.range(menu)[0]
        return [share for share in self.settings.budgets if self.budget(share).amount >= least]

    def row(self, arm: str, how: str, share: float, subnet: el.Subnet, loss: float) -> Measurement:
        """One measured sub-network; `predicted` is its share of the whole model's time by the table."""
        whole = self.table.range(MENU)[1]
        return {
            "arm": arm,
            "how": how,
            "budget": share,
            "subnet": dataclasses.asdict(subnet),
            "predicted": self.table.total(self.config, MENU, subnet) / whole,
            "loss": loss,
        }

    def trained(
        self,
        name: str,
        train: el.TrainConfig,
        method: el.train.MethodConfig | None = None,
        *,
        model: el.ModelConfig | None = None,
    ) -> Model:
        """The finished model of one training, from its folder where it is there already.

        Args:
          name: of the folder.
          train: options of training.
          method: the method with its options; None = plain training of all parameters.
          model: a new model; None = the one that `train` names.
        """
        folder = self.folder / name
        if not (folder / MODEL_FOLDER).is_dir():
            run = el.RunConfig(
                model=model,
                data=dataclasses.replace(self.data, tokenizer=self.base),
                method=method or el.train.PretrainingConfig(),
                train=train,
            )
            el.train.fit(run, folder)
        return opened(folder)

    @property
    def recipe(self) -> el.TrainConfig:
        """What all trainings share."""
        return el.TrainConfig(
            steps=self.settings.steps,
            lr=self.settings.lr,
            min_lr=0.02,
            warmup=self.settings.steps // 10,
            eval_every=0,
            eval_batches=1,
            save_every=50,
            keep=1,
            seed=self.data.seed,
        )

    def ranked(self) -> Model:
        """The base sorted by importance on this seed's first training batches; nothing else is changed."""
        folder = self.folder / "ranked"
        if not (folder / MODEL_FOLDER).is_dir():
            decoder, params = load_decoder(self.base)
            text = batches(el.data.train_batches(self.data, self.tokenizer), RANK_BATCHES)
            importance = el.width.rank(decoder.config, params, text)
            config, params = el.width.permute(decoder.config, params, importance, groups=STORAGE_GROUPS)
            save_model(folder / MODEL_FOLDER, config, params, self.tokenizer)
        return opened(folder)


def elastic_config(base: str) -> el.ModelConfig:
    """The config that the base has once it is ranked."""
    return dataclasses.replace(load_decoder(base)[0].config, elastic_groups=STORAGE_GROUPS)


def opened(folder: Path) -> Model:
    """A finished model."""
    decoder, params = load_decoder(folder / MODEL_FOLDER)
    return decoder.config, params


def batches(source: Iterable[Any], count: int) -> list[Batch]:
    """The first `count` batches."""
    return [Batch(**arrays) for arrays in itertools.islice(source, count)]


def losses(model: Model, text: Sequence[Batch], menu: el.Menu = MENU) -> Callable[[el.Subnet], float]:
    """Nats per token of any sub-network of a model, by one compiled program."""
    config, params = model[0], stack_layers(model[1])
    method = el.width.ElasticTraining(config, menu=menu)

    @functools.cache
    def loss(subnet: el.Subnet) -> float:
        choice = MenuIndices.of(config, menu, subnet)
        sums = jax.device_get([_sums(method, params, choice, batch) for batch in text])
        return float(sum(s.cross_entropy for s in sums) / sum(s.weight for s in sums))

    return loss


def own_loss(model: Model, text: Sequence[Batch]) -> float:
    """Nats per token of a model as it is."""
    return losses(model, text, WHOLE)(el.Subnet.full(model[0]))


@functools.partial(jax.jit, static_argnums=0)
def _sums(method: el.width.ElasticTraining, params: Params, choice: MenuIndices, batch: Batch) -> TokenSums:
    return method.token_sums(params, choice, batch)


def key(subnet: dict[str, Any]) -> str:
    """A sub-network as a key of times.json."""
    return json.dumps(subnet, separators=(",", ":"))
