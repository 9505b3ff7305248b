"""Plain classifiers by address: timm, the Hub, a user's own code."""
