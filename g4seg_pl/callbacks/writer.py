"""Writing refined masks while the prediction runs, so that it can be stopped and continued."""

import json
import sys
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BasePredictionWriter

from g4seg_pl.callbacks.output_folder import (
    OutputFolder,
    RecordFile,
    RunSummary,
    SoftFormat,
    require_file_name,
    summarise,
)
from g4seg_pl.callbacks.run_record import (
    Json,
    describe,
    differing_keys,
    environment,
    read_run_record,
    write_text_atomically,
)
from g4seg_pl.types import BadItemError, ConfigurationError, FailedSample, G4SegError, RefinedMask

POLL_SECONDS = 0.2
SHOWN_FAILURES = 20


class MaskWriter(BasePredictionWriter):
    """Write one palette PNG an image under the image's own name, and a record of the run.

    Finished images are skipped; a folder made with another configuration is refused. Each process
    writes its own images and its own record file; nothing is communicated while the loop runs.

    Args:
        out: output folder, see :mod:`g4seg_pl.callbacks.output_folder`.
        soft: also keep the soft maps: ``npz`` in float16, or the dictionaries of CLIP-ES or IRN,
            which those projects' own scripts read.
        override: redo the images of this run; if the configuration differs, every mask in the
            folder is removed first.
        threads: that write files while the next batch is refined.

    Attributes:
        summary: how the run went, on rank 0 after it ended; None before.
    """

    def __init__(
        self,
        out: str | Path = "outputs/masks",
        soft: Literal["none", "npz", "clip_es", "irn"] = "none",
        override: bool = False,
        threads: int = 2,
    ) -> None:
        super().__init__(write_interval="batch")
        self.out = Path(out)
        self.soft: SoftFormat = soft
        self.override = override
        self.threads = threads
        self.summary: RunSummary | None = None
        self._folder = OutputFolder(self.out, soft)
        self._ids: tuple[str, ...] = ()
        self._skipped: frozenset[str] = frozenset()
        self._pool: ThreadPoolExecutor | None = None
        self._pending: deque[Future[None]] = deque()
        self._records: RecordFile | None = None
        self._batch_began = 0.0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check the folder and take finished images out of the run, before a model is loaded."""
        if stage != "predict":
            return
        datamodule = _require_datamodule(trainer)
        config = _configuration(trainer, self.soft)
        datamodule.exclude(())  # what an earlier run in this process left out counts again
        self._ids = tuple(item.image_id for item in datamodule.items)
        self._skipped = frozenset() if self.override else self._finished_by(config)
        datamodule.exclude(self._skipped)
        _require_work_for_every_rank(len(self._ids) - len(self._skipped), trainer)
        self._folder.make()
        self._marker(trainer.global_rank).unlink(missing_ok=True)
        if trainer.is_global_zero:
            if self.override:
                self._folder.forget(self._to_redo(config))
            self._write_run_record(config, pl_module, datamodule)
        self._records = RecordFile(self.out / _record_name(datamodule, trainer.global_rank))
        self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix="mask-writer")

    def on_predict_batch_start(self, *_: Any, **__: Any) -> None:
        """Start the batch's clock."""
        self._batch_began = time.monotonic()

    def write_on_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        prediction: Sequence[RefinedMask | FailedSample],
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Hand the batch's masks to the writing threads.

        Raises:
            G4SegError: if an earlier file could not be written.
        """
        seconds = (time.monotonic() - self._batch_began) / max(1, len(prediction))
        for item in prediction:
            self._submit(item, round(seconds, 4))
        # Bounded, or a slow disk would let finished masks pile up in memory.
        self._collect(leave=4 * self.threads)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Finish writing; rank 0 waits for the others' files and prints the last line."""
        if stage != "predict" or self._pool is None:
            return
        self._collect(leave=0)
        self._close()
        self._marker(trainer.global_rank).touch()
        if trainer.is_global_zero:
            self._wait_for_ranks(trainer.world_size)
            self.summary = summarise(self._folder, self._ids, self._skipped)
            print_summary(self.summary)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Let files already handed over be written."""
        self._close()

    def _submit(self, item: RefinedMask | FailedSample, seconds: float) -> None:
        """Queue one image, or record its failure."""
        if self._pool is None or self._records is None:
            msg = "MaskWriter was not set up: use it through Trainer.predict"
            raise G4SegError(msg)
        if isinstance(item, FailedSample):
            self._records.add(item.image_id, error=item.error)
            return
        try:
            require_file_name(item.image_id)
        except BadItemError as error:
            self._records.add(item.image_id, error=str(error))
            return
        self._pending.append(self._pool.submit(self._write, self._records, item, seconds))

    def _write(self, records: RecordFile, mask: RefinedMask, seconds: float) -> None:
        """In a thread: write the files of an image, then its record."""
        try:
            self._folder.save(mask)
        except OSError as error:
            msg = f"{mask.image_id} cannot be written to {self.out}: {error}"
            raise G4SegError(msg) from error
        height, width = mask.label.shape
        records.add(
            mask.image_id,
            class_ids=list(mask.class_ids),
            height=height,
            width=width,
            seconds=seconds,
        )

    def _collect(self, leave: int) -> None:
        """Wait until at most ``leave`` images are queued, raising what a thread raised."""
        while self._pending and (len(self._pending) > leave or self._pending[0].done()):
            self._pending.popleft().result()

    def _close(self) -> None:
        """End the threads after their last file."""
        if self._pool is not None:
            self._pool.shutdown(wait=True)
            self._pool = None
        self._pending.clear()

    def _finished_by(self, config: Json) -> frozenset[str]:
        """The images of this run that lie finished in the folder, made by this configuration."""
        finished = self._folder.finished()
        if not finished:
            return frozenset()
        record = read_run_record(self._folder.run_json)
        if not record:
            msg = f"out {self.out} holds masks but no run.json: use another out, or --override"
            raise ConfigurationError(msg)
        if keys := differing_keys(config, record["config"]):
            msg = (
                f"out {self.out} was made with another configuration, which differs in "
                f"{', '.join(keys)}: use another out, or --override"
            )
            raise ConfigurationError(msg)
        return frozenset(finished & set(self._ids))

    def _to_redo(self, config: Json) -> set[str]:
        """What ``override`` removes: this run's images, or all that another configuration made."""
        try:
            record = read_run_record(self._folder.run_json)
        except ConfigurationError:
            record = {}
        same = bool(record) and not differing_keys(config, record["config"])
        return self._folder.finished() & set(self._ids) if same else self._folder.finished()

    def _write_run_record(self, config: Json, module: Any, datamodule: Any) -> None:
        """Write run.json, or add this run to the one of a continued folder."""
        now = environment()
        if self._folder.finished():
            record = read_run_record(self._folder.run_json)
            record.setdefault("continued", []).append(now)
        else:
            record = {
                "config": config,
                "model": describe(getattr(module, "model", None)),
                "seed": getattr(module, "seed", None),
                "split": describe(getattr(datamodule, "split", None)),
                "background_rule": background_rule(module),
                **now,
            }
        write_text_atomically(self._folder.run_json, json_text(record))

    def _marker(self, rank: int) -> Path:
        """The file by which a process says that it has written all it had."""
        return self.out / f".finished.rank{rank}"

    def _wait_for_ranks(self, world_size: int) -> None:
        """Wait for the other processes' markers.

        Files and not a barrier: ranks may finish hours apart, and collectives time out. A process
        that dies takes this one with it, by its launcher.
        """
        markers = [self._marker(rank) for rank in range(world_size)]
        while not all(marker.exists() for marker in markers):
            time.sleep(POLL_SECONDS)
        for marker in markers:
            marker.unlink(missing_ok=True)


def _require_datamodule(trainer: pl.Trainer) -> Any:
    """The run's DataModule, which knows the ids and can leave some out.

    Raises:
        ConfigurationError: if there is none, or it cannot.
    """
    datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
    if not (hasattr(datamodule, "items") and hasattr(datamodule, "exclude")):
        msg = (
            f"MaskWriter needs a DataModule with `items` and `exclude`, got "
            f"{type(datamodule).__name__}: pass one of datamodules to Trainer.predict"
        )
        raise ConfigurationError(msg)
    return datamodule


def _require_work_for_every_rank(left: int, trainer: pl.Trainer) -> None:
    """Refuse fewer images than processes; where none is left, let the loop and the model rest."""
    if left == 0:
        trainer.limit_predict_batches = 0
    elif left < trainer.world_size:
        msg = (
            f"{left} images are left for {trainer.world_size} processes: "
            f"lower --trainer.devices to {left} or less"
        )
        raise ConfigurationError(msg)


def _configuration(trainer: pl.Trainer, soft: SoftFormat) -> Json:
    """All that decides what the masks are: model, data, and callbacks that change predictions.

    Raises:
        ConfigurationError: if such a callback stands behind the writer.
    """
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    changing = [index for index, item in enumerate(callbacks) if getattr(item, "changes_masks", 0)]
    writers = [index for index, item in enumerate(callbacks) if isinstance(item, MaskWriter)]
    if changing and max(changing) > min(writers):
        name = type(callbacks[max(changing)]).__name__
        msg = f"trainer.callbacks: {name} changes masks, so it must stand before MaskWriter"
        raise ConfigurationError(msg)
    return {
        "model": describe(trainer.lightning_module),
        "data": describe(trainer.datamodule),  # type: ignore[attr-defined]
        "soft": soft,
        "changed_by": [describe(callbacks[index]) for index in changing],
    }


def background_rule(module: Any) -> str:
    """The background rule in a few words, as it is printed beside scores."""
    rule = describe(getattr(module, "background", None))
    if not isinstance(rule, dict):
        return "not recorded"
    settings = ", ".join(f"{name}={value}" for name, value in rule["init_args"].items())
    return f"{rule['class_path'].rpartition('.')[2]}({settings})"


def _record_name(datamodule: Any, rank: int) -> str:
    """Name of this process's record file; runs over parts of the data get one each."""
    shard = getattr(datamodule, "shard", None)
    part = f"shard{str(shard).replace('/', 'of')}." if shard else ""
    return f"records.{part}rank{rank}.jsonl"


def json_text(value: Json) -> str:
    """Indented JSON with a final newline."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def print_summary(summary: RunSummary) -> None:
    """Name the failures on standard error, then print the one last line."""
    for image_id, error in list(summary.failed.items())[:SHOWN_FAILURES]:
        print(f"failed {image_id}: {error}", file=sys.stderr)
    if (more := len(summary.failed) - SHOWN_FAILURES) > 0:
        print(f"... and {more} more failures, see records.*.jsonl", file=sys.stderr)
    if summary.total and summary.skipped == summary.total:
        print("nothing left to do: every image is finished")
    print(summary, flush=True)
