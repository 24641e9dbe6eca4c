"""Reference trainer: presets, encoders, training loop, checkpoints, results and reports."""
