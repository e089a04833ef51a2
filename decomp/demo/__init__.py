"""The demo on handwritten digits."""
