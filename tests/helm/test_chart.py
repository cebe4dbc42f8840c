"""The chart renders to what cluster and Airflow need, and refuses values that can't be right."""

from __future__ import annotations

import base64
import configparser
import ipaddress
import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from cloudfiles.paths import extract

from chunkflow_core.lattice.boxes import vector
from chunkflow_core.spec import VolumeSpec, load_spec
from chunkflow_core.spec.runner import KubernetesRunner
from operators.kubernetes.manifest import own_labels

from .conftest import CHART, ROOT, Helm, Render, find_helm

VALUES = Path(__file__).parent / "values"
ALL = sorted(path.stem for path in VALUES.glob("*.yaml"))
KUBERNETES = "1.34"
SPEC = """
name: notes
input: {path: "gs://bucket/em"}
output: {path: "gs://bucket/membrane"}
exchange: {path: "gs://bucket/exchange"}
roi: [[0, 0, 0], [100, 4096, 4096]]
patch_size: [16, 128, 128]
patch_overlap: [4, 32, 32]
block_size: [24, 192, 192]
model: {engine: identity}
"""

every_values_file = pytest.mark.parametrize("name", ALL)


def values(name: str) -> tuple[str, Path]:
    return "--values", VALUES / f"{name}.yaml"


def of_kind(documents: Iterable[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [document for document in documents if document["kind"] == kind]


def names(documents: Iterable[dict[str, Any]], kind: str) -> set[str]:
    return {document["metadata"]["name"] for document in of_kind(documents, kind)}


@pytest.mark.parametrize(("ci", "outcome"), [("", pytest.skip.Exception), ("true", pytest.fail.Exception)])
def test_without_helm(monkeypatch: pytest.MonkeyPatch, ci: str, outcome: type[BaseException]) -> None:
    monkeypatch.setenv("HELM", "/nowhere/helm")
    monkeypatch.setenv("CI", ci)
    with pytest.raises(outcome, match=r"HELM=/nowhere/helm does not run; install helm"):
        find_helm()


@every_values_file
def test_lint(helm: Helm, name: str) -> None:
    done = helm("lint", "--strict", CHART, *values(name))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[WARNING]" not in done.stdout


@every_values_file
def test_objects_are_what_the_api_takes(render: Render, name: str) -> None:
    documents = render(*values(name))
    for document in documents:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    keys = [(d["kind"], d["metadata"].get("namespace"), d["metadata"]["name"]) for d in documents]
    assert len(set(keys)) == len(keys)


def test_validation_can_fail(render: Render) -> None:
    pod = of_kind(render(), "Pod")[0]
    pod["spec"]["containers"][0]["securityContext"]["allowPrivilegeEscalations"] = False
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


@every_values_file
def test_all_is_in_the_namespace_of_the_pods_but_the_specs(render: Render, name: str) -> None:
    documents = render(*values(name), namespace="pods")
    airflow = yaml.safe_load(values(name)[1].read_text()).get("airflow", {}).get("namespace", "airflow") or "pods"
    for document in documents:
        expected = {"ConfigMap": airflow, "PriorityClass": None}.get(document["kind"], "pods")
        assert document["metadata"].get("namespace") == expected, document["kind"]


def test_what_the_defaults_make(render: Render) -> None:
    kinds = sorted(document["kind"] for document in render())
    assert kinds == ["ConfigMap", "NetworkPolicy", "Pod", "Role", "RoleBinding", "ServiceAccount"]


def test_minimal_makes_only_specs_and_test(render: Render) -> None:
    documents = render(*values("minimal"))
    assert sorted(document["kind"] for document in documents) == ["ConfigMap", "Pod"]
    assert of_kind(documents, "Pod")[0]["spec"]["serviceAccountName"] == "default"


@pytest.mark.parametrize("name", [name for name in ALL if name != "minimal"])
def test_airflow_may_do_what_operators_do_and_no_more(render: Render, name: str) -> None:
    documents = render(*values(name))
    (role,), (binding,) = of_kind(documents, "Role"), of_kind(documents, "RoleBinding")
    granted = {
        (group, resource, verb)
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    assert granted == {
        *(("", "pods", verb) for verb in ("create", "get", "list", "patch", "delete")),
        ("", "pods/log", "get"),
        ("", "events", "list"),
    }
    assert all(set(rule) == {"apiGroups", "resources", "verbs"} for rule in role["rules"])
    assert binding["roleRef"] == {
        "apiGroup": "rbac.authorization.k8s.io",
        "kind": "Role",
        "name": role["metadata"]["name"],
    }
    airflow = {"namespace": "airflow", "serviceAccounts": ["airflow-worker", "airflow-triggerer"]}
    airflow |= yaml.safe_load(values(name)[1].read_text()).get("airflow", {})
    assert binding["subjects"] == [
        {"kind": "ServiceAccount", "name": account, "namespace": airflow["namespace"]}
        for account in airflow["serviceAccounts"]
    ]


@pytest.mark.parametrize("name", ["gke", "onprem"])
def test_specs_arrive_unchanged(render: Render, name: str, tmp_path: Path) -> None:
    given = yaml.safe_load(values(name)[1].read_text())["volumes"]
    (config_map,) = of_kind(render(*values(name)), "ConfigMap")
    assert {file.removesuffix(".yaml") for file in config_map["data"]} == set(given)
    for key, spec in given.items():
        arrived = config_map["data"][f"{key}.yaml"]
        if isinstance(spec, str):
            assert arrived == spec
        assert parsed(arrived, tmp_path) == parsed(spec if isinstance(spec, str) else yaml.safe_dump(spec), tmp_path)


def test_spec_of_a_file_arrives_as_it_is(render: Render, tmp_path: Path) -> None:
    text = "# zyx, in voxels\n" + SPEC + "\n\n# end  \n"
    (tmp_path / "em.yaml").write_text(text)
    (config_map,) = of_kind(render("--set-file", f"volumes.em={tmp_path / 'em.yaml'}"), "ConfigMap")
    assert config_map["data"] == {"em.yaml": text}


def test_a_pod_template_lies_beside_the_specs_and_is_none(render: Render, tmp_path: Path) -> None:
    template = {"apiVersion": "v1", "kind": "Pod", "spec": {"containers": [{"name": "base"}]}}
    (tmp_path / "values.yaml").write_text(yaml.safe_dump({"podTemplates": {"gpu": template}}))
    (config_map,) = of_kind(render("--values", tmp_path / "values.yaml"), "ConfigMap")
    assert {name: yaml.safe_load(text) for name, text in config_map["data"].items()} == {"gpu.yml": template}


def parsed(text: str, folder: Path) -> VolumeSpec:
    path = folder / "spec.yaml"
    path.write_text(text)
    return load_spec(path)


def shown_notes(helm: Helm, *flags: object) -> str:
    done = helm("install", "chunkflow", CHART, "--namespace", "chunkflow", "--dry-run=client", *flags)
    assert done.returncode == 0, done.stderr
    return done.stdout.partition("\nNOTES:\n")[2]


@every_values_file
def test_runner_section_of_the_notes_fits_what_is_installed(
    helm: Helm, render: Render, name: str, tmp_path: Path
) -> None:
    notes = shown_notes(helm, *values(name))
    section = notes[notes.index("runner:\n") :].split("\n\n")[0]
    runner = parsed(SPEC + section, tmp_path).runner
    assert isinstance(runner, KubernetesRunner)
    assert_fits(runner, render(*values(name)), given=yaml.safe_load(values(name)[1].read_text()))
    (container,) = of_kind(render(*values(name)), "Pod")[0]["spec"]["containers"]
    assert runner.image == container["image"]


@pytest.mark.parametrize("name", ["gke", "onprem"])
def test_runner_sections_of_the_values_fit_too(render: Render, name: str, tmp_path: Path) -> None:
    documents = render(*values(name))
    for text in of_kind(documents, "ConfigMap")[0]["data"].values():
        runner = parsed(text, tmp_path).runner
        if isinstance(runner, KubernetesRunner) and runner.service_account:
            assert_fits(runner, documents, given=yaml.safe_load(values(name)[1].read_text()))


def assert_fits(runner: Any, documents: list[dict[str, Any]], given: dict[str, Any]) -> None:
    """Check that everything that the section names is there.

    It is rendered, or said in the values to be there already.
    """
    assert isinstance(runner, KubernetesRunner)
    assert runner.namespace == "chunkflow"
    assert runner.service_account in names(documents, "ServiceAccount") | {"default"}
    credentials, claim = given.get("credentials", {}), given.get("claim", {})
    secrets = names(documents, "Secret") | {credentials.get("existingSecret")}
    claims = names(documents, "PersistentVolumeClaim") | {claim.get("existingClaim")}
    assert {volume.secret for volume in runner.volumes if volume.secret} == secrets - {None}
    assert {volume.claim for volume in runner.volumes if volume.claim} == claims - {None}
    for stage in ("infer", "blend"):
        expected = next((n for n in names(documents, "PriorityClass") if n.endswith(stage)), None)
        assert getattr(runner, stage).priority_class == expected
    # The test pod sees storage as the pods of the spec do.
    (container,) = of_kind(documents, "Pod")[0]["spec"]["containers"]
    assert {volume.mount for volume in runner.volumes} == {m["mountPath"] for m in container["volumeMounts"]} - {"/tmp"}


def test_notes_name_specs_accounts_and_what_is_switched_off(helm: Helm) -> None:
    notes = shown_notes(helm, *values("gke"))
    assert "Airflow reads cortex, membrane" in notes
    assert "--as=system:serviceaccount:airflow:airflow-triggerer" in notes
    assert "nothing limits" not in notes
    notes = shown_notes(helm, *values("minimal"))
    assert "--set-file volumes.NAME=NAME.yaml" in notes
    assert "networkPolicy.create is false" in notes
    assert 'pods run as "default"' in notes


def test_blending_goes_first_and_nothing_is_preempted(render: Render) -> None:
    by_name = {
        d["metadata"]["name"]: d for d in of_kind(render("--set", "priorityClasses.create=true"), "PriorityClass")
    }
    assert by_name["chunkflow-blend"]["value"] > by_name["chunkflow-infer"]["value"]
    assert {d["preemptionPolicy"] for d in by_name.values()} == {"Never"}


def test_network_policy_covers_the_pods_and_lets_nothing_in(render: Render) -> None:
    documents = render(*values("onprem"))
    (policy,), (pod,) = of_kind(documents, "NetworkPolicy"), of_kind(documents, "Pod")
    assert policy["spec"]["podSelector"] == {"matchExpressions": [{"key": "chunkflow/stage", "operator": "Exists"}]}
    for labels in (
        pod["metadata"]["labels"],
        own_labels("em", "infer", vector((0, 0, 0))),
        own_labels("em", "plan", None),
    ):
        assert "chunkflow/stage" in labels
    # The maintenance deletes what has this label and no task.
    assert pod["metadata"]["labels"]["app.kubernetes.io/managed-by"] != "chunkflow"
    assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"]
    assert policy["spec"]["ingress"] == []
    ports = {(port["port"], port["protocol"]) for rule in policy["spec"]["egress"] for port in rule["ports"]}
    assert ports == {(53, "UDP"), (53, "TCP"), (443, "TCP"), (9000, "TCP")}


def allowed(policy: dict[str, Any], address: str, port: int, protocol: str = "TCP") -> bool:
    """Whether a pod may connect to an address, as a network plugin reads the policy."""
    for rule in policy["spec"]["egress"]:
        blocks = [ipaddress.ip_network(peer["ipBlock"]["cidr"]) for peer in rule.get("to", [])]
        here = not blocks or any(ipaddress.ip_address(address) in block for block in blocks)
        if here and (port, protocol) in {(found["port"], found["protocol"]) for found in rule["ports"]}:
            return True
    return False


GKE = "serviceAccount.annotations.iam\\.gke\\.io/gcp-service-account=chunkflow@p.iam.gserviceaccount.com"
IRSA = "serviceAccount.annotations.eks\\.amazonaws\\.com/role-arn=arn:aws:iam::1:role/chunkflow"
ANYWHERE = ("10.0.0.10", "203.0.113.7", "2001:db8::7")
"""Within the cluster, outside, and by IPv6."""
DNS = {(address, 53, protocol) for address in (*ANYWHERE, "169.254.20.10", "fd00::a") for protocol in ("UDP", "TCP")}
STORAGE = {(address, 443, "TCP") for address in ANYWHERE}
GKE_METADATA = {("169.254.169.254", 80, "TCP"), ("169.254.169.252", 988, "TCP")}
EKS_AGENT = {("169.254.170.23", 80, "TCP"), ("fd00:ec2::23", 80, "TCP")}
MINIO = {(address, 9000, "TCP") for address in ANYWHERE}
NEVER = {
    ("10.0.0.10", 80, "TCP"),
    ("10.0.0.10", 8080, "TCP"),  # Airflow's API server
    ("10.0.0.10", 5432, "TCP"),
    ("203.0.113.7", 22, "TCP"),
    ("203.0.113.7", 443, "UDP"),
    ("2001:db8::7", 80, "TCP"),
}


@pytest.mark.parametrize(
    ("flags", "more"),
    [
        ([], set()),
        ([IRSA], set()),
        ([GKE], GKE_METADATA),
        (["networkPolicy.identity=gke"], GKE_METADATA),
        (["networkPolicy.identity=eks"], EKS_AGENT),
        ([GKE, "networkPolicy.identity=none"], set()),
        ([GKE, "networkPolicy.identity=eks"], EKS_AGENT),
        (["networkPolicy.ports={443,9000}"], MINIO),
    ],
)
def test_what_pods_may_connect_to(render: Render, flags: list[str], more: set[tuple[str, int, str]]) -> None:
    """DNS, storage and the server of their identity, by IPv4 and IPv6; nothing else."""
    (policy,) = of_kind(render(*(word for flag in flags for word in ("--set", flag))), "NetworkPolicy")
    may = DNS | STORAGE | more
    for target in may:
        assert allowed(policy, *target), target
    for target in (NEVER | GKE_METADATA | EKS_AGENT | MINIO) - may:
        assert not allowed(policy, *target), target


def test_credentials_arrive_as_files(render: Render) -> None:
    (secret,) = of_kind(render(*values("everything")), "Secret")
    given = yaml.safe_load(values("everything")[1].read_text())["credentials"]["files"]
    assert {file: base64.b64decode(text).decode() for file, text in secret["data"].items()} == given


def test_claim_outlives_the_release_unless_told_otherwise(render: Render) -> None:
    (claim,) = of_kind(render("--set", "claim.create=true"), "PersistentVolumeClaim")
    assert claim["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}
    (claim,) = of_kind(render(*values("everything")), "PersistentVolumeClaim")
    assert "annotations" not in claim["metadata"]


def test_places_of_the_test_are_arguments_of_its_script(render: Render) -> None:
    (container,) = of_kind(render(*values("onprem")), "Pod")[0]["spec"]["containers"]
    _, *places = container["args"]
    assert places == yaml.safe_load(values("onprem")[1].read_text())["test"]["paths"]
    assert extract(places[1]).host == "https://minio.lab.example:9000"


def test_script_of_the_test_tells_whether_storage_can_be_written(render: Render, tmp_path: Path) -> None:
    (container,) = of_kind(render(), "Pod")[0]["spec"]["containers"]
    (tmp_path / "file").touch()

    def run(place: Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *container["command"][1:], *container["args"], f"file://{place}"]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)

    done = run(tmp_path / "exchange")
    assert done.returncode == 0, done.stderr
    assert f"file://{tmp_path}/exchange: written, read, deleted" in done.stdout
    assert list((tmp_path / "exchange").iterdir()) == []
    refused = run(tmp_path / "file")  # no folder
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1), refused.stderr
    assert refused.stderr.startswith(f"error: writing, reading and deleting in file://{tmp_path}/file: ")


def test_version_is_the_packages() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["appVersion"] == setup["metadata"]["version"]


def test_readme_lists_every_value() -> None:
    content = yaml.safe_load((CHART / "values.yaml").read_text())
    readme = (CHART / "README.md").read_text()
    keys = [f"{k}.{sub}" for k, v in content.items() if isinstance(v, dict) for sub in v] + [
        k for k, v in content.items() if not isinstance(v, dict) or not v
    ]
    assert [key for key in keys if f"`{key}`" not in readme] == []


@pytest.mark.parametrize(
    ("flag", "messages"),
    [
        ("volume.em=x", ["additional properties 'volume' not allowed"]),
        ("volumes.em.name=em", ["/volumes/em", "missing properties 'input'"]),
        ("volumes.em=", ["/volumes/em", "minLength"]),
        ("volumes.a\\.b=x", ["invalid propertyName 'a.b'"]),
        ("airflow.serviceAccounts=null", ["/airflow", "missing property 'serviceAccounts'"]),
        ("airflow.serviceAccounts={}", ["/airflow/serviceAccounts/0", "'' does not match pattern"]),
        ("airflow.namespace=Air_Flow", ["/airflow/namespace", "'Air_Flow' does not match pattern"]),
        ("rbac.create=maybe", ["/rbac/create", "want boolean"]),
        ("rbac.rules=x", ["/rbac", "additional properties 'rules' not allowed"]),
        ("image.tag=a b", ["/image/tag", "'a b' does not match pattern"]),
        ("image.pullPolicy=always", ["/image/pullPolicy", "'Always', 'IfNotPresent', 'Never'"]),
        ("networkPolicy.ports={70000}", ["/networkPolicy/ports/0", "maximum"]),
        ("networkPolicy.ports={https}", ["/networkPolicy/ports/0", "want integer"]),
        ("networkPolicy.identity=aws", ["/networkPolicy/identity", "'auto', 'gke', 'eks', 'none'"]),
        ("claim.mount=data", ["/claim/mount"]),
        ("claim.size=big", ["/claim/size", "'big' does not match pattern"]),
        ("quota.pods=many", ["/quota/pods", "'many' does not match pattern"]),
        ("limits[0].type=Node", ["/limits/0/type", "'Container'"]),
        ("priorityClasses.infer=2000000000", ["/priorityClasses/infer", "maximum"]),
        ("test.paths={bucket/exchange}", ["/test/paths/0", "'bucket/exchange' does not match pattern"]),
        ("claim.create=true,claim.existingClaim=x", ["claim: give existingClaim or create: true, not both"]),
        ("credentials.files.a=b,credentials.existingSecret=x", ["credentials: give existingSecret or files, not both"]),
    ],
)
def test_wrong_values_are_refused(helm: Helm, flag: str, messages: list[str]) -> None:
    done = helm("template", "chunkflow", CHART, "--set", flag)
    assert done.returncode != 0, done.stdout
    assert all(message in done.stderr for message in messages), done.stderr


def test_names_stay_within_what_kubernetes_takes(render: Render) -> None:
    documents = render("--set", "priorityClasses.create=true,claim.create=true", release="r" * 53)
    assert max(len(document["metadata"]["name"]) for document in documents) <= 63
    for document in documents:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)


def test_two_releases_share_no_object_of_the_cluster(render: Render) -> None:
    made = [names(render(*values("gke"), release=release), "PriorityClass") for release in ("one", "two")]
    assert len(made[0]) == 2
    assert not made[0] & made[1]


@pytest.mark.parametrize("kind", ["ResourceQuota", "LimitRange"])
def test_examples_in_the_comments_of_the_values(render: Render, kind: str) -> None:
    key = {"ResourceQuota": "quota", "LimitRange": "limits"}[kind]
    comment = next(c for c in (CHART / "values.yaml").read_text().splitlines() if c.startswith(f"# {kind} "))
    example = yaml.safe_load(comment.partition("such as ")[2].removesuffix("; empty: none."))
    (document,) = of_kind(render("--set-json", f"{key}={json.dumps(example)}"), kind)
    kubernetes_validate.validate(document, KUBERNETES, strict=True)
