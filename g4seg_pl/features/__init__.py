"""F of Eq. 8: frozen encoders of dense features."""
