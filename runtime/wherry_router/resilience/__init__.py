"""What keeps one bad replica from hurting requests. Each file decides one thing, purely, with the time passed in."""
