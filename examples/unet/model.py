"""A small anisotropic 3D U-Net that finds membranes in serial-section electron microscopy.

The file follows the chunkflow convention for a network: pure torch, and a module-level ``InstantiatedModel`` into which
the caller loads a state dict and which it then calls on a patch::

    InstantiatedModel.load_state_dict(torch.load("model.pt", weights_only=True))
    membrane = InstantiatedModel(patch)

Sources: Ronneberger, Fischer and Brox, "U-Net", MICCAI 2015 (the 2D network); Cicek et al., "3D U-Net", MICCAI 2016
(the 3D one). Unlike theirs, the sections are never pooled along z, since serial sections are about ten times thicker
than a pixel is wide, and the convolutions are padded, so that the output has the shape of the input.
"""

import torch
from torch import Tensor, nn

WIDTHS = (16, 32, 48, 64)
"""Channels of each resolution level, finest first."""


class Block(nn.Module):
    """Two convolutions, each with batch normalisation and ReLU: (batch, n_in, z, y, x) to (batch, n_out, z, y, x).

    The first sees one section, kernel (1, 3, 3). The second also sees the two neighbouring sections, kernel (3, 3, 3),
    where ``across_sections`` asks for it.
    """

    def __init__(self, n_in: int, n_out: int, across_sections: bool) -> None:
        super().__init__()
        depth = 3 if across_sections else 1
        self.layers = nn.Sequential(
            nn.Conv3d(n_in, n_out, (1, 3, 3), padding=(0, 1, 1), bias=False),
            nn.BatchNorm3d(n_out, momentum=0.03),
            nn.ReLU(inplace=True),
            nn.Conv3d(n_out, n_out, (depth, 3, 3), padding=(depth // 2, 1, 1), bias=False),
            nn.BatchNorm3d(n_out, momentum=0.03),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return self.layers(x)


class UNet(nn.Module):
    """Probability of membrane for each voxel of a patch.

    Input: (batch, 1, z, y, x) float32 in [0, 1], which is the uint8 image over 255. Any z; y and x multiples of 8.
    Output: the same shape, float32 in [0, 1]; 1 is membrane, 0 is cell interior or blank.
    """

    def __init__(self, widths: tuple[int, ...] = WIDTHS) -> None:
        super().__init__()
        # Full resolution costs the most and gains the least from neighbouring sections, whose membranes are shifted by
        # many pixels; the coarser levels, where that shift is small, look across sections.
        self.down = nn.ModuleList(
            Block(n_in, n_out, across_sections=level > 0)
            for level, (n_in, n_out) in enumerate(zip((1, *widths[:-1]), widths, strict=True))
        )
        self.pool = nn.MaxPool3d((1, 2, 2))
        coarse_to_fine = list(zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.enlarge = nn.ModuleList(
            nn.ConvTranspose3d(coarse, fine, (1, 2, 2), stride=(1, 2, 2)) for coarse, fine in coarse_to_fine
        )
        # The skip connection is added, not concatenated: half the work at the level that costs the most.
        self.up = nn.ModuleList(Block(fine, fine, across_sections=fine > widths[0]) for _, fine in coarse_to_fine)
        self.head = nn.Conv3d(widths[0], 1, 1)

    def logits(self, x: Tensor) -> Tensor:
        """The network up to the sigmoid, which the loss works on; shapes as in ``forward``."""
        skips = []
        for level, block in enumerate(self.down):
            x = block(x if level == 0 else self.pool(x))
            skips.append(x)
        for enlarge, block, skip in zip(self.enlarge, self.up, skips[-2::-1], strict=True):
            x = block(enlarge(x) + skip)
        return self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Probability of membrane; see the class."""
        return torch.sigmoid(self.logits(x))


# In evaluation mode the batch normalisation uses its stored statistics, so that a patch's result does not depend on the
# other patches of its batch.
InstantiatedModel = UNet().eval()
