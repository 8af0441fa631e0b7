"""The card of a model that is pushed to the Hub: its origin, what was measured, and how to load it."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from elastic_lm.config.parse import to_dict
from elastic_lm.files.atomic import read_json
from elastic_lm.files.hub import CONFIG, NAME, NATIVE
from elastic_lm.files.subnet_files import SUBNETS_FILE
from elastic_lm.hf.config_json import config_from_hf
from elastic_lm.hf.pushed_files import THRESHOLDS, without_folders

MARK = "<!-- written by elastic_lm -->"  # in the cards that a later push may replace
RUN, INPUTS, MENU = "run.json", "inputs.json", "menu.json"
HOME = "https://github.com/elastic-lm/elastic_lm"


@dataclasses.dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What a card says.

    Attributes:
      name: of the model on the Hub.
      config: fields of the model's config.
      transformers: `transformers` loads it too, at full depth.
      run: run.json of the run that trained it; {} = it is not known.
      thresholds: what `elastic-lm calibrate` wrote; {} = nothing was calibrated.
      menu: widths that it serves; {} = its own alone.
      subnets: table of its named sub-networks; {} = it has none.
      base_model: the model that it was made from, on the Hub or in words; "" = it is not known.
      license: identifier of its license; "" = it is not known.
    """

    name: str
    config: Mapping[str, Any]
    transformers: bool
    run: Mapping[str, Any]
    thresholds: Mapping[str, Any]
    menu: Mapping[str, Any]
    subnets: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    base_model: str = ""
    license: str = ""


def collect_facts(
    folder: Path,
    name: str,
    *,
    run: Path | None = None,
    thresholds: Path | None = None,
    base_model: str | None = None,
    license: str | None = None,
) -> CardFacts:
    """Reads what is known about a model.

    Args:
      folder: of the model.
      name: of the model on the Hub.
      run: folder that may hold run.json; None = it is not known.
      thresholds: the file of thresholds; None = nothing was calibrated.
      base_model: None = that of run.json.
      license: None = not known.

    Raises:
      FileNotFoundError: `folder` holds no model, or there are no such thresholds.
      ValueError: a file is damaged; names it.
    """
    transformers = (folder / CONFIG).is_file()
    entries = read_json(folder / (CONFIG if transformers else NATIVE))
    record = _optional(run / RUN) if run else {}
    place = record.get("train", {}).get("init_from", "")
    named = NAME.fullmatch(place) if run and _optional(run / INPUTS).get("from_hub") is True else None
    found = named["repo"] if named else without_folders(place)
    return CardFacts(
        name=name,
        config=to_dict(config_from_hf(entries)) if transformers else entries,
        transformers=transformers,
        run=record,
        thresholds=read_json(thresholds) if thresholds else {},
        menu=_optional(folder / MENU),
        subnets=_optional(folder / SUBNETS_FILE),
        base_model=base_model if base_model is not None else found,
        license=license or "",
    )


def _optional(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}


def write_card(facts: CardFacts) -> str:
    """The text of a README.md with the metadata that the Hub reads."""
    parts = [_metadata(facts), MARK, f"# {facts.name.rpartition('/')[2]}", _about(facts), _origin(facts)]
    parts += [_exits(facts), _widths(facts), _subnets(facts), _usage(facts)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _metadata(facts: CardFacts) -> str:
    """The block of YAML above the text; values are quoted as JSON, which YAML reads."""
    tags = ["elastic-lm"]
    tags += ["early-exit"] if facts.config.get("exits") else []
    tags += ["elastic-width"] if facts.menu else []
    entries: dict[str, Any] = {"tags": tags}
    if NAME.fullmatch(facts.base_model):
        entries["base_model"] = facts.base_model
    if facts.license:
        entries["license"] = facts.license
    if facts.transformers:
        entries["library_name"] = "transformers"
    if _is_decoder(facts):
        entries["pipeline_tag"] = "text-generation"
    lines = [f"{key}: {json.dumps(value)}" for key, value in entries.items()]
    return "\n".join(("---", *lines, "---"))


def exit_layers(facts: CardFacts) -> list[int]:
    """The layers after which the model has exits."""
    exits = facts.config.get("exits") or []
    return [one["layer"] if isinstance(one, Mapping) else int(one) for one in exits]


def _about(facts: CardFacts) -> str:
    config, layers = facts.config, exit_layers(facts)
    depth, width, vocabulary = (config.get(key) for key in ("n_layers", "d_model", "vocab_size"))
    size = f"{depth} layers, {width} wide, {vocabulary} tokens"
    text = f"A model of the {config.get('family')} family ({size}) for [elastic_lm]({HOME})."
    if layers:
        text += f" A token may leave it after {_listed(layers)} of its {depth} layers."
    if facts.menu:
        text += " It can be cut to narrower and shallower models without training."
    return text


def _origin(facts: CardFacts) -> str:
    """Base model, method and data, as far as a run says them; paths are given without their folders."""
    rows = []
    if facts.base_model:
        known = NAME.fullmatch(facts.base_model)
        link = f"[{facts.base_model}](https://huggingface.co/{facts.base_model})"
        rows.append(("base model", link if known else facts.base_model))
    method = dict(facts.run.get("method") or {})
    if method:
        options = {key: value for key, value in method.items() if key != "name" and value}
        changed = ", ".join(f"{key}={_shown(value)}" for key, value in options.items())
        rows.append(("method", f"{method.get('name')}{f' ({changed})' if changed else ''}"))
    data, task = facts.run.get("data") or {}, facts.run.get("task") or {}
    paths = ", ".join(Path(path).name for path in (data or task).get("paths", ()))
    if data or task:
        rows.append(("data", f"{data.get('source', 'labelled records')}{f': {paths}' if paths else ''}"))
    if data:
        rows.append(("batch", f"{data.get('batch_size')} rows of {data.get('seq_len')} tokens"))
    if train := facts.run.get("train"):
        rows.append(("optimizer", f"{train.get('optimizer')}, learning rate {train.get('lr')}"))
    rows.append(("license", facts.license or "not stated: that of the base model counts"))
    return "\n".join(
        ("## Origin", "", "| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows))
    )


def _exits(facts: CardFacts) -> str:
    """The table of calibrated thresholds."""
    layers, found = exit_layers(facts), facts.thresholds
    if not layers:
        return ""
    if not found.get("curve"):
        fix = f"`elastic-lm calibrate --model {facts.name} --data TEXT` fits thresholds and measures them"
        return _section("Early exits", f"What the exits give was not measured; {fix}.")

    names = [f"leave after {layer}" for layer in (*layers, facts.config.get("n_layers"))]
    rows = [("target", "equal to full depth", "mean layers", *names)]
    for point in found["curve"]:
        numbers = (f"{point['target']:g}", f"{point['agreement']:.4f}", f"{point['mean_layers']:.2f}")
        rows.append((*numbers, *(f"{share:.1%}" for share in point["shares"])))
    origin = found.get("provenance", {})
    data = origin.get("data", {})
    tokens = f"{data.get('scoring_tokens', 'some')} held-out tokens ({_text(data)})"
    measured = f"Measured on {tokens}, {str(origin.get('date', ''))[:10]}:"
    policy = f"`{THRESHOLDS}` reads {found.get('metric')} and was set for a target of {found.get('target')}."
    return _section("Early exits", measured, _table(rows), f"{policy} {_statement(origin)}".strip())


def _text(data: Mapping[str, Any]) -> str:
    """Which text was measured on, without the folders of a machine."""
    return without_folders(str(data.get("description") or "text that is not named"))


def _shown(value: Any) -> str:
    """An option of a method; of paths only the last name."""
    if isinstance(value, list):
        return f"[{', '.join(map(_shown, value))}]"
    return without_folders(value) if isinstance(value, str) else str(value)


def _statement(origin: Mapping[str, Any]) -> str:
    said = str(origin.get("guarantee") or "")
    return f"Guarantee: {said.removeprefix('guarantee: ')}." if said else ""


def _widths(facts: CardFacts) -> str:
    """What the menu of an elastic model offers."""
    rows = [(key, _listed(value)) for key, value in facts.menu.items() if isinstance(value, list) and value]
    return _section("Widths", _table([("part", "choices"), *rows])) if rows else ""


def _subnets(facts: CardFacts) -> str:
    """The named sub-networks, with what was measured of them."""
    found = facts.subnets.get("subnets") or []
    if not found:
        return ""
    rows = [("name", "layers", "neurons", "parameters", "nats per token", "ms per token", "speed-up")]
    whole = sum(sizes[0] for sizes in facts.subnets["sizes"]["layers"])
    for one in found:
        subnet, loss, time = one["subnet"], one.get("loss"), one.get("time")
        numbers = (str(len(subnet["layers"])), f"{sum(subnet['mlp']) / whole:.0%}", f"{one['parameters']:,}")
        measured = (
            f"{loss['nats_per_token']:.4f}" if loss else "not measured",
            f"{time['ms_per_token']:.3g}" if time else "not measured",
            f"{time['speedup']:.2f}" if time else "not measured",
        )
        rows.append((f"`{one['name']}`", *numbers, *measured))

    texts = sorted({one["loss"]["text"] for one in found if one.get("loss")})
    devices = sorted({one["time"]["device"] for one in found if one.get("time")})
    how = [f"Losses are on {', '.join(texts)}."] if texts else []
    how += [f"Times are of {', '.join(devices)}."] if devices else []
    use = f'`elastic-lm generate --model {facts.name} --subnet NAME --prompt "Once upon a time"` runs one.'
    return _section("Sub-networks", _table(rows), " ".join([*how, use]))


def _usage(facts: CardFacts) -> str:
    """How to load the model, here and in transformers."""
    name, decoder = facts.name, _is_decoder(facts)
    lines = ["import elastic_lm as el", "", f'model, params = el.load("{name}")']
    if decoder:
        lines += [
            f'tokenizer = el.Tokenizer.load("{name}")',
            "sampler = el.Sampler(model, params, tokenizer)",
            'print(sampler.sample("Once upon a time", 64).text)',
        ]
    parts = [_code("python", lines)]
    if decoder and facts.thresholds:
        options = f'--model {name} --thresholds {THRESHOLDS} --prompt "Once upon a time"'
        commands = [f"hf download {name} {THRESHOLDS} --local-dir .", f"elastic-lm generate {options}"]
        parts += ["With early exits:", _code("sh", commands)]
    if decoder and facts.transformers:
        lines = ["from transformers import AutoModelForCausalLM", ""]
        lines += [f'model = AutoModelForCausalLM.from_pretrained("{name}")']
        parts += ["In `transformers`, at full depth:", _code("python", lines)]
    return _section("Use", *parts)


def _is_decoder(facts: CardFacts) -> bool:
    return facts.config.get("kind", "decoder") == "decoder" and "n_kv_heads" in facts.config


def _section(title: str, *parts: str) -> str:
    return "\n\n".join((f"## {title}", *parts))


def _table(rows: Sequence[Sequence[str]]) -> str:
    """A table whose first row names the columns."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join((lines[0], "|" + "---|" * len(rows[0]), *lines[1:]))


def _code(language: str, lines: Sequence[str]) -> str:
    return "\n".join((f"```{language}", *lines, "```"))


def _listed(values: Sequence[Any]) -> str:
    *first, last = map(str, values)
    return f"{', '.join(first)} or {last}" if first else last
