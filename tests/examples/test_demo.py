"""What the demo says of a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from demo import progress_of

from chunkflow_core.spec import VolumeSpec, load_spec

STEPS = ("prepare", "select_blocks", "verify", "publish", "cleanup", "summary")


@pytest.fixture
def spec(make_spec: Callable[..., Path]) -> VolumeSpec:
    return load_spec(make_spec())


def tasks(spec: VolumeSpec, blocks: str | None, steps: str | None = None, **others: str) -> dict[str, str | None]:
    """States of all tasks of a run: of those of blocks, and of the steps; ``others`` by name."""
    names = ["_".join(map(str, index)) for index in spec.grid.indices()]
    stages = [f"infer.{name}" for name in names] + [f"blend.{name}" for name in names[1:]]
    return {**dict.fromkeys(stages, blocks), **dict.fromkeys(STEPS, steps), **others}


def test_before_blocks_are_selected_none_counts_as_due(spec: VolumeSpec) -> None:
    for select in (None, "queued", "running"):
        progress = progress_of(spec, "running", tasks(spec, None) | {"prepare": "success", "select_blocks": select})
        assert progress.text == "looking for what is due"
        assert (progress.to_infer, progress.to_blend, progress.all_patches) == (0, 0, 0)


def test_where_nothing_is_due_it_says_so(spec: VolumeSpec) -> None:
    for steps in (None, "success"):
        progress = progress_of(spec, "running", tasks(spec, "skipped", steps, select_blocks="success"))
        assert progress.text == "nothing is due, everything is up to date"


def test_what_is_due_is_counted(spec: VolumeSpec) -> None:
    done = {"infer.0_0_0": "success", "infer.1_1_1": "running", "blend.0_0_1": "success", "blend.0_1_1": "failed"}
    progress = progress_of(spec, "running", tasks(spec, "skipped", select_blocks="success", **done))
    assert progress.text == "1/2 blocks inferred, 1/2 blended"
    of = {index: spec.grid.block(index).patches for index in ((0, 0, 0), (1, 1, 1))}
    assert progress.patches == of[0, 0, 0]
    assert progress.all_patches == sum(of.values())
    assert progress.patches != progress.all_patches - progress.patches, "blocks of two sizes"
