"""mi2rage-rt: multimodal relation extraction trained on one modality, served without PyTorch."""

__version__ = "0.1.0"
