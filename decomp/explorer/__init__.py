"""The rank explorer for Jupyter."""
