"""Accuracy won back in closed form: least squares, BatchNorm, layer after layer."""
