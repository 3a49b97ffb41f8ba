"""Configurations: base.py declares every key, the other files override some of them."""
