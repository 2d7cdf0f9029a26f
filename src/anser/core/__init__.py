"""Nouns, rules and state machines: standard library only, no clock, no I/O, no randomness."""
