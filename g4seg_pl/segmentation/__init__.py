"""Training a segmentation network on refined masks: networks, losses, augmentation, test."""
