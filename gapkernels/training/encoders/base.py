"""What every encoder has in common."""

from torch import nn


class Encoder(nn.Module):
    """Turns one modality into features [N, output_width]."""

    output_width: int
