"""Command-line entry points: each defines its flags and calls one room; may use every other room, nothing may use it."""
