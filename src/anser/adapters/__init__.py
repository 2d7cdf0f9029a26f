"""The outside world, behind ports; chosen by the platform and by nobody else."""
