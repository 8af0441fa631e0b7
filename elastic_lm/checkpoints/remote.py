"""Checkpoints of finished models in object stores: arrays by orbax where it can, the config last."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from elastic_lm.checkpoints.orbax_folders import first_line
from elastic_lm.checkpoints.read_back import check_same
from elastic_lm.files.checksums import join_checksums, write_checksums
from elastic_lm.files.remote import is_direct, place_of
from elastic_lm.files.remote_folders import begin_folder, finish_folder, staging_folder, top_names
from elastic_lm.files.remote_models import UNFINISHED, is_unfinished
from elastic_lm.files.shortage import is_shortage
from elastic_lm.models.decoder import Params
from elastic_lm.processes import all_or_none


def save_remote(address: str, params: Params, params_folder: str, describe: Callable[[Path], None]) -> None:
    """Writes a checkpoint into a store; what was there goes first.

    Args:
      address: of the folder.
      params: canonical parameters; at gs:// they may be spread over processes, all of which call this.
      params_folder: where they go in the folder.
      describe: writes everything else into a folder on this machine, and checks it.

    Raises:
      OSError: the store fails, or what was written does not read back as it was; the folder stays marked as
        not finished.
    """
    first = jax.process_index() == 0
    with staging_folder(address) as folder:
        # Before anything in the store is touched: this may still fail.
        with all_or_none():
            if first:
                describe(folder)
                begin_folder(address)
        direct = is_direct(address)
        place = place_of(address) if direct else folder
        ocp.save(_epath(place / params_folder), params)
        try:
            check_same(params, lambda like: ocp.load(_epath(place / params_folder), like))
        except Exception as error:
            if is_shortage(error):
                raise
            raise OSError(
                f"{address}: does not read back as it was written ({first_line(error)}) and does not count "
                "as a model; write it again, or choose another path"
            ) from error
        with all_or_none():
            if first and direct:
                join_checksums(folder, place / params_folder, params_folder)
            elif first:
                write_checksums(folder)
            if first:
                finish_folder(folder, address)


def check_remote_target(address: str, overwrite: bool, config_file: str, written: set[str]) -> None:
    """Where a checkpoint may be written, as `native.check_target` says for folders of this machine.

    Args:
      address: of the folder.
      overwrite: whether an earlier checkpoint there may be replaced.
      config_file: that makes a folder a checkpoint.
      written: names in a checkpoint of this package.

    Raises:
      FileExistsError: there is something that may not be replaced; names it.
      OSError: see `files.remote.explained`.
      ValueError: several processes write, and the store takes the files of one.
    """
    if jax.process_count() > 1 and not is_direct(address):
        fix = "write to a folder that all processes see, or to gs://, or start one process"
        raise ValueError(
            f"{address}: takes a model from one process, and there are {jax.process_count()}: {fix}"
        )
    found = top_names(address)
    if not found:
        return
    begun = is_unfinished(address, found)
    if not begun and config_file not in found:
        raise FileExistsError(f"{address}: is no elastic checkpoint and is not replaced; choose another path")
    if not begun and not overwrite:
        raise FileExistsError(
            f"{address}: exists already; choose another path, or overwrite it (--overwrite, overwrite=True)"
        )
    strange = sorted(found - written - ({UNFINISHED} if begun else set()))
    if strange:
        raise FileExistsError(
            f"{address}/{strange[0]}: not written by this package, so {address} is not replaced; move it "
            "away, or choose another path"
        )


def _epath(place: Any) -> Any:
    from etils import epath

    return epath.Path(place)
