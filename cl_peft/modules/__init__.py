"""Modules: what one task adds to the backbone. ``base`` and ``bank``, then one file per method."""
