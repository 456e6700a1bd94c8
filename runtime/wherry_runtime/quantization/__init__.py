"""Weight formats: how a matrix is rounded, how its bits lie in memory, and what multiplying with it means."""
