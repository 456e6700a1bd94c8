"""What quantizing a checkpoint costs in quality, and whether `auto` and AWQ keep what they promise."""
