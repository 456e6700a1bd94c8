"""Which requests go to the workers, when and in what order; the others wait here or are refused."""
