"""Training: one loop for every system, and what it stands on."""
