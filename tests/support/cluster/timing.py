"""How long the cluster takes for what it does."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """How long things take, in seconds; what a real cluster takes is in brackets."""

    schedule: float = 0.05
    """From the creation of a pod until the scheduler has looked at it [0.1]."""
    create: float = 0.1
    """From then until the container runs, the pull of its image included [1–60]."""
    back_off: float = 0.2
    """Between two tries at what a pod lacks, such as a node, an image or a secret [10–300]."""
    log_lead: float = 0.3
    """From the end of the process, and of its log, until the status says terminated [1]."""
    phase: float = 0.1
    """From the terminated status until the phase is Succeeded or Failed [0–1]."""
    linger: float = 0.3
    """From the end of a deleted pod until the object is gone [0.7]."""
    unready: float = 0.3
    """From a node's last sign of life until the API shows it and its pods as not ready [50]."""
    toleration: float = 1.0
    """From then until its pods are marked for deletion [300]."""
    lost_log: float = 0.5
    """Until a request for a log on a lost node fails [3–30]."""
    services: float = 0.3
    """From the start of a kubelet until it can make containers [0–13]."""
    eviction: float = 1.0
    """What an evicted pod gets to end in [1]."""
    shutdown: float = 1.0
    """What pods get to end in when their node shuts down [30]."""
