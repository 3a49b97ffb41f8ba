"""What the paper says, as pure functions and Flax modules: losses, clustering, networks, objective. Uses no files, no room."""
