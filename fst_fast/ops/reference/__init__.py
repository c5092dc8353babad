"""The truth in plain PyTorch: what every kernel is measured against."""
