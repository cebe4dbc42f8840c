"""What makes commands in pods misbehave works wherever the project's storage does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.cluster.clusters import MOODS
from tests.support.nursery import shared
from tests.support.object_storage import BUCKET, s3_server

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "thing"}
"""As a Secret has them: without a session token."""


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with s3_server(tmp_path_factory.mktemp("s3")) as url:
        yield url


@pytest.mark.parametrize("place", ["disk", "endpoint in the address", "endpoint in the environment"])
def test_each_process_of_a_task_takes_the_next_mood(place: str, s3: str, tmp_path: Path) -> None:
    address, more = {
        "disk": (f"file://{tmp_path}/moods", {}),
        "endpoint in the address": (f"s3://{s3}/{BUCKET}/in-address/moods", CREDENTIALS),
        "endpoint in the environment": (f"s3://{BUCKET}/moods", CREDENTIALS | {"AWS_ENDPOINT_URL_S3": s3}),
    }[place]
    environment = {
        "PATH": os.defpath,
        "HOME": str(tmp_path),
        "PYTHONPATH": str(MOODS.parent),
        "CHUNKFLOW_MOODS": json.dumps({"blend.0_0_1": ["exit 75", "exit 1"], "prepare": ["exit 66"]}),
        "CHUNKFLOW_MOODS_URL": address,
    }

    def code(*words: str) -> int:
        return shared().run([sys.executable, "-m", *words], environment | more, tmp_path).returncode

    blend = ("chunkflow_core.receive_and_blend", "no-such-spec.yaml", "--block", "0", "0")
    assert [code(*blend, "1") for _ in range(2)] == [75, 1]
    assert code("chunkflow_core", "prepare", "no-such-spec.yaml") == 66
    # The moods have passed, and others have none: that there is no such spec counts (78).
    assert code(*blend, "1") == code(*blend, "0") == code("chunkflow_core", "prepare", "no-such-spec.yaml") == 78


def test_a_process_without_a_mood_imports_nothing_for_it() -> None:
    def imported(**variables: str) -> set[str]:
        command = [sys.executable, "-c", "import sys; print(*sys.modules)"]
        environment = {"PATH": os.defpath} | variables
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return set(done.stdout.split())

    with_moods = imported(PYTHONPATH=str(MOODS.parent), CHUNKFLOW_MOODS="{}")
    assert "sitecustomize" in with_moods
    assert with_moods - imported() <= {"sitecustomize"}
