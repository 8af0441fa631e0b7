"""Builds latency tables: which programs are timed, and how times become costs of modules.

Layers of equal sizes and window form a class and share their costs. Timed are the sub-networks whose layers
of one class all take one choice, the smallest one, random ones and, where the menu drops layers, those that
lack some layers of a class. Without that they would mislead: half of a small model may lie in a cache that
the whole one does not fit, so that its time says little about narrow models.
With A the shares of each class that take each choice, r the times relative to the full model's, and p the
shares of bytes (decoding) or FLOPs (prefill) that are counted, the costs are

    argmin_{x >= 0}  |A x / r - 1|^2 + PRIOR |x - p|^2

The prior is so weak that it only decides what times leave open: all layers have an attention and an MLP, so
that how a layer's least time splits between the two shows in no time of a whole program. Nor does what all
programs share where all have all layers.
"""

import datetime
import math
from collections.abc import Sequence

import numpy as np
from scipy.optimize import nnls

from elastic_lm.bench.latency_measure import Progress, measure
from elastic_lm.config.checks import require
from elastic_lm.config.model import ModelConfig
from elastic_lm.config.subnet import Ints, Menu, Subnet
from elastic_lm.cost.counted import CostTable, Workload, attention_cost, base_cost, mlp_cost
from elastic_lm.cost.latency_table import PHASES, Device, LatencyTable, Phase
from elastic_lm.files.fingerprints import weights_fingerprint
from elastic_lm.models.decoder import Params
from elastic_lm.report.machine import versions

PRIOR = 1e-4
RANDOM = 6  # random sub-networks per class of layers, beside the chosen ones


def build(
    config: ModelConfig,
    menu: Menu,
    load: Workload,
    *,
    params: Params | None = None,
    rounds: int = 5,
    seed: int = 0,
    progress: Progress | None = None,
    path: str = "",
) -> LatencyTable:
    """Measures the latency table of a model on the device of this process.

    Args:
      config: the whole model; exits are left out.
      menu: choices to measure.
      load: batch and context; context at least 1.
      params: canonical parameters; None = random ones, which take as long.
      rounds: timed runs of every program.
      seed: of prompts, random parameters and random sub-networks.
      progress: makes what shows how far it is; None = nothing does.
      path: of the model's folder, recorded.

    Returns:
      The table; `elastic-lm latency build` writes the same to a file.

    Raises:
      ValueError: the menu does not fit the model or offers widths of the whole model, the context is longer
        than the model allows, or rounds is below 1.

    Example:
      ```python
      import elastic_lm as el

      config = el.testing.tiny_config(n_layers=1)
      menu = el.Menu(mlp=(0.5, 1.0), heads=(1.0,))
      table = el.measure_latency(config, menu, el.width.Workload(batch=1, context=8), rounds=1)
      print(table.text())
      ```
    """
    config = config.with_exits(())
    fix = "times are measured at the model's full width: leave d_model=(1.0,)"
    require(menu.d_model == (1.0,), "menu.d_model", menu.d_model, fix)
    subnets = programs(config, menu, seed)
    measured = measure(config, params, subnets[1:], load, rounds=rounds, seed=seed, progress=progress)
    costs: dict[Phase, CostTable] = {}
    residuals: dict[str, float] = {}
    for phase in PHASES:
        ratios = np.asarray([1.0, *measured.relative[phase]])
        prior = counted_shares(config, menu, load, phase)
        shares, residuals[phase] = fit(design(config, menu, subnets), ratios, prior)
        costs[phase] = cost_table(config, menu, shares * measured.full[phase])
    return LatencyTable(
        config,
        menu,
        load,
        Device.here(),
        **costs,
        residuals=residuals,
        rounds=rounds,
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        versions=versions(),
        path=path,
        weights=weights_fingerprint(params) if params is not None else "",
    )


def default_menu(config: ModelConfig) -> Menu:
    """`Menu()` where the heads of every key/value group can be halved; else groups are, where they can."""
    sizes = [config.sizes(i) for i in range(config.n_layers)]
    if all(heads // groups % 2 == 0 for _, heads, groups in sizes):
        return Menu()
    halved = all(groups % 2 == 0 for _, _, groups in sizes)
    return Menu(heads=(1.0,), groups=(0.5, 1.0) if halved else (1.0,))


def layer_classes(config: ModelConfig) -> list[Ints]:
    """Layers of equal sizes and window, class by class."""
    classes: dict[object, list[int]] = {}
    for i in range(config.n_layers):
        classes.setdefault((config.sizes(i), config.window(i)), []).append(i)
    return [tuple(layers) for layers in classes.values()]


def programs(config: ModelConfig, menu: Menu, seed: int) -> list[Subnet]:
    """The sub-networks whose times determine a table.

    Args:
      config: the whole model.
      menu: choices to tell apart.
      seed: of the random ones.

    Returns:
      Distinct sub-networks, the full model first.
    """
    full, rng = menu.largest(config), np.random.default_rng(seed)
    grid = [(len(menu.mlp) - 1, h, g) for h in range(len(menu.heads)) for g in range(len(menu.groups))]
    grid += [(f, len(menu.heads) - 1, len(menu.groups) - 1) for f in range(len(menu.mlp))]
    found, classes = [full], layer_classes(config)
    for layers in classes:
        found += [_with(config, menu, layers, choice) for choice in grid]
        if menu.dropped:
            found += [_without(config, layers[: math.ceil(len(layers) / 2)])]
    if menu.dropped:
        found += [_without(config, range(config.n_layers // 4, config.n_layers))]
    found += [menu.smallest(config)]
    found += [menu.sample(config, rng) for _ in range(RANDOM * len(classes))]
    return list(dict.fromkeys(found))


def _with(config: ModelConfig, menu: Menu, layers: Ints, choice: tuple[int, int, int]) -> Subnet:
    """The full model with `layers` at the (MLP, heads, groups) choice."""
    sizes, full = menu.sizes(config), Subnet.full(config)
    f, h, g = choice
    kept = range(config.n_layers)
    return Subnet(
        full.layers,
        tuple(sizes.mlp[i][f] if i in layers else full.mlp[i] for i in kept),
        tuple(sizes.heads[i][h] if i in layers else full.heads[i] for i in kept),
        tuple(sizes.groups[i][g] if i in layers else full.groups[i] for i in kept),
        config.d_model,
    )


def _without(config: ModelConfig, layers: Sequence[int]) -> Subnet:
    """The full model without `layers`, or with one layer where none would be left."""
    kept = [i for i in range(config.n_layers) if i not in layers]
    return Subnet.uniform(config, layers=kept or (0,))


def design(config: ModelConfig, menu: Menu, subnets: Sequence[Subnet]) -> np.ndarray:
    """What share of each class takes each choice.

    Args:
      config: the whole model.
      menu: its choices.
      subnets: chosen from it.

    Returns:
      [S, 1 + classes * (MLP choices + head choices * group choices)]; the first column is 1, and class by
      class there follow the MLP choices, then the attention choices with groups running fastest.
    """
    classes = layer_classes(config)
    block = len(menu.mlp) + len(menu.heads) * len(menu.groups)
    shares = np.zeros((len(subnets), 1 + len(classes) * block))
    shares[:, 0] = 1.0
    first = {i: (1 + c * block, len(layers)) for c, layers in enumerate(classes) for i in layers}
    for row, subnet in zip(shares, subnets, strict=True):
        for i, f, h, g in zip(subnet.layers, *menu.positions(config, subnet), strict=True):
            start, count = first[i]
            row[start + f] += 1 / count
            row[start + len(menu.mlp) + h * len(menu.groups) + g] += 1 / count
    return shares


def counted_shares(config: ModelConfig, menu: Menu, load: Workload, phase: Phase) -> np.ndarray:
    """What bytes or FLOPs predict, in the order of `design`'s columns.

    Args:
      config: the whole model.
      menu: its choices.
      load: batch and context.
      phase: "decode" reads weights and caches; "prefill" multiplies, and reads no vocabulary head.

    Returns:
      Costs of a whole class at each choice, relative to the full model's.
    """
    if phase == "prefill":
        load, kind = Workload(load.batch * load.context, load.context // 2), "flops"
    else:
        kind = "read_bytes"
    sizes = menu.sizes(config)
    costs = [0 if phase == "prefill" else base_cost(config, load).read_bytes]
    full = costs[0]
    for layers in layer_classes(config):
        i, count = layers[0], len(layers)
        mlp = [getattr(mlp_cost(config, n, load), kind) for n in sizes.mlp[i]]
        pairs = [(h, g) for h in sizes.heads[i] for g in sizes.groups[i]]
        attention = [getattr(attention_cost(config, i, h, g, load), kind) for h, g in pairs]
        costs += [count * cost for cost in (*mlp, *attention)]
        full += count * (mlp[-1] + attention[-1])
    return np.asarray(costs) / full


def fit(shares: np.ndarray, ratios: np.ndarray, prior: np.ndarray) -> tuple[np.ndarray, float]:
    """Costs of classes and choices from times of whole sub-networks.

    Args:
      shares: [S, N] from `design`.
      ratios: [S] times relative to the full model's.
      prior: [N] from `counted_shares`.

    Returns:
      ([N] costs relative to the full model's time, none below 0; root mean square of fitted / measured - 1).
    """
    relative = shares / ratios[:, None]
    weak = math.sqrt(PRIOR)
    rows = np.concatenate([relative, weak * np.eye(len(prior))])
    costs, _ = nnls(rows, np.concatenate([np.ones(len(ratios)), weak * prior]))
    return costs, float(np.sqrt(np.mean((relative @ costs - 1) ** 2)))


def cost_table(config: ModelConfig, menu: Menu, costs: np.ndarray) -> CostTable:
    """Costs per layer.

    Args:
      config: the whole model.
      menu: its choices.
      costs: milliseconds of whole classes, in the order of `design`'s columns.
    """
    attention: dict[int, tuple[tuple[float, ...], ...]] = {}
    mlp: dict[int, tuple[float, ...]] = {}
    classes = layer_classes(config)
    for layers, block in zip(classes, costs[1:].reshape(len(classes), -1), strict=True):
        each = (block / len(layers)).tolist()
        split, groups = len(menu.mlp), len(menu.groups)
        for i in layers:
            mlp[i] = tuple(each[:split])
            attention[i] = tuple(tuple(each[j : j + groups]) for j in range(split, len(each), groups))
    order = range(config.n_layers)
    return CostTable(
        "latency_ms", float(costs[0]), tuple(attention[i] for i in order), tuple(mlp[i] for i in order)
    )
