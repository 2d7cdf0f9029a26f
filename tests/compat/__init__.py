"""Official SDKs, unmodified, against `anser serve` with the real model."""
