"""How much each key, each tenant and everybody together may ask for, and how much they did."""
