"""Writing refined masks while the prediction runs, so that it can be stopped and continued."""

import math
import sys
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BasePredictionWriter

from g4seg_pl.callbacks.folder_lock import ProcessLock
from g4seg_pl.callbacks.output_folder import (
    MaskSink,
    OutputFolder,
    RunSummary,
    SoftFormat,
    require_file_name,
    summarise,
)
from g4seg_pl.callbacks.processes import ProcessFiles
from g4seg_pl.callbacks.records import RecordFile, new_record
from g4seg_pl.callbacks.resume import (
    background_rule,
    configuration,
    finished_by,
    json_text,
    open_run,
    refuse_own_inputs,
    shard_of,
)
from g4seg_pl.callbacks.tar_folder import TarFolder
from g4seg_pl.callbacks.tar_writer import TarSize
from g4seg_pl.termination import EndRequest, status_of_end, wait_for_started
from g4seg_pl.types import (
    BadItemError,
    ConfigurationError,
    FailedSample,
    G4SegError,
    RefinedMask,
    check_counts,
)

__all__ = ["MaskWriter", "background_rule", "json_text", "print_summary"]

SHOWN_FAILURES = 20


class MaskWriter(BasePredictionWriter):
    """Write one palette PNG an image under the image's own name, and a record of the run.

    The PNGs are files, or lie in tars that WebDataset reads. Finished images are skipped; a folder
    made with another configuration is refused. Each process writes its own images and its own
    record file; nothing is communicated while the loop runs.

    Args:
        out: output folder, see :mod:`g4seg_pl.callbacks.output_folder`.
        soft: also keep the soft maps: ``npz`` in float16, or the dictionaries of CLIP-ES or IRN,
            which those projects' own scripts read.
        override: redo the images of this run; if the configuration differs, every mask in the
            folder is removed first.
        threads: that write files while the next batch is refined.
        rank_timeout: seconds that rank 0, when it is done, waits for other processes without
            seeing any of them finish an image; then those left are given up, and what they did
            not finish counts as not tried.
        tar: put masks, soft maps and records into tars instead of a file each, see
            :mod:`g4seg_pl.callbacks.tar_folder`: most images in a tar, such as 1000, or most
            bytes, such as 256MB. None writes files.

    Raises:
        ConfigurationError: no thread is to write.

    Attributes:
        summary: how the run went, on rank 0 after it ended; None before.
        skipped: the ids of images found finished when the run began, which it leaves out.
    """

    def __init__(
        self,
        out: str | Path = "outputs/masks",
        soft: Literal["none", "npz", "clip_es", "irn"] = "none",
        override: bool = False,
        threads: int = 2,
        rank_timeout: float = 1800.0,
        tar: int | str | None = None,
    ) -> None:
        super().__init__(write_interval="batch")
        check_counts(1, threads=threads)
        self.out = Path(out).expanduser()
        self.soft: SoftFormat = soft
        self.override = override
        self.threads = threads
        self.rank_timeout = rank_timeout
        self.tar = tar
        self.summary: RunSummary | None = None
        self.skipped: frozenset[str] = frozenset()
        self._folder = _folder(self.out, soft, tar)
        self._sink: MaskSink | None = None
        self._processes = ProcessFiles(self.out)
        self._lock: ProcessLock | None = None
        self._ids: tuple[str, ...] = ()
        self._pool: ThreadPoolExecutor | None = None
        self._pending: deque[Future[None]] = deque()
        self._records: RecordFile | None = None
        self._batch_began = 0.0
        self._end = EndRequest()
        self._limit: int | float | None = None  # the trainer's own, while another is in force

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check the folder and take finished images out of the run, before a model is loaded."""
        if stage != "predict":
            return
        self._end = EndRequest()
        if self.out.exists() and not self.out.is_dir():
            message = f"out: {self.out} is a file; give a folder for the masks"
            raise ConfigurationError(message)
        datamodule = _require_datamodule(trainer)
        refuse_own_inputs(self._folder, datamodule)
        config = configuration(trainer, self.soft, tars=self.tar is not None)
        shard, keep = shard_of(datamodule), not self.override
        self._processes = ProcessFiles(self.out, shard)
        self._hold(trainer)  # before looking at what is finished
        datamodule.exclude(())  # what an earlier run in this process left out counts again
        self._ids = tuple(item.image_id for item in datamodule.items)
        find = partial(finished_by, shared=shard is not None)
        self.skipped = find(self._folder, config, self._ids) if keep else frozenset()
        datamodule.exclude(self.skipped)
        self._limit = trainer.limit_predict_batches
        _suit_to_what_is_left(len(self._ids) - len(self.skipped), trainer)
        self._folder.make()
        self._processes.begin(trainer.global_rank)
        if trainer.is_global_zero:
            run = (config, self._ids, pl_module, datamodule)
            open_run(self._folder, *run, override=self.override)
        self._records = RecordFile(self._processes.record(trainer.global_rank))
        self._sink = self._folder.sink(self._processes.name(trainer.global_rank))
        self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix="mask-writer")

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Of several processes, let none wait for others in a batch when it is asked to end."""
        if trainer.world_size > 1:
            self._end.replace_handler(trainer)

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
            SystemExit: if the process was asked to end (SIGTERM); the same command goes on.
        """
        seconds = (time.monotonic() - self._batch_began) / max(1, len(prediction))
        for item in prediction:
            self._submit(item, round(seconds, 4))
        # Lightning notes the signal of a cluster that wants its machine back, and runs on.
        stop = trainer.received_sigterm or self._end.received
        # Bounded, or a slow disk would let finished masks pile up in memory.
        self._collect(leave=0 if stop else 4 * self.threads)
        if stop:
            raise SystemExit(status_of_end(trainer))

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Finish writing; rank 0 waits for the others' files and prints the last line."""
        if stage != "predict" or self._pool is None:
            return
        self._restore_limit(trainer)
        self._collect(leave=0)
        self._close()
        self._processes.finish(trainer.global_rank)
        if trainer.is_global_zero:
            lost = self._wait_for_others(trainer)
            summary = summarise(self._folder, self._ids, self.skipped)
            self.summary = replace(summary, lost_processes=lost)
            print_summary(self.summary)
        self._release()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Let files already handed over be written; rank 0 need not wait for this process."""
        self._restore_limit(trainer)
        if self._pool is None:
            self._release()
            return
        try:
            self._close()
        except G4SegError as error:  # beside the one that ends the run
            print(f"error: {error}", file=sys.stderr)
        # On a full disk that fails too, and would hide what ends the run.
        with suppress(OSError):
            self._processes.finish(trainer.global_rank, failed=True)
        self._release()
        if self._end.received:
            wait_for_started(trainer, self.rank_timeout)

    def _hold(self, trainer: pl.Trainer) -> None:
        """Keep others off this process's part until the run ends.

        Raises:
            ConfigurationError: on every process, another has the part of one of them.
        """
        self._release()
        self.out.mkdir(parents=True, exist_ok=True)
        self._lock = self._processes.lock(trainer.global_rank)
        # Told to all, or those that could go on would wait for the others.
        if not trainer.strategy.reduce_boolean_decision(self._lock.take()):
            message = (
                f"out: another run over the same part of the data writes into {self.out}, or a "
                f"process that it left behind ({self._lock.path.name} or another rank's is held): "
                "end it or wait for it, or use another out"
            )
            raise ConfigurationError(message)

    def _release(self) -> None:
        """Let others make this process's part."""
        if self._lock is not None:
            self._lock.release()

    def _wait_for_others(self, trainer: pl.Trainer) -> tuple[int, ...]:
        """On rank 0, done itself: the ranks that did not finish.

        Raises:
            SystemExit: the process was asked to end (SIGTERM) while others worked.
        """
        with self._end.listen(trainer):
            lost = self._processes.wait(
                trainer.world_size, self.rank_timeout, stop=lambda: self._end.received
            )
            if self._end.received:
                wait_for_started(trainer, self.rank_timeout)
                raise SystemExit(status_of_end(trainer))
        return lost

    def _restore_limit(self, trainer: pl.Trainer) -> None:
        """Let the same trainer predict again, where this run had nothing to do."""
        if self._limit is not None:
            trainer.limit_predict_batches, self._limit = self._limit, None

    def _submit(self, item: RefinedMask | FailedSample, seconds: float) -> None:
        """Queue one image, or record its failure."""
        if self._pool is None or self._records is None or self._sink is None:
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
        write = partial(self._write, self._sink, self._records)
        self._pending.append(self._pool.submit(write, item, seconds))

    def _write(
        self, sink: MaskSink, records: RecordFile, mask: RefinedMask, seconds: float
    ) -> None:
        """In a thread: write the files of an image, then its record."""
        height, width = mask.label.shape
        record = new_record(
            mask.image_id,
            class_ids=list(mask.class_ids),
            height=height,
            width=width,
            seconds=seconds,
            **_found_out(mask),
        )
        try:
            sink.save(mask, record)
        except OSError as error:
            msg = f"{mask.image_id} cannot be written to {self.out}: {error}"
            raise G4SegError(msg) from error
        records.write(record)

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
        sink, self._sink = self._sink, None
        try:
            if sink is not None:
                sink.close()
        except OSError as error:
            msg = f"the last masks cannot be written to {self.out}: {error}"
            raise G4SegError(msg) from error


def _folder(out: Path, soft: SoftFormat, tar: int | str | None) -> OutputFolder:
    """The output folder, with files or with tars in it."""
    return OutputFolder(out, soft) if tar is None else TarFolder(out, soft, TarSize.parse(tar))


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


def _suit_to_what_is_left(left: int, trainer: pl.Trainer) -> None:
    """Where no image is left, let the loop and the model rest; with few, some processes rest.

    Raises:
        ConfigurationError: fewer images than processes, and a DataModule that cannot have that.
    """
    processes = trainer.world_size
    if left == 0:
        trainer.limit_predict_batches = 0
        # An earlier run of this trainer left the number of its batches, and the loop would go on.
        trainer.predict_loop.max_batches = []
    elif left < processes:
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        if not datamodule.allow_zero_length_dataloader_with_multiple_devices:
            msg = (
                f"{left} images are left for {processes} processes: "
                f"lower --trainer.devices to {left} or less"
            )
            raise ConfigurationError(msg)
        if trainer.is_global_zero:
            idle = processes - left
            print(f"images left: {left}; of {processes} processes {idle} will have nothing to do")


def _found_out(mask: RefinedMask) -> dict[str, Any]:
    """What steps found out about each mask as a whole; null for what no number says."""
    named = {"score": mask.score, "score_error": mask.score_error}
    return {
        name: [round(number, 8) if math.isfinite(number) else None for number in numbers.tolist()]
        for name, numbers in named.items()
        if numbers is not None
    }


def print_summary(summary: RunSummary) -> None:
    """Name the failures on standard error, then print the one last line."""
    for image_id, error in list(summary.failed.items())[:SHOWN_FAILURES]:
        print(f"failed {image_id}: {error}", file=sys.stderr)
    if (more := len(summary.failed) - SHOWN_FAILURES) > 0:
        print(f"... and {more} more failures, see records.*.jsonl", file=sys.stderr)
    if summary.lost_processes:
        print(
            f"processes that died or hung, by rank: {', '.join(map(str, summary.lost_processes))}; "
            "look into their logs, then run again to do what is left",
            file=sys.stderr,
        )
    if summary.total and summary.skipped == summary.total:
        print("nothing left to do: every image is finished")
    print(summary, flush=True)
