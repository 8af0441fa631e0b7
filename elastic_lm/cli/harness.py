"""`python -m elastic_lm.cli.harness`: the lm-evaluation-harness's command, which knows `--model elastic_lm`.

    python -m elastic_lm.cli.harness --model elastic_lm --model_args path=runs/exits/model,exit=6 --tasks piqa

The harness finds models by name in its own list and has no other way to learn of one, so that its command
`lm_eval` needs the import that stands here. In Python, `register()` is enough for
`lm_eval.simple_evaluate("elastic_lm", model_args="path=...")`.
"""

import contextlib
from typing import Any

from elastic_lm.cascade.rule import CascadeRule
from elastic_lm.cli.belonging import parts_of
from elastic_lm.cli.width_flags import WidthOptions, budget_of, chosen_subnet, subnet_of
from elastic_lm.config.checks import require
from elastic_lm.harness.library import harness
from elastic_lm.harness.model import BATCH_SIZE, HarnessModel, lm_class

NAME = "elastic_lm"
# Of the harness, which mean nothing here: JAX chooses the device, and batches have one size.
IGNORED = ("device", "max_batch_size")


class LoadedModel(HarnessModel):
    """A `HarnessModel` that `--model_args` describes, each argument as our commands take it."""

    def __init__(
        self,
        path: str | None = None,
        *,
        exit: int | None = None,
        thresholds: str | None = None,
        subnet: str | None = None,
        budget: str | None = None,
        latency_table: str | None = None,
        budget_context: int | None = None,
        cascade: str | None = None,
        dtype: str | None = None,
        batch_size: int | str = BATCH_SIZE,
        max_length: int | None = None,
        max_gen_toks: int | None = None,
        **others: Any,
    ) -> None:
        """Loads a model.

        Args:
          path: its folder, .gguf file, or name on the Hub; None = the embedded model.
          exit: layer whose exit answers.
          thresholds: file of an exit policy.
          subnet: such as "mlp=50% heads=50%", or a file.
          budget: such as "parameters=70%".
          latency_table: file, with a budget of milliseconds.
          budget_context: with a budget of FLOPs or bytes.
          cascade: file of a cascade's rule: the part of the model that answers at first is the Swift, and the
            whole model the Super.
          dtype: of parameters and activations.
          batch_size: rows that are read at once; "auto" = the default.
          max_length: tokens of a row at most.
          max_gen_toks: tokens of a continuation, where a task does not say.
          **others: what the harness hands over to every model.

        Raises:
          ValueError: an argument is not known, is out of range, or does not fit the model.
        """
        from elastic_lm.cli.model_folder import load_with_tokenizer
        from elastic_lm.depth.policies import ConfidenceExit

        for name, value in others.items():
            known = "path, exit, thresholds, subnet, budget, latency_table, budget_context, cascade, dtype, "
            known += "batch_size, max_length, max_gen_toks"
            require(name in IGNORED, f"model_args: {name}", value, f"is not known; known are {known}")
        size = BATCH_SIZE if str(batch_size).startswith("auto") else int(batch_size)
        width = WidthOptions(
            subnet=None if subnet is None else subnet_of(str(subnet).split()),
            budget=None if budget is None else budget_of(str(budget)),
            latency_table=latency_table,
            budget_context=budget_context,
        )
        policy = None if thresholds is None else ConfidenceExit.load(thresholds)
        rule = None if cascade is None else CascadeRule.load(cascade)

        model, params, tokenizer, folder = load_with_tokenizer(path, dtype)
        if policy is not None:
            policy.check(model.config)
            policy.warn_other_model(**parts_of(params, tokenizer))
            policy = policy.for_any_weights()
        lengths: dict[str, Any] = {} if max_gen_toks is None else {"max_new_tokens": max_gen_toks}
        super().__init__(
            model,
            params,
            tokenizer,
            exit=exit,
            thresholds=policy,
            subnet=chosen_subnet(width, folder, model.config, params, tokenizer),
            cascade=rule,
            batch_size=size,
            max_length=max_length,
            name=folder,
            **lengths,
        )

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: Any = None) -> Any:
        """A model from text like "path=DIR,exit=6"; what the harness adds to it gives way."""
        given = harness("utils").simple_parse_args_string(arg_string)
        return cls.create_from_arg_obj(given, additional_config)

    @classmethod
    def create_from_arg_obj(cls, arg_dict: Any, additional_config: Any = None) -> Any:
        """The same from arguments by name; the harness's own command always adds a batch size."""
        added = {name: value for name, value in (additional_config or {}).items() if value is not None}
        return cls(**{**added, **arg_dict})


def register() -> None:
    """Makes `elastic_lm` one of the harness's models.

    Raises:
      ValueError: lm-eval is not installed; names the extra.
    """
    harness("models")  # fills the harness's list with its own models, which it does for an empty list alone
    registry = harness("api.registry").model_registry
    if NAME not in registry:
        registry.register(NAME)(lm_class(LoadedModel))


def main() -> None:
    """Runs `lm_eval` with our model in its list."""
    register()
    harness("__main__").cli_evaluate()


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        main()
