"""Linear bounds, computed backwards."""
