"""Anser: open models, on compute that many parties share, through the APIs people already use."""

__version__ = "0.1.0"
