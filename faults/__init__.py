"""What runs survive: real commands with seeded faults. ``make faults``, docs/reliability.md."""
