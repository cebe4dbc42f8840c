"""Pods that take more of their node's disk than they may."""

from __future__ import annotations

import asyncio
import os
import shutil
from pathlib import Path

from tests.support.cluster.kubelet import Kubelet
from tests.support.cluster.objects import quantity
from tests.support.cluster.pods import Pod

_LOOK_SECONDS = 0.5


async def watch_disks(kubelet: Kubelet) -> None:
    """Evict, from now on, what has more in its own folders than its limit of ephemeral storage."""
    told: set[Pod] = set()
    while True:
        await asyncio.sleep(_LOOK_SECONDS)
        for pod in list(kubelet.store.pods.values()):
            limit = (pod.box["resources"].get("limits") or {}).get("ephemeral-storage")
            if limit is None or pod in told or pod.started is None or pod.ended is not None:
                continue
            folder = kubelet.folder / pod.folder_name
            if _taken(folder) > quantity(limit):
                told.add(pod)
                kubelet.evict(pod, disruption_target=False, container_statuses=True, log=True)
                kubelet.spawn(_empty(pod, folder))


def _taken(folder: Path) -> int:
    """Bytes that the files below a folder take on the disk; some may go meanwhile."""
    taken = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                taken += (Path(parent) / name).lstat().st_blocks * 512
            except FileNotFoundError:
                continue
    return taken


async def _empty(pod: Pod, folder: Path) -> None:
    """Give the disk back once nothing runs in the pod any more."""
    await pod.done.wait()
    shutil.rmtree(folder, ignore_errors=True)
