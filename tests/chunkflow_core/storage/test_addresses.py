"""Addresses of storage in a spec, and the endpoints that they mean."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import yaml

from chunkflow_core.spec import parse_spec
from chunkflow_core.storage.files import put_file
from tests.support.object_storage import BUCKET, Proxy, proxy_before
from tests.support.stores import Store, spec_for

Chunkflow = Callable[..., CompletedProcess[str]]


def test_endpoints_with_buckets_of_the_same_name(use: Callable[[str], Store], tmp_path: Path) -> None:
    store = use("s3")
    with proxy_before(f"http://{store.proxy.upstream}") as other:
        for proxy, content in ((store.proxy, b"one"), (other, b"other")):
            put_file(f"s3://{proxy.url}/{BUCKET}/{tmp_path.name}", "file", content)
            assert proxy.requests[-1] == f"PUT /{BUCKET}/{tmp_path.name}/file"


def test_an_endpoint_by_alias_and_by_variable(
    use: Callable[[str], Store], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, python: Chunkflow
) -> None:
    store = use("s3")
    (tmp_path / "aliases.json").write_text(json.dumps({"minio": {"host": f"s3://{store.proxy.url}/"}}))
    monkeypatch.setenv("CLOUD_FILES_DIR", str(tmp_path))
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", store.proxy.url)
    spec = spec_for(store, tmp_path, input={"path": f"minio://{BUCKET}/input"})
    place = f"s3://{BUCKET}/{tmp_path.name}"
    changes = [f"output.path={place}/output", f"exchange.path={place}/exchange"]
    outcome = python("-m", "chunkflow_core", "prepare", spec, "--set", changes[0], "--set", changes[1])
    assert outcome.returncode == 0, outcome.stderr
    assert [r for r in store.proxy.requests if r.startswith(f"PUT /{BUCKET}/{tmp_path.name}/output/info")]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("input.path", "s3://https://minio.example.org", "expected endpoint, bucket and path"),
        ("input.path", "s3://https://minio.example.org/", "expected endpoint, bucket and path"),
        ("input.path", "gs:///em", "expected a storage path"),
        ("input.path", "minio://bucket/em", "expected a storage path"),
        ("output.path", "https://example.org/em", "not http"),
        ("model.path", "https://example.org/net.py", "expected a path, or an address"),
        ("model.weights", "file://net.pt", "expected a path, or an address"),
    ],
)
def test_addresses_that_are_refused(
    tmp_path: Path, chunkflow: Chunkflow, key: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLOUD_FILES_DIR", str(tmp_path))
    store = Store(Proxy(""), f"file://{tmp_path}")
    model = {"engine": "pytorch", "path": "net.py"}
    outcome = chunkflow("plan", spec_for(store, tmp_path, model=model), "--set", f"{key}={value}")
    assert outcome.returncode == 78
    assert message in outcome.stderr and value in outcome.stderr


def test_addresses_that_are_taken(tmp_path: Path) -> None:
    content = yaml.safe_load(spec_for(Store(Proxy(""), "gs://bucket"), tmp_path).read_text())
    for address in ("s3://https://minio.example.org:9000/bucket/em", "precomputed://s3://http://127.0.0.1:1/b/em"):
        assert parse_spec(content | {"input": {"path": address}}).input.path == address
