"""The real core and services in a seeded world under virtual time, with faults."""
