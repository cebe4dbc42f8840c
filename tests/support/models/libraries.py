"""Small stand-ins for the libraries that published models name their networks in.

Classes have the arguments and the names of weights that those of the libraries have, and fewer
layers. A test that finds them installs nothing.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_UNET = """
import torch
from torch import nn


class _Encoder(nn.Module):
    def __init__(self, channels, features, conv_op, kernels, strides, convolutions, bias, norm_op, norm, nonlin, act):
        super().__init__()
        self.stages = nn.ModuleList()
        for width, kernel, stride, count in zip(features, kernels, strides, convolutions, strict=True):
            layers = []
            for number in range(count):
                padding = [k // 2 for k in kernel]
                layers.append(conv_op(channels, width, kernel, stride if number == 0 else 1, padding, bias=bias))
                layers += [norm_op(width, **norm), nonlin(**act)]
                channels = width
            self.stages.append(nn.Sequential(*layers))

    def forward(self, x):
        skips = []
        for stage in self.stages:
            x = stage(x)
            skips.append(x)
        return skips


class _Decoder(nn.Module):
    def __init__(self, encoder, features, classes, conv_op, strides, deep_supervision):
        super().__init__()
        self.encoder, self.deep_supervision = encoder, deep_supervision
        transposed = {nn.Conv2d: nn.ConvTranspose2d, nn.Conv3d: nn.ConvTranspose3d}[conv_op]
        steps = list(zip(features[1:], features[:-1], strides[1:], strict=True))[::-1]
        self.transpconvs = nn.ModuleList(transposed(a, b, s, s) for a, b, s in steps)
        self.stages = nn.ModuleList(conv_op(2 * b, b, 3, padding=1) for _, b, _ in steps)
        self.seg_layers = nn.ModuleList(conv_op(b, classes, 1) for _, b, _ in steps)

    def forward(self, skips):
        x, outputs = skips[-1], []
        for up, stage, head, skip in zip(self.transpconvs, self.stages, self.seg_layers, skips[-2::-1], strict=True):
            x = stage(torch.cat([up(x), skip], 1))
            outputs.append(head(x))
        return outputs[::-1] if self.deep_supervision else outputs[-1]


class PlainConvUNet(nn.Module):
    def __init__(
        self, input_channels, n_stages, features_per_stage, conv_op, kernel_sizes, strides, n_conv_per_stage,
        num_classes, n_conv_per_stage_decoder, conv_bias=False, norm_op=None, norm_op_kwargs=None, dropout_op=None,
        dropout_op_kwargs=None, nonlin=None, nonlin_kwargs=None, deep_supervision=False,
    ):
        super().__init__()
        assert n_stages == len(features_per_stage) == len(n_conv_per_stage_decoder) + 1
        self.encoder = _Encoder(
            input_channels, features_per_stage, conv_op, kernel_sizes, strides, n_conv_per_stage, conv_bias, norm_op,
            norm_op_kwargs, nonlin, nonlin_kwargs,
        )
        self.decoder = _Decoder(self.encoder, features_per_stage, num_classes, conv_op, strides, deep_supervision)

    def forward(self, x):
        return self.decoder(self.encoder(x))
"""

_MONAI = """
import torch
from torch import nn


class UNet(nn.Module):
    def __init__(
        self, spatial_dims, in_channels, out_channels, channels, strides, kernel_size=3, num_res_units=0,
        norm="instance", dropout=0.0,
    ):
        super().__init__()
        assert len(strides) == len(channels) - 1
        conv = {2: nn.Conv2d, 3: nn.Conv3d}[spatial_dims]
        kind = {"instance": "InstanceNorm", "batch": "BatchNorm"}[norm]
        layers = [conv(in_channels, channels[0], kernel_size, padding=kernel_size // 2)]
        layers += [getattr(nn, f"{kind}{spatial_dims}d")(channels[0]), nn.PReLU()]
        self.model = nn.Sequential(*layers, nn.Dropout(dropout), conv(channels[0], out_channels, 1))

    def forward(self, x):
        return self.model(x)


class BasicUNet(nn.Module):
    def __init__(self, spatial_dims=3, in_channels=1, out_channels=2, features=(32, 32, 64, 128, 256, 32),
                 act="relu", norm="batch", dropout=0.0, upsample="deconv"):
        super().__init__()
        assert len(features) == 6 and spatial_dims == 3 and act == "relu" and upsample == "deconv"
        name, settings = (norm[0], norm[1]) if isinstance(norm, list) else (norm, {})
        layer = nn.GroupNorm(settings["num_groups"], features[0]) if name == "group" else nn.BatchNorm3d(features[0])
        self.conv_0 = nn.Sequential(nn.Conv3d(in_channels, features[0], 3, padding=1), layer, nn.ReLU())
        self.final_conv = nn.Conv3d(features[0], out_channels, 1)

    def forward(self, x):
        return self.final_conv(self.conv_0(x))
"""

_CONNECTOMICS = """
from torch import nn


class UNet3D(nn.Module):
    def __init__(self, block_type, in_channel, out_channel, filters, is_isotropic, isotropy, pad_mode, act_mode,
                 norm_mode, pooling):
        super().__init__()
        assert block_type == "residual" and act_mode == "elu" and norm_mode == "bn" and not is_isotropic
        kernel, padding = ((3, 3, 3), 1) if isotropy[0] else ((1, 3, 3), (0, 1, 1))
        conv = nn.Conv3d(in_channel, filters[0], kernel, padding=padding, padding_mode=pad_mode)
        self.conv_in = nn.Sequential(conv, nn.BatchNorm3d(filters[0]), nn.ELU())
        self.conv_out = nn.Conv3d(filters[0], out_channel, 1)

    def forward(self, x):
        return self.conv_out(self.conv_in(x))
"""

LIBRARIES = {
    "dynamic_network_architectures": {"architectures/unet.py": _UNET},
    "monai": {"networks/nets/__init__.py": _MONAI},
    "connectomics": {"model/arch/__init__.py": _CONNECTOMICS},
}
"""Files of each library below its folder."""


@contextmanager
def installed(folder: Path, patch: pytest.MonkeyPatch, *names: str) -> Iterator[None]:
    """Install the libraries, in this process and those it starts, and forget them afterwards."""
    for name in names:
        for file, text in LIBRARIES[name].items():
            path = folder / name / file
            path.parent.mkdir(parents=True)
            path.write_text(text)
            for place in path.parents:
                if place == folder:
                    break
                (place / "__init__.py").touch()
    patch.syspath_prepend(folder)
    patch.setenv("PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]))
    _forget()
    yield
    _forget()


def _forget() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] in LIBRARIES]:
        del sys.modules[name]
