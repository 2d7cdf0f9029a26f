"""Hypothesis: whatever comes, the invariants hold."""
