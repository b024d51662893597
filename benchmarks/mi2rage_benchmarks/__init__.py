"""Latency and parity against the PyTorch baseline; the demo."""
