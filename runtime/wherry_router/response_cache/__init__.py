"""Answers that need not be computed again: found by what was asked, or by what it means."""
