"""Certify and attack loops over images, run folders, results."""
