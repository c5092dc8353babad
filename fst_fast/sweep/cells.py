"""Does one cell: load, measure, purify, measure, write down."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from .. import checkpoints
from ..checkpoints.atomic_files import dump_json, replace_file, strict_json
from ..data.device_loader import DeviceLoader
from ..data.image_sets import ImageSet
from ..measure.evaluate import Metrics, evaluate
from ..tuning.progress import EpochRecord
from ..tuning.purify import purify
from ..tuning.result import PurifyResult
from .config import Checkpoint, Config, normalization_of
from .folder import SweepFolder
from .plan import Cell, Material
from .rows import NOT_MEASURED, Row

OnEpoch = Callable[[EpochRecord], None]


class Worker:
    """Does cells, one after another, on one device; the images are uploaded once.

    Args:
        config: of the sweep.
        plan: of the run that made the folder; it says how to compute.
        material: the images.
        folder: where everything is written.
        device: to work on.
    """

    def __init__(
        self,
        config: Config,
        plan: Mapping[str, Any],
        material: Material,
        folder: SweepFolder,
        device: torch.device,
    ) -> None:
        self.config, self.plan, self.folder, self.device = config, plan, folder, device
        self._tuning = self._loader(material.tuning)
        test = material.test
        self._judged = self._loader(material.tuning if test is None else test, shuffle=False)
        self._measured_on = "tuning images" if test is None else "test images"
        # Of each kind of network, as its first run found it: to look for it takes a tenth of a
        # second or more.
        self._heads: dict[str, str] = {}

    def _loader(self, images: ImageSet, **more: Any) -> DeviceLoader:
        return DeviceLoader(
            images.images,
            images.labels,
            self.config.batch_size,
            device=self.device,
            normalize=normalization_of(self.config.normalize),
            **more,
        )

    def _seeded(self, seed: int) -> DeviceLoader:
        """The tuning images under a cell's seed; the bytes are those uploaded once."""
        augment = self.config.augment
        first = self._tuning
        return DeviceLoader(
            first.images,
            first.labels,
            first.batch_size,
            device=self.device,
            normalize=first.normalize,
            resident=first.resident,
            seed=seed,
            augment=None if augment == "none" else augment,
        )

    def do(self, cell: Cell, on_epoch: OnEpoch) -> Row:
        """Do the cell, or go on with it, and write down how it ended; returns its row.

        Raises:
            OSError: the disk refused: a matter of the sweep, not of the cell.
            KeyboardInterrupt: Ctrl-C; the cell goes on from its last epoch another time.
        """
        row: dict[str, Any] = {
            "checkpoint": cell.suspect.path,
            "sha256": self._sha256(cell.suspect),
            "method": cell.method,
            "alpha": cell.alpha,
            "seed": cell.seed,
        }
        try:
            done = self._purify(cell, row, on_epoch)
        except OSError:
            raise
        # Whatever a file, an architecture or a device does wrong is this cell's trouble alone.
        except Exception as error:
            done = Row(**row, error=f"{type(error).__name__}: {error}")
            self.folder.fail(cell, done)
        self.folder.clear(cell)
        return done

    def _sha256(self, suspect: Checkpoint) -> str:
        index = self.config.checkpoints.index(suspect)
        return str(self.plan["checkpoints"][f"{index} {suspect.path}"]["sha256"])

    def _purify(self, cell: Cell, row: dict[str, Any], on_epoch: OnEpoch) -> Row:
        suspect, config, computed = cell.suspect, self.config, self.plan["computed"]
        model = checkpoints.load(
            suspect.file, suspect.arch, suspect.num_classes, **suspect.arch_options
        )
        before = self._before(suspect, model)
        kind = repr((suspect.arch, suspect.num_classes, suspect.arch_options))
        result = purify(
            model,
            self._seeded(cell.seed),
            method=cell.chosen,
            epochs=config.epochs,
            lr=config.lr,
            momentum=config.momentum,
            head=suspect.head or self._heads.get(kind),
            device=self.device,
            precision=computed["precision"],
            channels_last=True,
            threads=computed["threads"],
            seed=cell.seed,
            resume=self.folder.run_of(cell),
            progress=False,
            callbacks=[lambda record, model: on_epoch(record)],
            inplace=True,
        )
        if suspect.head is None:
            self._heads[kind] = str(result.settings["head"])
        if result.stopped is not None and result.stopped.startswith("interrupted"):
            raise KeyboardInterrupt
        after = self._measure(suspect, result.model)
        done = Row(
            **row,
            epochs=len(result.history),
            clean_accuracy_before=before.clean_accuracy,
            clean_accuracy_after=after.clean_accuracy,
            attack_success_before=before.attack_success,
            attack_success_after=after.attack_success,
            robust_accuracy=after.robust_accuracy,
            cosine=result.head_shift.cosine,
            # Of all runs that this cell took.
            seconds=result.history[-1].seconds if result.history else result.seconds,
            stopped=result.stopped,
        )
        self._save(cell, done, result)
        return done

    def _before(self, suspect: Checkpoint, model: nn.Module) -> Metrics:
        with self.folder.before(suspect) as known:
            if known is not None:
                return known
            metrics = self._measure(suspect, model)
            self.folder.keep_before(suspect, metrics)
            return metrics

    def _measure(self, suspect: Checkpoint, model: nn.Module) -> Metrics:
        return evaluate(
            model,
            self._judged,
            suspect.attack,
            suspect.target,
            device=self.device,
            precision=self.plan["computed"]["precision"],
        )

    def _save(self, cell: Cell, row: Row, result: PurifyResult) -> None:
        """The manifest, which ends the cell, and before it the weights."""
        trigger = cell.suspect.attack
        attack: object = NOT_MEASURED
        if trigger is not None:
            attack = {
                "before": row.attack_success_before,
                "after": row.attack_success_after,
                "trigger": trigger.describe(),
                "target": cell.suspect.target,
            }
        facts: dict[str, object] = {
            "row": asdict(row),
            "parent": {"path": row.checkpoint, "sha256": row.sha256},
            "arch": {"name": cell.suspect.arch, **cell.suspect.arch_options},
            "data": self.plan["data"],
            "normalize": self.config.normalize,
            "clean_accuracy": {
                "before": row.clean_accuracy_before,
                "after": row.clean_accuracy_after,
                "measured_on": self._measured_on,
            },
            "attack_success": attack,
        }
        path = self.folder.of(cell) / "purified.safetensors"
        if self.config.weights:
            result.save(path, **facts)
            return
        manifest = {"versions": checkpoints.versions(), **result.manifest(**facts)}
        replace_file(path.with_suffix(".json"), dump_json(strict_json(manifest, "manifest")))
