"""Moves bytes: HTTP guards, upstream connections, SSE framing. Knows no member and no model."""
