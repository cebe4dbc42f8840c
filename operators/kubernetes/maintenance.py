"""The DAG that keeps clusters clean."""

from __future__ import annotations

from collections.abc import Collection
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from airflow.sdk import DAG, BaseOperator, Context, Param
from airflow.sdk.exceptions import AirflowException

from operators.kubernetes.orphans import AIRFLOW_LABEL, MANAGED, States, airflow_label, orphans, pod_info

if TYPE_CHECKING:
    from operators.kubernetes.api import PodApi

_START = datetime(2024, 1, 1, tzinfo=UTC)
_YOUNG = 300
"""Seconds that a pod is left alone for: its task may not have said yet that it runs."""


class DeleteOrphansOperator(BaseOperator):
    """Deletes the pods of volumes whose tasks are not going on."""

    template_fields = ("places",)

    def __init__(self, *, places: list[tuple[str, str | None]], **options: Any) -> None:
        """Make the operator.

        Args:
            places: Airflow connection and namespace of each place to clean; without a namespace,
                the connection's.
            options: Of ``BaseOperator``.
        """
        super().__init__(**options)
        self.places = places

    def execute(self, context: Context) -> None:
        """Delete them, and say which."""
        from airflow.providers.cncf.kubernetes.hooks.kubernetes import KubernetesHook

        from operators.kubernetes.api import PodApi, RefusedError, TryLaterError

        runtime: Any = context["ti"]

        def states(dag: str, run: str, tasks: Collection[str]) -> dict[str, str]:
            found = runtime.get_task_states(dag_id=dag, run_ids=[run], task_ids=sorted(tasks))
            return cast(dict[str, str], found.get(run, {}))

        failed = []
        for connection, namespace in self.places:
            try:
                hook = KubernetesHook(conn_id=connection)
                place = namespace or hook.get_namespace() or "default"
                api = PodApi(partial(getattr, hook, "core_v1_client"), lambda: None)
                self._clean(api, place, states, float(context["params"]["youngest"]))
            except (TryLaterError, RefusedError) as error:
                failed.append(f"{connection}, namespace {namespace}: {error}")
        if failed:
            raise AirflowException("\n".join(failed))

    def _clean(self, api: PodApi, place: str, states: States, youngest: float) -> None:
        """Delete the orphans of a namespace."""
        selector = f"{MANAGED},{AIRFLOW_LABEL}={airflow_label()}"
        found = api.find(place, selector)
        pods = [pod_info(pod, api.now) for pod in found]
        lost = orphans((pod for pod in pods if pod.seconds >= youngest), states)
        for pod in lost:
            how = ", whose node is lost" if pod.lost else ""
            self.log.info("deleting pod %s (%s%s) of %s", pod.name, pod.phase, how, " ".join(pod.task))
            api.delete(pod.name, pod.namespace, grace=0 if pod.lost else None)
        self.log.info("namespace %s: %d pods, %d of them orphans", place, len(pods), len(lost))


def maintenance_dag(places: Collection[tuple[str, str | None]]) -> DAG:
    """The DAG for some places."""
    with DAG(
        dag_id="chunkflow_maintenance",
        schedule="@hourly",
        start_date=_START,
        catchup=False,
        max_active_runs=1,
        is_paused_upon_creation=False,
        tags=["chunkflow"],
        params={
            "youngest": Param(_YOUNG, type="number", minimum=0, description="seconds for which a new pod is left alone")
        },
        doc_md="Deletes pods of volumes that no task waits for any more.",
        default_args={"owner": "chunkflow", "retries": 2, "retry_delay": timedelta(minutes=1)},
    ) as dag:
        DeleteOrphansOperator(task_id="delete_orphans", places=sorted(places, key=str))
    return dag
