"""Statistics from data, and what they change: moments, whitened kernels, weights of layers."""
