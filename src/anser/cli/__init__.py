"""The command line: parse, call the platform, print. A command loads only what it needs."""
