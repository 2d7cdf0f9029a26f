"""Measurements of the scheduler, with the policies that it is compared to. `anser bench` runs them.

Not part of the package: it is loaded from a checkout.
"""
