"""Errors that name a layer, progress bars, tables, files: no idea of the project's own."""
