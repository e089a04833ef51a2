"""General utilities: errors that name a layer, progress bars, tables, files."""
