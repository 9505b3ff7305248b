"""Transport to and from the Hugging Face Hub; only here its client is imported."""
