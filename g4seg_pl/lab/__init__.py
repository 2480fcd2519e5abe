"""The laboratory: every figure of README and docs, measured, kept on disk and measured once."""
