"""Files on disk: names and hashes of model files, atomic writes, hashes that are remembered."""
