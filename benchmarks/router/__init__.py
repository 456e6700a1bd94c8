"""What routers cost: Wherry's beside others, in front of mock workers that take no time."""
