"""When runs start by themselves, and who is told of their ends.

These are the ``schedule`` and ``notify`` sections of the spec. Only the shape is checked here; cron
expressions, time zones and notifiers are Airflow's to know. Imported whenever Airflow parses its
DAG files, so it stays light.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

INPUT = "input"
"""Word that stands for the Asset of the spec's input layer."""

Ending = Literal["success", "failure"]


def _addresses(value: Any) -> Any:
    values = [value] if isinstance(value, str) else value
    ok = isinstance(values, list | tuple) and values and all(isinstance(v, str) for v in values)
    if not ok or not all(v == INPUT or "://" in v.strip("/:") for v in values):
        raise ValueError('expected input, an address such as "gs://bucket/em", or a list of those')
    return tuple(values)


def _endings(value: Any) -> Any:
    if not isinstance(value, list | tuple) or not value or not all(end in ("success", "failure") for end in value):
        raise ValueError("expected [success], [failure] or [success, failure]")
    return tuple(value)


def _dotted_path(value: Any) -> Any:
    if not isinstance(value, str) or not all(part.isidentifier() for part in value.split(".")) or "." not in value:
        raise ValueError('expected module and class, such as "airflow.providers.smtp.notifications.smtp.SmtpNotifier"')
    return value


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ScheduleSpec(_Section):
    """What starts runs: a clock, updates of layers, or both."""

    cron: str | None = Field(None, min_length=1)
    """Cron expression or preset, such as ``@weekly``."""
    timezone: str | None = Field(None, min_length=1)
    """Time zone that the cron expression is meant in, such as ``Europe/Zurich``. Default: UTC."""
    asset: Annotated[tuple[str, ...], BeforeValidator(_addresses, json_schema_input_type=str | tuple[str, ...])] = ()
    """``input``, an address, or a list of those: an update of any of these layers starts a run."""

    @model_validator(mode="after")
    def _complete(self) -> ScheduleSpec:
        if self.cron is None and not self.asset:
            raise ValueError("cron, asset: expected at least one of them")
        if self.timezone is not None and self.cron is None:
            raise ValueError("timezone: only with cron")
        return self


class NotifySpec(_Section):
    """Who is told how a run has ended."""

    notifier: Annotated[str, BeforeValidator(_dotted_path)]
    """Dotted path of a class that inherits from ``airflow.sdk.BaseNotifier``; it is told once at
    each end of a run.
    """
    arguments: dict[str, Any] = {}
    """Arguments of the notifier.

    Its templates can use ``report``: ``state``, ``text``, ``volume``, ``run``, ``output``,
    ``figures``, ``manifest``, ``picture``.
    """
    on: Annotated[tuple[Ending, ...], BeforeValidator(_endings)] = ("success", "failure")
    """The ends that are told."""

    @model_validator(mode="before")
    @classmethod
    def _yaml_reads_on_as_true(cls, value: Any) -> Any:
        if isinstance(value, dict):
            return {"on" if key is True else key: part for key, part in value.items()}
        return value


def _section(value: Any) -> Any:
    if isinstance(value, str):
        return {"cron": value}
    if value is not None and not isinstance(value, dict | ScheduleSpec):
        raise ValueError(
            'expected null, a cron expression such as "0 3 * * 1", a preset such as @weekly, or a section with cron, '
            "timezone and asset"
        )
    return value


OptionalSchedule = Annotated[
    ScheduleSpec | None, BeforeValidator(_section, json_schema_input_type=str | ScheduleSpec | None)
]
