"""How many multiply-adds a patch takes, and how many a second the processor can do."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from bench.common import wait_for
from bench.compare.data import Setting, load_network

MATRIX = 2048
"""Rows and columns of the largest matrices."""


def matrix_rate(precision: str, device: str) -> float:
    """Measure multiply-adds per second of matrix multiplication with all threads: the best of six.

    The matrices grow to ``MATRIX`` until one takes half a second: a processor that can't do
    bfloat16 would take minutes.
    """
    import torch

    dtype, size = getattr(torch, precision), 256
    while True:
        a, b = (torch.rand(size, size).to(device, dtype) for _ in range(2))
        seconds = []
        for _ in range(6):
            wait_for(device)
            start = time.perf_counter()
            torch.matmul(a, b)
            wait_for(device)
            seconds.append(time.perf_counter() - start)
        if size >= MATRIX or min(seconds) > 0.5:
            return size**3 / min(seconds)
        size *= 2


def multiply_adds(setting: Setting) -> int:
    """Count the multiply-adds of the network's convolutions for one patch, padding included."""
    import torch

    network, total = load_network(setting), 0

    def count(module: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        nonlocal total
        transposed = isinstance(module, torch.nn.ConvTranspose3d)
        positions = (inputs[0] if transposed else output)[0, 0].numel()
        kernel = int(np.prod(module.kernel_size))
        total += positions * module.in_channels * module.out_channels // module.groups * kernel

    for module in network.modules():
        if isinstance(module, torch.nn.Conv3d | torch.nn.ConvTranspose3d):
            module.register_forward_hook(count)
    with torch.inference_mode():
        network(torch.zeros(1, 1, *setting.patch, device=setting.device))
    return total
