"""What every encoder has in common."""

from torch import Tensor, nn


class Encoder(nn.Module):
    """Turns one modality into features [N, output_width].

    Attributes:
        output_width: width of the features.
        calibration_samples: training samples that `calibrate` wants to see; 0 if it need not be called.
    """

    output_width: int
    calibration_samples = 0

    def calibrate(self, inputs: Tensor) -> None:
        """Set what follows from the data itself, once, before the first step."""
