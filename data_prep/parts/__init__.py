"""Built-in third-party models and data, converted once."""
