"""Fine-tuning: layer by layer and end to end, with checkpoints and several processes."""
