"""The binaries of Kubernetes that local mode and the kind cluster need."""
