"""The data engine: episodes on disk, cameras, recording, 4D Gaussian reconstruction and the data flywheel."""
