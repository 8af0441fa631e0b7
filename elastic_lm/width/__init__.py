"""Width, the second dial: nested sub-networks of a checkpoint, ranked by importance, chosen for a budget."""

from etils import epy as _epy

with _epy.lazy_api_imports(globals()):
    from elastic_lm.config.subnet import Budget, Menu, Subnet
    from elastic_lm.config.subnet_table import NamedSubnet, SubnetTable
    from elastic_lm.cost.counted import CostTable, Workload, counted_table
    from elastic_lm.cost.latency_table import Device, LatencyTable
    from elastic_lm.cost.named_subnets import default_subnets, named_subnet
    from elastic_lm.files.subnet_files import load_subnets, save_subnets
    from elastic_lm.width.chooser import SubnetChooser
    from elastic_lm.width.draft_layers import DraftCandidate, search_drafters
    from elastic_lm.width.drafter_files import load_drafter, save_drafter
    from elastic_lm.width.elastic_training import ElasticTraining, ElasticTrainingConfig, uniform_subnets
    from elastic_lm.width.importance import Importance, layer_scores, permute, rank
    from elastic_lm.width.router_training import RouterTraining, RouterTrainingConfig
    from elastic_lm.width.search import (
        Damage,
        evolutionary,
        greedy,
        knapsack,
        measured_damage,
        random_subnets,
        uniform_subnet,
    )
    from elastic_lm.width.slice_tables import read_slice_table
    from elastic_lm.width.slicing import mask_params, slice_params
    from elastic_lm.width.trained_routers import Routers, RouterShape

__all__ = [
    "Budget",
    "CostTable",
    "Damage",
    "Device",
    "DraftCandidate",
    "ElasticTraining",
    "ElasticTrainingConfig",
    "Importance",
    "LatencyTable",
    "Menu",
    "NamedSubnet",
    "RouterShape",
    "RouterTraining",
    "RouterTrainingConfig",
    "Routers",
    "Subnet",
    "SubnetChooser",
    "SubnetTable",
    "Workload",
    "counted_table",
    "default_subnets",
    "evolutionary",
    "greedy",
    "knapsack",
    "layer_scores",
    "load_drafter",
    "load_subnets",
    "mask_params",
    "measured_damage",
    "named_subnet",
    "permute",
    "random_subnets",
    "rank",
    "read_slice_table",
    "save_drafter",
    "save_subnets",
    "search_drafters",
    "slice_params",
    "uniform_subnet",
    "uniform_subnets",
]


def __dir__() -> list[str]:
    return __all__
