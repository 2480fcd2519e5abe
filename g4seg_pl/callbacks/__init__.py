"""What happens around a prediction: writing, progress, dense CRF."""
