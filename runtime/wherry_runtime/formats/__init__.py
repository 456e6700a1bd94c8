"""Files that hold models: what they are, what is in them, reading and writing them. No torch: numpy and the standard
library read a header."""
