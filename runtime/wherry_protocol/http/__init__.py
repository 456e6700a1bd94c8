"""How Wherry's HTTP servers behave: bounded reading, tokens, correlation ids, JSON logs, draining.

Plain ASGI, no framework.
"""
