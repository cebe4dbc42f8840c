"""When a volume's DAG runs by itself, and the Assets by which DAGs know layers."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote
from zoneinfo import ZoneInfo

from airflow.sdk import Asset, AssetAny, AssetOrTimeSchedule, CronTriggerTimetable
from airflow.sdk.exceptions import AirflowException

from chunkflow_core.errors import SpecError
from chunkflow_core.spec import VolumeSpec
from chunkflow_core.spec.schedule import INPUT, ScheduleSpec
from chunkflow_core.storage.addresses import plain

_NOT_OF_A_PATH = str.maketrans({"?": "%3F", "#": "%23"})
"""What Airflow would take for a query or a fragment, and drop."""


def asset_of(path: str) -> Asset:
    """The Asset of a layer: what ``Asset("gs://bucket/em")`` is in anybody's DAG."""
    address = plain(path).translate(_NOT_OF_A_PATH)
    try:
        return Asset(address)
    except ValueError:  # no URL, such as one with a bracket in the bucket's name
        return Asset(quote(address, safe=":/%"))


def schedule_of(
    spec: VolumeSpec, file: Path
) -> str | Asset | AssetAny | CronTriggerTimetable | AssetOrTimeSchedule | None:
    """What starts the runs of a volume, as ``DAG(schedule=…)`` takes it.

    Raises:
        SpecError: The expression or the time zone is none.
    """
    wanted = spec.schedule
    if wanted is None:
        return None
    assets = [asset_of(spec.input.path if name == INPUT else name) for name in dict.fromkeys(wanted.asset)]
    updated = assets[0] if len(assets) == 1 else AssetAny(*assets)
    if wanted.cron is None:
        return updated
    if not assets and wanted.timezone is None:
        return wanted.cron  # which may be more than cron: @once, @continuous
    timetable = _timetable(wanted, wanted.cron, file)
    return AssetOrTimeSchedule(timetable=timetable, assets=updated) if assets else timetable


def wrong_cron(file: Path, cron: str, error: Exception) -> SpecError:
    """What is wrong with a cron expression."""
    return SpecError(
        f'{file}: schedule: "{cron}": expected null, a cron expression such as "0 3 * * 1", or a preset such as '
        f"@weekly ({error})"
    )


def _timetable(wanted: ScheduleSpec, cron: str, file: Path) -> CronTriggerTimetable:
    zone = wanted.timezone or "UTC"
    try:
        ZoneInfo(zone)
    except (ValueError, OSError, KeyError):
        raise SpecError(
            f'{file}: schedule.timezone: "{zone}": expected the name of a time zone, such as Europe/Zurich'
        ) from None
    timetable = CronTriggerTimetable(cron, timezone=zone)
    try:
        timetable.validate()
    except AirflowException as error:
        raise wrong_cron(file, cron, error) from error
    return timetable
