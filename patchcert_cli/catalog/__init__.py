"""The zoo: models found, added and published, and what their cards may say."""
