"""Real processes, sockets and files, from the outside."""
