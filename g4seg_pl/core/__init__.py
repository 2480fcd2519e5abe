"""The method as pure tensor functions; nothing here knows Lightning, files or model names."""
