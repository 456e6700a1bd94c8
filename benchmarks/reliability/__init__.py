"""What clients see when workers fail, behind several routers."""
