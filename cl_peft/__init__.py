"""Continual learning with parameter-efficient modules on a frozen backbone."""

__version__ = "0.1.0"
