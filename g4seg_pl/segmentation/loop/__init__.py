"""The closed loop in the embedded world: networks trained on seeds, on g4seg, and on the truth."""
