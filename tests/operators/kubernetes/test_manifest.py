"""The pods that a spec's ``runner`` section asks for.

Against the published schema, the official client, and Airflow's operator.
"""

from __future__ import annotations

import json
import re
from copy import deepcopy
from itertools import product
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from airflow.providers.cncf.kubernetes.operators.pod import KubernetesPodOperator
from airflow.providers.cncf.kubernetes.pod_generator import PodGenerator
from kubernetes.client import ApiClient

from operators.kubernetes.manifest import check_runner, own_labels, pod_name
from tests.operators.kubernetes.manifests import (
    BIG,
    GI,
    KUBERNETES_VERSION,
    PREFERRED,
    REQUIRED,
    SECTIONS,
    SPOT,
    TEMPLATE,
    ZONE_A,
    base_of,
    build,
    check_restricted,
    fits,
    make_runner,
    tolerates,
    variables,
)


@pytest.mark.parametrize("stage", ["infer", "blend"])
@pytest.mark.parametrize("case", SECTIONS)
def test_manifests_are_good_and_complete_for_kubernetes(case: str, stage: str, tmp_path: Path) -> None:
    (tmp_path / "pod.yaml").write_text(TEMPLATE)
    runner = make_runner(**SECTIONS[case])
    check_runner(runner, str(tmp_path))
    manifest = build(runner, tmp_path, stage)
    kubernetes_validate.validate(manifest, KUBERNETES_VERSION, strict=True)
    check_restricted(manifest)
    client = ApiClient()
    back = client.sanitize_for_serialization(PodGenerator.deserialize_model_dict(manifest))
    if "template" in case:  # the client writes its 12 as a text, which for Kubernetes is the same
        manifest["spec"]["containers"][0]["resources"]["limits"]["cpu"] = "12"
    assert back == json.loads(json.dumps(manifest)), "nothing lost on the way, and it is JSON"


@pytest.mark.parametrize("case", SECTIONS)
def test_airflows_operator_changes_nothing(case: str, tmp_path: Path) -> None:
    """With what ``PodOperator`` passes.

    By default it would set the termination message's policy, and lengthen the name.
    """
    (tmp_path / "pod.yaml").write_text(TEMPLATE)
    runner = make_runner(**SECTIONS[case])
    manifest = build(runner, tmp_path)
    operator = KubernetesPodOperator(
        task_id="infer",
        full_pod_spec=PodGenerator.deserialize_model_dict(manifest),
        namespace="em",
        labels=manifest["metadata"]["labels"],
        termination_message_policy="FallbackToLogsOnError",
        random_name_suffix=False,
    )
    pod = ApiClient().sanitize_for_serialization(operator.build_pod_request_obj(dry_run=True))
    expected = ApiClient().sanitize_for_serialization(PodGenerator.deserialize_model_dict(manifest))
    del pod["metadata"]["labels"]["airflow_version"]
    assert without_new_empties(pod, expected) == {**expected, "metadata": {**expected["metadata"], "namespace": "em"}}


def without_new_empties(value: Any, expected: Any) -> Any:
    """Without what says nothing (``[]``, ``{}``, ``hostNetwork: false``) where nothing was said."""
    if isinstance(value, dict) and isinstance(expected, dict):
        return {k: without_new_empties(v, expected.get(k)) for k, v in value.items() if v or k in expected}
    if isinstance(value, list) and isinstance(expected, list) and len(value) == len(expected):
        return [without_new_empties(v, e) for v, e in zip(value, expected, strict=True)]
    return value


def test_a_manifest_depends_on_nothing_but_its_arguments(tmp_path: Path) -> None:
    (tmp_path / "pod.yaml").write_text(TEMPLATE)
    runner = make_runner(**SECTIONS["all of the runner"], pod_template="pod.yaml")
    before = deepcopy(runner)
    one, other = build(runner, tmp_path), build(runner, tmp_path)
    one["spec"]["tolerations"].append("changed by the caller")
    base_of(one)["securityContext"]["capabilities"]["drop"].clear()
    one["metadata"]["annotations"].clear()
    assert json.dumps(build(runner, tmp_path)) == json.dumps(other)
    assert runner == before


# -- what our container gets


def test_the_container_runs_the_command_with_the_callers_words() -> None:
    words = ["--log", "s3://b/$(HOME)/x", "--", "chunkflow_core.steps.prepare", "env:CHUNKFLOW_SPEC", "$$", "5$"]
    manifest = build(make_runner(image_pull_policy="Always"), arguments=words, environment={"CHUNKFLOW_SPEC": "$(A) $"})
    container = base_of(manifest)
    assert (container["name"], container["image"], container["imagePullPolicy"]) == ("base", "lab/worker:1", "Always")
    assert container["command"] == ["python", "-m", "chunkflow_core.commands.first_process"]
    assert container["terminationMessagePolicy"] == "FallbackToLogsOnError"
    assert [expanded(text) for text in container["args"]] == words
    assert expanded(variables(manifest)["CHUNKFLOW_SPEC"]) == "$(A) $"


def expanded(text: str) -> str:
    """What Kubernetes makes of a text where the variables A and HOME are set."""
    return re.sub(
        r"\$(\$|\((\w+)\))", lambda m: "$" if m[1] == "$" else {"A": "a", "HOME": "/root"}.get(m[2], m[0]), text
    )


def test_variables_of_the_task_go_before_the_sections_and_those_before_the_templates(tmp_path: Path) -> None:
    (tmp_path / "pod.yaml").write_text(TEMPLATE)
    runner = make_runner(
        pod_template="pod.yaml",
        env={"LEVEL": "section", "SHARED": "section", "B": "$(TOKEN)"},
        secret_env={"TOKEN": {"secret": "api", "key": "token"}},
        env_from=["cloud"],
    )
    manifest = build(runner, tmp_path, environment={"SHARED": "task"})
    assert variables(manifest) == {
        "LEVEL": "section",
        "ZONE": "b",
        "HOST": {"fieldRef": {"fieldPath": "status.hostIP"}},
        "SHARED": "task",
        "B": "$(TOKEN)",
        "TOKEN": {"secretKeyRef": {"name": "api", "key": "token"}},
        "CHUNKFLOW_CPUS": "4",
    }
    order = list(variables(manifest))
    assert order.index("TOKEN") < order.index("B"), "or B would hold the reference, not the token"
    assert base_of(manifest)["envFrom"] == [{"configMapRef": {"name": "theirs"}}, {"secretRef": {"name": "cloud"}}]


@pytest.mark.parametrize(
    ("cpu", "request_", "threads"), [(4, "4", "4"), (7.5, "7500m", "7"), (0.25, "250m", "1"), (0.0001, "1m", "1")]
)
def test_cpus_are_reserved_and_told_but_not_limited(cpu: float, request_: str, threads: str) -> None:
    manifest = build(make_runner(infer={"cpu": cpu}))
    resources = base_of(manifest)["resources"]
    assert (resources["requests"]["cpu"], "cpu" in resources["limits"]) == (request_, False)
    assert variables(manifest)["CHUNKFLOW_CPUS"] == threads
    assert variables(build(make_runner(), environment={"CHUNKFLOW_CPUS": "2"}))["CHUNKFLOW_CPUS"] == "2"


def test_memory_disk_and_gpus_are_reserved_and_limited_alike() -> None:
    runner = make_runner(infer={"gpu": 2, "ephemeral_storage": "20Gi"})
    resources = base_of(build(runner, memory=3 * GI + 2**20 - 1))["resources"]
    assert resources["limits"] == {"memory": "3072Mi", "ephemeral-storage": "20Gi", "nvidia.com/gpu": "2"}
    assert resources["requests"] == {"cpu": "4", **resources["limits"]}


def test_only_pods_with_gpus_may_go_to_and_see_gpus() -> None:
    runner = make_runner()
    infer, blend = build(runner), build(runner, stage="blend")
    assert tolerates(infer, "nvidia.com/gpu", "present")
    assert "NVIDIA_VISIBLE_DEVICES" not in variables(infer)
    assert "tolerations" not in blend["spec"]
    assert set(base_of(blend)["resources"]["limits"]) == {"memory"}
    assert variables(blend)["NVIDIA_VISIBLE_DEVICES"] == "void"
    said = make_runner(env={"NVIDIA_VISIBLE_DEVICES": "all"})
    assert variables(build(said, stage="blend"))["NVIDIA_VISIBLE_DEVICES"] == "all"


@pytest.mark.parametrize(
    ("resource", "taint"), [("nvidia.com/mig-1g.5gb", "nvidia.com/gpu"), ("amd.com/gpu", "amd.com/gpu")]
)
def test_other_gpus(resource: str, taint: str) -> None:
    manifest = build(make_runner(infer={"gpu_resource": resource}))
    assert base_of(manifest)["resources"]["limits"][resource] == "1"
    assert tolerates(manifest, taint)


def test_volumes_of_one_source_are_one_but_memory_is_not_shared() -> None:
    manifest = build(make_runner(**SECTIONS["all of the runner"]))
    sources = {v["name"]: {k: s for k, s in v.items() if k != "name"} for v in manifest["spec"]["volumes"]}
    assert len(sources) == len(manifest["spec"]["volumes"]) == 6
    seen = {
        m["mountPath"]: (sources[m["name"]], m.get("subPath"), m.get("readOnly"))
        for m in base_of(manifest)["volumeMounts"]
    }
    claim = {"persistentVolumeClaim": {"claimName": "em"}}
    assert seen == {
        "/data": (claim, "raw", True),
        "/models": (claim, None, None),
        "/host": ({"hostPath": {"path": "/mnt"}}, None, None),
        "/secrets": ({"secret": {"secretName": "cloud"}}, None, None),
        "/config": ({"configMap": {"name": "settings"}}, None, None),
        "/dev/shm": ({"emptyDir": {"medium": "Memory", "sizeLimit": "1Gi"}}, None, None),
        "/tmp": ({"emptyDir": {"medium": "Memory", "sizeLimit": "1Gi"}}, None, None),
    }
    names = {m["mountPath"]: m["name"] for m in base_of(manifest)["volumeMounts"]}
    assert names["/dev/shm"] != names["/tmp"]


# -- the pod around it


def test_settings_of_the_pod() -> None:
    manifest = build(make_runner(**SECTIONS["all of the runner"], infer={"priority_class": "low", "deadline": 60}))
    assert manifest["metadata"] == {
        "name": "small-infer-0-1-2-0a1b2c3d",
        "namespace": "em",
        "labels": {"example.org/team": "em", **own_labels("small", "infer", (0, 1, 2))},
        "annotations": {
            "cluster-autoscaler.kubernetes.io/safe-to-evict": "false",
            "karpenter.sh/do-not-disrupt": "true",
            "example.org/note": "x",
        },
    }
    spec = {
        key: value for key, value in manifest["spec"].items() if key not in ("containers", "volumes", "tolerations")
    }
    assert spec == {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": 60,
        "activeDeadlineSeconds": 60,
        "priorityClassName": "low",
        "serviceAccountName": "worker",
        "imagePullSecrets": [{"name": "registry"}],
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": 1000,
            "fsGroup": 2000,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
    }


def test_a_user_may_let_pods_be_evicted() -> None:
    key = "cluster-autoscaler.kubernetes.io/safe-to-evict"
    assert build(make_runner(annotations={key: "true"}))["metadata"]["annotations"][key] == "true"


@pytest.mark.parametrize(("spot", "tolerated", "bound"), [("never", 0, 0), ("allowed", 1, 0), ("required", 1, 1)])
def test_spot_nodes(spot: str, tolerated: bool, bound: bool) -> None:
    manifest = build(make_runner(infer={"spot": spot}))
    for key, value in SPOT:
        assert tolerates(manifest, key, value) == tolerated
        assert not tolerates(manifest, key, "other")
        assert fits(manifest, {key: value})
    assert fits(manifest, {}) == (not bound)
    assert fits(manifest, {"karpenter.sh/capacity-type": "on-demand"}) == (not bound)


@pytest.mark.parametrize("place", ["section", "template"])
def test_spot_nodes_that_are_what_the_user_wants_too(place: str, tmp_path: Path) -> None:
    """(zone a, or much memory) and spot: a pod may go where both hold, and nowhere else."""
    preferred = [{"weight": 1, "preference": {"matchExpressions": [BIG]}}]
    affinity = {
        "nodeAffinity": {
            REQUIRED: {"nodeSelectorTerms": [{"matchExpressions": [ZONE_A]}, {"matchExpressions": [BIG]}, {}]},
            "preferredDuringSchedulingIgnoredDuringExecution": preferred,
        },
        "podAffinity": {REQUIRED: [{"topologyKey": "zone"}]},
    }
    pod = yaml.safe_load(TEMPLATE)
    pod["spec"]["affinity"] = (
        affinity if place == "template" else {"nodeAffinity": {REQUIRED: {"nodeSelectorTerms": []}}}
    )
    (tmp_path / "pod.yaml").write_text(yaml.safe_dump(pod))
    section = {"affinity": affinity} if place == "section" else {}
    manifest = build(make_runner(pod_template="pod.yaml", infer={**section, "spot": "required"}), tmp_path)
    zone, size = str(ZONE_A["key"]), str(BIG["key"])
    places: list[dict[str, str]] = [{}, {zone: "a"}, {zone: "b"}, {size: "600"}]
    kinds = [{}, *({key: value} for key, value in SPOT), {"eks.amazonaws.com/capacityType": "ON_DEMAND"}]
    for where, kind in product(places, kinds):
        wanted = where in (places[1], places[3]) and tuple(kind.items())[:1] in {(pair,) for pair in SPOT}
        assert fits(manifest, where | kind) == wanted, (where, kind)
    result = manifest["spec"]["affinity"]
    assert result["nodeAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"] == preferred
    assert result["podAffinity"] == affinity["podAffinity"]


# -- templates


@pytest.mark.parametrize("spot", ["never", "required"])
def test_nodes_that_could_not_start_a_pod_are_taken_only_if_there_is_no_other(spot: str) -> None:
    theirs = {"weight": 1, "preference": {"matchExpressions": [ZONE_A]}}
    runner = make_runner(infer={"spot": spot, "affinity": {"nodeAffinity": {PREFERRED: [theirs]}}})
    manifest = build(runner, avoided_nodes=["node-1", "node-2"])
    kubernetes_validate.validate(manifest, KUBERNETES_VERSION, strict=True)
    affinity = manifest["spec"]["affinity"]["nodeAffinity"]
    fields = [{"key": "metadata.name", "operator": "NotIn", "values": [node]} for node in ("node-1", "node-2")]
    assert affinity[PREFERRED] == [theirs, {"weight": 100, "preference": {"matchFields": fields}}]
    assert (REQUIRED in affinity) is (spot == "required")
    assert "affinity" not in build(make_runner())["spec"]


def test_a_template_is_kept_where_the_section_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "pod.yaml").write_text(TEMPLATE)
    manifest = build(make_runner(pod_template="pod.yaml"), tmp_path, stage="blend")
    spec, container = manifest["spec"], base_of(manifest)
    assert "status" not in manifest and "creationTimestamp" not in manifest["metadata"]
    assert [c["name"] for c in spec["containers"]] == ["base", "proxy"]
    assert spec["initContainers"] == [{"name": "warm", "image": "lab/warm:1", "restartPolicy": "Always"}]
    assert spec["volumes"] == [{"name": "scratch", "emptyDir": {"sizeLimit": "1Gi"}}]
    assert (spec["priorityClassName"], spec["nodeSelector"]) == ("theirs", {"disk": "ssd", "pool": "template"})
    assert (container["workingDir"], container["ports"]) == ("/scratch", [{"containerPort": 80}])
    assert [m["mountPath"] for m in container["volumeMounts"]] == ["/scratch", "/data"]
    assert container["resources"]["limits"]["cpu"] == 12, "for clusters that want a limit"


def test_what_the_section_says_goes_before_the_template(tmp_path: Path) -> None:
    (tmp_path / "pod.yaml").write_text(TEMPLATE)
    runner = make_runner(
        pod_template="pod.yaml",
        volumes=[{"mount": "/data", "claim": "em"}],
        labels={"example.org/both": "section"},
        annotations={"example.org/both": "section"},
        image_pull_secrets=["both", "mine"],
        infer={
            "node_selector": {"pool": "gpu"},
            "priority_class": "mine",
            "tolerations": [{"key": "lab", "operator": "Exists"}, {"key": "mine", "operator": "Exists"}],
        },
    )
    manifest = build(runner, tmp_path)
    metadata, spec, container = manifest["metadata"], manifest["spec"], base_of(manifest)
    assert metadata["name"] == "small-infer-0-1-2-0a1b2c3d"
    assert metadata["labels"] == {
        "team": "em",
        "example.org/both": "section",
        **own_labels("small", "infer", (0, 1, 2)),
    }
    assert (metadata["annotations"]["example.org/both"], metadata["annotations"]["example.org/note"]) == (
        "section",
        "1",
    )
    assert (container["image"], spec["terminationGracePeriodSeconds"]) == ("lab/worker:1", 30)
    assert (spec["priorityClassName"], spec["nodeSelector"]) == ("mine", {"disk": "ssd", "pool": "gpu"})
    assert [t["key"] for t in spec["tolerations"]] == ["lab", "mine", "nvidia.com/gpu"]
    assert [s["name"] for s in spec["imagePullSecrets"]] == ["registry", "both", "mine"]
    assert [v["name"] for v in spec["volumes"]] == ["scratch", "chunkflow-0"]
    mounts = {m["mountPath"]: m["name"] for m in container["volumeMounts"]}
    assert mounts == {"/scratch": "scratch", "/data": "chunkflow-0"}
    assert container["resources"]["requests"] == {"cpu": "4", "memory": "16384Mi", "nvidia.com/gpu": "1"}


def test_the_first_container_is_ours_if_none_is_called_so(tmp_path: Path) -> None:
    (tmp_path / "pod.yaml").write_text("spec: {containers: [{name: main, workingDir: /w}, {name: other, image: o}]}")
    runner = make_runner(pod_template="pod.yaml")
    check_runner(runner, str(tmp_path))
    containers = build(runner, tmp_path)["spec"]["containers"]
    assert [(c["name"], c.get("workingDir")) for c in containers] == [("base", "/w"), ("other", None)]


def test_a_template_cannot_weaken_our_container(tmp_path: Path) -> None:
    weak = {
        "privileged": True,
        "allowPrivilegeEscalation": True,
        "procMount": "Unmasked",
        "runAsNonRoot": False,
        "runAsUser": 0,
        "capabilities": {"add": ["SYS_ADMIN"]},
        "seccompProfile": {"type": "Unconfined"},
        "readOnlyRootFilesystem": True,
    }
    container = {"name": "base", "securityContext": weak, "restartPolicyRules": [{"action": "Restart"}]}
    pod = {"spec": {"containers": [container], "securityContext": {"runAsNonRoot": False, "runAsUser": 0}}}
    (tmp_path / "pod.yaml").write_text(yaml.safe_dump(pod))
    manifest = build(make_runner(pod_template="pod.yaml", run_as_user=1000), tmp_path)
    check_restricted(manifest)
    assert base_of(manifest)["securityContext"]["readOnlyRootFilesystem"] is True, "what is stricter is kept"
    assert "runAsUser" not in base_of(manifest)["securityContext"]
    assert manifest["spec"]["securityContext"]["runAsUser"] == 1000
    assert "restartPolicyRules" not in base_of(manifest)


def test_what_a_template_says_of_the_pod_as_a_whole_is_its_authors_choice(tmp_path: Path) -> None:
    choices = {"hostNetwork": True, "automountServiceAccountToken": True, "enableServiceLinks": True, "hostIPC": True}
    sidecar = {"name": "mount", "image": "m", "securityContext": {"privileged": True}}
    pod = {"spec": {**choices, "containers": [{"name": "base"}, sidecar], "securityContext": {"runAsNonRoot": False}}}
    (tmp_path / "pod.yaml").write_text(yaml.safe_dump(pod))
    manifest = build(make_runner(pod_template="pod.yaml"), tmp_path)
    check_restricted(manifest)
    assert {key: manifest["spec"][key] for key in choices} == choices
    assert manifest["spec"]["containers"][1] == sidecar
    assert manifest["spec"]["securityContext"]["runAsNonRoot"] is False


def test_the_documented_template_and_sections_make_good_pods(tmp_path: Path) -> None:
    text = (Path(__file__).parents[3] / "docs" / "volume-spec.md").read_text()
    [template] = re.findall(r"```yaml\n(apiVersion:.*?)```", text, re.DOTALL)
    (tmp_path / "pod.yaml").write_text(template)
    for example in re.findall(r"```yaml\n(runner:.*?)```", text, re.DOTALL):
        runner = make_runner(**yaml.safe_load(example)["runner"], pod_template="pod.yaml")
        check_runner(runner, str(tmp_path))
        for stage in ("infer", "blend"):
            manifest = build(runner, tmp_path, stage)
            kubernetes_validate.validate(manifest, KUBERNETES_VERSION, strict=True)
            assert {"name": "cache", "mountPath": "/cache"} in base_of(manifest)["volumeMounts"]


DNS_LABEL = r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?"
LABEL_VALUE = r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?"
VOLUMES = ["isbi-membrane", "ISBI.Membrane_2", "x" * 200, "-._", "a" * 20 + "." * 60 + "b", "9", "a-", "_a"]


def test_names_are_readable_and_cut_where_they_must() -> None:
    assert re.fullmatch(r"isbi-membrane-infer-0-1-2-[0-9a-f]{8}", pod_name("isbi-membrane", "infer", (0, 1, 2), "s"))
    assert re.fullmatch(r"isbi-membrane-2-prepare-[0-9a-f]{8}", pod_name("ISBI.Membrane_2", "prepare", None, "s"))
    long = pod_name("x" * 200, "infer", (12345, 12345, 12345), "s")
    assert len(long) == 63
    assert re.fullmatch(r"x+-infer-12345-12345-12345-[0-9a-f]{8}", long)


@pytest.mark.parametrize("volume", VOLUMES)
def test_names_and_labels_are_ones_for_kubernetes(volume: str) -> None:
    for block in (None, (0, 0, 0), (99999, 99999, 99999)):
        assert re.fullmatch(DNS_LABEL, pod_name(volume, "infer", block, "salt"))
        labels = own_labels(volume, "infer", block)
        assert all(re.fullmatch(LABEL_VALUE, value) for value in labels.values()), labels


def test_what_differs_has_another_name() -> None:
    cases = product(
        [*VOLUMES, "isbi.membrane", "Isbi-Membrane"],
        ["infer", "blend"],
        [None, (0, 1, 2), (0, 12, 0), (0, 1, 20)],
        "st",
    )
    arguments = list(cases)
    names = [pod_name(*a) for a in arguments]
    assert len(set(names)) == len(arguments)
    assert names == [pod_name(*a) for a in arguments]


def test_a_name_is_the_same_in_every_process() -> None:
    """A task that finds its pod again computes it anew."""
    assert pod_name("small", "infer", (0, 1, 2), "salt") == "small-infer-0-1-2-907ca5a4"


def test_labels_find_a_volume_a_stage_and_a_block() -> None:
    assert own_labels("small", "infer", (0, 1, 2)) == {
        "app.kubernetes.io/managed-by": "chunkflow",
        "chunkflow/volume": "small",
        "chunkflow/stage": "infer",
        "chunkflow/block": "0_1_2",
    }
    assert "chunkflow/block" not in own_labels("small", "prepare", None)
    assert len({own_labels(volume, "infer", None)["chunkflow/volume"] for volume in VOLUMES}) == len(VOLUMES)
    assert own_labels("a" * 63, "x", None)["chunkflow/volume"] == "a" * 63
