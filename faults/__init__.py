"""Do seeded harm to real commands and check what they survive: ``make faults``, docs/understand/reliability.md."""
