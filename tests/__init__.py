"""What guards Anser: each test's docstring states the rule that it guards."""
