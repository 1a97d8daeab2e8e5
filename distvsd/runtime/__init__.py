"""One process living on a machine: its run directory, its lock, what it reports. Standard library only."""
