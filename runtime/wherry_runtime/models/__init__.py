"""Model families. Each file declares one architecture: how its config.json reads and what its layers have."""
