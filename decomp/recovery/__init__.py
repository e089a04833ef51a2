"""Recovery of accuracy without gradients: least squares, BatchNorm statistics, layer-by-layer decomposition."""
