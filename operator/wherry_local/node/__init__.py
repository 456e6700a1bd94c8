"""A process node: plays the kubelet, and runs the containers of its pods as local processes."""
