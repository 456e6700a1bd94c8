"""Who a request is from: API keys out of Secrets, and tokens of an OIDC issuer."""
