"""Operators that run where the spec's runner says: as processes on the worker, or in pods.

Three of them are for DAGs of one's own, see ``docs/your-own-dag.md``. What such a task does depends
on the spec and on receipts alone, not on other tasks of its DAG.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from chunkflow_core.errors import SpecError
from chunkflow_core.lattice.boxes import Vector, vector
from operators.command_operator import CommandOperator, spec_of_file
from operators.commands import Blend, Command, Infer, Prepare

_OPERATORS = {
    "local": ("operators.local", "ProcessOperator"),
    "kubernetes": ("operators.kubernetes.operators", "PodOperator"),
}


def operator_class(runner: str) -> type[CommandOperator]:
    """The operator for a kind of runner, ``local`` or ``kubernetes``.

    Imported here, since Kubernetes' client takes most of a second, which local volumes need not
    pay.
    """
    module, name = _OPERATORS[runner]
    found: type[CommandOperator] = getattr(import_module(module), name)
    return found


def PrepareOperator(*, spec: str | Path, **options: Any) -> CommandOperator:
    """An operator that checks a spec against storage, tries its model, and makes its output.

    It has to end well before the first block is begun.

    Args:
        spec: Path of the volume's spec, for whoever parses the DAG and for the worker.
        options: Those of ``BaseOperator``, such as ``task_id``.

    Raises:
        SpecError: The spec is wrong.
    """
    return _operator(Prepare(), spec, options)


def InferenceAndDonateOperator(*, spec: str | Path, block: Sequence[int], **options: Any) -> CommandOperator:
    """An operator that does the first stage of a block.

    It infers the block's patches, writes what is final, and donates the rest.

    It does nothing if a receipt says that the block is done. The task is at work in one run of its
    DAG at a time.

    Args:
        spec: Path of the volume's spec, for whoever parses the DAG and for the worker.
        block: Index of the block, zyx, counted in blocks.
        options: Those of ``BaseOperator``, such as ``task_id``, ``pool`` and ``retries``.

    Raises:
        SpecError: The spec is wrong, or the block is no index.
    """
    return _operator(Infer(_index(block)), spec, options)


def ReceiveAndBlendOperator(*, spec: str | Path, block: Sequence[int], **options: Any) -> CommandOperator:
    """An operator that does the second stage of a block.

    It adds up what the block's donors gave, and writes the rest of it.

    The inference of the block and of its lower neighbours has to end well before it begins. It does
    nothing if a receipt says that the block has consumed just what they give now. A block without
    lower neighbours has no second stage. The task is at work in one run of its DAG at a time.

    Args:
        spec: Path of the volume's spec, for whoever parses the DAG and for the worker.
        block: Index of the block, zyx, counted in blocks.
        options: Those of ``BaseOperator``, such as ``task_id``, ``pool`` and ``retries``.

    Raises:
        SpecError: The spec is wrong, or the block is no index.
    """
    return _operator(Blend(_index(block)), spec, options)


def _index(block: Sequence[int]) -> Vector:
    ok = isinstance(block, list | tuple) and len(block) == 3 and all(type(i) is int and i >= 0 for i in block)
    if not ok:
        raise SpecError(f"block: {block!r}: expected the block's index, three integers in the order z, y, x")
    return vector(block)


def _operator(command: Command, spec: str | Path, options: dict[str, Any]) -> CommandOperator:
    kind = operator_class(spec_of_file(str(spec)).runner.kind)
    return kind(command=command, spec=str(spec), **options)
