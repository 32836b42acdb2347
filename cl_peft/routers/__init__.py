"""Routers: which module answers for a sample. ``base``, then one file per router."""
