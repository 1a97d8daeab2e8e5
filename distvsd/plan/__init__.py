"""What a run will need, worked out from its configuration."""
