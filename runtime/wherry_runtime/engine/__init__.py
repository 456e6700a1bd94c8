"""The step loop and what it runs. `async_engine` is the way in."""
