"""Whether a run may go on in a folder, what it finds finished there, and its run.json."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BasePredictionWriter

from g4seg_pl.callbacks.folder_lock import folder_lock
from g4seg_pl.callbacks.output_folder import OutputFolder, SoftFormat
from g4seg_pl.callbacks.run_record import (
    Json,
    describe,
    describe_beside,
    differing_keys,
    environment,
    read_run_record,
    write_text_atomically,
)
from g4seg_pl.types import ConfigurationError


def configuration(trainer: pl.Trainer, soft: SoftFormat, *, tars: bool = False) -> Json:
    """All that decides what the masks are: model, data, and callbacks that change predictions.

    Args:
        trainer: with module, DataModule and callbacks attached.
        soft: how soft maps are kept.
        tars: whether masks are kept in tars.

    Raises:
        ConfigurationError: if such a callback stands behind the writer.
    """
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    changing = [index for index, item in enumerate(callbacks) if getattr(item, "changes_masks", 0)]
    writers = [
        index for index, item in enumerate(callbacks) if isinstance(item, BasePredictionWriter)
    ]
    if changing and max(changing) > min(writers):
        name = type(callbacks[max(changing)]).__name__
        msg = f"trainer.callbacks: {name} changes masks, so it must stand before MaskWriter"
        raise ConfigurationError(msg)
    datamodule = trainer.datamodule  # type: ignore[attr-defined]
    return {
        "model": describe(trainer.lightning_module),
        "data": describe(datamodule),
        "classes": classes_of(datamodule),
        "soft": soft,
        **({"tar": True} if tars else {}),
        "changed_by": [describe(callbacks[index]) for index in changing],
    }


def refuse_own_inputs(folder: OutputFolder, datamodule: Any) -> None:
    """Raise if masks are to lie where the run's own images, seeds or truth are.

    Args:
        folder: where the run writes.
        datamodule: asked for ``root``, ``seeds`` and ``truth``, as far as it has them.

    Raises:
        ConfigurationError: names the argument; files of one name would be replaced, or removed.
    """
    ours = [path.resolve() for path in (folder.masks, folder.soft_maps)]
    for name in ("root", "seeds", "truth"):
        place = getattr(datamodule, name, None)
        if isinstance(place, Path) and any(place.resolve().is_relative_to(each) for each in ours):
            msg = f"out {folder.root}: data.{name} is {place}, in the way of the masks; use another"
            raise ConfigurationError(msg)


def finished_by(
    folder: OutputFolder, config: Json, ids: Collection[str], *, shared: bool = False
) -> frozenset[str]:
    """Which of the images asked for lie finished in a folder, made by this very configuration.

    Args:
        folder: where the run writes.
        config: of this run.
        ids: the images asked for.
        shared: other runs may be about to write there; its run.json counts before its first mask.

    Raises:
        ConfigurationError: the folder holds masks that another configuration made.
    """
    finished = folder.finished()
    # Files do not count as finished for a run with tars, nor tars for one without.
    holds_masks = bool(finished) or folder.holds_masks()
    if holds_masks or shared:
        _refuse_others(folder, config, holds_masks=holds_masks)
    return frozenset(finished & set(ids))


def _refuse_others(folder: OutputFolder, config: Json, *, holds_masks: bool) -> None:
    """Raise if run.json tells of another configuration, or is missing where there are masks."""
    record = read_run_record(folder.run_json)
    if not record:
        if not holds_masks:
            return
        raise ConfigurationError(_nobodys(folder))
    if keys := differing_keys(config, record["config"]):
        msg = (
            f"out {folder.root} was made with another configuration, which differs in "
            f"{', '.join(keys)}: use another out, or --override"
        )
        raise ConfigurationError(msg)


def _nobodys(folder: OutputFolder) -> str:
    """Why masks without a run.json are left alone, whatever is asked for."""
    return (
        f"out {folder.root} holds masks but no run.json that tells where they come from: use "
        "another out"
    )


def make_room(folder: OutputFolder, config: Json, ids: Collection[str]) -> None:
    """What ``override`` removes: the images asked for, or all that another configuration made.

    Raises:
        ConfigurationError: there are masks that no run.json tells of.
    """
    if not folder.run_json.exists():
        if folder.holds_masks():
            raise ConfigurationError(_nobodys(folder))
        return
    if _made_by(folder, config):
        folder.forget(folder.finished() & set(ids))
    else:
        folder.clear()


def _made_by(folder: OutputFolder, config: Json) -> bool:
    """Whether run.json tells of this configuration."""
    try:
        record = read_run_record(folder.run_json)
    except ConfigurationError:
        return False
    return bool(record) and not differing_keys(config, record["config"])


def open_run(
    folder: OutputFolder,
    config: Json,
    ids: Collection[str],
    module: Any,
    datamodule: Any,
    *,
    override: bool,
) -> None:
    """Write run.json, or add this run to it; with ``override``, remove masks to be made again.

    Runs over other shards may do the same at this moment: of those that find no run.json one
    writes it, and the others compare theirs with that one.

    Args:
        folder: where the run writes; it exists.
        config: of this run.
        ids: the images asked for.
        module: the LightningModule.
        datamodule: the DataModule; its ``shard``, if it has one, is recorded.
        override: redo the images asked for, and drop what another configuration made.

    Raises:
        ConfigurationError: another run came first, with another configuration.
    """
    shard = shard_of(datamodule)
    shared = shard is not None
    with folder_lock(folder.root):
        if override:
            folder.mend(shard=shard)
            make_room(folder, config, ids)
        holds_masks = folder.holds_masks()
        if holds_masks or (shared and not override):
            _refuse_others(folder, config, holds_masks=holds_masks)
        folder.mend(shard=shard)
        goes_on = holds_masks or (shared and _made_by(folder, config))
        _write_run_record(folder, config, module, datamodule, goes_on=goes_on)


def shard_of(datamodule: Any) -> str | None:
    """The part of the data that the run is over; None if it is over all."""
    shard: str | None = getattr(datamodule, "shard", None)
    return shard


def _write_run_record(
    folder: OutputFolder, config: Json, module: Any, datamodule: Any, *, goes_on: bool
) -> None:
    """Write run.json, or add this run to the one that is there."""
    shard = shard_of(datamodule)
    now = ({} if shard is None else {"shard": shard}) | environment()
    if goes_on:
        record = read_run_record(folder.run_json)
        record.setdefault("continued", []).append(now)
    else:
        record = {
            "config": config,
            "model": describe_beside(getattr(module, "model", None)),
            "seed": getattr(module, "seed", None),
            "split": describe_beside(getattr(datamodule, "split", None)),
            "background_rule": background_rule(module),
            "seed_dialect": _seed_dialect(datamodule),
            "class_names": _class_names(datamodule),
            **now,
        }
    write_text_atomically(folder.run_json, json_text(record))


def _seed_dialect(datamodule: Any) -> str | None:
    """What the coarse masks are read as, where the DataModule can say it."""
    ask = getattr(datamodule, "seed_dialect", None)
    dialect: str | None = ask() if callable(ask) else None
    return dialect


def _class_names(datamodule: Any) -> list[str] | None:
    """The names of classes 1, 2, ..., where the DataModule knows them."""
    classes = getattr(datamodule, "class_list", None)
    return None if classes is None else list(classes.names)


def classes_of(datamodule: Any) -> list[str] | None:
    """What labels 1, 2, ... mean and how prompts name them: a file of them may be edited."""
    classes = getattr(datamodule, "class_list", None)
    if classes is None:
        return None
    pairs = zip(classes.names, classes.prompts, strict=True)
    return [name if name == prompt else f"{name} | {prompt}" for name, prompt in pairs]


def background_rule(module: Any) -> str:
    """The background rule in a few words, as it is printed beside scores."""
    if told := getattr(module, "label_rule", None):
        return str(told)
    background = getattr(module, "background", None)
    rule = describe_beside(background)
    if callable(background) and isinstance(rule, str):  # a function
        return rule.rpartition(".")[2]
    if not isinstance(rule, dict):
        return "not recorded"
    settings = ", ".join(f"{name}={value}" for name, value in rule["init_args"].items())
    return f"{rule['class_path'].rpartition('.')[2]}({settings})"


def json_text(value: Json) -> str:
    """Indented JSON with a final newline."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
