"""What config.json and generation_config.json say of tokens that must or must not be generated."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from elastic_lm.config.checks import is_whole, require
from elastic_lm.config.encoder_decoder import EncoderDecoderConfig
from elastic_lm.hf.files import read_json

FORCED = {"forced_bos_id": "forced_bos_token_id", "forced_eos_id": "forced_eos_token_id"}
SUPPRESSED = "bad_words_ids"
LIMITS = (*FORCED.values(), SUPPRESSED)


def read_limits(hf: Mapping[str, Any], **defaults: int | None) -> dict[str, Any]:
    """Fields of an encoder-decoder's config that limit what is generated.

    Args:
      hf: parsed config.json or generation_config.json.
      **defaults: fields where their keys are missing; None where this does not say.

    Returns:
      `forced_bos_id`, `forced_eos_id` and `suppressed_ids`.

    Raises:
      ValueError: a value is no token, or words of several tokens are never to be generated.
    """
    fields: dict[str, Any] = {}
    for ours, theirs in FORCED.items():
        token = hf.get(theirs, defaults.get(ours))
        token = token[0] if isinstance(token, list) and len(token) == 1 else token
        require(token is None or is_whole(token), theirs, token, "must be one token id, or null")
        fields[ours] = token

    words = hf.get(SUPPRESSED) or []
    right = isinstance(words, list) and all(isinstance(word, list) and len(word) == 1 for word in words)
    fix = "must be lists of one token id each: longer words are not supported; remove them"
    require(right and all(is_whole(word[0]) for word in words), SUPPRESSED, words, fix)
    fields["suppressed_ids"] = tuple(sorted({word[0] for word in words}))
    return fields


def write_limits(config: EncoderDecoderConfig, *, always: bool = False) -> dict[str, Any]:
    """Inverse of `read_limits`, for config.json; `always` also says that nothing is forced."""
    forced = {theirs: getattr(config, ours) for ours, theirs in FORCED.items()}
    entries: dict[str, Any] = {key: token for key, token in forced.items() if always or token is not None}
    if config.suppressed_ids:
        entries[SUPPRESSED] = [[token] for token in config.suppressed_ids]
    return entries


def limits_beside(path: Path, config: Any) -> dict[str, Any]:
    """The limits that generation_config.json states; with this file, config.json has no say in them.

    Args:
      path: the file; it need not exist.
      config: from config.json.

    Raises:
      ValueError: as `read_limits`, and a token is not in the vocabulary; names the file.
    """
    if not isinstance(config, EncoderDecoderConfig) or not path.is_file():
        return {}
    try:
        return read_limits(read_json(path))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
