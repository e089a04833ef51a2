"""Statistics of layers from calibration data, and their use: moments, whitened kernels, sensitivities."""
