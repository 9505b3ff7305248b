"""The bundled model zoo: one folder per model, each what its Hub repository holds."""
