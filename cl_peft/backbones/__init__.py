"""backbones axis."""
