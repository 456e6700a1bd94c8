"""A model from one format into another, tensor by tensor."""
