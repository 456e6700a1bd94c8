"""From a model's URI on a hub, an object store, a web server or a registry to a whole, verified directory here.

A source (`hub`, `s3`, `web`, `oci`: one file for each) only says which files make up a model and how each is asked for.
All the rest is done once for all of them: `http` (redirects, retries), `transfer` (resume, verification), `store` and
`lock` (the cache that processes and pods share) and `fetch`, which ties them together. No torch.
"""
