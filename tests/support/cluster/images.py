"""Names of images, and what nodes say when they can't pull or start one.

The texts are those of containerd, runc and registries. In those of registries ``{image}``,
``{host}``, ``{path}`` and ``{tag}`` stand for the parts of the image's name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

NOT_FOUND = "{image}: not found"
"""The registry has no such image."""
PULL_DENIED = (
    "pull access denied, repository does not exist or may require authorization: "
    "server message: insufficient_scope: authorization failed"
)
"""The registry wants credentials."""
FORBIDDEN = "pulling from host {host} failed with status code [manifests {tag}]: 403 Forbidden"
"""The registry knows who asks, and refuses."""
REGISTRY_BROKEN = "pulling from host {host} failed with status code [manifests {tag}]: 500 Internal Server Error"
"""The registry has an error of its own."""
NO_SUCH_HOST = (
    'failed to do request: Head "https://{host}/v2/{path}/manifests/{tag}": '
    "dial tcp: lookup {host} on 10.0.0.254:53: no such host"
)
"""Nobody knows the registry's name."""
REFUSED = (
    'failed to do request: Head "http://{host}/v2/{path}/manifests/{tag}": dial tcp {host}: connect: connection refused'
)
"""Nothing listens at the registry's address."""

CANNOT_START = (
    "failed to create containerd task: failed to create shim task: OCI runtime create failed: runc create failed: "
    "unable to start container process: "
)
"""How the text begins of a container that can't start."""
NO_CGROUP = (
    f'{CANNOT_START}error during container init: error mounting "cgroup" to rootfs at "/sys/fs/cgroup": '
    "stat /sys/fs/cgroup/cpu/kubepods/burstable/pod1/2: no such file or directory: unknown"
)
"""The node's control groups are broken; for ``Cluster.break_node``."""
NO_GPU_DRIVER = (
    f"{CANNOT_START}error during container init: error running prestart hook #0: exit status 1, stdout: , "
    "stderr: nvidia-container-cli: initialization error: load library failed: libnvidia-ml.so.1: "
    "cannot open shared object file: no such file or directory: unknown"
)
"""The driver of the node's GPUs is gone; for ``Cluster.break_node``."""

_HUB = "docker.io"
_NAME = re.compile(
    r"([A-Za-z0-9.-]+(:[0-9]+)?/)?[a-z0-9]+([._-]+[a-z0-9]+)*(/[a-z0-9]+([._-]+[a-z0-9]+)*)*"
    r"(:[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?(@sha256:[0-9a-f]{64})?"
)


@dataclass(frozen=True)
class Reference:
    """The parts of an image's name."""

    host: str
    path: str
    tag: str

    @classmethod
    def of(cls, image: str) -> Reference:
        """The parts, with what a short name leaves out."""
        host, _, rest = image.partition("/")
        if not rest or not ("." in host or ":" in host or host == "localhost"):
            host, rest = _HUB, image
            rest = rest if "/" in rest else f"library/{rest}"
        path, _, tag = rest.partition("@" if "@" in rest else ":")
        return cls(host, path, tag or "latest")

    def failed(self, trouble: str) -> str:
        """What a node says when a pull fails, with the trouble that the registry made."""
        image = f"{self.host}/{self.path}:{self.tag}"
        server = "registry-1.docker.io" if self.host == _HUB else self.host
        for part, value in (("image", image), ("host", server), ("path", self.path), ("tag", self.tag)):
            trouble = trouble.replace(f"{{{part}}}", value)
        began = "rpc error: code = NotFound desc = " if trouble.endswith("not found") else ""
        return f'{began}failed to pull and unpack image "{image}": failed to resolve reference "{image}": {trouble}'


def malformed(image: str) -> str | None:
    """What a node says of a name that no image can have; None: one can."""
    if _NAME.fullmatch(image):
        return None
    path = Reference.of(image).path
    why = f": repository name ({path}) must be lowercase" if path != path.lower() else ""
    parsed = f'couldn\'t parse image name "{image}": invalid reference format{why}'
    return f'Failed to apply default image tag "{image}": {parsed}'
