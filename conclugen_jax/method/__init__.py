"""What the paper says, as pure functions and Flax modules: losses, clustering, networks, objective. No files; uses no other room."""
