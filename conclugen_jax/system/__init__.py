"""What any program needs of its machine: locks, signals, progress, the other processes. Uses no other room."""
