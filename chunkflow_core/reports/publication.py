"""What a run leaves beside the output: its manifest, completed, and a picture of what it did."""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from chunkflow_core.exchange.folder import Exchange
from chunkflow_core.reports import manifest
from chunkflow_core.reports.chart import draw_chart
from chunkflow_core.reports.figures import Tally, report_of
from chunkflow_core.reports.tasks import task_of
from chunkflow_core.spec import VolumeSpec
from chunkflow_core.storage.addresses import plain
from chunkflow_core.storage.files import put_file


def publish(spec: VolumeSpec, run: str) -> dict[str, Any]:
    """Complete a run's manifest, draw its picture beside it, and return the run's report.

    Returns:
        The fields of ``figures.Report``, and ``changed_blocks`` (indices, zyx), ``bounding_box``
        (of these; start and stop in voxels, zyx; None if nothing has changed), and where
        ``manifest`` and ``picture`` are, with variables of the spec by their names.

    Raises:
        MissingInputError: There is no receipt of the run.
        StorageError: The storage does not answer.
    """
    exchange = Exchange(spec)
    tally, outcome = Tally(run), manifest.Outcome(spec, run)
    for receipt in exchange.all_receipts():  # once: a large volume has millions
        tally.add(task_of(spec, receipt))
        outcome.add(receipt)
    report = report_of(spec, exchange.path, tally)
    layer, stem = plain(spec.output.path), manifest.stem(run)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "report.png"
        draw_chart(report, tally.tasks, file)
        put_file(layer, f"{stem}.png", file.read_bytes())
    completed = outcome.complete()
    told = plain(spec.written("output"))
    return asdict(report) | {
        "changed_blocks": completed["blocks"]["changed"],
        "bounding_box": completed["bounding_box"],
        "manifest": f"{told}/{stem}.json",
        "picture": f"{told}/{stem}.png",
    }
