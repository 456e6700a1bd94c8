"""What Wherry's processes say to one another. No torch, no kopf, no Kubernetes client."""
