"""Finding replicas: by watching pods, or from a list of endpoints."""
