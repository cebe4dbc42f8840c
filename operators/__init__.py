"""Airflow's side: operators, the DAGs made of them, and the one-machine Airflow service.

For DAGs of one's own (``docs/your-own-dag.md``)::

    from operators import InferenceAndDonateOperator, PrepareOperator, ReceiveAndBlendOperator
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from operators.tasks import InferenceAndDonateOperator, PrepareOperator, ReceiveAndBlendOperator

__all__ = ["InferenceAndDonateOperator", "PrepareOperator", "ReceiveAndBlendOperator"]


def __getattr__(name: str) -> Any:
    """Import an operator on demand, since much of this package has to start without Airflow."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from operators import tasks

    return getattr(tasks, name)
