"""Compressed models in files: weights and plan in one safetensors file, which runs no code when it is read."""
