"""Algorithms that choose codes so that a layer's output changes least, knowing what its inputs are like."""
