"""A study as one page: tables, figures and maps."""
