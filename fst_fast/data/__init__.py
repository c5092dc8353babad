"""Turn any images into checked batches on the device."""
