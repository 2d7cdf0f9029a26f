"""Dialects: decode bytes, call one service, encode."""
