"""Exact, memory-light losses for multimodal contrastive training that closes the modality gap."""

__version__ = "0.1.0"
