"""The API of the double is as hard to please as a real one.

It is asked by the clients that the project and its users have.
"""

from __future__ import annotations

import asyncio
import base64
import functools
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import kubernetes
import kubernetes_asyncio
import pytest
import yaml
from kubernetes.client import CoreV1Api, PolicyV1Api

from tests.support.cluster import clusters
from tests.support.cluster.client import (
    IMAGE,
    QUICK,
    api_of,
    condition,
    create,
    log_of,
    manifest,
    refusal,
    wait_for_log,
    waits_for,
)
from tests.support.cluster.double import Cluster

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="sessions and process file descriptors are Linux's")

SLOW_ACCOUNTS = replace(QUICK, schedule=0.3)


def test_refusals(start: Callable[..., Cluster]) -> None:
    cluster = start(quota=2)
    api = api_of(cluster)
    body = manifest("x", serviceAccountName="nobody")
    why = 'pods "x" is forbidden: error looking up service account default/nobody: serviceaccount "nobody" not found'
    assert refusal(lambda: api.create_namespaced_pod("default", body)) == (403, "Forbidden", why)
    why = 'pods "x" is forbidden: no PriorityClass with name high was found'
    assert refusal(lambda: create(api, "x", priorityClassName="high")) == (403, "Forbidden", why)
    assert refusal(lambda: api.create_namespaced_pod("other", manifest("x")))[:2] == (404, "NotFound")
    for bad in (
        manifest("Bad_Name"),
        manifest("x", labels={"a": "not a value"}),
        manifest("x", labels={"a": "v" * 64}),
        manifest("x", restartPolicy="Always"),
        manifest("x", container={"volumeMounts": [{"name": "v", "mountPath": "/v"}]}),
        manifest("x", container={"resources": {"requests": {"memory": "2Gi"}, "limits": {"memory": "1Gi"}}}),
        manifest("x", container={"resources": {"requests": {"nvidia.com/gpu": "1"}}}),
        manifest("x", container={"resources": {"limits": {"memory": "1 GB"}}}),
    ):
        assert refusal(functools.partial(api.create_namespaced_pod, "default", bad))[:2] == (422, "Invalid"), bad
    wrong_type = manifest("x", container={"env": [{"name": "A", "value": 1}]})
    assert refusal(lambda: api.create_namespaced_pod("default", wrong_type))[:2] == (400, "BadRequest")
    create(api, "x")
    why = 'pods "x" already exists'
    assert refusal(lambda: create(api, "x")) == (409, "AlreadyExists", why)
    create(api, "y")
    why = 'pods "z" is forbidden: exceeded quota: pods, requested: pods=1, used: pods=2, limited: pods=2'
    assert refusal(lambda: create(api, "z")) == (403, "Forbidden", why)
    assert refusal(lambda: api.read_namespaced_pod("z", "default")) == (404, "NotFound", 'pods "z" not found')
    stranger = kubernetes.client.Configuration(host=cluster.url)
    stranger.ssl_ca_cert = api.api_client.configuration.ssl_ca_cert
    stranger_api = CoreV1Api(kubernetes.client.ApiClient(stranger))
    assert refusal(lambda: stranger_api.list_namespaced_pod("default"))[:2] == (401, "Unauthorized")


def test_selectors_and_patches(cluster: Cluster, api: CoreV1Api) -> None:
    sleep = {"double/sleep": "60"}
    for name, labels in (("a", {"k": "1"}), ("b", {"k": "2", "done": "True"}), ("c", {})):
        create(api, name, labels=labels, annotations=sleep)

    def names(selector: str) -> str:
        return "".join(pod.metadata.name for pod in api.list_namespaced_pod("default", label_selector=selector).items)

    expected = {
        "": "abc",
        "k=1": "a",
        "k!=1": "bc",
        "!k": "c",
        "k": "ab",
        "k in (1, 2),!done": "a",
        "k notin (1)": "bc",
    }
    assert {selector: names(selector) for selector in expected} == expected
    before = int(api.read_namespaced_pod("a", "default").metadata.resource_version)
    patched = api.patch_namespaced_pod("a", "default", {"metadata": {"labels": {"done": "True", "k": None}}})
    assert patched.metadata.labels == {"done": "True"} and int(patched.metadata.resource_version) > before
    assert names("done=True") == "ab"
    new_node = {"spec": {"nodeName": "elsewhere"}}
    assert refusal(lambda: api.patch_namespaced_pod("a", "default", new_node))[:2] == (422, "Invalid")
    api.delete_collection_namespaced_pod("default", label_selector="done=True")
    for name in "ab":
        cluster.wait(name, "gone")
    assert names("") == "c"


def test_faults(cluster: Cluster, api: CoreV1Api) -> None:
    cluster.add_fault("POST", "/pods$", lost_response=True)
    with pytest.raises(Exception, match=r"(?i)connection"):
        create(api, "one")
    assert api.read_namespaced_pod("one", "default").metadata.name == "one"
    cluster.add_fault("GET", "/pods/one$", cut=True)
    with pytest.raises(Exception, match=r"(?i)connection"):
        api.read_namespaced_pod("one", "default")
    fault = cluster.add_fault("GET", "/log$", status=500, times=2)
    cluster.wait("one", "Running")
    for _ in range(2):
        assert refusal(lambda: api.read_namespaced_pod_log("one", "default"))[:2] == (500, "InternalError")
    assert api.read_namespaced_pod_log("one", "default") is not None and fault.left == 0
    cluster.add_fault("*", "", delay=0.3)
    before = time.monotonic()
    api.read_namespaced_pod("one", "default")
    assert time.monotonic() - before >= 0.3
    assert [r.method for r in cluster.requests][:2] == ["POST", "GET"]


def test_api_away(cluster: Cluster, api: CoreV1Api) -> None:
    create(api, "one", ["sh", "-c", "sleep 0.5; echo done"])
    port = cluster.port
    cluster.pause()
    with pytest.raises(Exception, match=r"(?i)refused|aborted|reset"):
        api.read_namespaced_pod("one", "default")
    with pytest.raises(Exception, match=r"(?i)refused"):
        api_of(cluster).read_namespaced_pod("one", "default")
    cluster.wait("one", "Succeeded")
    cluster.resume()
    assert cluster.port == port and api.read_namespaced_pod("one", "default").status.phase == "Succeeded"


def test_asynchronous_client(cluster: Cluster, api: CoreV1Api) -> None:
    async def use() -> None:
        configuration = kubernetes_asyncio.client.Configuration()
        await kubernetes_asyncio.config.load_kube_config(str(cluster.kubeconfig), client_configuration=configuration)
        async with kubernetes_asyncio.client.ApiClient(configuration) as client:
            core = kubernetes_asyncio.client.CoreV1Api(client)
            await core.create_namespaced_pod("default", manifest("one"))
            while (await core.read_namespaced_pod("one", "default")).status.phase != "Running":
                await asyncio.sleep(0.02)
            selector = "involvedObject.name=one"
            events = await core.list_namespaced_event(
                "default", field_selector=selector, resource_version_match="NotOlderThan", resource_version="0"
            )
            assert "Started" in {event.reason for event in events.items}
            seen = []
            watch = kubernetes_asyncio.watch.Watch()
            version = events.metadata.resource_version
            await core.delete_namespaced_pod("one", "default")
            async with watch.stream(
                core.list_namespaced_event,
                "default",
                field_selector=selector,
                resource_version=version,
                timeout_seconds=1,
            ) as stream:
                async for event in stream:
                    seen.append(event["object"].reason)
            assert seen == ["Killing"]
            log = await core.read_namespaced_pod_log("one", "default") if cluster.pod("one") else "up\nbye\n"
            assert log.startswith("up\n")

    asyncio.run(use())


def kubectl(cluster: Cluster, *arguments: str, content: str | None = None) -> str:
    program = Path(sys.executable).with_name("kubectl")
    environment = {"KUBECONFIG": str(cluster.kubeconfig), "HOME": str(cluster.kubeconfig.parent), "PATH": os.defpath}
    done = subprocess.run(
        [program, *arguments], env=environment, input=content, capture_output=True, text=True, timeout=20
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_kubectl(cluster: Cluster) -> None:
    body = json.dumps(manifest("one", ["sh", "-c", "trap 'exit 0' TERM; echo hello; while :; do sleep 0.05; done"]))
    assert kubectl(cluster, "create", "--validate=false", "-f", "-", content=body) == "pod/one created\n"
    wait_for_log(cluster, "one", "hello\n")
    assert kubectl(cluster, "get", "pods").splitlines()[1].startswith("one ")
    assert json.loads(kubectl(cluster, "get", "pod", "one", "-o", "json"))["status"]["phase"] == "Running"
    assert kubectl(cluster, "logs", "one") == "hello\n"
    kubectl(cluster, "wait", "--for=condition=Ready", "pod/one")
    kubectl(cluster, "label", "pod", "one", "a=b")
    assert kubectl(cluster, "get", "pods", "-l", "a=b", "-o", "name") == "pod/one\n"
    assert '"one" deleted' in kubectl(cluster, "delete", "pod", "one")
    assert cluster.pod("one") is None
    kubectl(cluster, "run", "two", f"--image={IMAGE}", "--restart=Never", "--command", "--", "sleep", "300")
    cluster.wait("two", "Running")
    kubectl(cluster, "delete", "pod", "two", "--grace-period=0", "--force")
    assert cluster.pod("two") is None


def new_namespace(api: CoreV1Api, name: str) -> None:
    """Make a namespace and wait until it takes pods."""
    api.create_namespace({"metadata": {"name": name}})
    watch = kubernetes.watch.Watch()
    for event in watch.stream(api.list_namespaced_service_account, name, timeout_seconds=20):
        if event["object"].metadata.name == "default":
            return
    raise AssertionError("the namespace got no account")


def test_a_namespace_comes_with_an_account_and_goes_with_all_that_is_in_it(start: Callable[..., Cluster]) -> None:
    cluster = start(timing=SLOW_ACCOUNTS)
    api = api_of(cluster)
    made = api.create_namespace({"metadata": {"name": "lab"}})
    assert (made.metadata.name, made.status.phase) == ("lab", "Active")
    assert refusal(lambda: api.create_namespace({"metadata": {"name": "lab"}}))[:2] == (409, "AlreadyExists")
    why = 'pods "early" is forbidden: error looking up service account lab/default: serviceaccount "default" not found'
    assert refusal(lambda: api.create_namespaced_pod("lab", manifest("early"))) == (403, "Forbidden", why)
    new_namespace(api, "other")
    api.create_namespaced_pod("other", manifest("one"))
    api.create_namespaced_secret("other", {"metadata": {"name": "kept"}})
    wait_for_log(cluster, "one", "up\n")

    api.delete_namespace("other")

    assert api.read_namespace("other").status.phase == "Terminating"
    why = "unable to create new content in namespace other because it is being terminated"
    late = {"metadata": {"name": "late"}}
    for create_late, kind in (
        (lambda: api.create_namespaced_pod("other", manifest("late")), "pods"),
        (lambda: api.create_namespaced_secret("other", late), "secrets"),
    ):
        assert refusal(create_late) == (403, "Forbidden", f'{kind} "late" is forbidden: {why}')
    watch = kubernetes.watch.Watch()
    selected = {"field_selector": "metadata.name=other", "timeout_seconds": 20}
    assert any(event["type"] == "DELETED" for event in watch.stream(api.list_namespace, **selected))
    assert cluster.log("one") == "up\nbye\n" and cluster.pod("one") is None
    assert refusal(lambda: api.read_namespace("other")) == (404, "NotFound", 'namespaces "other" not found')
    assert {space.metadata.name for space in api.list_namespace().items} == {"default", "lab"}
    new_namespace(api, "other")
    assert [secret.metadata.name for secret in api.list_secret_for_all_namespaces().items] == []
    assert refusal(lambda: api.delete_namespace("default"))[:2] == (403, "Forbidden")


def test_secrets_and_config_maps_made_by_the_api_are_those_that_pods_get(cluster: Cluster, tmp_path: Path) -> None:
    api = api_of(cluster)
    new_namespace(api, "lab")
    text, core = {"KEY": base64.b64encode(b"secret").decode()}, {"apiVersion": "v1"}
    (tmp_path / "objects.yaml").write_text(
        yaml.safe_dump_all(
            [
                {"kind": "Secret", "metadata": {"name": "s"}, "data": text, "stringData": {"B": "b"}} | core,
                {"kind": "ServiceAccount", "metadata": {"name": "worker"}} | core,
            ]
        )
    )
    kubernetes.utils.create_from_yaml(api.api_client, str(tmp_path / "objects.yaml"), namespace="lab")
    api.create_namespaced_config_map("lab", {"metadata": {"name": "c"}, "data": {"C": "plain"}})
    cluster.add_secret("made-by-test", {"D": b"\xff"}, "lab")

    secret = api.read_namespaced_secret("s", "lab")
    assert (secret.data, secret.type, secret.string_data) == ({**text, "B": "Yg=="}, "Opaque", None)
    assert api.read_namespaced_secret("made-by-test", "lab").data == {"D": "/w=="}
    sources = {"envFrom": [{"secretRef": {"name": "s"}}, {"configMapRef": {"name": "c"}}]}
    body = manifest("one", ["sh", "-c", "echo $KEY $B $C"], container=sources, serviceAccountName="worker")
    api.create_namespaced_pod("lab", body)
    cluster.wait("one", "Succeeded")
    assert cluster.log("one") == "secret b plain\n"

    api.delete_namespaced_secret("s", "lab")
    assert refusal(lambda: api.read_namespaced_secret("s", "lab")) == (404, "NotFound", 'secrets "s" not found')
    api.create_namespaced_pod("lab", manifest("two", container=sources))
    cluster.wait("two", waits_for("CreateContainerConfigError"))
    for bad, code in (
        ({"data": {"KEY": "c2Vj*cmV0"}}, 400),
        ({"stringData": {"KEY": 1}}, 400),
        ({"stringData": {"a b": "c"}}, 422),
        ({"metadata": {"name": "Bad_Name"}}, 422),
        ({"metadata": {"name": "x", "namespace": "default"}}, 400),
    ):
        body = {"metadata": {"name": "x"}} | bad
        assert refusal(functools.partial(api.create_namespaced_secret, "lab", body))[0] == code, bad


def test_kubectl_makes_and_deletes_what_pods_refer_to(cluster: Cluster) -> None:
    literal = "--from-literal=KEY=secret"
    for what in (
        ["namespace", "lab"],
        ["secret", "generic", "s", literal, "--namespace=lab"],
        ["configmap", "c", literal, "--namespace=lab"],
        ["serviceaccount", "worker", "--namespace=lab"],
        ["pdb", "p", "--selector=a=b", "--min-available=1", "--namespace=lab"],
    ):
        body = kubectl(cluster, "create", *what, "--dry-run=client", "-o", "json")
        said = kubectl(cluster, "create", "--validate=false", "-f", "-", content=body)
        assert said.endswith(f"/{json.loads(body)['metadata']['name']} created\n")
    template = "-o=jsonpath={.data.KEY}"
    assert kubectl(cluster, "get", "secret", "s", "--namespace=lab", template) == "c2VjcmV0"
    assert kubectl(cluster, "get", "cm", "c", "--namespace=lab", template) == "secret"
    assert "serviceaccount/worker\n" in kubectl(cluster, "get", "sa", "--namespace=lab", "-o", "name")
    pdb = "poddisruptionbudget.policy/p"
    assert kubectl(cluster, "get", "pdb", "--all-namespaces", "-o", "name") == f"{pdb}\n"
    assert "deleted" in kubectl(cluster, "delete", "secret", "s", "--namespace=lab")
    kubectl(cluster, "delete", "namespace", "lab")
    assert kubectl(cluster, "get", "namespaces", "-o", "name") == "namespace/default\n"


def budget(name: str = "one-stays", **spec: Any) -> dict[str, Any]:
    selector = {"matchLabels": {"app": "infer"}, "matchExpressions": [{"key": "done", "operator": "DoesNotExist"}]}
    return {"metadata": {"name": name}, "spec": {"selector": selector} | spec}


def test_an_eviction_waits_for_the_disruption_budget(cluster: Cluster, api: CoreV1Api) -> None:
    policy = PolicyV1Api(api.api_client)
    policy.create_namespaced_pod_disruption_budget("default", budget(minAvailable=1))
    for name, app in (("a", "infer"), ("b", "infer"), ("c", "blend")):
        create(api, name, labels={"app": app})
    create(api, "over", ["true"], labels={"app": "infer"})  # what has ended does not count
    cluster.wait("over", "Succeeded")
    for name in "abc":
        wait_for_log(cluster, name, "up\n")
    whole = clusters.TestCluster(cluster.kubeconfig, "default", IMAGE, "", "", {}, double=cluster)
    for name in "bc":  # one more than has to stay, and one that the budget isn't about
        clusters.evict_when_allowed(whole, name)
        assert condition(cluster.wait(name, "gone"), "DisruptionTarget")["reason"] == "EvictionByEvictionAPI"

    body = {"metadata": {"name": "a"}}
    why = "Cannot evict pod as it would violate the pod's disruption budget."
    with pytest.raises(kubernetes.client.ApiException) as refused:
        api.create_namespaced_pod_eviction("a", "default", body)
    assert (refused.value.status, "Retry-After" in refused.value.headers) == (429, False)
    answer = json.loads(refused.value.body)
    cause = "The disruption budget one-stays needs 1 healthy pods and has 1 currently"
    assert (answer["message"], answer["details"]["causes"][0]["message"]) == (why, cause)

    def asked(name: str) -> int:
        return sum(request.path.endswith(f"/{name}/eviction") for request in cluster.requests)

    waiting = threading.Thread(target=clusters.evict_when_allowed, args=[whole, "a"])
    before = asked("a")
    waiting.start()
    cluster.wait("a", lambda _: asked("a") >= before + 2)
    policy.delete_namespaced_pod_disruption_budget("one-stays", "default")
    cluster.wait("a", "gone")
    waiting.join(10)
    assert not waiting.is_alive()
    clusters.evict_when_allowed(whole, "a")  # as kubectl: one that is gone is no error

    create(api, "d", labels={"app": "infer"})
    wait_for_log(cluster, "d", "up\n")
    clusters.drain(whole, "d")
    cluster.wait("d", "gone")
    assert asked("d") == 2 and not policy.list_namespaced_pod_disruption_budget("default").items


def test_what_a_budget_can_not_count_it_forbids(cluster: Cluster, api: CoreV1Api) -> None:
    policy, labels = PolicyV1Api(api.api_client), {"app": "infer"}
    create(api, "a", labels=labels)
    wait_for_log(cluster, "a", "up\n")
    policy.create_namespaced_pod_disruption_budget("default", budget(maxUnavailable=1))
    body = {"metadata": {"name": "a"}}
    assert refusal(lambda: api.create_namespaced_pod_eviction("a", "default", body))[0] == 429
    policy.create_namespaced_pod_disruption_budget("default", budget("second", minAvailable=0))
    why = "This pod has more than one PodDisruptionBudget, which the eviction subresource does not support."
    refused = refusal(lambda: api.create_namespaced_pod_eviction("a", "default", body))
    assert refused == (500, "InternalError", why)
    # What does not run is no loss.
    create(api, "b", labels=labels, container={"image": "no.such/image:1"})
    cluster.wait("b", waits_for("ImagePullBackOff"))
    api.create_namespaced_pod_eviction("b", "default", {"metadata": {"name": "b"}})
    cluster.wait("b", "gone")


@pytest.mark.long
def test_many_pods(cluster: Cluster, api: CoreV1Api) -> None:
    count, few = 500, 100
    began = time.process_time()
    for number in range(count):
        labels = {"try": str(number // 2)}
        create(api, f"pod-{number}", labels=labels, annotations={"double/sleep": "1"})
        if number + 1 == few:
            of_few = time.process_time() - began
    last = cluster.wait(f"pod-{count - 1}", "Succeeded", timeout=60)
    assert len(api.list_namespaced_pod("default", label_selector="try").items) == count
    assert last["status"]["phase"] == "Succeeded" and cluster.log("pod-0") == "simulated: asleep for 1.0 s\n"
    assert cluster.most_running({"try": "3"}) == 2 and cluster.most_running({"try": "none"}) == 0
    assert {pod["spec"]["nodeName"] for pod in cluster.pods()} == {"node-a", "node-b"}
    # Nothing may cost more the more pods there are; this is both ends of it.
    assert time.process_time() - began < 3 * count / few * of_few


def test_callers_in_many_threads(cluster: Cluster) -> None:
    problems: list[BaseException] = []
    # Made one by one: the client's reading of a kubeconfig is not for threads (certificates in
    # temporary files that others find before they are written).
    apis = [api_of(cluster) for _ in range(8)]

    def work(number: int) -> None:
        try:
            mine = apis[number]
            create(mine, f"pod-{number}", ["sh", "-c", "echo one; sleep 0.1; echo two"])
            cluster.wait(f"pod-{number}", "Running")
            text = log_of(mine, f"pod-{number}", follow=True)
            assert text == "one\ntwo\n"
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=work, args=[number]) for number in range(len(apis))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems
