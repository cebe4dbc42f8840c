"""A deletion that did not happen is told, lest receipts vouch for what is being replaced."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from cloudfiles.interfaces import reset_connection_pools

from chunkflow_core.__main__ import main
from chunkflow_core.errors import SpecError, StorageError
from chunkflow_core.exchange.folder import Exchange
from chunkflow_core.spec import load_spec
from chunkflow_core.steps.infer import inference_and_donate
from chunkflow_core.steps.workspace import Workspace
from chunkflow_core.storage.clients import open_files
from chunkflow_core.storage.files import put_file, storage_errors
from tests.support.stores import Store
from tests.support.volume import write_volume
from tests.support.web import serving


class _Answering(BaseHTTPRequestHandler):
    """Answers every request as it is told to, whatever the request is."""

    kind = "application/xml"

    def __init__(self, answer: Callable[[str], str], *arguments: object) -> None:
        self.answer = answer
        super().__init__(*arguments)  # type: ignore[arg-type]

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = self.answer(self.command).encode()
        self.send_response(200)
        self.send_header("Content-Type", self.kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST

    def log_message(self, *_: object) -> None:
        pass


class _Batches(_Answering):
    kind = "multipart/mixed; boundary=part"


def batch(*statuses: int) -> str:
    """GCS's answer to a batch of requests: all came through, and each has a status of its own."""
    part = (
        "--part\r\nContent-Type: application/http\r\n\r\nHTTP/1.1 {} So\r\nContent-Type: application/json\r\n\r\n"
        '{{"error": {{"message": "as asked for"}}}}\r\n'
    )
    return "".join(part.format(status) for status in statuses) + "--part--\r\n"


@pytest.fixture
def delete_in_gcs(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Deletes the objects ``0``, ``1``, … in GCS, which gives these answers one after the other.

    Returns how many answers are left.
    """

    def delete(*answers: tuple[int, ...]) -> int:
        left = list(answers)
        with serving(partial(_Batches, lambda _: batch(*left.pop(0)))) as url:
            monkeypatch.setenv("STORAGE_EMULATOR_HOST", url)
            reset_connection_pools()
            with storage_errors("deleting receipts"):
                open_files("gs://bucket/em").delete([str(i) for i in range(len(answers[0]))])
        return len(left)

    return delete


@pytest.mark.parametrize("statuses", [(403, 404, 204), (404, 403, 404), (204, 404, 403)])
def test_gcs_refuses_one_of_several(delete_in_gcs: Callable[..., int], statuses: tuple[int, ...]) -> None:
    with pytest.raises(SpecError, match=rf"DELETE em/{statuses.index(403)}: as asked for"):
        delete_in_gcs(statuses)


def test_gcs_is_asked_again_for_what_may_pass(delete_in_gcs: Callable[..., int]) -> None:
    assert delete_in_gcs((503, 204, 404), (429, 404, 404), (204, 404, 404), (204, 404, 404)) == 1


def test_gcs_stays_away(delete_in_gcs: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHUNKFLOW_STORAGE_PATIENCE", "0")
    with pytest.raises(StorageError, match="DELETE em/0"):
        delete_in_gcs((503, 404))


@pytest.mark.parametrize("kind", ["s3", "gs"])
def test_what_is_gone_already_is_passed_over(use: Callable[[str], Store], tmp_path: Path, kind: str) -> None:
    place = f"{use(kind).root}/{tmp_path.name}"
    for name in ("a", "c"):
        put_file(place, name, b"")
    open_files(place).delete(["a", "b"])
    assert list(open_files(place).list()) == ["c"]


def test_another_attempts_receipt_is_told(tmp_path: Path) -> None:
    """Another attempt of a block ends while a stage retracts the block's receipt."""
    path = write_volume(tmp_path)
    assert main(["prepare", str(path)]) == 0
    spec = load_spec(path)
    receipt = inference_and_donate(Workspace(spec), (0, 0, 0)).receipt
    assert receipt is not None
    other = replace(receipt, run="of another attempt")

    class Raced(Exchange):
        def delete_files(self, names: Iterable[str]) -> None:
            super().delete_files(names)
            self.put_receipt(other)

    with pytest.raises(StorageError, match="1 files have been deleted, and there are 1"):
        Raced(spec).retract("infer", (0, 0, 0))
    Exchange(spec).retract("infer", (0, 0, 0))
    assert Exchange(spec).receipt("infer", (0, 0, 0)) is None
