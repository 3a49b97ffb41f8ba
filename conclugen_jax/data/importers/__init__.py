"""Foreign layouts read as sources: csd files, the authors' CSV and YAML, MMSA's pickles."""
