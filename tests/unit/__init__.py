"""One rule, one test: mirrors core, config and api."""
