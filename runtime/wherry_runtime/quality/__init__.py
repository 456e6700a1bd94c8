"""How good a model's predictions are on a text, and how far they are from another's."""
