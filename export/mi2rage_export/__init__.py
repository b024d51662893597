"""PyTorch modules to ONNX graphs, checked against the originals."""
