"""Text-to-image models behind the Generator protocol."""
