"""Lift a torchvision pipeline onto the device, or say why it stays on the CPU."""
