"""Results as text, plots and a web page."""
