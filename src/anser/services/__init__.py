"""Use cases: each joins the pure core to the outside world through ports."""
